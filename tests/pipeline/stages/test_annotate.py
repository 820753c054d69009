"""Weights in columns of the source, from the file to the published dataset."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.chat.tokenizer import ChatTokenizer
from pipeline.recipe import Recipe, load_recipe
from pipeline.source.columns import check_source
from pipeline.source.pairs import Pair
from pipeline.stages import annotate as stage
from pipeline.stages.annotate import annotate
from pipeline.stages.prepare import prepare
from pipeline.stages.publish import Ingredients, publish
from weights_store import WeightStore
from weights_store.checks.vacuum import find_orphans
from weights_store.checks.verify import verify
from weights_store.errors import InputError
from weights_store.schemas import LOGPS
from weights_store.settings import apply_overrides, parse_settings

TEXTS = ("the baker mixes 🙂", "the sailor steers")


def row(index, **columns):
    return {"prompt": f"question {index}", "chosen": TEXTS[0], "rejected": TEXTS[1], **columns}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model that has a tokenizer and no weights: nothing here runs it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["</s>", "<|user|>", "<|assistant|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, "question", "steers the mixes"] * 3, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    wrapped.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    folder = tmp_path_factory.mktemp("model")
    wrapped.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 512, "max_position_embeddings": 512}')
    return folder


TURNS = [("assistant", "the mixes"), ("tool", "tool"), ("assistant", "the sailor")]
"""The result has a text that stands in the mark of its turn too."""


def chat(*turns):
    return [{"role": role, "content": text} for role, text in turns]


def by_weight(model, tokens, values):
    """The text of the chosen response of the first row, by the weight of its tokens; in order."""
    rows = WeightStore(tokens.store).table(tokens.table).scan(tokens.version).sort("source_row").collect()
    ids = rows["chosen_ids"][0].to_list()
    texts = dict.fromkeys(values, "")
    for text, value in zip(ChatTokenizer(model).token_texts(ids), values, strict=True):
        texts[value] += text
    return texts


@pytest.fixture
def recipe_of(tmp_path, model):
    """Return a function that makes a recipe of settings."""

    def make(**settings):
        sections = {
            "dataset": {"name": "toy", "source": str(tmp_path / "pairs.jsonl")},
            "model": {"path": str(model)},
            "weights": {"name": "toy/own", "estimator": "column"},
            "store": {"uri": str(tmp_path / "store")},
        }
        return parse_settings(
            Recipe, apply_overrides(sections, [f"{k}={json.dumps(v)}" for k, v in settings.items()]), "test"
        )

    return make


@pytest.fixture
def lengths(model):
    """The tokens of both responses without the end of the turn, and with it."""
    pair = Pair([{"role": "user", "content": "question 0"}], *TEXTS)
    tokens = ChatTokenizer(model).tokenize_pair(pair, 100, 100, cut_response=False)
    return len(tokens.chosen_ids), len(tokens.rejected_ids)


@pytest.fixture
def run(recipe_of, model, tmp_path):
    """Return a function that prepares and annotates rows; Parquet if so asked."""

    def run_on(rows, as_parquet=False, spread=None, **settings):
        path = tmp_path / ("pairs.parquet" if as_parquet else "pairs.jsonl")
        if as_parquet:
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(f"{json.dumps(each)}\n" for each in rows), encoding="utf-8")
        recipe = recipe_of(**{"dataset.source": str(path), "weights.estimator": "column", **settings})
        tokens = prepare(recipe, model).tokens
        return recipe, tokens, annotate(recipe, tokens, model, spread)

    return run_on


def rows_of(recipe, version):
    """The rows of a table by the row of the source."""
    store = WeightStore(recipe.store.uri)
    places = store.table(next(table.path for table in store.tables("tokens"))).scan().select("pair_id", "source_row")
    found = store.table(version.table).scan(version.version).join(places, on="pair_id").sort("source_row").collect()
    return found.drop("pair_id").rows_by_key("source_row", named=True, unique=True)


def quarantined(recipe):
    (table,) = WeightStore(recipe.store.uri).tables("quarantine")
    found = table.scan().filter(reason="bad_weights").sort("source_row").collect()
    return dict(found.select("source_row", "detail").iter_rows())


@pytest.mark.parametrize("as_parquet", [False, True])
def test_numbers_of_tokens_arrive_as_they_are(run, lengths, as_parquet):
    num_chosen, num_rejected = lengths
    numbers = [[0.25 * place for place in range(num_chosen)], [0.5] * num_rejected]
    given = {"chosen_weights": numbers[0], "rejected_weights": numbers[1]}
    short = {"chosen_weights": numbers[0][:-1], "rejected_weights": numbers[1][:-1]}  # without the end of the turn
    recipe, _, version = run([row(0, **given), row(1, **short)], as_parquet)
    found = rows_of(recipe, version)
    assert found[0] == {"chosen_values": numbers[0], "rejected_values": numbers[1], "pair_value": None}
    assert found[1]["chosen_values"] == [*numbers[0][:-1], 1.0]
    assert found[1]["rejected_values"] == [*numbers[1][:-1], 1.0]
    assert quarantined(recipe) == {}


def test_numbers_of_characters_become_those_of_tokens(run, model):
    numbers = {
        f"{side}_weights": list(range(len(text))) for side, text in zip(("chosen", "rejected"), TEXTS, strict=True)
    }
    recipe, tokens, version = run([row(0, **numbers)], **{"weights.per": "character"})
    found = rows_of(recipe, version)[0]["chosen_values"]
    ids = WeightStore(tokens.store).table(tokens.table).scan().collect()["chosen_ids"][0].to_list()
    tokenizer = ChatTokenizer(model)._tokenizer
    at, expected = 0, []
    for token in ids[:-1]:  # the smiley at the end is four tokens or fewer, which all have its number
        text = tokenizer.decode([token])
        size = 0 if "�" in text else len(text)
        expected.append(np.mean(range(at, at + size)) if size else len(TEXTS[0]) - 1)
        at += size
    np.testing.assert_allclose(found, [*expected, 1.0], rtol=2**-12)


def test_spans_and_pair_weights(run):
    columns = {"spans": [{"start": 4, "end": 9, "weight": 3}], "none": [], "w": 0.5}
    settings = {
        "weights.estimator": "spans",
        "weights.pair_weight": "column",
        "weights.rest": 2,
        "dataset.chosen_weights_column": "spans",
        "dataset.rejected_weights_column": "none",
        "dataset.pair_weight_column": "w",
    }
    recipe, _, version = run([row(0, **columns)], **settings)
    found = rows_of(recipe, version)[0]
    assert found["pair_value"] == 0.5
    assert set(found["rejected_values"][:-1]) == {2.0}
    # " baker" has a space of weight 2 and five letters of 3.
    assert sorted(set(found["chosen_values"])) == pytest.approx([1, 2, 17 / 6], rel=2**-12)
    assert found["chosen_values"][-1] == found["rejected_values"][-1] == 1.0  # the end of the turn


def test_the_example_of_the_docs_gives_the_weights_that_it_says(recipe_of, model, tmp_path, monkeypatch):
    page = (Path(__file__).resolve().parents[3] / "docs" / "weights.md").read_text(encoding="utf-8")
    part = page[page.index("## Bring your own weights") :]
    rows, toml = (re.search(rf"```{kind}\n(.*?)```", part, re.DOTALL)[1] for kind in ("json", "toml"))
    monkeypatch.chdir(tmp_path)
    Path("marked.jsonl").write_text(rows, encoding="utf-8")
    Path("marked.toml").write_text(toml, encoding="utf-8")
    recipe = load_recipe("marked.toml", [f"model.path={model}"], str(tmp_path / "store"))
    check_source(recipe.dataset, recipe.weight_columns)
    tokens = prepare(recipe, model).tokens
    found = rows_of(recipe, annotate(recipe, tokens, model))
    assert quarantined(recipe) == {}
    assert [each["pair_value"] for each in found.values()] == [1.0, 0.5]
    pairs = WeightStore(tokens.store).table(tokens.table).scan().sort("source_row").collect()
    decode = ChatTokenizer(model).token_texts
    marked = [
        "".join(text for text, value in zip(decode(ids), values, strict=True) if value != 1)
        for ids, values in zip(
            pairs["chosen_ids"].to_list(), [each["chosen_values"] for each in found.values()], strict=True
        )
    ]
    assert marked == ["1889", "Mary"]


def test_a_number_of_a_response_is_that_of_all_its_tokens(run):
    rows = [row(0, chosen_weights=3, rejected_weights=[0.5])]
    recipe, _, version = run(rows, **{"weights.per": "message"})
    found = rows_of(recipe, version)[0]
    assert (set(found["chosen_values"]), set(found["rejected_values"])) == ({3.0}, {0.5})


def test_each_message_of_a_response_has_its_own_number(run, model):
    given = row(0, chosen_weights=[2, 0, 3], rejected_weights=1) | {"chosen": chat(*TURNS)}
    recipe, tokens, version = run([given], **{"weights.per": "message"})
    # What opens the assistant's turn is no part of it: the model does not write it.
    assert by_weight(model, tokens, rows_of(recipe, version)[0]["chosen_values"]) == {
        2.0: "the mixes</s>",
        0.0: "<|tool|>tool<|assistant|>",
        3.0: "the sailor</s>",
    }


def test_characters_of_several_messages_are_counted_through(run, model):
    text = "".join(text for _, text in TURNS)
    spans = [[text.index("mixes"), text.index("mixes") + 5, 2], [text.index("tool"), text.index("tool") + 4, 0]]
    given = row(0, chosen_spans=spans, rejected_spans=[]) | {"chosen": chat(*TURNS)}
    recipe, tokens, version = run([given], **{"weights.estimator": "spans", "weights.rest": 0.5})
    values = [round(value, 2) for value in rows_of(recipe, version)[0]["chosen_values"]]
    found = by_weight(model, tokens, values)
    assert (found[1.0], found[0.0]) == ("</s><|tool|><|assistant|></s>", "tool")
    assert found[0.5] == "thethe sailor"
    assert sum(len(piece) for value, piece in found.items() if value > 1) == len(" mixes")


def test_roles_weigh_the_messages_of_tools(run, model, recipe_of, caplog):
    rows = [row(0, chosen=chat(*TURNS)), row(1)]
    patterns = [["sailor", 4], ["@code", 2], ["q*", 2]]
    settings = {"weights.estimator": "pattern", "weights.roles": [["tool", 0]], "weights.patterns": patterns}
    recipe, tokens, version = run(rows, **settings)
    found = rows_of(recipe, version)
    assert by_weight(model, tokens, found[0]["chosen_values"]) == {
        1.0: "the mixes</s>the sailor</s>",
        0.0: "<|tool|>tool<|assistant|>",
    }
    assert set(found[1]["chosen_values"]) == set(found[1]["rejected_values"]) == {1.0}
    ingredients = Ingredients(tokens, logps_of(tokens, "ref"), annotations=version)
    published = publish(recipe, recipe.weights, ingredients, tokenizer_folder=model)
    assert published.statistics["chosen"]["num_matches"] == [1, 0, 0]
    assert published.statistics["rejected"]["num_matches"] == [2, 0, 0]
    warned = [message for message in caplog.messages if message.startswith("publish: pattern")]
    assert warned == [
        f"publish: pattern {pattern!r} of weights.patterns matches nothing in any response"
        for pattern in ("@code", "q*")
    ]
    weights = rows_of(recipe, published.weights)[0]["chosen_token_weights"]
    by_piece = by_weight(model, tokens, [min(weight, 2.0) for weight in weights])  # a pattern counts more than the role
    assert (by_piece[0.0], by_piece[1.0]) == ("<|tool|>tool<|assistant|>", "the mixes</s>the</s>")
    other = recipe_of(**settings | {"weights.roles": [["tool", 0.5]], "dataset.source": recipe.dataset.source})
    changed = annotate(other, tokens, model)
    assert (changed.table, changed.fingerprint) != (version.table, version.fingerprint)


def test_a_role_without_a_message_is_named(run, caplog):
    run([row(0)], **{"weights.estimator": "pattern", "weights.roles": [["tool", 0], ["assistant", 2]]})
    assert "annotate: no response has a message of role tool, see weights.roles" in caplog.messages


@pytest.mark.parametrize("many_answers", ["refuse", "combine"])
def test_roles_of_unpaired_rows(run, model, many_answers):
    rows = [{"prompt": "question", "completion": chat(*TURNS), "label": True}]
    rows += [{"prompt": "question", "completion": text, "label": False} for text in TEXTS]
    settings = {"weights.estimator": "pattern", "weights.roles": [["tool", 0]], "dataset.many_answers": many_answers}
    recipe, tokens, version = run(rows, **settings)
    found = rows_of(recipe, version)
    assert by_weight(model, tokens, found[0]["chosen_values"])[0.0] == "<|tool|>tool<|assistant|>"
    assert (found[0]["rejected_values"], found[1]["chosen_values"]) == ([], [])
    assert set(found[1]["rejected_values"]) == {1.0}
    ingredients = Ingredients(tokens, logps_of(tokens, "ref"), annotations=version)
    assert publish(recipe, recipe.weights, ingredients, tokenizer_folder=model).statistics["num_unpaired_rows"] == 3


def test_roles_of_rows_with_several_answers(run):
    answers = [chat(*TURNS), chat(*TURNS[:1]), chat(("assistant", "question"))]
    rows = [row(0, chosen=answers[:2], rejected=answers[2:]), row(1)]
    settings = {"weights.estimator": "pattern", "weights.roles": [["tool", 0]], "dataset.many_answers": "combine"}
    _, tokens, version = run(rows, **settings)
    values = WeightStore(tokens.store).table(version.table).scan().collect()["chosen_values"].to_list()
    assert sorted(0.0 in each for each in values) == [False, False, True]


@pytest.mark.parametrize("unit", ["message", "token"])
def test_each_answer_of_a_row_has_its_own_cell(run, lengths, unit):
    def cell(number, side=0):
        return number if unit == "message" else [number] * lengths[side]

    answers = {"chosen": [TEXTS[0], TEXTS[0]], "chosen_weights": [cell(2.0), cell(3.0)], "pair_weight": 5}
    listed = {"rejected": [TEXTS[1]], "rejected_weights": [cell(1.0, 1)]}
    rows = [
        row(0, rejected_weights=cell(4.0, 1))
        | answers,  # a rejected answer that is no list; both chosen ones are the same
        row(1) | answers | listed | {"chosen_weights": [cell(2.0)]},
        row(2) | listed | {"chosen": ["question", TEXTS[0]], "chosen_weights": [None, cell(3.0)], "pair_weight": 6},
    ]
    settings = {"weights.per": unit, "dataset.many_answers": "combine", "weights.pair_weight": "column"}
    recipe, _, version = run(rows, **settings)
    found = rows_of(recipe, version)
    sides = [set(found[row][f"{side}_values"]) for row in (0, 2) for side in ("chosen", "rejected")]
    assert sides == [{2.0}, {4.0}, {3.0}, {1.0}]
    assert [each["pair_value"] for each in found.values()] == [5.0, 6.0]
    problems = quarantined(recipe)
    assert "is no list of weights for each of 2 answers, as its response lists them" in problems[1]
    assert "column 'chosen_weights': it has no value" in problems[2]


def test_weights_that_cannot_be_used_are_quarantined_with_the_reason(run, lengths):
    chosen, rejected = ([1.0] * number for number in lengths)
    rows = [
        row(0, chosen_weights=chosen, rejected_weights=rejected),
        row(1, chosen_weights=chosen[2:], rejected_weights=rejected),
        row(2, chosen_weights=chosen, rejected_weights=[*rejected[:-1], float("nan")]),
        row(3, chosen_weights=None, rejected_weights=rejected),
        row(4, chosen_weights=[-1.0, *chosen[1:]], rejected_weights=rejected),
        row(5, chosen_weights="1 1 1", rejected_weights=rejected),
        row(0, chosen_weights="of a duplicate", rejected_weights=None),
    ]
    recipe, _, version = run(rows)
    assert list(rows_of(recipe, version)) == [0]
    found = quarantined(recipe)
    problems = {row: detail.removeprefix(f"{version.table}: ").partition(" (pair ")[0] for row, detail in found.items()}
    last = lengths[1] - 1
    assert problems == {
        1: f"column 'chosen_weights': {lengths[0] - 2} numbers for a response of {lengths[0]} tokens; expected one for each, "
        f"or {lengths[0] - 1} without the end of its turn",
        2: f"column 'rejected_weights': number {last} is nan, expected a finite number >= 0",
        3: "column 'chosen_weights': it has no value",
        4: "column 'chosen_weights': number 0 is -1, expected a finite number >= 0",
        5: "column 'chosen_weights': \"1 1 1\" is no list of numbers",
    }


def test_the_reason_in_quarantine_is_that_of_the_newest_source(run, lengths, monkeypatch):
    """Also if no good row has changed, and of a source whose content is not known, such as a hub dataset's."""
    good = row(0, chosen_weights=[1.0] * lengths[0], rejected_weights=[2.0] * lengths[1])
    recipe, _, first = run([good, row(1, chosen_weights=[-1.0] * lengths[0], rejected_weights=[1.0])])
    record = WeightStore(recipe.store.uri).table(first.table).metadata()["annotation"]
    monkeypatch.setattr(stage.Annotation, "record", record)
    monkeypatch.setattr(stage.Annotation, "is_there", False)
    recipe, _, again = run([good, row(1, chosen_weights="none", rejected_weights=[1.0])])
    assert again == first
    assert '"none" is no list of numbers' in quarantined(recipe)[1]


