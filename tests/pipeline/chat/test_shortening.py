"""The oldest turns of a long chat: the same are dropped as one after the other, with far fewer renderings."""

import itertools

import pytest

from pipeline.chat.render_process import RENDERER
from pipeline.chat.shortening import Shortened, first_that_fits
from pipeline.chat.tokenizer import ChatTokenizer
from pipeline.source.messages import Unusable
from pipeline.source.pairs import Pair
from tests.pipeline.chat.template_kinds import KINDS, ZEPHYR
from weights_store.schemas import Reason


def chat(num_exchanges):
    words = ("apple", "tree", "naïve", "🍞", "weather in Lima")
    turns = [
        {"role": role, "content": f"{words[(number + shift) % 5]} {number}" * (1 + number % 3)}
        for number in range(num_exchanges)
        for shift, role in enumerate(("user", "assistant"))
    ]
    return [*turns, {"role": "user", "content": "Name a fruit."}]


def one_by_one(tokenizer, turns, limit):
    """Return the chat without its oldest exchanges that fits, as it was found before: drop one, render, count again."""
    starts = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    for start in starts:
        tokens = tokenizer.tokenize_pair(Pair(turns[start:], "An apple.", "A brick."), 100_000, 100, cut_response=False)
        if len(tokens.prompt_ids) <= limit:
            return tokens
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_turns_are_dropped_as_one_after_the_other(of_kind, kind):
    tokenizer, turns = of_kind(kind), chat(9)
    for limit in (40, 90, 160):
        expected = one_by_one(tokenizer, turns, limit)
        found = tokenizer.tokenize_pair(Pair(turns, "An apple.", "A brick."), limit, 100, cut_response=False)
        assert (found.chat, found.prompt_ids, found.chosen_ids) == (
            expected.chat,
            expected.prompt_ids,
            expected.chosen_ids,
        )
        assert found.prompt_was_cut


def test_a_template_that_numbers_turns_drops_the_same_too(kind_folder, tmp_path):
    # The whole chat is not the start and an end of it: "Turn 12" becomes "Turn 2".
    path = tmp_path / "template.jinja"
    path.write_text(ZEPHYR.replace("'<|' + message.role", "'Turn ' ~ loop.index ~ '<|' + message.role"))
    tokenizer, turns = ChatTokenizer(kind_folder("zephyr"), str(path)), chat(9)
    for limit in (90, 160):
        found = tokenizer.tokenize_pair(Pair(turns, "An apple.", "A brick."), limit, 100, cut_response=False)
        assert found.prompt_ids == one_by_one(tokenizer, turns, limit).prompt_ids


def test_dropping_half_of_3000_turns_renders_a_dozen_chats():
    asked = []

    def prompt_of(num_dropped):
        asked.append(num_dropped)
        return "start" + "".join(f" turn {number}" for number in range(num_dropped, 1500))

    assert first_that_fits(1500, prompt_of, lambda text: len(text) <= 8000) == next(
        number
        for number in itertools.count()
        if len("start" + "".join(f" turn {n}" for n in range(number, 1500))) <= 8000
    )
    assert len(asked) <= 14  # 1 + log2(1500) + 1 more that the search above does not ask for


def test_no_chat_fits_if_not_even_the_last_does():
    assert first_that_fits(5, lambda num_dropped: "x" * (9 - num_dropped), lambda text: len(text) < 5) == 5
    assert first_that_fits(1, lambda _: "x", lambda _: False) == 1


def test_a_template_that_refuses_a_chat_in_the_middle_is_asked_one_by_one():
    def prompt_of(num_dropped):
        if num_dropped == 3:
            raise Unusable(Reason.TEMPLATE_MISMATCH, "not this one")
        return "x" * (9 - num_dropped)

    assert first_that_fits(7, prompt_of, lambda text: len(text) <= 8) == 1
    with pytest.raises(Unusable, match="not this one"):
        first_that_fits(7, prompt_of, lambda text: len(text) <= 5)


def test_a_system_turn_stays_and_an_exchange_ends_before_the_next_user_turn():
    roles = ["system", "user", "assistant", "tool", "assistant", "user", "assistant", "user"]
    chats = Shortened([{"role": role, "content": str(number)} for number, role in enumerate(roles)])
    assert [[turn["content"] for turn in chats[number]] for number in range(len(chats))] == [
        list("01234567"),
        list("0567"),
        list("07"),
    ]


def test_every_text_of_a_long_chat_is_looked_for_with_two_renderings(of_kind, monkeypatch):
    tokenizer, jobs, submit = of_kind("zephyr"), [], RENDERER.submit
    tokenizer.tokenize_pair(Pair(chat(1), "An apple.", "A brick."), 1000, 100, cut_response=False)
    monkeypatch.setattr(RENDERER, "submit", lambda asked: jobs.extend(asked) or submit(asked))
    tokens = tokenizer.tokenize_pair(Pair(chat(200), "An apple.", "A brick."), 100_000, 100, cut_response=False)
    assert len(tokens.chat.messages) == 401
    assert len(jobs) == 3  # the pair, and a chat with other words in each place of its prompt and of a response
