"""A view as one self-contained HTML file: no server, no network, readable without JavaScript.

`render` is the only door. `template.html`, `style.css` and `script.js` are what the browser gets; the Python files beside them
make tokens, charts and numbers for it.
"""

from weights_store.inspection.page.render import render

__all__ = ["render"]
