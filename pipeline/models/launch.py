"""How many processes and machines a training job has, and how Python starts them: a part of recipes and of training flows."""

import os
from typing import ClassVar

from pydantic import Field, model_validator

from pipeline.section import Section
from weights_store.allowed import check_place

_A_WEEK_S = 604_800


class Launch(Section):
    """The processes of one training job. The launcher is torchrun if there is more than one."""

    prefix: ClassVar[str] = ""
    """Of the keys, in error messages."""

    num_processes: int = Field(1, ge=1, description="processes that train one model on this machine: one per GPU")
    num_machines: int = Field(1, ge=1, description="machines that train one model, each with num_processes")
    main_address: str | None = Field(
        None,
        pattern=r"^[^\s:/]+:\d+$",
        description="host:port of this machine, where the other machines find it; default: MASTER_ADDR and MASTER_PORT of the "
        "environment",
    )

    @model_validator(mode="after")
    def _machines_can_meet(self) -> "Launch":
        if self.num_machines > 1 and self.address is None:
            raise ValueError(
                f"{self.prefix}num_machines={self.num_machines} needs the host:port of the first machine, and got none; set "
                f"{self.prefix}main_address, or MASTER_ADDR and MASTER_PORT in the environment as for torchrun"
            )
        if self.num_machines == 1 and self.main_address is not None:
            raise ValueError(
                f"{self.prefix}main_address={self.main_address!r} is for several machines, and {self.prefix}num_machines is 1; "
                "remove the address, or set the number"
            )
        if self.main_address is not None:  # processes believe what they get from there
            check_place(f"{self.prefix}main_address", f"tcp://{self.main_address}")
        return self

    @property
    def address(self) -> str | None:
        """host:port of the first machine, from the settings or else the environment; None if neither has it."""
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        return self.main_address or (f"{host}:{port}" if host and port else None)

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
