"""TRL's own DPOTrainer on a weight dataset, for users of TRL (extra `trl`).

Three things differ from TRL: batches are the stored ids, so nothing is tokenised; stored reference log-probs replace a
reference model; and per-token log-probs are multiplied by the stored token weights before TRL sums them. Packing, resume
without replay and the step-0 gate are only in our own trainer.

Written for TRL 1.16: three of the hooks are private, two of TRL and one of transformers (`HOOKS`). With a version
that lacks one, or takes its log-probs elsewhere, training is refused instead of run without weights.
"""
# ruff: noqa: ARG002  (TRL chooses what its hooks take)

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler
from transformers.modeling_outputs import CausalLMOutput

from train.config import DataConfig
from train.data.dataset import Pair, PairDataset, StoredResponse, check_weights_vary, open_weights, sample_pairs
from train.data.sampler import BlockShuffle
from train.model.checkpoint import check_model_fits
from train.model.hub import check_model_folder, find_folder
from train.model.policy import switch_off_noise
from weights_store.errors import MismatchError, MissingExtraError, SettingsError

try:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference
except ImportError as error:
    raise MissingExtraError(
        f"train.trl_adapter needs packages that are not installed ({error}); pip install 'tokenweights[trl]'"
    ) from error

Model = Callable[..., CausalLMOutput]
HOOKS = {
    "_prepare_dataset": ("dataset", "processing_class", "args", "dataset_name"),
    "_precompute_ref_logps": ("dataset", "name", "batch_size"),
    "_get_train_sampler": ("train_dataset",),  # of transformers
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
}
"""Methods of `trl.DPOTrainer` that are replaced here, with the parameters that they must have."""
_REMEDY = "pip install 'tokenweights[trl]', which has a TRL that fits, or train with `tokenweights train`"
_COUNTS_ONCE = "TRL's mean counts each pair once; use `tokenweights train`, or use_pair_weights=False in the DataConfig"
_NEEDED = {
    "loss_type": ["sigmoid"],  # the others are not functions of the two weighted sums, or not tested here
    "f_divergence_type": "reverse_kl",
    "label_smoothing": 0.0,  # TRL's sigmoid loss does not read it
    "ld_alpha": None,  # it sums the reference log-probs itself
    "use_weighting": False,  # WPO reads per-token log-probs, which are already weighted
    "train_sampling_strategy": "random",  # the order is ours, see `_StoredOrder`
    "dataloader_num_workers": 0,  # forked workers would inherit Arrow's threads; reading is fast anyway
}


