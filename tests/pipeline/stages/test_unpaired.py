"""Unpaired rows from a file to a trained step, with labels and without, with an engine that is transformers itself."""

import shutil
from pathlib import Path

import polars as pl
import pytest
import torch

from pipeline.dry_run.plan import plan
from pipeline.dry_run.source import survey
from pipeline.engine.score_once import Scores
from pipeline.prompt_check import check_prompts
from pipeline.stages.anchors import sample_anchors
from pipeline.stages.contrast import contrast, untrained_pair
from pipeline.stages.prepare import Preparation, prepare
from pipeline.stages.publish import Ingredients, publish
from pipeline.stages.report import write_report
from pipeline.stages.score import Scorer, score
from pipeline.toy.model_maker import make_chat_model
from pipeline.workers import supervise
from pipeline.workers.anchors.mismatched import OtherResponses
from pipeline.workers.process import run
from pipeline.workers.request import Request
from train.config import TrainConfig
from train.job.job import run_job
from train.model.checkpoint import load_checkpoint
from weights_store import WeightStore
from weights_store.checks.verify import verify
from weights_store.errors import InputError, MismatchError
from weights_store.inspection import ansi, heat_map
from weights_store.names import quarantine_path

PROMPTS = ["who bakes", "who sails", "who sings", "who runs", "who paints", "who reads"]
ANSWERS = [
    "the baker mixes",
    "the sailor steers the ship",
    "the singer",
    "a runner runs far",
    "the painter",
    "a reader",
]
BAD = [
    ({"prompt": "who", "completion": "a", "label": "yes"}, "bad_label"),
    ({"prompt": "who", "completion": "a", "label": 2}, "bad_label"),
    ({"prompt": "who", "completion": "a", "label": None}, "missing_value"),
    ({"prompt": "who", "completion": None, "label": True}, "missing_value"),
    ({"prompt": "who", "completion": " ", "label": True}, "empty_response"),
    ({"prompt": "who", "completion": ["a", "b"], "label": True}, "many_answers"),
    ({"prompt": PROMPTS[0], "completion": ANSWERS[0], "label": 1}, "duplicate_pair"),
]


def unpaired_rows():
    """Six prompts with a desirable and an undesirable response each; one text has both labels."""
    rows = []
    for index, prompt in enumerate(PROMPTS):
        rows.append({"prompt": prompt, "completion": ANSWERS[index], "label": True})
        rows.append({"prompt": prompt, "completion": ANSWERS[index - 1], "label": 0})
    return [*rows, {"prompt": PROMPTS[0], "completion": ANSWERS[0], "label": False}]


def paired_rows():
    return [{"prompt": p, "chosen": ANSWERS[i], "rejected": ANSWERS[i - 1]} for i, p in enumerate(PROMPTS)]


class TransformersEngine:
    """Log-probs by transformers in float32, all tokens of a sequence at once."""

    vocab_size, max_tokens, batch_tokens, way = 1 << 20, 512, 4096, "transformers"

    def __init__(self, model, settings):
        self.model = model

    def load(self, model):
        self.model = model

    def begin(self, sequences, progress=lambda num_tokens: None):
        return lambda: self.score(sequences, progress)

    def score(self, sequences, progress=lambda num_tokens: None):
        assert all(sequence.num_wanted for sequence in sequences), "an engine gets no sequence without a token"
        model = load_checkpoint(Path(self.model), dtype=torch.float32)
        return [_scores(model, each) for each in sequences]


@torch.no_grad()
def _scores(model, sequence):
    """Of the wanted tokens, with the k most likely ones."""
    ids, wanted = torch.tensor(sequence.prompt_ids + sequence.response_ids), sequence.response_ids[sequence.start :]
    logps = model(input_ids=ids[None]).logits[0, -len(wanted) - 1 : -1].log_softmax(-1)
    top = logps.topk(sequence.top_k)
    own = logps.gather(1, torch.tensor(wanted)[:, None])[:, 0]
    return Scores(own.numpy(), top.indices.int().numpy(), top.values.numpy())


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory, language):
    """A smaller one than that of the suite: nothing here depends on what it has learnt."""
    folder = tmp_path_factory.mktemp("small") / "model"
    make_chat_model(language.sample_conversations(40, seed=1), folder, hidden_size=32, num_layers=1, steps=1)
    return folder


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Run the stages' processes here, with transformers in place of vLLM."""
    monkeypatch.setattr("pipeline.engine.vllm_engine.VllmEngine", TransformersEngine)

    def run_here(module, arguments, *_, **__):
        assert module == "pipeline.workers.process"
        run(Request.load(arguments[0]))

    monkeypatch.setattr(supervise, "run_child", run_here)


