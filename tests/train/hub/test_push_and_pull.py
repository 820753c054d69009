"""`tokenweights push` and `pull` against a hub on loopback."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tokenweights
from weights_store import WeightStore

NAME, REPO_ID = "hh-harmless/tis-dpo", "owner/weights"
CHECKOUT = Path(__file__).parents[3]


@pytest.fixture
def command(small_store, tmp_path, capsys):
    """Return a function that runs a command on the small store, or on a new one: its exit code, output and errors."""

    def run(*arguments, store=None):
        code = tokenweights.main([*arguments, "--store", str(store or small_store.root)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def other_store(tmp_path):
    return WeightStore(tmp_path / "other")


def contents(store, version=None):
    return [(record.sha256, record.group_sizes) for record in store.table(f"weights/{NAME}").records(version)]


def test_what_is_pushed_comes_back_as_it_was(hub, command, small_store, other_store):
    code, out, _ = command("push", NAME, REPO_ID, "--licence", "mit")
    repository = hub.repository(REPO_ID)
    assert (code, repository.is_private, len(repository.commits)) == (0, True, 2)  # the hub's own, and ours
    assert out.splitlines() == [
        f"pushed {NAME}@1, 6 files",
        f"{hub.url}/datasets/{REPO_ID} at {repository.head}",
    ]
    assert sorted(repository.files) == [
        ".gitattributes",
        "README.md",
        "croissant.json",
        "data/test-00000-of-00001.parquet",
        "data/train-00000-of-00001.parquet",
        "heat-map.png",
        "tokenweights.json",
    ]
    assert yaml.safe_load(repository.files["README.md"].decode().split("---\n")[1])["license"] == "mit"
    code, out, _ = command("pull", REPO_ID, store=other_store.root)
    assert (code, contents(other_store)) == (0, contents(small_store))
    assert out.splitlines() == [
        f"pulled {NAME}@0 into {other_store.root}: 4 pairs, every file and every row as they were pushed",
        "not in the repository: 3 models, 1 source, 8 tables that the weights were made from, see "
        f"`tokenweights lineage {NAME}@0`",
        "train on the weights as they are; to add pairs, or to weigh them differently, build from the source",
    ]
    assert other_store.metadata(NAME)["origin"]["place"] == f"hf://datasets/{REPO_ID}"
    assert other_store.metadata(NAME)["origin"]["revision"] == repository.head
    code, out, _ = command("pull", REPO_ID, store=other_store.root)
    assert (code, out.splitlines()[0]) == (0, f"{NAME}@0 in {other_store.root} has these 4 pairs already")


def test_a_second_push_uploads_nothing_and_another_version_replaces_all_files_of_the_first(hub, command, other_store):
    command("push", NAME, REPO_ID)
    num_uploads, head = hub.num_uploads, hub.repository(REPO_ID).head
    code, out, _ = command("push", NAME, REPO_ID)
    assert (code, hub.num_uploads, hub.repository(REPO_ID).head) == (0, num_uploads, head)
    assert out.startswith("nothing to push: the repository has it already")
    assert command("push", f"{NAME}@0", REPO_ID)[0] == 0
    assert "data/test-00000-of-00001.parquet" not in hub.repository(REPO_ID).files  # version 0 has no such split
    assert command("pull", REPO_ID, "--revision", head, "--as", "mine", store=other_store.root)[0] == 0
    assert other_store.scan("mine").collect().height == 4
    assert command("pull", REPO_ID, "--as", "mine", store=other_store.root)[0] == 0
    assert other_store.scan("mine").collect().height == 3
    assert other_store.history("mine")["version"].to_list() == [1, 0]


@pytest.mark.slow
def test_a_killed_push_changes_nothing_and_the_next_one_uploads_the_rest(hub, command, tmp_path):
    hub.stalls_after = 1
    line = [sys.executable, "-P", "-m", "tokenweights", "push", NAME, REPO_ID, "--store", str(tmp_path / "store")]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(CHECKOUT)}
    environment["HF_HUB_OFFLINE"] = "0"
    child = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert hub.is_stalled.wait(120), child.communicate(timeout=5)
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.communicate()
    assert list(hub.repository(REPO_ID).files) == [".gitattributes"]
    hub.stalls_after = None
    hub.go_on.set()
    assert command("push", NAME, REPO_ID)[0] == 0
    assert hub.num_uploads == 3  # two Parquet files and a picture, each once over both pushes
    assert len(hub.repository(REPO_ID).commits) == 2
    assert list((tmp_path / "cache" / "push").iterdir()) == []


def test_a_repository_of_somebody_else_is_left_alone(hub, command):
    hub.add(REPO_ID, {"data/train.parquet": b"x", "README.md": b"mine"})
    code, out, err = command("push", NAME, REPO_ID)
    assert (code, out, len(hub.repository(REPO_ID).commits), hub.num_uploads) == (1, "", 1, 0)
    assert f"{REPO_ID} holds 1 files, for example data/train.parquet, and no tokenweights.json" in err


def test_a_card_that_somebody_changed_is_not_replaced_without_a_word(hub, command):
    hub.add(REPO_ID, {"README.md": b"mine"})
    code, _, err = command("push", NAME, REPO_ID)
    assert (code, hub.repository(REPO_ID).files["README.md"]) == (1, b"mine")
    assert (
        f"{REPO_ID} has a README.md that `tokenweights push` did not write, or that was changed since: put your" in err
    )
    assert command("push", NAME, REPO_ID, "--replace-card")[0] == 0
    repository = hub.repository(REPO_ID)
    written = repository.files["README.md"]
    assert b"4 preference pairs" in written
    repository.commit({**repository.files, "README.md": written.replace(b"license", b"licence")})  # on its page
    num_uploads = hub.num_uploads
    assert command("push", f"{NAME}@0", REPO_ID)[0] == 1
    assert (hub.num_uploads, len(repository.commits)) == (num_uploads, 3)
    assert command("push", NAME, REPO_ID, "--replace-card")[0] == 0
    assert repository.files["README.md"] == written


def test_a_push_replaces_the_files_of_the_last_one_and_leaves_those_of_people(hub, command, other_store, tmp_path):
    command("push", NAME, REPO_ID)
    repository = hub.repository(REPO_ID)
    mine = {"NOTES.md": b"read this", "data/mine.parquet": b"other rows"}
    repository.commit({**repository.files, **mine})
    assert command("push", f"{NAME}@0", REPO_ID)[0] == 0
    assert {name: repository.files[name] for name in mine} == mine
    assert sorted(name for name in repository.files if name.startswith("data/")) == [
        "data/mine.parquet",
        "data/train-00000-of-00001.parquet",
    ]
    assert command("pull", REPO_ID, store=other_store.root)[0] == 0
    assert not list((tmp_path / "hub-cache").rglob("mine.parquet"))
    broken = json.dumps({**json.loads(repository.files["tokenweights.json"]), "files": None}).encode()
    repository.commit({**repository.files, "tokenweights.json": broken})
    code, _, err = command("push", NAME, REPO_ID)
    assert (code, f"{REPO_ID}/tokenweights.json does not list the files of the last push" in err) == (1, True)


def test_a_commit_whose_answer_is_lost_is_found_by_the_next_push(hub, command):
    hub.loses_commit_answers = True
    code, _, err = command("push", NAME, REPO_ID)
    assert (code, "Server disconnected without sending a response; check the connection, and run again" in err) == (
        1,
        True,
    )
    hub.loses_commit_answers = False
    code, out, _ = command("push", NAME, REPO_ID)
    assert (code, out.startswith("nothing to push"), len(hub.repository(REPO_ID).commits)) == (0, True, 2)


def test_a_copy_that_was_damaged_in_the_cache_is_named_and_downloaded_again_once_it_is_deleted(
    hub, command, other_store, tmp_path
):
    command("push", NAME, REPO_ID)
    command("pull", REPO_ID, "--as", "first", store=other_store.root)
    (kept,) = [path.resolve() for path in (tmp_path / "hub-cache").rglob("train-00000-of-00001.parquet")]
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    kept.write_bytes(data)
    code, _, err = command("pull", REPO_ID, "--as", "second", store=other_store.root)
    assert (code, f"Delete {kept}, which may be a damaged copy, and pull again" in err) == (1, True)
    kept.unlink()
    assert command("pull", REPO_ID, "--as", "second", store=other_store.root)[0] == 0


def test_owner_and_name_is_a_repository_also_where_there_is_such_a_folder(
    hub, command, other_store, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command("push", f"{NAME}@0", f"./{REPO_ID}")
    code, _, err = command("push", NAME, REPO_ID)
    assert (code, f"{REPO_ID} is a repository of the hub here; write ./{REPO_ID} for the folder\n" in err) == (0, True)
    code, out, err = command("pull", REPO_ID, store=other_store.root)
    assert (code, ": 4 pairs" in out, f"write ./{REPO_ID} for the folder\n" in err) == (0, True, True)
    code, out, _ = command("pull", f"./{REPO_ID}", "--as", "of-folder", store=other_store.root)
    assert (code, ": 3 pairs" in out) == (0, True)


def test_public_is_said_or_refused(hub, command):
    hub.add(REPO_ID, {}, is_private=False)
    code, _, err = command("push", NAME, REPO_ID)
    assert (code, len(hub.repository(REPO_ID).commits)) == (1, 1)
    assert f"everybody can read {REPO_ID}: give --public if that is meant" in err
    assert command("push", NAME, REPO_ID, "--public")[0] == 0
    assert command("push", NAME, "owner/new", "--public")[0] == 0
    assert not hub.repository("owner/new").is_private
    hub.add("owner/private", {})
    code, _, err = command("push", NAME, "owner/private", "--public")
    assert (code, hub.repository("owner/private").is_private) == (0, True)
    assert "owner/private is private and stays so" in err


def test_somebody_who_commits_meanwhile_stops_a_push(hub, command, monkeypatch):
    hub.add(REPO_ID, {})
    from huggingface_hub import HfApi

    preupload = HfApi.preupload_lfs_files

    def meanwhile(self, *arguments, **keywords):
        hub.repository(REPO_ID).commit({"README.md": b"somebody was faster"})
        return preupload(self, *arguments, **keywords)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", meanwhile)
    code, _, err = command("push", NAME, REPO_ID)
    assert (code, list(hub.repository(REPO_ID).files)) == (1, ["README.md"])
    assert "A commit has happened since" in err
    assert "somebody else changed the repository meanwhile; run again" in err


def test_the_token_is_that_of_the_hub_and_stands_nowhere(hub, command, monkeypatch, tmp_path, other_store):
    shown = "".join(map(str, command("push", NAME, REPO_ID)))
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_commit", lambda *_, **__: (_ for _ in ()).throw(OSError(f"no {hub.token}"))
    )
    shown += "".join(map(str, command("push", f"{NAME}@0", REPO_ID)))
    assert "error: cannot push to owner/weights: no ***" in shown
    monkeypatch.delenv("HF_TOKEN")
    for arguments in (("push", NAME, REPO_ID), ("pull", REPO_ID)):
        code, out, err = command(*arguments, store=other_store.root if arguments[0] == "pull" else None)
        assert (code, out) == (1, "")
        assert "log in with `hf auth login` or set HF_TOKEN" in err
        shown += err
    assert hub.token not in shown
    assert "signature" not in shown
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(hub.token.encode() in content for content in [*kept, *hub.repository(REPO_ID).files.values()])


def test_what_the_hub_refuses_is_said_in_one_line(hub, command, other_store, monkeypatch):
    code, _, err = command("pull", "owner/none", store=other_store.root)
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(
        "error: cannot pull owner/none: Repository not found; check the name; a private repository is"
    )
    command("push", NAME, REPO_ID)
    code, _, err = command("pull", REPO_ID, "--revision", "v9", store=other_store.root)
    assert (code, "cannot pull owner/weights (revision v9): Invalid rev id: v9; check the name" in err) == (1, True)
    hub.refuses_yaml = "license must be a text"
    code, _, err = command("push", f"{NAME}@0", REPO_ID)
    assert (code, len(hub.repository(REPO_ID).commits)) == (1, 2)
    assert "Invalid metadata in README.md. - license must be a text; change what it refuses; licences have" in err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = command("push", NAME, REPO_ID)
    assert (code, "offline mode is enabled" in err) == (1, True)


def test_a_repository_that_is_no_weight_dataset_is_not_downloaded(hub, command, other_store):
    hub.add("owner/pairs", {"data/train-00000-of-00001.parquet": b"x" * 1000, "README.md": b"pairs"})
    code, _, err = command("pull", "owner/pairs", store=other_store.root)
    sha = hub.repository("owner/pairs").head
    assert (code, f"hf://datasets/owner/pairs@{sha[:12]} has no tokenweights.json" in err) == (1, True)
    assert not any("resolve" in request for request in hub.requests)


def test_a_file_that_changed_on_the_hub_is_refused(hub, command, other_store):
    command("push", NAME, REPO_ID)
    repository = hub.repository(REPO_ID)
    name = "data/train-00000-of-00001.parquet"
    repository.commit({**repository.files, name: repository.files[name][:-5] + b"12345"})
    code, _, err = command("pull", REPO_ID, store=other_store.root)
    assert (code, f"{name} is not the file that was pushed" in err) == (1, True)
    assert not other_store.root.path.exists() or not any(p.is_file() for p in other_store.root.path.rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["push", NAME, "./shared", "--public"],
            "--public is for repositories of the hub (owner/name), and ./shared is",
        ),
        (["push", "./policy", REPO_ID], "./policy is no output folder of `tokenweights train`"),
        (
            ["push", NAME, "~nobody-here/x"],
            "~nobody-here/x: there is no home folder of that name here; give the whole path",
        ),
        (["pull", "~nobody-here/x"], "~nobody-here/x: there is no home folder of that name here"),
        (["pull", "nowhere"], "nowhere is no folder, and does not read owner/name"),
        (["pull", "owner/name@v1"], "owner/name@v1 is no folder, and does not read owner/name"),
        (["push", "hh-harmless/none", REPO_ID], "no weight dataset 'hh-harmless/none'"),
    ],
)
def test_wrong_usage_is_refused_before_the_hub_is_asked(hub, command, arguments, problem):
    code, out, err = command(*arguments)
    assert (code, out, hub.requests) == (1, "", [])
    assert problem in err


def test_a_folder_needs_no_hub(small_store, other_store, command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert command("push", NAME, str(tmp_path / "shared"))[0] == 0
    code, _, _ = command("pull", str(tmp_path / "shared"), store=other_store.root)
    assert (code, contents(other_store)) == (0, contents(small_store))
    code, _, err = command("pull", str(tmp_path / "shared"), "--revision", "v1", store=other_store.root)
    assert (code, "--revision is for repositories of the hub" in err) == (1, True)
    code, _, err = command("push", NAME, REPO_ID)
    assert code == 1
    assert err.splitlines()[-1] == (
        f"error: cannot push to {REPO_ID}: this needs the package 'huggingface_hub', which is not installed; "
        "pip install 'tokenweights[hub]'"
    )


def test_datasets_loads_and_streams_the_rows_from_the_hub(hub, command, small_store, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    command("push", NAME, REPO_ID)
    plain = datasets.load_dataset(REPO_ID, cache_dir=str(tmp_path / "datasets"))
    streamed = datasets.load_dataset(REPO_ID, streaming=True)
    expected = small_store.scan(NAME).sort("pair_id").collect().to_dicts()
    for splits in (plain, streamed):
        rows = [*splits["train"], *splits["test"]]
        assert [{name: row[name] for name in expected[0]} for row in rows] == expected
    command("push", f"{NAME}@0", REPO_ID)  # which has fewer splits and files
    older = datasets.load_dataset(REPO_ID, streaming=True)
    assert list(older) == ["train"]
    assert [row["pair_id"] for row in older["train"]] == small_store.scan(NAME, 0).collect()["pair_id"].to_list()
