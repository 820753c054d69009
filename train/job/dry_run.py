"""What a training would do, for `tokenweights train --dry-run`: lines of text, without loading the model."""

from train.job.gate import tolerance_of
from train.job.prepare import JobInputs, JobPairs
from weights_store.fingerprint import fingerprint


def dry_run_lines(inputs: JobInputs, pairs: JobPairs) -> list[str]:
    """Return what would be trained on: version, fingerprint, pairs, tokens, steps, and where the model would go."""
    config, source, job = inputs.config, inputs.source, inputs.identity
    num_pairs, optim = len(pairs.trained), config.optim
    num_positions = optim.max_steps * optim.pairs_per_step if optim.max_steps else optim.num_epochs * num_pairs
    rows = {
        "weights": f"{source.name}, fingerprint {source.reference.fingerprint[:12]}, in {config.data.store}",
        "pairs": f"{num_pairs:,} to train on, {len(pairs.held_out):,} held out to measure{_size(inputs)}",
        "loss": " ".join(f"{key}={value}" for key, value in job["loss"].items()),
        "model": f"{config.model.path}, fingerprint {job['model']['fingerprint'][:12]}, {config.model.dtype}",
        "steps": f"{-(-num_positions // optim.pairs_per_step):,} of {optim.pairs_per_step} pairs "
        f"({num_positions / num_pairs:.3g} epochs), {optim.tokens_per_batch:,} tokens at a time",
        "reference": _reference(inputs),
        "gate": _gate(inputs, num_pairs),
        "output": f"{config.output.folder} (job {fingerprint(job)[:12]})",
    }
    width = max(map(len, rows))
    return [*(f"{name.ljust(width)}  {value}" for name, value in rows.items()), "nothing was done (--dry-run)"]


def _size(inputs: JobInputs) -> str:
    statistics = inputs.source.statistics
    if "num_pairs" not in statistics or "num_response_tokens" not in statistics:
        return ""
    return (
        f"; the version holds {statistics['num_pairs']:,} pairs, {statistics['num_response_tokens']:,} response tokens"
    )


def _reference(inputs: JobInputs) -> str:
    needs = inputs.config.loss.needs
    if needs.reference_model:
        return "the policy with its adapters off" if inputs.config.lora else "a second model beside the policy"
    return "stored log-probs" if needs.ref_logps else "none"


def _gate(inputs: JobInputs, num_pairs: int) -> str:
    gate = inputs.config.gate
    if not gate.pairs or not inputs.config.loss.needs.ref_logps:
        return "off"
    return f"{min(gate.pairs, num_pairs)} pairs, at most {tolerance_of(gate, inputs.source.metadata):.2g} nats a token"
