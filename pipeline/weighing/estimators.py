"""Estimators of token weights, each a pure function on flat arrays, without a loop over tokens.

An estimator computes the weights of one side from what is stored of its response tokens, so that changing the estimator takes
seconds on the CPU. To add one, write its function here. `@estimator` makes it known to recipes: its keyword arguments are the
keys of [weights] that it reads, with their defaults; the first line of its docstring is its row in docs/weights.md.

EOS is a token like any other. Weights are at least 0: a negative one would reverse the gradient. Those of `tis` and of the
release's transforms are not normalised.

Over 400 lines because all estimators are here, each in a few lines.

Throughout, z is the log-ratio with the sign that makes important tokens large: log pi+ - log pi- on chosen tokens, log pi- -
log pi+ on rejected ones.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np

from pipeline.marks.characters import Texts
from pipeline.marks.patterns import pattern_weights
from pipeline.weighing.draws import draw_uniform
from pipeline.weighing.keys import (
    Calibrated,
    DecayGamma,
    DiffGamma,
    Features,
    K,
    Lower,
    MaxWeight,
    MinWeight,
    Mu,
    Patterns,
    Per,
    Rest,
    Scale,
    Seed,
    Share,
    SigmaDivisor,
    Span,
    Spread,
    TiLambda,
    Upper,
)
from pipeline.weighing.transforms import decay as decay_transform
from pipeline.weighing.transforms import mean_one, means, positions
from train.model.hybrid import hybrid_weights
from weights_store.schemas import Side


@dataclass(frozen=True, slots=True)
class SideScores:
    """What is known of one side: flat over the tokens of its responses, `[N]`, or one value per response, `[B]`.

    What nothing reads may be missing.
    """

    side: Side
    lengths: np.ndarray
    """Tokens of each response, `[B]`, at least 1."""
    positive_logps: np.ndarray | None = None
    """Log-probs of pi+, `[N]` nats. Those of pi- and of the reference have the same shape."""
    negative_logps: np.ndarray | None = None
    ref_logps: np.ndarray | None = None
    top_logps: np.ndarray | None = None
    """The reference's k largest log-probs at each position, `[N * k]` nats."""
    attributions: np.ndarray | None = None
    """L1 norms of gradients, `[N]`."""
    prompt_attributions: np.ndarray | None = None
    """Their sum over the prompt of each response, `[B]`."""
    prompt_lengths: np.ndarray | None = None
    """Tokens of each prompt, `[B]`."""
    activations: np.ndarray | None = None
    """Size of the hidden state that predicts each token, `[N]`."""
    token_keys: np.ndarray | None = None
    """64-bit hashes of pair, side and position, `[N]`."""
    word_starts: np.ndarray | None = None
    """Whether a word starts at each token, `[N]` bool."""
    rewards: np.ndarray | None = None
    """Token rewards of a fit on labels, `[N]` nats; see `head.py`."""
    own_weights: np.ndarray | None = None
    """The user's own weights, `[N]` float32; see `stages/annotate.py`."""
    differs: np.ndarray | None = None
    """Whether a token is not in the other response, `[N]` bool; see `marks/subsequence.py`."""
    texts: Texts | None = None
    """The texts of the responses."""

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.lengths.sum())

    def logratios(self) -> np.ndarray:
        """Return log pi+ - log pi-, `[N]` float32 nats."""
        assert self.positive_logps is not None, "no log-probs of pi+"
        assert self.negative_logps is not None, "no log-probs of pi-"
        return np.subtract(self.positive_logps, self.negative_logps, dtype=np.float32)

    def fitted_rewards(self) -> np.ndarray:
        """Return the token rewards of a fit on labels, `[N]` float32 nats."""
        assert self.rewards is not None, "fit the rewards over the whole dataset first, see `fits.py`"
        return self.rewards

    def z(self) -> np.ndarray:
        """Return the log-ratios with the sign that makes important tokens of this side large, `[N]` float32 nats."""
        logratios = self.logratios()
        return logratios if self.side == "chosen" else -logratios


@dataclass(frozen=True, slots=True)
class SideWeights:
    """Weights of one side, flat `[N]` float32, with counts; a count is None if the estimator does not make it."""

    token_weights: np.ndarray
    num_at_lower: int | None = None
    """Tokens at or below the lower end of the clamp."""
    num_at_upper: int | None = None
    """Tokens at or above its upper end."""
    num_without_mass: int | None = None
    """Responses whose values are all 0, so that they say nothing about the weights."""