def test_a_source_without_any_usable_weight_says_why(run, recipe_of):
    with pytest.raises(
        InputError,
        match=r"none of 2 pairs has weights in 'chosen_weights', 'rejected_weights' that can be used, for ex",
    ):
        run([row(index, chosen_weights=[1], rejected_weights=[1]) for index in range(2)])
    assert list(quarantined(recipe_of())) == [0, 1]


def test_a_column_that_is_not_there_is_named_before_anything_is_read(recipe_of, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row(0, chosen_weight=[1], rejected_weights=[1])), encoding="utf-8")
    recipe = recipe_of(**{"weights.estimator": "column"})
    with pytest.raises(
        InputError,
        match=r"has no column 'chosen_weights'; .* Set dataset.chosen_weights_column; nearest: 'chosen_weight'$",
    ):
        check_source(recipe.dataset, recipe.weight_columns)


def logps_of(tokens, scorer):
    """Made-up log-probs of every pair."""
    store = WeightStore(tokens.store)
    pairs = store.table(tokens.table).scan(tokens.version).collect()
    columns = {f"{side}_logps": [[-1.0] * len(ids) for ids in pairs[f"{side}_ids"]] for side in ("chosen", "rejected")}
    rows = pa.table(
        {"pair_id": pairs["pair_id"].to_list(), **columns, **{name: [None] * pairs.height for name in LOGPS.names[3:]}}
    )
    metadata = {"fingerprint": f"{scorer}-{pairs.height}", "statistics": {}}
    return store.table(f"logps/{tokens.table.partition('/')[2]}/{scorer}").append(rows.cast(LOGPS), metadata)


