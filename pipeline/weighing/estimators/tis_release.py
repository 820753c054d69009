"""The transforms of TIS-DPO's release (its preference_datasets.py), over z; the selection of the best z is SePO's too.

z is the log-ratio with the sign that makes important tokens large: log pi+ - log pi- on chosen tokens, log pi- - log pi+ on
rejected ones.
"""

import numpy as np

from pipeline.weighing.estimators.registry import SideScores, SideWeights, estimator
from pipeline.weighing.estimators.tis_dpo import at_ends
from pipeline.weighing.keys import Lower, MaxWeight, MinWeight, Seed, Share, Upper
from pipeline.weighing.transforms import positions


@estimator("origin", "TIS-DPO's release", "contrastive pair", zero_at={})
def origin(scores: SideScores) -> SideWeights:
    """Return max(0, z). The release has z itself; here a negative z gives 0, and is counted at the lower end."""
    z = scores.z()
    return SideWeights(np.maximum(z, np.float32(0)), num_at_lower=int(np.count_nonzero(z <= 0)))


@estimator("threshold", "TIS-DPO's release", "contrastive pair", zero_at={})
def threshold(scores: SideScores, *, lower: Lower = -1.0, upper: Upper = 1.0) -> SideWeights:
    """Return max(0, clamp(z, lower, upper)). The release does not have the maximum, see `origin`."""
    z, floor = scores.z(), max(0.0, lower)
    return SideWeights(np.clip(z, np.float32(floor), np.float32(upper)), *at_ends(z, floor, upper))


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
    return SideWeights(token_weights, *at_ends(z, lower, upper))


@estimator("random_scale", "TIS-DPO's release", "token keys", zero_at={"min_weight": 0})
def random_scale(
    scores: SideScores, *, seed: Seed = 0, min_weight: MinWeight = 0.7, max_weight: MaxWeight = 1.3
) -> SideWeights:
    """Return weights drawn from U(min_weight, max_weight), the release's `random`. Draws are repeatable, as in `random`."""
    drawn = min_weight + (max_weight - min_weight) * scores.draws(seed)
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
