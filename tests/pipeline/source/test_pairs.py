import json
import unicodedata
from decimal import Decimal
from itertools import pairwise

import pyarrow as pa
import pytest

from pipeline.dataset_section import DatasetSection
from pipeline.source.columns import resolve_columns
from pipeline.source.intake import pairs_of
from pipeline.source.messages import Unusable
from pipeline.source.pairs import Pair, read_score
from pipeline.source.rows import RawRow, Source
from weights_store.errors import InputError
from weights_store.schemas import Reason

USER = {"role": "user", "content": "Why is the sky blue?"}


def assistant(content):
    return {"role": "assistant", "content": content}


def read_all(*rows, **settings):
    """Return what is found in the rows of a source: pairs, and why others are none."""
    dataset = DatasetSection(name="x", source="x.jsonl", **settings)
    source = Source("x.jsonl", lambda _: (RawRow(index, row) for index, row in enumerate(rows)))
    return [found for _, found in pairs_of(source, resolve_columns(dataset, source))]


def read(**row):
    (found,) = read_all(row)
    if isinstance(found, Unusable):
        raise found
    return found


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
        (USER["content"], [SYSTEM, USER, *MORE], [SYSTEM, USER, *MORE]),
    ],
    ids=[
        "goes on",
        "text goes on",
        "repeated and goes on",
        "system only",
        "repeated without system",
        "system in the lists",
        "text goes on, system in the lists",
    ],
)
def test_no_turn_between_prompt_column_and_response_is_lost(prompt, before, whole):
    assert read(prompt=prompt, chosen=[*before, assistant("a")], rejected=[*before, assistant("b")]).prompt == whole


LARGEST_FLOAT32 = 3.4028234663852886e38


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (8, 8.0),
        (2.5, 2.5),
        (Decimal("8.50"), 8.5),
        (" 4.5", 4.5),
        ("-1e-3", -0.001),
        (LARGEST_FLOAT32, LARGEST_FLOAT32),
        (3.5e38, None),
        (-1e308, None),
        (10**400, None),
        (float("nan"), None),
        (float("-inf"), None),
        (Decimal("NaN"), None),
        ("inf", None),
        ("high", None),
        ("", None),
        (True, None),
        ([8], None),
        (None, None),
    ],
)
def test_a_score_is_a_finite_number_that_float32_can_hold(value, score):
    assert read_score(value) == score


