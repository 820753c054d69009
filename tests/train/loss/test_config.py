"""The `[loss]` section: settings, defaults, what enters the identity of a trained model, and the documentation."""

import inspect
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from train.loss import losses
from train.loss.config import LOSSES, LossSection
from train.loss.loss_config import LossConfig
from weights_store.errors import SettingsError
from weights_store.settings import parse_settings

DOCS = Path(__file__).parents[3] / "docs"


class OnlyLoss(BaseModel):
    loss: LossSection


def load(**settings: Any) -> LossConfig:
    return parse_settings(OnlyLoss, {"loss": settings}, where="here").loss


def config(name: str, **settings: Any) -> LossConfig:
    return load(name=name, **({} if name in ("sepo", "sft", "distill") else {"beta": 0.1}), **settings)


def test_the_table_of_settings_is_that_of_the_loss_functions() -> None:
    """What a loss reads is what its function takes, so no setting can be accepted and ignored."""
    for name in LOSSES:
        parameters = inspect.signature(getattr(losses, name)).parameters.values()
        takes = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"chosen_scores", "rejected_scores", "z0"}
        switched_on = {"tis_dpo": {"kl": "exact"}, "ti_dpo": {"variant": "release"}, "sft": {"beta": 0.1}}
        assert set(config(name, **switched_on.get(name, {})).arguments()) == takes


