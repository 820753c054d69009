"""Token scores of every construction, for the pairs of a world: what a build computes, here on models in memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.quality.worlds import Row, World
from pipeline.toy.policies import Base, Ids, batches, train_policy, weights_of_side
from pipeline.weighing.head import Head, Responses, fit_head
from pipeline.weighing.held_out import HeldOut, measure
from pipeline.workers.context_basis import fit_basis
from train.data.stored_pairs import Pair, StoredResponse
from weights_store.schemas import SIDES
from weights_store.tables.checksums import mix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAIRS_PER_STEP = 32
Scores = list[np.ndarray]
"""One array of token scores for each response, `[T]` float32 nats: chosen, rejected, chosen, …"""


def sequences(rows: Sequence[Row]) -> tuple[list[Ids], list[Ids]]:
    """Return prompts and responses of pairs, chosen and rejected in turns."""
    return [row[0] for row in rows for _ in range(2)], [response for row in rows for response in row[1:]]


@torch.inference_mode()
def logps_of(base: Base, model: "PreTrainedModel", prompts: Sequence[Ids], responses: Sequence[Ids]) -> Scores:
    """Return the log-probs of the response tokens under a model with the forward pass of transformers."""
    found: dict[int, np.ndarray] = {}
    for batch in batches(base, prompts, responses):
        found |= batch.by_response(batch.logps(model))
    return [found[i] for i in range(len(responses))]


@torch.inference_mode()
def contexts_of(base: Base, prompts: Sequence[Ids], responses: Sequence[Ids]) -> Scores:
    """Return the states of the base at half depth that predict each response token, `[T, H]` for each response."""
    found: dict[int, np.ndarray] = {}
    for batch in batches(base, prompts, responses):
        found |= batch.by_response(batch.states(base.plain, (base.plain.config.num_hidden_layers + 1) // 2))
    return [found[i] for i in range(len(responses))]


def as_pairs(rows: Sequence[Row], ref_logps: Scores, weights: Scores | None = None) -> list[Pair]:
    """Return pairs as the trainer takes them, with these token weights or with weights of 1."""
    weights = weights or [np.ones(len(logps), np.float32) for logps in ref_logps]

    def response(ids: Ids, index: int) -> StoredResponse:
        return StoredResponse(ids, weights[index], ref_logps[index])

    return [
        Pair(f"{i:032x}", prompt, response(chosen, 2 * i), response(rejected, 2 * i + 1))
        for i, (prompt, chosen, rejected) in enumerate(rows)
    ]


@dataclass
class Scorers:
    """The constructions over one world. Models are trained when they are first asked for."""

    world: World

    def __post_init__(self) -> None:
        """Score the pairs with the reference."""
        self.base = self.world.base
        self.ref_logps = logps_of(self.base, self.base.plain, *sequences(self.world.rows))
        self._known: dict[tuple[object, ...], Scores] = {}

    def known(self, key: tuple[object, ...], make: Callable[[], Scores]) -> Scores:
        """Return what was made under this key before, or make it."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def oracle(self) -> Scores:
        """Return the true token rewards."""
        return self.world.true_rewards()

    def trained(self, loss: str, *, on_other: bool = False, num_epochs: int = 2) -> Scores:
        """Return log pi+ - log pi- of construction S (`sft`) or D (`dpo`), trained on these pairs or on the other ones."""
        plus, minus = (self.of_side(loss, swap, on_other=on_other, num_epochs=num_epochs) for swap in (False, True))
        return difference(plus, minus)

    def of_side(self, loss: str, swap: bool, *, on_other: bool = False, num_epochs: int = 2) -> Scores:
        """Return log-probs of the pairs under pi+, or with `swap` pi-, trained on these pairs or on the other ones."""

        def make() -> Scores:
            pairs = as_pairs(self.world.rows, self.ref_logps)
            if on_other:
                rows = self.world.other
                pairs = as_pairs(rows, logps_of(self.base, self.base.plain, *sequences(rows)))
            settings = {"name": loss} | ({"beta": 0.1} if loss == "dpo" else {})
            return self.logps_after(pairs, self.world.rows, settings, swap=swap, num_epochs=num_epochs)

        return self.known(("of_side", loss, swap, on_other, num_epochs), make)

    def logps_after(
        self,
        pairs: Sequence[Pair],
        scored: Sequence[Row],
        loss: Mapping[str, object],
        *,
        swap: bool = False,
        num_epochs: int = 2,
        seed: int = 0,
    ) -> Scores:
        """Train a model on pairs, in an order that `seed` draws, and return its log-probs of the responses of other pairs."""
        optim = {
            "learning_rate": self.world.learning_rate,
            "max_steps": max(1, num_epochs * len(pairs) // PAIRS_PER_STEP),
            "pairs_per_step": PAIRS_PER_STEP,
            "seed": seed,
        }
        model = train_policy(self.base, pairs, loss, optim, swap=swap)
        return logps_of(self.base, self.base.plain_copy(model), *sequences(scored))

    def prompted(self, *, by_scorer: bool = False) -> Scores:
        """Return log pi+ - log pi- of construction P, of the base or of the world's larger scorer."""
        behind, base = self.world.behind, self.base
        assert behind is not None, "this world has no system prompts"
        if by_scorer:
            assert self.world.scorer is not None, "this world has no larger scorer"
            base = self.world.scorer()
        prompts, responses = sequences(self.world.rows)
        sides = [
            logps_of(base, base.plain, [behind(prompt, good) for prompt in prompts], responses)
            for good in (True, False)
        ]
        return difference(*sides)

    def head(self, num_contexts: int = 0, *, on_other: bool = False) -> Scores:
        """Return the scores of estimator `head`, out of fold; with `on_other` it is fitted on the other pairs too."""
        rows = [*self.world.rows, *(self.world.other if on_other else ())]
        contexts = _reduced(contexts_of(self.base, *sequences(rows)), num_contexts) if num_contexts else None
        return head_of(rows, contexts)[: 2 * len(self.world.rows)]

    def drawn(self, seed: int) -> Scores:
        """Return noise: U(-0.5, 1.5), the range of the paper's clamp."""
        rng = np.random.default_rng(seed)
        return [rng.uniform(-0.5, 1.5, len(logps)).astype(np.float32) for logps in self.ref_logps]


def head_of(rows: Sequence[Row], contexts: Scores | None = None) -> Scores:
    """Return the scores of estimator `head` for pairs, each by fits on other pairs."""
    sides = responses_of(rows, contexts)
    # Each pair is a group of its own: worlds have few prompts, and another pair of a prompt does not give a label away.
    groups = mix(np.arange(len(rows), dtype=np.uint64))
    return scores_by(fit_head(*sides, groups), sides, groups)


def responses_of(rows: Sequence[Row], contexts: Scores | None = None) -> list[Responses]:
    """Return the chosen and the rejected responses as the head takes them."""
    return [
        Responses(
            np.concatenate([row[1 + side] for row in rows]),
            np.array([len(row[1 + side]) for row in rows]),
            None if contexts is None else np.concatenate(contexts[side::2]),
        )
        for side in range(2)
    ]


def scores_by(head: Head, sides: Sequence[Responses], groups: np.ndarray) -> Scores:
    """Return a head's scores of chosen and rejected responses, in turns; `groups` says which fit has not seen a pair."""
    chosen, rejected = (np.split(head.scores(side, groups), np.cumsum(side.lengths)[:-1]) for side in sides)
    return [each for pair in zip(chosen, rejected, strict=True) for each in pair]


def difference(plus: Scores, minus: Scores) -> Scores:
    """Return log-ratios, `[T]` nats for each response."""
    return [left - right for left, right in zip(plus, minus, strict=True)]


def _reduced(states: Scores, num_axes: int) -> Scores:
    """Return states as the attribute stage stores contexts, `[T, num_axes]` for each response."""
    tensors = [torch.from_numpy(each) for each in states]
    basis = fit_basis(tensors, num_axes)
    return [basis.project(each).numpy() for each in tensors]


def margins_of(scores: Scores) -> np.ndarray:
    """Return the sum over chosen minus that over rejected tokens of each pair, `[n]`."""
    sums = np.array([float(each.sum(dtype=np.float64)) for each in scores])
    return sums[::2] - sums[1::2]


def describe(world: World, scores: Scores) -> dict[str, float]:
    """Return how scores agree with the truth, and how well they predict labels."""
    truth, flat = np.concatenate(world.true_rewards()), np.concatenate(scores)
    within = [
        np.corrcoef(true, found)[0, 1]
        for true, found in zip(world.true_rewards(), scores, strict=True)
        if np.ptp(true) > 0 and np.ptp(found) > 0
    ]
    found: HeldOut | None = measure(margins_of(scores), mix(np.arange(len(world.rows), dtype=np.uint64)))
    assert found is not None, "too few pairs to measure"
    return {
        "token_corr": float(np.corrcoef(truth, flat)[0, 1]) if np.ptp(flat) > 0 else 0.0,
        "token_corr_within": float(np.mean(within)) if within else 0.0,
        "std": float(flat.std()),
        "neutral_std": float(flat[truth == 0].std()) if (truth == 0).any() else 0.0,
        "log_likelihood": found.log_likelihood,
        "multiplier": found.multiplier,
        "accuracy": found.accuracy,
    }


def weights_of(scores: Scores, estimator: str = "tis", spread: float | None = None, **settings: object) -> Scores:
    """Return the weights that an estimator makes of log-ratios, which `spread` scales to that standard deviation first."""
    scale = 1.0 if spread is None else spread / max(float(np.concatenate(scores).std()), 1e-9)
    sides = [
        weights_of_side(side, [scale * each for each in scores[index::2]], estimator, **settings)
        for index, side in enumerate(SIDES)
    ]
    return [each for pair in zip(*sides, strict=True) for each in pair]


def weight_term_ratio(base: Base, rows: Sequence[Row], weights: Scores, num_pairs: int = 256) -> float:
    """Return the size of the gradient that weights add at the start, relative to plain DPO's gradient."""
    gradients = []
    prompts, responses = sequences(rows[:num_pairs])
    for of_tokens in (lambda w: np.ones_like(w), lambda w: w - 1):
        model = base.plain.requires_grad_(True)
        model.zero_grad()
        for batch in batches(base, prompts, responses):
            signed = np.concatenate([(1.0, -1.0)[i % 2] * of_tokens(weights[i]) for i in batch.indices])
            (batch.logps(model) * torch.from_numpy(signed.astype(np.float32)).to(base.device)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item())
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)
    return gradients[1] / gradients[0]
