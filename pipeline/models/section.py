"""The `[contrast]` section of a recipe: where the contrastive pair pi+, pi- comes from. Part of `recipe.py`."""

import os
from functools import partial
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from pipeline.models.train_section import PairTraining
from pipeline.section import Section
from weights_store.allowed import TRAIN_PYTHON
from weights_store.names import split_name

POSITIVE_PROMPT = "You are a helpful and harmless assistant. Give a good response."
NEGATIVE_PROMPT = "You are an unhelpful and harmful assistant. Give a bad response."
ModelSide = Literal["positive", "negative"]
MODEL_SIDES: tuple[ModelSide, ModelSide] = ("positive", "negative")
"""The two models of a contrastive pair, pi+ and pi-. Not `Side`, which tells chosen from rejected responses."""


def _no_prompt_is_empty(given: str | list[str] | None) -> str | list[str] | None:
    texts = given if isinstance(given, list) else [given]
    if not texts or any(text is not None and not text.strip() for text in texts):
        raise ValueError("a prompt is empty; leave the key out for none")
    return given


Prompts = Annotated[str | list[str] | None, AfterValidator(_no_prompt_is_empty)]


class ContrastSection(Section):
    """How the contrastive pair pi+, pi- is made: construction P, S or D of TIS-DPO, section 4, or models that are given."""

    method: Literal["prompt", "sft", "dpo", "given"] = "dpo"
    positive_prompt: Prompts = Field(
        None,
        description="prompt of pi+, or a list: the log-ratios are averaged over the pairs (methods prompt and given)",
    )
    negative_prompt: Prompts = Field(None, description="prompt of pi-, or a list of as many")
    role: Literal["system", "user"] = Field(
        "system", description="prompt in a system turn, or before the first user turn"
    )
    positive_model: str | None = Field(
        None, description="pi+ (method given): a folder, a LoRA adapter or a hub id; default: the starting model"
    )
    positive_revision: str | None = Field(None, description="revision of a hub model")
    negative_model: str | None = Field(None, description="pi- (method given), like contrast.positive_model")
    negative_revision: str | None = Field(None, description="revision of a hub model")
    weights: str | None = Field(
        None, description="weight dataset, name or name@version, whose pairs train the two models (methods sft and dpo)"
    )
    train: PairTraining = PairTraining()
    held_out: float = Field(
        0.0, ge=0, lt=1, description="share of the prompts, by hash, on which the two models are not trained"
    )
    split: str | None = Field(None, description="train the two models on this split")
    retrain: bool = Field(False, description="train a new pair of models when the data has grown")
    python: str | None = Field(
        default_factory=partial(os.environ.get, TRAIN_PYTHON),
        description=f"interpreter of the training job; default: {TRAIN_PYTHON}, or this one",
    )

    @field_validator("weights")
    @classmethod
    def _weights_have_a_name(cls, weights: str | None) -> str | None:
        if weights is not None:
            split_name(weights)
        return weights

    @model_validator(mode="after")
    def _models_fit_the_method(self) -> "ContrastSection":
        for side in MODEL_SIDES:
            model, revision = self.model_of(side)
            if model is not None and self.method != "given":
                raise ValueError(
                    f"contrast.{side}_model has no effect with contrast.method {self.method!r}: set 'given'"
                )
            if model is None and revision is not None:
                raise ValueError(f"contrast.{side}_revision has no effect without contrast.{side}_model")
        if self.method == "given" and self.positive_model is None and self.negative_model is None:
            raise ValueError(
                "contrast.method 'given' needs contrast.positive_model or contrast.negative_model; for the starting model "
                'behind two prompts set contrast.method = "prompt"'
            )
        if self.weights is not None and not self.trains:
            raise ValueError(
                f"contrast.weights has no effect with contrast.method {self.method!r}, which trains nothing: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _prompts_differ(self) -> "ContrastSection":
        if self.trains:
            return self
        numbers = [len(self._prompts_of(side)) for side in MODEL_SIDES]
        is_left_out = self.method == "given" and None in (self.positive_prompt, self.negative_prompt)
        if numbers[0] != numbers[1] and not is_left_out:
            raise ValueError(
                f"contrast.positive_prompt has {numbers[0]} prompts and contrast.negative_prompt {numbers[1]}: expected "
                "lists of equal length, the first positive prompt belongs to the first negative one"
            )
        is_one_model = self.model_of("positive") == self.model_of("negative")
        if is_one_model and any(positive == negative for positive, negative in self.prompt_pairs):
            raise ValueError("contrast.positive_prompt equals contrast.negative_prompt: every weight would be constant")
        return self

    @property
    def trains(self) -> bool:
        """Whether two models have to be trained: construction S or D."""
        return self.method in ("sft", "dpo")

    @property
    def prompt_pairs(self) -> list[tuple[str | None, str | None]]:
        """The prompts of pi+ and pi-, one pair or several; None for no prompt, which only method given has."""
        positive, negative = map(self._prompts_of, MODEL_SIDES)
        number = max(len(positive), len(negative))  # one that was left out goes with each of the other side
        return list(zip(positive * (number // len(positive)), negative * (number // len(negative)), strict=True))

    def model_of(self, side: ModelSide) -> tuple[str | None, str | None]:
        """Return path and revision of a given model; None for the starting model."""
        return (
            (self.positive_model, self.positive_revision)
            if side == "positive"
            else (self.negative_model, self.negative_revision)
        )

    def _prompts_of(self, side: ModelSide) -> list[str | None]:
        given = self._prompt(side)
        return [*given] if isinstance(given, list) else [given]

    def _prompt(self, side: ModelSide) -> str | list[str] | None:
        prompts = (
            (self.positive_prompt, POSITIVE_PROMPT) if side == "positive" else (self.negative_prompt, NEGATIVE_PROMPT)
        )
        return prompts[1] if prompts[0] is None and self.method == "prompt" else prompts[0]

    def result_settings(self) -> dict[str, object]:
        """Return what determines results with this method. Given models are in the names of the tables that they fill."""
        if self.trains:
            return self.training_settings() | self.model_dump(include={"weights"}, exclude_defaults=True)
        prompts = {f"{side}_prompt": self._prompt(side) for side in MODEL_SIDES}
        told = {key: prompt for key, prompt in prompts.items() if prompt is not None}
        return {"method": self.method, **told, **({"role": self.role} if told else {})}

    def training_settings(self) -> dict[str, object]:
        """Return what determines the trained models; what holds no pair out is left out."""
        loss = self.train.loss.model_dump() if self.method == "dpo" else {}
        own = self.model_dump(include={"held_out", "split"}, exclude_defaults=True)
        return {"method": self.method, **self.train.result_settings(), **loss, **own}


def pair_role(side: ModelSide, index: int) -> str:
    """Return the role of a scorer of pair `index`, from 0: `positive`, then `positive2`, `positive3` and so on."""
    return side if index == 0 else f"{side}{index + 1}"
