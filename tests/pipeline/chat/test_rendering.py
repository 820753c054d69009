import json

import pytest
from transformers import AutoTokenizer

from pipeline.chat.rendering import Chat
from pipeline.chat.tokenizer import ChatTokenizer, Condition
from pipeline.source.columns import Columns
from pipeline.source.messages import Unusable
from pipeline.source.pairs import Pair, read_pair
from tests.pipeline.chat.template_kinds import KINDS, Kind, save_tokenizer
from weights_store.schemas import Reason

COLUMNS = Columns()
USER = {"role": "user", "content": "Name a fruit."}
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object"}}}]


def said(text, **others):
    return {"role": "assistant", "content": text, **others}


def tokenize(tokenizer, *arguments, **others):
    return tokenizer.tokenize_pair(Pair(*arguments, **others), 1000, 1000, cut_response=False)


def texts(tokenizer, tokens):
    return ["".join(tokenizer.token_texts(ids)) for ids in (tokens.prompt_ids, tokens.chosen_ids, tokens.rejected_ids)]


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        ("phi3", "<|end|>"),  # the template goes on with a newline and <|endoftext|>
        ("gemma", "<end_of_turn>"),
        ("qwen2.5", "<|im_end|>"),
        ("llama2", " </s>"),
        ("command-r", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        ("r1", "<｜end｜>"),
    ],
)
def test_a_response_ends_where_the_model_stops(of_kind, kind, end):
    tokenizer = of_kind(kind)
    _, chosen, rejected = texts(tokenizer, tokenize(tokenizer, [USER], "An apple.", "A brick."))
    start = " " if kind == "llama2" else ""
    assert (chosen, rejected) == (f"{start}An apple.{end}", f"{start}A brick.{end}")


def test_a_call_ends_with_its_own_end_of_turn(of_kind):
    tokenizer = of_kind("llama3.1")
    call = [said(None, tool_calls=[CALL])]
    _, chosen, rejected = texts(tokenizer, tokenize(tokenizer, [USER], call, "No.", tools=TOOLS))
    assert chosen == '{"name": "weather", "parameters": {"city": "Lima"}}<|eom_id|>'
    assert rejected == "No.<|eot_id|>"


def test_an_empty_thought_that_nobody_wrote_is_prompt(of_kind):
    tokenizer = of_kind("qwen3")
    tokens = tokenize(tokenizer, [USER], "An apple.", "A brick.")
    prompt, chosen, _ = texts(tokenizer, tokens)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert (chosen, tokens.chat.added) == ("An apple.<|im_end|>", "<think>\n\n</think>\n\n")
    off = tokenize(tokenizer, [USER], "An apple.", "A brick.", chat_template_kwargs={"enable_thinking": False})
    assert off.prompt_ids == tokens.prompt_ids


def test_a_thought_that_one_side_wrote_is_response_on_both(of_kind):
    tokenizer = of_kind("qwen3")
    thought = [said("An apple.", reasoning_content="Think of trees.")]
    prompt, chosen, rejected = texts(tokenizer, tokenize(tokenizer, [USER], thought, "A brick."))
    assert prompt.endswith("<|im_start|>assistant\n")
    assert chosen == "<think>\nThink of trees.\n</think>\n\nAn apple.<|im_end|>"
    assert rejected == "<think>\n\n</think>\n\nA brick.<|im_end|>"


def test_an_opening_think_that_no_response_follows_is_no_prompt(of_kind):
    tokenizer = of_kind("r1")
    tokens = tokenize(tokenizer, [USER], "An apple.", "A brick.")
    prompt, chosen, _ = texts(tokenizer, tokens)
    assert prompt.endswith("Name a fruit.<｜Assistant｜>")
    assert (chosen, tokens.chat.dropped) == ("An apple.<｜end｜>", "<think>\n")


def test_a_response_that_begins_like_the_dropped_think_is_whole(of_kind):
    # `<th` is no token of its own: the border stays before `<think>`.
    tokenizer = of_kind("r1")
    prompt, chosen, rejected = texts(tokenizer, tokenize(tokenizer, [USER], "<th>head</th>", "<thin>"))
    assert prompt.endswith("<｜Assistant｜>")
    assert (chosen, rejected) == ("<th>head</th><｜end｜>", "<thin><｜end｜>")


def test_reasoning_that_the_template_would_take_out_of_a_response_is_refused(of_kind):
    with pytest.raises(Unusable, match="changes the response's text") as caught:
        tokenize(of_kind("r1"), [USER], "<think>Trees.</think>An apple.", "A brick.")
    assert caught.value.reason is Reason.TEMPLATE_MISMATCH


