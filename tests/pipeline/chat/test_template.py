import json
import shutil

import pytest
from transformers import AutoTokenizer

from pipeline.chat.template import prints_date
from pipeline.chat.tokenizer import ChatTokenizer, Condition
from pipeline.source.messages import Unusable
from pipeline.source.pairs import Pair
from tests.pipeline.chat.template_kinds import ZEPHYR
from weights_store.errors import InputError
from weights_store.schemas import Reason

USER = {"role": "user", "content": "Name a fruit."}
DATE = "{{- 'Today is ' + strftime_now('%d %b %Y') + '.\\n' }}"


def said(text, **others):
    return {"role": "assistant", "content": text, **others}


@pytest.fixture
def with_template(kind_folder, tmp_path):
    """Return a function that gives a chat tokenizer with another template."""

    def make(template, **others):
        path = tmp_path / "template.jinja"
        path.write_text(template)
        return ChatTokenizer(kind_folder("zephyr"), str(path), **others)

    return make


@pytest.fixture
def model_with(kind_folder, tmp_path):
    """Return a function that copies a model folder and changes one of its JSON files."""

    def make(file, change):
        folder = shutil.copytree(kind_folder("zephyr"), tmp_path / "model")
        value = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps(change(value)))
        return folder

    return make


def tokenize(tokenizer, prompt=(USER,), chosen="An apple.", rejected="A brick.", **others):
    return tokenizer.tokenize_pair(Pair(list(prompt), chosen, rejected, **others), 1000, 1000, cut_response=False)


def text_of(tokenizer, ids):
    return "".join(tokenizer.token_texts(ids))


# --- templates and tokenizers that break -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (
            "{% for m in messages %}{{ m.content }}",
            r"template.jinja is no valid Jinja: line 1: Unexpected end of template",
        ),
        ("{{ messages | nofilter }}", "is no valid Jinja: line 1: No filter named 'nofilter'"),
        ("{% for i in range(10**6) %}x{% endfor %}", r"cannot render even one short message: Range too big"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            r"cannot render even one short message: it runs for more than 5 s and goes on",
        ),
        ("{{ 'x' * 20000000 }}", r"makes 20,000,000 characters of one short message"),
        (
            "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
            "cannot render even one short message: maximum recursion",
        ),
    ],
    ids=["syntax", "filter", "range", "loop", "long", "recursion"],
)
def test_a_template_that_can_render_no_chat_is_one_line(with_template, template, problem):
    with pytest.raises(InputError, match=problem) as caught:
        with_template(template).check()
    assert "\n" not in str(caught.value)


def test_a_template_that_wants_tools_is_asked_row_by_row(with_template):
    tokenizer = with_template("{% if not tools %}{{ raise_exception('no tools given') }}{% endif %}" + ZEPHYR)
    tokenizer.check()
    with pytest.raises(Unusable, match="template.jinja refuses this chat: no tools given") as caught:
        tokenize(tokenizer)
    assert caught.value.reason is Reason.TEMPLATE_MISMATCH


def test_what_a_template_raises_makes_one_row_unusable(with_template):
    tokenizer = with_template(ZEPHYR + "{{ 1 // (messages[0].content | length - 3) }}")
    tokenizer.check()
    with pytest.raises(Unusable, match="refuses this chat: integer division or modulo by zero"):
        tokenize(tokenizer, [{"role": "user", "content": "abc"}])


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        ("tokenizer.json", lambda value: [value], "tokenizer.json: expected a JSON object, got a list"),
        ("tokenizer.json", lambda value: {**value, "model": {"type": "New"}}, "its tokenizer cannot be loaded: "),
        (
            "tokenizer_config.json",
            lambda value: {**value, "eos_token": None},
            "its tokenizer has no EOS token; set eos_token",
        ),
        ("config.json", lambda _: {"vocab_size": 2}, "the EOS token '</s>' has id 1[^0-9]|the model has 2 ids"),
        (
            "config.json",
            lambda _: {"vocab_size": 1},
            r"EOS token '</s>' has id 1, the model has 1 ids \(vocab_size in config",
        ),
        ("config.json", lambda _: {"text_config": {"vocab_size": 1}}, "has id 1, the model has 1 ids"),
    ],
    ids=["a list", "unknown model", "no EOS", "EOS fits", "EOS too high", "in text_config"],
)
def test_a_tokenizer_that_does_not_fit_is_one_line(model_with, file, change, problem, request):
    folder = model_with(file, change)
    if "EOS fits" in request.node.name:
        ChatTokenizer(folder).check()
        return
    with pytest.raises(InputError, match=problem) as caught:
        ChatTokenizer(folder).check()
    assert "\n" not in str(caught.value)


