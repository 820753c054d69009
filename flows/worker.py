"""A process that Prefect has started for one run, because a worker or `tokenweights serve` ordered it."""

import os
import select
import threading

from weights_store.processes.guard import guard

_RUN_OF_PROCESS = "PREFECT__FLOW_RUN_ID"
"""Environment variable that Prefect sets for such a process."""
_STDOUT, _STDERR = 1, 2


def prepare_process() -> None:
    """Tie what this process starts to its life, and let it outlive its worker. Does nothing in other processes."""
    if _RUN_OF_PROCESS in os.environ:
        guard().mark_environment()
        threading.Thread(target=_survive_reader, daemon=True).start()


def _survive_reader() -> None:
    """Once nobody reads our output, send it nowhere: a worker has died, and Prefect would end the run at its next line.

    The run's log, which is on the server, goes on.
    """
    waiting = select.poll()
    for stream in (_STDOUT, _STDERR):
        waiting.register(stream, 0)  # errors alone: a pipe without a reader is one
    waiting.poll()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (_STDOUT, _STDERR):
        os.dup2(nowhere, stream)
