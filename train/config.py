"""The training config: what one training job does, as frozen pydantic models.

Sections are read from TOML by `weights_store.settings`; the resolved config is written next to the model. Light: no
torch here, so that `--help` and a wrong key cost no import.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(_Section):
    """Which pairs are trained on."""

    store: str
    """Root folder or URI of the store."""
    weights: str
    """Weight dataset, `name` (its newest version) or `name@version`."""
    swap: bool = False
    """Exchange chosen and rejected with their weights and reference log-probs: reverse DPO, SFT on rejected."""
    split: str = ""
    """Only pairs of this split; empty for all."""
    max_pairs: int | None = Field(default=None, ge=1)
    """Only the first so many pairs in stored order; None for all."""


class ModelConfig(_Section):
    """Which model is trained."""

    path: str
    """Folder, or id on the hub."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass. Parameters and optimizer are float32 either way (bfloat16 is autocast)."""


class LossConfig(_Section):
    """What is minimised."""

    name: Literal["dpo", "tis_dpo", "sft"]
    beta: float | None = Field(default=None, gt=0)
    """Strength of the pull to the reference, > 0. Identifies a result, so it has no default; `sft` needs none."""

    @model_validator(mode="after")
    def _check_beta(self) -> Self:
        if self.name != "sft" and self.beta is None:
            raise ValueError(f"loss.name={self.name!r} needs loss.beta > 0, for example 0.1; it has no default")
        return self


class OptimConfig(_Section):
    """How it is minimised: AdamW."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    num_epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    """Exactly so many optimizer steps, whatever num_epochs says; None for num_epochs."""
    pairs_per_step: int = Field(default=16, ge=1)
    """Pairs behind one optimizer step, over all devices and accumulated micro-batches."""
    pairs_per_batch: int = Field(default=8, ge=1)
    """Pairs that one device holds at a time; changes memory and speed only."""
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of all steps with a rising learning rate, 0..1."""
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this L2 norm."""
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    """Learning rate after the warm-up."""
    seed: int = Field(default=0, ge=0)
    """Of the order of pairs."""

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.pairs_per_batch > self.pairs_per_step:
            raise ValueError(
                f"optim.pairs_per_batch={self.pairs_per_batch} is larger than "
                f"optim.pairs_per_step={self.pairs_per_step}; lower the first or raise the second"
            )
        return self


class OutputConfig(_Section):
    """Where the model goes, and what is seen on the way."""

    folder: str
    save_every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; None for none."""
    log_every_steps: int = Field(default=10, ge=1)
    resume: bool = True
    """Go on from the newest complete checkpoint in the folder; false starts again."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of a finished run."""
    report_to: str = "none"
    """A tracker that transformers knows, for example `tensorboard`."""


class TrainConfig(_Section):
    """One training job."""

    data: DataConfig
    model: ModelConfig
    loss: LossConfig
    optim: OptimConfig
    output: OutputConfig
