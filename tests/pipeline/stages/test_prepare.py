import json
import re
from collections import Counter
from dataclasses import replace

import polars as pl
import pyarrow as pa
import pytest

from pipeline.chat.tokenizer import RENDERING_VERSION, ChatTokenizer, Condition
from pipeline.dry_run.source import survey
from pipeline.engine.contract import EngineSettings
from pipeline.stages.prepare import Preparation, prepare
from pipeline.workers.missing import pairs_of
from pipeline.workers.request import Request, Target
from tests.pipeline.chat.template_kinds import ZEPHYR
from weights_store import Table, WeightStore
from weights_store.checks.verify import verify
from weights_store.errors import InputError, StoreError
from weights_store.fingerprint import fingerprint
from weights_store.names import quarantine_path
from weights_store.schemas import QUARANTINE


def assistant(content):
    return [{"role": "assistant", "content": content}]


def pair(index, chosen="the baker mixes", rejected="the sailor steers"):
    prompt = [{"role": "user", "content": f"question {index}"}]
    return {"prompt": prompt, "chosen": assistant(chosen), "rejected": assistant(rejected)}


BAD_ROWS = [
    (b'{"prompt": "p", "chosen": "a", ', "unparsable_json"),
    (b'{"prompt": "p", "chosen": "\xff\xfe", "rejected": "b"}', "invalid_utf8"),
    (b"[1, 2]", "unparsable_json"),
    ({"prompt": "p", "chosen": "a", "rejected": None}, "missing_value"),
    ({"prompt": "p", "chosen": 17, "rejected": "b"}, "not_text"),
    ({"prompt": "p", "chosen": "", "rejected": "b"}, "empty_response"),
    ({"prompt": "p", "chosen": "same", "rejected": "same"}, "chosen_equals_rejected"),
    ({"prompt": "p", "chosen": "word " * 90, "rejected": "b"}, "response_too_long"),
    ({"prompt": "word " * 200, "chosen": "a", "rejected": "b"}, "prompt_too_long"),
    ({"chosen": "\n\nHuman: q", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "no_final_assistant_turn"),
    ({"chosen": "a", "rejected": "b"}, "no_prompt"),
    (b'{"prompt": "p", "chosen": "\\ud800", "rejected": "b"}', "invalid_utf8"),
    (pair(1), "duplicate_pair"),
]


@pytest.fixture
def run(make_recipe, toy_model, tmp_path, write_jsonl):
    def run_on(rows, **settings):
        write_jsonl(tmp_path / "pairs.jsonl", rows)
        settings = {"dataset.max_response_tokens": 60, "dataset.max_prompt_tokens": 100, **settings}
        recipe = make_recipe(**settings)
        return prepare(recipe, toy_model)

    return run_on


def tables(prepared):
    store = WeightStore(prepared.tokens.store)
    tokens = store.table(prepared.tokens.table).scan(prepared.tokens.version).collect()
    return tokens, store.table(quarantine_path(prepared.tokens.table)).scan().collect()


def test_every_bad_row_is_quarantined_with_its_reason_and_the_rest_goes_on(run):
    rows = [pair(0), pair(1), *(row for row, _ in BAD_ROWS), pair(2)]
    prepared = run(rows)
    tokens, quarantine = tables(prepared)
    assert prepared.quarantined == dict(Counter(reason for _, reason in BAD_ROWS))
    by_row = dict(zip(quarantine["source_row"], quarantine["reason"], strict=True))
    assert by_row == {2 + index: reason for index, (_, reason) in enumerate(BAD_ROWS)}
    assert sorted(tokens["source_row"]) == [0, 1, 2 + len(BAD_ROWS)]
    assert prepared.num_source_rows == len(rows) == tokens.height + quarantine.height


def test_quarantine_keeps_what_was_in_the_row(run):
    _, quarantine = tables(run([pair(0), BAD_ROWS[0][0], BAD_ROWS[1][0]]))
    assert quarantine["raw"][0] == '{"prompt": "p", "chosen": "a",'
    assert "\ufffd" in quarantine["raw"][1]


def test_same_file_again_does_nothing(run):
    first = run([pair(0), pair(1), BAD_ROWS[0][0]])
    again = run([pair(0), pair(1), BAD_ROWS[0][0]])
    assert (again.tokens, again.num_new_pairs) == (first.tokens, 0)
    assert again.quarantined == first.quarantined


def test_appended_rows_make_a_version_with_only_them_new(run):
    first = run([pair(0), pair(1)])
    second = run([pair(0), pair(1), pair(2)])
    assert (second.num_new_pairs, second.tokens.version) == (1, first.tokens.version + 1)
    assert tables(second)[0].height == 3
    assert tables(first)[0].height == 2


def test_pairs_that_left_the_source_leave_the_newest_version(run):
    first = run([pair(0), pair(1), pair(2)])
    second = run([pair(2), pair(0), pair(3)])
    kept = set(tables(second)[0]["pair_id"])
    assert len(kept) == 3
    assert len(kept & set(tables(first)[0]["pair_id"])) == 2
    assert tables(first)[0].height == 3


def test_pairs_that_moved_in_the_source_are_recorded_where_they_stand_now(run):
    run([pair(0), pair(1)])
    moved = run([BAD_ROWS[0][0], pair(1), pair(0), pair(2)])
    tokens, quarantine = tables(moved)
    assert (moved.num_new_pairs, quarantine["source_row"].to_list()) == (1, [0])
    by_question = {
        json.loads(row["prompt"])["messages"][0]["content"]: row["source_row"] for row in tokens.iter_rows(named=True)
    }
    assert by_question == {"question 1": 1, "question 0": 2, "question 2": 3}


def test_columns_read_the_other_way_round_turn_every_pair(run):
    first, _ = tables(run([pair(0), pair(1)]))
    swapped = run([pair(0), pair(1)], **{"dataset.chosen_column": "rejected", "dataset.rejected_column": "chosen"})
    second, _ = tables(swapped)
    assert second["chosen_ids"].to_list() == first["rejected_ids"].to_list()
    assert set(second["pair_id"]).isdisjoint(first["pair_id"])


def test_another_split_name_reaches_the_rows_that_were_there(run):
    first = run([pair(0)])
    second = run([pair(0)], **{"dataset.split": "validation"})
    assert tables(second)[0]["split"].to_list() == ["validation"]
    assert second.tokens.fingerprint != first.tokens.fingerprint


def of_split(index, split):
    return {**pair(index), "fold": split}


def test_a_column_gives_each_row_its_split(run):
    rows = [of_split(0, "train"), of_split(1, "test"), of_split(2, None), of_split(3, 7), pair(4)]
    prepared = run(rows, **{"dataset.split_column": "fold"})
    tokens, quarantine = tables(prepared)
    assert dict(zip(tokens["source_row"], tokens["split"], strict=True)) == {0: "train", 1: "test"}
    assert dict(zip(quarantine["source_row"], quarantine["reason"], strict=True)) == {
        2: "missing_value",
        3: "not_text",
        4: "missing_value",
    }
    assert quarantine["detail"][1] == "column 'fold' is a int, expected the name of a split"


def test_a_row_that_changed_its_split_is_recorded_in_the_new_one(run):
    column = {"dataset.split_column": "fold"}
    first = run([of_split(0, "train"), of_split(1, "train")], **column)
    second = run([of_split(0, "train"), of_split(1, "test")], **column)
    assert second.num_new_pairs == 0
    assert sorted(tables(second)[0]["split"]) == ["test", "train"]
    assert second.tokens.fingerprint != first.tokens.fingerprint
    assert run([of_split(0, "train"), of_split(1, "test")], **column).tokens == second.tokens


def test_no_pair_of_the_split_that_contrastive_models_train_on_is_said_before_anything_is_scored(run):
    rows = [of_split(0, "training"), of_split(1, "test"), of_split(2, "test")]
    column = {"dataset.split_column": "fold"}
    with pytest.raises(
        InputError,
        match=r"the weights learn from split 'train', of which there is no pair; .*pairs.jsonl has test \(2 pairs\), "
        r"training \(1 pairs\)\. Name one of them in contrast.split",
    ):
        run(rows, **column)
    assert run(rows, **column, **{"contrast.split": "training"}).num_pairs == 3
    assert run(rows[1:], **column, **{"contrast.method": "prompt"}).num_pairs == 2  # trains nothing


def test_byte_order_mark_is_no_broken_line(run, tmp_path, make_recipe, toy_model):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(pair(0)).encode())
    prepared = prepare(make_recipe(**{"dataset.source": str(path)}), toy_model)
    assert (prepared.num_pairs, prepared.quarantined) == (1, {})


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.json"])
@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_files_that_are_not_what_they_are_called_say_so(tmp_path, make_recipe, toy_model, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"dataset.source .*{name} is not"):
        prepare(make_recipe(**{"dataset.source": str(tmp_path / name)}), toy_model)


