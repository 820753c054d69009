"""Findings that stand in a page: they come back as they were, and only under their key."""

from weights_store.inspection.doctor import Diagnosis
from weights_store.inspection.page.kept import read_findings, with_findings

HTML = '<!doctype html>\n<html lang="en"><title>toy@0</title>\n</html>\n'
KEY, OTHER = "0123456789abcdef" * 4, "f" * 64
FOUND = [
    Diagnosis("clamped", "warning", "38 % of the tokens --> <b>", "π+ and π− say\nthe same.", "Set `weights.spread`."),
    Diagnosis("constant", "note", "a", "b", "c"),
]


def test_findings_come_back_from_a_page_as_they_were():
    for found in (FOUND, []):
        page = with_findings(HTML, KEY, found)
        assert read_findings(page.encode(), KEY) == found
        assert page.count("-->") == 1
        lines = page.splitlines()
        assert [lines[0], *lines[2:]] == HTML.splitlines()


def test_findings_under_another_key_do_not_count():
    page = with_findings(HTML, KEY, FOUND).encode()
    assert read_findings(page, OTHER) is None
    assert read_findings(HTML.encode(), KEY) is None
