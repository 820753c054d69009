"""What commits record, as types. Every stage writes its part; people, later stages and trainings read it.

A key that a stage does not need is not there. Commits of other programs may lack any key, and damaged ones hold anything:
`checks/` looks before it trusts.
"""

from typing import Any, NotRequired, TypedDict

Section = dict[str, object]
"""One section of a recipe."""


class Parent(TypedDict):
    """A table version that another one was made from, without the store's place."""

    table: str
    version: int
    fingerprint: str
    role: NotRequired[str]
    """What it was used for, for example `ref_logps`."""


class TokenizerRecord(TypedDict, total=False):
    """The tokenizer that made the ids of a table. Hashes are fingerprints, see `fingerprint.py`."""

    fingerprint: str
    rendering: str
    chat_template: str | None
    vocab_size: int
    eos_token_id: int | None


class SourceRecord(TypedDict):
    """Where the pairs of a tokens table came from."""

    content: str | None
    """Fingerprint of the file; None for a folder or a hub dataset."""
    max_pairs: int | None
    settings: dict[str, object]
    """What the recipe says of the columns and their texts."""
    reading: dict[str, object]
    """The columns that are read and how their texts are split, and the names of the splits."""


class ScorerRecord(TypedDict, total=False):
    """The model and the settings that made log-probs, attributions or anchors; `model` is a fingerprint."""

    model: str
    dtype: str
    condition: str | None
    top_k: int
    prompts: bool
    activations: bool
    contexts: int


class ContextsRecord(TypedDict):
    """How hidden states become the contexts of an attributions table, see `pipeline/workers/context_basis.py`."""

    num_contexts: int
    mean: str
    """Base64 of little-endian float32, as long as a hidden state; `axes` has `num_contexts` of them, one after another."""
    axes: str


class ContrastRecord(TypedDict):
    """Which pairs the contrastive models of a weight dataset have been trained on, or estimator `head` was fitted on."""

    held_out: float
    """Share of the prompts, by hash, that they have not seen, see `train/data/selection.py`."""
    split: str | None
    """The split that they were trained on; None for all pairs."""
    weights: NotRequired[str]
    """Another weight dataset, `name@version`, that they were trained on instead; `split` is one of that dataset."""
    num_seen_pairs: NotRequired[int]
    """How many pairs have a prompt that is among those of `weights` which they were trained on."""
    is_head: NotRequired[bool]
    """Whether these are the pairs that estimator `head` was fitted on, and there are no contrastive models."""


class AnnotationRecord(TypedDict):
    """How the user's own weights were read into a table of annotations."""

    settings: Section
    """The columns, and what their numbers stand for."""
    source: SourceRecord
    """What they were read from: that of the tokens table."""


class ReferenceRecord(TypedDict, total=False):
    """The model whose log-probs stand in a weight dataset."""

    model_fingerprint: str
    dtype: str
    model: str


class ParityRecord(TypedDict, total=False):
    """How stored log-probs compare with those of transformers: absolute differences, in nats a token."""

    num_pairs: int
    num_tokens: int
    mean: float
    p99: float
    max: float
    dtype: str


class Identity(TypedDict, total=False):
    """What determines a weight dataset; its fingerprint is taken of this."""

    schema_version: int
    settings: dict[str, Section]
    tables: dict[str, str]
    data: dict[str, str]


class SideStatistics(TypedDict, total=False):
    """The token weights of one side of a weight dataset."""

    num_responses: int
    num_tokens: int
    mean_weight: float
    min_weight: float
    max_weight: float
    share_at_lower: float
    share_at_upper: float
    num_without_mass: int
    num_matches: list[int]
    """How often each of `weights.patterns` matches something, in their order."""
    mean_logratio: float


class HeldOutRecord(TypedDict, total=False):
    """How well the token scores of an estimator predict labels that they have not seen; nats a pair, see `held_out.py`."""

    not_measured: str
    """Why the other keys are missing, and what to do."""
    num_pairs: int
    num_seen_pairs: int
    """Pairs that are left out, because the scores know labels of their prompts."""
    num_unseen_pairs: int
    """All others, if only a sample of them was measured."""
    assumption: str
    """What the figures take for granted and nobody can check."""
    num_prompts: int
    log_likelihood: float
    """`-0.693` is chance. A key with `_se` is the standard error of another one."""
    log_likelihood_se: float
    accuracy: float
    multiplier: float
    """The factor with which the scores predict best; 1 if they are log-odds, below 1 if they are overconfident."""
    multiplier_se: float
    scale: float
    """The factor that they have in the weights; missing if the estimator has no `weights.scale`."""
    spread: float
    """The standard deviation to which `weights.spread` has scaled them; the verdict is then that of the scores before."""
    verdict: str
    """What to make of the scores with that factor, or with 1."""
    gain_over_dpo: float
    """By how much they predict better than DPO's own implicit reward."""
    gain_over_dpo_se: float