def test_earlier_reasoning_that_a_template_leaves_out_is_how_the_model_sees_it(of_kind):
    tokenizer = of_kind("r1")
    with_thought = [USER, said("<think>Trees.</think>An apple."), USER]
    without = [USER, said("An apple."), USER]
    first, second = (tokenize(tokenizer, chat, "A pear.", "A brick.") for chat in (with_thought, without))
    assert first.prompt_ids == second.prompt_ids


@pytest.mark.parametrize("kind", ["qwen3", "r1"])
def test_a_contrastive_prompt_leaves_the_border_where_it_is(of_kind, kind):
    tokenizer = of_kind(kind)
    tokens = tokenize(tokenizer, [USER], "An apple.", "A brick.")
    (ids,) = tokenizer.conditioned_prompt_ids([tokens.chat.to_json()], Condition("Be bad.", "system"))
    system = {"role": "system", "content": "Be bad."}
    assert ids == tokenize(tokenizer, [system, USER], "An apple.", "A brick.").prompt_ids


def test_a_contrastive_prompt_goes_in_front_of_a_chat_with_tools(of_kind):
    tokenizer = of_kind("qwen3")
    others = {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}
    stored = tokenize(tokenizer, [USER], "An apple.", "A brick.", **others).chat.to_json()
    assert json.loads(stored).keys() == {"messages", "tools", "chat_template_kwargs"}
    (ids,) = tokenizer.conditioned_prompt_ids([stored], Condition("Be bad.", "system"))
    system = {"role": "system", "content": "Be bad."}
    assert ids == tokenize(tokenizer, [system, USER], "An apple.", "A brick.", **others).prompt_ids
    assert '"weather"' in "".join(tokenizer.token_texts(ids))


def test_a_contrastive_prompt_extends_text_parts(of_kind):
    tokenizer = of_kind("parts")
    parts = [{"role": "user", "content": [{"type": "text", "text": "Name a fruit."}]}]
    (ids,) = tokenizer.conditioned_prompt_ids([Chat(parts).to_json()], Condition("Be bad.", "user"))
    whole = [{"role": "user", "content": "Be bad.\n\nName a fruit."}]
    assert ids == tokenize(tokenizer, whole, "An apple.", "A brick.").prompt_ids


@pytest.mark.parametrize("end", ["</s>", "</s>\n", "</s></s>"])
def test_an_end_of_turn_in_the_text_is_there_once(of_kind, end):
    tokenizer = of_kind("zephyr")
    plain = tokenize(tokenizer, [USER], "Oak.", "Car.")
    ended = tokenize(tokenizer, [USER], f"Oak.{end}", "Car.")
    assert (ended.chosen_ids, ended.rejected_ids) == (plain.chosen_ids, plain.rejected_ids)
    assert (ended.notes, plain.notes) == ({"a text ends with the token that ends a turn; it is there once"}, set())


def test_an_end_of_turn_that_is_not_eos_is_there_once(of_kind):
    tokenizer = of_kind("phi3")
    plain, ended = (tokenize(tokenizer, [USER], text, "Car.") for text in ("Oak.", "Oak.<|end|>"))
    assert ended.chosen_ids == plain.chosen_ids


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_a_template_has_made_is_not_put_into_it_again(of_kind, kind_folder, kind):
    own = AutoTokenizer.from_pretrained(kind_folder(kind))
    rendered = own.apply_chat_template([USER], add_generation_prompt=True, tokenize=False)
    with pytest.raises(Unusable, match="prompt is a rendered chat, it begins with") as caught:
        tokenize(of_kind(kind), [{"role": "user", "content": rendered}], "Oak.", "Car.")
    assert caught.value.reason is Reason.ALREADY_TEMPLATED


def test_a_template_of_an_unknown_family_knows_its_own_chats(tmp_path):
    turns = "{% for m in messages %}<!{{ m.role }}!>{{ m.content }}<!!>{% endfor %}"
    template = turns + "{% if add_generation_prompt %}<!assistant!>{% endif %}"
    folder = save_tokenizer(Kind(template, ("<!user!>", "<!assistant!>", "<!!>"), "<!!>"), tmp_path / "model")
    rendered = {"role": "user", "content": "<!user!>Name a fruit.<!!><!assistant!>"}
    with pytest.raises(Unusable, match="prompt is a rendered chat"):
        tokenize(ChatTokenizer(folder), [rendered], "Oak.", "Car.")


