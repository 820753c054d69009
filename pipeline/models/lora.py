"""Merge a LoRA adapter into its base model, in a process of its own that `resolve.py` starts.

Everything after `resolve_model` (tokenizer, engines, training, fingerprints) expects whole models. vLLM's own adapters have
gaps: prompt log-probs crash on its CPU build, and an adapter on the lm_head is ignored.

The merged model has the base's dtypes. It is compared with base and adapter before use: if input and output embeddings are one
matrix and an adapter changes it, PEFT's merge adds the change twice or to the wrong layer.
"""

import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.model.checkpoint import TEMPLATE_FILES, TOKENIZER_FILES, load_checkpoint
from train.model.weight_files import check_safetensors
from weights_store.checks.model_folders import compare_files, covered_files, open_record, sign_record
from weights_store.digests import digest_once
from weights_store.errors import InputError, MissingExtraError
from weights_store.fingerprint import (
    fingerprint,
    fingerprint_file,
    fingerprint_model,
    load_chat_template,
    load_json,
)
from weights_store.location import Location
from weights_store.messages import first_line
from weights_store.processes.lock import locked, wait_for
from weights_store.processes.process import run_main

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RECORD = "merged.json"
"""In a merged folder: which adapter and base it was made from, and the digests of its files."""

_NOT_IDENTITY = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds a PEFT adapter.

    Raises:
        InputError: It holds a whole model too.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    whole = sorted(
        path.name for pattern in ("model*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern)
    )
    if whole:
        raise InputError(f"{folder} holds an adapter ({ADAPTER_CONFIG}) and a model ({whole[0]}); keep one of the two")
    return True


def check_adapter(folder: Path) -> dict[str, Any]:
    """Return the adapter's config, if it is one that can be merged.

    Raises:
        InputError: It is not a LoRA, not of a language model, has no weights or not all of them, or does not name its base.
    """
    config = load_json(folder / ADAPTER_CONFIG)
    kind, task = config.get("peft_type"), config.get("task_type") or "CAUSAL_LM"
    if kind != "LORA":
        raise InputError(f"the adapter {folder} is of type {kind}; only LORA can be merged into a model")
    if task != "CAUSAL_LM":
        raise InputError(f"the adapter {folder} is for the task {task}, expected CAUSAL_LM: a language model")
    for key in ("layer_replication", "alora_invocation_tokens"):
        if config.get(key):
            raise InputError(f"the adapter {folder} uses {key}, which a merged model cannot do")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"the adapter {folder} has no {ADAPTER_WEIGHTS}")
    if not config.get("base_model_name_or_path"):
        raise InputError(
            f"the adapter {folder} does not name its base: set base_model_name_or_path in {ADAPTER_CONFIG}"
        )
    check_safetensors(folder / ADAPTER_WEIGHTS)
    return config


def merged_fingerprint(adapter: Path, base: Path) -> str:
    """Return what determines the merged folder: weights and config of both, and the tokenizer files of both.

    Raises:
        InputError: `base` is not a model folder.
    """
    config = {key: value for key, value in load_json(adapter / ADAPTER_CONFIG).items() if key not in _NOT_IDENTITY}
    files = {
        side: {path.name: fingerprint_file(path) for path in _matching(folder, (*TOKENIZER_FILES, *TEMPLATE_FILES))}
        for side, folder in (("adapter", adapter), ("base", base))
    }
    weights = digest_once(adapter / ADAPTER_WEIGHTS)
    return fingerprint({"config": config, "weights": weights, "base": fingerprint_model(base), "files": files})


def problem_of_merged(folder: Path) -> str | None:
    """Return what is wrong with a merged model, None if it is as it was written."""
    try:
        files = open_record((folder / RECORD).read_bytes())["files"]
    except FileNotFoundError:
        return f"{RECORD} is missing"
    except (ValueError, KeyError, RecursionError) as error:
        return f"{RECORD} is damaged: {first_line(error)}"
    place = Location(str(folder))
    return next(compare_files(place, RECORD, files, lambda _, name: digest_once(folder / name)), None)


def merge_adapter(adapter: Path, base: Path, target: Path) -> None:
    """Write the merged model to `target`, which appears whole or not at all; an existing one stays.

    Tokenizer and chat template are those of the adapter, or of the base if the adapter has none. Missing parents of `target`
    are created.

    Raises:
        InputError: They do not fit together, cannot be loaded, or the merged model computes something else than they do.
        MissingExtraError: peft, torch or transformers is not installed.
    """
    check_adapter(adapter)
    with locked(target.with_name(f".{target.name}.lock"), wait_for(f"merging {adapter}")):
        if not (target / RECORD).is_file():  # else another process has merged it meanwhile
            _merge_whole(adapter, base, target)


