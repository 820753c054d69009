"""The registry of estimators, and the documentation that is written from it."""

import inspect
import re
from pathlib import Path
from typing import get_args

import pytest

from pipeline.weighing.registry import ESTIMATORS, MODELS, Ensemble
from pipeline.weighing.section import PAIR_WEIGHT_SETTINGS, WeightsSection
from pipeline.weighing.transforms import TRANSFORM_SETTINGS, TransformName

DOCS = Path(__file__).resolve().parents[3] / "docs"
COMMON = WeightsSection.model_fields


def _name(model):
    return model.model_fields["estimator"].default


@pytest.mark.parametrize("model", MODELS, ids=_name)
def test_a_model_has_the_settings_that_its_function_reads(model):
    assert get_args(model.model_fields["estimator"].annotation) == (_name(model),)
    assert set(model.about.settings) <= set(model.model_fields)


def test_only_ablations_allow_settings_that_they_do_not_read():
    unread = {
        _name(model): sorted(set(model.model_fields) - set(COMMON) - set(model.about.settings))
        for model in MODELS
        if model is not Ensemble
    }
    assert {name: keys for name, keys in unread.items() if keys} == {
        "tis": ["seed"],
        "reversed": ["seed"],
        "uniform": ["k", "lower", "mu", "seed", "upper"],
    }


def test_an_ensemble_has_the_settings_of_every_estimator_with_the_defaults_of_tis():
    for model in MODELS:
        assert set(model.model_fields) <= set(Ensemble.model_fields)
    assert (Ensemble.model_fields["lower"].default, Ensemble.model_fields["upper"].default) == (-0.5, 1.5)


def test_every_transform_names_keys_of_the_section():
    assert set(TRANSFORM_SETTINGS) == set(get_args(TransformName))
    assert {key for keys in TRANSFORM_SETTINGS.values() for key in keys} <= set(COMMON)


def _table(page, heading):
    """Return the rows of the first table below a heading, without its head."""
    lines = (DOCS / page).read_text(encoding="utf-8").split(f"{heading}\n")[1].splitlines()
    rows = lines[lines.index(next(line for line in lines if line.startswith("|---"))) + 1 :]
    return rows[: rows.index("")]


def _code(names):
    return ", ".join(f"`{name}`" for name in names) or "–"


def test_the_table_of_estimators_is_that_of_the_registry():
    rows = []
    for model in MODELS:
        about, doc = model.about, inspect.getdoc(model).removesuffix(".")
        formula = doc[0].lower() + doc[1:]
        reads = ", ".join(key for key in about.reads if key != "token keys") or "–"
        settings, reads = ("theirs", "what they read") if model is Ensemble else (_code(about.settings), reads)
        rows.append(f"| `{_name(model)}` | {formula} | {settings} | {reads} | {about.source} |")
    assert _table("weights.md", "## Estimators (`weights.estimator`)") == rows


def test_the_table_of_transforms_names_each_with_its_settings():
    rows = _table("weights.md", "## Transforms (`weights.transforms`, in the order given)")
    cells = [[cell.strip() for cell in row.strip("|").replace("\\|", "").split(" | ")] for row in rows]
    assert [(row[0], row[2]) for row in cells] == [
        (f"`{name}`", _code(keys)) for name, keys in TRANSFORM_SETTINGS.items()
    ]


def _type(annotation):
    if annotation in (float, int, str):
        return annotation.__name__
    return "list" if "list[" in str(annotation) else r" \| ".join(get_args(annotation))


def _default(value):
    return f"`{str(value)!r}`".replace("'", '"') if isinstance(value, str) else f"`{value}`"


def _row(key):
    fields = {_name(model): model.model_fields[key] for model in MODELS if key in model.model_fields}
    first = next(iter(fields.values()))
    defaults = {
        _default(field.default): [name for name, other in fields.items() if other.default == field.default]
        for field in fields.values()
    }
    default = _default(first.default)
    others = "".join(f"; {_code(names)}: {value}" for value, names in defaults.items() if value != default)
    settings = {name: estimator.settings for name, estimator in ESTIMATORS.items()}
    choices = [settings, {"ensemble": ["members"]}, TRANSFORM_SETTINGS, PAIR_WEIGHT_SETTINGS]
    readers = dict.fromkeys(name for choice in choices for name, keys in choice.items() if key in keys)
    read_by = f" ({_code(readers)})" if readers else ""
    shown = "**required**" if first.is_required() else default + others
    return f"| `weights.{key}` | {_type(first.annotation)} | {shown} | {first.description}{read_by} |"


def test_the_keys_in_the_settings_page_are_those_of_the_models():
    own = [key for key in Ensemble.model_fields if key not in COMMON]
    rows = [_row(key) for key in ("name", "estimator", *own, *COMMON) if key != "estimator"]
    found = [row for row in _table("settings.md", "### [weights]") if not row.startswith("| `weights.estimator`")]
    assert found == list(dict.fromkeys(rows))
    assert re.search(r"^\| `weights.estimator` \| .* \| `\"tis\"` \|", (DOCS / "settings.md").read_text(), re.MULTILINE)
