"""Our ids against those of TRL's DPO trainer, on the same rows.

Prompt and response together are TRL's tokens without what follows the end of the last turn. The border may lie elsewhere: what
a template prints before the text of both responses is prompt for us. Where TRL would drop something or fail, we refuse the row.
"""

import json
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from pipeline.chat.tokenizer import ChatTokenizer
from pipeline.source.columns import Columns
from pipeline.source.messages import Unusable
from pipeline.source.pairs import Pair, read_pair
from tests.pipeline.chat.template_kinds import KINDS, Kind, save_tokenizer

COLUMNS = Columns()
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Weather in Lima?"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "18 C"}


def said(text, **others):
    return {"role": "assistant", "content": text, **others}


PLAIN = {"prompt": [USER], "chosen": [said("It is 18.")], "rejected": [said("No idea.")]}
ROWS = {
    "explicit prompt": PLAIN,
    "implicit prompt": {"chosen": [USER, said("It is 18.")], "rejected": [USER, said("No idea.")]},
    "several turns": {**PLAIN, "prompt": [USER, said("Which one?"), USER]},
    "white space": {**PLAIN, "prompt": [{"role": "user", "content": " \n two  words\n"}]},
    "system": {**PLAIN, "prompt": [SYSTEM, USER]},
    "tools": {**PLAIN, "tools": TOOLS},
    "tools as text": {**PLAIN, "tools": json.dumps(TOOLS)},
    "call in the prompt": {**PLAIN, "prompt": [USER, CALL, RESULT], "tools": TOOLS},
    "call as a response": {**PLAIN, "chosen": [CALL], "tools": TOOLS},
    "call, result and answer": {**PLAIN, "chosen": [CALL, RESULT, said("It is 18.")], "tools": TOOLS},
    "reasoning": {
        **PLAIN,
        "chosen": [said("It is 18.", reasoning_content="Look it up.")],
        "rejected": [said("No.", reasoning_content="Too lazy.")],
    },
    "thinking off": {**PLAIN, "chat_template_kwargs": {"enable_thinking": False}},
}
NEEDS = {
    "system": "has_system",
    "tools": "has_tools",
    "tools as text": "has_tools",
    "call in the prompt": "has_tools",
    "call as a response": "has_tools",
    "call, result and answer": "has_tools",
    "reasoning": "has_reasoning",
    "thinking off": "has_reasoning",
}
"""What a template must know for a row; others refuse it."""


class OneRow(list):
    """As much of a dataset as TRL's preparation asks for."""

    def map(self, function, fn_kwargs=None, **_):
        return OneRow({**row, **function(dict(row), **(fn_kwargs or {}))} for row in self)


def ids_of_trl(folder, row):
    from trl.trainer.dpo_trainer import DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_end")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    (prepared,) = DPOTrainer._prepare_dataset(trainer, OneRow([row]), tokenizer, arguments, "x")
    return [prepared["prompt_ids"] + prepared[f"{side}_ids"] for side in ("chosen", "rejected")]


def our_ids(tokenizer, row):
    stored = read_pair(row, COLUMNS).to_json()  # as the stages keep it
    tokens = tokenizer.tokenize_pair(Pair.from_json(stored), 10_000, 10_000, False)
    return [tokens.prompt_ids + ids for ids in (tokens.chosen_ids, tokens.rejected_ids)]


def after_the_turn(name, tokenizer, ids):
    """Return what TRL has after the last end of turn: a newline, and Phi-3's EOS for the whole text."""
    text = "".join(tokenizer.token_texts(ids))
    assert text in ("", "\n", "\n<|endoftext|>"), f"{name}: {text!r}"
    return ids


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"parts"}))
def test_ids_are_those_of_trl_up_to_the_end_of_turn(kind_folder, of_kind, kind, row):
    folder, tokenizer = kind_folder(kind), of_kind(kind)
    if row in NEEDS and not getattr(KINDS[kind], NEEDS[row]):
        with pytest.raises(Unusable, match=r"leaves out|has no variable|no system role|refuses this chat"):
            our_ids(tokenizer, ROWS[row])
        return
    for ours, theirs in zip(our_ids(tokenizer, ROWS[row]), ids_of_trl(folder, ROWS[row]), strict=True):
        assert ours == theirs[: len(ours)]
        after_the_turn(kind, tokenizer, theirs[len(ours) :])


def test_rows_of_text_are_chats_of_one_turn(of_kind):
    tokenizer = of_kind("qwen2.5")
    text = {"prompt": USER["content"], "chosen": "It is 18.", "rejected": "No idea."}
    assert our_ids(tokenizer, text) == our_ids(tokenizer, PLAIN)


INSTALLED = (
    "qwen2_5",
    "qwen3",
    "llama3",
    "llama3_1",
    "gemma",
    "gemma3",
    "phi3",
    "cohere2",
    "glm4moe",
    "lfm2",
    "qwen3_5_think",
)


@pytest.mark.parametrize("name", INSTALLED)
def test_the_original_templates_give_the_ids_of_trl(name, tmp_path):
    """TRL ships the templates of many models; with GLM's, which ends turns with nothing, we add EOS."""
    import trl

    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    control = ("<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|eot_id|>")
    eos = {
        "gl": "<|endoftext|>",
        "co": "<|END_OF_TURN_TOKEN|>",
        "ge": "<end_of_turn>",
        "ll": "<|eot_id|>",
        "ph": "<|endoftext|>",
    }
    ends = eos.get(name[:2], "<|im_end|>")
    folder = save_tokenizer(Kind(template, (*control, "<|END_OF_TURN_TOKEN|>"), ends), tmp_path / name)
    tokenizer = ChatTokenizer(folder)
    for row in (PLAIN, ROWS["several turns"], ROWS["system"], ROWS["call, result and answer"]):
        ours = []
        with nullcontext() if row is PLAIN else suppress(Unusable):  # not every template has a system role, or calls
            ours = our_ids(tokenizer, row)
        for mine, theirs in zip(ours, ids_of_trl(folder, row) if ours else [], strict=True):
            own = mine[:-1] if name == "glm4moe" else mine
            assert own == theirs[: len(own)]
            after_the_turn(name, tokenizer, theirs[len(own) :])


def test_the_tool_template_of_a_model_renders_chats_with_tools(tmp_path):
    plain, tools = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}", "{{ tools | tojson }}"
    folder = save_tokenizer(Kind(plain, ("<s>", "</s>"), "</s>"), tmp_path / "model")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(tools + plain)
    assert isinstance(AutoTokenizer.from_pretrained(folder).chat_template, dict)
    for row in (PLAIN, ROWS["tools"]):
        assert our_ids(ChatTokenizer(folder), row) == ids_of_trl(folder, row)
