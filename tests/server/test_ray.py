"""Scoring on a local Ray with two actors; and, without Ray, what tasks, actors and driver do. One test has real engines."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from pipeline.chat.tokenizer import Condition
from pipeline.engine.contract import EngineSettings
from pipeline.recipe import ScoreSection
from pipeline.stages.prepare import prepare
from pipeline.stages.publish import Ingredients, publish
from pipeline.stages.score import Scorer, score
from pipeline.workers.missing import missing_within
from pipeline.workers.on_ray import Chunk, ChunkScorer, Filling, chunks_of, replies
from pipeline.workers.ray_cluster import connected
from pipeline.workers.ray_spread import spread_on_connected_ray
from pipeline.workers.request import Executor, Request, Target
from tests.pipeline.made_up_scorer import MadeUpEngine
from tests.pipeline.ray_engines import hook
from tests.pipeline.stages.test_score import NUM_PAIRS, PAIR_TOKENS, assert_whole, interpreter, make_tokens
from tests.torture import orphans
from weights_store import WeightStore
from weights_store.checks.vacuum import find_orphans
from weights_store.checks.verify import verify
from weights_store.errors import EngineError, InputError, MissingExtraError, OutOfMemoryError, SettingsError
from weights_store.processes.spread import in_turn
from weights_store.schemas import LOGPS

REPO = Path(__file__).resolve().parents[2]
# Actors share this machine with all else that runs on it, so they ask for less than a core.
ON_RAY = {"executor": "ray", "num_actors": 2, "cpus_per_actor": 0.5}


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two cores on this machine that the tests share; its variables are those of whoever wants to use it."""
    with (
        tempfile.TemporaryDirectory(
            prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
        ) as folder,  # sockets: a short path
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("PYTHONPATH", str(REPO))
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=head)
        yield made
        made.shutdown()


@pytest.fixture
def run(tmp_path, monkeypatch, make_strangers, cluster):
    """Return a function that runs the stage with made-up engines from a folder of strangers; `log(name)`: what they did."""
    (tmp_path / "strangers").mkdir()
    make_strangers(tmp_path / "strangers")
    monkeypatch.chdir(tmp_path / "strangers")

    class Run:
        def __init__(self):
            self.folder = tmp_path / "log"
            self.folder.mkdir()

        def __call__(self, tokens, scorers, settings=ON_RAY, tokenizer=None, **made_up):
            on_ray = settings.get("executor") == "ray"
            environment = {"MADE_UP": json.dumps({"log": str(self.folder), **made_up})}
            if on_ray:
                environment |= {"RAY_ADDRESS": cluster.address, **hook(environment)}
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            python = None if on_ray else str(interpreter(tmp_path))
            section = ScoreSection(chunk_tokens=12 * PAIR_TOKENS, python=python, **settings)
            return score(tokens, scorers, section, tokenizer or tmp_path)

        def log(self, name):
            path = self.folder / name
            return path.read_text().split() if path.exists() else []

    return Run()


def _rows(reference):
    return WeightStore(reference.store).table(reference.table).scan().sort("pair_id").collect()


def _commits(reference):
    return [commit.metadata for commit in WeightStore(reference.store).table(reference.table).history()]


@pytest.mark.slow
def test_actors_score_what_the_process_scores_and_the_driver_commits_each_table_once(tmp_path, toy_model, run, logged):
    chat = {"prompt": '{"messages":[{"role":"user","content":"hi"}]}'}
    changed = {f"row{index}": chat for index in range(NUM_PAIRS)}
    changed |= {"row5": {**chat, "chosen_ids": [3] * 97}, "row8": {**chat, "rejected_ids": [999, 4]}}
    scorers = {"ref": Scorer(toy_model), "positive": Scorer(toy_model, Condition("be good", "system"))}
    results = {}
    for name, settings in (("process", {}), ("ray", ON_RAY)):
        tokens = make_tokens(tmp_path / name, **changed)
        results[name] = run(tokens, scorers, settings, toy_model, bad_id=999, oom_above=2048)
    for role in scorers:
        process, on_ray = results["process"][role], results["ray"][role]
        assert _rows(on_ray.output).equals(_rows(process.output))
        assert _rows(on_ray.output).height == NUM_PAIRS - 2
        assert on_ray.num_unscorable == process.num_unscorable == 2
        (commit,) = _commits(on_ray.output)
        expected = _commits(process.output)[0]
        assert {key: commit[key] for key in ("scorer", "role", "fingerprint")} == {
            key: expected[key] for key in ("scorer", "role", "fingerprint")
        }
        assert commit["statistics"]["num_pairs"] == NUM_PAIRS - 2
        assert (commit["engine"]["executor"], commit["engine"]["num_actors"]) == ("ray", 2)
    quarantines = [WeightStore(tmp_path / name).table("quarantine/toy-1") for name in ("process", "ray")]
    assert len({str(table.scan().sort("detail", "source_row").collect().rows()) for table in quarantines}) == 1
    # That an engine had no memory came out of its actor as what it is, and halved the budget.
    (restart,) = on_ray.restarts
    assert restart.endswith("exit code 76: the engine ran out of memory: made up; 1/2 of the default batch_tokens")
    assert logged.lines.count("an engine is up") == 1  # two are, for both tables: every actor says the same
    assert logged.progress[-1].percent == 100
    assert list(verify(WeightStore(tmp_path / "ray"), rows=True)) == []
    assert list(find_orphans(WeightStore(tmp_path / "ray"))) == []


