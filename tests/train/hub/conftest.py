"""A hub on loopback in this process, and huggingface_hub pointed at it."""

import runpy
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SMALL_STORE = runpy.run_path(str(HERE.parent.parent / "weights_store" / "conftest.py"))
LOCAL_HUB = runpy.run_path(str(HERE / "local_hub.py"))
TOKEN = LOCAL_HUB["TOKEN"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub without repositories; whoever uses huggingface_hub in this test is logged in there."""
    constants = pytest.importorskip("huggingface_hub").constants
    with LOCAL_HUB["LocalHub"]().running() as hub:
        settings = {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("TOKENWEIGHTS_CACHE", str(tmp_path / "cache"))
        yield hub


@pytest.fixture
def small_store(tmp_path):
    """The small store of tests/weights_store with TI-DPO."""
    return SMALL_STORE["add_ti"](SMALL_STORE["build_small_store"](tmp_path / "store"))
