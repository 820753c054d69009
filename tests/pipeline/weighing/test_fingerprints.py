"""The settings that determine weights, as the first stores have them: they are reused only while these stay the same."""

import json
from pathlib import Path

import pytest

from pipeline.recipe import load_recipe
from weights_store.fingerprint import canonical_json, fingerprint

RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "hh_harmless_paper.toml"
INPUTS = ["score.top_k=8", "attribute.activations=true", "attribute.prompts=true"]

EARLIER = [
    (["estimator=tis"], '{"estimator": "tis", "k": 1.0, "mu": 1.0, "lower": -0.5, "upper": 1.5}', "a493a0c37926517a"),
    (["estimator=sepo"], '{"estimator": "sepo", "share": 0.3}', "5e3c452abf02631d"),
    (
        ["estimator=ti"],
        '{"estimator": "ti", "ti_lambda": 0.7, "sigma_divisor": 4.0, "span": "response"}',
        "d14c8a7b8cbfd328",
    ),
    (["estimator=uniform"], '{"estimator": "uniform"}', "00614e6a8e44ae06"),
    (
        ["estimator=random"],
        '{"estimator": "random", "k": 1.0, "mu": 1.0, "lower": -0.5, "upper": 1.5, "seed": 0}',
        "6e0801382cf19cf6",
    ),
    (
        ["estimator=reversed"],
        '{"estimator": "reversed", "k": 1.0, "mu": 1.0, "lower": -0.5, "upper": 1.5}',
        "7adcde745a62c458",
    ),
    (["estimator=origin"], '{"estimator": "origin"}', "61b98a7c7ccaca0f"),
    (["estimator=binary"], '{"estimator": "binary", "share": 0.3}', "da64c222da7b987c"),
    (["estimator=threshold"], '{"estimator": "threshold", "lower": -1.0, "upper": 1.0}', "24e30bcaa6f4155d"),
    (
        ["estimator=threshold_and_scale"],
        '{"estimator": "threshold_and_scale", "lower": -1.5, "upper": 1.5, "min_weight": 0.7, "max_weight": 1.3}',
        "e6ff9f4395208e85",
    ),
    (
        ["estimator=random_scale"],
        '{"estimator": "random_scale", "seed": 0, "min_weight": 0.7, "max_weight": 1.3}',
        "d6559fd13e7e8653",
    ),
    (["estimator=rank_based"], '{"estimator": "rank_based", "min_weight": 0.7, "max_weight": 1.3}', "012ee8be8fe8607d"),
    (["estimator=decay"], '{"estimator": "decay", "decay_gamma": 0.98}', "24f312c511f85ffc"),
    (["estimator=surprise"], '{"estimator": "surprise"}', "1e506712707fbf14"),
    (["estimator=entropy"], '{"estimator": "entropy"}', "291e41b4f9e86f28"),
    (["estimator=activation"], '{"estimator": "activation"}', "3ed3d64126df1f0a"),
    (
        ["estimator=ensemble", "members=['threshold','ti']"],
        '{"estimator": "ensemble", "lower": -0.5, "upper": 1.5, "ti_lambda": 0.7, "sigma_divisor": 4.0, '
        '"span": "response", "members": ["threshold", "ti"]}',
        "2158da98f73caa82",
    ),
    (
        ["estimator=ensemble", "members=['random','sepo','rank_based']", "lower=-1"],
        '{"estimator": "ensemble", "k": 1.0, "mu": 1.0, "lower": -1.0, "upper": 1.5, "seed": 0, "share": 0.3,'
        ' "min_weight": 0.7, "max_weight": 1.3, "members": ["random", "sepo", "rank_based"]}',
        "1b54d1783e6b0659",
    ),
    (
        ["estimator=ensemble", "members=['decay','tis']", "decay_gamma=0.5", "transforms=['smooth']"],
        '{"estimator": "ensemble", "k": 1.0, "mu": 1.0, "lower": -0.5, "upper": 1.5, "members": ["decay", '
        '"tis"], "transforms": ["smooth"], "smooth_over": "tokens", "smooth_window": 3, "decay_gamma": 0.5}',
        "1c8228c37b48be1f",
    ),
    (["estimator=uniform", "upper=9", "k=2", "seed=3"], '{"estimator": "uniform"}', "00614e6a8e44ae06"),
    (["scale=1"], '{"estimator": "tis", "k": 1.0, "mu": 1.0, "lower": -0.5, "upper": 1.5}', "a493a0c37926517a"),
    (
        ["scale=0.25"],
        '{"estimator": "tis", "scale": 0.25, "k": 1.0, "mu": 1.0, "lower": -0.5, "upper": 1.5}',
        "695702fb38211f45",
    ),
    (["spread=none"], '{"estimator": "tis", "k": 1.0, "mu": 1.0, "lower": -0.5, "upper": 1.5}', "a493a0c37926517a"),
    (["seed=3", "k=2"], '{"estimator": "tis", "k": 2.0, "mu": 1.0, "lower": -0.5, "upper": 1.5}', "c83c0497d155f289"),
    (
        ["estimator=threshold_and_scale", "upper=2"],
        '{"estimator": "threshold_and_scale", "lower": -1.5, "upper": 2.0, "min_weight": 0.7, "max_weight": 1.3}',
        "4bd542ae5ef43680",
    ),
    (
        ["transforms=['position','smooth','shrink','decay','mean_one']"],
        '{"estimator": "tis", "k": 1.0, "mu": 1.0, "lower": -0.5, "upper": 1.5, "transforms": ["position", '
        '"smooth", "shrink", "decay", "mean_one"], "position_bins": 20, "smooth_over": "tokens", '
        '"smooth_window": 3, "decay_gamma": 0.98}',
        "f82744eda3d95b5e",
    ),
    (
        ["transforms=['smooth']", "smooth_over=words"],
        '{"estimator": "tis", "k": 1.0, "mu": 1.0, "lower": -0.5, "upper": 1.5, "transforms": ["smooth"], '
        '"smooth_over": "words"}',
        "834984dbcde80f9f",
    ),
    (
        ["estimator=decay", "transforms=['decay']", "decay_gamma=0.5"],
        '{"estimator": "decay", "transforms": ["decay"], "decay_gamma": 0.5}',
        "9b41cce42b5542e3",
    ),
    (
        ["estimator=ti", "span=sequence", "pair_weight=quality"],
        '{"estimator": "ti", "ti_lambda": 0.7, "sigma_divisor": 4.0, "span": "sequence", "pair_weight": '
        '"quality", "quality_eta": 0.7}',
        "c0e80fbdc0cf1558",
    ),
    (
        ["pair_weight=margin", "margin_tau=2"],
        '{"estimator": "tis", "k": 1.0, "mu": 1.0, "lower": -0.5, "upper": 1.5, "pair_weight": "margin", '
        '"margin_tau": 2.0, "margin_formula": 2}',
        "46d3878b8251522e",
    ),
]
"""Overrides of [weights], the settings without the name, and the first digits of the fingerprint of all settings."""


@pytest.mark.parametrize(("overrides", "settings", "digits"), EARLIER)
def test_every_estimator_keeps_its_fingerprint(overrides, settings, digits):
    overrides = ["preset=none", "estimator=tis", *overrides]
    recipe = load_recipe(RECIPE, [*INPUTS, *(f"weights.{override}" for override in overrides)])
    result_settings = recipe.result_settings()
    assert fingerprint(result_settings).startswith(digits)
    assert result_settings["weights"].pop("name") == "hh-harmless/tis-dpo"
    assert canonical_json(result_settings["weights"]) == canonical_json(json.loads(settings))
