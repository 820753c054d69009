"""No code that comes with a model runs, even if someone at a terminal would say yes, and no pickle is ever opened."""

import ast
import io
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.chat.tokenizer import ChatTokenizer
from pipeline.weighing.words import WordStarts
from train.model.checkpoint import load_checkpoint, load_model_config, load_tokenizer
from train.model.hub import check_model_folder
from weights_store.errors import InputError

REPO = Path(__file__).resolve().parent.parent
FOLDERS = ("weights_store", "train", "pipeline", "flows", "benchmarks")
FILES = [
    *REPO.glob("tokenweights*.py"),
    *(path for folder in FOLDERS for path in sorted((REPO / folder).rglob("*.py"))),
]
LOADERS = {"from_pretrained", "EngineArgs", "LLM", "AsyncEngineArgs"}
LOADS_NO_CODE = {"PeftModel"}
"""It gets a model that is loaded already, and would not know the argument."""


def unsafe_loads(source):
    """Return the lines that load something of a model folder and do not say `trust_remote_code=False`."""
    tree = ast.parse(source)
    loaders = {node for node in ast.walk(tree) if _name(node) in LOADERS and isinstance(node.ctx, ast.Load)}
    told = {
        node
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and (_refuses_code(call) or _owner(call.func) in LOADS_NO_CODE)
        for node in (call.func, *call.args)  # `partial` gets the loader as an argument
    }
    return sorted(node.lineno for node in loaders - told)


def _name(node):
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


def _owner(node):
    return _name(node.value) if isinstance(node, ast.Attribute) else None


def _refuses_code(call):
    values = {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords}
    return values.get("trust_remote_code") is False


def test_every_load_of_a_model_folder_refuses_its_code():
    unsafe = {path: unsafe_loads(path.read_text(encoding="utf-8")) for path in FILES}
    lines = [f"{path.relative_to(REPO)}:{line}" for path, found in unsafe.items() for line in found]
    assert not lines, f"these calls lack trust_remote_code=False: {', '.join(lines)}"


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("AutoConfig.from_pretrained(folder)", [1]),
        ("AutoConfig.from_pretrained(folder, trust_remote_code=True)", [1]),
        ("AutoConfig.from_pretrained(folder, trust_remote_code=trust)", [1]),
        ("AutoConfig.from_pretrained(folder, trust_remote_code=False)", []),
        ("load = AutoModel.from_pretrained\nload(folder)", [1]),
        ("partial(AutoModel.from_pretrained, folder)", [1]),
        ("partial(AutoModel.from_pretrained, folder, trust_remote_code=False)", []),
        ("\nEngineArgs(model=folder)", [2]),
        ("peft.PeftModel.from_pretrained(model, folder)", []),
    ],
)
def test_a_load_that_does_not_refuse_code_would_be_seen(source, lines):
    assert unsafe_loads(source) == lines


# --- what happens ------------------------------------------------------------------------------------------------------

OWN_CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as OwnModel, PreTrainedTokenizerFast as OwnTokenizer
"""
REFUSAL = "it needs Python code of its own (auto_map), which is never run; give a model that transformers knows"


@pytest.fixture
def own_code(toy_model, tmp_path, monkeypatch):
    """A model folder that needs its own code, which would create a file `ran` beside it; whoever is asked says yes."""
    folder = shutil.copytree(toy_model, tmp_path / "model")
    (folder / "own.py").write_text(OWN_CODE.format(marker=str(tmp_path / "ran")))
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    _edit(folder / "config.json", model_type="own", auto_map=auto_map)
    tokenizer_map = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    _edit(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=tokenizer_map)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    yield folder
    assert not (tmp_path / "ran").exists()


def _edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "load",
    [
        load_model_config,
        load_tokenizer,
        lambda folder: load_checkpoint(folder, dtype=torch.float32),
        lambda folder: ChatTokenizer(folder).check(),
        WordStarts.of_folder,
    ],
    ids=["config", "tokenizer", "model", "chats", "words"],
)
def test_a_model_that_needs_its_own_code_is_one_line_and_its_code_does_not_run(own_code, load):
    with pytest.raises(InputError) as caught:
        load(own_code)
    assert str(caught.value).endswith(f": {REFUSAL}")
    assert str(own_code) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_transformers_knows_needs_no_code_that_lies_beside_it(own_code):
    _edit(own_code / "config.json", model_type="llama")
    _edit(own_code / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert type(load_checkpoint(own_code, dtype=torch.float32)).__module__.startswith("transformers.")
    assert type(load_tokenizer(own_code)).__module__.startswith("transformers.")


def test_a_terminal_is_not_asked(own_code):
    """The whole command, at a terminal whose user says yes to everything."""
    script = "import sys; from pathlib import Path; from train.model.checkpoint import load_checkpoint\n"
    script += "from weights_store.processes.process import run_main\n"
    script += "sys.exit(run_main(lambda: load_checkpoint(Path(sys.argv[1]))))"
    ours, theirs = pty.openpty()
    os.write(ours, b"y\n" * 20)
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, str(own_code)], stdin=theirs, capture_output=True, text=True, timeout=120
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert "Do you wish to run" not in done.stdout + done.stderr
    assert done.returncode == 1
    assert REFUSAL in done.stdout + done.stderr


# --- pickles -----------------------------------------------------------------------------------------------------------


class RunsCode:
    """Its pickle creates a file when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def _whole(path):
    torch.save({"model.embed_tokens.weight": torch.ones(2, 3)}, path)


def _cut(path):
    _whole(path)
    path.write_bytes(path.read_bytes()[:-30])


def _garbage(path):
    path.write_bytes(b"\x80\x02garbage")


def _code(path):
    torch.save({"a": RunsCode(path.parent.parent / "ran")}, path)


@pytest.fixture
def pickled(toy_model, tmp_path):
    """A model folder without safetensors."""
    return shutil.copytree(toy_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.mark.parametrize("write", [_whole, _cut, _garbage, _code])
def test_pickled_weights_are_refused_unread_in_one_line(pickled, tmp_path, write):
    write(pickled / "pytorch_model.bin")
    with pytest.raises(InputError) as caught:
        check_model_folder(pickled, "model.path")
    assert str(caught.value) == (
        f"model.path: no weight files in {pickled}; expected model.safetensors, or model.safetensors.index.json with its "
        "files (pytorch_model.bin is a pickle, which can run code, so it is not read: save it as safetensors)"
    )
    with pytest.raises(InputError, match=f"^transformers cannot load the model {pickled}: .*safetensors.*$"):
        load_checkpoint(pickled, dtype=torch.float32)
    assert not (tmp_path / "ran").exists()


def test_an_index_cannot_lead_to_a_pickle(pickled, tmp_path):
    _code(pickled / "weights.bin")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "weights.bin"}}
    (pickled / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"index.json names weights.bin, expected \*.safetensors files only"):
        check_model_folder(pickled, "model.path")
    with pytest.raises(InputError, match=f"^transformers cannot load the model {pickled}: [^\n]*$"):
        load_checkpoint(pickled, dtype=torch.float32)
    assert not (tmp_path / "ran").exists()