def test_another_limit_is_another_table(run):
    first = run([pair(0)])
    second = run([pair(0)], **{"dataset.max_response_tokens": 59})
    assert first.tokens.table != second.tokens.table


def test_max_pairs_takes_the_first_rows(run):
    prepared = run([pair(index) for index in range(5)], **{"dataset.max_pairs": 2})
    assert sorted(tables(prepared)[0]["source_row"]) == [0, 1]


def test_a_source_without_a_usable_pair_says_what_was_wrong(run):
    with pytest.raises(
        InputError, match="no usable pair in 2 rows .*1 unparsable_json, 1 not_text|1 not_text, 1 unparsable_json"
    ):
        run([BAD_ROWS[0][0], BAD_ROWS[4][0]])


def test_a_missing_column_names_the_columns_that_are_there(run):
    with pytest.raises(
        InputError, match=r"no column 'better'; it has prompt, chosen, rejected\. Set dataset.chosen_column"
    ):
        run([pair(0)], **{"dataset.chosen_column": "better"})


def test_parquet_json_and_jsonl_of_the_same_rows_give_the_same_pairs(run, tmp_path, make_recipe, toy_model):
    rows = [pair(0), pair(1)]
    ids = {".jsonl": set(tables(run(rows))[0]["pair_id"])}
    pl.DataFrame(rows).write_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.json").write_text(json.dumps(rows))
    for suffix in (".parquet", ".json"):
        recipe = make_recipe(**{"dataset.source": str(tmp_path / f"x{suffix}"), "dataset.name": f"toy{suffix[1:]}"})
        ids[suffix] = set(tables(prepare(recipe, toy_model))[0]["pair_id"])
    assert ids[".jsonl"] == ids[".parquet"] == ids[".json"]


