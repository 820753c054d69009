"""Fixtures of tests that render chats: a tokenizer of every kind in `template_kinds.py`."""

import pytest

from pipeline.chat.tokenizer import ChatTokenizer
from tests.pipeline.chat.template_kinds import KINDS, save_tokenizer


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
