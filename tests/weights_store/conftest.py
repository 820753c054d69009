"""A small store with everything a build leaves: numbers that can be checked by hand, and all exact in 12 mantissa bits.

Four pairs with distinct ids and unequal lengths: `b`'s chosen response has EOS (9) inside, `d` came with version 1, belongs to
another split and its chosen response was cut before EOS.
"""

import hashlib
import json
import socket
import subprocess
import sys
import time
import uuid
from urllib.request import Request, urlopen

import pyarrow as pa
import pytest

import tokenweights
from weights_store import WeightStore
from weights_store.checks.model_folders import model_name, sign_record
from weights_store.fingerprint import explain_difference, fingerprint
from weights_store.schemas import ANCHORS, ATTRIBUTIONS, LOGPS, QUARANTINE, TOKENS, WEIGHTS
from weights_store.tables.checksums import sum_checksums

PROMPTS = {"a": [1, 2], "b": [1], "c": [2, 1, 2], "d": [1, 1]}
IDS = {
    "a": ([3, 4, 9], [5, 9]),
    "b": ([6, 9, 7, 9], [8, 3, 9]),
    "c": ([4, 9], [5, 6, 7, 8, 9]),
    "d": ([3], [9]),
}
REF = {
    "a": ([-1.0, -2.0, -0.5], [-3.0, -0.25]),
    "b": ([-4.0, -0.125, -2.0, -0.25], [-1.0, -1.0, -1.0]),
    "c": ([-2.5, -0.5], [-1.0, -2.0, -3.0, -4.0, -0.5]),
    "d": ([-1.5], [-2.0]),
}
POSITIVE = {
    "a": ([-0.5, -1.0, -1.0], [-1.0, -0.25]),
    "b": ([-1.0, -1.0, -2.0, -0.5], [-2.0, -1.5, -0.25]),
    "c": ([-2.0, -1.0], [-2.0, -2.0, -1.0, -3.0, -0.5]),
    "d": ([-1.0], [-1.0]),
}
NEGATIVE = {
    "a": ([-0.5, -2.5, -0.5], [-3.0, -0.25]),
    "b": ([-3.0, -1.0, -1.0, -1.0], [-1.0, -1.0, -0.25]),
    "c": ([-1.0, -0.5], [-1.0, -1.5, -1.0, -2.5, -0.5]),
    "d": ([-1.25], [-1.5]),
}
TIS = {
    "a": ([1.0, 2.0, 0.5], [0.25, 1.0]),
    "b": ([4.0, 1.0, 0.5, 1.5], [2.0, 1.5, 1.0]),
    "c": ([0.5, 0.75], [1.5, 1.25, 1.0, 1.25, 1.0]),
    "d": ([1.25], [0.75]),
}
REVERSED = {
    "a": ([1.0, 0.5, 2.0], [4.0, 1.0]),
    "b": ([0.25, 1.0, 2.0, 0.75], [0.5, 0.75, 1.0]),
    "c": ([2.0, 1.25], [0.75, 0.75, 1.0, 0.75, 1.0]),
    "d": ([0.75], [1.25]),
}
ATTRIBUTED = {
    "a": ([2.0, 1.0, 1.0], [0.5, 1.5]),
    "b": ([4.0, 0.0, 2.0, 2.0], [1.0, 3.0, 2.0]),
    "c": ([1.0, 3.0], [1.0, 1.0, 2.0, 4.0, 2.0]),
    "d": ([0.0], [0.5]),
}
TI = {  # attributions over their mean; d's chosen response has none and one token
    "a": ([1.5, 0.75, 0.75], [0.5, 1.5]),
    "b": ([2.0, 0.0, 1.0, 1.0], [0.5, 1.5, 1.0]),
    "c": ([0.5, 1.5], [0.5, 0.5, 1.0, 2.0, 1.0]),
    "d": ([1.0], [1.0]),
}
ANCHORED = {
    "a": ([7, 9], [-1.5, -0.25]),
    "b": ([3, 8, 9], [-2.0, -0.5, -1.0]),
    "c": ([6], [-4.0]),
    "d": ([5, 5, 4, 9], [-1.0, -2.0, -0.75, 0.0]),
}
ONES = {pair_id: tuple([1.0] * len(ids) for ids in sides) for pair_id, sides in IDS.items()}
TEXTS = {1: "Q", 2: "?", 3: "Yes", 4: " sir", 5: "No", 6: " caf", 7: "é", 8: "!", 9: "</s>"}