class WeightedDPOTrainer(DPOTrainer):
    """`trl.DPOTrainer` with the loss `dpo` or `tis_dpo` (without eta) on a weight dataset; one model in memory.

    With `tis_dpo`, TRL's `rewards/*` and `logps/*` are weighted sums.

    Args:
        model: Folder or hub id, with the tokenizer of the dataset.
        args: `precompute_ref_log_probs` and `remove_unused_columns` are set here.
        data: What to train on; pairs come in the order of our own trainer, seeded with `args.seed`.
        loss: `dpo` ignores the token weights.
        eval_data: For evaluation, for example another split.
        **kwargs: Further arguments of `trl.DPOTrainer`, for example `peft_config` and `callbacks`.

    Raises:
        SettingsError: `args` has a setting that does not work with stored weights, `loss` is another one, there is a
            `ref_model`, or `data` is malformed.
        InputError: The model cannot be used.
        MismatchError: Model and dataset do not belong together, `tis_dpo` meets constant weights, the dataset has pair weights,
            or the installed TRL lacks a hook. During training: a pair is longer than `args.max_length`, its `pair_weight` is
            not 1, or TRL computes log-probs where the weights do not reach them.
        NotFoundError: No such store, dataset, version or split.

    References:
        u of arXiv 2410.04350 is linear in the per-token log-ratios: beta (sum_t w_t log pi - sum_t w_t log ref), chosen minus
        rejected. So TRL's sigmoid loss on weighted sums is the TIS-DPO loss.
    """

    def __init__(
        self,
        model: str,
        args: DPOConfig,
        data: DataConfig,
        *,
        loss: Literal["dpo", "tis_dpo"] = "tis_dpo",
        eval_data: DataConfig | None = None,
        **kwargs: Any,
    ) -> None:
        check_hooks(DPOTrainer)
        if loss not in ("dpo", "tis_dpo"):
            hints = {
                "ti_dpo": "; TRL's loss has no triplet and no KL term. Without these, 'ti_dpo' is 'tis_dpo' on TI weights"
            }
            raise SettingsError(
                f"WeightedDPOTrainer has the losses 'dpo' and 'tis_dpo', got {loss!r}{hints.get(loss, '')}; train with "
                "`tokenweights train` for the others"
            )
        for name, needed in _NEEDED.items():
            if (got := getattr(args, name)) != needed:
                # TRL's "sft" term would be made of the weighted log-probs, see `compute_loss`
                is_sft = name == "loss_type" and "sft" in got
                hint = "; for likelihood beside it use `tokenweights train` and loss.nll_lambda" if is_sft else ""
                raise SettingsError(f"stored token weights need {name}={needed!r} in the DPOConfig, got {got!r}{hint}")
        if kwargs.get("ref_model") is not None:
            raise SettingsError(
                "WeightedDPOTrainer reads the reference's log-probs from the weight dataset, so ref_model would do nothing; "
                "leave it out, or build the weights with that model as model.path"
            )
        revision = (args.model_init_kwargs or {}).get("revision")
        folder = check_model_folder(find_folder(model, revision, "model"), "model")
        self._stored = {"train": _open_pairs(folder, data, loss)}
        if eval_data is not None:
            self._stored["eval"] = _open_pairs(folder, eval_data, loss)
        args.precompute_ref_log_probs = True
        args.remove_unused_columns = False
        # TRL requires this class; `_prepare_dataset` replaces it.
        self._stand_in = stand_in = Dataset.from_dict({"prompt_ids": [[0]]})
        super().__init__(
            str(folder),
            args=args,
            data_collator=StoredPairCollator(
                with_token_weights=loss == "tis_dpo",
                max_length=args.max_length,
                pad_to_multiple_of=args.pad_to_multiple_of,
            ),
            train_dataset=stand_in,
            eval_dataset=None if eval_data is None else stand_in,
            **kwargs,
        )
        if args.disable_dropout:
            switch_off_noise(self.model)  # TRL misses router jitter, and rates that are plain numbers

    def _prepare_dataset(
        self, dataset: object, processing_class: object, args: object, dataset_name: str
    ) -> PairDataset:
        """Return the stored pairs, where TRL would tokenise.

        Raises:
            SettingsError: `evaluate` was given a dataset that has no stored weights.
        """
        if isinstance(dataset, PairDataset):
            return dataset
        if dataset is not self._stand_in:
            raise SettingsError(
                f"evaluate() of WeightedDPOTrainer takes stored pairs, a train.data.dataset.PairDataset, got "
                f"{type(dataset).__name__}; name them with eval_data=DataConfig(…) when you make the trainer"
            )
        return self._stored[dataset_name]

    def _precompute_ref_logps(self, dataset: PairDataset, name: str, batch_size: int) -> PairDataset:
        """Do nothing, where TRL would run its reference: the collator returns the stored log-probs."""
        return dataset

    def _get_train_sampler(self, train_dataset: object = None) -> Sampler[int]:
        return _StoredOrder(self._stored["train"], seed=self.args.seed)

    def compute_loss(
        self, model: Model, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: object = None
    ) -> object:
        """Return TRL's loss of `model`, with per-token log-probs `[2B, T - 1]` multiplied by the token weights."""
        token_weights = inputs["token_weights"][:, 1:]  # TRL's log-probs are shifted: its column t is token t + 1
        num_weighted = 0

        def weighted_model(**model_inputs: object) -> CausalLMOutput:
            nonlocal num_weighted
            outputs = model(**model_inputs)
            if model_inputs.get("fused_lm_head"):  # not the extra call for logits of `return_outputs`
                num_weighted += 1
                # prompt-learning adapters add columns in front, which TRL removes in the same way
                outputs.log_probs = outputs.log_probs[:, -token_weights.shape[1] :] * token_weights
            return outputs

        inputs = {name: value for name, value in inputs.items() if name != "token_weights"}
        found = super().compute_loss(weighted_model, inputs, return_outputs, num_items_in_batch)
        if num_weighted != 1:
            raise MismatchError(
                f"TRL {version('trl')} took log-probs from its fused lm_head {num_weighted} times for one loss, where TRL 1.16 "
                f"does once: the token weights would not be what they should; {_REMEDY}"
            )
        return found


