"""The `[contrast.train]` section of a recipe: how the two models of constructions S and D are trained. Part of `section.py`.

Its sections are those of a training config (`train/config.py`), so a key means the same in both.
"""

from pydantic import Field, model_validator

from pipeline.models.launch import Launch
from pipeline.section import Section
from train.config import LoraOptions, ModelOptions, OptimConfig, ParallelSection, check_quantization

_ALWAYS = ("learning_rate", "num_epochs", "max_steps", "pairs_per_step", "seed")
"""Keys of [contrast.train.optim] that the identity of a trained model has always had."""


class PairLoss(Section):
    """The loss of the two trainings."""

    beta: float = Field(0.1, gt=0, description="of the two DPO runs (method dpo)")


class PairOptim(OptimConfig):
    """How it is minimised: AdamW."""

    learning_rate: float = Field(default=5e-6, gt=0)
    """Peak learning rate."""
    pairs_per_step: int = Field(default=32, ge=1)
    """Pairs per optimizer step, over all devices and accumulated micro-batches."""


class PairTraining(Launch):
    """How the two models of methods sft and dpo are trained."""

    prefix = "contrast.train."

    model: ModelOptions = ModelOptions()
    lora: LoraOptions | None = None
    loss: PairLoss = PairLoss()
    optim: PairOptim = PairOptim()
    parallel: ParallelSection = ParallelSection()

    @model_validator(mode="after")
    def _parts_fit(self) -> "PairTraining":
        if self.model.quantization != "none" and self.lora is None:
            raise ValueError(
                "contrast.train.model.quantization freezes the model's weights; add a [contrast.train.lora] section to train "
                "adapters on it"
            )
        check_quantization(self.model, self.parallel, prefix="contrast.train.")
        world_size = self.num_processes * self.num_machines
        if self.optim.pairs_per_step % world_size:
            raise ValueError(
                f"contrast.train.optim.pairs_per_step={self.optim.pairs_per_step} cannot be shared equally by {world_size} "
                f"processes; make it a multiple of {world_size}"
            )
        return self

    def result_settings(self) -> dict[str, object]:
        """Return what determines the trained models, without the loss.

        Keys that came later are left out as long as they have their defaults: models of earlier stores keep their names.
        """
        settings: dict[str, object] = {"dtype": self.model.dtype}
        if self.model.quantization != "none":
            settings["quantization"] = self.model.quantization
        if self.lora is not None:
            settings["lora"] = self.lora.model_dump()
        of_optim, defaults = self.optim.result_settings(), PairOptim().result_settings()
        return settings | {k: v for k, v in of_optim.items() if k in _ALWAYS or v != defaults[k]}
