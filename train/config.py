"""The training config: what one training job does, as frozen pydantic models.

Sections are read from TOML by `weights_store.settings`; the resolved config is written next to the model. Light: no
torch here, so that `--help` and a wrong key cost no import.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from train.loss.config import LossSection
from weights_store.allowed import check_place
from weights_store.settings import default_store

FIRST_TOKENS = 8192
"""Tokens that a training computes at a time before it has measured anything, and on CPUs."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(_Section):
    """Which pairs are trained on."""

    store: str = Field(default_factory=default_store)
    """Root folder or URI of the store; `TOKENWEIGHTS_STORE` in the environment is another default, for all commands."""
    weights: str
    """Weight dataset, `name` (its newest version) or `name@version`."""
    swap: bool = False
    """Exchange chosen and rejected with their weights and reference log-probs: reverse DPO, SFT on rejected."""
    use_pair_weights: bool = True
    """Multiply each pair's loss by the pair weight that the dataset has for it; false: every pair counts once."""
    split: str = ""
    """Only pairs of this split; empty: all."""
    max_pairs: int | None = Field(default=None, ge=1)
    """Only the first pairs in stored order, this many; left out: all."""
    num_workers: int = Field(default=0, ge=0)
    """Processes that read. The next step is read while one is computed anyway, so 0 is right for local disks."""
    cache_folder: str | None = None
    """Where shards of an object store are copied to; left out: `shards` in `TOKENWEIGHTS_CACHE` or `~/.cache/tokenweights`."""
    cache_gib: float = Field(default=50.0, gt=0)
    """Largest size of that folder in GiB; the least recently used shards are deleted first."""


class ModelOptions(_Section):
    """How the model is computed. Also `[contrast.train.model]` of a recipe."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass. What is trained is float32 either way, and so is the optimizer's state."""
    packing: bool = True
    """One row per micro-batch with every prompt once. If false, and for models that cannot: two padded sequences per pair."""
    quantization: Literal["none", "nf4"] = "none"
    """`nf4`: the frozen weights in 4 bits (QLoRA); needs [lora] and bitsandbytes."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of layers and recompute the rest: less memory, more time."""
    compile: bool = False
    """torch.compile of the decoder's layers without their attention. It takes some time at the start; what it gains on a GPU
    was not measured."""

    def result_settings(self) -> dict[str, str]:
        """Return what determines the trained model."""
        return self.model_dump(include={"dtype", "quantization"})


class ModelConfig(ModelOptions):
    """Which model is trained."""

    path: str
    """Folder, or id on the hub."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""


class LoraOptions(_Section):
    """Which low-rank adapters are trained. Also `[contrast.train.lora]` of a recipe."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the layers with an adapter."""


class LoraSection(LoraOptions):
    """Train low-rank adapters instead of all parameters (LoRA, arXiv 2106.09685), through peft."""

    merge: bool = True
    """Merge the adapter into the saved model, which then loads like any other; the adapter lies beside it in `adapter/`."""


