"""What a training would do, for `tokenweights train --dry-run`: lines of text, without loading the model."""

from collections.abc import Sequence
from typing import Any

from train.config import TrainConfig
from train.data.dataset import Pair, PairDataset, WeightSource
from train.job.gate import tolerance_of
from train.loss.config import loss_needs
from weights_store.fingerprint import fingerprint


def outlook_lines(
    config: TrainConfig, source: WeightSource, pairs: PairDataset, held_out: Sequence[Pair], identity: dict[str, Any]
) -> list[str]:
    """Return what would be trained on: version, fingerprint, pairs, tokens, steps, and where it would go."""
    optim, needs = config.optim, loss_needs(config.loss)
    num_positions = optim.max_steps * optim.pairs_per_step if optim.max_steps else optim.num_epochs * len(pairs)
    num_tokens = source.metadata.get("statistics", {}).get("num_response_tokens")
    total = source.metadata.get("statistics", {}).get("num_pairs")
    tokens = (
        ""
        if num_tokens is None or total is None
        else f"; the version holds {total:,} pairs, {num_tokens:,} response tokens"
    )
    gate = (
        "off"
        if not config.gate.pairs or not needs.ref_logps
        else (
            f"{min(config.gate.pairs, len(pairs))} pairs, at most {tolerance_of(config.gate, source.metadata):.2g} nats a token"
        )
    )
    rows = {
        "weights": f"{source.name}, fingerprint {source.reference.fingerprint[:12]}, in {config.data.store}",
        "pairs": f"{len(pairs):,} to train on, {len(held_out):,} held out to measure{tokens}",
        "loss": " ".join(f"{key}={value}" for key, value in config.loss.model_dump(exclude_none=True).items()),
        "model": f"{config.model.path}, fingerprint {identity['model']['fingerprint'][:12]}, {config.model.dtype}",
        "steps": f"{-(-num_positions // optim.pairs_per_step):,} of {optim.pairs_per_step} pairs "
        f"({num_positions / len(pairs):.3g} epochs), {optim.tokens_per_batch:,} tokens at a time",
        "reference": "a second model beside the policy"
        if needs.reference_model and config.lora is None
        else "the policy with its adapters off"
        if needs.reference_model
        else "stored log-probs"
        if needs.ref_logps
        else "none",
        "gate": gate,
        "output": f"{config.output.folder} (job {fingerprint(identity)[:12]})",
    }
    width = max(map(len, rows))
    return [*(f"{name.ljust(width)}  {value}" for name, value in rows.items()), "nothing was done (--dry-run)"]