# --- the registry -----------------------------------------------------------------------------------------------------

Input = Literal[
    "contrastive pair",
    "reference",
    "reference top k",
    "attributions",
    "prompt attributions",
    "activations",
    "token keys",
    "words",
    "labels",
    "contexts",
    "own weights",
    "own pair weights",
    "other response",
    "text",
]
"""What weighing reads of each token. Pair and reference: their log-probs. Token keys: see `draws.py`. Labels: see `head.py`.
Own weights are columns of the source."""
F = TypeVar("F", bound=Callable[..., SideWeights])


@dataclass(frozen=True)
class Estimator:
    """An estimator, and what is known of it."""

    estimate: Callable[..., SideWeights]
    source: str
    reads: tuple[Input, ...]
    zero_at: Mapping[str, float] | None
    """Values of settings with which weights are often 0, so that they have no log; {}: with any values; None: with none."""
    token_scores: Callable[[SideScores], np.ndarray] | None
    """Estimates of the tokens' rewards, `[N]` nats, made without knowing the side; None if it has none. See `margins.py`."""

    @cached_property
    def settings(self) -> dict[str, tuple[object, object]]:
        """Type and default of each setting, by key."""
        parameters = inspect.signature(self.estimate).parameters.values()
        return {each.name: (each.annotation, each.default) for each in parameters if each.kind is each.KEYWORD_ONLY}


ESTIMATORS: dict[str, Estimator] = {}
"""By name in a recipe; `ensemble` is made of them."""


def estimator(
    name: str,
    source: str,
    *reads: Input,
    zero_at: Mapping[str, float] | None = None,
    token_scores: Callable[[SideScores], np.ndarray] | None = None,
) -> Callable[[F], F]:
    """Register a function as the estimator `name`, see `Estimator`. Token scores of a contrastive pair are its log-ratios."""
    if token_scores is None and "contrastive pair" in reads:
        token_scores = SideScores.logratios

    def register(function: F) -> F:
        ESTIMATORS[name] = Estimator(function, source, reads, zero_at, token_scores)
        return function

    return register


# --- TIS-DPO ----------------------------------------------------------------------------------------------------------


@estimator("tis", "TIS-DPO, 2410.04350", "contrastive pair")
def tis(
    scores: SideScores,
    *,
    scale: Scale = 1.0,
    spread: Spread = "none",
    k: K = 1.0,
    mu: Mu = 1.0,
    lower: Lower = -0.5,
    upper: Upper = 1.5,
) -> SideWeights:
    """Return k * exp(mu * clamp(scale * (log pi+ - log pi-), lower, upper)), mu < 0 on rejected tokens.

    TIS-DPO, arXiv 2410.04350, eq. 19 of the submission; mu multiplies the clamped value. The paper has scale = k = 1 and mu =
    +1 / -1; lower = -0.5 and upper = 1.5 are the values of SWIFT (NeurIPS 2025, appendix B.2), which are often quoted.
    """
    return _clamped(scores.side, _scaled(scores.logratios(), scale, spread), k, mu, lower, upper)


@estimator("reversed", "ablation", "contrastive pair", token_scores=lambda scores: -scores.logratios())
def reversed_tis(
    scores: SideScores,
    *,
    scale: Scale = 1.0,
    spread: Spread = "none",
    k: K = 1.0,
    mu: Mu = 1.0,
    lower: Lower = -0.5,
    upper: Upper = 1.5,
) -> SideWeights:
    """Return `tis` with pi+ and pi- swapped: an ablation that should hurt."""
    return _clamped(scores.side, _scaled(-scores.logratios(), scale, spread), k, mu, lower, upper)


@estimator("random", "ablation", "token keys")
def random(
    scores: SideScores, *, k: K = 1.0, mu: Mu = 1.0, lower: Lower = -0.5, upper: Upper = 1.5, seed: Seed = 0
) -> SideWeights:
    """Return `tis` of log-ratios drawn from U(lower, upper). A draw depends only on the token and the seed."""
    drawn = (lower + (upper - lower) * _drawn(scores, seed)).astype(np.float32)
    return _clamped(scores.side, drawn, k, mu, lower, upper)


@estimator("uniform", "ablation")
def uniform(scores: SideScores) -> SideWeights:
    """Return 1: plain DPO."""
    return SideWeights(np.ones(scores.num_tokens, dtype=np.float32))