@pytest.mark.slow
def test_an_actor_that_is_killed_is_replaced_and_its_chunk_scored_again(tmp_path, model, run):
    tokens, stop = make_tokens("store"), tmp_path / "stop"  # a relative path, which means another folder to actors

    def kill():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if stop.exists() and stop.read_text().endswith("\n"):
                os.kill(int(stop.read_text()), signal.SIGKILL)
                return
            time.sleep(0.05)

    killer = threading.Thread(target=kill)
    killer.start()
    scored = run(tokens, {"ref": Scorer(model)}, stop=str(stop))["ref"]
    killer.join()
    assert_whole(tokens, scored)
    assert scored.restarts == ()  # the process went on
    assert len(_commits(scored.output)) == 1
    assert len(set(run.log("engines"))) == 3
    assert list(verify(WeightStore(tokens.store), rows=True)) == []
    (orphan,) = find_orphans(WeightStore(tokens.store))  # what the dead actor had written
    assert orphan.table == scored.output.table


@pytest.mark.slow
def test_two_real_engines_agree_with_the_one_of_the_process(
    tmp_path, toy_model, toy_pairs, make_recipe, write_jsonl, cluster
):
    write_jsonl(tmp_path / "pairs.jsonl", toy_pairs)
    frames = []
    for name, settings in (("process", {}), ("ray", {**ON_RAY, "ray_address": cluster.address})):
        keys = {"store.uri": str(tmp_path / name), "score.dtype": "float32", "score.chunk_tokens": 400}
        recipe = make_recipe(**keys, **{f"score.{key}": value for key, value in settings.items()})
        tokens = prepare(recipe, toy_model).tokens
        scored = score(tokens, {"ref": Scorer(toy_model)}, recipe.score, toy_model)["ref"]
        assert scored.num_pairs == len(toy_pairs)
        frames.append(_rows(scored.output))
    assert len(_commits(scored.output)) == 1
    process, on_ray = frames
    assert process["pair_id"].equals(on_ray["pair_id"])
    for side in ("chosen", "rejected"):
        expected, found = (frame[f"{side}_logps"] for frame in frames)
        assert expected.list.len().equals(found.list.len())
        assert np.abs(expected.explode().to_numpy() - found.explode().to_numpy()).mean() < 1e-3