class HeadRecord(TypedDict, total=False):
    """How the token rewards of estimator `head` were fitted on labels, see `weighing/head.py`."""

    num_pairs: int
    num_prompts: int
    strength: float
    """The L2 penalty of a token's reward that was chosen: 1 / variance of its prior."""
    context_strength: float
    """That of its contexts; missing if tokens alone predict as well."""
    log_likelihood: float
    """Mean over the fitted pairs, each with a fit that has not seen its prompt, in nats."""
    log_likelihoods: dict[str, float]
    """By candidate of the strengths."""


class SpreadRecord(TypedDict):
    """The spread of token scores, in nats, for `weights.spread`."""

    std: float
    """Standard deviation over all response tokens before they are multiplied."""
    scale: float
    """What they are multiplied by."""


class Statistics(TypedDict, total=False):
    """Counts and means over the rows of a version, or over what a commit added to a scored table."""

    num_pairs: int
    num_pairs_by_split: dict[str, int]
    num_tokens: int
    wall_s: float
    num_source_rows: int
    quarantined: dict[str, int]
    """Rows of the source that are in quarantine, by reason."""
    num_prompt_tokens: int
    num_response_tokens: int
    num_unpaired_rows: int
    """Rows with a response on one side only."""
    num_scored_pairs: int
    num_anchored_pairs: int
    ref_top_k: int
    mean_pair_weight: float
    min_pair_weight: float
    max_pair_weight: float
    mean_weight_by_position: dict[str, list[float]]
    constant_weights: bool
    held_out: dict[str, HeldOutRecord]
    """By estimator; `dpo` is DPO's own implicit reward, log pi+ - log ref."""
    head: HeadRecord
    spread: dict[str, SpreadRecord]
    """By estimator, with `weights.spread`."""
    chosen: SideStatistics
    rejected: SideStatistics


class OriginRecord(TypedDict):
    """Where a weight dataset was pulled from, instead of parents: what it was made from is not in this store."""

    place: str
    """`hf://datasets/owner/name`, or a folder."""
    revision: str | None
    """The commit of the repository; None for a folder."""
    name: str
    """`name@version` in the store that it was pushed from."""
    licence: str
    lineage: list[dict[str, Any]]
    """Rows of `WeightStore.lineage` in that store."""


class LogRecord(TypedDict):
    """What one commit says of the log itself, so that a commit or a checkpoint that is damaged, swapped or copied is found."""

    table: str
    version: int
    base: str | None
    """Digest of the commit before, None for the first."""
    removed: list[str]
    """Files whose rows this version does not have, or has in others."""
    files: str
    """SHA-256 of the names of all files of this version, see `commits.digest_names`."""
    num_rows: int
    """Rows of the whole version."""
    written_ms: int
    """When, in ms since 1970."""


class CommitMetadata(TypedDict, total=False):
    """What one commit records. Every commit of ours has the first four keys; those of older stores have no `log`."""

    schema_version: int
    fingerprint: str
    num_rows_written: int
    commit_id: str
    """Tells two writers of the same version apart."""
    log: LogRecord
    parents: list[Parent]
    origin: OriginRecord
    """Only of weights that were pulled."""
    identity: Identity
    recipe: dict[str, Section]
    changes: list[str]
    """What differs from the version before, one line per field."""
    statistics: Statistics
    tokenizer: TokenizerRecord
    source: SourceRecord
    cut: dict[str, object]
    scorer: ScorerRecord
    role: str
    engine: dict[str, object]
    reference: ReferenceRecord
    contrast: ContrastRecord
    """Only of weights that trained contrastive models or estimator `head` have made."""
    contexts: ContextsRecord
    """Only of the first commit of attributions with contexts."""
    annotation: AnnotationRecord
    """Only of annotations."""
    parity: ParityRecord
    packages: dict[str, str]
    python: str
    git_commit: str | None
