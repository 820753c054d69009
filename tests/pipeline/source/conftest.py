"""Fixtures of tests that read sources and render chats; tokenizers of every kind come from `template_kinds.py`."""

from collections import Counter

import pytest

from pipeline.recipe import DatasetSection
from pipeline.source.chat import ChatTokenizer
from pipeline.source.intake import read_source
from pipeline.source.pairs import Pair
from tests.pipeline.source.template_kinds import KINDS, save_tokenizer


@pytest.fixture(scope="session")
def kind_folder(tmp_path_factory):
    """Return a function that gives the folder of a tokenizer with the template of a kind."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = save_tokenizer(KINDS[name], tmp_path_factory.mktemp("kind") / name)
        return folders[name]

    return folder


@pytest.fixture(scope="session")
def of_kind(kind_folder):
    """Return a function that gives the chat tokenizer of a kind."""
    return lambda name: ChatTokenizer(kind_folder(name))


@pytest.fixture
def read():
    """Return a function that reads a whole source: its pairs by row, and the reasons of the other rows."""

    def read_all(path, **settings):
        found = list(read_source(DatasetSection(name="x", source=str(path), **settings)))
        pairs = {row.source_row: pair for row, pair in found if isinstance(pair, Pair)}
        reasons = Counter(problem.reason.value for _, problem in found if not isinstance(problem, Pair))
        return pairs, dict(reasons)

    return read_all