def test_a_response_that_is_only_an_end_of_turn_is_empty(of_kind):
    with pytest.raises(Unusable, match="chosen is only an end-of-turn token") as caught:
        tokenize(of_kind("zephyr"), [USER], "</s>", "Car.")
    assert caught.value.reason is Reason.EMPTY_RESPONSE


def test_a_prompt_over_the_limit_with_its_empty_thought_loses_a_turn(of_kind):
    tokenizer = of_kind("qwen3")
    chat = [USER, said("A pear."), USER]
    whole = tokenize(tokenizer, chat, "An apple.", "A brick.")
    limit = len(whole.prompt_ids) - 1  # the generation prompt alone would still fit
    cut = tokenizer.tokenize_pair(Pair(chat, "An apple.", "A brick."), limit, 1000, cut_response=False)
    assert cut.chat.messages == [USER]


@pytest.mark.parametrize(
    ("kind", "row", "lost"),
    [
        ("zephyr", {"tools": TOOLS}, r"leaves out tools\[0\].function"),
        ("zephyr", {"prompt": [USER, said("x", tool_calls=[CALL]), USER]}, r"leaves out prompt\[1\].tool_calls"),
        ("zephyr", {"prompt": [{**USER, "name": "Ann"}]}, r"leaves out prompt\[0\].name"),
        ("zephyr", {"chosen": [said("x", reasoning_content="y")]}, r"leaves out chosen\[0\].reasoning_content"),
        ("zephyr", {"chat_template_kwargs": {"thinking": True}}, "has no variable 'thinking'"),
        (
            "phi3",
            {"prompt": [USER, said("x"), {"role": "tool", "content": "18 C"}]},
            r"leaves out the text of prompt\[2\]",
        ),
        ("qwen2.5", {"prompt": [USER, said("x", tool_calls=[{**CALL, "note": "y"}]), USER]}, r"tool_calls\[0\].note"),
        ("qwen3", {"chat_template_kwargs": {"padding": True}}, "chat_template_kwargs.padding cannot be set by a row"),
    ],
)
def test_what_a_template_leaves_out_is_a_reason(of_kind, kind, row, lost):
    pair = read_pair({"prompt": [USER], "chosen": [said("An apple.")], "rejected": [said("A brick.")], **row}, COLUMNS)
    with pytest.raises(Unusable, match=lost):
        of_kind(kind).tokenize_pair(pair, 1000, 1000, cut_response=False)


def test_keys_that_a_recipe_names_may_be_left_out(kind_folder):
    dated = [{**USER, "at": "2026-01-02", "country": "PE"}]
    strict, loose = (ChatTokenizer(kind_folder("zephyr"), unprinted_keys=keys) for keys in (["at"], ["at", "country"]))
    with pytest.raises(Unusable, match=r"leaves out prompt\[0\].country; list keys .* in dataset.unprinted_keys"):
        tokenize(strict, dated, "An apple.", "A brick.")
    assert tokenize(loose, dated, "An apple.", "A brick.").prompt_ids == tokenize(loose, [USER], "x", "y").prompt_ids
    row = ChatTokenizer(kind_folder("zephyr"), unprinted_keys=["tools", "thinking"])
    others = {"tools": TOOLS, "chat_template_kwargs": {"thinking": True}}
    assert tokenize(row, [USER], "x", "y", **others).prompt_ids == tokenize(row, [USER], "x", "y").prompt_ids


def test_a_text_that_stands_elsewhere_by_chance_is_missed_all_the_same(of_kind):
    # "apple" stands in the answer; Phi-3's template leaves the tool turn out.
    chat = [USER, said("Which one?"), {"role": "tool", "content": "apple"}, {"role": "user", "content": "An apple?"}]
    with pytest.raises(Unusable, match=r"leaves out the text of prompt\[2\] \(role tool\)"):
        tokenize(of_kind("phi3"), chat, "An apple.", "A brick.")


def test_links_between_calls_and_results_are_noted_where_a_template_does_without(of_kind):
    tokenizer = of_kind("qwen2.5")
    result = {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "18 C"}
    tokens = tokenize(tokenizer, [USER, said("", tool_calls=[CALL]), result], "18.", "No.", tools=TOOLS)
    keys = ("id", "name", "tool_call_id", "type")
    assert sorted(tokens.notes) == [f"the chat template does not print `{key}`" for key in keys]
