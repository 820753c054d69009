"""vLLM behind the contract of `contract.py`. The only file that imports vLLM.

Token ids go in; one log-prob per wanted token comes out, on request also those of the most likely tokens. `ways.py` has the
three ways to ask vLLM for them: the fast one of its model runner is compared with `flat` on the first sequences, and on a
mismatch or an error we fall back to `flat`. It also samples (`VllmEngine.generate`): the anchors of TI-DPO.

Sequences share KV blocks through the prefix cache. A cache hit that reaches into the wanted rows leaves them unwritten (random
numbers, or no reply at all), so such a sequence is scored again without the cache.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from pipeline.engine.contract import EngineSettings, Sampling
from pipeline.engine.replies import checked
from pipeline.engine.score_once import Reply, ScoredSequence
from pipeline.engine.ways import FIXED_IDS, FLAT, MEAN_TOLERANCE_NATS, READERS, RESPONSE_ROWS, mean_difference
from train.model import checkpoint
from weights_store.errors import EngineError, InputError, MissingExtraError, OutOfMemoryError, ScoringError
from weights_store.messages import first_line, logger

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

_log = logger(__name__)

CPU_BLOCK_SIZE = 32
"""Tokens in a block of the prefix cache: the least for vLLM's CPU back end; its default, 128, shares few prompts."""
_NUM_CHECKED = 8
_MAX_TOP_K = 256
"""The most that `score.top_k` may ask for; vLLM's default is 20."""
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "no available memory for the cache blocks")


