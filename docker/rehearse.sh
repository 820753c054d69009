#!/bin/sh
# Run the install steps of one environment of the images in a clean virtual environment, look at the result, and remove it again.
#
#   docker/rehearse.sh flows | score-cpu | score-gpu | train-cpu | train-gpu
#
# The commands are read out of docker/Dockerfile; what it does with apt, users and folders is not rehearsed.
#
#   PYTHON           a Python 3.11 with pip (default: python3.11)
#   WITHOUT_CUDA=1   leave CUDA's packages out: for a machine where pip finds a CPU build of torch, whose hash is not compared
#   DRY_RUN=1        only see that every pin exists as a wheel with a known hash, with uv (UV, default: uv); installs nothing
#   CPU_TORCH_INDEX  where the CPU build of torch is (default: as in the Dockerfile)
#   KEEP=FOLDER      work there and leave the environment, in FOLDER/env (default: a temporary folder)
set -eu
name=${1:?name an environment: flows, score-cpu, score-gpu, train-cpu or train-gpu}
target=${name%-?pu}
export DEVICE="${name#*-}"
repo=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3.11}
work=${KEEP:-$(mktemp -d)}
[ -n "${KEEP:-}" ] || trap 'rm -rf "$work"' EXIT
mkdir -p "$work"
unset PYTHONPATH VIRTUAL_ENV

# Print the `pip …` commands that a stage of the Dockerfile runs.
pip_steps() {
    awk -v target="$1" '/^FROM /{on = ($NF == target)} on && /^RUN pip /{sub(/^RUN /, ""); print}' "$repo/docker/Dockerfile"
}

# run_steps FOLDER STAGE: run them in FOLDER, on the environment here instead of the one in the image.
run_steps() {
    steps=$(pip_steps "$2" | sed "s|/opt/$target/bin/python|$work/env/bin/python|; s|--require-hashes|${UNHASHED:---require-hashes}|")
    [ -n "$steps" ] || { echo "error: docker/Dockerfile has no stage $2 with pip steps" >&2; exit 1; }
    cd "$1"
    echo "$steps" | while read -r step; do
        echo "+ $step"
        eval "PATH='$work/tools/bin:$PATH' $step --quiet" </dev/null || exit 1
    done
}

# The folders that the Dockerfile's COPY lines would make.
mkdir -p "$work/package/requirements" "$work/image/requirements"
cd "$repo"
cp -R pyproject.toml README.md LICENSE tokenweights.py tokenweights_flows.py weights_store pipeline flows train "$work/package/"
cp requirements/build.txt "$work/package/requirements/"
cp "requirements/$name.txt" "$work/image/requirements/"
if [ -n "${WITHOUT_CUDA:-}" ]; then
    # A requirement and the lines of its hashes end where a line has no backslash at its end.
    sed -i -E '/^(nvidia-|cuda-|triton==)/,/[^\\]$/d; s/ \\$//; /^ +--hash/d' "$work/image/requirements/$name.txt"
    UNHASHED=--no-color
fi
CPU_TORCH_INDEX=${CPU_TORCH_INDEX:-$(sed -n 's/^ARG CPU_TORCH_INDEX=//p' docker/Dockerfile)}
export CPU_TORCH_INDEX

started=$(date +%s)
"$python" -m venv "$work/tools" # builds the wheel, and has the pip that installs
"$python" -m venv --without-pip "$work/env"
(unset UNHASHED; run_steps "$work/package" package)
cp -R "$work/package/dist" "$work/image/"
num_packages=$(grep -c == "$work/image/requirements/$name.txt")
if [ -n "${DRY_RUN:-}" ]; then
    # With uv: it reads the metadata only, where some versions of pip fetch gigabytes of wheels first.
    ${UV:-uv} pip install --dry-run --python "$work/env/bin/python" --no-deps --only-binary :all: --require-hashes \
        -r "$work/image/requirements/$name.txt" >"$work/dry-run.txt" 2>&1 || { cat "$work/dry-run.txt" >&2; exit 1; }
    echo "$name: every one of $num_packages packages is there as a wheel with a known hash; nothing installed"
    exit 0
fi
run_steps "$work/image" "$target-env"
echo "$name: $num_packages packages installed in $(($(date +%s) - started)) s, $(du -sm "$work/env" | cut -f1) MB"
cd "$work"
"$work/env/bin/python" "$repo/docker/smoke.py" "$name"