def test_scores_come_along_with_their_pair():
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    pair = read(**row, score_chosen=8, score_rejected="2.5")
    assert (pair.chosen_score, pair.rejected_score, read(**row).chosen_score) == (8.0, 2.5, None)
    assert read(**row, score_chosen=8, score_rejected=None).rejected_score is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": None}, Reason.MISSING_VALUE),
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
        ({"prompt": "\n\nHuman: \n\nAssistant:", "chosen": "a", "rejected": "b"}, Reason.NO_PROMPT),
        ({"prompt": "p", "chosen": ["a", "b"], "rejected": "c"}, Reason.MANY_ANSWERS),
        ({"prompt": "p", "system": 3, "chosen": "a", "rejected": "b"}, Reason.NOT_TEXT),
        (
            {
                "prompt": [{"role": "system", "content": "Be brief."}, USER],
                "system": "Be kind.",
                "chosen": "a",
                "rejected": "b",
            },
            Reason.PROMPTS_DIFFER,
        ),
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
    # Parquet has one type for a column, so every object gets every key, null where it has none.
    calls, tools = [], []
    for name, value in (("city", "Lima"), ("days", 2)):
        function = {"name": name, "arguments": {name: value}}
        calls.append({"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]})
        schema = {"type": "object", "properties": {name: {"type": "string"}}}
        tools.append([{"type": "function", "function": {"name": name, "parameters": schema}}])
    rows = [
        {"prompt": [USER], "chosen": [calls[0]], "rejected": [assistant("y")], "tools": tools[0]},
        {"prompt": [USER], "chosen": [calls[1]], "rejected": [assistant("y")], "tools": tools[1]},
        {"prompt": [USER], "chosen": [CALL, RESULT, assistant("x")], "rejected": [assistant("y")], "tools": TOOLS},
        {"prompt": [{**USER, "name": "Ann"}], "chosen": [assistant("x")], "rejected": [assistant("y")]},
    ]
    filled = pa.Table.from_pylist(rows).to_pylist()
    assert filled[3]["chosen"][0]["tool_calls"] is None
    assert filled[0]["chosen"][0]["tool_calls"][0]["function"]["arguments"]["days"] is None
    assert filled[0]["tools"][0]["function"]["parameters"]["properties"]["days"] is None
    pairs = [(read(**row), read(**of_json)) for row, of_json in zip(filled, rows, strict=True)]
    assert [pair for pair, _ in pairs] == [of_json for _, of_json in pairs]
    assert [pair.pair_id for pair, _ in pairs] == [of_json.pair_id for _, of_json in pairs]


@pytest.mark.parametrize("tools", ["None", ["search", "calc"], TOOLS])
def test_tools_that_a_recipe_leaves_out_are_not_read(tools):
    row = {"prompt": [USER], "chosen": "Rayleigh.", "rejected": "Paint."}
    (found,) = read_all({**row, "tools": tools}, unprinted_keys=["tools"])
    assert found == Pair([USER], "Rayleigh.", "Paint.")
    (found,) = read_all({**row, "chat_template_kwargs": 3}, unprinted_keys=["chat_template_kwargs"])
    assert found == Pair([USER], "Rayleigh.", "Paint.")


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


# --- system, input and chats beside the responses ----------------------------------------------------------------------


def test_a_system_column_is_the_first_turn():
    pair = read(system="Answer in French.", question="Name a colour.", chosen="Rouge.", rejected="Red.")
    assert pair.prompt == [
        {"role": "system", "content": "Answer in French."},
        {"role": "user", "content": "Name a colour."},
    ]


@pytest.mark.parametrize("system", [None, "", " \n"])
def test_a_blank_system_column_adds_no_turn(system):
    assert read(system=system, prompt=[USER], chosen="a", rejected="b").prompt == [USER]


def test_a_system_column_that_repeats_the_system_turn_adds_nothing():
    chat = [{"role": "system", "content": "Be brief."}, USER]
    assert read(system="Be brief. ", prompt=chat, chosen="a", rejected="b").prompt == chat


def test_instruction_and_input_are_one_prompt_with_a_blank_line_between_them():
    rows = [{"instruction": "Translate.", "input": text, "chosen": "a", "rejected": "b"} for text in ("cat", "", None)]
    prompts = [pair.prompt for pair in read_all(*rows)]
    texts = ["Translate.\n\ncat", "Translate.", "Translate."]
    assert prompts == [[{"role": "user", "content": text}] for text in texts]


@pytest.mark.parametrize("name", ["prompt", "question", "query", "instruction"])
def test_input_beside_a_text_prompt_is_joined_to_it(name):
    row = {name: "Which?", "input": "cat", "chosen": "a", "rejected": "b"}
    found = read_all(row, {**row, "input": ""}, {**row, "input": None})
    assert [pair.prompt[0]["content"] for pair in found] == ["Which?\n\ncat", "Which?", "Which?"]
    assert [pair.prompt[0]["content"] for pair in read_all(row, input_column="")] == ["Which?"]


def test_input_that_the_prompt_holds_already_is_not_joined_again():
    prompt = "Below is an instruction.\n\n### Input:\ncat\ndog\n\n### Response:"
    row = {"prompt": prompt, "chosen": "a", "rejected": "b"}
    assert [pair.prompt[0]["content"] for pair in read_all({**row, "input": "cat\ndog "}, {**row, "input": "cat"})] == [
        prompt,
        prompt,
    ]
    assert read(**row, input="ca").prompt[0]["content"] == f"{prompt}\n\nca"


@pytest.mark.parametrize(("prompt", "value"), [([USER], "cat"), (USER["content"], {"text": "cat"})])
def test_input_beside_a_chat_or_of_another_type_is_joined_only_if_the_recipe_says_so(prompt, value, caplog):
    row = {"prompt": prompt, "input": value, "chosen": "a", "rejected": "b"}
    assert read(**row) == Pair([USER], "a", "b")
    assert "columns that are not read: 'input'" in caplog.text
    (named,) = read_all(row, input_column="input")
    joined = {"role": "user", "content": f"{USER['content']}\n\ncat"}
    assert named.prompt == [joined] if isinstance(value, str) else named.reason is Reason.NOT_TEXT


def test_whole_chats_prevail_over_an_input_that_is_joined_by_its_name_only():
    row = {"prompt": USER["content"], "input": "An aside.", "chosen": [USER, assistant("a")]}
    assert read(**row, rejected=[USER, assistant("b")]) == Pair([USER], "a", "b")


def test_messages_beside_whole_chats_may_repeat_the_chosen_one():
    chosen, rejected = [USER, assistant("a")], [USER, assistant("b")]
    assert read(messages=chosen, chosen=chosen, rejected=rejected) == Pair([USER], "a", "b")


@pytest.mark.parametrize("name", ["messages", "conversations", "prompt"])
@pytest.mark.parametrize("last", ["Rayleigh.", "Paint. "])
@pytest.mark.parametrize("wrap", [str, lambda text: [assistant(text)], lambda text: [USER, assistant(text)]])
def test_a_response_at_the_end_of_the_prompt_column_is_no_prompt(name, last, wrap):
    row = {name: [USER, assistant(last)], "chosen": wrap("Rayleigh."), "rejected": wrap("Paint.")}
    assert read(**row) == Pair([USER], "Rayleigh.", "Paint.")


def test_a_response_of_several_turns_at_the_end_of_the_prompt_column_is_no_prompt():
    response = [CALL, RESULT, assistant("x")]
    assert read(messages=[USER, *response], chosen=response, rejected="x") == Pair([USER], response, "x")


def test_an_answer_that_was_given_before_stays_in_the_prompt():
    chat = [USER, assistant("a"), USER]
    assert read(messages=chat, chosen="a", rejected="b").prompt == chat


NO_PROMPTS = [
    {"conversation": [{"input": "Why?", "output": "So."}]},
    {"question": "In one word: why is the sky blue?"},
    {"instruction": "Answer.", "input": "Why is the sky blue?"},
    {"messages": [USER, assistant("From another model."), USER, assistant("More.")]},
    {"messages": 3},
]


@pytest.mark.parametrize("other", NO_PROMPTS, ids=["Capybara", "question", "Alpaca", "SFT chat", "number"])
def test_a_column_that_is_a_prompt_by_its_name_only_gives_way_to_whole_chats(other):
    pair = read(**other, chosen=[USER, assistant("a")], rejected=[USER, assistant("b")])
    assert pair == Pair([USER], "a", "b")
    assert pair.ignores_prompt
    assert pair.to_json() == Pair([USER], "a", "b").to_json()


@pytest.mark.parametrize("other", NO_PROMPTS[:2], ids=["Capybara", "question"])
def test_a_named_prompt_column_that_contradicts_whole_chats_names_the_remedy(other):
    row = {**other, "chosen": [USER, assistant("a")], "rejected": [USER, assistant("b")]}
    (named,) = read_all(row, prompt_column=next(iter(other)))
    assert named.reason in (Reason.NOT_TEXT, Reason.PROMPTS_DIFFER)
    assert 'dataset.prompt_column = ""' in named.detail
    assert read_all(row, prompt_column="") == [Pair([USER], "a", "b")]


def test_a_prompt_by_name_only_is_still_compared_with_responses_that_bring_none():
    chats = {"chosen": [assistant("x"), USER, assistant("a")], "rejected": [assistant("x"), USER, assistant("b")]}
    with pytest.raises(Unusable, match="no message with role and content"):
        read(**NO_PROMPTS[0], **chats)
    assert read(question="Hi", **chats).prompt == [{"role": "user", "content": "Hi"}, assistant("x"), USER]


@pytest.mark.parametrize("name", ["prompt", "question"])
@pytest.mark.parametrize("alone", ["b", [assistant("b")]], ids=["text", "turn"])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_response_to_the_prompt_column_does_not_move_behind_a_chat_that_goes_on(name, alone, side):
    other = {"chosen": "rejected", "rejected": "chosen"}[side]
    row = {name: USER["content"], side: [SYSTEM, USER, *MORE, assistant("a")], other: alone}
    with pytest.raises(Unusable, match=f"'{side}' goes on after the prompt in column '{name}'") as caught:
        read(**row)
    assert caught.value.reason is Reason.PROMPTS_DIFFER
    assert read(**row | {name: MORE[-1]["content"]}).prompt == [
        SYSTEM,
        USER,
        *MORE,
    ]  # the last question: both answer it
    assert read(**row | {name: [SYSTEM], side: [USER, assistant("a")]}).prompt == [SYSTEM, USER]


# --- texts that look like transcripts ----------------------------------------------------------------------------------

PLAIN = {"prompt": "Which title?", "chosen": "Human: All Too Human.", "rejected": "None."}


@pytest.mark.parametrize(
    "prompt",
    [
        "Assistant: write a job advert.",
        "Human: a short history - who wrote it?",
        "Human: hi\n\nAssistant: hello\n\nHuman: go on",
        "Continue the chat.\n\nHuman: hi\n\nAssistant:",
        "\n\nHuman: hi\n\nAssistant:",
    ],
)
def test_a_prompt_that_looks_like_a_transcript_among_others_is_text(prompt):
    found = read_all({**PLAIN, "prompt": prompt}, PLAIN, PLAIN)
    assert [pair.prompt for pair in found] == [
        [{"role": "user", "content": text}] for text in (prompt, "Which title?", "Which title?")
    ]
    assert {pair.chosen for pair in found} == {"Human: All Too Human."}


@pytest.mark.parametrize("prompt", ["Human: a short history", "Assistant: write it.", "Human: hi\n\nAssistant: hello"])
def test_a_single_prompt_that_is_no_whole_transcript_is_text(prompt):
    assert read(prompt=prompt, chosen="a", rejected="b").prompt == [{"role": "user", "content": prompt}]


def test_prompts_that_are_mostly_transcripts_need_a_decision():
    rows = [{"prompt": f"\n\nHuman: {index}\n\nAssistant:", "chosen": "a", "rejected": "b"} for index in range(2)]
    with pytest.raises(
        InputError, match=r"2 of 3 texts in column 'prompt' look like transcripts.*transcript = \"hh\".*\"no\""
    ):
        read_all(*rows, PLAIN)
    split = read_all(*rows, {**PLAIN, "chosen": "Another."}, transcript="hh")
    assert [pair.prompt[0]["content"] for pair in split] == ["0", "1", "Which title?"]
    texts = read_all(*rows, PLAIN, transcript="no")
    assert texts[0].prompt[0]["content"] == "\n\nHuman: 0\n\nAssistant:"


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_transcripts_on_one_side_and_a_few_on_the_other_need_a_decision(side):
    other = {"chosen": "rejected", "rejected": "chosen"}[side]
    rows = [
        {"prompt": "Hi", side: f"\n\nHuman: Hi\n\nAssistant: {index}", other: f"text {index}"} for index in range(3)
    ]
    mixed = [*rows[:2], {**rows[2], other: "\n\nHuman: Hi\n\nAssistant: other"}]
    with pytest.raises(InputError, match=rf"1 of 3 texts in column '{other}' look like .*column '{side}' do.*\"hh\""):
        read_all(*mixed)
    (last,) = read_all(*mixed, transcript="hh")[2:]
    assert {last.chosen, last.rejected} == {"2", "other"}
    assert all(isinstance(found, Pair) for found in read_all(*rows))


def test_transcripts_without_a_prompt_are_split_also_among_rows_that_have_one():
    transcripts = {side: f"\n\nHuman: Hi\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    first, second = read_all(transcripts, PLAIN)
    assert first == Pair([{"role": "user", "content": "Hi"}], "chosen", "rejected")
    assert second.chosen == "Human: All Too Human."


def test_other_markers_of_a_transcript_are_a_setting():
    row = {
        side: f"prompter: Capital of Peru? assistant: {city}."
        for side, city in (("chosen", "Lima"), ("rejected", "Quito"))
    }
    (unusable,) = read_all(row)
    assert unusable.reason is Reason.NO_PROMPT
    assert "'prompter: Capital of Peru?" in unusable.detail
    assert "two markers in dataset.transcript" in unusable.detail
    (pair,) = read_all(row, transcript=("prompter:", "assistant:"))
    assert pair == Pair([{"role": "user", "content": "Capital of Peru?"}], "Lima.", "Quito.")


@pytest.mark.parametrize("column", ["prompt", "chosen"])
@pytest.mark.parametrize("encode", [json.dumps, repr])
def test_chats_that_were_written_as_text_are_not_taken_for_text(column, encode):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"} | {column: encode([assistant("a")])}
    with pytest.raises(
        InputError, match=f"column '{column}' are lists of messages, written as text; decode them first"
    ):
        read_all(row, row)
    assert all(isinstance(found, Pair) for found in read_all(row, row, transcript="no"))
    (found, *_) = read_all(row, PLAIN)  # a single answer may look like that
    assert isinstance(found, Pair)


@pytest.mark.parametrize("encode", [json.dumps, repr])
@pytest.mark.parametrize("prompt", [{}, {"prompt": ""}], ids=["no column", "blank"])
def test_chats_that_were_written_as_text_are_named_also_without_a_prompt(encode, prompt):
    row = {side: encode([USER, assistant(side)]) for side in ("chosen", "rejected")}
    (problem,) = read_all(row | prompt)
    assert problem.reason is Reason.NO_PROMPT
    assert "'chosen' is a list of messages, written as text; decode it first" in problem.detail
    assert "prompt_column" not in problem.detail
    (decoded,) = read_all({"chosen": [assistant("a")], "rejected": [assistant("b")]})
    assert "written as text" not in decoded.detail


# --- several answers ---------------------------------------------------------------------------------------------------


def test_a_list_of_one_answer_is_that_answer():
    assert read(prompt="p", chosen=["a"], rejected="b") == Pair([{"role": "user", "content": "p"}], "a", "b")


def test_several_answers_give_a_pair_for_each_combination_with_the_scores_of_its_answers():
    row = {"prompt": "p", "chosen": ["a", "b"], "rejected": ["c", "d"], "score_chosen": [9, 8], "score_rejected": 1}
    pairs = read_all(row, many_answers="combine")
    found = [(pair.chosen, pair.rejected, pair.chosen_score, pair.rejected_score) for pair in pairs]
    assert found == [("a", "c", 9.0, 1.0), ("a", "d", 9.0, 1.0), ("b", "c", 8.0, 1.0), ("b", "d", 8.0, 1.0)]


def test_an_answer_that_cannot_be_used_spoils_its_own_combinations_only():
    found = read_all({"prompt": "p", "chosen": ["a", "", "a "], "rejected": ["b", "a"]}, many_answers="combine")
    reasons = [problem.reason.value for problem in found if isinstance(problem, Unusable)]
    assert reasons == [
        "chosen_equals_rejected",
        "empty_response",
        "empty_response",
        "duplicate_pair",
        "chosen_equals_rejected",
    ]
    assert len({problem.detail for problem in found if isinstance(problem, Unusable)}) == 5
    assert [pair.rejected for pair in found if isinstance(pair, Pair)] == ["b"]


def test_several_chats_as_answers_are_combined_too():
    chats = [[assistant("a")], [assistant("b")]]
    pairs = read_all({"prompt": "p", "chosen": chats, "rejected": [assistant("c")]}, many_answers="combine")
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("a", "c"), ("b", "c")]
