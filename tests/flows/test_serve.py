"""Which deployments `tokenweights serve` makes of recipes and training configs, what starts them, and on which server."""

import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.api import configured_url
from flows.serve import _api, _deployments, _load
from flows.training import build_and_train, why_not_behind
from weights_store.errors import SettingsError, StageError
from weights_store.inspection.doctor import Diagnosis

RECIPE = """
[dataset]
name = "hh"
source = "pairs.jsonl"
[model]
path = "model"
[weights]
name = "hh/head"
[store]
uri = "store"
[schedule]
cron = "0 3 * * *"
timezone = "Europe/Berlin"
"""
TRAINING = """
[data]
store = "store"
weights = "hh/head"
[model]
path = "model"
[loss]
name = "tis_dpo"
beta = 0.3
[optim]
learning_rate = 1e-4
[output]
folder = "runs/policy"
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hh.toml").write_text(RECIPE)
    (tmp_path / "policy.toml").write_text(TRAINING)
    return tmp_path


def _served(*names, overrides=(), store=None):
    recipes, trainings = _load(names, overrides, store)
    made = _deployments(recipes, trainings, {"overrides": [*overrides], "store": store})
    return {f"{deployment.flow_name}/{deployment.name}": deployment for deployment in made}


def test_a_recipe_is_refreshed_on_its_schedule_and_built_by_hand(files):
    served = _served("hh.toml", overrides=["weights.spread=0.5"])
    assert set(served) == {"build-weights/hh", "refresh-weights/hh"}
    by_hand, refresh = served["build-weights/hh"], served["refresh-weights/hh"]
    assert by_hand.schedules == []
    (schedule,) = refresh.schedules
    assert (schedule.schedule.cron, schedule.schedule.timezone) == ("0 3 * * *", "Europe/Berlin")
    assert refresh.parameters == {"recipe_file": "hh.toml", "overrides": ["weights.spread=0.5"], "store": None}
    assert by_hand.parameters["recipe"]["weights"] == {"name": "hh/head", "estimator": "head", "spread": 0.5}
    limits = {
        name: (found.concurrency_limit, found.concurrency_options.collision_strategy) for name, found in served.items()
    }
    assert limits == {"build-weights/hh": (1, "ENQUEUE"), "refresh-weights/hh": (1, "CANCEL_NEW")}
    for found in served.values():
        assert found.entrypoint.startswith("tokenweights_flows.")
        assert "tokenweights" in found.tags


def test_the_form_has_the_sections_of_the_recipe_with_their_help(files):
    schema = _served("hh.toml")["build-weights/hh"]._parameter_openapi_schema
    sections = schema.definitions["Recipe"]["properties"]
    assert {"dataset", "model", "contrast", "score", "weights", "attribute", "anchors", "schedule", "store"} == set(
        sections
    )
    source = schema.definitions["DatasetSection"]["properties"]["source"]
    assert source["description"].startswith("a .jsonl, .json")


def test_a_training_starts_on_sound_versions_of_what_is_served_beside_it(files):
    served = _served("hh.toml", "policy.toml")
    (trigger,) = served["train-policy/policy"].triggers
    assert trigger.expect == {"tokenweights.weights.published"}
    assert trigger.match.root == {
        "prefect.resource.id": "tokenweights.weights.hh/head",
        "tokenweights.store": str(files / "store"),
        "tokenweights.doctor": "sound",
    }
    assert "build-and-train/policy" in served


def test_a_store_is_the_same_however_it_is_written(files):
    (files / "policy.toml").write_text(TRAINING.replace('"store"', f'"{files}/./store/"'))
    (trigger,) = _served("hh.toml", "policy.toml")["train-policy/policy"].triggers
    assert trigger.match.root["tokenweights.store"] == str(files / "store")


def test_files_that_name_no_store_meet_in_that_of_the_operator(files, monkeypatch):
    """As in the containers, whose prefect.yaml has the recipes of a laptop."""
    (files / "hh.toml").write_text(RECIPE.replace('[store]\nuri = "store"\n', ""))
    (files / "policy.toml").write_text(TRAINING.replace('store = "store"\n', ""))
    monkeypatch.setenv("TOKENWEIGHTS_STORE", "s3://bucket/store")
    (trigger,) = _served("hh.toml", "policy.toml")["train-policy/policy"].triggers
    assert trigger.match.root["tokenweights.store"] == "s3://bucket/store"


@pytest.mark.parametrize("changed", [{"store": "elsewhere"}, {"weights": "hh/other"}, {"weights": "hh/head@3"}])
def test_a_training_on_other_weights_waits_for_a_person(files, changed):
    text = TRAINING
    for key, value in changed.items():
        text = text.replace(f'{key} = "{"store" if key == "store" else "hh/head"}"', f'{key} = "{value}"')
    (files / "policy.toml").write_text(text)
    served = _served("hh.toml", "policy.toml")
    assert served["train-policy/policy"].triggers == []
    assert "build-and-train/policy" not in served


def test_another_store_is_that_of_builds_and_trainings(files):
    served = _served("hh.toml", "policy.toml", store="other")
    assert served["refresh-weights/hh"].parameters["store"] == "other"
    assert served["build-weights/hh"].parameters["recipe"]["store"] == {"uri": "other"}
    assert served["train-policy/policy"].parameters["config"]["data"]["store"] == "other"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            RECIPE.replace('cron = "0 3 * * *"', ""),
            r"hh.toml has no schedule; add \[schedule\] with cron or interval_s",
        ),
        (RECIPE.replace("[model]", "[modell]"), "did you mean"),
    ],
)
def test_a_wrong_recipe_is_refused_before_a_server_starts(files, text, problem):
    (files / "hh.toml").write_text(text)
    with pytest.raises(SettingsError, match=problem):
        _load(["hh.toml"], [], None)


def test_two_files_of_one_name_are_refused(files):
    (files / "more").mkdir()
    (files / "more/hh.toml").write_text(RECIPE)
    with pytest.raises(SettingsError, match=r"two files have the same name.*hh\.toml, more/hh\.toml; rename one"):
        _load(["hh.toml", "more/hh.toml"], [], None)


@pytest.fixture
def started(tmp_path, monkeypatch):
    """The environments of the servers that would be started. What an operator has set is put aside."""
    environments = []

    @contextmanager
    def running_server(command, url, log, environment):
        environments.append(environment)
        yield

    monkeypatch.setattr("flows.serve.running_server", running_server)
    monkeypatch.setattr("flows.serve.guard", lambda: SimpleNamespace(mark_environment=lambda: None))
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_API_URL", "")
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield environments


def test_the_server_of_a_profile_is_used_like_that_of_the_environment(started, monkeypatch):
    """`prefect config set PREFECT_API_URL` writes it into the profile; `status` and `build` ask that server too."""
    monkeypatch.setattr("flows.serve.check_server", lambda: None)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}), _api():
        assert os.environ["PREFECT_API_URL"] == ""
    assert started == []


def test_our_server_knows_after_its_end_who_holds_a_limit(started):
    """By default Prefect keeps that in memory, and what runs held when it ended would be taken for ever."""
    with _api():
        assert os.environ["PREFECT_API_URL"] == configured_url()
    (environment,) = started
    assert environment["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"].endswith(".filesystem")


def test_a_training_behind_a_build_reads_what_is_built(files):
    recipes, trainings = _load(["hh.toml", "policy.toml"], [], None)
    (recipe,), (config,) = recipes.values(), trainings.values()
    assert why_not_behind(config, recipe) is None
    other = config.model_copy(update={"data": config.data.model_copy(update={"weights": "hh/other@3"})})
    store = files / "store"
    assert f"builds hh/head in {store}, and the training reads hh/other in {store}" in why_not_behind(other, recipe)
    pinned = config.model_copy(update={"data": config.data.model_copy(update={"weights": "hh/head@3"})})
    with pytest.raises(SettingsError, match=r"the training is on hh/head@3, and a build may make another version; set"):
        build_and_train.fn(recipe, pinned)


def test_a_warning_of_the_doctor_keeps_a_policy_from_being_trained(files, monkeypatch):
    """Build and training are made up: what counts is what happens between them."""
    trained = []
    warning = Diagnosis("held_out", "warning", "no better than chance", "The weights are noise.", "Use more pairs.")
    note = Diagnosis("eos", "note", "a note", "It means little.", "Do nothing.")

    published = SimpleNamespace(name="hh/head", weights=SimpleNamespace(version=4))
    built = SimpleNamespace(diagnoses=[note, warning], report="store/reports/hh/head@4.html", published=published)
    monkeypatch.setattr("flows.training.build_weights", lambda recipe: built)
    monkeypatch.setattr(
        "flows.training.train_policy", lambda config, weights, launch, python: trained.append(weights) or "folder"
    )
    with pytest.raises(
        StageError, match=r"hh/head@4 was published and not trained on.*held_out: No better than chance\."
    ):
        build_and_train.fn("hh.toml", "policy.toml")
    assert trained == []
    assert build_and_train.fn("hh.toml", "policy.toml", despite_warnings=True) == "folder"
    built.diagnoses = [note]
    build_and_train.fn("hh.toml", "policy.toml")
    assert trained == ["hh/head@4", "hh/head@4"]
