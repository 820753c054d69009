"""What the settings of every loss have in common: what it needs, what it is a mean over, and what its function takes.

The losses are in `config.py`. No torch here.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from train.loss.needs import KlDirection, Needs, Unit


class LossConfig(BaseModel):
    """What every loss says about itself. A setting that a loss does not read is refused.

    The docstring of a loss says what it compares; the table of losses in `docs/training.md` has the same words.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    title: ClassVar[str]
    """Name and paper, for the model card."""
    reads: ClassVar[Needs]
    """What is needed whatever the settings; see `needs`."""
    kl_direction: ClassVar[KlDirection | None] = None
    """Of the KL term, for losses with a setting `kl`."""
    estimator: ClassVar[str] = "tis"
    """The `weights.estimator` of a recipe that makes the token weights of this loss."""
    unit: ClassVar[Unit] = "pair"
    """What a step is a mean over."""
    compares: ClassVar[bool] = True
    """Whether it compares two responses to one prompt, so that it cannot be trained on unpaired rows."""
    needs_differing_weights: ClassVar[bool] = True
    """Whether token weights that are all equal would make it another loss, if it reads them."""
    has_plain_rewards: ClassVar[bool] = False
    """Whether its rewards are unweighted sums of log-ratios, so that logging them apart would repeat `rewards/*`."""
    switches: ClassVar[frozenset[str]] = frozenset()
    """Settings that choose what is computed; the loss function does not take them."""

    name: str

    @model_validator(mode="before")
    @classmethod
    def _drop_none(cls, settings: object) -> object:
        # None means "not given", so that a config that was dumped with its defaults loads again.
        return {k: v for k, v in settings.items() if v is not None} if isinstance(settings, dict) else settings

    @property
    def needs(self) -> Needs:
        """What the loss needs with these settings."""
        kl: str | None = getattr(self, "kl", None)
        if kl not in ("exact", "top_k"):
            return self.reads
        return replace(self.reads, kl_direction=self.kl_direction, ref_top=kl == "top_k", reference_model=kl == "exact")

    def arguments(self) -> dict[str, float]:
        """Return the keyword arguments of the function of that name in `losses.py`."""
        return self.model_dump(exclude={"name", *self.switches}, exclude_none=True)

    def _refuse(self, keys: Sequence[str], why: str) -> None:
        """Refuse settings that were given though another one switches them off."""
        for key in keys:
            if key in self.model_fields_set:
                raise ValueError(f"loss.{key}={getattr(self, key)!r} {why}, or leave {key} out")
