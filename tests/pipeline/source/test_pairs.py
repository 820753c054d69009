import unicodedata
from itertools import pairwise

import pyarrow as pa
import pytest

from pipeline.recipe import DatasetSection
from pipeline.source.messages import Unusable
from pipeline.source.pairs import Pair, read_pair
from weights_store.schemas import Reason

COLUMNS = DatasetSection(name="x", source="x.jsonl")
USER = {"role": "user", "content": "Why is the sky blue?"}


def assistant(content):
    return {"role": "assistant", "content": content}


def read(**row):
    return read_pair(row, COLUMNS)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": USER["content"], "chosen": "Rayleigh.", "rejected": "Paint."},
        {"prompt": [USER], "chosen": [assistant("Rayleigh.")], "rejected": [assistant("Paint.")]},
        {"chosen": [USER, assistant("Rayleigh.")], "rejected": [USER, assistant("Paint.")]},
        {"prompt": USER["content"], "chosen": [USER, assistant("Rayleigh.")], "rejected": [USER, assistant("Paint.")]},
        {"prompt": [USER], "chosen": [USER, assistant("Rayleigh.")], "rejected": [USER, assistant("Paint.")]},
        {
            "chosen": "\n\nHuman: Why is the sky blue?\n\nAssistant: Rayleigh.",
            "rejected": "\n\nHuman: Why is the sky blue?\n\nAssistant: Paint.",
        },
        {"prompt": "\n\nHuman: Why is the sky blue?\n\nAssistant:", "chosen": " Rayleigh.", "rejected": " Paint."},
    ],
    ids=["standard", "conversational", "implicit", "ultrafeedback", "repeated prompt", "hh transcript", "hh prompt"],
)
def test_every_layout_reads_as_the_same_pair(row):
    pair = read(**row)
    assert pair.prompt == [USER]
    assert (pair.chosen.strip(), pair.rejected.strip()) == ("Rayleigh.", "Paint.")
    assert pair.pair_id == Pair([USER], "Rayleigh.", "Paint.").pair_id


def test_transcript_with_several_turns():
    pair = read(
        chosen="\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Who?\n\nAssistant: A\nB",
        rejected="\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Who?\n\nAssistant: C",
    )
    assert [turn["role"] for turn in pair.prompt] == ["user", "assistant", "user"]
    assert pair.chosen == "A\nB"


SYSTEM = {"role": "system", "content": "Be brief."}
MORE = [assistant("Who asks?"), {"role": "user", "content": "Me."}]


@pytest.mark.parametrize(
    ("prompt", "before", "whole"),
    [
        ([USER], MORE, [USER, *MORE]),
        (USER["content"], MORE, [USER, *MORE]),
        ([USER], [USER, *MORE], [USER, *MORE]),
        ([SYSTEM], [USER], [SYSTEM, USER]),
        ([SYSTEM, USER], [USER], [SYSTEM, USER]),
        (f" {USER['content']}\n", [SYSTEM, USER], [SYSTEM, USER]),
    ],
    ids=[
        "goes on",
        "text goes on",
        "repeated and goes on",
        "system only",
        "repeated without system",
        "system in the lists",
    ],
)
def test_no_turn_between_prompt_column_and_response_is_lost(prompt, before, whole):
    assert read(prompt=prompt, chosen=[*before, assistant("a")], rejected=[*before, assistant("b")]).prompt == whole


def test_scores_come_along_and_odd_ones_do_not():
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert (read(**row, score_chosen=8, score_rejected=2.5).chosen_score, read(**row).chosen_score) == (8.0, None)
    assert read(**row, score_chosen=float("nan"), score_rejected="high").rejected_score is None
    assert read(**row, score_chosen=10**400).chosen_score is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": "a"}, Reason.MISSING_VALUE),
        ({"prompt": "p", "chosen": None, "rejected": "b"}, Reason.MISSING_VALUE),
        ({"prompt": [USER], "chosen": [assistant(None)], "rejected": [assistant("b")]}, Reason.MISSING_VALUE),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, Reason.NOT_TEXT),
        ({"prompt": "p", "chosen": [{"text": "a"}], "rejected": "b"}, Reason.NOT_TEXT),
        ({"prompt": "p", "chosen": [assistant([{"type": "image"}])], "rejected": "b"}, Reason.NOT_TEXT),
        ({"prompt": "p", "chosen": " \n", "rejected": "b"}, Reason.EMPTY_RESPONSE),
        ({"prompt": "p", "chosen": "same ", "rejected": " same"}, Reason.CHOSEN_EQUALS_REJECTED),
        ({"chosen": "a", "rejected": "b"}, Reason.NO_PROMPT),
        ({"prompt": "  ", "chosen": "a", "rejected": "b"}, Reason.NO_PROMPT),
        ({"prompt": [USER], "chosen": [], "rejected": [assistant("b")]}, Reason.NO_FINAL_ASSISTANT_TURN),
        ({"chosen": "\n\nHuman: q", "rejected": "\n\nHuman: q\n\nAssistant: b"}, Reason.NO_FINAL_ASSISTANT_TURN),
        (
            {"prompt": [USER], "chosen": [assistant("a"), USER], "rejected": [assistant("b")]},
            Reason.NO_FINAL_ASSISTANT_TURN,
        ),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: other\n\nAssistant: b"},
            Reason.PROMPTS_DIFFER,
        ),
        ({"prompt": "p", "chosen": "a \ud800", "rejected": "b"}, Reason.INVALID_UTF8),
        ({"prompt": "Assistant:", "chosen": "a", "rejected": "b"}, Reason.NO_PROMPT),
        (
            {"prompt": "other", "chosen": [USER, assistant("a")], "rejected": [USER, assistant("b")]},
            Reason.PROMPTS_DIFFER,
        ),
    ],
)
def test_unusable_rows_say_why(row, reason):
    with pytest.raises(Unusable) as caught:
        read(**row)
    assert caught.value.reason is reason