def published(recipe, tokens, annotations):
    return publish(recipe, recipe.weights, Ingredients(tokens, logps_of(tokens, "ref"), annotations=annotations))


def test_published_weights_follow_the_source(run, lengths, tmp_path):
    def rows(number, *more):
        given = {"chosen_weights": [number] * lengths[0], "rejected_weights": [1.0] * lengths[1], "pair_weight": 2}
        return [row(index, **given) for index in range(3)] + list(more)

    settings = {"weights.pair_weight": "column", "weights.transforms": ["decay"], "weights.decay_gamma": 0.5}
    bad = row(3, chosen_weights=[1], rejected_weights=[1], pair_weight=1)
    first = published(*run(rows(4.0, bad), **settings))
    assert first.statistics["num_pairs"] == 3
    assert first.statistics["quarantined"] == {"bad_weights": 1}
    assert first.statistics["num_source_rows"] == 4
    weights = WeightStore(first.weights.store).scan("toy/own").collect()
    assert weights["chosen_token_weights"][0].to_list()[:3] == [2.0, 1.0, 0.5]  # 4 * 0.5 ** t, t from 1
    assert weights["pair_weight"].to_list() == [2.0] * 3

    again = published(*run(rows(4.0, bad), **settings))
    assert (again.is_new, again.weights) == (False, first.weights)

    recipe, tokens, changed = run(rows(8.0), **settings)  # other weights of the same pairs, and the bad row is gone
    second = published(recipe, tokens, changed)
    assert second.is_new
    assert second.statistics["num_source_rows"] == second.statistics["num_pairs"] == 3
    assert quarantined(recipe) == {}
    assert any(change.startswith("data.annotations: ") for change in second.changes)
    lineage = WeightStore(first.weights.store).lineage("toy/own")
    assert (changed.table, changed.version) in lineage.filter(role="annotations").select("name", "version").rows()
    weights = WeightStore(first.weights.store).scan("toy/own").collect()
    assert {weights[0] for weights in weights["chosen_token_weights"].to_list()} == {4.0}

    good = row(4, chosen_weights=[2.0] * lengths[0], rejected_weights=[1.0] * lengths[1], pair_weight=0)
    third = published(*run(rows(8.0, good), **settings))  # a pair is appended
    weights = WeightStore(first.weights.store).scan("toy/own").collect()
    assert sorted(weights[0] for weights in weights["chosen_token_weights"].to_list()) == [1.0, 4.0, 4.0, 4.0]
    assert sorted(weights["pair_weight"].to_list()) == [0.0, 2.0, 2.0, 2.0]
    assert third.statistics["num_source_rows"] == 4
    assert list(verify(WeightStore(first.weights.store), rows=True)) == []