def _scaled(values: np.ndarray, scale: float | Calibrated, spread: float | Literal["none"]) -> np.ndarray:
    """Scale token scores in place."""
    assert scale != "calibrated", "measure the scale over the whole dataset first, see `fits.py`"
    assert spread == "none", "measure the spread over the whole dataset first, see `fits.py`"
    if scale != 1:
        values *= np.float32(scale)
    return values


def _clamped(side: Side, values: np.ndarray, k: float, mu: float, lower: float, upper: float) -> SideWeights:
    token_weights = np.clip(values, np.float32(lower), np.float32(upper))
    token_weights *= np.float32(mu if side == "chosen" else -mu)  # in place: memory traffic is the cost
    np.exp(token_weights, out=token_weights)
    token_weights *= np.float32(k)
    return SideWeights(token_weights, *_at_ends(values, lower, upper))


def _at_ends(values: np.ndarray, lower: float, upper: float) -> tuple[int, int]:
    return int(np.count_nonzero(values <= lower)), int(np.count_nonzero(values >= upper))


# --- the transforms of TIS-DPO's release (its preference_datasets.py), over z -----------------------------------------


@estimator("origin", "TIS-DPO's release", "contrastive pair", zero_at={})
def origin(scores: SideScores) -> SideWeights:
    """Return max(0, z). The release has z itself; here a negative z gives 0, and is counted at the lower end."""
    z = scores.z()
    return SideWeights(np.maximum(z, np.float32(0)), num_at_lower=int(np.count_nonzero(z <= 0)))


@estimator("threshold", "TIS-DPO's release", "contrastive pair", zero_at={})
def threshold(scores: SideScores, *, lower: Lower = -1.0, upper: Upper = 1.0) -> SideWeights:
    """Return max(0, clamp(z, lower, upper)). The release does not have the maximum, see `origin`."""
    z, floor = scores.z(), max(0.0, lower)
    return SideWeights(np.clip(z, np.float32(floor), np.float32(upper)), *_at_ends(z, floor, upper))


@estimator("threshold_and_scale", "TIS-DPO's release", "contrastive pair", zero_at={"min_weight": 0})
def threshold_and_scale(
    scores: SideScores,
    *,
    lower: Lower = -1.5,
    upper: Upper = 1.5,
    min_weight: MinWeight = 0.7,
    max_weight: MaxWeight = 1.3,
) -> SideWeights:
    """Return clamp(z, lower, upper), scaled linearly so that lower becomes min_weight and upper max_weight."""
    z = scores.z()
    slope = (max_weight - min_weight) / (upper - lower)
    token_weights = np.clip(z, np.float32(lower), np.float32(upper))
    token_weights -= np.float32(lower)
    token_weights *= np.float32(slope)
    token_weights += np.float32(min_weight)
    return SideWeights(token_weights, *_at_ends(z, lower, upper))


@estimator("random_scale", "TIS-DPO's release", "token keys", zero_at={"min_weight": 0})
def random_scale(
    scores: SideScores, *, seed: Seed = 0, min_weight: MinWeight = 0.7, max_weight: MaxWeight = 1.3
) -> SideWeights:
    """Return weights drawn from U(min_weight, max_weight), the release's `random`. Draws are repeatable, as in `random`."""
    drawn = min_weight + (max_weight - min_weight) * _drawn(scores, seed)
    return SideWeights(drawn.astype(np.float32))


@estimator("rank_based", "TIS-DPO's release", "contrastive pair", zero_at={"min_weight": 0})
def rank_based(scores: SideScores, *, min_weight: MinWeight = 0.7, max_weight: MaxWeight = 1.3) -> SideWeights:
    """Return weights that rise in equal steps by rank, from min_weight at a response's smallest z to max_weight at its largest.

    Equal z get the mean of their ranks; the release ranks them by position, which favours late tokens. The mean over each
    response is (min_weight + max_weight) / 2, which is also the weight of a single token.
    """
    keys = _keys(scores.z(), scores.lengths)
    order = np.argsort(keys, kind="stable")
    in_order = keys[order]
    firsts = np.flatnonzero(np.concatenate([[True], in_order[1:] != in_order[:-1]]))  # of runs of equal ones
    sizes = np.diff(firsts, append=len(order))
    ranks = np.empty(len(order))
    ranks[order] = np.repeat(firsts + (sizes - 1) / 2, sizes)
    ranks -= np.repeat(np.cumsum(scores.lengths) - scores.lengths, scores.lengths)
    steps = np.repeat(scores.lengths - 1, scores.lengths)
    shares = np.divide(ranks, steps, out=np.full(len(ranks), 0.5), where=steps > 0)
    return SideWeights((min_weight + (max_weight - min_weight) * shares).astype(np.float32))


