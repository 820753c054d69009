"""What one training job starts from: dataset, model, identity and pairs, checked before the model is loaded.

Called by `job.py`. Not here: the output folder (`output.py`), and the comparison of the model's log-probs (`gate.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from train.config import TrainConfig
from train.data.dataset import Pair, PairDataset, WeightSource, check_weights_vary, open_weights, sample_pairs
from train.data.selection import Selection
from train.job.notices import notices
from train.job.output import Identity
from train.loss.objective import check_columns_for
from train.model.checkpoint import check_model_fits
from train.model.hub import check_model_folder, find_folder
from weights_store.errors import MismatchError
from weights_store.fingerprint import fingerprint_model
from weights_store.schemas import Side


@dataclass(frozen=True)
class JobInputs:
    """A config with the dataset's version and the model folder that it names; they belong together."""

    config: TrainConfig
    source: WeightSource
    model_folder: Path
    vocab_size: int
    identity: Identity


@dataclass(frozen=True)
class JobPairs:
    """Pairs of one job: to train on, to measure before and after (a sample of those), and held out."""

    trained: PairDataset
    sample: Sequence[Pair]
    held_out: Sequence[Pair]
    notices: Sequence[str] = ()
    """See `notices.py`."""


def open_inputs(config: TrainConfig) -> JobInputs:
    """Resolve dataset and model of a job, and check that loss, dataset and model belong together.

    Raises:
        InputError: The model cannot be used.
        MismatchError: The dataset lacks what the loss needs, or was made with another tokenizer or vocabulary.
        NotFoundError: No such store, dataset or version.
    """
    source = open_weights(config.data)
    check_columns_for(config.loss, source.name, source.filled_columns())
    _check_rows(config, source)
    folder = find_folder(config.model.path, config.model.revision, "model.path")
    check_model_folder(folder, "model.path")
    vocab_size = check_model_fits(folder, source, is_reference=config.loss.needs.ref_logps)
    return JobInputs(config, source, folder, vocab_size, build_identity(config, source, folder))


def _check_rows(config: TrainConfig, source: WeightSource) -> None:
    """Refuse rows and anchors that are of another kind than the loss needs.

    Raises:
        MismatchError: Rows have one response and the loss or `eval.best` compares two, or anchors come from elsewhere.
    """
    loss, num_unpaired, num_rows = config.loss, source.num_unpaired_rows, source.statistics.get("num_pairs", 0)
    what = f"{num_unpaired:,} of {num_rows:,} rows of {source.name} have one response"
    if num_unpaired and loss.compares:
        raise MismatchError(
            f"loss.name={loss.name!r} compares two responses to a prompt, and {what}; use loss.name='kto', 'tis_kto', "
            "'sft' or 'distill'"
        )
    if num_unpaired == num_rows and num_rows and config.eval.best == "rewards/accuracies":
        raise MismatchError(
            f"eval.best='rewards/accuracies' compares two responses to a prompt, and {what}; set it to 'loss' or "
            "'rewards/margins'"
        )
    wanted = "mismatched" if loss.needs.mismatched else "sampled"
    if loss.needs.anchors and not loss.needs.fresh_anchors and source.anchors_are != wanted:
        raise MismatchError(
            f"loss.name={loss.name!r} needs anchors that are {wanted}, and those of {source.name} are {source.anchors_are}; "
            f"build it again with `tokenweights build RECIPE --set anchors.source={wanted}`"
        )


def open_pairs(inputs: JobInputs) -> JobPairs:
    """Open the pairs of a job, and check that its loss can learn from them.

    Raises:
        MismatchError: Token weights are constant, or cannot be refreshed as they were made; pair weights are all 0; held-out
            rows do not have what `eval.best` compares; or rows of the dataset are damaged.
        NotFoundError: No pair is left.
    """
    config, source, needs = inputs.config, inputs.source, inputs.config.loss.needs

    side: Side | None = None
    if source.num_unpaired_rows and not needs.rejected:  # nothing to learn from on the other side
        side = "rejected" if config.data.swap else "chosen"

    def view(selection: Selection) -> PairDataset:
        return PairDataset(
            source,
            config.data,
            selection=replace(selection, side=side),
            vocab_size=inputs.vocab_size,
            with_ref_top=needs.ref_top,
            with_scores=needs.scores,
            with_anchors=needs.anchors and not needs.fresh_anchors,
        )

    trained = view(Selection.for_training(config.data, config.eval))
    sample = sample_pairs(trained)
    if config.data.use_pair_weights and source.statistics.get("max_pair_weight") == 0:
        raise MismatchError(
            f"all pair weights of {source.name} are 0, so nothing would be learnt; set data.use_pair_weights=false, or build "
            "it with another weights.pair_weight"
        )
    if needs.token_weights and config.loss.needs_differing_weights:
        check_weights_vary(source, sample, config.loss.name)
    if needs.fresh_weights:
        from train.job.refresh import HybridSettings  # loads transformers

        HybridSettings.of(source)  # refuses a dataset that does not record how its weights were computed
    held_out: Sequence[Pair] = []
    if config.eval.is_on:
        held_out = sample_pairs(view(Selection.for_evaluation(config.data, config.eval)), config.eval.max_pairs)
        _check_best(config, source, held_out)
    return JobPairs(trained, sample, held_out, notices(config, source, sample, inputs.identity["model"]["fingerprint"]))


def _check_best(config: TrainConfig, source: WeightSource, held_out: Sequence[Pair]) -> None:
    """Refuse to choose checkpoints by a margin that no held-out row has; `_check_rows` refuses accuracies."""
    sides = ([pair.chosen for pair in held_out], [pair.rejected for pair in held_out])
    if config.eval.best == "rewards/margins" and not all(any(len(each.ids) for each in side) for side in sides):
        raise MismatchError(
            f"eval.best='rewards/margins' compares chosen with rejected responses, and the held-out rows of {source.name} are "
            "all of one kind; set it to 'loss', or hold out others"
        )


def build_identity(config: TrainConfig, source: WeightSource, model_folder: Path) -> Identity:
    """Return what determines the trained model: content, never paths, micro-batches or logging.

    Raises:
        InputError: The folder holds no model.
    """
    return {
        "weights": {"name": source.name, "fingerprint": source.reference.fingerprint},
        "model": {
            "fingerprint": fingerprint_model(model_folder),
            **config.model.result_settings(),
        },
        "lora": None if config.lora is None else config.lora.model_dump(),
        "data": config.data.model_dump(include={"swap", "split", "max_pairs"})
        | config.data.model_dump(include={"use_pair_weights"}, exclude_defaults=True),
        "loss": config.loss.model_dump(exclude_none=True),
        "optim": config.optim.result_settings(),
        "eval": config.eval.model_dump(exclude=set() if config.eval.best else {"every_steps", "max_pairs"}),
    }
