"""From a `[loss]` section to numbers: the loss function, its settings, the metrics, and the columns that it needs.

Called by the trainer. Not here: the losses (`losses.py`), and the mean over a step: the caller multiplies by
`pair_weight`, adds up and divides by `count_units`.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from train.loss import losses
from train.loss.config import PreferenceLoss, TiDpo
from train.loss.loss_config import LossConfig
from train.loss.metrics import pair_metrics, triplet_metrics
from train.loss.terms import PairLosses, ResponseLogps, has_tokens, mean_logps
from weights_store.errors import MismatchError
from weights_store.schemas import SIDES


def compute_pair_losses(
    loss: LossConfig,
    chosen: ResponseLogps,
    rejected: ResponseLogps | None,
    scores: tuple[Tensor, Tensor] | None = None,
    anchor: ResponseLogps | None = None,
    z0: Tensor | None = None,
) -> tuple[PairLosses, dict[str, Tensor]]:
    """Return the losses `[B]` and the metrics `[B]` that belong to them.

    Args:
        loss: With its settings.
        chosen: With the fields that `loss.needs` names.
        rejected: Likewise; None only for `sft` and `distill`.
        scores: Annotator scores `[B]` of chosen and rejected, for `uni_dpo`.
        anchor: Responses sampled for the same prompts, for `ti_dpo` with the triplet.
        z0: The reference point of the step, a scalar, for `kto` and `tis_kto`.

    Raises:
        ValueError: Something that the loss needs was not given.
        InputError: See `losses.sepo`.
    """
    needs = loss.needs
    if needs.rejected and rejected is None:
        raise ValueError(f"{loss.name} needs the rejected side; none was given")
    data: dict[str, Tensor | ResponseLogps | None] = {}
    if needs.mismatched:
        if z0 is None:
            raise ValueError(f"{loss.name} needs the z0 of the step; none was given")
        data["z0"] = z0
    elif needs.anchors:
        data["anchor"] = anchor
    if needs.scores:
        if scores is None:
            raise ValueError(f"{loss.name} needs annotator scores; none were given")
        data["chosen_scores"], data["rejected_scores"] = scores
    function: Callable[..., PairLosses] = getattr(losses, loss.name)
    result = function(chosen, rejected, **data, **loss.arguments())
    beta, weighted = getattr(loss, "beta", None) or 1.0, None if loss.has_plain_rewards else result
    metrics = pair_metrics(chosen, rejected, beta=beta, weighted=weighted, kl_direction=needs.kl_direction)
    if isinstance(loss, TiDpo) and loss.triplet_margin is not None and rejected is not None and anchor is not None:
        metrics |= triplet_metrics(chosen, rejected, anchor, margin=loss.triplet_margin)
    if isinstance(loss, PreferenceLoss) and loss.nll_lambda:
        result = losses.add_nll(result, chosen, nll_lambda=loss.nll_lambda)
        metrics["nll"] = torch.where(has_tokens(chosen), -mean_logps(chosen).detach(), torch.nan)
    if z0 is not None:
        metrics["kl"] = z0.detach().expand(len(result.losses))  # TRL's name of z0
    return result, metrics


def count_units(loss: LossConfig, *, num_pairs: int, num_chosen_tokens: int, num_responses: int) -> int:
    """Return how many there are of what the loss is a mean over."""
    return {"pair": num_pairs, "chosen token": num_chosen_tokens, "response": num_responses}[loss.unit]


def check_columns_for(loss: LossConfig, source_name: str, columns: Collection[str]) -> None:
    """Check, before anything is loaded, that a weight dataset has what the loss needs.

    Args:
        loss: With its settings.
        source_name: `name@version`, for the message.
        columns: The columns that hold a value in every row.

    Raises:
        MismatchError: Columns are missing; says which, and the command that makes them.
    """
    columns_of = _required_columns(loss).items()
    wanted = {column.format(side): remedy for column, remedy in columns_of for side in SIDES}
    missing = [column for column in wanted if column not in columns]
    if missing:
        remedies = "; ".join(dict.fromkeys(wanted[column] for column in missing))
        kl = getattr(loss, "kl", None)
        setting = f" with loss.kl={kl!r}" if kl in ("exact", "top_k") else ""
        raise MismatchError(
            f"loss.name={loss.name!r}{setting} needs {', '.join(missing)}, which {source_name} lacks in some or all rows; "
            f"{remedies}"
        )


def _required_columns(loss: LossConfig) -> dict[str, str]:
    """Return the columns that the loss reads, `{}` for a side, and what to do if one is missing."""
    needs = loss.needs
    build = "build it again with `tokenweights build RECIPE"
    required: dict[str, str] = {}
    if needs.ref_logps:
        required["{}_ref_logps"] = f"{build}`"
    if needs.token_weights:
        required["{}_token_weights"] = f"{build} --set weights.estimator={loss.estimator}`"
    if needs.scores:
        required["{}_score"] = (
            "the source needs annotator scores of both responses (columns chosen_score and rejected_score); "
            f"then {build}`"
        )
    if needs.anchors and not needs.fresh_anchors:
        remedy = f"{build} --set anchors.seed=0`, or train with loss.anchor='online' or loss.triplet_gamma=0"
        if needs.mismatched:
            remedy = f"{build} --set anchors.source=mismatched`"
        required |= dict.fromkeys(("anchor_ids", "anchor_ref_logps"), remedy)
    if needs.ref_top:
        remedy = f"{build} --set score.top_k=16`" + (", or train with loss.kl='exact'" if hasattr(loss, "kl") else "")
        required |= dict.fromkeys(("{}_ref_top_ids", "{}_ref_top_logps"), remedy)
    return required
