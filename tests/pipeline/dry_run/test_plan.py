"""The dry run against what the stages then really do; log-probs and trained models are made up, everything else is real."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from pipeline.dry_run.memory import ModelSize, training_bytes
from pipeline.dry_run.plan import StagePlan, plan
from pipeline.dry_run.table import plan_lines, plan_rows
from pipeline.models.section import NEGATIVE_PROMPT, POSITIVE_PROMPT
from pipeline.recipe import Recipe
from pipeline.stages.anchors import anchors_identity
from pipeline.stages.annotate import annotate
from pipeline.stages.attribute import attribution_identity
from pipeline.stages.contrast import contrast, untrained_pair
from pipeline.stages.prepare import prepare
from pipeline.stages.publish import Ingredients, publish
from pipeline.stages.report import write_report
from pipeline.stages.score import Scorer, score
from pipeline.workers.supervise import resolve_dtype, stage_table
from weights_store import WeightStore
from weights_store.errors import DamageError, InputError
from weights_store.fingerprint import fingerprint
from weights_store.names import quarantine_path
from weights_store.schemas import ANCHORS, ATTRIBUTIONS, LOGPS, QUARANTINE, SIDES

STAGES = [
    "prepare",
    "score ref",
    "publish uniform",
    "contrast",
    "score positive",
    "score negative",
    "publish",
    "report",
]
SCORES = [stage for stage in STAGES if stage.startswith("score")]
NUM_PAIRS = 12
PROMPTS = {"positive": POSITIVE_PROMPT, "negative": NEGATIVE_PROMPT}
TRAINING = {"pairs_per_step": 5, "num_epochs": 2}
CONTRAST = {"contrast.method": "dpo", **{f"contrast.train.optim.{key}": value for key, value in TRAINING.items()}}
DUPLICATE, BROKEN = 0, b"{broken"


def _train(_module, command, _what, _python, launcher=()):
    """Stand in for the training job: copy the model, and change its config so that its content differs."""
    options = dict(pairwise(command[1:]))
    target = Path(shutil.copytree(options["--model"], options["--output"], dirs_exist_ok=True))
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "made_up_for": target.name}))


def _build(recipe):
    """Run the stages as the flow does it; return what prepare made."""
    folder = Path(recipe.model.path)
    prepared = prepare(recipe, folder)
    logps = {"ref_logps": _score(prepared.tokens, Scorer(folder), recipe, "ref")}
    published = publish(recipe, recipe.uniform, Ingredients(prepared.tokens, **logps))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.stages.train.run_child", _train)
        pair = contrast(recipe.contrast, folder, published.weights)
    for role, scorer in pair.scorers.items():
        logps[f"{role}_logps"] = _score(prepared.tokens, scorer, recipe, role)
    published = publish(recipe, recipe.weights, Ingredients(prepared.tokens, **logps))
    write_report(published, folder)
    return prepared


def _score(tokens, scorer, recipe, role, leave_out=(), wall_s=0.5):
    """Bring a scorer's table up to the tokens with made-up log-probs, as the scoring process does it."""
    identity = scorer.identity(resolve_dtype(scorer.model, recipe.score.dtype))
    return _fill("score", tokens, identity, role, leave_out, wall_s)


def _attribute(tokens, recipe, leave_out=(), wall_s=0.5):
    identity = attribution_identity(Path(recipe.model.path), recipe.attribute)
    return _fill("attribute", tokens, identity, "ref", leave_out, wall_s)


def _sample(tokens, recipe, leave_out=(), wall_s=0.5):
    identity = anchors_identity(Path(recipe.model.path), recipe.anchors, recipe.score)
    return _fill("anchors", tokens, identity, "ref", leave_out, wall_s)


SCHEMAS = {"score": LOGPS, "attribute": ATTRIBUTIONS, "anchors": ANCHORS}


def _made_up_row(stage, row):
    if stage == "anchors":
        return {"anchor_ids": row["prompt_ids"][:3], "anchor_logps": [-1.5] * 3}
    name, value = {"score": ("logps", -1.5), "attribute": ("attributions", 0.5)}[stage]
    return {f"{side}_{name}": [value] * len(row[f"{side}_ids"]) for side in SIDES}


