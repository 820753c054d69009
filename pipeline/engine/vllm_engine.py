"""vLLM behind the contract of `contract.py`. Only this file and `vllm_start.py` import vLLM.

Token ids go in; one log-prob per wanted token comes out, on request also those of the most likely tokens. `ways.py` has the
two ways to ask vLLM for them: the fast one is compared with `flat` on the first sequences, and on a mismatch or an error we
fall back to `flat`. It also samples (`VllmEngine.generate`): the anchors of TI-DPO.

Sequences share KV blocks through the prefix cache. A cache hit that reaches into the wanted rows leaves them unwritten (random
numbers, or no reply at all), so such a sequence is scored again without the cache.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engine.contract import EngineSettings, Sampling
from pipeline.engine.replies import checked
from pipeline.engine.request_queue import EngineRequest, RequestQueue, reporting_errors
from pipeline.engine.score_once import Reply, ScoredSequence
from pipeline.engine.vllm_start import start_vllm
from pipeline.engine.ways import FLAT, MEAN_TOLERANCE_NATS, READERS, RESPONSE_ROWS, mean_difference
from weights_store.errors import EngineError, ScoringError, SequenceLengthError
from weights_store.messages import logger

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

_log = logger(__name__)

_NUM_CHECKED = 8


@dataclass
class _Asked:
    """Sequences in the queue by their key, and their replies so far: None if the wanted rows were in the cache."""

    sequences: dict[int, ScoredSequence]
    way: str
    progress: Callable[[int], None]
    replies: dict[int, Reply | None] = field(default_factory=dict)


class VllmEngine:
    """One loaded model.

    Raises:
        InputError: vLLM cannot load the model.
        MissingExtraError: vLLM is not installed.
        OutOfMemoryError: There is not enough memory for it.
    """

    def __init__(self, model: Path, settings: EngineSettings) -> None:
        self._engine: Any
        self._engine, max_len, self.batch_tokens = start_vllm(model, settings)
        self.max_tokens: int = max_len - 1
        """Longest prompt + response that the model takes: the engine needs one free position."""
        self._room: int = self._engine.model_config.max_model_len - 1
        self.vocab_size: int = self._engine.model_config.get_vocab_size()
        self.way: str | None = None
        self._top_k: int | None = None  # that `way` was chosen for; None if it was set from outside
        self._is_v2 = bool(self._engine.vllm_config.use_v2_model_runner)
        self._keys = count()
        self._rows_installed = False
        self._queue = RequestQueue(self._engine, self.batch_tokens)
        gc.collect()
        gc.freeze()  # the collector need not look at what vLLM and torch have built, again and again

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
        return self._begin(sequences, progress, first=True)()

    def begin(
        self, sequences: Sequence[ScoredSequence], progress: Callable[[int], None] = lambda num_tokens: None
    ) -> Callable[[], list[Reply]]:
        """Queue sequences behind those begun before, and return a function that waits for what `score` returns.

        While the engine finishes what was begun first, it fills its steps with what was begun next.

        Raises:
            EngineError: What `score` raises, when the sequences choose the way. The function raises the same.
        """
        return self._begin(sequences, progress, first=False)

    def _begin(
        self, sequences: Sequence[ScoredSequence], progress: Callable[[int], None], *, first: bool
    ) -> Callable[[], list[Reply]]:
        if not sequences:
            return list
        self._check_room(max(len(each.prompt_ids) + len(each.response_ids) for each in sequences))
        with reporting_errors():
            top_k = sequences[0].top_k
            if self.way is None or self._top_k not in (None, top_k):
                self.way, self._top_k = self._choose_way(sequences[:_NUM_CHECKED]), top_k
            asked = self._ask(sequences, self.way or FLAT, progress, first=first)

        def wait() -> list[Reply]:
            with reporting_errors():
                return self._wait(asked)

        return wait

    def load(self, model: Path) -> None:
        """Exchange the weights for those of another model with the same config and the same tensors.

        Takes a second or so, where another engine takes 15 to 30. The way is chosen again.

        Raises:
            EngineError: This vLLM cannot. This engine is lost.
        """
        with reporting_errors():
            self._engine.collective_rpc("tokenweights_load", args=(str(model),))
            if not self._engine.reset_prefix_cache():
                raise EngineError("the engine failed: it kept the prefix cache of the model before")
        self.way = self._top_k = None

    def _check_room(self, num_tokens: int) -> None:
        if num_tokens > self._room:
            raise SequenceLengthError(
                f"a sequence has {num_tokens} tokens, more than any that was known when the engine was started for {self._room}"
            )

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
        limits = [min(sampling.max_new_tokens, self.max_tokens - len(prompt)) for prompt in prompts]
        if prompts:
            self._check_room(max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)))
        with reporting_errors():
            asked: dict[int, tuple[list[int], SamplingParams]] = {}
            for prompt, seed, limit in zip(prompts, seeds, limits, strict=True):
                asked[next(self._keys)] = (
                    prompt,
                    _params(
                        max_tokens=limit,
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
        ids: dict[int, list[int]] = {}

        def take(output: "RequestOutput") -> None:
            ids[int(output.request_id)] = list(output.outputs[0].token_ids)
            progress(1)

        self._queue.add([EngineRequest(key, partial(_prompt_of, *request), take) for key, request in asked.items()])
        self._queue.run(asked)
        return ids

    def _choose_way(self, sample: Sequence[ScoredSequence]) -> str | None:
        """Return the way that this engine takes from now on; None if the sample has nothing to compare."""
        fast, top_k = RESPONSE_ROWS, sample[0].top_k
        fall_back = "scoring by vLLM's flat prompt log-probs"
        try:
            replies = self._wait(self._ask(sample, fast, first=True))
        except EngineError:  # in a step: the engine is lost
            raise
        except Exception as error:  # noqa: BLE001 - whatever another vLLM version makes of it, the slow way is left
            _log.info(f"{fall_back}: {fast} failed with {type(error).__name__}: {error}")
            return FLAT
        difference = mean_difference(replies, self._wait(self._ask(sample, FLAT, first=True)))
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

    def _ask(
        self,
        sequences: Sequence[ScoredSequence],
        way: str,
        progress: Callable[[int], None] = lambda num_tokens: None,
        *,
        first: bool,
        use_cache: bool = True,
    ) -> _Asked:
        """Queue the sequences, behind all others or `first`."""
        if way == RESPONSE_ROWS and not self._rows_installed:
            self._engine.collective_rpc("tokenweights_install")
            self._rows_installed = True
        asked = _Asked({next(self._keys): sequence for sequence in sequences}, way, progress)
        take, requests, last = partial(self._take, asked), list[EngineRequest](), list[int]()
        for key, sequence in asked.sequences.items():
            is_new = sequence.prompt_ids != last  # else the prompt is in the cache
            last = sequence.prompt_ids
            make = partial(_scoring_request, key, sequence, way, use_cache)
            requests.append(EngineRequest(key, make, take, sequence.num_wanted + (len(last) if is_new else 0)))
        self._queue.add(requests, first=first)
        return asked

    def _take(self, asked: _Asked, output: "RequestOutput") -> None:
        key, num_cached = int(output.request_id), output.num_cached_tokens or 0
        sequence = asked.sequences[key]
        if num_cached > sequence.first_row:
            asked.replies[key] = None
        elif asked.way == FLAT:  # at once: a whole chunk of flat log-probs would fill the memory
            asked.replies[key] = self._reply(asked.way, output, sequence)
        asked.progress(sequence.num_wanted)

    def _wait(self, asked: _Asked) -> list[Reply]:
        """Run the engine until these sequences are scored."""
        replies = self._run(asked)
        again = {key: asked.sequences[key] for key, reply in replies.items() if reply is None}
        if again:
            rescored = self._ask(list(again.values()), asked.way, first=True, use_cache=False)
            replies |= zip(again, self._run(rescored).values(), strict=True)
        unread = ScoringError("the engine read rows from its cache that it was told to compute")
        return [unread if reply is None else reply for reply in replies.values()]

    def _run(self, asked: _Asked) -> dict[int, Reply | None]:
        """Return the replies in the order of their sequences."""
        self._queue.run(asked.sequences.keys())
        if asked.way == RESPONSE_ROWS:
            left = asked.sequences.keys() - asked.replies.keys()
            taken = self._engine.collective_rpc("tokenweights_take", args=(list(asked.sequences),))[0]
            asked.replies |= {key: self._reply(asked.way, taken.get(key), asked.sequences[key]) for key in left}
        return {key: asked.replies[key] for key in asked.sequences}

    def _reply(self, way: str, given: object, sequence: ScoredSequence) -> Reply:
        """Read and check what the engine gave for a sequence; return what is wrong with it as an error."""
        try:
            return checked(READERS[way](given, sequence), sequence, self.vocab_size)
        except ScoringError as error:
            return error


def _prompt_of(ids: list[int], params: "SamplingParams") -> tuple[Any, "SamplingParams"]:
    """Return ids as vLLM takes them, with the parameters of their request."""
    from vllm.inputs import TokensPrompt

    return TokensPrompt(prompt_token_ids=ids), params


def _scoring_request(key: int, sequence: ScoredSequence, way: str, use_cache: bool) -> tuple[Any, "SamplingParams"]:
    return _prompt_of(sequence.prompt_ids + sequence.response_ids, _scoring_params(key, sequence, way, use_cache))


def _scoring_params(key: int, sequence: ScoredSequence, way: str, use_cache: bool) -> "SamplingParams":
    from pipeline.engine.response_rows import KEY

    asked: dict[str, object]
    if way == RESPONSE_ROWS:
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