class VllmEngine:
    """One loaded model.

    Raises:
        InputError: vLLM cannot load the model.
        MissingExtraError: vLLM is not installed.
        OutOfMemoryError: There is not enough memory for it.
    """

    def __init__(self, model: Path, settings: EngineSettings) -> None:
        self._engine: Any = _load(model, settings)
        self.max_tokens: int = self._engine.model_config.max_model_len - 1
        """Longest prompt + response that can be scored: the engine needs one free position."""
        self.vocab_size: int = self._engine.model_config.get_vocab_size()
        self.way: str | None = None
        self._top_k: int | None = None  # that `way` was chosen for; None if it was set from outside
        self._is_v2 = bool(self._engine.vllm_config.use_v2_model_runner)
        self._fast_way = FIXED_IDS if self._is_v2 else RESPONSE_ROWS
        self._keys = count()
        self._rows_installed = False

    def why_not(self, way: str) -> str | None:
        """Return why this engine does not have one of the three ways; None if it has."""
        if way in (self._fast_way, FLAT):
            return None
        if way == RESPONSE_ROWS:
            return "vLLM runs its V2 model runner, this way is for V1"
        from vllm.triton_utils import HAS_TRITON

        why = "" if HAS_TRITON else ": it needs Triton, which has no back end for this machine"
        return f"vLLM runs its V1 model runner, this way is for V2{why}"

    def score(
        self, sequences: Sequence[ScoredSequence], progress: Callable[[int], None] = lambda num_tokens: None
    ) -> list[Reply]:
        """Return log pi(y_t | x, y_<t) of each sequence's wanted tokens, and of the `top_k` most likely tokens there.

        A sequence whose reply breaks the contract has a `ScoringError` in its place; it never shifts its neighbours.

        The sequences are best sorted, so that common beginnings are adjacent. All have one `top_k`; if it differs from that of
        the last call, the way is chosen again. `progress` gets the number of wanted tokens of each sequence that is done.

        Raises:
            OutOfMemoryError: A step did not fit into memory. This engine is lost; one with a smaller budget may fit.
            EngineError: A step failed for another reason, or vLLM refuses the requests. This engine is lost.
        """
        if not sequences:
            return []
        with _reporting_errors():
            top_k = sequences[0].top_k
            if self.way is None or self._top_k not in (None, top_k):
                self.way, self._top_k = self._choose_way(sequences[:_NUM_CHECKED]), top_k
            return self._score(sequences, self.way or FLAT, progress)

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        progress: Callable[[int], None] = lambda num_prompts: None,
    ) -> list[list[int]]:
        """Return one sampled continuation of each prompt as ids: at least one id, and the stop id if one ends it.

        Prompt and continuation can be scored: together they have `max_tokens` at most. Each prompt is shorter than that; they
        are best sorted, so that common beginnings are adjacent. A continuation depends on its prompt's seed (0 to 2**63 - 1)
        and not on the other prompts, up to rounding, which changes with the batch.

        Raises:
            OutOfMemoryError: A step did not fit into memory. This engine is lost; one with a smaller budget may fit.
            EngineError: A step failed for another reason, or vLLM refuses the requests. This engine is lost.
        """
        with _reporting_errors():
            asked: dict[int, tuple[list[int], SamplingParams]] = {}
            for prompt, seed in zip(prompts, seeds, strict=True):
                asked[next(self._keys)] = (
                    prompt,
                    _params(
                        max_tokens=min(sampling.max_new_tokens, self.max_tokens - len(prompt)),
                        temperature=sampling.temperature,
                        top_k=sampling.top_k,
                        top_p=sampling.top_p,
                        stop_token_ids=list(sampling.stop_ids),
                        seed=seed,
                    ),
                )
            ids = self._continue(asked, progress)
            # Else cache hits would reach into the rows that are wanted when the continuations are scored, see above.
            self._engine.reset_prefix_cache()
        return [ids[key] for key in asked]

    def _continue(
        self, asked: Mapping[int, tuple[list[int], "SamplingParams"]], progress: Callable[[int], None]
    ) -> dict[int, list[int]]:
        """Run sampled requests so that V1 computes each seeded prompt in one step.

        Every step uses up random numbers. V1 takes those of a part of a prompt back by an offset that generators on the CPU do
        not have, and fails there. V2 draws by seed and position.
        """
        if self._is_v2:
            return self._sampled_ids(asked, progress)
        scheduler = self._engine.vllm_config.scheduler_config
        most = scheduler.max_num_batched_tokens
        whole = {key: request for key, request in asked.items() if len(request[0]) + request[1].max_tokens <= most}
        before, scheduler.enable_chunked_prefill = scheduler.enable_chunked_prefill, False
        try:
            ids = self._sampled_ids(whole, progress)
        finally:
            scheduler.enable_chunked_prefill = before
        for key, (prompt, params) in asked.items():
            if key not in whole:
                # Longer than a step: computed in parts without a seed, then taken from the cache except for its last block.
                self._sampled_ids({next(self._keys): (prompt, _params())})
                ids |= self._sampled_ids({key: (prompt, params)}, progress)
        return ids

    def _sampled_ids(
        self,
        asked: Mapping[int, tuple[list[int], "SamplingParams"]],
        progress: Callable[[int], None] = lambda num_prompts: None,
    ) -> dict[int, list[int]]:
        self._add(asked)
        ids: dict[int, list[int]] = {}
        for output in self._outputs():
            ids[int(output.request_id)] = list(output.outputs[0].token_ids)
            progress(1)
        return ids

    def _choose_way(self, sample: Sequence[ScoredSequence]) -> str | None:
        """Return the way that this engine takes from now on; None if the sample has nothing to compare."""
        fast, top_k = self._fast_way, sample[0].top_k
        fall_back = "scoring by vLLM's flat prompt log-probs"
        if top_k and fast == FIXED_IDS:
            _log.info(f"{fall_back}: {fast} cannot find the {top_k} most likely tokens (score.top_k)")
            return FLAT
        try:
            replies = self._score(sample, fast)
        except EngineError:  # in a step: the engine is lost
            raise
        except Exception as error:  # noqa: BLE001 - whatever another vLLM version makes of it, the slow way is left
            _log.info(f"{fall_back}: {fast} failed with {type(error).__name__}: {error}")
            return FLAT
        difference = mean_difference(replies, self._score(sample, FLAT))
        if difference is None:
            return None
        if difference > MEAN_TOLERANCE_NATS:
            _log.info(
                f"{fall_back}: {fast} differs from them by {difference:.2g} nats in the mean on {len(sample)} sequences, "
                f"expected at most {MEAN_TOLERANCE_NATS}"
            )
            return FLAT
        top = f", {top_k} most likely tokens included" if top_k else ""
        _log.info(
            f"scoring by {fast}: within {difference:.1e} nats of flat prompt log-probs on {len(sample)} sequences{top}"
        )
        return fast

    def _score(
        self, sequences: Sequence[ScoredSequence], way: str, progress: Callable[[int], None] = lambda num_tokens: None
    ) -> list[Reply]:
        replies = self._ask(sequences, way, True, progress)
        again = [i for i, reply in enumerate(replies) if reply is None]
        for index, reply in zip(again, self._ask([sequences[i] for i in again], way, False), strict=True):
            replies[index] = reply
        unread = ScoringError("the engine read rows from its cache that it was told to compute")
        return [unread if reply is None else reply for reply in replies]

    def _ask(
        self,
        sequences: Sequence[ScoredSequence],
        way: str,
        use_cache: bool,
        progress: Callable[[int], None] = lambda num_tokens: None,
    ) -> list[Reply | None]:
        """Run the sequences through the engine; the reply is None if a sequence's wanted rows were in the cache."""
        if not sequences:
            return []
        if way == RESPONSE_ROWS and not self._rows_installed:
            self._engine.collective_rpc("tokenweights_install")
            self._rows_installed = True
        asked = {next(self._keys): sequence for sequence in sequences}
        self._add(
            {
                key: (sequence.prompt_ids + sequence.response_ids, _scoring_params(key, sequence, way, use_cache))
                for key, sequence in asked.items()
            }
        )
        replies: dict[int, Reply | None] = {}
        try:
            for output in self._outputs():
                key, num_cached = int(output.request_id), output.num_cached_tokens or 0
                if num_cached > asked[key].first_row:
                    replies[key] = None
                elif way != RESPONSE_ROWS:  # at once: a whole chunk of flat log-probs would fill the memory
                    replies[key] = self._reply(way, output, asked[key])
                progress(asked[key].num_wanted)
        except EngineError:
            raise
        except Exception:
            self._abort(asked)
            raise
        if way == RESPONSE_ROWS:
            taken = self._engine.collective_rpc("tokenweights_take")[0]
            for key in asked.keys() - replies.keys():
                replies[key] = self._reply(way, taken.get(key), asked[key])
        return [replies[key] for key in asked]

    def _reply(self, way: str, given: object, sequence: ScoredSequence) -> Reply:
        """Read and check what the engine gave for a sequence; return what is wrong with it as an error."""
        try:
            return checked(READERS[way](given, sequence), sequence, self.vocab_size)
        except ScoringError as error:
            return error

    def _outputs(self) -> "Iterator[RequestOutput]":
        """Yield what the engine finishes, until nothing is left; a step that fails raises an `EngineError`."""
        while self._engine.has_unfinished_requests():
            with _reporting_errors():
                finished = self._engine.step()
            yield from finished

    def _add(self, requests: Mapping[int, tuple[list[int], "SamplingParams"]]) -> None:
        """Hand over all requests, or none: if vLLM refuses one, those before it must not run with the next call."""
        from vllm.inputs import TokensPrompt

        try:
            for key, (ids, params) in requests.items():
                self._engine.add_request(str(key), TokensPrompt(prompt_token_ids=ids), params)
        except Exception:
            self._abort(requests)
            raise

    def _abort(self, keys: Iterable[int]) -> None:
        self._engine.abort_request([str(key) for key in keys])


