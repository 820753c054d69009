"""An interpreter for `score.python` that works without a model, and dies, chokes or dawdles as the environment says.

Started as a stage starts any interpreter, `made_up -P -m pipeline.workers.process REQUEST`; only the engine is made up.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

SETTINGS = json.loads(os.environ.get("MADE_UP", "{}"))
"""`log`: a folder for what happened; `oom_above`: batch_tokens that do not fit; `dies_after`: calls of an engine that come
back; `call_s`: seconds a call takes; `bad_id`: responses with this id are answered with NaN; `too_long`: no sequence fits
into an engine that is not started for any length; `cannot_load`: an engine cannot exchange its weights."""


def log(name, text):
    if "log" in SETTINGS:
        with Path(SETTINGS["log"], name).open("a") as file:
            file.write(f"{text}\n")


def logps(sequence):
    """A function of the ids up to each token, in nats."""
    before = np.cumsum([sum(sequence.prompt_ids), *sequence.response_ids])
    return (-1.5 - np.sin(before[:-1] + 2.0 * before[1:])).astype(np.float32)


def scores(sequence):
    """Those of the wanted tokens; the k likeliest are the token itself and the ids behind it, less likely by 3, 4, 5 … nats."""
    from pipeline.engine.score_once import Scores

    own, steps = logps(sequence)[sequence.start :, None], np.arange(sequence.top_k)
    ids = np.array(sequence.response_ids[sequence.start :])[:, None]
    top_logps = own - np.where(steps > 0, steps + 2, 0)
    return Scores(own[:, 0], ((ids + steps) % MadeUpEngine.vocab_size).astype(np.int32), top_logps.astype(np.float32))


def continuation(prompt_ids, sampling, seed):
    """Ids that follow from the seed; behind the first one in eight ends the turn, where something can."""
    draw = np.random.default_rng(seed)
    ids = []
    while len(ids) < min(sampling.max_new_tokens, MadeUpEngine.max_tokens - len(prompt_ids)):
        if ids and sampling.stop_ids and draw.random() < 1 / 8:
            return [*ids, sampling.stop_ids[-1]]
        ids.append(int(draw.integers(3, 700)))
    return ids


class MadeUpEngine:
    vocab_size = 1000
    max_tokens = 100
    way = "made_up"

    def __init__(self, model, settings):
        self.longest, self.model = settings.longest, Path(model).name
        self.batch_tokens, self.num_calls = settings.step_tokens(4096), 0
        log("starts", self.batch_tokens)
        log("longest", self.longest)
        log("models", self.model)

    def score(self, sequences, progress=lambda num_tokens: None):
        from weights_store.errors import ScoringError, SequenceLengthError

        if "too_long" in SETTINGS and self.longest is not None:
            raise SequenceLengthError("a sequence has more tokens: made up")
        self.call("scored", sum(sequence.num_wanted for sequence in sequences))
        return [
            ScoringError("response token 0: log-prob is nan, expected a finite number")
            if SETTINGS.get("bad_id") in sequence.response_ids
            else scores(sequence)
            for sequence in sequences
        ]

    def begin(self, sequences, progress=lambda num_tokens: None):
        return lambda: self.score(sequences, progress)

    def load(self, model):
        from weights_store.errors import EngineError

        if "cannot_load" in SETTINGS:
            raise EngineError("the engine cannot exchange its weights: made up")
        self.model = model.name
        log("loads", self.model)

    def generate(self, prompts, sampling, seeds, progress=lambda num_prompts: None):
        self.call("continued", len(prompts))
        for _ in prompts:
            progress(1)
        return [continuation(prompt, sampling, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def call(self, name, amount):
        from weights_store.errors import EngineError, OutOfMemoryError

        if self.batch_tokens > SETTINGS.get("oom_above", 1 << 30):
            raise OutOfMemoryError("the engine ran out of memory: made up")
        if self.num_calls >= SETTINGS.get("dies_after", 1 << 30):
            raise EngineError("the engine failed: made up")
        self.num_calls += 1
        log(name, amount)
        log("calls", f"{self.model}:{amount}")
        time.sleep(SETTINGS.get("call_s", 0))


def main():
    if sys.argv[1] == "-I":  # somebody asks which Python this is
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    log("pids", os.getpid())
    log("prefixes", sys.prefix)
    import pipeline.engine.vllm_engine

    pipeline.engine.vllm_engine.VllmEngine = MadeUpEngine
    from pipeline.workers.process import run
    from pipeline.workers.request import Request
    from weights_store.processes.process import run_main

    *options, request = sys.argv[1:]
    assert options == ["-P", "-m", "pipeline.workers.process"]
    return run_main(lambda: run(Request.load(request)))


if __name__ == "__main__":
    sys.exit(main())