LOOK = """
import os, signal
from pipeline.workers.ray_cluster import connected
from pipeline.workers.ray_spread import spread_on_connected_ray
from weights_store.processes.guard import guard

guard().mark_environment()
with connected("local"):
    import ray

    @ray.remote
    def look():
        import pipeline, sys, train, weights_store

        return sys.path, [module.__file__ for module in (pipeline, train, weights_store)]

    print(ray.get(look.remote()))
    print(ray._private.worker._global_node.get_temp_dir_path(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_ray_of_our_own_looks_into_no_strangers_folder_and_ends_with_a_killed_process(tmp_path, make_strangers):
    make_strangers(tmp_path)
    (tmp_path / "tmp").mkdir()
    environment = {"PYTHONPATH": str(REPO), "TMPDIR": str(tmp_path / "tmp"), orphans.MARK: tmp_path.name}
    command = [sys.executable, "-P", "-c", LOOK]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    # About a second on idle cores. On busy ones the watcher alone may take its whole patience of 60 s, and an agent that it has
    # missed while it was starting ends when it notices that its Ray is gone. What leaks stays for ever.
    folder, deadline = Path(done.stdout.split()[-1]), time.monotonic() + 180
    assert folder.name.startswith("ray-")
    while orphans.count_left(tmp_path.name, tmp_path / "tmp") or folder.exists():
        assert time.monotonic() < deadline, orphans.count_left(tmp_path.name, tmp_path / "tmp")
        time.sleep(0.1)
    assert str(tmp_path) not in done.stdout
    assert done.stdout.count(str(REPO)) >= 3


# --- stages without a model, on two nodes -----------------------------------------------------------------------------


@pytest.fixture
def small_ranges(monkeypatch):
    """Cut everything into many pieces of work; only the driver cuts."""
    monkeypatch.setattr("pipeline.stages.prepare._RANGE_BYTES", 3000)
    monkeypatch.setattr("pipeline.weighing.join.RANGE_BYTES", 12_000)
    monkeypatch.setattr("weights_store.checks.relations.JOIN_BYTES", 12_000)


def _add_made_up_logps(tokens):
    """Fill the tables of reference, pi+ and pi- with log-probs that depend on the pair alone, and return the ingredients."""
    store, logps = WeightStore(tokens.store), {}
    rows = store.table(tokens.table).scan(tokens.version).sort("pair_id").collect()
    for role in ("ref", "positive", "negative"):
        table = store.table(f"logps/toy/{role}")
        made_up = [
            {
                "pair_id": row["pair_id"],
                **{
                    f"{side}_logps": -random.Random(f"{role}{row['pair_id']}{side}").random()
                    * np.ones(len(row[f"{side}_ids"]))
                    for side in ("chosen", "rejected")
                },
            }
            for row in rows.iter_rows(named=True)
        ]
        metadata = {"fingerprint": f"{role} {tokens.fingerprint}", "parents": [tokens.as_parent()]}
        logps[role] = table.append(pa.Table.from_pylist(made_up, LOGPS), metadata)
    return Ingredients.of_scorers(tokens, logps)


def _build(recipe, model, spread):
    prepared = prepare(recipe, model, spread)
    return prepared, publish(recipe, recipe.weights, _add_made_up_logps(prepared.tokens), spread=spread)


def _content(reference):
    table = WeightStore(reference.store).table(reference.table)
    metadata = table.metadata(reference.version)
    return {key: metadata.get(key) for key in ("fingerprint", "statistics")}, table.scan(reference.version).collect()


@pytest.mark.slow
def test_a_build_on_two_nodes_one_of_which_dies_is_bit_for_bit_the_one_of_a_process(
    tmp_path, toy_model, toy_pairs, make_recipe, write_jsonl, cluster, small_ranges, flip_silently
):
    bad = [{"prompt": "p", "chosen": "a", "rejected": None}, {"prompt": "p", "chosen": "x " * 900, "rejected": "b"}]
    first = [*toy_pairs[:40], bad[0], toy_pairs[3], bad[1], toy_pairs[7]]
    later = [toy_pairs[50], *toy_pairs[5:48], *bad]  # pairs have left, moved and come
    weights = {"weights.transforms": ["position", "mean_one"], "weights.spread": 0.5}
    taken, second = [], cluster.add_node(num_cpus=2, object_store_memory=100 << 20)

    def until_a_node_dies(work, items):
        results = spread_on_connected_ray(work, items)
        for result in results:
            taken.append(work)
            if len(taken) == 1:
                cluster.remove_node(second, allow_graceful=False)
            yield result

    built = {}
    with connected(cluster.address):
        for name, spread in (("here", in_turn), ("ray", until_a_node_dies)):
            recipe = make_recipe(**weights, **{"store.uri": str(tmp_path / name), "weights.estimator": "tis"})
            write_jsonl(tmp_path / "pairs.jsonl", first)
            earlier = _build(recipe, toy_model, spread)
            write_jsonl(tmp_path / "pairs.jsonl", later)
            built[name] = [*earlier, *_build(recipe, toy_model, spread)]
        for here, on_ray in zip(built["here"], built["ray"], strict=True):
            pair = [getattr(each, "tokens", None) or each.weights for each in (here, on_ray)]
            (record, rows), (expected_record, expected) = map(_content, pair)
            assert rows.equals(expected)
            assert record == expected_record
            assert rows.height > 20
        assert [len(_commits(each.tokens)) for each in (built["here"][2], built["ray"][2])] == [2, 2]
        assert len(taken) > 15
        store = WeightStore(tmp_path / "ray")
        assert list(verify(store, rows=True, spread=spread_on_connected_ray)) == []
        flip_silently(store.table(built["ray"][0].tokens.table), "chosen_ids")
        found = list(verify(store, rows=True, spread=spread_on_connected_ray))
        assert found
        assert found == list(verify(store, rows=True))


@pytest.mark.slow
def test_a_spread_that_is_left_and_outlives_its_ray_starts_no_other_one(cluster):
    import ray

    with connected(cluster.address):
        left = spread_on_connected_ray(abs, range(-20, 0))
        assert next(left) == 20
    left.close()  # as an error does whose traceback still holds it
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_stage_that_runs_on_ray_is_driven_by_a_child_and_its_errors_come_out_as_themselves(
    tmp_path, toy_model, toy_pairs, make_recipe, write_jsonl, cluster
):
    settings = {"score.executor": "ray", "score.ray_address": cluster.address}
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": None}])
    with pytest.raises(InputError, match=r"no usable pair in 1 rows \(1 missing_value\)"):
        prepare(make_recipe(**settings), toy_model)
    write_jsonl(tmp_path / "pairs.jsonl", toy_pairs[:20])
    prepared = prepare(make_recipe(), toy_model)
    recipe = make_recipe(**settings)
    assert prepare(recipe, toy_model).num_new_pairs == 0  # nothing to do: no Ray is needed
    published = publish(recipe, recipe.weights, _add_made_up_logps(prepared.tokens))
    assert (published.statistics["num_pairs"], len(_commits(published.weights))) == (20, 1)


# --- without Ray -------------------------------------------------------------------------------------------------------


@pytest.fixture
def request_(tmp_path, model):
    """Every pair of a small tokens table for one table of log-probs, four pairs to a chunk."""
    tokens = make_tokens(tmp_path / "store")
    target = Target("ref", "logps/toy-1/x", None, {"fingerprint": "f"})
    return Request("score", tokens, str(model), [target], 4 * PAIR_TOKENS, EngineSettings(), Executor("ray", 2))


def _ids(request, chunk):
    return missing_within(chunk.span, request.tokens, WeightStore(request.tokens.store).table("logps/toy-1/x"))[
        "pair_id"
    ]


def test_chunks_are_spans_that_lie_side_by_side_and_cover_what_is_missing(request_):
    table = WeightStore(request_.tokens.store).table("logps/toy-1/x")
    done = {"pair_id": [f"{index:032x}" for index in (0, 17, 18, 119)]}
    done |= {f"{side}_logps": [[-1.0]] * 4 for side in ("chosen", "rejected")}
    table.append(pa.Table.from_pylist(pa.table(done).to_pylist(), LOGPS), {"fingerprint": "f"})
    chunks = chunks_of(Chunk(0, "", "", 0, 0), request_, max_chunks=1000)
    assert [chunk.num_pairs for chunk in chunks] == [4] * 29
    assert [chunk.num_tokens for chunk in chunks] == [4 * PAIR_TOKENS] * 29
    ids = [_ids(request_, chunk).to_list() for chunk in chunks]
    assert [len(part) for part in ids] == [4] * 29
    assert list(chain(*ids)) == sorted({f"{index:032x}" for index in range(NUM_PAIRS)} - set(done["pair_id"]))
    # Cut from the middle of a range of pair_ids, no chunk reaches beyond it.
    inside = chunks_of(Chunk(0, f"{5:032x}", f"{16:032x}", 0, 0), request_, max_chunks=1000)
    assert (inside[0].low, inside[-1].high) == (f"{5:032x}", f"{16:032x}")


def test_a_large_table_is_cut_into_larger_chunks_instead_of_more(request_):
    chunks = chunks_of(Chunk(0, "", "", 0, 0), request_, max_chunks=7)
    # 1,800 tokens in 7 parts: 258 each, which hold 17.2 pairs; the fifth part ends at 1,290 = 86 pairs.
    assert [chunk.num_pairs for chunk in chunks] == [17, 17, 17, 17, 18, 17, 17]
    assert list(chain(*(_ids(request_, chunk) for chunk in chunks))) == [f"{i:032x}" for i in range(NUM_PAIRS)]


@pytest.mark.parametrize("where", ["__init__", "score"])
@pytest.mark.parametrize("kind", [OutOfMemoryError, EngineError, InputError])
def test_an_error_in_an_actor_comes_out_as_itself(request_, monkeypatch, where, kind):
    def fail(*_):
        raise kind("what is wrong, in one line")

    monkeypatch.setattr("pipeline.engine.vllm_engine.VllmEngine", type("Engine", (MadeUpEngine,), {where: fail}))
    batch = pa.Table.from_pylist([asdict(Chunk(0, "", "", NUM_PAIRS, NUM_PAIRS * PAIR_TOKENS))])
    reply = ChunkScorer(request_)(batch)
    with pytest.raises(kind, match="^what is wrong, in one line$") as caught:
        list(replies(SimpleNamespace(iter_batches=lambda **_: [reply])))
    assert type(caught.value) is kind


def test_an_actor_writes_the_likeliest_tokens_of_its_target(request_, monkeypatch):
    monkeypatch.setattr("pipeline.engine.vllm_engine.VllmEngine", MadeUpEngine)
    request_ = replace(request_, targets=[replace(request_.targets[0], top_k=2)])
    batch = pa.Table.from_pylist([asdict(Chunk(0, "", "", NUM_PAIRS, NUM_PAIRS * PAIR_TOKENS))])
    (scored,) = replies(SimpleNamespace(iter_batches=lambda **_: [ChunkScorer(request_)(batch)]))
    rows = WeightStore(request_.tokens.store).table("logps/toy-1/x").scan_shards(scored.shards).collect()
    assert set(rows["chosen_top_ids"].list.len()) == {2 * 6}
    assert set(rows["rejected_top_logps"].list.len()) == {2 * 5}


@pytest.mark.parametrize(("limit", "sizes"), [({"round_chunks": 12}, [48, 48, 24]), ({"round_s": 0}, [4] * 30)])
def test_the_driver_commits_when_a_round_is_full_or_old(request_, monkeypatch, limit, sizes):
    monkeypatch.setattr("pipeline.engine.vllm_engine.VllmEngine", MadeUpEngine)
    chunks = chunks_of(Chunk(0, "", "", 0, 0), request_, max_chunks=1000)
    actor, filling = ChunkScorer(request_), Filling(request_, request_.targets[0], **limit)
    filling.expect([chunk.backlog for chunk in chunks])
    for chunk in reversed(chunks):  # actors return them in any order
        (scored,) = replies(
            SimpleNamespace(iter_batches=lambda chunk=chunk, **_: [actor(pa.Table.from_pylist([asdict(chunk)]))])
        )
        filling.add(scored)
        filling.add(scored)  # brought twice: counts once
    filling.commit()
    table = WeightStore(request_.tokens.store).table("logps/toy-1/x")
    assert [commit.metadata["num_rows_written"] for commit in reversed(table.history())] == sizes
    for commit in table.history():
        keys = [shard.first_key for shard in commit.shards]
        assert keys == sorted(keys)
    assert table.scan().collect()["pair_id"].n_unique() == table.num_rows() == NUM_PAIRS


def test_a_build_on_ray_needs_ray_here_and_vllm_only_where_the_actors_run(tmp_path, model, monkeypatch):
    class Started(Exception):
        pass

    def start(*_):
        raise Started

    tokens = make_tokens(tmp_path / "store")
    monkeypatch.setattr("pipeline.workers.supervise.run_child", start)
    with monkeypatch.context() as without_ray:
        without_ray.setitem(sys.modules, "ray", None)
        with pytest.raises(MissingExtraError, match=r"needs the package 'ray'.*pip install 'tokenweights\[ray\]'"):
            score(tokens, {"ref": Scorer(model)}, ScoreSection(**ON_RAY), model)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(Started):
        score(tokens, {"ref": Scorer(model)}, ScoreSection(**ON_RAY), model)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:9", "no Ray cluster answers at 127.0.0.1:9: .*refused"),
        ("auto", "no Ray cluster has been started here"),
    ],
)
def test_without_a_cluster_it_says_so_at_once(monkeypatch, tmp_path, address, message):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(SettingsError, match=rf"{message}.*set score\.ray_address"), connected(address):
        pass


CONNECTS = """
import sys
from pipeline.workers.ray_cluster import connected
from weights_store.errors import SettingsError

try:
    with connected(sys.argv[1]):
        pass
except SettingsError as error:
    print(error)
"""


def test_a_cluster_that_asks_for_a_token_says_so(cluster):
    # In a process of its own, and with one try to connect instead of twenty.
    settings = {"RAY_AUTH_MODE": "disabled", "RAY_gcs_server_port_wait_time_s": "1"}
    command = [sys.executable, "-c", CONNECTS, cluster.address]
    done = subprocess.run(
        command, env=os.environ | settings, stdout=subprocess.PIPE, text=True, timeout=120, check=True
    )
    assert f"cluster at {cluster.address} asks for a token" in done.stdout
    assert "set RAY_AUTH_MODE=token" in done.stdout