class OptimConfig(_Section):
    """How it is minimised: AdamW."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    num_epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    """Exactly this many optimizer steps, instead of num_epochs."""
    pairs_per_step: int = Field(default=16, ge=1)
    """Pairs per optimizer step, over all devices and accumulated micro-batches."""
    tokens_per_batch: int | None = Field(default=None, ge=1)
    """Tokens that one device computes at a time (a longer pair goes alone); affects memory and speed only. Left out: 8,192, on
    a GPU then as many as its memory holds. What does not fit is halved."""
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of all steps in which the learning rate rises, 0..1; of n such steps the first has 1/n of the peak."""
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this L2 norm."""
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    """Learning rate after the warm-up."""
    seed: int = Field(default=0, ge=0)
    """Of the order of pairs, and of new adapters."""

    def result_settings(self) -> dict[str, object]:
        """Return what determines the trained model."""
        return self.model_dump(exclude={"tokens_per_batch"})


class EvalSection(_Section):
    """What is held out and measured during training."""

    split: str = ""
    """Pairs of this split of the dataset, when data.split names another."""
    share: float = Field(default=0.0, ge=0, lt=1)
    """Or this share of the prompts, 0..1, with all their pairs, chosen by hash; they are then not trained on."""
    every_steps: int | None = Field(default=None, ge=1)
    """Steps between two measurements; left out: one, after the last step."""
    max_pairs: int = Field(default=512, ge=1)
    """At most this many pairs are measured."""
    best: Literal["", "loss", "rewards/accuracies", "rewards/margins"] = ""
    """Save the checkpoint that is best by this held-out metric instead of the last; empty: the last."""

    @property
    def is_on(self) -> bool:
        """Whether anything is held out."""
        return bool(self.split) or self.share > 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.split and self.share:
            raise ValueError("eval.split and eval.share are two ways to hold pairs out; give one of them")
        if (self.best or self.every_steps) and not self.is_on:
            raise ValueError(
                "eval.best and eval.every_steps need something held out; set eval.share=0.05 or eval.split"
            )
        if self.best and not self.every_steps:
            raise ValueError("eval.best needs eval.every_steps, to have something to choose from")
        return self


class GateSection(_Section):
    """The check before the first step that the model gives the stored log-probs of the reference."""

    pairs: int = Field(default=32, ge=0)
    """Pairs to compare; 0 skips the check."""
    tolerance_nats: float | None = Field(default=None, gt=0)
    """Largest mean |difference| per token; left out: what the parity check of the stored scorer allows."""


class ParallelSection(_Section):
    """How several processes (torchrun, accelerate launch) share the work."""

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """`ddp`: the whole model on each; `fsdp2`: parameters, gradients and optimizer split between them."""


def check_places(config: "TrainConfig") -> None:
    """Check that a config names only places that the operator allows (`weights_store/allowed.py`).

    For whoever takes a config from people. A process that a build starts gets places that were checked, in caches too.

    Raises:
        InputError: One is outside; names the key.
        SettingsError: The operator's list is wrong.
    """
    check_place("data.store", config.data.store)
    check_place("model.path", config.model.path, hub="hf://")
    check_place("output.folder", config.output.folder)
    if config.data.cache_folder is not None:
        check_place("data.cache_folder", config.data.cache_folder)


def check_quantization(model: ModelOptions, parallel: ParallelSection, prefix: str = "") -> None:
    """Refuse 4-bit weights that are to be split. `prefix` is that of the keys in the message.

    accelerate leaves 4-bit weights whole on every process, because the bytes that bitsandbytes packs them into cannot be split.

    Raises:
        ValueError: Both are asked for.
    """
    if model.quantization != "none" and parallel.strategy == "fsdp2":
        raise ValueError(
            f"{prefix}model.quantization={model.quantization!r} and {prefix}parallel.strategy='fsdp2' do not work together: "
            f"4-bit weights cannot be split between processes. Set {prefix}parallel.strategy='ddp' (each process then holds "
            f"the 4-bit model), or {prefix}model.quantization='none'"
        )


class OutputConfig(_Section):
    """Where the model goes, and what is logged."""

    folder: str
    save_every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; left out: no checkpoints."""
    log_every_steps: int = Field(default=10, ge=1)
    resume: bool = True
    """Continue from the newest complete checkpoint in the folder; false starts again."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of a finished run."""
    report_to: str = "none"
    """A tracker that transformers knows, for example `tensorboard`."""

    @field_validator("folder")
    @classmethod
    def _in_home(cls, folder: str) -> str:
        """Expand `~` once, so that what is checked, written, recorded and looked for is the same place."""
        if not folder.startswith("~"):
            return folder
        from weights_store.location import local_path

        return str(local_path(folder))


class TrainConfig(_Section):
    """One training job."""

    data: DataConfig
    model: ModelConfig
    lora: LoraSection | None = None
    loss: LossSection
    optim: OptimConfig
    eval: EvalSection = EvalSection()
    gate: GateSection = GateSection()
    parallel: ParallelSection = ParallelSection()
    output: OutputConfig

    @model_validator(mode="after")
    def _check_sections(self) -> Self:
        if self.eval.split and self.eval.split == self.data.split:
            raise ValueError(f"eval.split={self.eval.split!r} is data.split too; hold out another split")
        if self.eval.split and not self.data.split:
            raise ValueError(
                "data.split is empty, so that eval.split would be trained on; set data.split, for example 'train'"
            )
        if self.model.quantization != "none" and self.lora is None:
            raise ValueError(
                "model.quantization freezes the model's weights; add a [lora] section to train adapters on it"
            )
        if self.model.quantization != "none" and self.lora is not None and self.lora.merge:
            raise ValueError("an adapter cannot be merged into 4-bit weights; set lora.merge=false")
        check_quantization(self.model, self.parallel)
        needs = self.loss.needs
        if self.parallel.strategy == "fsdp2" and (needs.fresh_weights or needs.fresh_anchors):
            raise ValueError(
                "loss.anchor='online' and loss.importance='online' need the whole model on each process, and "
                "parallel.strategy='fsdp2' splits it; set parallel.strategy='ddp', or train on stored ones"
            )
        if self.eval.best and not self.output.save_every_steps:
            raise ValueError("eval.best chooses among checkpoints; set output.save_every_steps")
        if self.eval.best and (self.output.save_every_steps or 1) % (self.eval.every_steps or 1):
            raise ValueError(
                f"output.save_every_steps={self.output.save_every_steps} must be a multiple of "
                f"eval.every_steps={self.eval.every_steps}, so that every checkpoint has been measured"
            )
        return self
