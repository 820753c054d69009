"""The `[attribute]` and `[anchors]` sections of a recipe. Part of `recipe.py`."""

import os
from functools import partial
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.section import Section
from train.model.sampling import AnchorSampling
from weights_store.allowed import TRAIN_PYTHON

Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], Field(description="auto: that of the model's files")
]


class AttributeSection(Section):
    """Gradient attribution by the reference policy (TI-DPO, arXiv 2505.19653): L1 norms of input-embedding gradients."""

    target: Literal["max_logit", "gold_logps", "dpo_margin"] = Field(
        "max_logit",
        description="what is differentiated: the largest logit after the last response token (the paper's), the sum of the "
        "response's log-probs, or the pair's DPO margin",
    )
    dtype: Dtype = "auto"
    prompts: bool = Field(
        False, description="also store the attributions of prompts, which weights.span 'sequence' needs"
    )
    activations: bool = Field(False, description="also store the size of the hidden states, for estimator 'activation'")
    contexts: int = Field(
        0,
        ge=0,
        le=64,
        description="also store so many numbers per token that describe what was read before it, for weights.features "
        "'contexts'",
    )
    chunk_tokens: int = Field(262_144, ge=1, description="tokens between two commits; a kill can lose two chunks")
    batch_tokens: int = Field(4096, ge=256, description="tokens in one forward and backward pass")
    python: str | None = Field(
        default_factory=partial(os.environ.get, TRAIN_PYTHON),
        description=f"interpreter of the process; default: {TRAIN_PYTHON}, or this one",
    )

    def result_settings(self) -> dict[str, object]:
        """Return what determines results."""
        settings = self.model_dump(include={"target", "dtype", "prompts", "activations", "contexts"})
        if not self.contexts:  # the key came later, and what was attributed without it is the same
            del settings["contexts"]
        return settings


class AnchorsSection(Section):
    """Anchors: another response to each prompt, which some losses need; the defaults are those of TI-DPO's release."""

    source: Literal["sampled", "mismatched"] = Field(
        "sampled",
        description="`sampled` from the reference, for loss `ti_dpo`; `mismatched`: a response to another prompt, for losses "
        "`kto` and `tis_kto`: then the other keys have no effect",
    )
    max_new_tokens: int = Field(AnchorSampling.max_new_tokens, ge=1, description="end-of-turn token included")
    temperature: float = Field(AnchorSampling.temperature, ge=0.01, le=2, description="as vLLM takes it")
    top_k: int = Field(AnchorSampling.top_k, ge=0, description="sample among this many most likely tokens; 0: all")
    top_p: float = Field(
        AnchorSampling.top_p, gt=0, le=1, description="and among the tokens with this total probability"
    )
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _only_sampling_has_settings(self) -> "AnchorsSection":
        """Compare values, not what was given: Prefect hands a recipe back with every key in it."""
        for key, field in type(self).model_fields.items():
            if self.source == "mismatched" and key != "source" and getattr(self, key) != field.default:
                raise ValueError(f"anchors.{key} has no effect with anchors.source 'mismatched': leave it out")
        return self

    @property
    def sampling(self) -> AnchorSampling:
        """How anchors are sampled."""
        return AnchorSampling(**self.model_dump(exclude={"seed", "source"}))

    def result_settings(self) -> dict[str, object]:
        """Return what determines results."""
        if self.source == "mismatched":
            return {"source": self.source}
        return self.model_dump(exclude={"source"})
