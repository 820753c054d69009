"""How every process of ours begins and ends: the command, and the children that a build starts.

A child is started by `pipeline/child.py` with `TOKENWEIGHTS_CHILD` in its environment. It sends its log to its parent, stops
when its parent is gone, and its exit code says which error ended it.
"""

import os
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack

from weights_store.errors import EXIT_CODES, TokenweightsError
from weights_store.messages import send_to_parent, show_on_terminal

CHILD = "TOKENWEIGHTS_CHILD"
"""In the environment of a process that a build has started."""


def run_main(main: Callable[[], int | None], *, debug: bool = False, after_interrupt: str = "interrupted") -> int:
    """Run the main function of a process and return its exit code: 0 done, 1 or another code an error, 130 interrupted.

    Args:
        main: Returns the exit code; None for 0.
        debug: Let errors show their traceback.
        after_interrupt: What to tell people after Ctrl-C.
    """
    with ExitStack() as stack:
        if CHILD in os.environ:
            _end_with_parent()
            stack.enter_context(send_to_parent())
        else:
            stack.enter_context(show_on_terminal())
        try:
            return main() or 0
        except BrokenPipeError:  # `tokenweights ls | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (
            TokenweightsError,
            OSError,
        ) as error:  # OSError: no permission, a full disk, a file where a folder should be
            if debug:
                raise
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)
        except KeyboardInterrupt:
            print(after_interrupt, file=sys.stderr, flush=True)
            return 130


def _end_with_parent() -> None:
    """End this process when its parent is gone: the parent's end of our standard input closes then."""

    def wait() -> None:
        os.read(0, 1)  # not sys.stdin: its lock would be held while the interpreter shuts down
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