@estimator("binary", "TIS-DPO's release", "contrastive pair", zero_at={})
@estimator("sepo", "SePO, 2408.13518", "contrastive pair", zero_at={})
def select(scores: SideScores, *, share: Share = 0.3) -> SideWeights:
    """Return 1 for the tokens of each response with the largest z, 0 for all others.

    SePO, arXiv 2408.13518, as in its release: the highest log pi+ - log pi- of a chosen response, the lowest of a rejected one.
    SePO compares a DPO model with its SFT start, we compare the contrastive pair. Of n tokens, max(1, floor(share * n)) are
    selected; the releases select none in short responses. Of equal scores the earlier is selected; TIS-DPO's release gives all
    of them the weight of the last one. SePO's release never selects the first response token; we treat it like any other.
    """
    lengths = scores.lengths
    # A stable sort of integers is eight times as fast as np.lexsort, and breaks ties by position.
    order = np.argsort(_keys(-scores.z(), lengths), kind="stable")
    counts = np.maximum(1, (share * lengths).astype(np.int64))
    is_selected = positions(lengths) < np.repeat(counts, lengths)  # sorted, each response still has its span
    token_weights = np.zeros(scores.num_tokens, dtype=np.float32)
    token_weights[order[is_selected]] = 1
    return SideWeights(token_weights)


