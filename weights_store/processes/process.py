"""How each of our processes begins and ends: the command, and the children that a build starts.

`pipeline/child.py` starts a child with `TOKENWEIGHTS_CHILD` in its environment. The child sends its log to its parent and ends
when its parent is gone: the kernel kills it, or it sees that its standard input closes, and `guard.py` ends whatever these two
miss. Its exit code says which error ended it.
"""

import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable

from weights_store.errors import EXIT_CODES, TokenweightsError
from weights_store.messages import describe_os_error, hide_credentials, send_to_parent, show_on_terminal

CHILD = "TOKENWEIGHTS_CHILD"
"""Environment variable of a process that a build has started."""
_PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>."""


def run_main(main: Callable[[], int | None], *, debug: bool = False, after_interrupt: str = "interrupted") -> int:
    """Run the main function of a process and return its exit code: 0 done, 1 or another code an error, 130 interrupted
    by Ctrl-C or SIGTERM.

    Args:
        main: Returns the exit code; None means 0.
        debug: Raise errors with their traceback instead of printing one line.
        after_interrupt: Printed then.
    """
    is_child = CHILD in os.environ
    if is_child:
        end_with_parent()
        _end_with_pipe()
    else:
        _take_sigterm_as_interrupt()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 lacks some of our signs
    with send_to_parent() if is_child else show_on_terminal():
        try:
            return main() or 0
        # OSError: no permission, a full disk, or a file where a folder should be.
        except (TokenweightsError, OSError) as error:
            if isinstance(error, BrokenPipeError) and not is_child and _stdout_is_closed():
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it exits
                return 0
            if debug:
                raise
            text = describe_os_error(error) if isinstance(error, OSError) else " ".join(str(error).split())
            print(f"error: {hide_credentials(text)}", file=sys.stderr, flush=True)
            return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)
        except KeyboardInterrupt:
            print(after_interrupt, file=sys.stderr, flush=True)
            return 130


def _stdout_is_closed() -> bool:
    """Return whether nobody reads standard output any more, as in `tokenweights ls | head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors alone: a pipe without a reader is one
    return bool(poll.poll(0))


def _take_sigterm_as_interrupt() -> None:
    """Let SIGTERM unwind the stack as Ctrl-C does: children, servers and temporary folders would outlive a sudden death."""
    is_main = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handlers
    if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends, whatever this one is doing then.

    Only on Linux. Call it first: a parent that has ended before leaves no trace.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with_pipe() -> None:
    """End this process when its standard input closes, which is a pipe from its parent. On any system."""

    def wait() -> None:
        os.read(0, 1)  # not sys.stdin, whose lock would be held while the interpreter shuts down
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
