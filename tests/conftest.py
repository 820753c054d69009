"""Fixtures shared by the suite: a toy model and pairs, made once, and quiet settings for engines and servers."""

import io
import json
import os
import pickle
import secrets
import subprocess
import sys
import time
import tomllib
import urllib.request
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared"

os.environ.update(
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    DO_NOT_TRACK="1",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="180",
    # Ray reads the first three when it is imported, which vLLM does too, and a process keeps the first token that it used.
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # ports on 127.0.0.1 only
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=secrets.token_hex(32),  # else it is written into the home folder
)
if "PYTEST_XDIST_WORKER" in os.environ:  # engines and trainings of several workers would fight over the same cores
    os.environ.update(OMP_NUM_THREADS="1", POLARS_MAX_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind")


@pytest.fixture(scope="session", autouse=True)
def _own_places(tmp_path_factory):
    """Keep the suite out of the user's own Prefect database and cache."""
    os.environ["PREFECT_HOME"] = str(tmp_path_factory.mktemp("prefect"))
    os.environ["TOKENWEIGHTS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def counting_s3(tmp_path_factory):
    """The URL of an S3 server with an empty bucket that counts the bytes it sends."""
    port_file = tmp_path_factory.mktemp("s3") / "port"
    command = [sys.executable, str(REPO / "tests" / "weights_store" / "counting_s3.py"), str(port_file)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (port_file.exists() and port_file.read_text()):
            assert process.poll() is None, "the S3 server has ended"
            assert time.monotonic() < deadline, "the S3 server did not start"
            time.sleep(0.05)
        url = f"http://127.0.0.1:{port_file.read_text()}"
        urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT"), timeout=30).close()
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def shared_folder():
    """Real pairs and a small real chat model, which are not part of the project."""
    if not (SHARED / "models" / "tiny-chat").is_dir():
        pytest.skip(
            "no ../shared beside this checkout: the real pairs and the small chat model are not part of the project"
        )
    return SHARED


@pytest.fixture(scope="session")
def language():
    from pipeline.toy.language import ToyLanguage

    return ToyLanguage()


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory, language):
    """A tiny Llama that has seen a little of the toy language: enough for flows, not for quality."""
    from pipeline.toy.model_maker import make_chat_model

    folder = tmp_path_factory.mktemp("toy") / "model"
    make_chat_model(language.sample_conversations(400, seed=1), folder, hidden_size=64, num_layers=2, steps=60)
    return folder


@pytest.fixture(scope="session")
def toy_pairs(language):
    return language.sample_pairs(60, seed=2)


@pytest.fixture
def make_recipe(tmp_path, toy_model):
    """Return a function that makes a recipe on the toy model, any setting replaced: `make_recipe(**{"weights.k": 2})`."""
    from pipeline.recipe import Recipe
    from weights_store.settings import parse_settings

    def make(**settings):
        sections = {
            "dataset": {"name": "toy", "source": str(tmp_path / "pairs.jsonl")},
            "model": {"path": str(toy_model)},
            "score": {"kv_cache_gib": 1.0},
            "weights": {"name": "toy/tis-dpo", "estimator": "tis"},
            "store": {"uri": str(tmp_path / "store")},
        }
        for key, value in settings.items():
            *path, name = key.split(".")
            section = sections
            for part in path:
                section = section.setdefault(part, {})
            section[name] = value
        return parse_settings(Recipe, sections, "test")

    return make


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A `Spread` that does its work as another process in another folder would: with copies of everything."""

    def spread(work, items):
        for item in items:
            sent = pickle.dumps((work, item))
            with monkeypatch.context() as there:
                there.chdir(tmp_path)
                own_work, own_item = pickle.loads(sent)
                reply = pickle.dumps(own_work(own_item))
            yield pickle.loads(reply)

    return spread


@pytest.fixture(scope="session")
def flip_silently():
    """Return a function that damages a column of a table so that only a comparison with the commit can tell."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def flip(table, column, version=None):
        """Flip one bit of a column in the newest shard of a version: the file can still be read, with other values."""
        path = table.location.path / table.shards(version)[-1]
        good, clean = path.read_bytes(), pq.read_table(path)
        group = pq.ParquetFile(path).metadata.row_group(0)
        chunk = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema.split(".")[0] == column)
        for at in range(chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size):
            data = bytearray(good)
            data[at] ^= 4
            try:
                found = pq.read_table(io.BytesIO(data))
            except (OSError, pa.ArrowException):
                continue
            if not found.equals(clean):
                path.write_bytes(data)
                return
        pytest.fail("every flipped bit is noticed by Parquet itself")

    return flip


@pytest.fixture(scope="session")
def write_jsonl():
    """Return a function that writes rows, each a dict or a ready line as bytes."""

    def write(path, rows):
        lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
        Path(path).write_bytes(b"\n".join(lines) + b"\n")

    return write


@pytest.fixture(scope="session")
def light_install(tmp_path_factory):
    """Return a function that makes a clean environment of the base and some extras, and returns its interpreter.

    The environment links exactly the packages that pip would install for them, so it takes a second and no network.
    """

    @cache
    def make(*extras):
        folder = tmp_path_factory.mktemp("install")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        (site_packages,) = folder.glob("lib/python*/site-packages")
        for name in ("tokenweights.py", "tokenweights_flows.py", "weights_store", "pipeline", "train", "flows"):
            (site_packages / name).symlink_to(REPO / name)
        for found in _distributions(extras):
            for name in {file.parts[0] for file in found.files if file.parts[0] not in ("..", "__pycache__")}:
                if not (site_packages / name).exists():  # some share a folder
                    (site_packages / name).symlink_to(found.locate_file(name))
        return folder / "bin" / "python"

    return make


def _distributions(extras):
    """Return the distributions that the base and `extras` of pyproject.toml need, with all that these need in turn."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    found = {}
    while wanted:
        requirement = Requirement(wanted.pop())
        for extra in ("", *requirement.extras):
            if (requirement.name, extra) not in found:
                installed = found[requirement.name, extra] = distribution(requirement.name)
                needs = [text for text in installed.requires or [] if _applies(Requirement(text), extra)]
                wanted += needs
    return {installed.name: installed for installed in found.values()}.values()


def _applies(requirement, extra):
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


@pytest.fixture
def disk(tmp_path):
    """A file system of 1 MiB, mounted for this test: its folder, and a function that remounts it with options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tokenweights-test", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")

    mount("size=1m")
    yield folder, lambda options: mount(f"remount,{options}")
    subprocess.run(["umount", "-l", str(folder)], check=True)
