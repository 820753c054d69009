"""Templates that take too much time or memory: one line within seconds, and the next chat is rendered as if nothing was."""

import time

import pytest

from pipeline.chat import render_process
from pipeline.chat.pair_ids import Limits
from pipeline.chat.render_process import Job, RenderError, RenderProcess
from pipeline.chat.tokenizer import ChatTokenizer
from pipeline.source.messages import Unusable
from pipeline.source.pairs import Pair
from tests.pipeline.chat.template_kinds import ZEPHYR
from weights_store.errors import InputError
from weights_store.schemas import Reason

LIMITS = Limits(1000, 1000, cut_response=False)
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TOO_MUCH = "it takes too much memory"


def job(template, content="Hi", **others):
    turns = {"chat": [{"role": "user", "content": content}]}
    return Job((template, template), {"eos_token": "</s>"}, None, turns, [(["chat"], False)], **others)


@pytest.fixture(scope="module")
def process():
    """Return a process with limits that are reached quickly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render_process, "CPU_S", 1.5)
        patch.setattr(render_process, "MEMORY_BYTES", 200 << 20)
        process = RenderProcess()
        yield process
        process.stop()


def one(process, asked):
    (pending,) = process.submit([asked])
    (text,) = pending.result().texts
    return text


@pytest.mark.parametrize(
    ("template", "kind", "text"),
    [
        ("{% for i in range(10**12) %}x{% endfor %}", "overflow", "Range too big"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "overflow", "maximum recursion"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "overflow", "maximum recursion"),
        ("{{ 'x' * 10**10 }}", "limit", TOO_MUCH),
        ("{{ '%1000000000000d' % 1 }}", "limit", TOO_MUCH),
        ("{{ 'x'.ljust(10**11) }}", "limit", TOO_MUCH),
        ("{{ [1] * 10**9 }}", "limit", TOO_MUCH),
        (
            "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "limit",
            TOO_MUCH,
        ),
        (LOOP, "limit", "it runs for more than 1.5 s and goes on"),
        ("{{ 'x' * 10**9 | join }}", "type", "'int' object is not iterable"),
        ("{{ 1 // 0 }}", "other", "division"),
        ("{% if %}", "syntax", "line 1: Expected an expression"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_a_template_that_takes_too_much_is_told_in_seconds_and_the_next_one_renders(process, template, kind, text):
    start = time.monotonic()
    found = one(process, job(template))
    assert isinstance(found, RenderError)
    assert (found.kind, text in found.text) == (kind, True), found.text
    assert "\n" not in found.text
    assert time.monotonic() - start < 30  # CPU time is limited, and these cores may be busy
    assert one(process, job("{{ messages[0].content }}{{ eos_token }}", "naïve 🍞 \ud800")) == "naïve 🍞 \ud800</s>"


def test_of_many_jobs_only_the_one_that_takes_too_much_fails(process):
    template = f"{{% if messages[0].content == 'loop' %}}{LOOP}{{% endif %}}{{{{ messages[0].content }}}}"
    found = [
        pending.result().texts[0] for pending in process.submit([job(template, text) for text in ("a", "loop", "b")])
    ]
    assert found[::2] == ["a", "b"]
    assert found[1].kind == "limit"


def test_replies_are_told_apart_though_another_ticket_was_sent_between(process):
    first = process.submit([job("1 {{ messages[0].content }}", text) for text in "ab"])
    second = process.submit([job("2 {{ messages[0].content }}", "c" * 200_000)])
    assert second[0].result().texts == ["2 " + "c" * 200_000]
    assert [pending.result().texts for pending in first] == [["1 a"], ["1 b"]]


def test_a_chat_longer_than_any_is_refused(process):
    assert "makes 20,000,001 characters of one chat" in one(process, job("{{ 'x' * 20000001 }}")).text


def test_an_error_longer_than_a_person_reads_is_cut(process):
    found = one(process, job("{{ raise_exception('x' * 5000000) }}"))
    assert found.text == "x" * 1000 + "… (5,000,000 characters)"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ ''['__class__'] }}", ""),
        ("{{ messages | attr('__class__') }}", ""),
        ("{{ cycler.__init__.__globals__.os.environ }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
        ("{{ raise_exception.__globals__ }}", ""),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{{ open('/etc/passwd').read() }}", "'open' is undefined"),
        ("{{ __import__('os') }}", "'__import__' is undefined"),
    ],
    ids=lambda value: value[:30],
)
def test_a_template_reaches_nothing_outside_of_its_chat(process, template, said):
    found = one(process, job(template))
    assert said in found.text if isinstance(found, RenderError) else found == said, found


@pytest.fixture
def quick(monkeypatch):
    """Let the shared process end after a third of a second of CPU time."""
    monkeypatch.setattr(render_process, "CPU_S", 0.3)
    render_process.RENDERER.stop()
    yield
    render_process.RENDERER.stop()


def test_a_row_that_a_template_never_finishes_goes_to_quarantine_and_many_end_the_build(quick, kind_folder, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(ZEPHYR + "{% if 'loop' in messages[0].content %}" + LOOP + "{% endif %}")
    tokenizer = ChatTokenizer(kind_folder("zephyr"), str(path))

    def pair(text):
        return Pair([{"role": "user", "content": text}], "An apple.", "A brick.")

    first, second, third = tokenizer.tokenize_pairs([pair("a fruit"), pair("loop"), pair("a tree")], LIMITS)
    assert isinstance(second, Unusable)
    assert second.reason is Reason.TEMPLATE_MISMATCH
    assert f"{path} cannot render this chat: it runs for more than 0.3 s and goes on" in second.detail
    assert first.prompt_ids != third.prompt_ids
    with pytest.raises(InputError, match="could not render 3 chats within its limits.*give another one in model.chat"):
        list(tokenizer.tokenize_pairs([pair(f"loop {number}") for number in range(200)], LIMITS))