def test_saved_dataset_folder_is_read_like_a_hub_dataset(run, tmp_path, make_recipe, toy_model):
    from datasets import Dataset

    ids = set(tables(run([pair(0), pair(1)]))[0]["pair_id"])
    Dataset.from_list([pair(0), pair(1)]).save_to_disk(str(tmp_path / "saved"))
    recipe = make_recipe(**{"dataset.source": str(tmp_path / "saved"), "dataset.name": "saved"})
    first = prepare(recipe, toy_model)
    assert set(tables(first)[0]["pair_id"]) == ids
    assert prepare(recipe, toy_model).tokens == first.tokens  # read again, found the same


def test_the_same_pairs_among_other_bad_rows_make_a_version_that_says_so(run):
    first = run([pair(0), pair(1)])
    second = run([pair(0), BAD_ROWS[0][0], pair(1)])
    assert (second.num_source_rows, second.num_new_pairs, second.quarantined) == (3, 0, {"unparsable_json": 1})
    assert second.tokens.version == first.tokens.version + 1
    assert (
        second.tokens.fingerprint == first.tokens.fingerprint
    )  # the pairs are the same: nothing after prepare has to run again


@pytest.mark.parametrize("second_rows", [[0, 1, 2, 3, 4, 5, 6, 7], [6, 2, 9, 0, 8]])
def test_little_memory_gives_the_same_tables(run, monkeypatch, second_rows):
    # Appended, and once with pairs that left, moved and came, with memory for about one pair at a time.
    def both_builds(name):
        run([*(pair(index) for index in range(5)), pair(3), BAD_ROWS[0][0]], **{"dataset.name": name})
        prepared = run([*(pair(index) for index in second_rows), BAD_ROWS[1][0]], **{"dataset.name": name})
        tokens, quarantine = tables(prepared)
        return prepared, tokens.sort("pair_id"), quarantine.sort("source_row")

    roomy, tokens, quarantine = both_builds("roomy")
    monkeypatch.setattr("pipeline.source.external_sort.DEFAULT_BYTES", 300)
    monkeypatch.setattr("pipeline.stages.prepare_ranges.ROWS_PER_BATCH", 2)
    monkeypatch.setattr("pipeline.source.intake.ROWS_PER_BATCH", 2)
    tight, tight_tokens, tight_quarantine = both_builds("tight")
    assert tight_tokens.equals(tokens)
    assert tight_quarantine.equals(quarantine)
    assert tight.tokens.fingerprint == roomy.tokens.fingerprint
    assert (tight.num_new_pairs, tight.quarantined) == (roomy.num_new_pairs, roomy.quarantined)


