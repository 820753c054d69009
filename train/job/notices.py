"""What whoever reads a result must know of its data: said in a run's first lines and its dry run, kept in card and metrics.

A notice is no error: the run may be what its owner wants. Each says what to set otherwise.
"""

from collections.abc import Sequence

from train.config import TrainConfig
from train.data.dataset import Pair, WeightSource
from train.loss.config import Distill, Kto

_BALANCED = (1.0, 1.33)
"""Between these, desirable_weight times desirable over undesirable_weight times undesirable responses: Eq. 8 of KTO, arXiv
2402.01306, as TRL (1.16, `KTOTrainer`) quotes it."""


def notices(config: TrainConfig, source: WeightSource, sample: Sequence[Pair], model_fingerprint: str) -> list[str]:
    """Return the notices of a job, one line each; `sample` is of the pairs that are trained on."""
    found = (
        _of_pair_weights(config, source, sample),
        _of_splits(config, source),
        _of_balance(config, source),
        _of_held_out(config, source),
        _of_teacher(config, source, model_fingerprint),
    )
    return [line for lines in found for line in lines]


def _of_pair_weights(config: TrainConfig, source: WeightSource, sample: Sequence[Pair]) -> list[str]:
    """Say that pairs count differently: a baseline on such a dataset is not the plain loss."""
    mean, least, most = _pair_weights(source, sample)
    if least == most == 1:
        return []
    spread = f"the pair weights of {source.name} are {least:.3g} to {most:.3g}, {mean:.3g} in the mean"
    if not config.data.use_pair_weights:
        return [f"{spread}; data.use_pair_weights=false ignores them, and every pair counts once"]
    loss = config.loss.name
    lines = [
        f"{spread}, and each multiplies the loss of its pair: this is not plain {loss}; data.use_pair_weights=false ignores "
        "them"
    ]
    weights = (source.metadata.get("recipe") or {}).get("weights") or {}
    if config.loss.needs.scores and weights.get("pair_weight") == "quality":
        lines.append(
            f"{loss} weighs pairs by annotators' scores itself, and so do these pair weights, so the scores count twice; set "
            "data.use_pair_weights=false"
        )
    return lines


def _pair_weights(source: WeightSource, sample: Sequence[Pair]) -> tuple[float, float, float]:
    """Return mean, least and largest pair weight: of the whole version if it recorded them, else of the sample."""
    recorded = source.statistics
    if "min_pair_weight" in recorded and "max_pair_weight" in recorded and "mean_pair_weight" in recorded:
        return recorded["mean_pair_weight"], recorded["min_pair_weight"], recorded["max_pair_weight"]
    values = [pair.pair_weight for pair in sample]
    return sum(values) / len(values), min(values), max(values)


def _of_splits(config: TrainConfig, source: WeightSource) -> list[str]:
    """Say that all splits are trained on, if there are several."""
    splits = source.statistics.get("num_pairs_by_split", {})
    if config.data.split or len(splits) < 2:
        return []
    return [f"data.split is empty, so all splits of {source.name} are trained on: {source.splits_text()}"]


def _of_balance(config: TrainConfig, source: WeightSource) -> list[str]:
    """Say that desirable and undesirable responses count unequally in KTO, beyond `_BALANCED`.

    Looks at the whole version, as no other counts are recorded: a split may be balanced otherwise.
    """
    loss, counts = config.loss, source.num_responses
    if not isinstance(loss, Kto) or counts is None:
        return []
    desirable, undesirable = reversed(counts) if config.data.swap else counts
    if not desirable or not undesirable:
        kind = "desirable" if desirable else "undesirable"
        return [
            f"all {desirable or undesirable:,} responses of {source.name} are {kind}, and {loss.name} is made for both kinds"
        ]
    ratio = loss.desirable_weight * desirable / (loss.undesirable_weight * undesirable)
    least, most = _BALANCED
    if least <= round(ratio, 2) <= most:
        return []
    up, down = loss.desirable_weight / ratio, loss.undesirable_weight * ratio
    return [
        f"{source.name} has {desirable:,} desirable and {undesirable:,} undesirable responses, which with their factors count "
        f"{ratio:.3g} to 1; KTO's paper, as TRL quotes it, advises {least:g} to {most:g}: set loss.desirable_weight between "
        f"{up * least:.3g} and {up * most:.3g}, or loss.undesirable_weight between {down / most:.3g} and {down / least:.3g}"
    ]


def _of_held_out(config: TrainConfig, source: WeightSource) -> list[str]:
    """Say that models which made the weights have been trained on the labels of held-out pairs."""
    if not held_out_was_seen(config, source):
        return []
    seen = source.metadata["contrast"]
    if "weights" in seen:  # which of the two datasets' pairs share a prompt is not recorded, only how many
        share = f"contrast.held_out={config.eval.share:g}, or " if config.eval.share else ""
        return [
            f"held-out pairs may have been seen: the contrastive models behind {source.name} were trained on "
            f"{seen['weights']}, which has the prompts of {seen.get('num_seen_pairs', 0):,} of its pairs; for a clean "
            f"measurement build it with {share}a contrast.weights without these prompts"
        ]
    on = f"split {seen['split']!r}" if seen["split"] else "all pairs"
    but = f" but a share of {seen['held_out']:g} of the prompts" if seen["held_out"] else ""
    remedy = (
        f"contrast.held_out={config.eval.share:g}" if config.eval.share else "contrast.split to the split that trains"
    )
    of_pair = f"the contrastive models behind {source.name} were trained on"
    learner = f"the estimator behind {source.name} was fitted on" if seen.get("is_head") else of_pair
    return [
        f"held-out pairs were seen: {learner} {on}{but}, so its weights know "
        f"labels that are held out here; for a clean measurement build it with {remedy}"
    ]


def _of_teacher(config: TrainConfig, source: WeightSource, model_fingerprint: str) -> list[str]:
    """Say that a student is its own teacher: it has nothing to learn from it."""
    teacher = source.metadata.get("reference") or {}
    if not isinstance(config.loss, Distill) or teacher.get("model_fingerprint") != model_fingerprint:
        return []
    return [
        f"model.path={config.model.path!r} is the teacher that {source.name} was scored with, so the KL starts at 0; set it to "
        "the student, or build the dataset with another model.path"
    ]


def held_out_was_seen(config: TrainConfig, source: WeightSource) -> bool:
    """Return whether contrastive models were trained on held-out pairs, and the loss reads weights that they made.

    True also if that cannot be excluded: they were trained on another dataset, which has some of the prompts.
    """
    seen = source.metadata.get("contrast")
    weights = (source.metadata.get("recipe") or {}).get("weights") or {}
    reads_margins = config.data.use_pair_weights and weights.get("pair_weight") == "margin"
    reads_weights = config.loss.needs.token_weights and not config.loss.needs.fresh_weights
    if seen is None or not config.eval.is_on or not (reads_weights or reads_margins):
        return False
    if "weights" in seen and not seen.get("num_seen_pairs"):
        return False
    measured_split = config.eval.split or config.data.split
    is_other_split = bool(seen["split"]) and bool(measured_split) and seen["split"] != measured_split
    is_other_split &= "weights" not in seen  # a split of other pairs
    # The held-out prompts are those with the smallest hashes, so a smaller share lies in a larger one.
    is_held_out = 0 < config.eval.share <= seen["held_out"]
    return not is_other_split and not is_held_out