def test_nothing_is_read_again_if_nothing_has_changed(run, lengths, monkeypatch):
    rows = [row(0, chosen_weights=[1.0] * lengths[0], rejected_weights=[2.0] * lengths[1])]
    _, _, first = run(rows)
    monkeypatch.setattr(stage, "open_source", lambda _: pytest.fail("the source was read"))
    assert run(rows)[2] == first


def test_a_bad_row_stays_in_quarantine_when_the_source_grows(run, lengths, recipe_of, model):
    good = {"chosen_weights": [1.0] * lengths[0], "rejected_weights": [2.0] * lengths[1]}
    bad = row(1, chosen_weights=[1], rejected_weights=[1])
    run([row(0, **good), bad])
    recipe, tokens, version = run([row(0, **good), bad, row(2, **good)])
    assert list(quarantined(recipe)) == [1]
    assert list(rows_of(recipe, version)) == [0, 2]
    # A build that does not need the weights leaves them alone.
    prepare(recipe_of(**{"dataset.source": recipe.dataset.source, "weights.estimator": "uniform"}), model)
    assert list(quarantined(recipe)) == [1]
    assert list(verify(WeightStore(tokens.store), rows=True)) == []


def test_many_ranges_elsewhere_give_the_same_table(run, lengths, monkeypatch, elsewhere):
    rows = [
        row(index, chosen_weights=[index % 7] * lengths[0], rejected_weights=[1.0] * (lengths[1] if index % 10 else 1))
        for index in range(300)
    ]
    recipe, tokens, first = run(rows)
    monkeypatch.setattr(stage, "_RANGE_BYTES", 1 << 12)
    monkeypatch.setattr(stage, "_PLACES_BYTES", 1 << 10)
    monkeypatch.setattr(stage.Annotation, "is_there", False)
    again = annotate(recipe, tokens, Path(recipe.model.path), elsewhere)
    assert again == first  # the same rows make no new version
    assert list(verify(WeightStore(tokens.store), rows=True)) == []
    assert len(quarantined(recipe)) == 30
    assert list(find_orphans(WeightStore(tokens.store))) == []