@pytest.fixture
def unpaired(make_recipe, tmp_path, write_jsonl):
    """Return a function that makes the recipe of a build from unpaired rows."""
    write_jsonl(tmp_path / "pairs.jsonl", [*unpaired_rows(), *(row for row, _ in BAD)])

    def make(**settings):
        settings = {"contrast.method": "prompt", "anchors.source": "mismatched", **settings}
        return make_recipe(**settings)

    return make


def build(recipe, model):
    """Build the weights of a recipe as the flow does; return what was published."""
    tokens = prepare(recipe, model).tokens
    scorers = {"ref": Scorer(model)}
    if recipe.needs_pair:
        scorers |= untrained_pair(recipe.contrast, model).scorers
    logps = {role: filled.output for role, filled in score(tokens, scorers, recipe.score, model).items()}
    anchors = sample_anchors(tokens, model, recipe.anchors, recipe.score).output if recipe.anchors else None
    ingredients = Ingredients.of_scorers(tokens, logps, None, anchors)
    return publish(recipe, recipe.weights, ingredients, tokenizer_folder=model)


def rows_of(store, path, version=None):
    return store.table(path).scan(version).sort("pair_id").collect()


def test_a_row_has_its_response_on_the_side_of_its_label(unpaired, make_recipe, toy_model, tmp_path, write_jsonl):
    prepared = prepare(unpaired(), toy_model)
    store = WeightStore(prepared.tokens.store)
    tokens = rows_of(store, prepared.tokens.table)
    assert tokens.height == prepared.num_pairs == 13
    assert prepared.quarantined == {
        "bad_label": 2, "missing_value": 2, "empty_response": 1, "many_answers": 1, "duplicate_pair": 1
    }  # fmt: skip
    assert rows_of(store, quarantine_path(prepared.tokens.table)).height == len(BAD)
    is_chosen = tokens["chosen_ids"].list.len() > 0
    assert (is_chosen != (tokens["rejected_ids"].list.len() > 0)).all()
    labels = [bool(unpaired_rows()[row]["label"]) for row in tokens["source_row"]]
    assert is_chosen.to_list() == labels
    # The ids are those that the responses have in pairs, and rows of one prompt are neighbours.
    write_jsonl(tmp_path / "more.jsonl", paired_rows())
    paired = prepare(
        make_recipe(**{"dataset.name": "other", "dataset.source": str(tmp_path / "more.jsonl")}), toy_model
    )
    pairs = rows_of(store, paired.tokens.table)
    for side in ("chosen", "rejected"):
        alone = {(*row["prompt_ids"], -1, *row[f"{side}_ids"]) for row in tokens.to_dicts() if row[f"{side}_ids"]}
        assert {(*row["prompt_ids"], -1, *row[f"{side}_ids"]) for row in pairs.to_dicts()} <= alone
    assert {pair_id[:12] for pair_id in tokens["pair_id"]} == {pair_id[:12] for pair_id in pairs["pair_id"]}
    again = prepare(unpaired(), toy_model)
    assert (again.tokens, again.num_new_pairs) == (prepared.tokens, 0)


def test_a_plan_counts_them_and_a_check_of_prompts_refuses_them(unpaired, toy_model):
    recipe = unpaired()
    outlook = survey(Preparation.of(recipe, toy_model))
    assert (outlook.num_pairs, outlook.num_new, outlook.is_exact) == (13, 13, True)
    prepared = prepare(recipe, toy_model)
    lengths = rows_of(WeightStore(prepared.tokens.store), prepared.tokens.table).select(
        prompt=pl.col("prompt_ids").list.len(),
        responses=pl.sum_horizontal(pl.col("^.*(chosen|rejected)_ids$").list.len()),
    )
    assert outlook.new_tokens == pytest.approx(lengths.mean().row(0))
    with pytest.raises(
        InputError, match="check-prompts compares two responses to a prompt, and dataset.source .* has one"
    ):
        check_prompts(recipe)