def _scoring_params(key: int, sequence: ScoredSequence, way: str, use_cache: bool) -> "SamplingParams":
    from pipeline.engine.response_rows import KEY

    asked: dict[str, object]
    if way == FIXED_IDS:
        ids = np.array(sequence.response_ids[sequence.start :], np.int32)[:, None]
        asked = {"prompt_logprob_token_ids": ids, "prompt_logprob_start": sequence.first_row}
    elif way == RESPONSE_ROWS:
        asked = {"extra_args": {KEY: [key, sequence.first_row, sequence.top_k]}}
    else:
        asked = {"prompt_logprobs": sequence.top_k, "flat_logprobs": True}
    return _params(skip_reading_prefix_cache=not use_cache, **asked)


def _params(**asked: object) -> "SamplingParams":
    """Return parameters of a request; by default it samples the least that vLLM accepts: nobody reads its continuation."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    always = {"detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
    return SamplingParams(**{"max_tokens": 1, "temperature": 0.0, **always, **asked})


def _load(model: Path, settings: EngineSettings) -> Any:
    """Start vLLM in this process. Raises what `VllmEngine` does."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # this process is the engine's own already
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(settings.kv_cache_gib))))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
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
    arguments = EngineArgs(
        model=str(model),
        dtype=settings.dtype,
        max_num_batched_tokens=settings.batch_tokens,
        tensor_parallel_size=settings.tensor_parallel,
        enable_prefix_caching=True,
        enforce_eager=True,  # compiling costs more than it saves on prefill alone
        disable_log_stats=True,
        seed=0,
        skip_tokenizer_init=True,
        trust_remote_code=False,
        max_logprobs=_MAX_TOP_K,
        worker_extension_cls="pipeline.engine.response_rows.ResponseRows",
        **({"block_size": CPU_BLOCK_SIZE} if on_cpu else {"gpu_memory_utilization": settings.gpu_memory_share}),
    )
    try:
        return LLMEngine.from_engine_args(arguments)
    except Exception as error:
        if _is_out_of_memory(error):
            raise OutOfMemoryError(f"no memory for the model {model} in vLLM: {first_line(error)}") from error
        if not isinstance(error, ValueError | OSError):
            raise
        raise InputError(f"vLLM cannot load the model {model}: {_why_not_loaded(error)}") from error


def _why_not_loaded(error: ValueError | OSError) -> str:
    """Return the reason in one line; vLLM wraps most in an error of pydantic, whose first line only counts problems."""
    problems = error.errors() if isinstance(error, ValidationError) else []
    return checkpoint.why_not_loaded(problems[0]["msg"] if problems else error)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in _OUT_OF_MEMORY)


@contextmanager
def _reporting_errors() -> Iterator[None]:
    """Turn any error of vLLM into an `OutOfMemoryError` or another `EngineError`."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        text = first_line(error)
        if _is_out_of_memory(error):
            raise OutOfMemoryError(f"the engine ran out of memory: {text}") from error
        raise EngineError(f"the engine failed: {type(error).__name__}: {text}") from error