def test_a_source_that_changed_during_the_build_is_found(run, lengths, recipe_of, model, monkeypatch):
    good = {"chosen_weights": [1.0] * lengths[0], "rejected_weights": [2.0] * lengths[1]}
    recipe, tokens, _ = run([row(index, **good) for index in range(3)])
    monkeypatch.setattr(stage.Annotation, "is_there", False)
    path = Path(recipe.dataset.source)
    path.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[:2]), encoding="utf-8")
    with pytest.raises(InputError, match="it has changed during the build; run again$"):
        annotate(recipe, tokens, model)


def test_the_numbers_of_a_file_are_never_python_objects(tmp_path):
    from pipeline.source.arrow_files import parquet

    lists = pa.array([[1.0, 2.0], None, [], [3.0]], pa.list_(pa.float32()))
    with_null = pa.array([[1.0, None], None, [], [3.0]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"a": lists, "b": with_null}), tmp_path / "x.parquet")
    found = [row.value for row in parquet(tmp_path / "x.parquet").rows({"a", "b"})]
    assert [value["a"] if value["a"] is None else value["a"].tolist() for value in found] == [
        [1.0, 2.0],
        None,
        [],
        [3.0],
    ]
    assert all(isinstance(value["a"], np.ndarray) for value in found if value["a"] is not None)
    assert [value["b"] for value in found] == [[1.0, None], None, [], [3.0]]
    assert [
        row.value["a"].tolist() for row in parquet(tmp_path / "x.parquet").rows({"a"}) if row.value["a"] is not None
    ] == [
        [1.0, 2.0],
        [],
        [3.0],
    ]