def _merge_whole(adapter: Path, base: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        _write_merged(adapter, base, partial)
        has_tokenizer = any((adapter / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        for path in _matching(adapter if has_tokenizer else base, TOKENIZER_FILES):
            shutil.copyfile(path, partial / path.name)
        template = load_chat_template(adapter) or load_chat_template(base)
        if template is not None and load_chat_template(partial) != template:
            (partial / "chat_template.jinja").write_text(template, encoding="utf-8")
        for path in partial.glob("*.safetensors"):
            path.chmod((partial / "config.json").stat().st_mode)  # safetensors writes for the owner alone
        files = {name: fingerprint_file(partial / name) for name in covered_files(Location(str(partial)), RECORD)}
        record = {"adapter": str(adapter.resolve()), "base": str(base.resolve())}
        (partial / RECORD).write_bytes(sign_record(record, files))
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_merged(adapter: Path, base: Path, target: Path) -> None:
    try:
        import peft  # noqa: F401
        import torch
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"merging an adapter needs the package {error.name!r}, which is not installed; pip install 'tokenweights[train]'"
        ) from error
    model = load_checkpoint(base, dtype="auto")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied embeddings: untied below
        wrapped = _with_adapter(model, adapter, base)
        expected = _probe(wrapped, model.config)
        untie_changed_embeddings(model)
        try:
            merged = wrapped.merge_and_unload(safe_merge=True)
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"the adapter {adapter} cannot be merged: {first_line(error)}") from error
    dtype = model.config.dtype or torch.float32
    for name, parameter in merged.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, dtype))
    merged.save_pretrained(target)
    del model, wrapped, merged
    _check_same(expected, load_checkpoint(target, dtype="auto"), adapter, base)


def _with_adapter(model: "PreTrainedModel", adapter: Path, base: Path) -> "PeftModel":
    """Return the base with the adapter in it; every weight of the adapter must have its place."""
    import peft
    from safetensors import SafetensorError, safe_open

    where = f"the adapter {adapter} and its base {base}"
    try:
        with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
            stored = set(file.keys())
        wrapped = peft.PeftModel.from_pretrained(model, adapter)
    except SafetensorError as error:
        raise InputError(f"the adapter {adapter} cannot be read: {ADAPTER_WEIGHTS}: {first_line(error)}") from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        sizes = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        hint = f"{sizes[0]} (was the vocabulary resized? Then name the resized base)" if sizes else first_line(error)
        raise InputError(f"{where} do not fit: {hint}") from error
    wanted = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    plain = {f"base_model.model.{name}" for name in model.state_dict()}
    astray = sorted((wanted - stored) | (stored - wanted - plain))
    if astray:
        raise InputError(f"{where} do not fit: {len(astray)} weights have no counterpart, for example {astray[0]}")
    return wrapped


def untie_changed_embeddings(model: "PreTrainedModel") -> None:
    """Give the output layer its own matrix if it shares the input's and a LoRA changes either."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if not any(isinstance(end, BaseTunerLayer) for end in ends):
        return  # PEFT itself unties embeddings that an adapter replaces as a whole
    source, head = (end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends)
    if head is not None and head.weight is source.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _probe(model: "PreTrainedModel | PeftModel", config: "PretrainedConfig") -> "torch.Tensor":
    """Return log-probs of a fixed row of ids, float32 `[num_tokens, vocabulary]`."""
    import torch

    vocab_size = int(config.get_text_config().vocab_size)
    ids = torch.arange(32) * 7919 % vocab_size  # a prime: spread over the vocabulary
    with torch.inference_mode():
        return model(ids[None].to(model.device)).logits[0].float().log_softmax(-1)  # type: ignore[no-any-return]


def _check_same(expected: "torch.Tensor", merged: "PreTrainedModel", adapter: Path, base: Path) -> None:
    import torch

    difference = float(torch.mean(torch.abs(_probe(merged, merged.config) - expected)))
    limit = 1e-3 if merged.dtype == torch.float32 else 0.1  # merging rounds 16-bit weights once more
    if not difference <= limit:  # a NaN is no match either
        raise InputError(
            f"the adapter {adapter} cannot be merged into {base}: the merged model's log-probs differ from base and adapter "
            f"by {difference:.2g} nats in the mean, expected at most {limit}"
        )


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


if __name__ == "__main__":  # ADAPTER BASE TARGET
    sys.exit(run_main(lambda: merge_adapter(*map(Path, sys.argv[1:]))))
