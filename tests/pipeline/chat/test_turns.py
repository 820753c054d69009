"""Where the messages of a response stand, in templates of every kind that takes calls of tools."""

import json
from dataclasses import replace

import numpy as np
import pytest

from pipeline.chat.tokenizer import ChatTokenizer
from pipeline.marks.characters import Vocabulary
from pipeline.marks.token_values import Lists, RangeAnnotator, Responses, Source
from pipeline.source.messages import Unusable
from pipeline.source.pairs import Pair
from tests.pipeline.chat.template_kinds import KINDS, save_tokenizer

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def call(arguments, content=None):
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}


def result(text):
    return {"role": "tool", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def pieces(tokenizer, messages):
    """The pieces of a response that are each message's, and the texts in them."""
    has_tools = "tools" in tokenizer._template
    pair = Pair([{"role": "user", "content": "Where?"}], messages, "no", tools=TOOLS if has_tools else None)
    tokens = tokenizer.tokenize_pair(pair, 500, 500, cut_response=False)
    found = tokenizer.turns(tokens.chat.to_json(), messages)
    ids = np.array(tokens.chosen_ids)
    text = Vocabulary.of_folder(tokenizer.folder).characters(ids, np.array([len(ids)])).texts[0]
    assert found.text.startswith(text)
    ends = [*(turn.start for turn in found.turns[1:]), len(text)]
    return [
        (text[turn.start : end], None if turn.at is None else text[turn.at : turn.end])
        for turn, end in zip(found.turns, ends, strict=True)
    ]


@pytest.mark.parametrize("thinks", [False, True])
def test_a_result_that_stands_in_the_call_too_is_found_in_its_own_message(of_kind, thinks):
    found = pieces(
        of_kind("qwen3" if thinks else "qwen2.5"), [call({"city": "Lima"}, "Lima?"), result("Lima"), said("Lima!")]
    )
    thought = "<think>\n\n</think>\n\n" if thinks else ""  # before the last message alone
    assert found == [
        ('Lima?\n<tool_call>\n{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call><|im_end|>\n', "Lima?"),
        ("<|im_start|>user\n<tool_response>\nLima\n</tool_response><|im_end|>\n<|im_start|>assistant\n", "Lima"),
        (f"{thought}Lima!<|im_end|>", "Lima!"),
    ]


def test_a_text_between_a_thought_and_a_call_is_found(of_kind):
    ((piece, text),) = pieces(of_kind("qwen3"), [call({"city": "Lima"}, " Lima?\n")])
    assert piece.startswith("<think>\n\n</think>\n\n Lima?\n\n<tool_call>")
    assert text == " Lima?\n"


def test_texts_that_look_like_marks_are_texts(of_kind):
    found = pieces(
        of_kind("llama3.1"), [call({"city": "tool"}), result("ipython"), result("<|eot_id|>"), said("assistant")]
    )
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert found == [
        ('{"name": "weather", "parameters": {"city": "tool"}}<|eom_id|>', None),
        (f"{head.format('ipython')}ipython<|eot_id|>", "ipython"),
        (f"{head.format('ipython')}<|eot_id|><|eot_id|>{head.format('assistant')}", "<|eot_id|>"),
        ("assistant<|eot_id|>", "assistant"),
    ]


def test_a_generation_prompt_that_the_answer_does_not_repeat(of_kind):
    found = pieces(of_kind("r1"), [call(json.dumps({"city": "Lima"})), result("Lima"), said("Lima!")])
    assert found == [
        ('<｜call｜>weather{"city": "Lima"}<｜end｜>', None),
        ("<｜output｜>Lima<｜Assistant｜>", "Lima"),
        ("Lima!<｜end｜>", "Lima!"),
    ]


def test_results_that_share_a_turn_are_told_apart(tmp_path):
    """Qwen's own template puts the results of several calls into one turn."""
    begin, end = "'<|im_start|>user\\n<tool_response>\\n'", "'<|im_end|>\\n'"
    one = "{{- " + begin + " + message.content + '\\n</tool_response><|im_end|>\\n' }}"
    several = (
        "{%- set before = loop.index0 and messages[loop.index0 - 1].role == 'tool' %}"
        "{%- set after = not loop.last and messages[loop.index0 + 1].role == 'tool' %}"
        "{{- ('\\n<tool_response>\\n' if before else " + begin + ") + message.content + '\\n</tool_response>' }}"
        "{{- '' if after else " + end + " }}"
    )
    kind = KINDS["qwen2.5"]
    assert one in kind.template
    folder = save_tokenizer(replace(kind, template=kind.template.replace(one, several)), tmp_path / "merged")
    found = pieces(ChatTokenizer(folder), [call({"city": "9"}), result("9"), result("9"), said("9 9")])
    assert found[1:] == [
        ("<|im_start|>user\n<tool_response>\n9\n</tool_response>\n<tool_response>\n", "9"),
        ("9\n</tool_response><|im_end|>\n<|im_start|>assistant\n", "9"),
        ("9 9<|im_end|>", "9 9"),
    ]


@pytest.mark.parametrize("unit", ["character", "message", "span"])
def test_the_weights_of_a_response_that_was_cut_are_the_first_ones_of_the_whole(of_kind, unit):
    tokenizer = of_kind("qwen3")
    messages = [call({"city": "🙂"}, "é?"), result("🙂 漢"), result("é"), said("🙂<|im_end|> 漢!")]
    pair = Pair([{"role": "user", "content": "Where?"}], messages, "no", tools=TOOLS)
    tokens = tokenizer.tokenize_pair(pair, 500, 500, cut_response=False)
    texts = [message["content"] for message in messages]
    vocabulary = Vocabulary.of_folder(tokenizer.folder)
    source = Source(texts, json.dumps(messages), tokens.chat.to_json())
    size = {"character": sum(map(len, texts)), "message": len(messages), "span": 0}[unit]
    numbers = np.arange(2.0, 2 + size) if size else np.array([1, 4, 3.0, 6, 12, 5.0])

    def weigh(ids, cut_at):
        annotator = RangeAnnotator(
            None, None, 0, {}, unit, 0.5, {}, vocabulary, tokenizer, vocabulary.is_special, cut_at
        )
        responses = Responses.of(Lists(np.array(ids), np.array([len(ids)])), vocabulary.is_special, cut_at)
        problems = {}
        found = annotator._by_characters(Lists(numbers, np.array([len(numbers)])), [source], responses, problems)
        assert problems == {}
        return found.tolist()

    whole = weigh(tokens.chosen_ids, None)
    assert len(set(whole)) > 3
    for limit in range(1, len(whole)):
        assert weigh(tokens.chosen_ids[:limit], limit) == whole[:limit]


def test_a_message_that_the_template_changes_has_no_place_for_its_text(of_kind):
    messages = [call(json.dumps({"city": "Lima"})), result("Lima"), said("<think>18</think>Lima!")]
    tokenizer = of_kind("r1")
    pair = Pair([{"role": "user", "content": "Where?"}], messages[:1] + messages[1:2] + [said("Lima!")], "no")
    tokens = tokenizer.tokenize_pair(pair, 500, 500, cut_response=False)
    found = tokenizer.turns(tokens.chat.to_json(), messages)
    assert [turn.at for turn in found.turns] == [None, found.text.index("Lima<"), None]


def test_a_response_that_the_template_refuses(of_kind):
    with pytest.raises(Unusable, match="refuses this chat"):
        of_kind("llama2").turns('{"messages": [{"role": "user", "content": "?"}]}', [said("a"), said("b")])
