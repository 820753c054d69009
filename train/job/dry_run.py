"""What a training would do, for `tokenweights train --dry-run`: lines of text, without loading the model."""

from train.config import FIRST_TOKENS
from train.job.arguments import build_batches
from train.job.gate import tolerance_of
from train.job.prepare import JobInputs, JobPairs
from weights_store.fingerprint import fingerprint


def dry_run_lines(inputs: JobInputs, pairs: JobPairs) -> list[str]:
    """Return what would be trained on: version, fingerprint, pairs, tokens, steps, and where the model would go."""
    config, source, job = inputs.config, inputs.source, inputs.identity
    num_pairs, optim, needs, gate = len(pairs.trained), config.optim, config.loss.needs, config.gate
    batches = build_batches(config, num_pairs)
    reference = "stored log-probs" if needs.ref_logps or needs.ref_top else "none"
    if needs.reference_model:
        reference = "the policy with its adapters off" if config.lora else "a second model beside the policy"
    statistics, size = source.statistics, ""
    if "num_pairs" in statistics and "num_response_tokens" in statistics:
        size = f"; the version holds {statistics['num_pairs']:,} {source.rows_are}, "
        size += f"{statistics['num_response_tokens']:,} response tokens"
    check = "off"
    if gate.pairs and needs.ref_logps:
        check = f"{min(gate.pairs, num_pairs)} {source.rows_are}, "
        check += f"at most {tolerance_of(gate, source.metadata):.2g} nats a token"
    rows = {
        "weights": f"{source.name}, fingerprint {source.reference.fingerprint[:12]}, in {config.data.store}",
        source.rows_are: f"{num_pairs:,} to train on, {len(pairs.held_out):,} held out to measure{size}",
        "loss": " ".join(f"{key}={value}" for key, value in job["loss"].items()),
        "model": f"{config.model.path}, fingerprint {job['model']['fingerprint'][:12]}, {config.model.dtype}",
        "steps": f"{batches.num_steps:,} of {optim.pairs_per_step} {source.rows_are} "
        f"({batches.num_positions / num_pairs:.3g} epochs), {optim.tokens_per_batch or FIRST_TOKENS:,} tokens at a time",
        "reference": reference,
        "gate": check,
        "output": f"{config.output.folder} (job {fingerprint(job)[:12]})",
    }
    width = max(map(len, rows))
    lines = [f"{name.ljust(width)}  {value}" for name, value in rows.items()]
    lines += [f"{'notice'.ljust(width)}  {line}" for line in pairs.notices]
    return [*lines, "nothing was done (--dry-run)"]