DATASET = "hh-harmless-0123456789ab"
TRAINING = {"method": "dpo", "learning_rate": 5e-6, "num_epochs": 1, "seed": 0}
RECIPE = {
    "dataset": {"name": "hh-harmless", "source": "data/hh_harmless.jsonl"},
    "model": {"path": "models/tiny-chat"},
    "contrast": {**TRAINING, "python": None},
}
SOURCE = {"content": "50" * 32, "max_pairs": None, "reading": {"split": "train"}}


def weight_rows(pair_ids, token_weights):
    rows = [
        {
            "pair_id": pair_id,
            "prompt_ids": PROMPTS[pair_id],
            "chosen_ids": IDS[pair_id][0],
            "rejected_ids": IDS[pair_id][1],
            "chosen_token_weights": token_weights[pair_id][0],
            "rejected_token_weights": token_weights[pair_id][1],
            "chosen_ref_logps": REF[pair_id][0],
            "rejected_ref_logps": REF[pair_id][1],
            "pair_weight": 1.0,
            "split": "test" if pair_id == "d" else "train",
        }
        for pair_id in pair_ids
    ]
    return pa.Table.from_pylist(rows, WEIGHTS)


def _token_rows(pair_ids):
    rows = [
        {
            "pair_id": pair_id,
            "prompt": "[]",
            "prompt_ids": PROMPTS[pair_id],
            "chosen_ids": IDS[pair_id][0],
            "rejected_ids": IDS[pair_id][1],
            "source_row": "abcd".index(pair_id),
            "split": "test" if pair_id == "d" else "train",
        }
        for pair_id in pair_ids
    ]
    return pa.Table.from_pylist(rows, TOKENS)


def _logps_rows(pair_ids, logps):
    rows = [{"pair_id": p, "chosen_logps": logps[p][0], "rejected_logps": logps[p][1]} for p in pair_ids]
    return pa.Table.from_pylist(rows, LOGPS)


def _weights_metadata(name, estimator, parents, token_weights, pair_ids):
    weights = {"name": name, "estimator": estimator}
    if estimator in ("tis", "reversed", "head"):
        weights |= {"k": 1.0, "mu": 1.0, "lower": -0.5, "upper": 1.5}
    identity = {
        "settings": {"weights": weights, "contrast": {} if estimator in ("uniform", "ti", "head") else TRAINING},
        "data": {role: parent.fingerprint for role, parent in parents.items()},
    }
    num_tokens = sum(len(side) for pair_id in pair_ids for side in token_weights[pair_id])
    trained = {} if estimator in ("uniform", "ti", "head") else {"contrast": {"held_out": 0.0, "split": None}}
    return {
        **trained,
        "fingerprint": fingerprint(identity),
        "identity": identity,
        "recipe": RECIPE,
        "parents": [{"role": role, **parent.as_parent()} for role, parent in parents.items()],
        "tokenizer": {"eos_token_id": 9, "vocab_size": 10},
        "statistics": {"num_pairs": len(pair_ids), "num_response_tokens": num_tokens},
    }


def _append_logps(store, scorer, logps, pair_ids, tokens):
    metadata = {
        "fingerprint": fingerprint(f"logps {scorer} {tokens.version}"),
        "scorer": {"model": fingerprint(f"{scorer} model"), "condition": None, "dtype": "float32"},
        "parents": [tokens.as_parent()],
    }
    return store.table(f"logps/{DATASET}/{scorer}").append(_logps_rows(pair_ids, logps), metadata)