def _fill(stage, tokens, identity, role, leave_out, wall_s):
    table = stage_table(stage, tokens, identity)
    done = [*leave_out, *table.pair_ids()]
    rows = WeightStore(tokens.store).table(tokens.table).scan(tokens.version)
    frame = rows.filter(~pl.col("pair_id").is_in(done)).collect()
    if frame.is_empty():
        return table.reference()
    filled = [{"pair_id": row["pair_id"], **_made_up_row(stage, row)} for row in frame.iter_rows(named=True)]
    statistics = {"num_pairs": frame.height, "num_tokens": _num_tokens(frame), "wall_s": wall_s}
    metadata = {
        "scorer": identity,
        "role": role,
        "parents": [tokens.as_parent()],
        "fingerprint": fingerprint({"scorer": identity, "tokens": tokens.fingerprint}),
        "statistics": {name: value for name, value in statistics.items() if value is not None},
    }
    return table.append(pa.Table.from_pylist(filled, SCHEMAS[stage]), metadata)


def _num_tokens(frame, columns=("prompt_ids", "chosen_ids", "rejected_ids")):
    return sum(int(frame[column].list.len().sum()) for column in columns)


def _rows(tokens):
    return WeightStore(tokens.store).table(tokens.table).scan(tokens.version).collect()


def _plan(recipe, stages=STAGES):
    """Return the plan by stage; nothing may change in the store."""
    store = Path(recipe.store.uri)
    before = _files(store)
    plans = plan(recipe)
    assert _files(store) == before
    assert [found.stage for found in plans] == stages
    return {found.stage: found for found in plans}


def _files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")} if folder.exists() else None


def _computed(plans):
    return [found.stage for found in plans.values() if found.action == "compute"]


@pytest.fixture(scope="module")
def built_once(tmp_path_factory, toy_model, toy_pairs, write_jsonl):
    """A finished build of the first pairs, two more rows than pairs in its source."""
    folder = tmp_path_factory.mktemp("built")
    write_jsonl(folder / "pairs.jsonl", [*toy_pairs[:NUM_PAIRS], toy_pairs[DUPLICATE], BROKEN])
    recipe = Recipe.model_validate(
        {
            "dataset": {"name": "toy", "source": str(folder / "pairs.jsonl")},
            "model": {"path": str(toy_model)},
            "contrast": {"method": "dpo", "train": {"optim": TRAINING}},
            "weights": {"name": "toy/tis-dpo", "estimator": "tis"},
            "store": {"uri": str(folder / "store")},
        }
    )
    _build(recipe)
    return folder


@pytest.fixture
def built(built_once, tmp_path, make_recipe):
    """Return a function that makes a recipe, any setting replaced, on a copy of the finished build."""
    shutil.copytree(built_once, tmp_path, dirs_exist_ok=True)
    return lambda **settings: make_recipe(**{**CONTRAST, **settings})


@pytest.fixture
def source(tmp_path, write_jsonl, toy_pairs):
    """Return a function that writes the source: pairs by their number, other rows as they are."""

    def write(*rows):
        rows = [toy_pairs[row] if isinstance(row, int) else row for row in rows]
        write_jsonl(tmp_path / "pairs.jsonl", rows)

    return write


FIRST_ROWS = (*range(NUM_PAIRS), DUPLICATE, BROKEN)


def test_a_fresh_store_computes_everything_in_the_numbers_that_the_stages_then_find(make_recipe, source):
    source(*FIRST_ROWS)
    recipe = make_recipe(**CONTRAST)
    plans = _plan(recipe)
    assert not Path(recipe.store.uri).exists()
    assert _computed(plans) == STAGES
    assert plans["prepare"].reasons[0] == f"{NUM_PAIRS + 2} rows = {NUM_PAIRS} pairs + 2 to quarantine"

    rows = _rows(_build(recipe).tokens)
    num_tokens = _num_tokens(rows)
    for stage in ("prepare", *SCORES):
        assert (plans[stage].num_pairs, plans[stage].num_tokens) == (NUM_PAIRS, num_tokens) == (rows.height, num_tokens)
    for stage in ("publish uniform", "publish"):
        assert plans[stage].num_tokens == _num_tokens(rows, ("chosen_ids", "rejected_ids"))
    assert all(found.is_exact for found in plans.values())
    # Two epochs of 12 pairs are 24, in steps of 5: the last one has 4.
    assert plans["contrast"].reasons[0] == "2 models to train with dpo, 5 steps of 5 pairs each"
    assert plans["contrast"].num_tokens == 2 * 2 * num_tokens
    size = ModelSize.of(Path(recipe.model.path))
    assert plans["contrast"].memory_bytes == training_bytes(size, recipe.contrast.train)
    assert [name for name, found in plans.items() if found.memory_bytes] == ["score ref", "contrast", *SCORES[1:]]


