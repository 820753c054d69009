"""Hands requests to vLLM little by little, and brings each answer to whoever asked. Nothing here imports vLLM.

vLLM's own cost of a request is a tenth of a millisecond of Python. Handing over a whole chunk before its first step would leave
a GPU idle for that long. Handed over between the steps, it costs nothing where vLLM computes the next step meanwhile (V2).
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from weights_store.errors import EngineError, OutOfMemoryError
from weights_store.messages import first_line

_AHEAD_STEPS = 4
"""Steps whose requests vLLM holds: the one that runs, the one behind it, and room for what the prefix cache takes off."""
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "no available memory for the cache blocks")


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request under its key: how to make its prompt and parameters, and what takes its `vllm.RequestOutput`.

    `num_tokens` estimates what it adds to the steps; 0 hands it over at once.
    """

    key: int
    make: Callable[[], tuple[Any, Any]]
    answer: Callable[[Any], None]
    num_tokens: int = 0


class RequestQueue:
    """The requests that vLLM's engine has not answered, in order.

    Args:
        engine: A `vllm.LLMEngine`.
        step_tokens: Most tokens of a step.
    """

    def __init__(self, engine: Any, step_tokens: int) -> None:
        self._engine = engine
        self._most_tokens = _AHEAD_STEPS * step_tokens
        self._waiting: deque[EngineRequest] = deque()
        self._inside: dict[int, EngineRequest] = {}
        self._num_tokens = 0
        self._unanswered: set[int] = set()

    def add(self, requests: Sequence[EngineRequest], *, first: bool = False) -> None:
        """Queue requests behind all others, or before those that vLLM does not have yet."""
        if first:
            self._waiting.extendleft(reversed(requests))
        else:
            self._waiting.extend(requests)
        self._unanswered.update(request.key for request in requests)

    def run(self, keys: Collection[int]) -> None:
        """Step until these requests are answered. If that fails, they are dropped; if a step fails, all requests are.

        Raises:
            OutOfMemoryError: A step did not fit into memory.
            EngineError: A step failed for another reason, or requests got lost.
            Exception: vLLM refuses a request, or an answer cannot be taken.
        """
        try:
            while not self._unanswered.isdisjoint(keys):
                for output in self._outputs():
                    request = self._inside.pop(int(output.request_id))
                    self._num_tokens -= request.num_tokens
                    self._unanswered.remove(request.key)
                    request.answer(output)
        except EngineError:
            self._forget(set(self._unanswered))  # the engine is lost
            raise
        except Exception:
            # What was asked before the failure must not run with the next call. What others asked for goes on.
            self._engine.abort_request([str(key) for key in self._forget(set(keys))])
            raise

    def _outputs(self) -> list[Any]:
        """Hand over what the next steps need, and return what the engine finishes in one step."""
        while self._waiting and (self._num_tokens < self._most_tokens or not self._waiting[0].num_tokens):
            request = self._waiting[0]
            prompt, params = request.make()
            self._engine.add_request(str(request.key), prompt, params)
            # Only now: a request that vLLM refuses still waits, and fails for whoever runs it.
            self._inside[request.key] = self._waiting.popleft()
            self._num_tokens += request.num_tokens
        if not self._engine.has_unfinished_requests():
            raise EngineError(f"the engine failed: {len(self._unanswered)} requests have no answer")
        with reporting_errors():
            return list(self._engine.step())

    def _forget(self, keys: set[int]) -> list[int]:
        """Drop requests; return the keys of those that vLLM has."""
        self._waiting = deque(request for request in self._waiting if request.key not in keys)
        self._unanswered -= keys
        inside = [key for key in self._inside if key in keys]
        for key in inside:
            self._num_tokens -= self._inside.pop(key).num_tokens
        return inside


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of vLLM or torch says that memory is short."""
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in _OUT_OF_MEMORY)


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Turn any error of vLLM into an `OutOfMemoryError` or another `EngineError`."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        text = first_line(error)
        if is_out_of_memory(error):
            raise OutOfMemoryError(f"the engine ran out of memory: {text}") from error
        raise EngineError(f"the engine failed: {type(error).__name__}: {text}") from error