def _append_weights(store, name, estimator, token_weights, pair_ids, parents):
    metadata = _weights_metadata(name, estimator, parents, token_weights, pair_ids)
    table = store.table(f"weights/{name}")
    old = table.metadata()["identity"] if table.exists() else metadata["identity"]
    metadata["changes"] = explain_difference(old, metadata["identity"])
    return table.append(weight_rows(pair_ids, token_weights), metadata)


def put_model(store, made):
    """Put a model of two files on the shelf, as a build does; return its place in the store."""
    name = model_name(made["identity"], made["data"])
    folder = store.root / f"models/{name}"
    files = {"config.json": b'{"vocab_size": 10}', "model.safetensors": f"{made['identity']['side']} weights".encode()}
    for file, content in files.items():
        folder.write(file, content)
    digests = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    made = {**made, "fingerprint": fingerprint(f"{made['identity']['side']} model")}
    folder.write("contrast.json", sign_record(made, digests))
    return f"models/{name}"


def build_small_store(root):
    """Write the store as two builds do: pairs a, b, c first, then d on top."""
    store = WeightStore(root)
    made_from = {"cut": {"max_prompt_tokens": 1024}, "source": SOURCE, "recipe": RECIPE, "parents": []}
    bad = {"source_row": 4, "pair_id": None, "reason": "no_prompt", "detail": "has no prompt", "raw": "{}"}
    store.table(f"quarantine/{DATASET}").replace(
        pa.Table.from_pylist([bad], QUARANTINE), {**made_from, "fingerprint": fingerprint("quarantine")}
    )
    for version, pair_ids in enumerate(["abc", "abcd"]):
        metadata = {**made_from, "fingerprint": fingerprint(f"tokens {version}"), "statistics": {"num_source_rows": 5}}
        tokens = store.table(f"tokens/{DATASET}").append(_token_rows(pair_ids), metadata)
        ref = _append_logps(store, "ref", REF, pair_ids, tokens)
        if version == 0:
            parents = {"tokens": tokens, "ref_logps": ref}
            uniform = _append_weights(store, "hh-harmless/uniform", "uniform", ONES, pair_ids, parents)
            for side in ("positive", "negative"):
                identity = {
                    "model": fingerprint("ref model"),
                    "side": side,
                    "training": TRAINING,
                    "table": uniform.table,
                }
                put_model(store, {"identity": identity, "data": uniform.fingerprint, "version": uniform.version})
        positive = _append_logps(store, "positive", POSITIVE, pair_ids, tokens)
        negative = _append_logps(store, "negative", NEGATIVE, pair_ids, tokens)
        parents = {"tokens": tokens, "ref_logps": ref, "positive_logps": positive, "negative_logps": negative}
        _append_weights(store, "hh-harmless/tis-dpo", "tis", TIS, pair_ids, parents)
    _append_weights(store, "hh-harmless/reversed", "reversed", REVERSED, "abcd", parents)
    return store


@pytest.fixture
def small_store(tmp_path):
    """The store of this file, one's own."""
    return build_small_store(tmp_path / "store")


@pytest.fixture
def model_places(small_store):
    """Where the contrastive models of the small store lie, by side."""
    paths = (small_store.root.path / "models").glob("*/contrast.json")
    return {json.loads(path.read_text())["identity"]["side"]: f"models/{path.parent.name}" for path in paths}


def add_head(store):
    """Add what a build without a contrastive pair leaves: weights of all pairs from the labels alone."""
    tables = {"tokens": f"tokens/{DATASET}", "ref_logps": f"logps/{DATASET}/ref"}
    parents = {role: store.table(path).reference() for role, path in tables.items()}
    _append_weights(store, "hh-harmless/head", "head", TIS, "abcd", parents)
    return store


