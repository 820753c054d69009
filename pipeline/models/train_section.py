"""The `[contrast.train]` section of a recipe: how the two models of constructions S and D are trained. Part of `section.py`.

Its sections are those of a training config (`train/config.py`), so a key means the same in both.
"""

import os

from pydantic import Field, model_validator

from pipeline.section import Section
from train.config import LoraOptions, ModelOptions, OptimConfig, ParallelSection, check_quantization

_A_WEEK_S = 604_800
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


class PairTraining(Section):
    """How the two models of methods sft and dpo are trained. The launcher is torchrun if there is more than one process."""

    model: ModelOptions = ModelOptions()
    lora: LoraOptions | None = None
    loss: PairLoss = PairLoss()
    optim: PairOptim = PairOptim()
    parallel: ParallelSection = ParallelSection()
    num_processes: int = Field(1, ge=1, description="processes that train one model on this machine: one per GPU")
    num_machines: int = Field(1, ge=1, description="machines that train one model, each with num_processes")
    main_address: str | None = Field(
        None,
        pattern=r"^[^\s:/]+:\d+$",
        description="host:port of this machine, where the other machines find it; default: MASTER_ADDR and MASTER_PORT of the "
        "environment",
    )

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
        if self.num_machines > 1 and self.address is None:
            raise ValueError(
                f"contrast.train.num_machines={self.num_machines} needs the host:port of the first machine, and got none; set "
                "contrast.train.main_address, or MASTER_ADDR and MASTER_PORT in the environment as for torchrun"
            )
        if self.num_machines == 1 and self.main_address is not None:
            raise ValueError(
                f"contrast.train.main_address={self.main_address!r} is for several machines, and contrast.train.num_machines "
                "is 1; remove the address, or set the number"
            )
        return self

    @property
    def address(self) -> str | None:
        """host:port of the first machine, from the recipe or else the environment; None if neither has it."""
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        return self.main_address or (f"{host}:{port}" if host and port else None)

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

    def launcher(self, machine: int = 0) -> list[str]:
        """Return what Python gets before `-m MODULE` to start the processes of one machine: nothing for a single one.

        Args:
            machine: From 0, the one that builds.
        """
        if self.num_processes * self.num_machines == 1:
            return []
        host, _, port = (self.address or "").rpartition(":")
        together = ["--nnodes", str(self.num_machines), "--node-rank", str(machine)]
        # The others are started by hand, and by default torchrun waits a quarter of an hour for them.
        together += ["--master-addr", host, "--master-port", port, "--rdzv-conf", f"timeout={_A_WEEK_S}"]
        where = together if self.num_machines > 1 else ["--standalone"]
        return ["-m", "torch.distributed.run", *where, "--nproc-per-node", str(self.num_processes)]