def _keys(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return uint64 that sort by response, then by float32 value; -0 equals 0."""
    bits = (values + np.float32(0)).view(np.uint32)
    # Flip all bits of negative values, of others the sign bit: the integers then sort like the floats.
    ordered = bits ^ np.where(bits >> np.uint32(31), np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
    responses = np.repeat(np.arange(len(lengths), dtype=np.uint64) << np.uint64(32), lengths)
    return responses | ordered


# --- other sources ----------------------------------------------------------------------------------------------------


@estimator("ti", "TI-DPO, 2505.19653", "attributions", zero_at={"ti_lambda": 1})
def ti(
    scores: SideScores, *, ti_lambda: TiLambda = 0.7, sigma_divisor: SigmaDivisor = 4.0, span: Span = "response"
) -> SideWeights:
    """Return ti_lambda * attribution + (1 - ti_lambda) * Gaussian prior, each scaled to mean one.

    TI-DPO, arXiv 2505.19653, eq. 8; see `hybrid.hybrid_weights`.

    Raises:
        ValueError: An attribution is negative or not finite.
    """
    assert scores.attributions is not None, "no attributions"
    whole = span == "sequence"
    weighed = hybrid_weights(
        scores.attributions,
        scores.lengths,
        mix=ti_lambda,
        sigma_divisor=sigma_divisor,
        prompt_lengths=scores.prompt_lengths if whole else None,
        prompt_attributions=scores.prompt_attributions if whole else None,
    )
    return SideWeights(weighed.token_weights, num_without_mass=weighed.num_without_mass)


@estimator("head", "ours", "labels", token_scores=lambda scores: scores.fitted_rewards())
def head(
    scores: SideScores,
    *,
    features: Features = "tokens",  # noqa: ARG001 - what the rewards were fitted on, see `head.py`
    scale: Scale = 1.0,
    spread: Spread = 0.3,
    k: K = 1.0,
    mu: Mu = 1.0,
    lower: Lower = -1.5,
    upper: Upper = 1.5,
) -> SideWeights:
    """Return `tis` of token rewards that a ridge Bradley-Terry regression on the labels finds, out of fold.

    The labels are those of other prompts than the pair's own, see `head.py`.
    """
    return _clamped(scores.side, _scaled(scores.fitted_rewards().copy(), scale, spread), k, mu, lower, upper)


@estimator("decay", "D2PO, 2502.14340")
def decay(scores: SideScores, *, decay_gamma: DecayGamma = 0.98) -> SideWeights:
    """Return gamma^t, t from 1."""
    return SideWeights(decay_transform(uniform(scores).token_weights, scores.lengths, decay_gamma))


@estimator("surprise", "ours", "reference", zero_at={})
def surprise(scores: SideScores) -> SideWeights:
    """Return -log ref(y_t) divided by its mean in the response: unlikely tokens weigh more."""
    assert scores.ref_logps is not None, "no log-probs of the reference"
    return _relative(-scores.ref_logps, scores.lengths)


@estimator("entropy", "ours", "reference top k", zero_at={})
def entropy(scores: SideScores) -> SideWeights:
    """Return the entropy of the reference at each position (`score.top_k`), divided by its mean in the response.

    H = -sum p_i log p_i - r log r over the stored k most likely tokens, with the rest r = 1 - sum p_i as one outcome. It is at
    most the entropy over the vocabulary, because merging outcomes never adds entropy.
    """
    assert scores.top_logps is not None, "no top k of the reference"
    logps = scores.top_logps.reshape(scores.num_tokens, -1)
    probs = np.exp(logps)
    rest = np.maximum(0, 1 - probs.sum(axis=1))  # stored log-probs are rounded
    of_rest = rest * np.log(rest, out=np.zeros_like(rest), where=rest > 0)
    return _relative(np.maximum(0, -np.einsum("nk,nk->n", probs, logps) - of_rest), scores.lengths)


@estimator("activation", "ours, after SparsePO, 2410.05102", "activations")
def activation(scores: SideScores) -> SideWeights:
    """Return the size of the hidden state that predicts a token (`attribute.activations`), divided by its mean in the response.

    Inspired by the activation masks of SparsePO (MaPO, arXiv 2410.05102). We have not seen their exact form; this definition is
    ours.
    """
    assert scores.activations is not None, "no activations"
    return _relative(scores.activations, scores.lengths)


# --- marks of users and rules -----------------------------------------------------------------------------------------


@estimator("column", "your own", "own weights")
def column(scores: SideScores, *, per: Per = "token") -> SideWeights:  # noqa: ARG001 - the annotation has one per token
    """Return the number that a column of the source has for the token, or the mean of those of its characters."""
    return _own(scores)


@estimator("spans", "your own", "own weights")
def spans(scores: SideScores, *, rest: Rest = 1.0) -> SideWeights:  # noqa: ARG001 - the annotation has them already
    """Return the mean over a token's characters: the weight of the last span around it that the source has, or `rest`."""
    return _own(scores)


def _own(scores: SideScores) -> SideWeights:
    assert scores.own_weights is not None, "no weights of the user's own: run stage annotate first"
    return SideWeights(scores.own_weights)


@estimator("pattern", "your own", "text")
def pattern(scores: SideScores, *, patterns: Patterns = (), rest: Rest = 1.0) -> SideWeights:
    """Return the mean over a token's characters: the weight of the last pattern that matches it, or `rest`.

    Raises:
        ValueError: A pattern takes too long.
    """
    assert scores.texts is not None, "no texts"
    return SideWeights(pattern_weights(scores.texts, patterns, rest))


@estimator("diff", "DDPO of RLHF-V, 2312.00849", "other response", zero_at={"diff_gamma": 0})
def diff(scores: SideScores, *, diff_gamma: DiffGamma = 5.0) -> SideWeights:
    """Return diff_gamma for tokens that are not in the longest common subsequence of both responses, 1 for the others.

    DDPO, arXiv 2312.00849, divides the response's log-prob by the sum of these weights. We do not; transform `mean_one` does,
    and multiplies by the number of tokens.
    """
    assert scores.differs is not None, "no comparison with the other response"
    return SideWeights(np.where(scores.differs, np.float32(diff_gamma), np.float32(1)))


def ensemble(members: Sequence[SideWeights]) -> SideWeights:
    """Return the geometric mean of the weights of several estimators; it is 0 where one of them is 0. Our own.

    `num_without_mass` is the sum over the members.
    """
    with np.errstate(divide="ignore"):
        logs = sum(np.log(member.token_weights, dtype=np.float64) for member in members)
    counts = [member.num_without_mass for member in members if member.num_without_mass is not None]
    return SideWeights(np.exp(logs / len(members)).astype(np.float32), num_without_mass=sum(counts) if counts else None)


def _relative(values: np.ndarray, lengths: np.ndarray) -> SideWeights:
    """Return values divided by their mean in each response; 1 where all are 0, which is counted."""
    is_empty = means(values, lengths) <= 0
    token_weights = mean_one(values, lengths)
    token_weights[np.repeat(is_empty, lengths)] = 1
    return SideWeights(token_weights, num_without_mass=int(np.count_nonzero(is_empty)))


def _drawn(scores: SideScores, seed: int) -> np.ndarray:
    assert scores.token_keys is not None, "no token keys"
    return draw_uniform(scores.token_keys, seed)
