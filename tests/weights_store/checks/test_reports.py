"""Reports carry a digest of themselves: whatever happens to one of their bytes is found."""

import random

import pytest

from weights_store.checks.reports import check_reports, report_problem, with_digest
from weights_store.location import Location

HTML = '<!doctype html>\n<html lang="en"><title>toy@0</title>\n<p>né 🍞</p>\n</html>\n'
FILE = "toy/tis-dpo@0.html"


def test_a_report_is_the_same_page_with_one_more_line():
    lines = with_digest(HTML, FILE).decode().splitlines()
    assert lines[1].startswith("<!-- sha256 of the name in reports/ and of all that follows: ")
    assert [lines[0], *lines[2:]] == HTML.splitlines()
    assert report_problem(with_digest(HTML, FILE), FILE) is None


def test_each_flipped_bit_and_each_cut_of_a_report_is_found():
    whole = with_digest(HTML, FILE)
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        assert report_problem(bytes(flipped), FILE), bit
    for length in range(len(whole)):
        assert report_problem(whole[:length], FILE), length


@pytest.fixture
def root(tmp_path):
    root = Location(str(tmp_path))
    for name in ("toy/tis-dpo@0.html", "toy/tis-dpo@1.html"):
        (root / "reports").write(name, with_digest(HTML, name))
    return root


def test_damaged_reports_of_a_store_are_findings(root):
    assert list(check_reports(root)) == []
    whole, bit = bytearray(with_digest(HTML, "toy/tis-dpo@1.html")), random.Random(3).randrange(8 * len(HTML))
    whole[-1 - bit // 8] ^= 1 << bit % 8
    (root / "reports").write("toy/tis-dpo@1.html", bytes(whole))
    (root / "reports").write("no-digest@0.html", HTML.encode())
    without, damaged = check_reports(root)
    assert without.problem.startswith("it is damaged: its first lines are not those of a report")
    assert (damaged.table, damaged.is_note) == ("reports/toy/tis-dpo@1.html", False)
    assert damaged.problem.startswith("it is damaged, or another report: its SHA-256 is ")


def test_a_report_in_the_place_of_another_is_a_finding(root):
    (root / "reports").write("toy/tis-dpo@1.html", (root / "reports").read("toy/tis-dpo@0.html"))
    assert [finding.table for finding in check_reports(root)] == ["reports/toy/tis-dpo@1.html"]


def test_a_store_without_reports_has_none_to_check(tmp_path):
    assert list(check_reports(Location(str(tmp_path)))) == []