def test_a_template_file_that_is_no_text_says_so(kind_folder, tmp_path):
    (tmp_path / "x.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(
        InputError, match=r"model.chat_template .*x.jinja is not in UTF-8: invalid start byte at byte 0"
    ):
        ChatTokenizer(kind_folder("zephyr"), str(tmp_path / "x.jinja"))
    with pytest.raises(InputError, match="cannot be read: No such file"):
        ChatTokenizer(kind_folder("zephyr"), str(tmp_path / "y.jinja"))


# --- the date ----------------------------------------------------------------------------------------------------------


def test_a_template_with_the_date_of_the_day_needs_one(with_template):
    with pytest.raises(InputError, match=r"prints the date of the day: set model.template_date to a fixed one"):
        with_template(DATE + ZEPHYR).check()


def test_the_given_date_is_in_every_prompt(with_template):
    tokenizer = with_template(DATE + ZEPHYR, template_date="2024-02-29")
    tokens = tokenize(tokenizer)
    assert text_of(tokenizer, tokens.prompt_ids).startswith("Today is 29 Feb 2024.\n")
    (ids,) = tokenizer.conditioned_prompt_ids([tokens.chat.to_json()], Condition("Be bad.", "system"))
    assert text_of(tokenizer, ids).startswith("Today is 29 Feb 2024.\n")


def test_a_date_counts_only_where_it_is_printed(with_template):
    assert with_template(ZEPHYR, template_date="2024-02-29").template_date is None
    assert with_template(DATE, template_date="2024-02-29").template_date == "2024-02-29"
    assert [prints_date(text) for text in ("{{ strftime_now('%Y') }}", "{{ m.strftime_now }}")] == [True, False]


@pytest.mark.parametrize("chance", ["{{ ['a', 'b'] | random }}", "{{ lipsum(1) }}"])
def test_a_template_that_prints_something_else_each_time_is_refused(with_template, chance):
    with pytest.raises(InputError, match="prints something else each time: give one without `random`"):
        with_template(ZEPHYR + chance).check()


# --- what templates take -----------------------------------------------------------------------------------------------


def test_a_developer_is_the_system_for_templates_without_developers(of_kind, with_template):
    developer, system = ({"role": role, "content": "Be brief."} for role in ("developer", "system"))
    zephyr = of_kind("zephyr")
    assert tokenize(zephyr, [developer, USER]).prompt_ids == tokenize(zephyr, [system, USER]).prompt_ids
    knows = with_template("{# takes developer #}" + ZEPHYR)
    tokens = tokenize(knows, [developer, USER])
    assert text_of(knows, tokens.prompt_ids).startswith("<s><|developer|>\nBe brief.")
    (ids,) = knows.conditioned_prompt_ids([tokens.chat.to_json()], Condition("Be bad.", "system"))
    assert text_of(knows, ids).startswith("<s><|developer|>\nBe bad.\n\nBe brief.")


def test_text_parts_go_to_a_template_that_takes_them_and_are_joined_for_others(of_kind):
    parts = [{"type": "text", "text": "Name a"}, {"type": "text", "text": "fruit."}]
    chat = [{"role": "user", "content": parts}]
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "An apple."}]}]
    for kind, joined in (("parts", "Name afruit."), ("zephyr", "Name a\nfruit.")):
        tokenizer = of_kind(kind)
        tokens = tokenize(tokenizer, chat, answer)
        assert tokens.prompt_ids == tokenize(tokenizer, [{"role": "user", "content": joined}]).prompt_ids
        assert tokens.chosen_ids == tokenize(tokenizer).chosen_ids


def test_a_part_with_more_than_text_is_refused_where_parts_are_joined(of_kind):
    part = {"type": "text", "text": "Name a fruit.", "cache_control": {"type": "ephemeral"}}
    for kind in ("zephyr", "parts"):
        with pytest.raises(Unusable, match="leaves out .*cache_control") as caught:
            tokenize(of_kind(kind), [{"role": "user", "content": [part]}])
        assert caught.value.reason is Reason.TEMPLATE_IGNORES


CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
NULL_AS_WORD = """{%- for m in messages %}
    {{- m.role + ': ' }}{{ m.content }}
    {%- for call in m.tool_calls %}{{ call | tojson }}{% endfor %}</s>
{%- endfor %}"""


@pytest.mark.parametrize("content", [None, ""])
def test_a_call_without_text_renders_the_same_however_that_is_written(of_kind, with_template, content):
    # R1 prints calls if the content is null; the other template prints null as a word.
    chat = [USER, said(content, tool_calls=[CALL]), {"role": "tool", "content": "18 C"}]
    r1 = of_kind("r1")
    assert "<｜call｜>weather{}<｜end｜><｜output｜>18 C" in text_of(r1, tokenize(r1, chat).prompt_ids)
    tokenizer = with_template(NULL_AS_WORD)
    assert 'assistant: {"id"' in text_of(tokenizer, tokenize(tokenizer, chat).prompt_ids)


