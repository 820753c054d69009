"""No credential in the environment of a build, or written where none belongs, is in anything that the build writes."""

import os
import subprocess
import sys

import pytest

import tokenweights
from tests.torture import orphans
from weights_store import WeightStore

PLANTED = {
    "AWS_ACCESS_KEY_ID": "planted-key-id",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-key",
    "AWS_SESSION_TOKEN": "planted-session-token",
    "HF_TOKEN": "hf_plantedhubtoken",
    "PREFECT_API_KEY": "planted-prefect-key",
    "PREFECT_API_AUTH_STRING": "planted-user:planted-prefect-password",
    "PREFECT_SERVER_DATABASE_PASSWORD": "planted-database-password",
    "DATABASE_URL": "postgresql://prefect:planted-url-password@127.0.0.1:9/prefect",
}
WORDS = [b"planted-", b"plantedhubtoken"]


@pytest.fixture
def recipe(tmp_path, toy_model, toy_pairs):
    """A recipe file with a made-up scorer."""
    return orphans.write_recipe(tmp_path, toy_model, toy_pairs[:8])


def written(folder):
    """Yield every file below a folder that holds a planted word, with the word."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            yield from ((str(path.relative_to(folder)), word) for word in WORDS if word in data)


@pytest.mark.slow
def test_a_build_writes_no_credential_into_store_report_log_or_database(recipe, tmp_path):
    others = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    places = {"PREFECT_HOME": str(tmp_path / "prefect"), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tokenweights", "build", str(recipe), f"--store={tmp_path}/store"],
        cwd=tmp_path,
        env={**others, **PLANTED, **places},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert WeightStore(f"{tmp_path}/store").list().height, "something was built"
    assert (tmp_path / "prefect" / "prefect.db").stat().st_size > 0, "runs, parameters, artifacts and logs"
    assert "planted" not in done.stdout + done.stderr
    assert list(written(tmp_path)) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--store=s3://planted-user:planted-password@bucket/store"],
        ["--store=http://planted-user:planted-password@host/store"],
        ["--set=dataset.source=https://planted-user:planted-password@host/pairs.jsonl"],
        ["--set=model.path=https://planted-user:planted-password@host/model"],
        ["--set=score.python=/envs/planted-user:planted-password@host/python"],
        ["--store=s3://bucket/store"],  # nothing listens there
    ],
    ids=lambda arguments: arguments[0].partition("planted")[0],
)
def test_an_error_repeats_no_credential(recipe, tmp_path, monkeypatch, capsys, arguments):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://planted-user:planted-password@127.0.0.1:9")
    monkeypatch.setattr("weights_store.location.PROBE_PAUSES_S", ())
    assert tokenweights.main(["plan", str(recipe), *arguments]) == 1
    out, err = capsys.readouterr()
    assert "planted" not in out + err
    assert err.startswith("error: ")
    assert list(written(tmp_path)) == []
