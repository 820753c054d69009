"""Who may import whom (design, section 2), read from the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
BASE = {"deltalake", "numpy", "polars", "pyarrow"}
TRAIN = BASE | {"accelerate", "huggingface_hub", "peft", "pydantic", "safetensors", "torch", "transformers", "tqdm"}
PIPELINE = BASE | {
    "datasets",
    "huggingface_hub",
    "jinja2",
    "peft",
    "pydantic",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
}
ALLOWED = {
    "weights_store": BASE | {"weights_store"},
    "train": TRAIN | {"weights_store", "train"},
    "pipeline": PIPELINE | {"weights_store", "pipeline", "vllm", "ray"},
    "flows": PIPELINE | {"weights_store", "pipeline", "flows", "prefect", "tqdm"},
}
EXCEPTIONS = {
    "train/trl_adapter.py": {"trl", "datasets"},
    "pipeline/attribution.py": {"train"},  # only in its stage's own process: gradients are the trainer's
}
FILES = [path for package in ALLOWED for path in sorted((REPO / package).rglob("*.py"))]


def imported_by(path):
    """Top-level names of everything a file imports, wherever in the file, the standard library left out."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPO)))
def test_imports_point_downwards(path):
    package = path.relative_to(REPO).parts[0]
    extra = EXCEPTIONS.get(str(path.relative_to(REPO)), set())
    assert imported_by(path) <= ALLOWED[package] | extra


def test_vllm_is_imported_in_exactly_one_file():
    assert [path.name for path in FILES if "vllm" in imported_by(path)] == ["engine.py"]


def test_ray_is_imported_only_where_scoring_runs_on_it():
    assert [path.name for path in FILES if "ray" in imported_by(path)] == ["ray_cluster.py", "scoring_ray.py"]


def test_the_check_sees_an_import_inside_a_function(tmp_path):
    (tmp_path / "x.py").write_text("import os\ndef f():\n    from vllm.inputs import TokensPrompt\n")
    assert imported_by(tmp_path / "x.py") == {"vllm"}


def loaded_after(code):
    """Top-level modules that a fresh interpreter has loaded after running `code`."""
    script = f"{code}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPO, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import tokenweights; tokenweights._parser()", {"polars", "pyarrow", "torch", "prefect", "vllm", "pydantic"}),
        ("from weights_store import WeightStore", {"torch", "transformers", "prefect", "vllm", "pydantic", "datasets"}),
        ("import train.run", {"torch", "pipeline", "flows", "prefect", "vllm", "datasets"}),
        ("import train.job.trainer", {"pipeline", "flows", "prefect", "vllm"}),
        (
            "import pipeline.stages.score, pipeline.stages.publish, pipeline.stages.contrast",
            {"flows", "train", "prefect", "vllm", "torch"},
        ),
        ("import pipeline.stages.attribute, pipeline.stages.anchors", {"flows", "train", "prefect", "vllm", "torch"}),
        ("import pipeline.workers.pair_attributor", {"flows", "prefect", "vllm"}),
        ("import pipeline.dry_run.plan, pipeline.dry_run.table", {"flows", "train", "prefect", "vllm", "torch"}),
    ],
)
def test_what_is_not_needed_is_not_loaded(code, absent):
    assert not loaded_after(code) & absent