def test_pairs_that_are_held_out_are_not_planned_to_be_trained_on(make_recipe, source):
    source(*FIRST_ROWS)
    plans = _plan(make_recipe(**CONTRAST, **{"contrast.held_out": 0.5}))
    # Two epochs of about 6 pairs, in steps of 5.
    assert plans["contrast"].reasons[0] == "2 models to train with dpo, 3 steps of 5 pairs each"
    assert not plans["contrast"].is_exact


def test_a_finished_build_is_reused_whole(built):
    plans = _plan(built())
    assert _computed(plans) == []
    assert {(p.num_pairs, p.num_tokens, p.wall_s) for p in plans.values()} == {(0, 0, None)}
    assert plans["publish"].reasons == (f"weights/toy/tis-dpo@0: {NUM_PAIRS} pairs",)
    assert plan_lines(list(plans.values()))[-1] == "total: nothing to compute"


def test_appended_rows_are_the_only_ones_to_compute(built, source):
    source(*FIRST_ROWS, *range(NUM_PAIRS, NUM_PAIRS + 3))
    recipe = built()
    old = _rows(WeightStore(recipe.store.uri).table(_tokens_path(recipe)).reference())
    plans = _plan(recipe)
    assert _computed(plans) == [stage for stage in STAGES if stage != "contrast"]

    prepared = _build(recipe)
    new = _rows(prepared.tokens).join(old, on="pair_id", how="anti")
    assert new.height == prepared.num_new_pairs == 3
    for stage in ("prepare", *SCORES):
        assert (plans[stage].num_pairs, plans[stage].num_tokens) == (3, _num_tokens(new))
    for stage in ("publish uniform", "publish"):
        assert (plans[stage].num_pairs, plans[stage].num_tokens) == (
            3,
            _num_tokens(new, ("chosen_ids", "rejected_ids")),
        )
    assert any(reason.startswith("source.content: ") for reason in plans["prepare"].reasons)
    assert any(reason.endswith('-> "to be computed"') for reason in plans["publish"].reasons)


def _tokens_path(recipe):
    (table,) = WeightStore(recipe.store.uri).tables("tokens")
    return table.path


def test_another_clamp_only_weighs_again(built):
    plans = _plan(built(**{"weights.upper": 0.2}))
    assert _computed(plans) == ["publish", "report"]
    assert plans["publish"].reasons == (
        "new version, after weights/toy/tis-dpo@0:",
        "settings.weights.upper: 1.5 -> 0.2",
    )
    assert plans["publish"].num_pairs == NUM_PAIRS
    assert plans["report"].reasons == ("new file reports/toy/tis-dpo@1.html",)


def test_another_dtype_scores_into_new_tables_and_says_why(built):
    plans = _plan(built(**{"score.dtype": "bfloat16"}))
    assert _computed(plans) == [*(stage for stage in STAGES if stage not in ("prepare", "contrast"))]
    for stage in SCORES:
        assert plans[stage].num_pairs == NUM_PAIRS
        assert plans[stage].reasons[1].endswith(': dtype: "float32" -> "bfloat16"')
    assert 'settings.score.dtype: "auto" -> "bfloat16"' in plans["publish"].reasons


def test_the_most_likely_tokens_are_stored_for_the_reference_alone(built):
    plans = _plan(built(**{"score.top_k": 4}))
    assert _computed(plans) == ["score ref", "publish uniform", "publish", "report"]
    assert plans["score ref"].reasons[1].endswith(": top_k: null -> 4")
    assert "settings.score.top_k: null -> 4" in plans["publish"].reasons


def test_other_training_settings_train_and_score_a_new_pair(built):
    plans = _plan(built(**{"contrast.train.optim.seed": 7}))
    assert _computed(plans) == ["contrast", "score positive", "score negative", "publish", "report"]
    assert plans["contrast"].reasons[1:] == (
        "unlike the positive model that is there: training.seed: 0 -> 7",
        "unlike the negative model that is there: training.seed: 0 -> 7",
    )
    assert plans["score positive"].reasons == ("the positive model is not trained yet",)
    assert plans["score positive"].num_pairs == NUM_PAIRS


