#!/bin/sh
# Write every requirements/*.txt from the extras in pyproject.toml and the versions in constraints.in. Run by `make lock`.
#
#   UV         the uv program (default: uv)
#   CPU_TORCH  where uv finds the CPU build of torch (default: PyTorch's own index; a folder: "--find-links FOLDER")
set -eu
cd "$(dirname "$0")/.."

UV=${UV:-uv}
CPU_TORCH=${CPU_TORCH:---extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match}

# lock NAME "INPUTS" [OPTION…]: the pins that NAME.txt already has stay where they still fit.
lock() {
    name=$1 inputs=$2
    shift 2
    # shellcheck disable=SC2086  # INPUTS are several words
    "$UV" pip compile --quiet --no-annotate --no-header --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
        --constraints requirements/constraints.in --overrides requirements/overrides.in \
        "$@" --output-file "requirements/$name.txt" $inputs
    echo "requirements/$name.txt: $(grep -c == "requirements/$name.txt") packages"
}

# shellcheck disable=SC2086  # CPU_TORCH is several words
lock dev "requirements/dev.in pyproject.toml --extra score-cpu --extra flows --extra train --extra dev" $CPU_TORCH

# The images start from what the development environment was tested with, and depart only where a CUDA build must, and flows
# where Prefect must. Images install with --require-hashes: what an index serves is installed only if it is what was locked.
for image in build tools flows train-cpu score-cpu; do
    cp requirements/dev.txt "requirements/$image.txt"
done
for image in train-gpu score-gpu; do
    sed 's/+cpu$//' requirements/dev.txt >"requirements/$image.txt"
done
lock build "requirements/build.in" --generate-hashes
lock tools "requirements/tools.in" --generate-hashes
lock flows "requirements/flows.in pyproject.toml --extra flows" --generate-hashes
# shellcheck disable=SC2086
lock train-cpu "pyproject.toml --extra train" --generate-hashes $CPU_TORCH
lock train-gpu "pyproject.toml --extra train" --generate-hashes
# shellcheck disable=SC2086
lock score-cpu "pyproject.toml --extra score-cpu" --generate-hashes $CPU_TORCH
lock score-gpu "pyproject.toml --extra score" --generate-hashes