def test_an_anchor_is_a_response_to_the_next_prompt(unpaired, toy_model):
    tokens = prepare(unpaired(), toy_model).tokens
    table = rows_of(WeightStore(tokens.store), tokens.table)
    others = OtherResponses(tokens)
    pair_ids = table["pair_id"].to_list()
    found = others.of(pair_ids)
    prompts = sorted({pair_id[:12] for pair_id in pair_ids})
    for row in table.to_dicts():
        following = prompts[(prompts.index(row["pair_id"][:12]) + 1) % len(prompts)]
        first = min(other for other in pair_ids if other.startswith(following))
        (other,) = (each for each in table.to_dicts() if each["pair_id"] == first)
        assert found[row["pair_id"]] == (other["chosen_ids"] or other["rejected_ids"])
        assert others.of([row["pair_id"]]) == {row["pair_id"]: found[row["pair_id"]]}  # whatever else is asked for


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights.estimator": "spans"}, "columns 'chosen_spans' and 'rejected_spans' are of pairs: choose another"),
        ({"weights.estimator": "diff"}, "estimator 'diff' compares two responses: choose another"),
        ({"weights.estimator": "head"}, "estimator 'head' learns from two responses to one prompt: choose an"),
        (
            {"contrast.method": "dpo"},
            "contrast.method 'dpo' trains on pairs: set contrast.method to 'sft', 'prompt' or",
        ),
        (
            {"contrast.method": "sft", "dataset.label_column": ""},
            "contrast.method 'sft' trains one model on undesirable responses, which rows without labels have not: set "
            "contrast.method to 'prompt' or 'given'",
        ),
        ({"weights.pair_weight": "margin"}, "weights.pair_weight 'margin' compares two responses: set it to 'none'"),
        (
            {"weights.scale": "calibrated"},
            "weights.scale 'calibrated' is fitted to which of two responses was preferred",
        ),
        (
            {"weights.estimator": "ti", "attribute.target": "dpo_margin"},
            "attribute.target 'dpo_margin' is of two responses: set it to 'max_logit' or 'gold_logps'",
        ),
    ],
)
def test_what_needs_two_responses_is_refused_before_a_model_starts(unpaired, toy_model, settings, message):
    with pytest.raises(InputError, match=f"pairs.jsonl has one response in a row, and {message}"):
        prepare(unpaired(**settings), toy_model)
    prepare(unpaired(), toy_model)
    with pytest.raises(InputError, match=message):  # also if there is nothing to read any more
        prepare(unpaired(**settings), toy_model)


def test_rows_of_one_label_train_no_contrastive_pair(unpaired, toy_model, tmp_path, write_jsonl):
    write_jsonl(tmp_path / "pairs.jsonl", unpaired_rows()[:8:2])
    recipe = unpaired(**{"contrast.method": "sft"})
    tokens = prepare(recipe, toy_model).tokens
    scored = score(tokens, {"ref": Scorer(toy_model)}, recipe.score, toy_model)["ref"].output
    uniform = publish(recipe, recipe.uniform, Ingredients(tokens, scored)).weights
    with pytest.raises(InputError, match=r"undesirable responses, and weights/toy/uniform@0 has no undesirable ones"):
        contrast(recipe.contrast_settings, toy_model, uniform)


def test_the_fingerprint_says_which_responses_are_the_anchors(unpaired, toy_model, tmp_path, write_jsonl):
    """A row keeps its anchor when rows are added, so that its numbers stay; a build of all rows at once may choose others."""
    settings = {"weights.estimator": "random", "dataset.source": str(tmp_path / "rows.jsonl")}
    write_jsonl(tmp_path / "rows.jsonl", unpaired_rows()[:6])
    first = build(unpaired(**settings), toy_model)
    write_jsonl(tmp_path / "rows.jsonl", unpaired_rows())
    recipe = unpaired(**settings, **{"model.path": str(toy_model)})
    planned = {stage.stage: stage for stage in plan(recipe)}
    changes = [change for change in planned["publish"].reasons if change.startswith("data.anchors: ")]
    assert [change.endswith('-> "to be computed"') for change in changes] == [True]
    grown = build(recipe, toy_model)
    other = {"store.uri": str(tmp_path / "other")}
    at_once, again = (build(unpaired(**settings, **other), toy_model) for _ in range(2))
    anchors = [
        dict(rows_of(WeightStore(each.weights.store), each.weights.table).select("pair_id", "anchor_ids").rows())
        for each in (first, grown, at_once)
    ]
    assert anchors[0].items() <= anchors[1].items()
    assert anchors[1] != anchors[2]
    assert len({each.weights.fingerprint for each in (first, grown, at_once)}) == 3
    assert (again.weights, again.is_new) == (at_once.weights, False)
    assert {stage.stage for stage in plan(recipe) if stage.action == "compute"} == {"report"}
    (lost,) = WeightStore(grown.weights.store).tables("anchors")
    shutil.rmtree(Path(grown.weights.store, lost.path))
    refilled = build(recipe, toy_model)  # all rows at once, so it has the anchors of such a build
    assert refilled.weights.fingerprint == at_once.weights.fingerprint
    rows = rows_of(WeightStore(refilled.weights.store), refilled.weights.table).select("pair_id", "anchor_ids").rows()
    assert dict(rows) == anchors[2]
    write_jsonl(tmp_path / "rows.jsonl", paired_rows())  # rows of the other kind take the place of all
    (publishing,) = (stage for stage in plan(recipe) if stage.stage == "publish")
    assert (publishing.action, publishing.num_pairs) == ("compute", 6)


