"""STUB of the page that shows a `View` as one HTML file; delete this file when the page is merged."""

import html

from weights_store.inspection.view import View


def render(view: View) -> str:
    """Return an HTML document."""
    title = html.escape(view.title)
    return f'<!doctype html>\n<meta charset="utf-8">\n<meta name="generator" content="tokenweights">\n<title>{title}</title>\n'
