"""From a `[loss]` section to numbers: which function, with which settings, which metrics beside it, and what data it
takes.

Called by the trainer. Not here: the losses (`losses.py`), and the mean over a step: the caller multiplies by
`pair_weight`, adds up and divides by `count_units`.
"""

from collections.abc import Callable, Collection

from torch import Tensor

from train.loss import losses
from train.loss.config import LossConfig, loss_needs
from train.loss.losses import PairLosses, ResponseLogps
from train.loss.metrics import pair_metrics, triplet_metrics
from weights_store.errors import MismatchError

_PAIRWISE: dict[str, Callable[..., PairLosses]] = {
    "dpo": losses.dpo,
    "ipo": losses.ipo,
    "tdpo1": losses.tdpo1,
    "tdpo2": losses.tdpo2,
    "tis_dpo": losses.tis_dpo,
    "simpo": losses.simpo,
    "sepo": losses.sepo,
    "d2po": losses.d2po,
}
_SIDES = ("chosen", "rejected")


def compute_pair_losses(
    loss: LossConfig,
    chosen: ResponseLogps,
    rejected: ResponseLogps | None,
    scores: tuple[Tensor, Tensor] | None = None,
    anchor: ResponseLogps | None = None,
) -> tuple[PairLosses, dict[str, Tensor]]:
    """Return the losses `[B]` that `loss` names, and the metrics `[B]` that go with them.

    Args:
        loss: What is minimised.
        chosen: With what `loss_needs(loss)` says.
        rejected: Likewise; None only for `sft`.
        scores: Annotator scores `[B]` of chosen and rejected, for `uni_dpo`.
        anchor: Responses sampled for the same prompts, for `ti_dpo` with the triplet.

    Raises:
        ValueError: Something that the loss needs was not given.
        InputError: See `losses.sepo`.
    """
    result = _compute(loss, chosen, rejected, scores, anchor)
    metrics = pair_metrics(
        chosen,
        rejected,
        beta=loss.beta or 1.0,  # sepo has none, sft need not: plain log-ratios
        weighted=None if loss.name in ("dpo", "sft") else result,  # theirs are the plain ones
        kl_direction=loss_needs(loss).kl_direction,
    )
    if loss.triplet_margin is not None and rejected is not None and anchor is not None:
        metrics |= triplet_metrics(chosen, rejected, anchor, margin=loss.triplet_margin)
    return result, metrics


def _compute(
    loss: LossConfig,
    chosen: ResponseLogps,
    rejected: ResponseLogps | None,
    scores: tuple[Tensor, Tensor] | None,
    anchor: ResponseLogps | None,
) -> PairLosses:
    if loss.name == "sft":
        return losses.sft(chosen, rejected, **loss.arguments())
    if rejected is None:
        raise ValueError(f"{loss.name} needs the rejected side; none was given")
    if loss.name == "ti_dpo":
        return losses.ti_dpo(chosen, rejected, anchor, **loss.arguments())
    if loss.name != "uni_dpo":
        return _PAIRWISE[loss.name](chosen, rejected, **loss.arguments())
    if scores is None:
        raise ValueError("uni_dpo needs annotator scores; none were given")
    return losses.uni_dpo(chosen, rejected, chosen_scores=scores[0], rejected_scores=scores[1], **loss.arguments())


def count_units(loss: LossConfig, *, num_pairs: int, num_chosen_tokens: int) -> int:
    """Return what the loss is a mean over: pairs, or for SFT chosen response tokens."""
    return num_chosen_tokens if loss.name == "sft" else num_pairs


def check_columns_for(loss: LossConfig, source_name: str, columns: Collection[str]) -> None:
    """Check that a weight dataset has what the loss needs, before anything is loaded.

    Args:
        loss: What is to be minimised.
        source_name: `name@version`, for the message.
        columns: The columns that hold a value in every row.

    Raises:
        MismatchError: Columns are missing; says which, and what makes them.
    """
    needs = loss_needs(loss)
    build = "build it again with `tokenweights build RECIPE"
    estimator = {"sepo": "sepo", "ti_dpo": "ti"}.get(loss.name, "tis")
    anchors = f"{build} --set anchors.seed=0`, or train with loss.anchor='online' or loss.triplet_gamma=0"
    required = {
        "{}_ref_logps": (needs.ref_logps, f"{build}`"),
        "{}_token_weights": (needs.token_weights, f"{build} --set weights.estimator={estimator}`"),
        "{}_score": (
            needs.scores,
            "the source needs annotator scores of both responses (columns chosen_score and rejected_score); "
            f"then {build}`",
        ),
        "anchor_ids": (needs.anchors and not needs.fresh_anchors, anchors),
        "anchor_ref_logps": (needs.anchors and not needs.fresh_anchors, anchors),
        "{}_ref_top_ids": (needs.ref_top, f"{build} --set score.top_k=16`, or train with loss.kl='exact'"),
        "{}_ref_top_logps": (needs.ref_top, f"{build} --set score.top_k=16`, or train with loss.kl='exact'"),
    }
    wanted = {column.format(side): remedy for column, (need, remedy) in required.items() if need for side in _SIDES}
    missing = [column for column in wanted if column not in columns]
    if missing:
        remedies = "; ".join(dict.fromkeys(wanted[column] for column in missing))
        kl = f" with loss.kl={loss.kl!r}" if needs.kl_direction else ""
        raise MismatchError(
            f"loss.name={loss.name!r}{kl} needs {', '.join(missing)}, which {source_name} lacks in some or all rows; "
            f"{remedies}"
        )
