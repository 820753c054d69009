"""The training loop: transformers' Trainer with our order of pairs, our log-probs, our losses and our metrics.

A batch of the Trainer is a whole step; it is cut into micro-batches here, by a token budget. The mean over a step is exact:
every pair (for SFT and distillation, every response token) counts the same, however the step is cut and spread over ranks. Not
here: reading the pairs of a step (`step_reader.py`), how a loss is computed (`objective.py`), where the model goes
(`output.py`).
"""
# ruff: noqa: ARG002  (the Trainer chooses what its hooks take)

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from train.config import TrainConfig
from train.data.dataset import OrderedPairs, Pair, PairDataset
from train.data.sampler import BlockShuffle
from train.job.arguments import build_arguments, build_batches
from train.job.progress import LogLastStep
from train.job.ranks import join_ranks, reshard, shard, shard_on_cpus
from train.job.refresh import FRESH_FILES, Refresher
from train.job.step_reader import Step, StepReader, cut_evenly
from train.loss.kto import reference_point
from train.loss.metrics import MetricWindow
from train.loss.objective import compute_pair_losses, count_units
from train.loss.terms import ResponseLogps
from train.model.attention.layout import to_device
from train.model.checkpoint import in_float32
from train.model.collate import Batch, PairCollator, model_inputs
from train.model.foreign import is_out_of_memory, unwrap_adapters
from train.model.logps import Divergence, TokenTerms, per_token_logps, route_forward
from train.model.policy import Policy
from train.model.token_budget import TokenBudget, cut_by_tokens, empty_cache, save_memory
from weights_store.errors import SettingsError
from weights_store.messages import first_line