def test_grown_data_train_a_new_pair_only_when_asked(built, source, toy_model):
    source(*FIRST_ROWS, NUM_PAIRS)
    assert "contrast" not in _computed(_plan(built()))
    plans = _plan(built(**{"contrast.retrain": True}))
    assert plans["contrast"].action == "compute"
    assert plans["score negative"].num_pairs == NUM_PAIRS + 1
    num_tokens = _num_tokens(_rows(prepare(built(), toy_model).tokens))
    assert plans["score negative"].num_tokens == num_tokens
    assert plans["contrast"].num_tokens == 2 * 2 * num_tokens  # two models, two epochs


def test_a_finished_build_is_planned_and_run_again_without_reading_a_row(built):
    recipe = built()
    store = Path(recipe.store.uri)
    for path in store.rglob("*.parquet"):
        if path.relative_to(store).parts[0] != "quarantine":
            path.write_bytes(b"not what was committed")
    assert _computed(_plan(recipe)) == []
    folder = Path(recipe.model.path)
    tokens = prepare(recipe, folder).tokens
    versions = {"ref": score(tokens, {"ref": Scorer(folder)}, recipe.score, folder)["ref"].output}
    uniform = publish(recipe, recipe.uniform, Ingredients.of_scorers(tokens, versions))
    pair = contrast(recipe.contrast, folder, uniform.weights)
    versions |= {role: done.output for role, done in score(tokens, pair.scorers, recipe.score, folder).items()}
    published = publish(recipe, recipe.weights, Ingredients.of_scorers(tokens, versions))
    assert (uniform.is_new, pair.num_trained, published.is_new) == (False, 0, False)
    report = write_report(published, folder)
    assert "constant" in {found.name for found in report.diagnoses}  # made-up log-probs are all the same
    with pytest.raises(DamageError):
        WeightStore(store).survey(published.name)


