"""What a training reads of the metadata that a build recorded with a version of a weight dataset."""

from typing import Any, Literal, NotRequired, TypedDict

AttributionTarget = Literal["max_logit", "gold_logps", "dpo_margin"]
"""What is differentiated, see `train/model/attribution.py`."""


class Statistics(TypedDict, total=False):
    """Counts over the whole version."""

    num_pairs: int
    num_response_tokens: int
    num_scored_pairs: int
    num_anchored_pairs: int
    ref_top_k: int
    constant_weights: bool


class RecordedTokenizer(TypedDict):
    """With what the pairs were tokenised."""

    fingerprint: str
    vocab_size: int
    rendering: NotRequired[str]
    """Differs from the fingerprint if the recipe has a chat template of its own."""
    chat_template: NotRequired[str | None]


class RecordedReference(TypedDict, total=False):
    """The model whose log-probs are stored."""

    model: str
    model_fingerprint: str
    dtype: str


class RecordedParity(TypedDict, total=False):
    """How far the stored log-probs are from those of transformers in float32."""

    mean: float
    dtype: str


class RecordedWeighing(TypedDict, total=False):
    """The recipe's section `[weights]`."""

    estimator: str
    ti_lambda: float
    sigma_divisor: float
    span: str
    transforms: list[str]


class RecordedAttribution(TypedDict, total=False):
    """The recipe's section `[attribute]`."""

    target: AttributionTarget


class RecordedRecipe(TypedDict, total=False):
    """The recipe of the build."""

    weights: RecordedWeighing
    attribute: RecordedAttribution
    anchors: dict[str, Any]


class WeightMetadata(TypedDict, total=False):
    """Everything of it; what an older or smaller build did not record is missing or None."""

    statistics: Statistics
    tokenizer: RecordedTokenizer | None
    reference: RecordedReference | None
    parity: RecordedParity | None
    recipe: RecordedRecipe | None