class PairTrainer(Trainer):
    """Train a policy on `pairs`. From here on `model(...)` returns per-token log-probs, see `logps.route_forward`.

    Args:
        policy: Its noise is off already, see `switch_off_noise`.
        held_out: Pairs that are measured during training, and never trained on.
        reference: The frozen reference model, for an exact KL or fresh anchors without adapters.

    Raises:
        SettingsError: `optim.pairs_per_step` cannot be shared equally by the processes.
        MismatchError: The loss refreshes token weights, and the dataset does not record how they were made.
    """

    def __init__(
        self,
        policy: Policy,
        pairs: PairDataset,
        config: TrainConfig,
        *,
        checkpoints: Path,
        held_out: Sequence[Pair] = (),
        reference: nn.Module | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.config = config
        self.num_pairs = len(pairs)
        self.held_out = held_out
        needs = config.loss.needs
        self.loss = config.loss
        with_anchors = needs.anchors and not needs.mismatched
        self.collator = PairCollator(
            packed=policy.not_packed is None, with_rejected=needs.rejected, with_anchors=with_anchors
        )
        # Measurements include the rejected side for every loss, and anchors only if they stay the same.
        stored_anchors = with_anchors and not needs.fresh_anchors
        self.measured = replace(self.collator, with_rejected=True, with_anchors=stored_anchors)
        self.alone = replace(self.collator, with_rejected=False, with_anchors=False)
        self.window = MetricWindow()
        self.waited_s = 0.0
        processes = join_ranks()
        self.batches = build_batches(
            config, len(pairs), rank=processes.process_index, world_size=processes.num_processes
        )
        refresher = Refresher.of(policy, config, pairs, reference)
        self.reader = StepReader(self.batches, refresher, seed=config.optim.seed)
        ordered = OrderedPairs(
            pairs, BlockShuffle(pairs.group_sizes, seed=config.optim.seed), self.batches.num_positions
        )
        arguments = build_arguments(config, self.batches, checkpoints)
        # `evaluate` is ours; the Trainer only wants to see that there is something to evaluate on.
        super().__init__(
            policy.model, arguments, None, ordered, held_out or None, callbacks=[LogLastStep(), *callbacks]
        )
        self.reference: nn.Module | None = None if reference is None else reference.to(self.args.device)
        direction = needs.kl_direction
        route_forward(policy.model, Divergence(direction, needs.ref_top, reference) if direction else None)
        self.budget = TokenBudget(
            config.optim.tokens_per_batch, self.args.device, measures=self.accelerator.num_processes == 1
        )
        self.loss_is_scaled_for_ga = True  # training_step divides by the units of the whole step
        if self.is_fsdp_enabled:
            self._shard(policy.model)

    def create_accelerator_and_postprocess(self) -> None:
        """Set up accelerate as the Trainer does, and make FSDP2 work on CPUs."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is not None:
            shard_on_cpus(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> torch.autocast:
        """Return autocast to the dtype of the forward pass.

        accelerate adds it to a model when training begins, not to one that is measured before, and never to one that is split.
        """
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)

    def _shard(self, model: nn.Module) -> None:
        """Split the model now. The Trainer would do so when training begins, but the model is measured before that."""
        self.model_wrapped, self.optimizer = shard(self.accelerator, model, self.create_optimizer())
        self.model = self.model_wrapped
        # When training begins, nothing is left to prepare. accelerate would find the optimizer's parameters again by their
        # addresses, which are the same for all parameters of which this process has no part.
        self.accelerator.prepare = lambda *prepared: prepared  # type: ignore[method-assign]

    def get_train_dataloader(self) -> DataLoader:
        """Return the steps of this rank. accelerate never sees the loader, so it does not shard the steps again."""
        num_workers = self.args.dataloader_num_workers
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,  # type: ignore[arg-type]  # of ranges, which do as well as lists
            collate_fn=list,  # pairs stay pairs until they are cut into micro-batches
            num_workers=num_workers,
            # The threads of Arrow, Polars and Delta do not survive a fork.
            multiprocessing_context="spawn" if num_workers else None,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Pair]], num_batches: int, device: torch.device
    ) -> tuple[list[Step], None]:
        """Return the next step of this rank, as the one batch that the Trainer sees."""
        begin, refreshed_s = time.perf_counter(), self.reader.refreshed_s
        pairs = self.reader.next_pairs(epoch_iterator, self.state.global_step)
        if pairs is None:
            return [], None
        step = self.cut_step(pairs, device)
        self.waited_s += time.perf_counter() - begin - (self.reader.refreshed_s - refreshed_s)
        return [step], None

    def train(self, resume_from_checkpoint: str | None = None, *args: object, **options: object) -> object:
        """Train, see `Trainer.train`."""
        self.reader.resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(resume_from_checkpoint, *args, **options)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """Return a linear warm-up, then `optim.schedule`. transformers' first step would have a learning rate of 0."""
        settings = self.config.optim
        num_warmup = math.ceil(settings.warmup_share * num_training_steps)

        def share(step: int) -> float:
            if step < num_warmup:
                return (step + 1) / num_warmup
            done = (step - num_warmup) / max(1, num_training_steps - num_warmup)
            falling = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
            return max(0.0, falling.get(settings.schedule, 1.0))

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, share)
        self._created_lr_scheduler = True  # as the Trainer does: a checkpoint then keeps it
        return self.lr_scheduler

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Save what the Trainer saves. Before it, since its state must come last: what is left of a refreshed window."""
        if self.reader.refresher is not None:
            step = self.state.global_step
            folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            if self.args.should_save:  # a killed run, perhaps with more processes, may have left some
                for path in folder.glob(FRESH_FILES):
                    path.unlink()
            self.accelerator.wait_for_everyone()
            self.reader.save(folder, step)
            self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def training_step(self, model: nn.Module, inputs: Step, num_items_in_batch: object = None) -> Tensor:
        """Run forward and backward of a whole step, and add to the metrics; return this rank's share of the mean loss."""
        step, window = inputs, MetricWindow()
        self.budget.begin_step()
        while (total := self._run_step(model, step, window)) is None:  # out of memory
            model.zero_grad(set_to_none=True)
            window = MetricWindow()
            step = self.cut_step(step.pairs, self.args.device)
        self.budget.end_step(step.largest)
        self.window.merge(window)
        return total

    def _run_step(self, model: nn.Module, step: Step, window: MetricWindow) -> Tensor | None:
        """Return the share of the loss; None if it did not fit into memory, after making what comes smaller."""
        model.train()  # here, for layers that have just been told to be computed again
        try:
            return self._forward_and_backward(model, step, window)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._make_room(model, error)
        empty_cache()
        return None

    def _make_room(self, model: nn.Module, error: BaseException) -> None:
        """Make micro-batches smaller than the one that did not fit; if it was a single pair, compute its layers again."""
        num_tokens, num_pairs = self._current["input_ids"].numel(), len(self._current["pair_weights"])
        if self.accelerator.num_processes > 1:  # the others wait for this one's gradients
            raise SettingsError(
                f"a micro-batch of {num_tokens:,} tokens does not fit into the memory of process "
                f"{self.accelerator.process_index}: lower optim.tokens_per_batch (now {self.budget.tokens:,}), or set "
                f"model.gradient_checkpointing=true ({first_line(error)})"
            ) from error
        if num_pairs > 1:
            self.budget.shrink(num_tokens)
        else:
            save_memory(model, num_tokens, error)

    def _forward_and_backward(self, model: nn.Module, step: Step, window: MetricWindow) -> Tensor:
        total, z0 = torch.zeros((), device=self.args.device), self._z0(model, step)
        for batch in step.batches:
            self._current = batch
            with nullcontext() if batch is step.batches[-1] else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    total_loss = self._add_batch(model, self._prepare_inputs(batch), window, z0)
                    # DDP averages gradients over ranks, while the units of a step are counted over all of them.
                    loss = total_loss * self.accelerator.num_processes / step.num_units
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """Send a micro-batch to the device, without waiting for what it is doing."""
        return {
            name: to_device(value, self.args.device) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }

    def floating_point_ops(self, inputs: Step) -> int:
        """Return 0: the Trainer's estimate needs padded batches."""
        return 0

    @torch.no_grad()
    def _z0(self, model: nn.Module, step: Step) -> Tensor | None:
        """Return KTO's reference point: the mean log-ratio of the mismatched responses of all ranks, at least 0."""
        if not step.mismatched:
            return None
        sums = reference_point(self._mismatched(model, batch) for batch in step.mismatched)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, reduction="sum")
        return (sums[0] / sums[1]).clamp(min=0)

    def _mismatched(self, model: nn.Module, batch: Batch) -> ResponseLogps:
        """Return what is known of the mismatched responses of one micro-batch, without fillers."""
        self._current = batch
        inputs = self._prepare_inputs(batch)
        with self.compute_loss_context_manager():
            terms: TokenTerms = model(**model_inputs(inputs))
        return self.alone.split_sides(inputs, terms)[0].first(batch["num_counted"])

    def _add_batch(self, model: nn.Module, batch: Batch, window: MetricWindow, z0: Tensor | None) -> Tensor:
        """Run one micro-batch, add its metrics to `window`, return the sum of its losses."""
        terms: TokenTerms = model(**model_inputs(batch))
        chosen, rejected, anchor = self.collator.split_sides(batch, terms)
        scores = (batch["chosen_scores"], batch["rejected_scores"]) if "chosen_scores" in batch else None
        result, values = compute_pair_losses(self.loss, chosen, rejected, scores, anchor, z0)
        counted = slice(batch["num_counted"])
        total_loss = (result.losses * batch["pair_weights"])[counted].sum()
        values = {name: value[counted] for name, value in values.items()}
        window.add(values, total_loss=total_loss, num_units=self._count_units(batch))
        return total_loss

    def _count_units(self, batch: Batch) -> int:
        counts = {name: batch[name] for name in ("num_chosen_tokens", "num_responses")}
        return count_units(self.config.loss, num_pairs=batch["num_counted"], **counts)

    def cut_step(self, pairs: Sequence[Pair], device: torch.device) -> Step:
        """Cut the pairs of this rank into micro-batches."""
        distributed = self.accelerator.num_processes > 1
        cut = partial(cut_evenly, max_tokens=self.budget.tokens, device=device if distributed else None)
        batches, largest = cut(pairs, self.collator)
        mismatched: list[Batch] = []
        if self.loss.needs.mismatched:
            mismatched, size = cut([pair.mismatched() for pair in pairs], self.alone)
            largest = max(largest, size)
        num_units: Tensor | int = sum(map(self._count_units, batches))
        if distributed:
            num_units = self.accelerator.reduce(torch.tensor(num_units, device=device), reduction="sum")
        return Step(pairs, batches, largest, num_units, mismatched)

    @torch.no_grad()
    def measure(self, sample: Sequence[Pair]) -> dict[str, float]:
        """Return the mean metrics of the current model over `sample`, the same on all ranks. `loss` is as in training.

        Measurements must compare across steps, and refreshed data would not: token weights are the stored ones, and there is no
        triplet if anchors are refreshed.
        """
        model, ordinary = self.model_wrapped, (self.loss, self.collator)
        model.eval()
        if self.collator.with_anchors and not self.measured.with_anchors:
            self.loss = self.loss.model_copy(update={"triplet_gamma": 0.0})
        self.collator = self.measured
        num_processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = -(-len(sample) // num_processes)
        share = list(sample[rank * size : (rank + 1) * size])
        share += [replace(sample[-1], is_filler=True)] * (size - len(share))

        def add_all() -> MetricWindow:
            window, step = MetricWindow(), self.cut_step(share, self.args.device)
            z0 = self._z0(model, step)
            for batch in step.batches:
                with self.compute_loss_context_manager():
                    self._add_batch(model, self._prepare_inputs(batch), window, z0)
            return window

        window = self.budget.within(add_all, can_shrink=num_processes == 1)
        reshard(model)
        self.loss, self.collator = ordinary
        return window.pop_means(self.accelerator.reduce if num_processes > 1 else None)

    def response_logps(self, sample: Sequence[Pair], dtype: str) -> list[tuple[Tensor, Tensor]]:
        """Return policy and stored reference log-probs of all response tokens of `sample`, in parts, `[n]` each, nats.

        Every rank runs the whole sample, so that all ranks decide the same. The model is in the mode that trains; `dtype` is
        that of the forward pass. A split model rounds its parameters to that of the config in any case.
        """
        model = self.model_wrapped.train()
        # A frozen base in half precision would round whatever autocast does.
        exact = in_float32(unwrap_adapters(self.model)) if dtype == "float32" else nullcontext()
        with exact:
            measured = self._beside_stored(model, sample, dtype)
        reshard(model)
        return measured

    def reference_logps(self, sample: Sequence[Pair]) -> list[tuple[Tensor, Tensor]]:
        """Return the same of the frozen reference model, computed as in training."""
        assert self.reference is not None, "there is no reference model"
        return self._beside_stored(partial(per_token_logps, self.reference), sample, self.config.model.dtype)

    @torch.no_grad()
    def _beside_stored(
        self, logps_of: Callable[..., TokenTerms], sample: Sequence[Pair], dtype: str
    ) -> list[tuple[Tensor, Tensor]]:
        device = next(self.model_wrapped.parameters()).device
        if self.loss.needs.mismatched:
            sample = [*sample, *(pair.mismatched() for pair in sample)]
        sizes = [self.measured.num_tokens(pair) for pair in sample]

        def compute() -> list[tuple[Tensor, Tensor]]:
            found = []
            for part in cut_by_tokens(sample, sizes, self.budget.tokens):
                batch = self.measured(part, device)
                with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                    terms = logps_of(**model_inputs(batch))
                found.append((terms.logps[batch["completion_mask"]], batch["ref_logps"][batch["completion_mask"]]))
            return found

        return self.budget.within(compute, can_shrink=self.accelerator.num_processes == 1)

    def evaluate(
        self, eval_dataset: object = None, ignore_keys: object = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the held-out pairs, log the metrics, and return them under names that begin with `eval_`."""
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.measure(self.held_out).items()}
        self.log(dict(metrics))
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means since the last log, next to what the Trainer logs.

        Raises:
            SettingsError: The loss is no longer finite.
        """
        if "train_runtime" in logs:
            return  # the Trainer's summary; its rates count every micro-batch as a full one
        if "loss" in logs:
            logs |= self.window.pop_means(self.accelerator.reduce)
            logs["data_wait_s"], self.waited_s = self.waited_s, 0.0
            if self.reader.refresher is not None:
                logs["refresh_s"], self.reader.refreshed_s = self.reader.refreshed_s, 0.0
        if not math.isfinite(logs.get("loss", 0.0)):
            raise SettingsError(
                f"the loss became {logs['loss']} by step {self.state.global_step}; lower optim.learning_rate "
                f"(now {self.config.optim.learning_rate}) or raise optim.warmup_share"
            )
        done = min(self.state.global_step * self.config.optim.pairs_per_step, self.batches.num_positions)
        self.state.epoch = done / self.num_pairs  # the Trainer sees the whole run as one epoch
        super().log(logs, start_time)