def test_a_damaged_report_is_planned_again_and_a_damaged_model_ends_the_plan(built):
    recipe = built()
    store = Path(recipe.store.uri)
    report = store / "reports/toy/tis-dpo@0.html"
    report.write_bytes(report.read_bytes()[:-100])
    plans = _plan(recipe)
    assert _computed(plans) == ["report"]
    (reason,) = plans["report"].reasons
    assert reason.startswith("reports/toy/tis-dpo@0.html is written again: it is damaged, or another")
    weights = next(store.glob("models/*/model.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(
        DamageError, match=rf"^{weights} is damaged: .*; restore it from a copy, or delete {weights.parent}:"
    ):
        plan(recipe)


def test_two_prompts_need_no_training(make_recipe, source):
    source(*FIRST_ROWS)
    plans = _plan(make_recipe(**{"contrast.method": "prompt"}))
    assert plans["contrast"].action == "reuse"
    assert [plans[stage].num_pairs for stage in SCORES] == [NUM_PAIRS] * 3


def test_several_prompts_are_planned_one_by_one_and_a_known_one_is_reused(make_recipe, source, toy_model):
    source(*FIRST_ROWS)
    first = make_recipe(**{"contrast.method": "prompt"})
    tokens = prepare(first, toy_model).tokens
    for role, scorer in {"ref": Scorer(toy_model), **untrained_pair(first.contrast, toy_model).scorers}.items():
        _score(tokens, scorer, first, role)
    prompts = {f"contrast.{side}_prompt": [text, f"a {side} one"] for side, text in PROMPTS.items()}
    stages = [*STAGES[:6], "score positive2", "score negative2", *STAGES[6:]]
    plans = _plan(make_recipe(**{"contrast.method": "prompt", **prompts}), stages)
    assert plans["contrast"].reasons == ("one model with 2 pairs of prompts: nothing to train",)
    assert [plan for plan in _computed(plans) if plan.startswith("score")] == ["score positive2", "score negative2"]


def test_given_models_need_no_training_and_the_starting_one_is_scored_once(make_recipe, source, toy_model, tmp_path):
    source(*FIRST_ROWS)
    other = Path(shutil.copytree(toy_model, tmp_path / "other"))
    (other / "config.json").write_text(json.dumps({**json.loads((other / "config.json").read_text()), "made_up": 1}))
    plans = _plan(make_recipe(**{"contrast.method": "given", "contrast.positive_model": str(other)}))
    assert plans["contrast"].reasons == (
        "given models: nothing to train", f"{other}, the positive model", f"{toy_model}, the negative model"
    )  # fmt: skip
    assert [plans[stage].num_pairs for stage in SCORES] == [NUM_PAIRS, NUM_PAIRS, 0]
    (table,) = plans["score negative"].reasons
    assert table.endswith(", the table of score ref")
    assert plans["publish"].num_pairs == NUM_PAIRS
    prompts = {"contrast.method": "given", "contrast.positive_model": str(other), "contrast.negative_prompt": "bad"}
    plans = _plan(make_recipe(**prompts))
    assert plans["contrast"].reasons[2] == f"{toy_model}, the negative model, behind a prompt"
    assert [plans[stage].num_pairs for stage in SCORES] == [NUM_PAIRS] * 3


def test_a_pair_on_other_pairs_is_planned_in_their_number(built, source):
    source(*range(4))
    settings = {"dataset.name": "other", "weights.name": "other/tis-dpo", "contrast.weights": "toy/uniform"}
    found = _plan(built(**settings, **{"contrast.train.optim.num_epochs": 1}))["contrast"]
    assert found.reasons[0] == "2 models to train with dpo, 3 steps of 5 pairs each, on the pairs of toy/uniform"
    assert (found.num_pairs, found.is_exact) == (NUM_PAIRS, True)


def test_an_estimator_without_a_pair_plans_none(make_recipe, source):
    source(*FIRST_ROWS)
    plans = plan(make_recipe(**{"weights.estimator": "uniform", "weights.name": "toy/uniform"}))
    assert [found.stage for found in plans] == ["prepare", "score ref", "publish", "report"]


def test_time_is_given_only_where_this_store_has_measured_the_stage_and_the_role(make_recipe, source, toy_model):
    source(*FIRST_ROWS)
    recipe = make_recipe(**CONTRAST)
    tokens = prepare(recipe, toy_model).tokens
    assert {found.wall_s for found in _plan(recipe).values()} == {None}
    ids = _rows(tokens)["pair_id"].to_list()
    _score(tokens, Scorer(toy_model), recipe, "ref", leave_out=ids[4:], wall_s=2.0)
    _score(tokens, Scorer(toy_model), recipe, "ref", leave_out=ids[8:], wall_s=3.0)
    rows = _rows(tokens)
    rate = _num_tokens(rows[:8]) / 5.0  # 4 pairs in 2 s and 4 in 3 s
    plans = _plan(recipe)
    assert plans["score ref"].num_pairs == 4
    assert plans["score ref"].wall_s == pytest.approx(_num_tokens(rows[8:]) / rate)
    assert {found.wall_s for stage, found in plans.items() if stage != "score ref"} == {None}


def test_commits_that_do_not_say_how_long_they_took_are_no_measurement(make_recipe, source, toy_model):
    source(*FIRST_ROWS)
    recipe = make_recipe(**CONTRAST)
    tokens = prepare(recipe, toy_model).tokens
    _score(tokens, Scorer(toy_model), recipe, "ref", leave_out=_rows(tokens)["pair_id"][:1].to_list(), wall_s=None)
    assert (_plan(recipe)["score ref"].num_pairs, _plan(recipe)["score ref"].wall_s) == (1, None)


def test_pairs_that_left_are_neither_scored_nor_published(make_recipe, source, toy_model):
    source(*FIRST_ROWS)
    recipe = make_recipe(**CONTRAST)
    _build(recipe)
    source(*FIRST_ROWS[:9], 20)  # three pairs, the copy and the broken row are gone
    plans = _plan(recipe)
    prepared = prepare(recipe, toy_model)
    assert plans["prepare"].reasons[:2] == (
        "10 rows = 10 pairs + 0 to quarantine",
        f"{prepared.tokens.table}@0: 1 pairs new, 3 gone; all rows are rewritten",
    )
    assert (plans["prepare"].num_pairs, prepared.num_new_pairs, prepared.num_pairs) == (1, 1, 10)
    assert [plans[stage].num_pairs for stage in SCORES] == [1, 1, 1]
    assert plans["publish"].num_pairs == 10


def test_pairs_that_left_before_they_were_scored_are_not_counted(make_recipe, source, toy_model, toy_pairs):
    source(*range(6))
    recipe = make_recipe(**CONTRAST)
    tokens = prepare(recipe, toy_model).tokens
    _score(tokens, Scorer(toy_model), recipe, "ref", leave_out=[_pair_id(tokens, row) for row in (4, 5)])
    source(*range(5))
    assert _plan(recipe)["score ref"].num_pairs == 1


def _pair_id(tokens, source_row):
    return _rows(tokens).filter(pl.col("source_row") == source_row)["pair_id"].item()


def test_pairs_that_come_back_have_their_scores_still(built, source, toy_model):
    source(*range(6))
    prepare(built(), toy_model)
    source(*FIRST_ROWS)
    plans = _plan(built())
    assert (plans["prepare"].num_pairs, plans["score ref"].action) == (6, "reuse")


def test_what_no_scorer_could_score_is_not_tried_again(built):
    recipe = built()
    store = WeightStore(recipe.store.uri)
    tokens = store.table(_tokens_path(recipe)).reference()
    scorer = Scorer(Path(recipe.model.path))
    other = built(**{"score.dtype": "bfloat16"})
    bad = _pair_id(tokens, 3)
    logps = _score(tokens, scorer, other, "ref", leave_out=[bad])
    quarantine = store.table(quarantine_path(tokens.table))
    row = {"source_row": 3, "pair_id": bad, "reason": "unscorable", "detail": f"{logps.table}: no", "raw": "x"}
    quarantine.append(pa.Table.from_pylist([row], QUARANTINE), quarantine.metadata())
    plans = _plan(other)
    assert (plans["score ref"].action, plans["publish uniform"].num_pairs) == ("reuse", NUM_PAIRS - 1)


@pytest.mark.parametrize("num_sampled", [200, 2])
def test_what_the_tokenizer_refused_before_is_not_new(built, source, toy_model, monkeypatch, num_sampled):
    too_long = {"prompt": "p", "chosen": "word " * 2000, "rejected": "b"}
    source(*FIRST_ROWS, *[{**too_long, "rejected": f"b{index}"} for index in range(4)])
    prepare(built(), toy_model)
    with Path(built().dataset.source).open("a") as file:
        file.write(json.dumps(too_long | {"chosen": "a"}) + "\n")
    monkeypatch.setattr("pipeline.dry_run.source.SAMPLE_PAIRS", num_sampled)
    found = _plan(built())["prepare"]
    assert (found.num_pairs, found.is_exact) == (1, num_sampled == 200)
    assert found.reasons[0].replace("≈", "") == "19 rows = 13 pairs + 6 to quarantine"


def test_a_refused_pair_whose_hidden_end_was_shortened_is_tried_again(make_recipe, source, toy_model):
    # Quarantine keeps 2,000 characters, and the two texts differ after them.
    words = "the baker mixes " * 130
    source(*range(4), {"prompt": "p", "chosen": "a", "rejected": words * 9})
    recipe = make_recipe(**CONTRAST)
    assert prepare(recipe, toy_model).quarantined == {"response_too_long": 1}
    source(*range(4), {"prompt": "p", "chosen": "a", "rejected": words})
    found = _plan(recipe)["prepare"]
    assert (found.num_pairs, found.is_exact) == (1, True)
    assert prepare(recipe, toy_model).num_new_pairs == 1


def test_a_sample_stands_for_many_pairs(make_recipe, source, toy_model, monkeypatch):
    source(*range(40))
    recipe = make_recipe(**CONTRAST)
    monkeypatch.setattr("pipeline.dry_run.source.SAMPLE_PAIRS", 10)
    plans = _plan(recipe)
    assert (plans["prepare"].num_pairs, plans["prepare"].is_exact) == (40, False)
    exact = _num_tokens(_rows(prepare(recipe, toy_model).tokens))
    assert plans["prepare"].num_tokens != exact
    assert plans["prepare"].num_tokens == pytest.approx(exact, rel=0.2)
    assert f"≈{plans['score ref'].num_tokens:,}" in "\n".join(plan_lines(list(plans.values())))


def test_a_source_without_content_of_its_own_is_read_again_and_found_the_same(make_recipe, tmp_path, toy_pairs):
    from datasets import Dataset

    Dataset.from_list(toy_pairs[:NUM_PAIRS]).save_to_disk(str(tmp_path / "saved"))
    recipe = make_recipe(**{**CONTRAST, "dataset.source": str(tmp_path / "saved")})
    _build(recipe)
    assert _computed(_plan(recipe)) == []


def test_another_limit_says_what_differs(built):
    plans = _plan(built(**{"dataset.max_prompt_tokens": 100}))
    assert plans["prepare"].reasons[-1].endswith("max_prompt_tokens: 1024 -> 100")
    assert plans["score ref"].num_pairs == NUM_PAIRS


def test_a_source_without_a_usable_pair_fails_as_the_build_does(make_recipe, source, toy_model):
    source(BROKEN, BROKEN)
    recipe = make_recipe()
    messages = []
    for run in (plan, lambda recipe: prepare(recipe, toy_model)):
        with pytest.raises(InputError) as caught:
            run(recipe)
        messages.append(str(caught.value))
    assert "no usable pair in 2 rows (2 unparsable_json)" in messages[0]
    assert messages[0] == messages[1]


def test_a_sample_without_a_usable_pair_is_shown_with_its_reasons(make_recipe, source, monkeypatch, caplog):
    source(*({"prompt": f"p{index}", "chosen": "word " * 2000, "rejected": "b"} for index in range(9)))
    monkeypatch.setattr("pipeline.dry_run.source.SAMPLE_PAIRS", 4)
    assert _plan(make_recipe(**CONTRAST))["prepare"].num_pairs == 0
    assert "none of 4 pairs in a sample can be used (4 response_too_long); response_too_long: row " in caplog.text


# --- attributions and anchors ------------------------------------------------------------------------------------------

TI_STAGES = ["prepare", "score ref", "attribute ref", "anchors ref", "publish", "report"]
TI = {"weights.estimator": "ti", "weights.name": "toy/ti-dpo", "anchors.max_new_tokens": 8}


@pytest.fixture
def prepared(make_recipe, source, toy_model):
    """Pairs with reference log-probs, and nothing else; returns a function that makes a TI-DPO recipe, and the tokens."""
    source(*FIRST_ROWS)
    recipe = make_recipe(**TI)
    tokens = prepare(recipe, toy_model).tokens
    _score(tokens, Scorer(toy_model), recipe, "ref")
    return lambda **settings: make_recipe(**{**TI, **settings}), tokens


def test_attributions_and_anchors_are_planned_where_the_recipe_needs_them(prepared, make_recipe):
    make, tokens = prepared
    plans = _plan(make(), TI_STAGES)
    assert _computed(plans) == ["attribute ref", "anchors ref", "publish", "report"]
    rows = _rows(tokens)
    for found in (plans["attribute ref"], plans["anchors ref"]):
        assert (found.num_pairs, found.num_tokens, found.wall_s) == (NUM_PAIRS, _num_tokens(rows), None)

    without = make_recipe(**{"weights.estimator": "ti", "weights.name": "toy/ti-dpo"})
    assert "anchors ref" not in _plan(without, [stage for stage in TI_STAGES if stage != "anchors ref"])
    anchors_alone = make_recipe(**{**TI, "weights.estimator": "uniform"})
    assert "anchors ref" in _plan(anchors_alone, [stage for stage in TI_STAGES if stage != "attribute ref"])


def test_both_go_on_where_they_were_at_the_rate_of_their_own_stage(prepared):
    make, tokens = prepared
    rows = _rows(tokens)
    ids = rows["pair_id"].to_list()
    _attribute(tokens, make(), leave_out=ids[9:], wall_s=3.0)
    _sample(tokens, make(), leave_out=ids[9:], wall_s=6.0)
    plans = _plan(make(), TI_STAGES)
    done, left = _num_tokens(rows[:9]), _num_tokens(rows[9:])
    for stage, wall_s in (("attribute ref", 3.0), ("anchors ref", 6.0)):
        assert (plans[stage].num_pairs, plans[stage].num_tokens) == (3, left)
        assert plans[stage].wall_s == pytest.approx(left / (done / wall_s))
        assert plans[stage].reasons[0].endswith("@0 lacks these pairs")
    _attribute(tokens, make())
    _sample(tokens, make())
    plans = _plan(make(), TI_STAGES)
    assert _computed(plans) == ["publish", "report"]
    assert plans["anchors ref"].reasons[0].endswith(f"@1: {NUM_PAIRS} pairs")


def test_own_weights_are_planned_and_reused_until_the_source_changes(make_recipe, source, toy_pairs, toy_model):
    def rows(weight):
        return [{**pair, "pair_weight": weight} for pair in toy_pairs[:3]]

    def planned():
        found = {stage.stage: stage for stage in plan(recipe)}
        return found["annotate"].action, found["annotate"].num_pairs, found["annotate"].reasons

    source(*rows(1.0))
    recipe = make_recipe(**{"weights.estimator": "uniform", "weights.pair_weight": "column"})
    action, num_pairs, reasons = planned()
    assert (action, num_pairs, reasons[1]) == ("compute", 3, "columns 'pair_weight'")
    assert reasons[0].startswith("new table annotations/toy-")
    version = annotate(recipe, prepare(recipe, toy_model).tokens, toy_model)
    assert planned() == ("reuse", 0, (f"{version}: 3 pairs",))
    source(*rows(2.0))  # the pairs are the same
    assert planned() == ("compute", 3, (f"{version}: all rows are written again", "columns 'pair_weight'"))


def test_other_settings_of_one_of_them_leave_the_other_as_it_is(prepared):
    make, tokens = prepared
    _attribute(tokens, make())
    _sample(tokens, make())
    plans = _plan(make(**{"anchors.seed": 1}), TI_STAGES)
    assert _computed(plans) == ["anchors ref", "publish", "report"]
    assert plans["anchors ref"].reasons[1].endswith(": sampling.seed: 0 -> 1")
    plans = _plan(make(**{"attribute.target": "gold_logps"}), TI_STAGES)
    assert _computed(plans) == ["attribute ref", "publish", "report"]
    assert '"max_logit" -> "gold_logps"' in plans["attribute ref"].reasons[1]


def test_new_pairs_are_the_only_ones_to_attribute_and_to_sample_for(prepared, source, toy_model):
    make, tokens = prepared
    _attribute(tokens, make())
    _sample(tokens, make())
    source(*FIRST_ROWS, *range(NUM_PAIRS, NUM_PAIRS + 3))
    plans = _plan(make(), TI_STAGES)
    new = _rows(prepare(make(), toy_model).tokens).join(_rows(tokens), on="pair_id", how="anti")
    for stage in ("attribute ref", "anchors ref"):
        assert (
            (plans[stage].num_pairs, plans[stage].num_tokens) == (3, _num_tokens(new)) == (new.height, _num_tokens(new))
        )


def test_a_pair_without_an_anchor_is_not_published(prepared):
    make, tokens = prepared
    bad = _pair_id(tokens, 3)
    _attribute(tokens, make())
    anchors = _sample(tokens, make(), leave_out=[bad])
    quarantine = WeightStore(tokens.store).table(quarantine_path(tokens.table))
    row = {"source_row": 3, "pair_id": bad, "reason": "unscorable", "detail": f"{anchors.table}: no", "raw": "x"}
    quarantine.append(pa.Table.from_pylist([row], QUARANTINE), quarantine.metadata())
    plans = _plan(make(), TI_STAGES)
    assert (plans["anchors ref"].action, plans["publish"].num_pairs) == ("reuse", NUM_PAIRS - 1)


def test_a_finished_build_with_attributions_and_anchors_is_reused_whole(prepared):
    make, tokens = prepared
    recipe = make()
    ingredients = Ingredients(
        tokens,
        _score(tokens, Scorer(Path(recipe.model.path)), recipe, "ref"),
        attributions=_attribute(tokens, recipe),
        anchors=_sample(tokens, recipe),
    )
    publish(recipe, recipe.weights, ingredients)
    assert _computed(_plan(recipe, TI_STAGES)) == ["report"]


PLANS = [
    StagePlan("prepare", "reuse", reasons=("tokens/toy-1@0: 12 pairs",)),
    StagePlan("score ref", "compute", 1200, 345_678, ("new " + "word " * 20,), is_exact=False, wall_s=3_725.0),
    StagePlan("report", "compute", reasons=("new file",)),
]


def test_the_table_is_aligned_and_fits_80_columns():
    assert plan_lines(PLANS) == [
        "stage      action    pairs    tokens         time",
        "prepare    reuse",
        "    tokens/toy-1@0: 12 pairs",
        "score ref  compute  ≈1,200  ≈345,678  ≈1 h 02 min",
        "    new " + "word " * 13 + "word",
        "      " + "word " * 5 + "word",
        "report     compute",
        "    new file",
        "total: 2 of 3 stages to compute",
        "time: as measured in this store, without the start of the model",
    ]
    huge = StagePlan("publish uniform", "compute", 10**9, 10**12, is_exact=False, wall_s=1e9)
    assert max(len(line) for line in plan_lines([huge])) <= 80


def test_without_a_measured_rate_the_table_has_no_time():
    lines = plan_lines([PLANS[0], PLANS[2]])
    assert lines[0] == "stage    action   pairs  tokens"
    assert lines[-1] == "total: 1 of 2 stages to compute"


def test_rows_for_programs_have_every_field():
    assert json.loads(json.dumps(plan_rows(PLANS)))[1] == {
        "stage": "score ref",
        "action": "compute",
        "num_pairs": 1200,
        "num_tokens": 345_678,
        "reasons": ["new " + "word " * 20],
        "is_exact": False,
        "wall_s": 3725.0,
        "memory": "",
        "memory_bytes": None,
    }