def test_a_teacher_is_scored_once_and_students_learn_from_the_store(make_recipe, toy_model, tmp_path, write_jsonl):
    """Rows have no labels; the teacher is the model of the recipe, and is gone when the students train."""
    teacher = tmp_path / "teacher"
    shutil.copytree(toy_model, teacher)
    perturb(teacher)
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    settings = {"dataset.label_column": "", "score.top_k": 8, "weights.estimator": "uniform"}
    published = build(make_recipe(**settings, **{"weights.name": "toy/teacher", "model.path": str(teacher)}), teacher)
    statistics = published.statistics
    assert (statistics["num_pairs"], statistics["num_unpaired_rows"], statistics["ref_top_k"]) == (6, 6, 8)
    store = WeightStore(published.weights.store)
    assert [*verify(store, rows=True)] == []
    stored = rows_of(store, published.weights.table)
    assert (stored["rejected_ids"].list.len() == 0).all()
    assert (stored["chosen_ref_top_ids"].list.len() == 8 * stored["chosen_ids"].list.len()).all()
    itself = run_job(config_of(store, published, teacher, tmp_path / "itself", "distill"))
    assert abs(itself.before["loss"]) < 1e-5
    shutil.rmtree(teacher)
    once, more = (
        run_job(config_of(store, published, toy_model, tmp_path / str(steps), "distill", max_steps=steps))
        for steps in (1, 4)
    )
    assert once.before["loss"] == more.before["loss"] > 0.02
    assert more.after["loss"] < once.after["loss"] < once.before["loss"]


def perturb(folder):
    """Make another function of a model, with the same tokenizer."""
    model = load_checkpoint(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)


def test_from_a_file_to_a_trained_step(unpaired, toy_model, tmp_path):
    transforms = {"weights.transforms": ["mean_one", "smooth"], "weights.smooth_over": "words"}
    published = build(unpaired(**transforms, **{"score.top_k": 2}), toy_model)
    statistics = published.statistics
    assert (statistics["num_pairs"], statistics["num_unpaired_rows"], statistics["num_anchored_pairs"]) == (13, 13, 13)
    assert statistics["ref_top_k"] == 2
    assert "one response each" in statistics["held_out"]["tis"]["not_measured"]
    store = WeightStore(published.weights.store)
    assert [*verify(store, rows=True)] == []
    look_at(store, published, toy_model, tmp_path)
    result = run_job(config_of(store, published, toy_model, tmp_path / "tis_kto", "tis_kto"))
    assert result.before["loss"] == pytest.approx(0.5, abs=1e-3)  # z0 and all log-ratios are 0
    assert result.before["kl"] == pytest.approx(0, abs=1e-3)
    assert result.after["rewards/margins"] > 0.01
    assert "rewards/accuracies" not in result.after
    with pytest.raises(
        MismatchError, match=r"loss.name='dpo' compares two responses to a prompt, and 13 of 13 rows of "
    ):
        run_job(config_of(store, published, toy_model, tmp_path / "dpo", "dpo"))


def look_at(store, published, model, folder):
    """Everything that people look at a dataset with shows rows with one response."""
    survey = store.survey(published.name)
    assert (survey.num_pairs, survey.chosen.num_responses, survey.rejected.num_responses) == (13, 6, 7)
    assert survey.logratios is None
    html = Path(write_report(published, model).path).read_text(encoding="utf-8")
    assert "13 rows with one response" in html
    view = store.view(published.name, random=13)
    text = "\n".join(ansi.render(view, width=100, colours="none"))
    assert (text.count("chosen: none"), text.count("rejected: none")) == (7, 6)
    assert all(0 < pair.effective_share <= 1 for pair in view.pairs)
    assert heat_map.draw_pair(view.pairs[0], "svg")
    assert store.scan_tokens(published.name).collect().height == published.statistics["num_response_tokens"]
    assert store.export(published.name, folder / "parquet")
    with pytest.raises(MismatchError, match="has 13 rows with one response, and lines of jsonl have two; export it as"):
        store.export(published.name, folder / "jsonl", format="jsonl")
    difference = store.diff(published.name, published.name)
    assert (difference.num_common, difference.chosen.num_tokens_changed) == (13, 0)
    assert not difference.largest["mean_abs_change"].null_count()


def config_of(store, published, model, folder, loss, max_steps=1):
    return TrainConfig.model_validate({
        "data": {"store": str(store.root), "weights": published.name},
        "model": {"path": str(model)},
        "loss": {"name": loss, "beta": None if loss == "distill" else 0.5},
        "optim": {"learning_rate": 1e-3, "max_steps": max_steps, "pairs_per_step": 13, "tokens_per_batch": 128},
        "output": {"folder": str(folder)},
    })  # fmt: skip
