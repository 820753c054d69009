"""Stop on SIGTERM or Ctrl-C: the first signal stops after the current step, with a checkpoint; the second one at once."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self.requested = False
        self.can_finish_step = False
        """True while a training loop checks `requested` after every step; otherwise a signal interrupts at once."""

    def on_signal(self, _signal_number: int, _frame: FrameType | None) -> None:
        """Note the request, or interrupt.

        Raises:
            KeyboardInterrupt: No loop checks the request, or this is the second one.
        """
        if self.requested or not self.can_finish_step:
            raise KeyboardInterrupt
        self.requested = True
        print("stopping after this step (again to stop at once)", file=sys.stderr, flush=True)


@contextmanager
def catch_signals(stop: StopRequest) -> Iterator[None]:
    """Send SIGTERM and SIGINT to `stop` while inside. Outside the main thread Python forbids that, and nothing happens."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {s: signal.signal(s, stop.on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
