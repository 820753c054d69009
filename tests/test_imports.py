"""Who may import whom (design, section 2), read from the sources: imports in functions and for type checking count too."""

import ast
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

REPO = Path(__file__).resolve().parent.parent
CHAIN = ("weights_store", "train", "pipeline", "flows", "tokenweights", "tokenweights_flows")
"""Each may import itself and what stands before it."""

BASE = {"deltalake", "jinja2", "markupsafe", "numpy", "polars", "pyarrow"}
TRAIN = BASE | {"accelerate", "huggingface_hub", "jinja2", "peft", "pydantic", "safetensors", "tokenizers", "torch"}
TRAIN |= {"transformers"}  # which needs `huggingface_hub`, `safetensors` and `tokenizers`
PIPELINE = TRAIN | {"datasets", "regex"}
PACKAGES = {
    "weights_store": BASE,
    "train": TRAIN,
    "pipeline": PIPELINE,
    "flows": PIPELINE | {"prefect"},
    "tokenweights": {"shtab", "tokenizers"},
    "tokenweights_flows": set(),
}
ONLY_IN = {
    "vllm": {"pipeline/engine/vllm_engine.py", "pipeline/engine/vllm_start.py"},
    "ray": {"pipeline/workers/on_ray.py", "pipeline/workers/ray_cluster.py", "pipeline/workers/ray_spread.py"},
    "trl": {"train/trl_adapter.py"},
    "openlineage": {"flows/lineage_events.py"},
    "matplotlib": {"weights_store/inspection/figure.py", "weights_store/inspection/heat_map.py", "train/plots.py"},
    "tqdm": {"weights_store/messages.py", "train/job/progress.py"},
}
EXCEPTIONS = {
    "train/trl_adapter.py": {"datasets"},
    "pipeline/interpreters.py": {"packaging"},
    "weights_store/inspection/model_tokenizer.py": {"huggingface_hub"},
}
"""TRL itself needs `datasets`, and transformers `packaging`. Without the hub's package nothing is looked for in its cache."""


class Import(NamedTuple):
    """One import statement."""

    file: str
    line: int
    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.source} imports {self.target}"


def read_imports(root):
    """Return every import of every module of ours below `root`; the standard library is left out."""
    files = [*root.glob("tokenweights*.py"), *(path for name in CHAIN for path in (root / name).rglob("*.py"))]
    modules = {_module(path.relative_to(root)): path for path in files}
    found = []
    for module, path in sorted(modules.items()):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for target in _targets(node, modules, path):
                if target.partition(".")[0] not in sys.stdlib_module_names:
                    found.append(Import(str(path.relative_to(root)), node.lineno, module, target))
    return found