def test_what_a_scorer_could_not_score_stays_in_quarantine_when_rows_are_added(run):
    first = run([pair(0), pair(1)])
    table = WeightStore(first.tokens.store).table(quarantine_path(first.tokens.table))
    pair_id = tables(first)[0]["pair_id"][0]
    row = {"source_row": 0, "pair_id": pair_id, "reason": "unscorable", "detail": "logps/x: too long", "raw": ""}
    table.append(pa.Table.from_pylist([row], QUARANTINE), table.metadata())
    _, quarantine = tables(run([pair(0), pair(1), BAD_ROWS[0][0]]))
    assert quarantine["reason"].to_list() == ["unscorable", "unparsable_json"]


def test_another_build_of_the_same_dataset_that_was_faster_is_compared_with_again(run, monkeypatch):
    # The other build appends pair 2 between our look and our first commit.
    run([pair(0), pair(1)])
    original, raced = Table.commit, []

    def commit(table, *args, **settings):
        if not raced:
            raced.append(True)
            run([pair(0), pair(1), pair(2)])
        return original(table, *args, **settings)

    monkeypatch.setattr(Table, "commit", commit)
    prepared = run([pair(0), pair(1), pair(2), pair(3)])
    assert raced
    assert sorted(tables(prepared)[0]["source_row"]) == [0, 1, 2, 3]
    assert prepared.num_new_pairs == 1


def test_another_limit_says_what_differs(run, make_recipe, toy_model, caplog):
    run([pair(0)])
    caplog.set_level("INFO", "tokenweights")
    settings = {"dataset.max_response_tokens": 59, "dataset.max_prompt_tokens": 100}
    prepare(make_recipe(**settings), toy_model)
    assert "is a new table; unlike tokens/toy-" in caplog.text
    assert "max_response_tokens: 60 -> 59" in caplog.text


def test_real_transcripts(shared_folder, make_recipe):
    recipe = make_recipe(**{"dataset.source": str(shared_folder / "data" / "hh_harmless.jsonl"), "dataset.name": "hh"})
    prepared = prepare(recipe, shared_folder / "models" / "tiny-chat")
    assert prepared.num_source_rows == 1775
    assert prepared.num_pairs + sum(prepared.quarantined.values()) == 1775
    assert prepared.quarantined == {"empty_response": 3, "prompts_differ": 4}


# --- sources without a usable row --------------------------------------------------------------------------------------


def store_of(make_recipe):
    return WeightStore(make_recipe().store.uri)


