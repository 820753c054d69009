"""`make gpu`: whatever happens to a part, what was measured is kept, and the next part runs. The parts here are one-liners."""

import json
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.gpu import runner
from benchmarks.gpu.context import Context
from benchmarks.gpu.figures import compute_figures, print_table
from benchmarks.gpu.part_profile import summarise
from benchmarks.gpu.runner import Run, run_all

KEEP = "import json, sys, time; open(sys.argv[1], 'w').write(json.dumps({'machine': {'gpu': 'toy'}, 'first': 1})); "
SCRIPTS = {
    "fails": KEEP + "raise ValueError('no such kernel')",
    "hangs": KEEP + "time.sleep(60)",
    "works": KEEP + "print('fine')",
    "silent": "import sys; sys.exit(3)",
}


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes a run of one-liners."""

    def command(run: Run, name: str, deadline: float) -> list[str]:
        return [sys.executable, "-c", SCRIPTS[name], str(run.work / f"{name}.json")]

    monkeypatch.setattr(runner, "child_command", command)
    monkeypatch.setattr(runner, "PARTS", dict.fromkeys(SCRIPTS, 1.0))
    monkeypatch.setattr(runner, "LEAST_S", 0.5)

    def make(*parts: str, seconds: float = 60.0) -> Run:
        return Run("cpu", True, tmp_path, tmp_path / "work", tmp_path / "gpu.json", seconds / 60, parts)

    return make


def test_a_part_that_fails_leaves_its_reason_and_what_it_measured_and_the_next_one_runs(make_run) -> None:
    results = run_all(make_run("fails", "silent", "works"))
    assert results == json.loads(make_run().out.read_text())
    fails, silent, works = (results["parts"][name] for name in ("fails", "silent", "works"))
    assert (fails["status"], fails["results"]) == ("failed", {"first": 1})
    assert "no such kernel" in fails["reason"]
    assert (silent["status"], silent["results"], silent["reason"]) == ("failed", {}, "exit code 3: ")
    assert (works["status"], works["results"]) == ("done", {"first": 1})
    assert results["machine"] == {"gpu": "toy"}


def test_a_part_that_takes_too_long_is_killed_and_the_next_one_has_what_is_left(make_run) -> None:
    started = time.monotonic()
    results = run_all(make_run("hangs", "works", seconds=4.0))
    assert time.monotonic() - started < 10
    hangs, works = results["parts"]["hangs"], results["parts"]["works"]
    assert (hangs["status"], hangs["results"]) == ("killed", {"first": 1})
    assert hangs["limit_s"] == pytest.approx(2.0, abs=0.1)  # half of 4 s: both have the same share
    assert works["status"] == "done"
    assert works["limit_s"] == pytest.approx(2.0, abs=0.7)  # all the rest


def test_without_time_a_part_is_left_out(make_run) -> None:
    results = run_all(make_run("works", seconds=0.2))
    assert results["parts"]["works"]["status"] == "left out"


def test_an_interrupted_run_keeps_what_it_has(make_run) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        threading.Timer(1.5, signal.raise_signal, [signal.SIGINT]).start()
        results = run_all(make_run("works", "hangs", "silent"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert [part["status"] for part in results["parts"].values()] == ["done", "interrupted"]
    assert results["parts"]["hangs"]["results"] == {"first": 1}


def test_an_attempt_that_fails_is_recorded_beside_what_it_had_measured(tmp_path: Path) -> None:
    ctx = Context("cpu", True, tmp_path, tmp_path, tmp_path / "part.json", time.time() + 30)

    def measure(record) -> None:
        record(forward=0.5)
        raise RuntimeError("out of memory")

    ctx.attempt("ours", measure)
    ctx.attempt("theirs", measure, least_s=60)
    found = json.loads(ctx.out.read_text())
    assert found["ours"] == {"forward": 0.5, "error": "RuntimeError: out of memory"}
    assert found["theirs"]["error"].startswith("not begun: ")


def test_figures_come_from_what_is_there(capsys) -> None:
    train = {"ours": {"median_step_s": 0.2, "model_flops_utilisation": 0.4, "peak_mb": 30.0, "tokens_per_s": 1.0}}
    train["trl"] = {**train["ours"], "median_step_s": 0.8, "peak_mb": 60.0}
    score = {"hh": {"prefill": {"s": 6.0}, "ours": {"s": 5.0}}, "parity": {"passed": False}}
    checks = {"losses": {"passed": True}, "job": {"error": "ValueError: x"}}
    parts = {"train": train, "score": score, "checks": checks}
    results = {"parts": {name: {"status": "killed", "results": of} for name, of in parts.items()}}
    figures = compute_figures(results)
    assert figures["step / TRL with reference"] == pytest.approx(0.25)
    assert figures["peak memory / TRL"] == 0.5
    assert figures["score / prefill, HH"] == pytest.approx(1.2)
    assert (figures["checks that failed"], figures["checks that passed"]) == (2, 1)
    assert not {"score / prefill, long", "step / TRL precomputed", "attribution / forward"} & figures.keys()
    for way in (score["hh"]["prefill"], score["hh"]["ours"]):
        way |= {"response_tokens_per_s": 1.0, "engine_tokens_per_s": 1.0}
    print_table(results)
    printed = capsys.readouterr().out
    assert "job: ValueError: x" in printed
    assert any("step / TRL with reference" in line and line.endswith("MISSED") for line in printed.splitlines())


def test_kernels_are_counted_in_one_class_each() -> None:
    names = {
        "nvjet_sm90_hsh_128x256_64x4": "matrix products",
        "void at::native::elementwise_kernel<MulFunctor<float>>": "multiplications",
        "void at::native::vectorized_elementwise_kernel<CUDAFunctor_add<float>>": "additions",
        "void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>": "casts and copies",
        "triton_tem_fused_flex_attention_backward_0": "attention",
        "void flash::flash_bwd_kernel": "attention",
        "triton_poi_fused_mul_silu_0": "compiled",
        "void cunn_SoftMaxForward": "log-softmax",
        "multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
    }
    found = summarise({name: [2.0, 3.0] for name in names})
    assert found["kernel_ms"] == 2.0 * len(names)
    for kind in names.values():
        num = list(names.values()).count(kind)
        assert found["classes"][kind] == {"ms": 2.0 * num, "kernels": 3.0 * num}
