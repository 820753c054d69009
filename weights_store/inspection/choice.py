"""Which pairs of a weight dataset to look at: conditions keep some, and the worst or random ones of these are shown.

Reads range by range of `pair_id`, so memory stays bounded over any number of pairs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import polars as pl

from weights_store.errors import InputError, SettingsError
from weights_store.inspection.comparison import Comparison
from weights_store.inspection.pair_tables import PairTables
from weights_store.schemas import SIDES
from weights_store.tables.key_ranges import KeyRange
from weights_store.views.token_texts import TokenTexts

DEFAULT_PAIRS = 20
_PARTS = ("prompt_ids", *(f"{side}_ids" for side in SIDES))


@dataclass(frozen=True)
class Choice:
    """What a person asks for. Conditions (`pairs`, `search`, `where`) filter; then `worst` or `random` picks.

    Without a pick, `pairs` shows all that it names, everything else 20 random ones, or of two datasets the 20 worst.

    Raises:
        SettingsError: Both picks, or a number below 1.
    """

    pairs: Sequence[str] = ()
    """Beginnings of `pair_id`s, each of exactly one pair; the pairs are shown in this order."""
    worst: int | None = None
    """How many pairs on which labels and weights disagree most, see `Picker.reason`."""
    random: int | None = None
    search: str | None = None
    """A text in the prompt or a response, in upper or lower case; needs a tokenizer."""
    where: str | None = None
    """A condition in Polars' SQL over `PairTables.columns`, for example `split = 'test' AND num_chosen_tokens > 50`; of two
    datasets also over `disagreement`. It is about single pairs: `AVG` and its like would see one range of pairs at a time."""
    seed: int = 0
    """Another seed gives other random pairs; the same seed gives the same ones, however the table is stored."""

    def __post_init__(self) -> None:
        if self.worst is not None and self.random is not None:
            raise SettingsError("worst and random exclude each other: give one of them")
        for name in ("worst", "random"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise SettingsError(f"{name} is {number}; expected a number of pairs, at least 1")


@dataclass(frozen=True)
class Chosen:
    """The pairs to show."""

    pair_ids: list[str]
    num_pairs: int
    """Pairs of the dataset; of two, those that both have."""
    words: str
    """How they were chosen: "20 of 1,768 pairs, chosen at random"."""
    comparison: Comparison | None


def choose(here: PairTables, other: PairTables | None, choice: Choice, texts: TokenTexts | None = None) -> Chosen:
    """Return which pairs of one dataset, or of two, a choice means.

    Raises:
        SettingsError: `where` is no condition over the columns, or `search` has no tokenizer.
        InputError: A beginning of `pairs` fits no pair or several, or no pair is left.
        MismatchError: An id is not in the tokenizer.
    """
    if other is not None and not choice.pairs and choice.worst is None and choice.random is None:
        choice = replace(choice, worst=DEFAULT_PAIRS)  # people compare two datasets to see where they differ
    picker = Picker(here, other is not None, choice, texts)
    comparison = Comparison() if other else None
    names = picker.columns | (Comparison.COLUMNS if other else frozenset())
    for piece in here.ranges(names, *([other.weights] if other else [])):
        rows = here.scan(piece, sorted(names - {"disagreement"})).collect()
        if comparison is not None and other is not None:
            rows = comparison.join(rows, other.weights.scan(piece).select(sorted(Comparison.COLUMNS)).collect())
        picker.take(rows)
    return Chosen(picker.pair_ids(), picker.num_pairs, picker.words(), comparison)


@dataclass
class Picker:
    """Takes the rows of a dataset range by range, and keeps those that are shown."""

    tables: PairTables
    has_other: bool
    choice: Choice
    texts: TokenTexts | None
    num_pairs: int = 0
    num_matching: int = 0
    best: pl.DataFrame | None = None
    named: list[str] = field(default_factory=list)
    """All pairs that begin with one of `choice.pairs`, whatever the other conditions."""

    def __post_init__(self) -> None:
        self._where = self._condition()
        if self.choice.search is not None and self.texts is None:
            raise SettingsError(
                "search needs the texts of tokens: give a tokenizer, that of the model (--tokenizer FOLDER)"
            )

    @property
    def columns(self) -> frozenset[str]:
        """What it needs of every row."""
        names = {"pair_id"} if self._where is None else {"pair_id", *self._where.meta.root_names()}
        if self.choice.search is not None:
            names |= set(_PARTS)
        return frozenset(names if self.choice.worst is None else names | {self._rank[0]})

    @property
    def _rank(self) -> tuple[str, bool, str]:
        """The column that the worst are found by, whether its largest values are the worst, and this in words."""
        if self.has_other:
            return "disagreement", True, "on which the two datasets disagree most"
        if self.tables.has_contrast:
            return "pair_logratio", False, "whose contrastive pair disagrees most with the label"
        return "effective_share", False, "whose weights lie on the fewest tokens"

    def take(self, rows: pl.DataFrame) -> None:
        """Take the next rows."""
        choice = self.choice
        self.num_pairs += rows.height
        if choice.pairs:
            rows = rows.filter(pl.any_horizontal(pl.col("pair_id").str.starts_with(text) for text in choice.pairs))
            self.named += rows["pair_id"].to_list()
        if self._where is not None:
            try:
                rows = rows.filter(self._where)
            except pl.exceptions.PolarsError as error:  # for example a cast that a value does not survive
                raise self._no_condition(str(error).splitlines()[0]) from error
        if choice.search is not None:
            rows = rows.filter(pl.Series(self._found(rows), dtype=pl.Boolean))
        self.num_matching += rows.height
        rank: pl.Expr | pl.Series
        if choice.worst is not None:
            name, descending, _ = self._rank
            rank = pl.col(name).cast(pl.Float64) * (-1 if descending else 1)
        elif choice.pairs and choice.random is None:
            rank = pl.lit(0.0)
        else:
            rank = pl.Series(self._random(rows["pair_id"].to_list()), dtype=pl.Float64)
        new = rows.select("pair_id", rank=rank)
        ranked = new if self.best is None else pl.concat([self.best, new])
        ranked = ranked.sort("rank", "pair_id", nulls_last=True)
        self.best = ranked if self._limit is None else ranked.head(self._limit)

    def pair_ids(self) -> list[str]:
        """Return the pairs to show, in order.

        Raises:
            InputError: See `choose`.
        """
        for text in self.choice.pairs:
            self._check_one(text)
        ids: list[str] = [] if self.best is None else self.best["pair_id"].to_list()
        if self.has_other and not self.num_pairs:
            raise InputError(
                "no pair to show: the two datasets have no pair in common; compare two with the same pairs"
            )
        if not ids:
            asked = [f"contain {self.choice.search!r}"] if self.choice.search is not None else []
            asked += [f"match {self.choice.where!r}"] if self.choice.where is not None else []
            told = f"none of {_pairs(self.num_pairs)}{' that both datasets have' if self.has_other else ''}"
            raise InputError(f"no pair to show: {told} {' and '.join(asked) or 'is left'}; ask for something else")
        if self.choice.pairs and self._limit is None:
            order = {self._check_one(text): number for number, text in reversed(list(enumerate(self.choice.pairs)))}
            ids = sorted((pair_id for pair_id in ids if pair_id in order), key=order.__getitem__)
        return ids

    def words(self) -> str:
        """Return how the pairs were chosen, in words."""
        num_shown = 0 if self.best is None else self.best.height
        of = _pairs(self.num_matching)
        conditions = [f"containing {self.choice.search!r}"] if self.choice.search is not None else []
        conditions += [f"with {self.choice.where}"] if self.choice.where is not None else []
        if self.choice.pairs and self._limit is None:
            return f"{_pairs(num_shown)} of {self.num_pairs:,}, by id"
        matching = f"{of} {' and '.join(conditions)} (of {self.num_pairs:,})" if conditions else of
        if num_shown == self.num_matching:
            return f"all {matching}" if num_shown > 1 else matching
        how = f"those {self._rank[2]}" if self.choice.worst is not None else "chosen at random"
        return f"{num_shown:,} of {matching}, {how}"

    @property
    def _limit(self) -> int | None:
        if self.choice.worst is not None or self.choice.random is not None:
            return self.choice.worst or self.choice.random
        return None if self.choice.pairs else DEFAULT_PAIRS

    def _check_one(self, text: str) -> str:
        """Return the pair that a text names: the one of this id, or the only one that begins with it."""
        found = [text] if text in self.named else [pair_id for pair_id in self.named if pair_id.startswith(text)]
        if len(found) == 1:
            return found[0]
        where = f"{self.tables.weights.table.path}@{self.tables.weights.version}"
        if not found:
            raise InputError(
                f"no pair of {where} begins with {text!r}; `where` and `search` find pairs by what they hold"
            )
        some = ", ".join(found[:3])
        raise InputError(f"{len(found)} pairs of {where} begin with {text!r}, for example {some}; give more of the id")

    def _random(self, pair_ids: list[str]) -> list[float]:
        """Return a number in [0, 1) for each pair that depends on nothing but the seed and its id."""
        digests = (hashlib.blake2b(f"{self.choice.seed} {text}".encode(), digest_size=6).digest() for text in pair_ids)
        return [int.from_bytes(digest) / 2**48 for digest in digests]

    def _found(self, rows: pl.DataFrame) -> list[bool]:
        """Return of each row whether the text that is searched for is in the prompt or in a response."""
        assert self.texts is not None
        wanted, join = (self.choice.search or "").casefold(), self.texts.join
        return [any(wanted in join(ids).casefold() for ids in row) for row in rows.select(_PARTS).iter_rows()]

    def _condition(self) -> pl.Expr | None:
        """Return `where` as an expression, tried on no rows."""
        where = self.choice.where
        if where is None:
            return None
        try:
            expression = pl.sql_expr(where)
            if unknown := sorted({*expression.meta.root_names()} - {*self._known}):
                raise self._no_condition(f"there is no column {', '.join(unknown)}")
            nothing = KeyRange.between("", "")
            stored = [name for name in self._known if name != "disagreement"]
            known = self.tables.scan(nothing, stored).head(0).collect()
            known.with_columns(disagreement=pl.lit(None, pl.Float64)).filter(expression)
        except (pl.exceptions.PolarsError, UnicodeEncodeError) as error:
            raise self._no_condition(str(error).splitlines()[0]) from error
        return expression

    @property
    def _known(self) -> list[str]:
        """The columns that a condition can name."""
        return [*self.tables.columns, *(["disagreement"] if self.has_other else [])]

    def _no_condition(self, why: str) -> SettingsError:
        asked = f"where {self.choice.where!r} is no condition over the columns of the weights"
        listed = f"the columns are {', '.join(self._known)}; for example: split = 'test' AND num_chosen_tokens > 50"
        return SettingsError(f"{asked}: {why}; {listed}")


def _pairs(number: int) -> str:
    return f"{number:,} pair{'' if number == 1 else 's'}"