def test_a_source_without_a_usable_row_shows_an_example_of_each_reason_and_leaves_a_quarantine(run, make_recipe):
    rows = [{"chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "word " * 90, "rejected": "b"}, b"[1, 2]"]
    with pytest.raises(InputError) as caught:
        run(rows)
    assert str(caught.value).split("; ")[1:] == [
        "no_prompt: row 0: nothing in column 'prompt' and no turns before the response, in "
        '{"chosen": "a", "rejected": "b"}',
        "unparsable_json: row 2: a list, expected an object, in [1, 2]",
        "response_too_long: row 1: chosen has 183 tokens, limit dataset.max_response_tokens = 60, in "
        + str(caught.value).rpartition(", in ")[2],
    ]
    quarantine = store_of(make_recipe).quarantine("toy").collect()
    found = dict(quarantine.select("source_row", "reason").iter_rows())
    assert found == {0: "no_prompt", 1: "response_too_long", 2: "unparsable_json"}


def test_a_later_source_without_a_usable_row_keeps_the_pairs_and_the_store_in_order(run, make_recipe):
    good = [pair(0), BAD_ROWS[0][0]]
    first = run(good)
    with pytest.raises(InputError, match="no usable pair in 1 rows"):
        run([BAD_ROWS[4][0]])
    store = store_of(make_recipe)
    assert store.quarantine("toy").collect()["reason"].to_list() == ["not_text"]
    assert list(verify(store, rows=True)) == []
    again = run(good)
    assert (again.num_pairs, again.num_new_pairs, again.quarantined) == (1, 0, first.quarantined)
    assert store.quarantine("toy").collect()["reason"].to_list() == ["unparsable_json"]
    assert run(good).tokens == again.tokens


# --- scores ------------------------------------------------------------------------------------------------------------

QUALITY = {"weights.estimator": "uniform", "weights.pair_weight": "quality", "weights.name": "toy/quality"}


@pytest.mark.parametrize(
    ("scores", "num_lacking"),
    [([{}, {}], 2), ([{"score_chosen": 1, "score_rejected": 0}, {"score_chosen": 1, "score_rejected": None}], 1)],
)
def test_weights_from_scores_without_scores_are_refused_before_a_model_starts(
    run, make_recipe, toy_model, scores, num_lacking
):
    rows = [pair(index) | score for index, score in enumerate(scores)]
    message = f"'quality' needs annotators' scores of both responses, and {num_lacking} of 2 pairs .* lack one"
    with pytest.raises(InputError, match=message):
        run(rows, **QUALITY)
    with pytest.raises(InputError, match=message):
        survey(Preparation.of(make_recipe(**QUALITY), toy_model))
    run(rows)  # without them it is a source like any other
    with pytest.raises(InputError, match=message):  # also if the pairs are there already
        run(rows, **QUALITY)


def test_prompts_by_name_only_that_contradict_the_chats_are_counted(run, caplog):
    def chat(answer):
        return [{"role": "user", "content": "bada"}, {"role": "assistant", "content": answer}]

    rows = [{"question": text, "chosen": chat("lumi"), "rejected": chat(f"zu {text}")} for text in ("bada", "mo", "ka")]
    tokens, quarantine = tables(run(rows))
    assert (len(tokens), len(quarantine)) == (3, 0)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        "prepare: column 'question' is not read in 2 pairs, because it is not the prompt of the chats in 'chosen' and "
        "'rejected'; the first one is in row 1; set dataset.prompt_column to another column, or to \"\" for none"
    ]


def test_scores_that_are_no_numbers_are_stored_as_null_and_counted(run, caplog):
    scores = [{"score_chosen": float("inf"), "score_rejected": "4.5"}, {"score_chosen": 1e39, "score_rejected": None}]
    tokens, _ = tables(run([pair(index) | score for index, score in enumerate(scores)]))
    by_row = {row["source_row"]: (row["chosen_score"], row["rejected_score"]) for row in tokens.iter_rows(named=True)}
    assert by_row == {0: (None, 4.5), 1: (None, None)}
    warning = (
        "2 scores are stored as null, because they are no finite numbers of float32; the first one, in row 0, is 'inf'"
    )
    assert warning in caplog.text


def test_other_columns_of_scores_in_the_same_file_are_read_again(run):
    rows = [pair(0) | {"score_chosen": 5, "score_rejected": 4, "chosen_rating": 2, "rejected_rating": 1}]
    first, _ = tables(run(rows))
    named = {"dataset.chosen_score_column": "chosen_rating", "dataset.rejected_score_column": "rejected_rating"}
    second, _ = tables(run(rows, **named))
    assert (first["chosen_score"][0], second["chosen_score"][0]) == (5.0, 2.0)


def test_scores_that_were_corrected_in_the_source_replace_the_stored_ones(run):
    rows = [pair(index) | {"score_chosen": 5, "score_rejected": 4} for index in range(3)]
    first = run(rows)
    rows[1]["score_chosen"] = 0.1
    second = run(rows)
    scores = {row["source_row"]: row["chosen_score"] for row in tables(second)[0].iter_rows(named=True)}
    assert scores == {0: 5.0, 1: pytest.approx(0.1), 2: 5.0}
    assert (second.num_new_pairs, second.tokens.fingerprint == first.tokens.fingerprint) == (0, False)
    assert run(rows).tokens == second.tokens


def test_a_column_that_appears_later_is_read_for_the_old_rows_too(run):
    first = run([pair(0), pair(1)])
    second = run([pair(0), pair(1) | {"system": "Be brief."}])
    prompts = {
        row["source_row"]: json.loads(row["prompt"])["messages"] for row in tables(second)[0].iter_rows(named=True)
    }
    assert [message["role"] for message in prompts[1]] == ["system", "user"]
    assert second.tokens.fingerprint != first.tokens.fingerprint


def test_several_answers_balance_with_the_rows_that_they_stand_for(run, make_recipe):
    rows = [
        {"prompt": "p", "chosen": ["a", "b", "word " * 90], "rejected": ["c", "d"]},
        {"prompt": "p", "chosen": "a", "rejected": ["c", ""]},
    ]
    prepared = run(rows, **{"dataset.many_answers": "combine"})
    # Row 0: 3 x 2 combinations, of which 2 are too long. Row 1: the pair a, c again, and an empty answer.
    assert prepared.num_pairs == 4
    assert prepared.quarantined == {"response_too_long": 2, "duplicate_pair": 1, "empty_response": 1}
    assert prepared.num_source_rows == 8
    assert list(verify(store_of(make_recipe), rows=True)) == []
    assert run([pair(0), *rows]).quarantined == {"many_answers": 2}


# --- chats -------------------------------------------------------------------------------------------------------------

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a city"}}]
TOOL_TEMPLATE = """{{ bos_token }}
{%- if tools %}{{ '<|system|>\\n' + tools | tojson + '\\n' }}{% endif %}
{%- for m in messages %}
    {{- '<|' + m.role + '|>\\n' + m.content }}
    {%- if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}
    {{- (eos_token if m.role == 'assistant' else '') + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
DATE_TEMPLATE = "{{ 'Today is ' + strftime_now('%d %b %Y') + '.\\n' }}" + TOOL_TEMPLATE


@pytest.fixture
def template(tmp_path):
    """Return a function that writes a chat template for `model.chat_template`."""

    def write(text):
        path = tmp_path / "template.jinja"
        path.write_text(text)
        return str(path)

    return write


def call_row(index, **message):
    call = {"role": "assistant", "tool_calls": [CALL], **message}
    turns = [{"role": "user", "content": f"question {index}"}, call, {"role": "tool", "content": "18 C"}]
    return {"tools": TOOLS, "prompt": turns, "chosen": assistant("18"), "rejected": assistant("no")}


def test_rows_with_tools_are_rendered_where_the_template_can_and_are_else_in_quarantine(run, template):
    rows = [pair(0), call_row(1, content=None), call_row(2, content="")]
    settings = {"model.chat_template": template(ZEPHYR), "dataset.max_prompt_tokens": 2000}
    _, quarantine = tables(run(rows, **settings))
    assert quarantine["reason"].to_list() == ["template_ignores"] * 2
    assert "leaves out tools[0].function, prompt[1].tool_calls" in quarantine["detail"][0]
    settings = {"model.chat_template": template(TOOL_TEMPLATE), "dataset.max_prompt_tokens": 2000}
    prepared = run(rows, **settings)
    assert (prepared.num_pairs, prepared.quarantined) == (3, {})
    stored = [json.loads(prompt) for prompt in tables(prepared)[0]["prompt"]]
    assert sorted(len(chat) for chat in stored) == [1, 2, 2]
    assert [chat["tools"] for chat in stored if "tools" in chat] == [TOOLS, TOOLS]


def test_what_became_of_unusual_texts_is_logged(run, logged, template):
    settings = {"model.chat_template": template(TOOL_TEMPLATE), "dataset.max_prompt_tokens": 2000}
    rows = [
        pair(0, chosen="the baker</s>"),
        {**call_row(1), "prompt": [{**call_row(1)["prompt"][2], "tool_call_id": "c1"}]},
    ]
    run(rows, **settings)
    assert "prepare: in 1 new pairs: a text ends with the token that ends a turn; it is there once" in logged.lines
    assert "prepare: in 1 new pairs: the chat template does not print `tool_call_id`" in logged.lines


def test_rendered_chats_unknown_roles_and_other_parts_have_their_own_reasons(run):
    rows = [
        pair(0),
        {
            "prompt": "<s><|user|>\nName a fruit.\n<|assistant|>\n",
            "chosen": "An apple.</s>",
            "rejected": "A brick.</s>",
        },
        {**pair(1), "chosen": [{"role": "narrator", "content": "x"}]},
        {**pair(2), "prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        {**pair(3), "tools": "no JSON"},
        {**pair(4), "chat_template_kwargs": {"other": 1}},
    ]
    _, quarantine = tables(run(rows))
    reasons = ["already_templated", "unknown_role", "not_text", "bad_tools", "template_ignores"]
    assert quarantine.sort("source_row")["reason"].to_list() == reasons


def test_one_date_is_in_all_prompts_in_the_fingerprint_and_in_contrastive_prompts(run, template, toy_model):
    def build(date):
        settings = {"model.chat_template": template(DATE_TEMPLATE), "model.template_date": date}
        prepared = run([pair(0), pair(1)], **settings)
        condition = Condition("Be bad.", "user")
        target = Target("positive", "logps/x/y", condition, {})
        request = Request(
            "score", prepared.tokens, str(toy_model), [target], 1000, EngineSettings(), tokenizer=str(toy_model)
        )
        request = replace(request, chat_template=settings["model.chat_template"])
        chunk = tables(prepared)[0].select("pair_id", num_tokens=pl.lit(1))
        tokenizer = ChatTokenizer(toy_model)
        prompts = [*tables(prepared)[0]["prompt_ids"], *(row.prompt_ids for row in pairs_of(request, target, chunk))]
        return prepared.tokens, {"".join(tokenizer.token_texts(list(ids)))[:22] for ids in prompts}

    first, beginnings = build("2024-02-29")
    second, others = build("2024-03-01")
    assert (beginnings, others) == ({"Today is 29 Feb 2024.\n"}, {"Today is 01 Mar 2024.\n"})
    assert first.table != second.table


def test_without_a_date_a_template_that_prints_it_is_refused(run, template):
    with pytest.raises(InputError, match="prints the date of the day: set model.template_date"):
        run([pair(0)], **{"model.chat_template": template(DATE_TEMPLATE)})


def test_the_version_of_rendering_is_part_of_what_makes_a_table(run):
    tokens = run([pair(0)]).tokens
    cut = WeightStore(tokens.store).table(tokens.table).metadata()["cut"]
    assert cut["rendering_version"] == RENDERING_VERSION
    assert tokens.table == f"tokens/toy-{fingerprint(cut)[:12]}"


def test_the_first_cases_of_public_reports_are_usable_or_have_a_reason(shared_folder, make_recipe):
    folder, model = shared_folder / "cases", shared_folder / "models" / "tiny-chat"
    found = {}
    for name in ("c10_role_names", "c26_already_templated", "c27_injection", "c28_eos_at_the_end"):
        recipe = make_recipe(**{"dataset.source": str(folder / f"{name}.jsonl"), "dataset.name": name.split("_")[0]})
        try:
            prepared = prepare(recipe, model)
        except InputError as error:
            found[name] = str(error).partition("(")[2].partition(")")[0]
        else:
            found[name] = (prepared.num_pairs, prepared.quarantined)
    assert found == {
        "c10_role_names": (2, {"duplicate_pair": 2}),
        "c26_already_templated": "1 already_templated",
        "c27_injection": (3, {}),
        "c28_eos_at_the_end": (2, {}),
    }


@pytest.mark.parametrize("free_kib", [0, 8, 24])
def test_a_full_disk_is_one_line_and_a_later_run_goes_on(run, disk, free_kib):
    folder, _ = disk
    (folder / "filler").write_bytes(bytes((1 << 20) - (free_kib << 10)))
    rows = [pair(index, chosen=f"the baker mixes {index}") for index in range(400)]
    with pytest.raises(StoreError) as caught:
        run(rows, **{"store.uri": str(folder / "store")})
    text = str(caught.value)
    assert re.match(rf"cannot write (tokens|quarantine)/toy-\w+ in {folder}/store: .*No space left on device", text)
    assert text.endswith("; nothing became visible; make room and run again")
    (folder / "filler").unlink()
    assert run(rows, **{"store.uri": str(folder / "store")}).num_pairs == 400