@pytest.mark.parametrize(
    ("settings", "dumped"),
    [
        ({"name": "dpo", "beta": 0.1}, {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0}),
        ({"name": "dpo", "beta": 0.1, "label_smoothing": 0.2}, {"name": "dpo", "beta": 0.1, "label_smoothing": 0.2}),
        ({"name": "ipo", "beta": 0.1}, {"name": "ipo", "beta": 0.1}),
        ({"name": "tdpo1", "beta": 0.1}, {"name": "tdpo1", "beta": 0.1, "kl": "exact"}),
        ({"name": "tdpo1", "beta": 0.1, "kl": "top_k"}, {"name": "tdpo1", "beta": 0.1, "kl": "top_k"}),
        ({"name": "tdpo2", "beta": 0.1}, {"name": "tdpo2", "beta": 0.1, "kl": "exact", "alpha": 0.5}),
        ({"name": "tdpo2", "beta": 0.1, "alpha": 1}, {"name": "tdpo2", "beta": 0.1, "kl": "exact", "alpha": 1.0}),
        ({"name": "tis_dpo", "beta": 0.1}, {"name": "tis_dpo", "beta": 0.1, "kl": "off"}),
        (
            {"name": "tis_dpo", "beta": 0.1, "kl": "exact"},
            {"name": "tis_dpo", "beta": 0.1, "kl": "exact", "eta_scale": 1.0},
        ),
        (
            {"name": "tis_dpo", "beta": 0.1, "kl": "top_k", "eta_scale": 0.5},
            {"name": "tis_dpo", "beta": 0.1, "kl": "top_k", "eta_scale": 0.5},
        ),
        (
            {"name": "ti_dpo", "beta": 0.1},
            {
                "name": "ti_dpo",
                "beta": 0.1,
                "variant": "paper",
                "triplet_gamma": 0.1,
                "triplet_margin": 0.5,
                "anchor": "stored",
                "importance": "stored",
            },
        ),
        (
            {"name": "ti_dpo", "beta": 0.1, "triplet_gamma": 0},
            {"name": "ti_dpo", "beta": 0.1, "variant": "paper", "triplet_gamma": 0.0, "importance": "stored"},
        ),
        (
            {"name": "ti_dpo", "beta": 0.1, "anchor": "online"},
            {
                "name": "ti_dpo",
                "beta": 0.1,
                "variant": "paper",
                "triplet_gamma": 0.1,
                "triplet_margin": 0.5,
                "anchor": "online",
                "importance": "stored",
                "refresh_steps": 1,
            },
        ),
        (
            {"name": "ti_dpo", "beta": 0.1, "importance": "online", "refresh_steps": 4},
            {
                "name": "ti_dpo",
                "beta": 0.1,
                "variant": "paper",
                "triplet_gamma": 0.1,
                "triplet_margin": 0.5,
                "anchor": "stored",
                "importance": "online",
                "refresh_steps": 4,
            },
        ),
        (
            {"name": "ti_dpo", "beta": 0.1, "triplet_gamma": 0, "importance": "online"},
            {
                "name": "ti_dpo",
                "beta": 0.1,
                "variant": "paper",
                "triplet_gamma": 0.0,
                "importance": "online",
                "refresh_steps": 1,
            },
        ),
        (
            {"name": "ti_dpo", "beta": 0.1, "variant": "release"},
            {
                "name": "ti_dpo",
                "beta": 0.1,
                "kl": "exact",
                "alpha": 0.5,
                "variant": "release",
                "triplet_gamma": 0.001,
                "triplet_margin": 0.001,
                "anchor": "stored",
                "importance": "stored",
            },
        ),
        (
            {"name": "ti_dpo", "beta": 0.1, "variant": "release", "kl": "top_k", "triplet_gamma": 0},
            {
                "name": "ti_dpo",
                "beta": 0.1,
                "kl": "top_k",
                "alpha": 0.5,
                "variant": "release",
                "triplet_gamma": 0.0,
                "importance": "stored",
            },
        ),
        (
            {"name": "ti_dpo", "beta": 0.1, "variant": "release", "anchor": "online", "triplet_margin": 2},
            {
                "name": "ti_dpo",
                "beta": 0.1,
                "kl": "exact",
                "alpha": 0.5,
                "variant": "release",
                "triplet_gamma": 0.001,
                "triplet_margin": 2.0,
                "anchor": "online",
                "importance": "stored",
                "refresh_steps": 1,
            },
        ),
        (
            {"name": "dpo", "beta": 0.1, "nll_lambda": 1},
            {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0, "nll_lambda": 1.0},
        ),
        ({"name": "treg", "beta": 0.1}, {"name": "treg", "beta": 0.1, "reg_alpha": 0.25}),
        ({"name": "bpo", "beta": 0.1}, {"name": "bpo", "beta": 0.1, "bregman_lambda": -0.5, "min_ratio": 0.01}),
        (
            {"name": "tbpo_a", "beta": 0.1, "kl": "top_k"},
            {"name": "tbpo_a", "beta": 0.1, "kl": "top_k", "bregman_lambda": 0.2},
        ),
        ({"name": "simpo", "beta": 2}, {"name": "simpo", "beta": 2.0, "label_smoothing": 0.0, "gamma_beta_ratio": 0.5}),
        (
            {"name": "confpo", "beta": 2},
            {"name": "confpo", "beta": 2.0, "label_smoothing": 0.0, "gamma_beta_ratio": 0.5},
        ),
        ({"name": "sepo"}, {"name": "sepo"}),
        ({"name": "d2po", "beta": 0.1}, {"name": "d2po", "beta": 0.1, "gamma": 0.98}),
        (
            {"name": "uni_dpo", "beta": 2.0},
            {
                "name": "uni_dpo",
                "beta": 2.0,
                "quality_eta": 0.7,
                "tau_ref": 0.8,
                "focal_gamma": 3.0,
                "nll_lambda": 0.001,
                "tau_good": 3.2,
            },
        ),
        ({"name": "sft"}, {"name": "sft"}),
        ({"name": "sft", "beta": 0.1}, {"name": "sft", "beta": 0.1}),
    ],
)
def test_what_enters_the_identity_of_a_model_stays_the_same(settings, dumped) -> None:
    """The right side is what the first release dumped: another dump would train finished models again."""
    loss = load(**settings)
    now = loss.model_dump(exclude_none=True)
    assert json.dumps(now, sort_keys=True) == json.dumps(dumped, sort_keys=True)  # 1 and 1.0 differ here
    assert load(**loss.model_dump()) == loss


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "dpo", "beta": 0.1, "gamma": 0.9}, r"loss.name='dpo' does not read loss.gamma, got 0.9;.*to d2po\)"),
        ({"name": "sepo", "beta": 0.1}, "loss.name='sepo' does not read loss.beta, got 0.1"),
        (
            {"name": "tis_dpo", "beta": 0.1, "label_smoothing": 0.1},
            r"does not read loss.label_smoothing.*dpo, simpo, confpo\)",
        ),
        ({"name": "ipo", "beta": 0.1, "kl": "off"}, "does not read loss.kl, got 'off'"),
        ({"name": "tis_dpo", "beta": 0.1, "eta_scale": 0.5}, "loss.eta_scale=0.5 without eta; set loss.kl"),
        ({"name": "tis_dpo", "beta": 0.1, "eta_scale": 0.5, "kl": "off"}, "loss.eta_scale=0.5 without eta"),
        ({"name": "tdpo2", "beta": 0.1, "kl": "off"}, "loss.kl: Input should be 'exact' or 'top_k', got 'off'"),
        ({"name": "tis_dpo", "beta": 0.1, "triplet_gamma": 0.1}, r"does not read loss.triplet_gamma.*to ti_dpo\)"),
        (
            {"name": "ti_dpo", "beta": 0.1, "alpha": 0.5},
            "loss.alpha=0.5 without a KL term; set loss.variant to 'release', or leave alpha out",
        ),
        ({"name": "ti_dpo", "beta": 0.1, "variant": "paper", "kl": "top_k"}, "loss.kl='top_k' without a KL term"),
        (
            {"name": "ti_dpo", "beta": 0.1, "variant": "release", "kl": "off"},
            "loss.kl: Input should be 'exact' or 'top_k', got 'off'",
        ),
        (
            {"name": "ti_dpo", "beta": 0.1, "triplet_gamma": 0, "triplet_margin": 0.5},
            "loss.triplet_margin=0.5 without the triplet; set loss.triplet_gamma above 0",
        ),
        (
            {"name": "ti_dpo", "beta": 0.1, "triplet_gamma": 0, "anchor": "online", "refresh_steps": 2},
            "loss.anchor='online' without the triplet",
        ),
        (
            {"name": "ti_dpo", "beta": 0.1, "refresh_steps": 8},
            "loss.refresh_steps=8 without anything to refresh; set loss.anchor or loss.importance to 'online'",
        ),
        ({"name": "ti_dpo", "beta": 0.1, "variant": "fork"}, "variant: Input should be 'paper' or 'release'"),
        (
            {"name": "ti_dpo", "beta": 0.1, "triplet_gamma": -0.1},
            "triplet_gamma: Input should be greater than or equal",
        ),
        ({"name": "dpo", "beta": 0.1, "label_smoothing": 0.5}, "label_smoothing: Input should be less than 0.5"),
        ({"name": "d2po", "beta": 0.1, "gamma": 1.1}, "gamma: Input should be less than or equal to 1"),
        ({"name": "kto", "beta": 0.1, "desirable_weight": 0}, "desirable_weight: Input should be greater than 0"),
        ({"name": "sft", "nll_lambda": 0.1}, "loss.name='sft' does not read loss.nll_lambda, got 0.1"),
        ({"name": "dpo", "beta": 0.1, "nll_lambda": -1}, "nll_lambda: Input should be greater than or equal to 0"),
        ({"name": "bpo", "beta": 0.1, "bregman_lambda": -1}, "bregman_lambda: Input should be greater than -1"),
        ({"name": "bpo", "beta": 0.1, "min_ratio": 1}, "min_ratio: Input should be less than 1"),
        ({"name": "tbpo_a", "beta": 0.1, "min_ratio": 0.1}, r"does not read loss.min_ratio.*to bpo\)"),
        ({"name": "orpo"}, "name: Input should be 'dpo', 'ipo', .* or 'distill', got 'orpo'"),
        ({"beta": 0.1}, "missing key 'loss.name'"),
    ],
)
def test_settings_that_would_be_ignored_and_wrong_values_are_refused(settings, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load(**settings)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("sepo", "sft", "distill")])
def test_beta_has_no_silent_default(name: str) -> None:
    with pytest.raises(SettingsError, match="missing key 'loss.beta', for example (0.1|2.0); it has no default$"):
        load(name=name)