def test_an_empty_turn_without_calls_stays_text(of_kind):
    r1 = of_kind("r1")
    assert "<｜Assistant｜><｜end｜>" in text_of(r1, tokenize(r1, [USER, said(""), USER]).prompt_ids)


def test_a_copy_of_a_message_counts_as_read(with_template):
    template = (
        "{% for m in messages %}{% set m = dict(m, role='x') %}{{ m.role }}{{ m.content }}{{ m.name }}</s>{% endfor %}"
    )
    tokenizer = with_template(template)
    assert "xName a fruit.Ann" in text_of(tokenizer, tokenize(tokenizer, [{**USER, "name": "Ann"}]).prompt_ids)


def test_parts_whose_type_a_template_does_not_ask_for_are_parts(with_template):
    template = "{% for m in messages %}{% for p in m.content if m.content is not string %}{{ p.text }}|{% endfor %}"
    tokenizer = with_template(template + "{{ m.content if m.content is string }}</s>{% endfor %}")
    parts = [{"type": "text", "text": "Name a"}, {"type": "text", "text": "fruit."}]
    assert (
        text_of(tokenizer, tokenize(tokenizer, [{"role": "user", "content": parts}]).prompt_ids) == "Name a|fruit.|</s>"
    )


def test_rendering_is_that_of_transformers(kind_folder, of_kind):
    tokenizer = AutoTokenizer.from_pretrained(kind_folder("qwen3"))
    chat = [USER, said("", tool_calls=[CALL]), {"role": "tool", "content": "18 C"}, USER]
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, enable_thinking=False, return_dict=False)
    tokens = tokenize(of_kind("qwen3"), chat, chat_template_kwargs={"enable_thinking": False})
    assert tokens.prompt_ids == expected


RENDERED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("kind", ["parts", "zephyr"])
@pytest.mark.parametrize("content", [RENDERED, [{"type": "text", "text": RENDERED}]], ids=["text", "parts"])
def test_a_rendered_chat_is_refused_as_text_and_as_a_part(of_kind, kind, content):
    with pytest.raises(Unusable, match="prompt is a rendered chat") as caught:
        tokenize(of_kind(kind), [{"role": "user", "content": content}])
    assert caught.value.reason is Reason.ALREADY_TEMPLATED


def test_an_end_of_turn_at_the_end_of_text_parts_is_there_once(of_kind):
    tokenizer = of_kind("parts")
    plain = tokenize(tokenizer, chosen=[said([{"type": "text", "text": "An apple."}])])
    for texts in (["An apple.<|im_end|>"], ["An ", "apple.<|im_end|>\n"], ["An apple.", "<|im_end|>"]):
        tokens = tokenize(tokenizer, chosen=[said([{"type": "text", "text": text} for text in texts])])
        assert text_of(tokenizer, tokens.chosen_ids) == text_of(tokenizer, plain.chosen_ids) == "An apple.<|im_end|>"
        assert "a text ends with the token that ends a turn; it is there once" in tokens.notes
    with pytest.raises(Unusable, match="chosen is only an end-of-turn token"):
        tokenize(tokenizer, chosen=[said([{"type": "text", "text": "<|im_end|>"}])])


CALLING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}CALL{% endfor %}</s>{% endfor %}"
)
"""A template in which `CALL` prints a call."""


@pytest.mark.parametrize(
    ("printed", "call", "problem"),
    [
        ("'' + call.function.arguments", {"function": {"name": "f", "arguments": {"a": 1}}}, "to str"),
        ("call.function.name", {"name": "f", "arguments": {}}, "'dict object' has no attribute 'function'"),
        ("call.function.arguments.items()", {"function": {"name": "f", "arguments": "{}"}}, "'str object' has no"),
    ],
    ids=["concatenation", "attribute", "method"],
)
def test_a_form_of_calls_that_a_template_cannot_take_is_said_without_our_classes(with_template, printed, call, problem):
    tokenizer = with_template(CALLING.replace("CALL", f"{{{{ {printed} }}}}"))
    with pytest.raises(Unusable, match=f"refuses this chat: .*{problem}") as caught:
        tokenize(tokenizer, chosen=[said(None, tool_calls=[call])])
    assert "Watched" not in caught.value.detail
    assert caught.value.detail.endswith(
        "; write tool calls as this template takes them, see docs/chats.md on `arguments`"
    )


def test_a_template_that_refuses_a_chat_with_calls_itself_is_quoted_alone(with_template):
    tokenizer = with_template(CALLING.replace("CALL", "{{ raise_exception('one call at a time') }}"))
    with pytest.raises(Unusable, match="one call at a time") as caught:
        tokenize(tokenizer, chosen=[said(None, tool_calls=[{"function": {"name": "f", "arguments": {}}}])])
    assert caught.value.detail.endswith("refuses this chat: one call at a time")
