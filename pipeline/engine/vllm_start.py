"""Starts vLLM with what a request needs and no more: the length of its sequences, the tokens of a step, graphs for sampling."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.engine.contract import STEP_TOKENS, EngineSettings
from pipeline.engine.request_queue import is_out_of_memory
from train.model import checkpoint
from weights_store.errors import InputError, MissingExtraError, OutOfMemoryError
from weights_store.fingerprint import load_json
from weights_store.messages import first_line

CPU_BLOCK_SIZE = 32
"""Tokens in a block of the prefix cache: the least for vLLM's CPU back end; its default, 128, shares few prompts."""
_GPU_SEQUENCES = 512
"""Most sequences in a step on a GPU. vLLM's default here is 128: too few to fill a step with short ends of cached prompts."""
_ROUNDING_TOKENS = 256
_MAX_TOP_K = 256
"""The most that `score.top_k` may ask for; vLLM's default is 20."""


def start_vllm(model: Path, settings: EngineSettings) -> tuple[Any, int, int]:
    """Start vLLM in this process; return it, the positions of the model, and the tokens of a step.

    Raises:
        InputError: vLLM cannot load the model.
        MissingExtraError: vLLM is not installed.
        OutOfMemoryError: There is not enough memory for it.
    """
    _set_environment(settings)
    try:
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        if on_cpu:  # else vLLM compiles a helper, which needs g++ and changes no number
            os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        from vllm import EngineArgs, LLMEngine
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"scoring needs the package {error.name!r}, which is not installed; pip install 'tokenweights[score]' (GPU) or "
            "'tokenweights[score-cpu]'"
        ) from error
    step_tokens = settings.step_tokens(STEP_TOKENS["cpu" if on_cpu else "gpu"])
    arguments = EngineArgs(
        model=str(model),
        dtype=settings.dtype,
        max_num_batched_tokens=step_tokens,
        tensor_parallel_size=settings.tensor_parallel,
        enable_prefix_caching=True,
        disable_log_stats=True,
        seed=0,
        skip_tokenizer_init=True,
        trust_remote_code=False,
        max_logprobs=_MAX_TOP_K,
        worker_extension_cls="pipeline.engine.response_rows.ResponseRows",
        **(_cpu_arguments() if on_cpu else _gpu_arguments(settings, step_tokens)),
    )
    try:
        max_len = None
        if settings.longest is not None and not own_length_counts(load_json(model / "config.json")):
            max_len = arguments.create_model_config().max_model_len
            room = settings.longest + 1  # the engine needs one free position
            arguments.max_model_len = min(max_len, -(-room // _ROUNDING_TOKENS) * _ROUNDING_TOKENS)
        engine: Any = LLMEngine.from_engine_args(arguments)
        return engine, max_len or engine.model_config.max_model_len, step_tokens
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(f"no memory for the model {model} in vLLM: {first_line(error)}") from error
        if not isinstance(error, ValueError | OSError):
            raise
        raise InputError(f"vLLM cannot load the model {model}: {_why_not_loaded(error)}") from error


def _set_environment(settings: EngineSettings) -> None:
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # this process is the engine's own already
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(settings.kv_cache_gib))),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Triton's own default for float32 is TF32: attention would be off by 8e-4 nats in the mean.
        "TRITON_F32_DEFAULT": "ieee",
    }.items():
        os.environ.setdefault(name, value)


def _cpu_arguments() -> dict[str, Any]:
    return {"block_size": CPU_BLOCK_SIZE, "enforce_eager": True}


def _gpu_arguments(settings: EngineSettings, step_tokens: int) -> dict[str, Any]:
    """Return what differs on a GPU. Neither way compiles: that costs more than it saves on prefill alone."""
    num_sequences = min(_GPU_SEQUENCES, step_tokens)  # vLLM refuses more sequences than tokens
    memory = {"gpu_memory_utilization": settings.gpu_memory_share, "max_num_seqs": num_sequences}
    if settings.samples:  # graphs of the steps that add one token to each sequence; prompts run without
        return {**memory, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
    return {**memory, "enforce_eager": True}


def own_length_counts(config: Mapping[str, object]) -> bool:
    """Return whether the numbers of a model depend on the positions that vLLM is started for.

    RoPE scaling by "dynamic" or "longrope" ("su") looks at them, and Llama 4 scales its attention beyond 32,768.
    """
    text = repr(config)
    return any(name in text for name in ("'dynamic'", "'longrope'", "'su'", "llama4"))


def _why_not_loaded(error: ValueError | OSError) -> str:
    """Return the reason in one line; vLLM wraps most in an error of pydantic, whose first line only counts problems."""
    problems = error.errors() if isinstance(error, ValidationError) else []
    return checkpoint.why_not_loaded(problems[0]["msg"] if problems else error)
