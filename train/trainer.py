"""The training loop: transformers' Trainer with our order of pairs, our log-probs, our losses and our metrics.

The mean of a step is exact: every pair (for SFT, every response token) of a step counts the same, however it is cut into
micro-batches and spread over ranks. Not here: what is trained on (`dataset.py`), where it goes (`output.py`).
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from train import losses
from train.collate import MODEL_INPUTS, Batch, PairCollator
from train.config import LossConfig, TrainConfig
from train.dataset import OrderedPairs, Pair, PairDataset
from train.logps import route_forward
from train.losses import PairLosses, ResponseLogps
from train.metrics import MetricWindow, pair_metrics
from train.progress import LogLastStep
from train.sampler import BlockShuffle, StepBatches
from weights_store.errors import SettingsError

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class PairTrainer(Trainer):
    """Train `model` on `pairs`. From here on `model(...)` returns per-token log-probs, see `logps.route_forward`.

    Args:
        model: The policy, dropout already off.
        pairs: The dataset.
        config: The whole job.
        callbacks: Progress, stopping.

    Raises:
        SettingsError: `optim.pairs_per_step` cannot be shared equally by the processes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pairs: PairDataset,
        config: TrainConfig,
        *,
        checkpoints: Path,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.config = config
        self.num_pairs = len(pairs)
        self.collator = PairCollator(with_rejected=config.loss.name != "sft")
        self.window = MetricWindow()
        processes = PartialState()
        self.batches = build_batches(
            config, len(pairs), rank=processes.process_index, world_size=processes.num_processes
        )
        route_forward(model)
        ordered = OrderedPairs(pairs, BlockShuffle(pairs.group_sizes, seed=config.optim.seed))
        arguments = build_arguments(config, self.batches, checkpoints)
        super().__init__(model, arguments, self.collator, ordered, callbacks=[LogLastStep(), *callbacks])
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the units of the whole step

    def get_train_dataloader(self) -> DataLoader:
        """Return batches of this rank; accelerate must not shard them again, so it never sees the loader."""
        batch_sampler: Any = self.batches  # ranges do where torch's types ask for lists
        return DataLoader(
            self.train_dataset,
            batch_sampler=batch_sampler,
            collate_fn=list,  # pairs stay pairs until the whole step is there, see get_batch_samples
            num_workers=self.args.dataloader_num_workers,
            # Arrow, Polars and Delta run threads of their own, which do not survive a fork.
            multiprocessing_context="spawn" if self.args.dataloader_num_workers else None,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Pair]], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        """Return the micro-batches of one step and how many units (pairs or tokens) they hold over all ranks.

        The pairs of a step are cut into micro-batches of similar length: the step's mean stays the same, and far less of
        a batch is padding.
        """
        pairs = [pair for batch in islice(epoch_iterator, num_batches) for pair in batch]
        if not pairs:
            return [], None
        batches = [self.collator(part) for part in cut_by_length(pairs, self.config.optim.pairs_per_batch)]
        num_units = sum(count_units(self.config.loss, batch, self.collator) for batch in batches)
        return batches, self.accelerator.reduce(torch.tensor(num_units, device=device), reduction="sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,  # noqa: ARG002  (the Trainer's signature)
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Share of this micro-batch in the mean loss of its step, a scalar; adds to the metrics."""
        total_loss, num_units = self._add_batch(model, inputs, self.collator, self.window)
        # DDP averages gradients over ranks, while the units of a step are counted over all of them.
        num_units_of_step = num_units if num_items_in_batch is None else num_items_in_batch
        return total_loss * self.accelerator.num_processes / num_units_of_step

    def _add_batch(
        self, model: nn.Module, batch: Batch, collator: PairCollator, window: MetricWindow
    ) -> tuple[Tensor, int]:
        """Run one batch, put its metrics into `window`, return the sum of its losses and its number of units."""
        per_token_logps = model(**{name: batch[name] for name in MODEL_INPUTS})
        chosen, rejected = collator.split_sides(batch, per_token_logps)
        result, values = compute_pair_losses(self.config.loss, chosen, rejected)
        num_units = count_units(self.config.loss, batch, collator)
        total_loss = result.losses.sum()
        window.add(values, total_loss=total_loss, num_units=num_units)
        return total_loss, num_units

    @torch.no_grad()
    def measure(self, sample: Sequence[Pair]) -> dict[str, float]:
        """Return the mean metrics over `sample` as the model is now; for SFT, `loss` is nats per chosen token."""
        self.model.eval()
        collator, window, size = PairCollator(), MetricWindow(), self.config.optim.pairs_per_batch
        for begin in range(0, len(sample), size):
            batch = self._prepare_inputs(collator(sample[begin : begin + size]))
            with self.accelerator.autocast():
                self._add_batch(self.model, batch, collator, window)
        return window.pop_means()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means of the window since the last log, next to what the Trainer logs.

        Raises:
            SettingsError: The loss is no longer finite.
        """
        if "train_runtime" in logs:
            return  # the Trainer's summary; its rates take every micro-batch for a full one
        logs |= self.window.pop_means(self.accelerator.reduce)
        if not math.isfinite(logs.get("loss", 0.0)):
            raise SettingsError(
                f"the loss became {logs['loss']} by step {self.state.global_step}; lower optim.learning_rate "
                f"(now {self.config.optim.learning_rate}) or raise optim.warmup_share"
            )
        done = min(self.state.global_step * self.config.optim.pairs_per_step, self.batches.num_positions)
        self.state.epoch = done / self.num_pairs  # the Trainer sees the whole run as one epoch
        super().log(logs, start_time)


def compute_pair_losses(
    loss: LossConfig, chosen: ResponseLogps, rejected: ResponseLogps | None
) -> tuple[PairLosses, dict[str, Tensor]]:
    """Return the losses `[B]` that `loss` names, and the metrics `[B]` that go with them."""
    if loss.name == "sft":
        beta = loss.beta or 1.0
        return losses.sft(chosen, rejected, beta=beta), pair_metrics(chosen, rejected, beta=beta)
    assert rejected is not None
    assert loss.beta is not None, "LossConfig checks that"
    if loss.name == "dpo":
        return losses.dpo(chosen, rejected, beta=loss.beta), pair_metrics(chosen, rejected, beta=loss.beta)
    result = losses.tis_dpo(chosen, rejected, beta=loss.beta)
    return result, pair_metrics(chosen, rejected, beta=loss.beta, weighted=result)


def count_units(loss: LossConfig, batch: Batch, collator: PairCollator) -> int:
    """Return what the loss is a mean over: pairs, or for SFT chosen response tokens."""
    num_pairs = collator.num_pairs(batch)
    return int(batch["completion_mask"][:num_pairs].sum()) if loss.name == "sft" else num_pairs


def cut_by_length(pairs: Sequence[Pair], pairs_per_batch: int) -> list[list[Pair]]:
    """Return the pairs in batches of `pairs_per_batch`, the longest first; the last batch may be smaller."""
    longest_first = sorted(pairs, key=lambda pair: pair.num_tokens, reverse=True)
    return [longest_first[begin : begin + pairs_per_batch] for begin in range(0, len(pairs), pairs_per_batch)]


def build_batches(config: TrainConfig, num_pairs: int, *, rank: int = 0, world_size: int = 1) -> StepBatches:
    """Return what one rank trains on over the whole run.

    Raises:
        SettingsError: `optim.pairs_per_step` cannot be shared equally by the processes.
    """
    optim = config.optim
    if optim.pairs_per_step % world_size:
        raise SettingsError(
            f"optim.pairs_per_step={optim.pairs_per_step} cannot be shared equally by {world_size} processes; "
            f"make it a multiple of {world_size}"
        )
    num_positions = optim.max_steps * optim.pairs_per_step if optim.max_steps else optim.num_epochs * num_pairs
    return StepBatches(
        num_positions,
        pairs_per_step=optim.pairs_per_step,
        pairs_per_batch=optim.pairs_per_batch,
        rank=rank,
        world_size=world_size,
    )


def build_arguments(config: TrainConfig, batches: StepBatches, checkpoints: Path) -> TrainingArguments:
    """Return the Trainer's own settings; what is ours (data, loss, order) is not among them."""
    optim, output = config.optim, config.output
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=batches.num_steps,
        per_device_train_batch_size=optim.pairs_per_batch,
        gradient_accumulation_steps=batches.batches_per_step,
        learning_rate=optim.learning_rate,
        lr_scheduler_type=_SCHEDULES[optim.schedule],
        warmup_steps=optim.warmup_share,  # below 1 it is a share
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        seed=optim.seed,
        use_cpu=not torch.accelerator.is_available(),  # else the Trainer refuses bf16 there
        bf16=config.model.dtype == "bfloat16",
        logging_steps=output.log_every_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # would put an earlier loss in the place of a NaN
        save_strategy="steps" if output.save_every_steps else "no",
        save_steps=output.save_every_steps or 1,
        save_total_limit=1,
        report_to=output.report_to,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,  # progress.py
    )
