"""Samples anchors (TI-DPO): one response per prompt from the reference policy, and its log-probs.

Pairs with the same prompt share its anchor. An anchor depends on the prompt and `anchors.seed` alone, not on the other prompts
of its chunk, up to rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import polars as pl
import pyarrow as pa

from pipeline.engine.contract import Engine, Sampling
from pipeline.engine.score_once import Reply, ScoredSequence, Scores, score_once
from pipeline.workers.pair_row import PairRow, QuarantineRow
from pipeline.workers.pair_scorer import PairScorer, as_share
from pipeline.workers.request import AnchorOptions, Request, Target, Worker
from train.model.sampling import closing_ids
from weights_store import TableVersion, WeightStore
from weights_store.errors import ScoringError
from weights_store.fingerprint import fingerprint, load_json
from weights_store.schemas import ANCHORS, SIDES

_Prompt = tuple[int, ...]
T = TypeVar("T")


class AnchorSampler(Worker):
    """The request's engine: pairs in, rows of an anchors table out.

    Raises:
        InputError: vLLM cannot load the model.
        MissingExtraError: vLLM is not installed.
        OutOfMemoryError: There is not enough memory for the engine.
    """

    def __init__(self, request: Request) -> None:
        assert isinstance(request.options, AnchorOptions)
        self._seed = request.options.seed
        self._scorer = PairScorer(request)
        self._engine = self._scorer.engine
        stop_ids = config_stop_ids(Path(request.model)) | dataset_stop_ids(request.tokens)
        self._sampling = Sampling(**asdict(request.options.sampling), stop_ids=tuple(sorted(stop_ids)))

    @property
    def record(self) -> dict[str, object]:
        """How the engine runs, for the lineage, and the ids that end an anchor."""
        return {**self._scorer.record, "stop_ids": list(self._sampling.stop_ids)}

    def fill_in(
        self,
        pairs: Sequence[PairRow],
        target: Target,  # noqa: ARG002 - the sampling is the request's
        progress: Callable[[float], None] = lambda share: None,
    ) -> tuple[pa.Table, list[QuarantineRow]]:
        """Return an anchor and its log-probs for each pair, and a quarantine row for each pair whose prompt has none.

        The progress is the share of the prompts that are continued: scoring the anchors takes little time.
        """
        prompts = sorted({tuple(pair.prompt_ids) for pair in pairs})  # sorted for the prefix cache
        problems = {prompt: why for prompt in prompts if (why := why_no_anchor(self._engine, prompt))}
        good = [prompt for prompt in prompts if prompt not in problems]
        prompt_ids = [list(prompt) for prompt in good]
        seeds = [seed_of(ids, self._seed) for ids in prompt_ids]
        sampled = self._engine.generate(prompt_ids, self._sampling, seeds, as_share(len(good), progress))
        sequences = [ScoredSequence(*ids) for ids in zip(prompt_ids, sampled, strict=True)]
        replies = score_once(sequences, self._engine.score)  # log pi_ref: without temperature and cut-offs
        prompt_of = {pair.pair_id: tuple(pair.prompt_ids) for pair in pairs}

        def by_pair(of_prompts: Mapping[_Prompt, T]) -> dict[str, T]:
            return {pair_id: of_prompts[prompt] for pair_id, prompt in prompt_of.items() if prompt in of_prompts}

        anchors, replied = dict(zip(good, sampled, strict=True)), dict(zip(good, replies, strict=True))
        return anchor_rows(pairs, by_pair(anchors), by_pair(replied), by_pair(problems))


def anchor_rows(
    pairs: Sequence[PairRow],
    anchors: Mapping[str, list[int]],
    replies: Mapping[str, Reply],
    problems: Mapping[str, str],
) -> tuple[pa.Table, list[QuarantineRow]]:
    """Return the rows of an anchors table, and a quarantine row for each pair that has none.

    Each pair, by pair_id, has either an anchor and what the engine replied to it, or a problem.
    """
    refused = {key: f"anchor: {reply}" for key, reply in replies.items() if isinstance(reply, ScoringError)}
    problems = {**problems, **refused}
    logps = {key: reply.logps for key, reply in replies.items() if isinstance(reply, Scores)}
    filled = [(pair.pair_id, anchors[pair.pair_id], logps[pair.pair_id]) for pair in pairs if pair.pair_id in logps]
    unscorable = [pair.unscorable(problems[pair.pair_id]) for pair in pairs if pair.pair_id in problems]
    columns = zip(*filled, strict=True) if filled else [()] * len(ANCHORS)
    return pa.Table.from_pydict(dict(zip(ANCHORS.names, columns, strict=True)), ANCHORS), unscorable


def why_no_anchor(engine: Engine, prompt: Sequence[int], anchor: Sequence[int] = ()) -> str | None:
    """Return why a prompt can have no anchor, or not this one. It must not reach the engine: some would kill it."""
    if not prompt:
        return "the prompt has no tokens"
    if len(prompt) >= engine.max_tokens:
        return f"the prompt has {len(prompt)} tokens, the model takes {engine.max_tokens} with its anchor"
    if min(*prompt, *anchor, 0) < 0 or max(*prompt, *anchor, 0) >= engine.vocab_size:
        return f"a token id is outside the model's vocabulary of {engine.vocab_size}"
    return None


def longest_response(tokens: TableVersion) -> int:
    """Return the tokens of the longest response of a dataset."""
    lengths = pl.max_horizontal(pl.col(f"{side}_ids").list.len() for side in SIDES)
    return int(
        WeightStore(tokens.store).table(tokens.table).scan(tokens.version).select(lengths.max()).collect().item()
    )


def seed_of(prompt_ids: list[int], seed: int) -> int:
    """Return the seed of a prompt's anchor, 63 bits; it differs for each prompt and each `anchors.seed`."""
    return int(fingerprint([seed, prompt_ids])[:16], 16) >> 1


def config_stop_ids(model: Path) -> set[int]:
    """Return the ids that end a text according to the model's configs.

    Raises:
        InputError: A config is not valid JSON.
    """
    configs = [load_json(path) for name in ("config", "generation_config") if (path := model / f"{name}.json").exists()]
    configs += [config["text_config"] for config in configs if "text_config" in config]
    found = [config.get("eos_token_id") for config in configs]
    return {int(token_id) for ids in found if ids is not None for token_id in (ids if isinstance(ids, list) else [ids])}


def dataset_stop_ids(tokens: TableVersion) -> set[int]:
    """Return the id that ends most responses of a dataset's first 1,000 pairs, see `closing_ids`."""
    pairs = WeightStore(tokens.store).table(tokens.table).scan(tokens.version).head(1000)
    responses = pl.concat([pairs.select(ids=f"{side}_ids") for side in SIDES]).collect()["ids"]
    responses = responses.filter(responses.list.len() > 0)  # unpaired rows have none on a side
    return set(closing_ids(responses.list.len().to_numpy(), responses.list.last().to_numpy()))