BAR = r" \| "  # between words in a cell
READS = {
    "ref_logps": "stored reference log-probs",
    "token_weights": "token weights",
    "anchors": "anchors",
    "scores": "both annotator scores",
    "reference_model": "the reference model, or its stored top k",
    "ref_top": "the stored top k of the reference",
}


def loss_row(name: str) -> str:
    """The row of a loss in the table of losses: what it compares, and what it reads."""
    needs = config(name).needs
    reads = ", ".join(text for need, text in READS.items() if getattr(needs, need)) or "–"
    return f"| `{name}` | {inspect.getdoc(LOSSES[name]).removesuffix('.')} | {reads} |"


def test_the_table_of_losses_has_a_row_for_each_loss() -> None:
    table = (
        (DOCS / "training.md").read_text(encoding="utf-8").partition("| `loss.name` | what is compared | needs |\n")[2]
    )
    rows = table.partition("\n\n")[0].splitlines()[1:]
    assert rows == [loss_row(name) for name in LOSSES]


def type_words(annotation: object) -> list[str]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    parts = [part for part in get_args(annotation) if part is not type(None)]
    return [word for part in parts for word in type_words(part)] if parts else [annotation.__name__]


def settings_row(key: str) -> str:
    """The row of a setting: all types, the default, and for each description the losses that it holds for."""
    fields = {name: loss.model_fields[key] for name, loss in LOSSES.items() if key in loss.model_fields}
    types = dict.fromkeys(word for field in fields.values() for word in type_words(field.annotation))
    readers: dict[str, list[str]] = {}
    for name, field in fields.items():
        has_default = field.default not in (None, PydanticUndefined)
        default = f" (default {field.default})" if has_default and len(fields) > 1 else ""
        readers.setdefault(f"{field.description.removesuffix('.')}{default}.", []).append(f"`{name}`")
    texts = [f"{', '.join(names)}: {text}" for text, names in readers.items()]
    (only, *others) = fields.values()
    default = "–" if others or only.default in (None, PydanticUndefined) else f"`{json.dumps(only.default)}`"
    return f"| `loss.{key}` | {BAR.join(types)} | {default} | {' '.join(' '.join(texts).split())} |"


def test_the_table_of_settings_has_a_row_for_each_key_of_a_loss() -> None:
    keys = dict.fromkeys(key for loss in LOSSES.values() for key in loss.model_fields if key != "name")
    page = (DOCS / "settings.md").read_text(encoding="utf-8")
    names = BAR.join(LOSSES)
    rows = [line for line in page.splitlines() if line.startswith("| `loss.")]
    first = f"| `loss.name` | {names} | **required** | which loss, see [training.md](training.md) |"
    assert rows == [first, *(settings_row(key) for key in keys)]