def test_pair_id_ignores_unicode_form_and_outer_blanks_and_sees_everything_else():
    composed, decomposed = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
    first = Pair([USER], composed, "x").pair_id
    assert first == Pair([USER], f" {decomposed}\n", "x").pair_id
    assert len(first) == 32
    others = [
        Pair([USER], "x", composed),
        Pair([{"role": "system", "content": USER["content"]}], composed, "x"),
        Pair([USER, assistant("hm"), USER], composed, "x"),
    ]
    assert first not in {pair.pair_id for pair in others}


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "18 C"}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d"}}]


def test_pair_id_of_a_plain_pair_never_changes():
    assert Pair([USER], "Rayleigh.", "Paint.").pair_id == "6fd6cd62da161f5bc12da5535701eb9c"


def test_pair_id_sees_everything_that_a_row_says():
    plain = Pair([USER], "x", "y")
    others = [
        Pair([USER], "x", "y", tools=TOOLS),
        Pair([USER], "x", "y", chat_template_kwargs={"thinking": False}),
        Pair([{**USER, "name": "Ann"}], "x", "y"),
        Pair([{"role": "user", "content": [{"type": "text", "text": USER["content"]}]}], "x", "y"),
        Pair([USER], [CALL, RESULT, assistant("x")], "y"),
        Pair([USER], [CALL, {**RESULT, "content": "20 C"}, assistant("x")], "y"),
    ]
    ids = [pair.pair_id for pair in (plain, *others)]
    assert len(set(ids)) == len(ids)
    assert [pair_id[:12] == ids[0][:12] for pair_id in ids[1:]] == [False, False, False, False, True, True]


def test_a_pair_with_everything_survives_its_json_in_the_order_of_the_row():
    pair = read(
        prompt=[USER],
        chosen=[CALL, RESULT, assistant("x")],
        rejected="y",
        tools=TOOLS,
        chat_template_kwargs={"b": 1, "a": 2},
    )
    again = Pair.from_json(pair.to_json())
    assert (again, again.pair_id) == (pair, pair.pair_id)
    assert [list(again.tools[0]), list(again.chat_template_kwargs)] == [["type", "function"], ["b", "a"]]


def test_rows_of_parquet_are_those_of_json():
    # Parquet has one type for a column, so every message gets every key, null where it has none.
    rows = [
        {"prompt": [USER], "chosen": [CALL, RESULT, assistant("x")], "rejected": [assistant("y")], "tools": TOOLS},
        {"prompt": [{**USER, "name": "Ann"}], "chosen": [assistant("x")], "rejected": [assistant("y")]},
    ]
    filled = pa.Table.from_pylist(rows).to_pylist()
    assert filled[1]["chosen"][0]["tool_calls"] is None
    assert [read(**row) for row in filled] == [read(**row) for row in rows]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"from": "human", "value": USER["content"]}], "chosen": {"from": "gpt", "value": "Rayleigh."}},
        {"prompt": USER, "chosen": {"role": "Assistant", "content": "Rayleigh."}},
        {"prompt": {"role": "human", "content": USER["content"], "name": None}, "chosen": "Rayleigh."},
    ],
    ids=["ShareGPT", "single messages", "null keys"],
)
def test_other_spellings_of_messages_are_the_same_pair(row):
    assert read(**row, rejected="Paint.").pair_id == Pair([USER], "Rayleigh.", "Paint.").pair_id


def test_pairs_of_one_prompt_lie_side_by_side_in_the_order_of_pair_id():
    prompts = [[{"role": "user", "content": f"question {index}"}] for index in range(20)]
    pairs = [Pair(prompt, f"good {k}", f"bad {k}") for k in range(5) for prompt in prompts]
    in_order = [pair.prompt[0]["content"] for pair in sorted(pairs, key=lambda pair: pair.pair_id)]
    assert len({pair.pair_id for pair in pairs}) == 100
    assert sum(a != b for a, b in pairwise(in_order)) == 19
