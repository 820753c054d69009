"""How many of the oldest turns of a chat are dropped until its prompt fits.

Each attempt renders the whole rest of the chat. One after the other would take the square of the number of turns, so the number
is found by bisection, where the template allows it.
"""

from collections.abc import Callable

from pipeline.source.messages import SYSTEM_ROLES, Message, Unusable


class Shortened:
    """A chat by the number of its oldest exchanges that are dropped.

    An exchange is a turn and everything up to the next user turn. A system turn and the last user turn stay.
    """

    def __init__(self, messages: list[Message]) -> None:
        num_system = sum(message["role"] in SYSTEM_ROLES for message in messages[:1])
        self._head, self._rest = messages[:num_system], messages[num_system:]
        later = (index for index, message in enumerate(self._rest) if index > 0 and message["role"] == "user")
        self._starts = [0, *later]

    def __len__(self) -> int:
        """Return how many chats there are: one more than exchanges can be dropped."""
        return len(self._starts)

    def __getitem__(self, num_dropped: int) -> list[Message]:
        return self._head + self._rest[self._starts[num_dropped] :]


def first_that_fits(num_chats: int, prompt_of: Callable[[int], str], fits: Callable[[str], bool]) -> int:
    """Return how many exchanges are dropped at least so that the prompt fits; `num_chats` if it never does.

    `prompt_of(n)` renders the chat without its `n` oldest exchanges, for `n < num_chats`. Nearly all templates print a
    shorter chat as a beginning and an end of the longer one: then fewer turns are fewer tokens, and bisection finds the first
    one. Others, which count their turns for example, are tried one by one.

    Raises:
        Unusable: The template refuses the whole chat, or one of those that are tried one by one.
    """
    whole = prompt_of(0)
    if fits(whole):
        return 0
    too_long, fitting = 0, num_chats
    try:
        while fitting - too_long > 1:
            middle = (too_long + fitting) // 2
            text = prompt_of(middle)
            if not _is_beginning_and_end(text, whole):
                return _first_one_by_one(num_chats, prompt_of, fits)
            too_long, fitting = (too_long, middle) if fits(text) else (middle, fitting)
    except Unusable:  # of a chat that may not be needed
        return _first_one_by_one(num_chats, prompt_of, fits)
    return fitting


def _first_one_by_one(num_chats: int, prompt_of: Callable[[int], str], fits: Callable[[str], bool]) -> int:
    return next((num for num in range(num_chats) if fits(prompt_of(num))), num_chats)


def _is_beginning_and_end(text: str, whole: str) -> bool:
    """Return whether a text is a beginning and an end of another one, put together."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if whole.startswith(text[:middle]) else (low, middle - 1)
    return whole.endswith(text[low:])