def check_hooks(trainer: type) -> None:
    """Check that TRL's trainer has every method that is replaced here.

    Raises:
        MismatchError: One is gone or has other parameters. Names it and the version of TRL.
    """
    for name, parameters in HOOKS.items():
        method = getattr(trainer, name, None)
        found = None if method is None else tuple(inspect.signature(method).parameters)[1:]  # without self
        if found != parameters:
            got = "has none" if found is None else f"has {name}({', '.join(found)})"
            raise MismatchError(
                f"train.trl_adapter replaces DPOTrainer.{name}({', '.join(parameters)}) of TRL 1.16, but TRL {version('trl')} "
                f"{got}; {_REMEDY}"
            )


@dataclass(frozen=True)
class StoredPairCollator:
    """Collate B stored pairs into what TRL's DPOTrainer reads, rows 0..B-1 chosen, rows B..2B-1 rejected.

    It adds `token_weights`, `[2B, T]` float32 aligned to their token, and `ref_chosen_logps`, `ref_rejected_logps` `[B]`: sums
    of the stored reference log-probs, weighted like those of the policy.

    Args:
        with_token_weights: False uses 1 for every weight.
        max_length: Longest prompt + response that is accepted, None for any: nothing is cut here.
        pad_to_multiple_of: T is rounded up to it.
    """

    with_token_weights: bool
    max_length: int | None = None
    pad_to_multiple_of: int | None = None

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """Return the batch of `pairs`.

        Raises:
            MismatchError: A pair is longer than `max_length`, or its `pair_weight` is not 1.
        """
        # Any padding id will do: TRL reads masks.
        pad = DataCollatorForPreference(pad_token_id=0, pad_to_multiple_of=self.pad_to_multiple_of)
        batch: dict[str, Tensor] = pad([self._example(pair) for pair in pairs])
        responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        flat = torch.from_numpy(np.concatenate([self._weights(response) for response in responses]))
        mask = batch["completion_mask"].bool()  # row by row, True on the response tokens in order
        batch["token_weights"] = torch.zeros(mask.shape).masked_scatter(mask, flat)
        return batch

    def _example(self, pair: Pair) -> dict[str, list[int] | float]:
        if pair.pair_weight != 1:
            raise MismatchError(f"pair {pair.pair_id} has pair_weight {pair.pair_weight}, but {_COUNTS_ONCE}")
        if self.max_length is not None and pair.num_tokens > self.max_length:
            raise MismatchError(
                f"pair {pair.pair_id} has {pair.num_tokens} tokens, max_length={self.max_length}: cutting it here would "
                "separate tokens from their weights; raise max_length (None for any), or build with lower "
                "dataset.max_…_tokens"
            )
        return {
            "prompt_ids": pair.prompt_ids.tolist(),
            "chosen_ids": pair.chosen.ids.tolist(),
            "rejected_ids": pair.rejected.ids.tolist(),
            "ref_chosen_logps": self._ref_sum(pair.chosen),
            "ref_rejected_logps": self._ref_sum(pair.rejected),
        }

    def _ref_sum(self, response: StoredResponse) -> float:
        return float(np.dot(self._weights(response).astype(np.float64), response.ref_logps))

    def _weights(self, response: StoredResponse) -> NDArray[np.float32]:
        return response.token_weights if self.with_token_weights else np.ones_like(response.token_weights)


class _StoredOrder(Sampler[int]):
    """Rows in the order of our own trainer, a new one for every epoch; accelerate sets the epoch."""

    def __init__(self, pairs: PairDataset, *, seed: int) -> None:
        self.order = BlockShuffle(pairs.group_sizes, seed=seed)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.order.num_rows

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * len(self)
        return iter(self.order.rows(range(first, first + len(self))))


def _open_pairs(model_folder: Path, data: DataConfig, loss: str) -> PairDataset:
    source = open_weights(data)
    if source.num_unpaired_rows:
        raise MismatchError(
            f"TRL's DPOTrainer compares two responses to a prompt, and {source.num_unpaired_rows:,} rows of {source.name} have "
            "one; train with `tokenweights train` and loss.name='kto' or 'tis_kto'"
        )
    ends = [source.statistics.get(f"{end}_pair_weight", 1.0) for end in ("min", "max")]
    if data.use_pair_weights and ends != [1, 1]:  # before the first step, not when such a pair comes
        raise MismatchError(f"{source.name} has pair weights from {ends[0]:g} to {ends[1]:g}, but {_COUNTS_ONCE}")
    pairs = PairDataset(source, data, vocab_size=check_model_fits(model_folder, source))
    if loss == "tis_dpo":
        check_weights_vary(source, sample_pairs(pairs), loss)
    return pairs
