"""Takes as the anchor of a pair a response to another prompt, and scores it behind the pair's own: for the z0 of KTO.

The other prompt is the next one in the order of pair_ids, which are hashes: as good as drawn at random, and the same whichever
pairs come together in a chunk.
"""

from collections.abc import Callable, Iterable, Sequence

import polars as pl
import pyarrow as pa

from pipeline.engine.score_once import Reply, ScoredSequence, score_once
from pipeline.workers.anchors.sampler import anchor_rows, why_no_anchor
from pipeline.workers.pair_row import PairRow, QuarantineRow
from pipeline.workers.pair_scorer import PairScorer, as_share
from pipeline.workers.request import Request, Target, Worker
from train.data.selection import PROMPT_DIGITS
from weights_store import TableVersion, WeightStore
from weights_store.errors import InputError
from weights_store.schemas import SIDES
from weights_store.tables.key_ranges import KeyRange


class MismatchedAnchors(Worker):
    """The request's engine: pairs in, rows of an anchors table out.

    Raises:
        InputError: vLLM cannot load the model, or all pairs have one prompt.
        MissingExtraError: vLLM is not installed.
        OutOfMemoryError: There is not enough memory for the engine.
    """

    def __init__(self, request: Request) -> None:
        self._others = OtherResponses(request.tokens)
        self._scorer = PairScorer(request)

    @property
    def record(self) -> dict[str, object]:
        """How the engine runs, for the lineage."""
        return self._scorer.record

    def fill_in(
        self,
        pairs: Sequence[PairRow],
        target: Target,  # noqa: ARG002 - there is one
        progress: Callable[[float], None] = lambda share: None,
    ) -> tuple[pa.Table, list[QuarantineRow]]:
        """Return an anchor and its log-probs for each pair, and a quarantine row for each pair that cannot have one."""
        engine = self._scorer.engine
        others = self._others.of(pair.pair_id for pair in pairs)
        problems: dict[str, str] = {}
        sequences: dict[str, ScoredSequence] = {}
        for pair in pairs:
            ids = others[pair.pair_id][: max(0, engine.max_tokens - len(pair.prompt_ids))]
            problem = why_no_anchor(engine, pair.prompt_ids, ids)
            if problem is None:
                sequences[pair.pair_id] = ScoredSequence(pair.prompt_ids, ids)
            else:
                problems[pair.pair_id] = problem

        def score(wanted: list[ScoredSequence]) -> list[Reply]:
            return engine.score(wanted, as_share(sum(each.num_wanted for each in wanted), progress))

        replies = dict(zip(sequences, score_once(list(sequences.values()), score), strict=True))
        return anchor_rows(pairs, {key: each.response_ids for key, each in sequences.items()}, replies, problems)


class OtherResponses:
    """For each prompt of a tokens table a response to the next one, in the order of pair_ids; after the last comes the first.

    It is one of the first pair there: the only one, or one of two by the last digit of the pair_id. Takes 100 bytes a pair.

    Raises:
        InputError: There is only one prompt.
    """

    def __init__(self, tokens: TableVersion) -> None:
        self._table, self._version = WeightStore(tokens.store).table(tokens.table), tokens.version
        pair_ids = self._table.scan(tokens.version).select("pair_id").sort("pair_id").collect()
        firsts = pair_ids.group_by(_prompt(), maintain_order=True).first()
        if firsts.height < 2:
            raise InputError(
                f"{tokens}: all pairs have one prompt, and anchors.source 'mismatched' takes responses to other prompts: add "
                "pairs with other prompts"
            )
        following = pl.col("pair_id").shift(-1, fill_value=firsts["pair_id"][0])
        self._next = firsts.select("prompt", other=following)

    def of(self, pair_ids: Iterable[str]) -> dict[str, list[int]]:
        """Return the ids of a response to another prompt, by pair_id."""
        wanted = pl.DataFrame({"pair_id": list(pair_ids)}).with_columns(_prompt()).join(self._next, on="prompt")
        others = wanted["other"].unique().sort()
        span = KeyRange.between(others[0], others[-1])
        is_wanted = pl.col("pair_id").is_in(others.to_list())
        rows = self._table.scan(self._version, within=span).filter(is_wanted)
        found = {row["pair_id"]: _one_of(row) for row in rows.select("pair_id", *_IDS).collect().iter_rows(named=True)}
        return {pair_id: found[other] for pair_id, other in wanted.select("pair_id", "other").iter_rows()}


_IDS = [f"{side}_ids" for side in SIDES]


def _prompt() -> pl.Expr:
    return pl.col("pair_id").str.head(PROMPT_DIGITS).alias("prompt")


def _one_of(row: dict[str, object]) -> list[int]:
    chosen, rejected = (row[name] for name in _IDS)
    assert isinstance(chosen, list)
    assert isinstance(rejected, list)
    if chosen and rejected:
        return rejected if int(str(row["pair_id"])[-1], 16) % 2 else chosen
    return chosen or rejected
