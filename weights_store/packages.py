"""Installed packages: their versions, which commits, trained models and `tokenweights --version` name, and what is missing."""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from weights_store.errors import causes


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the version of each package; those that are not installed are left out."""
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


_EXTRAS = {
    "torch": "train",
    "accelerate": "train",
    "peft": "train",
    "ray": "ray",
    "trl": "trl",
    "huggingface_hub": "hub",
    "openlineage": "lineage",
}
"""Where a package is that not every extra has."""


def how_to_install(package: str, extra: str) -> str:
    """Return how to install a package that is missing: by the extra that has it, which is `extra` for most."""
    if package == "vllm":
        return "pip install 'tokenweights[score]' (GPU) or 'tokenweights[score-cpu]'"
    return f"pip install 'tokenweights[{_EXTRAS.get(package, extra)}]'"


def missing_package(error: ImportError) -> str | None:
    """Return the package that was not found, even if another package has wrapped the error; None if none was missing."""
    names = [cause.name for cause in causes(error) if isinstance(cause, ModuleNotFoundError) and cause.name]
    return names[-1].partition(".")[0] if names else None
