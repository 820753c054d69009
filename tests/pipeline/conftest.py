"""Fixtures of tests that score with a made-up engine."""

import pytest


@pytest.fixture
def model(tmp_path):
    """A model folder with nothing in it that could score."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"dtype": "float32"}')
    (folder / "model.safetensors").write_bytes(b"made up")
    return folder