def add_ti(store):
    """Add what a build of TI-DPO leaves: attributions and anchors of the same reference in two commits, weights of both."""
    attributions, anchors = (store.table(f"{kind}/{DATASET}/ti") for kind in ("attributions", "anchors"))
    for version, pair_ids in enumerate(["abc", "d"]):
        tokens = store.table(f"tokens/{DATASET}").reference(version)
        for table, rows in ((attributions, _attribution_rows(pair_ids)), (anchors, _anchor_rows(pair_ids))):
            metadata = {
                "fingerprint": fingerprint(f"{table.path} {version}"),
                "scorer": {"model": fingerprint("ref model"), "dtype": "float32"},
                "parents": [tokens.as_parent()],
            }
            table.append(rows, metadata)
    parents = {"tokens": tokens, "ref_logps": store.table(f"logps/{DATASET}/ref").reference()}
    parents |= {"attributions": attributions.reference(), "anchors": anchors.reference()}
    metadata = _weights_metadata("hh-harmless/ti-dpo", "ti", parents, TI, "abcd")
    columns = zip(*(ANCHORED[pair_id] for pair_id in "abcd"), strict=True)
    rows = weight_rows("abcd", TI)
    for name, values in zip(("anchor_ids", "anchor_ref_logps"), columns, strict=True):
        field = WEIGHTS.field(name)
        rows = rows.set_column(WEIGHTS.names.index(name), field, pa.array(values, field.type))
    store.table("weights/hh-harmless/ti-dpo").append(rows, metadata)
    return store


def _attribution_rows(pair_ids):
    rows = [
        {"pair_id": p, "chosen_attributions": ATTRIBUTED[p][0], "rejected_attributions": ATTRIBUTED[p][1]}
        for p in pair_ids
    ]
    return pa.Table.from_pylist(rows, ATTRIBUTIONS)


def _anchor_rows(pair_ids):
    rows = [{"pair_id": p, "anchor_ids": ANCHORED[p][0], "anchor_logps": ANCHORED[p][1]} for p in pair_ids]
    return pa.Table.from_pylist(rows, ANCHORS)


@pytest.fixture
def ti_store(small_store):
    """The small store with TI-DPO beside TIS-DPO."""
    return add_ti(small_store)


@pytest.fixture(scope="session")
def read_store(tmp_path_factory):
    """The small store with TI-DPO, for tests that only read."""
    return add_ti(build_small_store(tmp_path_factory.mktemp("read") / "store"))


@pytest.fixture(scope="session")
def texts():
    """The text of every id of the small store."""
    return TEXTS


S3_KEYS = {"AWS_ACCESS_KEY_ID": "AKIDTOKENWEIGHTS", "AWS_SECRET_ACCESS_KEY": "not-to-be-printed"}


def checksums_of(table):
    return sum_checksums(record.sums for record in table.records())


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def s3_endpoint():
    """The URL of moto's S3 server with a bucket `shelf`; a process, for in-process it deadlocks with Rust's threads."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            assert server.poll() is None, "moto's server has ended"
            try:
                urlopen(Request(f"http://127.0.0.1:{port}/shelf", method="PUT"), timeout=5).close()
                break
            except OSError:
                time.sleep(0.25)
        else:
            pytest.fail("moto's server did not answer within a minute")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def s3_keys(monkeypatch):
    """Credentials for S3 in the environment of this test and of its children, and what they are."""
    settings = {"AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true", "AWS_EC2_METADATA_DISABLED": "true", **S3_KEYS}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return S3_KEYS


@pytest.fixture
def s3_root(s3_endpoint, s3_keys, monkeypatch):
    """A fresh prefix on the S3 server, which this test and its children can reach."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    return f"s3://shelf/{uuid.uuid4().hex}"


@pytest.fixture(params=["folder", "s3"])
def store_uri(request, tmp_path):
    """The root of a store that is not there yet: once a folder, once on S3."""
    return request.getfixturevalue("s3_root") if request.param == "s3" else str(tmp_path / "store")


@pytest.fixture
def command(capsys, small_store):
    """Return a function that runs a command on the small store; returns its exit code and what it printed on both streams."""

    def run(*arguments):
        code = tokenweights.main([*arguments, "--store", str(small_store.root)])
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run
