"""What an estimator gets and returns, and the registry that makes it known to recipes. It knows no estimator."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np

from pipeline.marks.characters import Texts
from pipeline.weighing.draws import draw_uniform
from weights_store.schemas import Side


@dataclass(frozen=True, slots=True)
class SideScores:
    """What is known of one side: flat over the tokens of its responses, `[N]`, or one value per response, `[B]`.

    What nothing reads may be missing.
    """

    side: Side
    lengths: np.ndarray
    """Tokens of each response, `[B]`, at least 1. A row of a batch without a response on this side is not among them."""
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
    """The user's own weights, or those of the messages' roles, `[N]` float32; see `stages/annotate.py`."""
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

    def implicit_rewards(self) -> np.ndarray:
        """Return log pi+ - log ref, `[N]` float32 nats: DPO's implicit token rewards over beta, arXiv 2305.18290, eq. 5."""
        assert self.positive_logps is not None, "no log-probs of pi+"
        assert self.ref_logps is not None, "no log-probs of the reference"
        return np.subtract(self.positive_logps, self.ref_logps, dtype=np.float32)

    def fitted_rewards(self) -> np.ndarray:
        """Return the token rewards of a fit on labels, `[N]` float32 nats."""
        assert self.rewards is not None, "fit the rewards over the whole dataset first, see `fits.py`"
        return self.rewards

    def z(self) -> np.ndarray:
        """Return the log-ratios with the sign that makes important tokens of this side large, `[N]` float32 nats."""
        logratios = self.logratios()
        return logratios if self.side == "chosen" else -logratios

    def draws(self, seed: int) -> np.ndarray:
        """Return a number per token, drawn from U(0, 1), `[N]`. It depends only on the token and the seed."""
        assert self.token_keys is not None, "no token keys"
        return draw_uniform(self.token_keys, seed)


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
    num_matches: tuple[int, ...] | None = None
    """How often each of `weights.patterns` matches something."""


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
    "message roles",
    "other response",
    "text",
]
"""What weighing reads of each token. Pair and reference: their log-probs. Token keys: see `draws.py`. Labels: see `head.py`.
Own weights are columns of the source, message roles those of its messages."""
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


def ensemble(members: Sequence[SideWeights]) -> SideWeights:
    """Return the geometric mean of the weights of several estimators; it is 0 where one of them is 0. Our own.

    `num_without_mass` is the sum over the members, `num_matches` that of the only one which has patterns.
    """
    with np.errstate(divide="ignore"):
        logs = sum(np.log(member.token_weights, dtype=np.float64) for member in members)
    counts = [member.num_without_mass for member in members if member.num_without_mass is not None]
    num_matches = next((member.num_matches for member in members if member.num_matches is not None), None)
    weights = np.exp(logs / len(members)).astype(np.float32)
    return SideWeights(weights, num_without_mass=sum(counts) if counts else None, num_matches=num_matches)
