"""What the tests of Ray put into its workers: a made-up engine, and a worker that stops right after it has written a shard.

With the variable of `hook` the driver lets Ray call `install` in every worker; nothing in the package knows of it.
"""

import json
import os
import time
from pathlib import Path

import pipeline.engine.vllm_engine
from tests.pipeline.made_up_scorer import SETTINGS, MadeUpEngine, log
from weights_store import Table
from weights_store.messages import logger


def hook(environment):
    """Return a variable for the driver with which Ray calls `install` in every worker, with further variables."""
    runtime = {"worker_process_setup_hook": f"{__name__}.install", "env_vars": environment}
    return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": runtime})}


class LoggingEngine(MadeUpEngine):
    def __init__(self, model, settings):
        super().__init__(model, settings)
        log("engines", os.getpid())
        logger(__name__).info("an engine is up")


def install():
    pipeline.engine.vllm_engine.VllmEngine = LoggingEngine
    Table.write_shards = stopping(Table.write_shards)


def stopping(write):
    """With `stop` among the settings, the first to have written a shard leaves its pid in that file and does not return."""

    def write_and_stop(self, rows):
        shards = write(self, rows)
        if "stop" in SETTINGS:
            try:
                with Path(SETTINGS["stop"]).open("x") as file:
                    file.write(f"{os.getpid()}\n")
            except FileExistsError:
                return shards
            time.sleep(300)
        return shards

    return write_and_stop
