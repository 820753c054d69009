"""The models of [weights], and the documentation that must agree with them."""

import inspect
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Union, get_args, get_origin

import pytest

from pipeline.weighing.estimators import ESTIMATORS, ensemble
from pipeline.weighing.section import MODELS, PAIR_WEIGHT_SETTINGS, WeightsSection
from pipeline.weighing.transforms import TRANSFORM_SETTINGS, TransformName

DOCS = Path(__file__).resolve().parents[3] / "docs"
COMMON = WeightsSection.model_fields


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_model_has_the_settings_of_its_function_and_no_other(name):
    own = set(MODELS[name].model_fields) - set(COMMON)
    if name in ("tis", "reversed", "random", "uniform"):  # an ablation changes nothing but the estimator
        assert own == {"scale", "spread", "k", "mu", "lower", "upper", "seed"}
    else:
        assert own == set(ESTIMATORS[name].settings) - set(COMMON)


def test_settings_that_the_common_keys_have_too_have_the_same_default():
    shared = [(key, field) for each in ESTIMATORS.values() for key, field in each.settings.items() if key in COMMON]
    assert [(key, default) for key, (_, default) in shared] == [("decay_gamma", COMMON["decay_gamma"].default)]


def test_an_ensemble_has_all_settings_with_the_defaults_of_tis():
    fields = MODELS["ensemble"].model_fields
    for model in MODELS.values():
        assert set(model.model_fields) <= set(fields)
    assert (fields["lower"].default, fields["upper"].default) == (-0.5, 1.5)


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


def _formula(function):
    doc = inspect.getdoc(function).splitlines()[0].removeprefix("Return ").removesuffix(".").removesuffix(". Our own")
    return doc.replace("pi+", "π+").replace("pi-", "π−").replace(" - ", " − ")


def estimator_rows():
    rows = []
    for name, about in ESTIMATORS.items():
        reads = ", ".join(read for read in about.reads if read != "token keys") or "–"
        rows.append(f"| `{name}` | {_formula(about.estimate)} | {_code(about.settings)} | {reads} | {about.source} |")
    return [*rows, f"| `ensemble` | {_formula(ensemble)} | `members` and theirs | what they read | ours |"]


def test_the_table_of_estimators_is_that_of_the_registry():
    assert _table("weights.md", "## Estimators (`weights.estimator`)") == estimator_rows()


def test_the_table_of_transforms_names_each_with_its_settings():
    rows = _table("weights.md", "## Transforms (`weights.transforms`, in the order given)")
    cells = [[cell.strip() for cell in row.strip("|").replace("\\|", "").split(" | ")] for row in rows]
    assert [(row[0], row[2]) for row in cells] == [
        (f"`{name}`", _code(keys)) for name, keys in TRANSFORM_SETTINGS.items()
    ]


def _type(annotation):
    if isinstance(annotation, UnionType) or get_origin(annotation) is Union:  # weights.scale
        return r" \| ".join(
            _type(get_args(part)[0] if get_origin(part) is Annotated else part) for part in get_args(annotation)
        )
    if annotation in (float, int, str):
        return annotation.__name__
    return (
        "list"
        if re.match(r"(typing\.Annotated\[)?(list|tuple)\[", str(annotation))
        else r" \| ".join(get_args(annotation))
    )


def _default(value):
    value = list(value) if isinstance(value, tuple) else value
    return f"`{str(value)!r}`".replace("'", '"') if isinstance(value, str) else f"`{value}`"


def _row(key):
    fields = {name: model.model_fields[key] for name, model in MODELS.items() if key in model.model_fields}
    first, default = next(iter(fields.values())), "**required**"
    if not first.is_required():
        others = {name: _default(field.default) for name, field in fields.items() if field.default != first.default}
        default = "; ".join([_default(first.default), *(f"`{name}`: {value}" for name, value in others.items())])
    settings = {name: about.settings for name, about in ESTIMATORS.items()}
    choices = [settings, {"ensemble": ["members"]}, TRANSFORM_SETTINGS, PAIR_WEIGHT_SETTINGS]
    readers = dict.fromkeys(name for choice in choices for name, keys in choice.items() if key in keys)
    read_by = f" ({_code(readers)})" if readers else ""
    return f"| `weights.{key}` | {_type(first.annotation)} | {default} | {first.description}{read_by} |"


def key_rows():
    own = [key for key in MODELS["ensemble"].model_fields if key not in COMMON]
    return [_row(key) for key in dict.fromkeys(["name", *own, *COMMON]) if key != "estimator"]


def test_the_keys_in_the_settings_page_are_those_of_the_models():
    rows = _table("settings.md", "### [weights]")
    (of_estimator,) = [row for row in rows if row.startswith("| `weights.estimator`")]
    assert re.match(r"\| `weights.estimator` \| .* \| `\"head\"` \|", of_estimator)
    assert [row for row in rows if row != of_estimator] == key_rows()
