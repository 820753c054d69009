"""What people are told when the hub refuses, fails or is silent: one line, with what to do, and without secrets."""

import io
import logging
import sys
from types import ModuleType

import pytest

from train.hub.answers import explained
from train.hub.repository import download, open_repository
from weights_store.errors import InputError

REPO_ID = "owner/weights"


def open_it(repo_id=REPO_ID):
    return open_repository(repo_id, "dataset", record="tokenweights.json", is_public=False, replaces_card=False)


def pull_it():
    return download(REPO_ID, None, ["tokenweights.json"])


CREATE, INFO, GET = "POST /api/repos/create", "GET /api/datasets/owner/weights", "HEAD /datasets/owner/weights/resolve"


@pytest.mark.parametrize(
    ("act", "request_begins", "status", "headers", "said"),
    [
        (open_it, CREATE, 429, {"Retry_After": "7"}, "the hub says 429; wait 7 s and run again: what was transferred"),
        (open_it, CREATE, 429, {}, "the hub says 429; wait some minutes and run again"),
        (open_it, CREATE, 500, {}, "the hub says 500; the hub has a fault; wait and run again"),
        (open_it, CREATE, 0, {}, "Server disconnected without sending a response; check the connection, and run again"),
        (open_it, INFO, 403, {}, "the hub says 403; the token may not do that: log in as somebody who may"),
        (pull_it, INFO, 401, {}, "the hub says 401; check the name, and log in with `hf auth login` or set HF_TOKEN"),
        (pull_it, INFO, 403, {}, "the hub says 403; the token may not do that"),
        (pull_it, INFO, 429, {"Retry_After": "7"}, "the hub says 429; wait 7 s and run again"),
        (pull_it, INFO, 503, {}, "the hub says 503; the hub has a fault; wait and run again"),
        (pull_it, GET, 404, {}, "the hub says 404; check the name"),
    ],
)
def test_what_the_hub_says_comes_with_what_to_do(hub, act, request_begins, status, headers, said):
    hub.add(REPO_ID, {"tokenweights.json": b'{"files": {}}'})
    hub.answers[request_begins] = status, headers
    with pytest.raises(InputError) as raised:
        act()
    assert not hub.answers
    action = "push to" if act is open_it else "pull"
    assert str(raised.value).startswith(f"cannot {action} {REPO_ID}: {said}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["owner/weights.git", "owner/a--b", f"owner/{'x' * 97}"])
def test_a_name_that_the_hub_does_not_take_is_refused_without_a_request(hub, name):
    with pytest.raises(InputError, match="; choose another name$"):
        open_it(name)
    assert hub.requests == []


def test_without_room_or_connection_the_remedy_is_of_that(hub, monkeypatch):
    hub.add(REPO_ID, {"tokenweights.json": b"{}"})
    full = OSError(28, "No space left on device", "/cache/blob")
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(full))
        with pytest.raises(InputError, match=r"No space left on device: '/cache/blob'; make room and run again$"):
            pull_it()
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(InputError, match="; unset HF_HUB_OFFLINE and run again$"):
            pull_it()
    monkeypatch.setenv("HF_TOKEN", "hf_\u201cquoted\u201d")
    with pytest.raises(InputError, match="; see that the token is typed as the hub shows it"):
        open_it()


def test_an_endpoint_that_is_no_address_is_named(monkeypatch):
    broken = ModuleType("huggingface_hub")
    broken.__getattr__ = lambda name: (_ for _ in ()).throw(ValueError("Invalid IPv6 URL"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", broken)
    problem = "cannot pull x/y: HF_ENDPOINT is no address: Invalid IPv6 URL; expected one like https://hub.org"
    with pytest.raises(InputError, match=f"^{problem}$"), explained("cannot pull x/y"):
        pass


def test_the_signature_of_an_upload_that_is_tried_again_is_not_logged(hub, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.add(REPO_ID, {})
    hub.answers["PUT /lfs/"] = 503, {}
    (tmp_path / "a.parquet").write_bytes(b"rows")
    repository = open_it()
    (handler,) = logging.getLogger("huggingface_hub").handlers
    monkeypatch.setattr(handler, "stream", io.StringIO())
    repository.push({"data/a.parquet": tmp_path / "a.parquet"}, "Push it")
    logged = handler.stream.getvalue()
    assert f"HTTP Error 503 thrown while requesting PUT {hub.url}/lfs/" in logged
    assert "signature" not in logged
    assert hub.repository(REPO_ID).files["data/a.parquet"] == b"rows"
