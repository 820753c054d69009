"""The parts of a training job that need transformers: build the trainer, pass the gate, train, save. Called by `job.py`.

Not here: what is checked before (`prepare.py`).
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging

from train.config import TrainConfig
from train.data.dataset import Pair
from train.job.arguments import build_batches
from train.job.card import model_card
from train.job.gate import check_reference, check_step_0
from train.job.notices import held_out_was_seen
from train.job.output import Lineage, OutputFolder, Result
from train.job.prepare import JobInputs, JobPairs
from train.job.progress import ProgressLines, StopAfterStep, check_tracker, metrics_line
from train.job.ranks import gather_parameters, join_ranks, of_first
from train.job.stopping import StopRequest
from train.job.trainer import PairTrainer
from train.model.packing import confirm_layout
from train.model.policy import Findings, Policy, compile_layers, load_policy, load_reference, save_policy
from weights_store.messages import logger

__all__ = ["build_batches", "build_trainer", "check_tracker", "pass_gate", "save", "train"]
_log = logger(__name__)


def build_trainer(inputs: JobInputs, pairs: JobPairs, checkpoints: Path, stop: StopRequest) -> PairTrainer:
    """Load the policy, and the reference if the loss needs it, and return their trainer."""
    config, folder, rows_are = inputs.config, inputs.model_folder, inputs.source.rows_are
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    set_seed(config.optim.seed)  # new adapters begin at random
    policy = _load_on_first(inputs) if _is_sharded(config) else _place(_load(inputs), config)
    if policy.not_packed is not None:
        _log.info(f"two padded sequences per pair: {policy.not_packed}")
    # With adapters, the policy without them is the reference.
    needs_reference = config.loss.needs.reference_model and config.lora is None
    reference = load_reference(folder, config.model, policy) if needs_reference else None
    trainer = PairTrainer(
        policy,
        pairs.trained,
        config,
        checkpoints=checkpoints,
        held_out=pairs.held_out,
        reference=reference,
        callbacks=[ProgressLines(config.optim.pairs_per_step, rows_are), StopAfterStep(stop)],
    )
    trainer.remove_callback(PrinterCallback)
    _log.info(
        f"training {config.loss.name} on {inputs.source.name} ({len(pairs.trained):,} {rows_are}): "
        f"{trainer.batches.num_steps:,} steps of {config.optim.pairs_per_step} {rows_are}"
    )
    for line in pairs.notices:
        _log.info(line)
    return trainer


def _is_sharded(config: TrainConfig) -> bool:
    return config.parallel.strategy == "fsdp2" and join_ranks().num_processes > 1


def _load(inputs: JobInputs, findings: Findings | None = None) -> Policy:
    config = inputs.config
    return load_policy(
        inputs.model_folder,
        config.model,
        config.lora,
        attributions=config.loss.needs.fresh_weights,
        one_dtype=_is_sharded(config),
        findings=findings,
    )


def _load_on_first(inputs: JobInputs) -> Policy:
    """Load the policy on the first process. The others make it without weights, and get their part when it is split.

    Raises:
        TokenweightsError: The first process could not load it.
    """
    whole: list[Policy] = []

    def load() -> Findings:
        whole.append(_place(_load(inputs), inputs.config))
        return whole[0].findings()

    findings = of_first(load)
    if join_ranks().is_main_process:
        return whole[0]
    policy = _load(inputs, findings)
    policy.model.train()
    if inputs.config.model.compile:
        compile_layers(policy.model)
    return policy


def _place(policy: Policy, config: TrainConfig) -> Policy:
    """Move the policy to the device that it trains on, and see that its layout holds there.

    With FSDP2 it stays on the CPU until it is sharded, and its layout is tried there.

    Raises:
        InputError: Its code fails there.
    """
    processes = join_ranks()
    device = next(policy.model.parameters()).device
    if not _is_sharded(config) and device.type != processes.device.type:
        device = processes.device
        policy.model.to(device)
    policy.model.train()
    with torch.autocast(device.type, torch.bfloat16, enabled=config.model.dtype == "bfloat16"):
        not_packed = confirm_layout(
            policy.model, policy.attention, policy.not_packed, attributions=config.loss.needs.fresh_weights
        )
    if config.model.compile:
        compile_layers(policy.model)
    return replace(policy, not_packed=not_packed)


def pass_gate(trainer: PairTrainer, inputs: JobInputs, sample: Sequence[Pair]) -> None:
    """Compare the model, and the reference model if there is one, with the stored reference.

    Only for losses whose log-ratios start at 0.
    """
    config, metadata, few = inputs.config, inputs.source.metadata, sample[: inputs.config.gate.pairs]
    if not few or not config.loss.needs.ref_logps:
        return
    model_fingerprint = inputs.identity["model"]["fingerprint"]
    check_step_0(
        lambda dtype: trainer.response_logps(few, dtype),
        config,
        metadata,
        model_fingerprint,
        is_split=trainer.is_fsdp_enabled,
    )
    if trainer.reference is not None:
        check_reference(trainer.reference_logps(few), config, metadata)


def train(
    trainer: PairTrainer, inputs: JobInputs, pairs: JobPairs, checkpoint: Path | None, stop: StopRequest
) -> Result:
    """Measure, train, measure."""
    sample = pairs.sample
    before = trainer.measure(sample)
    _log.info(f"before: {metrics_line(before)}")
    if checkpoint is not None:
        _log.info(f"resuming from {checkpoint.name}")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.requested and trainer.state.global_step < trainer.batches.num_steps:
        raise KeyboardInterrupt
    after = trainer.measure(sample)
    _log.info(f"after:  {metrics_line(after)}")
    result = Result(
        steps=trainer.state.global_step,
        before=before,
        after=after,
        num_sample_pairs=len(sample),
        notices=list(pairs.notices),
    )
    if trainer.held_out:
        result["held_out"] = trainer.measure(trainer.held_out)
        seen = result["held_out_was_seen"] = held_out_was_seen(inputs.config, inputs.source)
        _log.info(f"{'held out, but seen' if seen else 'held out'}: {metrics_line(result['held_out'])}")
    if trainer.config.eval.best:
        result["best_step"] = trainer.state.best_global_step
        _log.info(f"best by held-out {trainer.config.eval.best}: step {trainer.state.best_global_step}")
    return result


def save(trainer: PairTrainer, inputs: JobInputs, output: OutputFolder, lineage: Lineage) -> None:
    """Write the model, its card, its metrics and its lineage; all ranks take part if the model is sharded."""
    config, accelerator = inputs.config, trainer.accelerator
    model = accelerator.unwrap_model(trainer.model)
    whole = gather_parameters(trainer.model_wrapped) if trainer.is_fsdp_enabled else {}
    if accelerator.is_main_process:
        if whole:
            model = load_policy(inputs.model_folder, config.model, config.lora, one_dtype=True).model
            model.load_state_dict(whole)
        staging = output.start_staging()
        is_hub_id = not Path(config.model.path).expanduser().is_dir()
        save_policy(model, config.lora, inputs.model_folder, staging, config.model.path if is_hub_id else None)
        (staging / "README.md").write_text(model_card(lineage, inputs.source), encoding="utf-8")
        metrics = {**lineage["result"], "history": trainer.state.log_history}
        output.publish(staging, lineage, metrics, keep_checkpoints=config.output.keep_checkpoints)
    accelerator.wait_for_everyone()
