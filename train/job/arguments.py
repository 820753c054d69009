"""From a training config to what the Trainer takes: its own settings, and which positions each rank trains on."""

from pathlib import Path

import torch
from transformers import TrainingArguments

from train.config import TrainConfig
from train.data.sampler import StepBatches
from train.job.ranks import join_ranks
from weights_store.errors import SettingsError


def build_batches(config: TrainConfig, num_pairs: int, *, rank: int = 0, world_size: int = 1) -> StepBatches:
    """Return the positions that one rank trains on, step by step.

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
    return StepBatches(num_positions, pairs_per_step=optim.pairs_per_step, rank=rank, world_size=world_size)


def build_arguments(config: TrainConfig, batches: StepBatches, checkpoints: Path) -> TrainingArguments:
    """Return the Trainer's own settings; data, loss, order and learning rate are ours."""
    optim, output, evaluation = config.optim, config.output, config.eval
    sharding: dict[str, object] = {}
    if config.parallel.strategy == "fsdp2" and join_ranks().num_processes > 1:  # one process has nothing to shard
        sharding = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=batches.num_steps,
        gradient_accumulation_steps=1,  # training_step accumulates
        learning_rate=optim.learning_rate,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        seed=optim.seed,
        use_cpu=not torch.accelerator.is_available(),  # otherwise the Trainer refuses bf16 on CPUs
        bf16=config.model.dtype == "bfloat16",
        dataloader_num_workers=config.data.num_workers,
        logging_steps=output.log_every_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would replace a NaN by an earlier loss
        save_strategy="steps" if output.save_every_steps else "no",
        save_steps=output.save_every_steps or 1,
        save_total_limit=1,
        eval_strategy="steps" if evaluation.every_steps else "no",
        eval_steps=evaluation.every_steps,
        load_best_model_at_end=bool(evaluation.best),
        metric_for_best_model=f"eval_{evaluation.best}" if evaluation.best else None,
        greater_is_better=evaluation.best != "loss" if evaluation.best else None,
        report_to=output.report_to,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,  # progress.py
        **sharding,
    )
