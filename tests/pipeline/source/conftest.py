"""What reading a source gives, as the tests of this folder look at it."""

from collections import Counter

import pytest

from pipeline.dataset_section import DatasetSection
from pipeline.source.intake import read_source
from pipeline.source.pairs import Pair


@pytest.fixture
def read():
    """Return a function that reads a whole source: its pairs by row, and the reasons of the other rows."""

    def read_all(path, **settings):
        found = list(read_source(DatasetSection(name="x", source=str(path), **settings)))
        pairs = {row.source_row: pair for row, pair in found if isinstance(pair, Pair)}
        reasons = Counter(problem.reason.value for _, problem in found if not isinstance(problem, Pair))
        return pairs, dict(reasons)

    return read_all
