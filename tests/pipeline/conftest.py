"""Fixtures of tests that score with a made-up engine, and of what was logged."""

import pytest

from weights_store.messages import progress_of


@pytest.fixture
def model(tmp_path):
    """A model folder with nothing in it that could score."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"dtype": "float32"}')
    (folder / "model.safetensors").write_bytes(b"made up")
    return folder


@pytest.fixture
def logged(caplog):
    """What our modules have logged in this test: its `lines` for people, and its `progress`."""

    class Logged:
        @property
        def lines(self):
            return [record.getMessage() for record in self._records() if progress_of(record) is None]

        @property
        def progress(self):
            return [progress for record in self._records() if (progress := progress_of(record)) is not None]

        def _records(self):
            return [record for record in caplog.records if record.name.startswith("tokenweights")]

    caplog.set_level("INFO", "tokenweights")
    return Logged()


@pytest.fixture(scope="session")
def make_strangers():
    """Return a function that fills a folder with files of a user, named like our modules and packages, that raise on import."""

    def make(folder):
        for name in ("train", "pipeline", "flows", "weights_store", "tokenizers", "datasets/__init__"):
            path = folder / f"{name}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text('raise RuntimeError("a stranger\'s file was imported")\n')

    return make