def _module(path):
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _targets(node, modules, path):
    """`from a import b` leads to module a.b if there is one, else to a."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{path}:{node.lineno}: relative import"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in modules else node.module for name in names]
    return []


def against_the_chain(imports):
    """Return the imports of ours that point up the chain."""
    return [found for found in imports if _level(found.target) > _level(found.source)]


def _level(module):
    top = module.partition(".")[0]
    return CHAIN.index(top) if top in CHAIN else -1


def find_circle(imports):
    """Return the imports of one circle, or an empty list if there is none."""
    left = {}
    for found in imports:
        left.setdefault(found.source, {}).setdefault(found.target, found)
    while leaves := [module for module, targets in left.items() if not left.keys() & targets]:
        for module in leaves:
            del left[module]
    if not left:
        return []
    path = [min(left)]
    while path[-1] not in path[:-1]:
        path.append(min(left.keys() & left[path[-1]]))
    circle = path[path.index(path[-1]) :]
    return [left[source][target] for source, target in pairwise(circle)]


def lines(imports):
    return "\n".join(map(str, imports))


@pytest.fixture(scope="module")
def imports():
    return read_imports(REPO)


def test_the_chain_is_flows_pipeline_train_weights_store(imports):
    wrong = against_the_chain(imports)
    assert not wrong, f"these imports point against flows -> pipeline -> train -> weights_store:\n{lines(wrong)}"


def test_no_imports_form_a_circle(imports):
    circle = find_circle(imports)
    assert not circle, f"these imports form a circle:\n{lines(circle)}"


def test_each_package_imports_only_what_its_extra_installs(imports):
    wrong = []
    for found in imports:
        top = found.target.partition(".")[0]
        allowed = PACKAGES[found.source.partition(".")[0]] | EXCEPTIONS.get(found.file, set())
        if top not in CHAIN and top not in allowed and found.file not in ONLY_IN.get(top, ()):
            wrong.append(found)
    assert not wrong, f"these packages do not belong there:\n{lines(wrong)}"


@pytest.mark.parametrize("package", ["vllm", "ray"])
def test_an_engine_is_imported_only_in_its_files(imports, package):
    assert {found.file for found in imports if found.target.partition(".")[0] == package} == ONLY_IN[package]


@pytest.fixture
def sources(tmp_path):
    """Return a function that writes modules, each given as `path=source`, and reads their imports."""

    def write(**modules):
        for name, source in modules.items():
            path = tmp_path / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return read_imports(tmp_path)

    return write


def test_an_import_in_a_function_counts(sources):
    imports = sources(train__run="import os\ndef f():\n    from flows.build import x\n", flows__build="")
    assert lines(against_the_chain(imports)) == "train/run.py:3: train.run imports flows.build"


def test_an_import_for_type_checking_counts(sources):
    (found,) = sources(train__a="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pipeline.b\n")
    assert against_the_chain([found]) == [found]


def test_a_circle_is_printed_edge_by_edge(sources):
    imports = sources(
        train__a="from train import b", train__b="def f():\n    import train.c", train__c="import train.a", train__d=""
    )
    assert lines(find_circle(imports)).splitlines() == [
        "train/a.py:1: train.a imports train.b",
        "train/b.py:2: train.b imports train.c",
        "train/c.py:1: train.c imports train.a",
    ]
    assert find_circle([found for found in imports if found.source != "train.c"]) == []


def loaded_after(code):
    """Top-level modules that a fresh interpreter has loaded after running `code`."""
    script = f"{code}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPO, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import tokenweights; tokenweights.build_parser()", {"polars", "pyarrow", "torch", "prefect", "pydantic"}),
        ("import tokenweights; tokenweights.build_parser()", {"shtab", "numpy", "transformers", "vllm"}),
        ("from weights_store import WeightStore", {"torch", "transformers", "prefect", "vllm", "pydantic", "datasets"}),
        ("import train.plots", {"torch", "transformers", "pydantic", "matplotlib"}),
        (  # with folders, push and pull need the base install only
            "import train.hub.run, train.hub.policy, train.hub.repository, weights_store.sharing.dataset_folder, "
            "weights_store.sharing.bring_in",
            {"torch", "safetensors", "pydantic", "huggingface_hub", "matplotlib", "tokenizers", "transformers"},
        ),
        ("import train.run", {"torch", "pipeline", "flows", "prefect", "vllm", "datasets"}),
        ("import train.job.trainer", {"pipeline", "flows", "prefect", "vllm"}),
        (
            "import pipeline.stages.score, pipeline.stages.publish, pipeline.stages.contrast",
            {"flows", "prefect", "vllm", "torch"},
        ),
        ("import pipeline.stages.attribute, pipeline.stages.anchors", {"flows", "prefect", "vllm", "torch"}),
        ("import pipeline.workers.pair_attributor", {"flows", "prefect", "vllm"}),
        ("import pipeline.dry_run.plan, pipeline.dry_run.table", {"flows", "prefect", "vllm", "torch"}),
    ],
)
def test_what_is_not_needed_is_not_loaded(code, absent):
    assert not loaded_after(code) & absent


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["plan", "recipes/hh_harmless.toml"], "flows"),
        (["build", "recipes/hh_harmless.toml"], "flows"),
        (["train", "recipes/train/hh_harmless_head_dpo.toml"], "train"),
    ],
)
def test_a_base_install_names_the_extra_that_is_missing(light_install, arguments, extra):
    command = [str(light_install()), "-P", "-m", "tokenweights", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: this command needs the package ")
    assert f"pip install 'tokenweights[{extra}]'" in done.stderr
