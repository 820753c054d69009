"""Everything that is shown of a weight dataset: chosen pairs, the survey of all tokens, what may be wrong, and the lineage.

`gather.make_view` makes one; `page.render` makes the HTML page of it, `ansi.render` the text for a terminal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weights_store.inspection.doctor import Diagnosis
from weights_store.inspection.pairs import ShownPair
from weights_store.inspection.survey import Survey


@dataclass(frozen=True)
class View:
    """What the page, the terminal and notebooks show."""

    title: str
    """`name@version`."""
    other: str | None
    """The `name@version` that it is compared with."""
    pairs: Sequence[ShownPair]
    num_pairs: int
    """Pairs of the dataset; of two, those that both have."""
    selection: str
    """How the pairs were chosen: "20 of 1,768 pairs, chosen at random"."""
    measures: Sequence[str]
    """The names of `MEASURES` that these pairs have."""
    facts: Sequence[tuple[str, str]]
    """Label and value."""
    survey: Survey
    other_survey: Survey | None
    token_texts: Mapping[int, str]
    """Texts of the ids in the pairs, and of `survey.extremes`; empty without a tokenizer."""
    diagnoses: Sequence[Diagnosis]
    lineage: Sequence[Mapping[str, object]]
    """Rows of `WeightStore.lineage`."""
    recipe: Mapping[str, Mapping[str, object]]
    """The settings of the build, by section."""
    comparison: Mapping[str, object] | None
    """`num_common`, `num_only_here`, `num_only_there`, `num_differing_tokens`, `num_tokens`, `num_disagreeing`,
    `correlation`: see `Comparison`; None for one dataset."""
    plots: Sequence[tuple[str, str]] = ()
    """Title and SVG."""
