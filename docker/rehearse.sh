#!/bin/sh
# Run the install steps of one image in a clean virtual environment, look at the result, and remove it again.
#
#   docker/rehearse.sh train | flows | score-cpu | worker-cpu | score-gpu | worker-gpu
#
# The commands are read out of docker/Dockerfile; what it does with apt, users and folders is not rehearsed.
#
#   PYTHON           a Python 3.11 (default: python3.11)
#   WITHOUT_CUDA=1   leave CUDA's packages out: for a machine where pip finds a CPU build of torch
#   DRY_RUN=1        only see that every pin exists as a wheel, with uv (UV, default: uv); installs and imports nothing
#   CPU_TORCH_INDEX  where the CPU build of torch is (default: as in the Dockerfile)
#   KEEP=FOLDER      work there and leave the environment, in FOLDER/env (default: a temporary folder)
set -eu
image=${1:?name an image: train, flows, score-cpu, worker-cpu, score-gpu or worker-gpu}
repo=$(cd "$(dirname "$0")/.." && pwd)
work=${KEEP:-$(mktemp -d)}
[ -n "${KEEP:-}" ] || trap 'rm -rf "$work"' EXIT
mkdir -p "$work"
unset PYTHONPATH VIRTUAL_ENV

# Print the `pip …` commands that a target of the Dockerfile runs.
pip_steps() {
    awk -v target="$1" '/^FROM /{on = ($NF == target)} on && /^RUN pip /{sub(/^RUN /, ""); print}' "$repo/docker/Dockerfile"
}

# run_steps FOLDER TARGET: run them in FOLDER, with the environment's pip.
run_steps() {
    steps=$(pip_steps "$2")
    [ -n "$steps" ] || { echo "error: docker/Dockerfile has no target $2 with pip steps" >&2; exit 1; }
    cd "$1"
    echo "$steps" | while read -r step; do
        echo "+ $step"
        eval "PATH='$work/env/bin:$PATH' $step --quiet" </dev/null || exit 1
    done
}

# The folder that the Dockerfile's COPY lines would make.
mkdir -p "$work/package" "$work/image/requirements"
cd "$repo"
cp -R pyproject.toml README.md LICENSE tokenweights.py tokenweights_flows.py weights_store pipeline flows train "$work/package/"
cp "requirements/$image.txt" "$work/image/requirements/"
if [ -n "${WITHOUT_CUDA:-}" ]; then
    sed -i -E '/^(nvidia-|cuda-|triton==)/d' "$work/image/requirements/$image.txt"
fi
CPU_TORCH_INDEX=${CPU_TORCH_INDEX:-$(sed -n 's/^ARG CPU_TORCH_INDEX=//p' docker/Dockerfile)}
export CPU_TORCH_INDEX

started=$(date +%s)
"${PYTHON:-python3.11}" -m venv "$work/env"
run_steps "$work/package" package
cp -R "$work/package/dist" "$work/image/"
if [ -n "${DRY_RUN:-}" ]; then
    # With uv: it reads the metadata only, where some versions of pip fetch gigabytes of wheels first.
    ${UV:-uv} pip install --dry-run --python "$work/env/bin/python" --no-deps --only-binary :all: \
        -r "$work/image/requirements/$image.txt" >"$work/dry-run.txt" 2>&1 || { cat "$work/dry-run.txt" >&2; exit 1; }
    echo "$image: every one of $(grep -c == "$work/image/requirements/$image.txt") packages is there as a wheel; nothing installed"
    exit 0
fi
run_steps "$work/image" "$image"
echo "$image: installed in $(($(date +%s) - started)) s, $(du -sm "$work/env" | cut -f1) MB"
cd "$work"
"$work/env/bin/python" "$repo/docker/smoke.py" "$image"
