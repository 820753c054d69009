"""Ids of one pair within the limits of a recipe: which turns of its prompt are dropped, and what is too long.

Called by `tokenizer.py`, which reads the pair and begins to render it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from pipeline.chat.control_tokens import ControlTokens
from pipeline.chat.rendering import Chat, PairRenderer, RenderedPair
from pipeline.chat.shortening import Shortened, first_that_fits
from pipeline.source.messages import Unusable
from weights_store.schemas import SIDES, Reason

_WALLS = ("\n", "|", "0")
"""Characters in front of a response that is tokenised apart from its prompt."""


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """One pair as ids, of which one response may have none. `chat` is the chat before them, without turns that did not fit."""

    chat: Chat
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt_was_cut: bool = False
    response_was_cut: bool = False
    notes: frozenset[str] = frozenset()
    """What people should know of the ids, though nothing is wrong with them."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a pair may be.

    The oldest turns of a long prompt are dropped. A long response is cut (`cut_response`) or refused. `context` is the longest
    sequence of the model, one position of which the scoring engine needs; None: no limit.
    """

    max_prompt_tokens: int
    max_response_tokens: int
    cut_response: bool
    context: int | None = None


class PairInWork:
    """A pair that is being rendered.

    Args:
        chat: What stands before the responses.
        renderer_of: Returns what renders the pair with another chat.
        controls: Of the tokenizer.
        unprinted_keys: Keys of messages and rows that the template may leave out.
        notes: See `TokenizedPair`.

    Raises:
        Unusable: Its texts have both control tokens and private-use characters.
    """

    def __init__(
        self,
        chat: Chat,
        renderer_of: Callable[[Chat], PairRenderer],
        controls: ControlTokens,
        unprinted_keys: frozenset[str],
        notes: frozenset[str],
    ) -> None:
        self._chat, self._renderer_of, self._controls = chat, renderer_of, controls
        self._unprinted_keys, self._notes = unprinted_keys, notes
        self.renderer = renderer_of(chat)
        """Of the whole chat."""

    def tokenized(self, limits: Limits) -> TokenizedPair:
        """Return the ids of the pair.

        Raises:
            Unusable: The pair is over a limit, or the template cannot render it or would leave out a part of it.
            InputError: The template has broken its limits of time or memory too often.
        """
        renderer, prompt_ids, rendered = self._within(limits.max_prompt_tokens)
        to_ids = partial(self._controls.ids, is_hidden=renderer.is_hidden)
        sides = []
        for side, text in zip(SIDES, rendered.responses, strict=True):
            beginning = self._controls.beginning(text, limits.max_response_tokens)
            ids = _response_ids(to_ids, rendered.prompt, prompt_ids, beginning) if text else []
            if len(ids) > limits.max_response_tokens and not limits.cut_response:
                num = f"{len(ids)}" if beginning == text else f"more than {len(ids)}"
                detail = f"{side} has {num} tokens, limit dataset.max_response_tokens = {limits.max_response_tokens}"
                raise Unusable(Reason.RESPONSE_TOO_LONG, detail)
            sides.append(ids)
        chosen_ids, rejected_ids = (ids[: limits.max_response_tokens] for ids in sides)
        if chosen_ids == rejected_ids:  # after cutting, or because the template changes the texts
            raise Unusable(Reason.CHOSEN_EQUALS_REJECTED, "the responses have the same tokens")
        longest = len(prompt_ids) + max(len(chosen_ids), len(rejected_ids))
        if limits.context is not None and longest >= limits.context:
            detail = f"prompt and response have {longest} tokens, the model's context is {limits.context}"
            raise Unusable(Reason.RESPONSE_TOO_LONG, detail)
        notes = (f"the chat template does not print `{key}`" for key in rendered.left_out)
        return TokenizedPair(
            rendered.chat,
            prompt_ids,
            chosen_ids,
            rejected_ids,
            prompt_was_cut=len(rendered.chat.messages) < len(self._chat.messages),
            response_was_cut=any(len(ids) > limits.max_response_tokens for ids in sides),
            notes=self._notes.union(notes),
        )

    def _within(self, limit: int) -> tuple[PairRenderer, list[int], RenderedPair]:
        """Return a pair without the oldest turns that do not fit: its renderer, the ids of its prompt, and its text.

        Raises:
            Unusable: The last turn alone does not fit.
        """
        chats = Shortened(self._chat.messages)
        known: dict[tuple[str, bool], list[int] | None] = {}

        def renderer_of(num_dropped: int) -> PairRenderer:
            if not num_dropped:
                return self.renderer
            return self._renderer_of(replace(self._chat, messages=chats[num_dropped]))

        def ids_of(text: str, is_hidden: bool) -> list[int] | None:
            """Return the ids of a prompt; None if they are far more than the limit."""
            if (text, is_hidden) not in known:
                is_near = self._controls.beginning(text, limit) == text
                known[text, is_hidden] = self._controls.ids(text, is_hidden) if is_near else None
            return known[text, is_hidden]

        def fits(text: str) -> bool:
            ids = ids_of(text, self.renderer.is_hidden)
            return ids is not None and len(ids) <= limit

        last: list[int] | None = None
        for num_dropped in range(first_that_fits(len(chats), lambda num: renderer_of(num).prompt, fits), len(chats)):
            renderer = renderer_of(num_dropped)
            rendered = renderer.pair(self._unprinted_keys)
            last = ids_of(rendered.prompt, renderer.is_hidden)
            if last is not None and len(last) <= limit:  # else too long with what is printed before both responses
                return renderer, last, rendered
        last = last or ids_of(renderer_of(len(chats) - 1).prompt, self.renderer.is_hidden)
        num_tokens = f"more than {limit}" if last is None else f"{len(last)}"
        detail = f"the last turn alone has {num_tokens} tokens, limit dataset.max_prompt_tokens = {limit}"
        raise Unusable(Reason.PROMPT_TOO_LONG, detail)


def _response_ids(to_ids: Callable[[str], list[int]], prompt: str, prompt_ids: list[int], response: str) -> list[int]:
    """Return the ids of a response after its prompt, with the end-of-turn token.

    Prompt and response are tokenised together, so that no tokenizer adds a space where they meet. If a token would span both,
    the response is tokenised behind a character that joins with nothing, because the model generates after whole prompt tokens.
    """
    joint = to_ids(prompt + response)
    if joint[: len(prompt_ids)] == prompt_ids:
        return joint[len(prompt_ids) :]
    for wall in _WALLS:
        wall_ids, ids = to_ids(wall), to_ids(wall + response)
        if ids[: len(wall_ids)] == wall_ids:
            return ids[len(wall_ids) :]
    return to_ids(response)
