"""A report that is there stays only if it is whole; the build itself is in `test_publish.py`."""

from pipeline.stages.report import kept_findings
from weights_store.checks.reports import with_digest
from weights_store.inspection.doctor import Diagnosis
from weights_store.inspection.page.kept import with_findings
from weights_store.location import Location

FILE, KEY = "toy/tis-dpo@0.html", "0123456789abcdef" * 4
FOUND = [Diagnosis("clamped", "warning", "38 %", "They say the same.", "Set `weights.spread`.")]


def test_a_report_with_any_flipped_bit_is_written_again(tmp_path):
    folder = Location(str(tmp_path))
    whole = with_digest(with_findings("<!doctype html>\n<title>toy@0</title>\n", KEY, FOUND), FILE)
    folder.write(FILE, whole)
    assert kept_findings(folder, FILE, KEY) == FOUND
    for bit in range(0, 8 * len(whole), 3):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / FILE).write_bytes(bytes(flipped))
        assert str(kept_findings(folder, FILE, KEY)).startswith(f"reports/{FILE} is written again: it is damaged"), bit
