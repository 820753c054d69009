"""Where a store may lie, and what is said when an object store does not answer, refuses or falters."""

import contextlib
import multiprocessing
import pickle
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pyarrow as pa
import pytest

from weights_store import WeightStore
from weights_store.errors import NotFoundError, SettingsError, StoreError
from weights_store.location import Location, one_line
from weights_store.schemas import LOGPS

METADATA = {"fingerprint": "f0"}


def rows(*pair_ids):
    return pa.table(
        [list(pair_ids), [[-1.0]] * len(pair_ids), [[-2.0]] * len(pair_ids), *[[None] * len(pair_ids)] * 4],
        schema=LOGPS,
    )


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("/data/store/", "/data/store"),
        ("data//store", "data/store"),
        ("file:///data/a%20b/", "/data/a b"),
        ("s3://bucket/prefix//", "s3://bucket/prefix"),
        ("s3://bucket", "s3://bucket"),
        ("gs://bucket/a=1,b+2", "gs://bucket/a=1,b+2"),
        ("abfss://box@account.dfs.core.windows.net/p", "abfss://box@account.dfs.core.windows.net/p"),
    ],
)
def test_places_are_taken_as_they_are_written(uri, place):
    assert str(Location(uri)) == place
    sent = Location(uri)  # a process that gets it may run in another folder
    assert pickle.loads(pickle.dumps(sent)) == (Location(str(sent.path.absolute())) if sent.is_local else sent)


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert str(Location("~/store")) == "/home/ada/store"
    assert str(Location("~")) == "/home/ada"


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("", "store URI is empty; expected a folder or a URI"),
        ("data\\store", r"bad folder 'data\\store': deltalake cannot read a table below a backslash"),
        ("/data/a\nb", r"bad folder '/data/a\nb': deltalake cannot read a table below a backslash or a control char"),
        ("/data/a\x7f", r"bad folder '/data/a\x7f': deltalake cannot read a table below"),
        ("/data/\udc80", r"bad folder '/data/\udc80': its name is not UTF-8"),
        ("/data/" + "é" * 128, "a part of its path has 256 bytes, file systems take 255"),
        ("/data" + "/abcdefghi" * 300, "its path has 3,005 bytes, limit 3,000; give a shorter one"),
        ("data\0store", "it has a zero byte, which no path can have"),  # pyarrow would end the process
        ("file:///data%00store", "it has a zero byte, which no path can have"),
        ("https://host/x", "a store cannot be at https://…: expected a folder, file:///… or one of s3://…"),
        ("file://host/x", "names a host: expected file:///absolute/path"),
        ("s3://", "bad part '' in the store's s3:// URI: expected s3://bucket/prefix"),
        ("s3://bucket//x", "bad part '' in the store's s3:// URI"),
        ("s3://bucket/../x", "bad part '..' in the store's s3:// URI"),
        ("s3://bucket/a b", "bad part 'a b' in the store's s3:// URI"),
        ("s3://bucket/a%20b", "bad part 'a%20b' in the store's s3:// URI"),
        ("/data/a%20b", "bad folder '/data/a%20b': deltalake takes a % before two hex digits for another character"),
    ],
)
def test_places_that_the_libraries_read_differently_are_refused(uri, text):
    with pytest.raises(SettingsError) as caught:
        Location(uri)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "start"),
    [
        ("s3:/bucket/x", "s3:/"),
        ("s3:bucket/x", "s3:"),
        ("s3//bucket/x", "s3//"),
        ("S3:/bucket", "S3:/"),
        ("gs:/bucket", "gs:/"),
        ("abfss:box@account", "abfss:"),
        ("file:/data/store", "file:/"),
        ("hdfs:/data/store", "hdfs:/"),
        ("s3:/AKIDINURI:hunter2hunter2@bucket", "s3:/"),
    ],
)
def test_a_mistyped_scheme_is_no_folder(uri, start):
    with pytest.raises(SettingsError) as caught:
        Location(uri)
    expected = "expected a folder, file:///… or one of s3://…, gs://…, abfs://…, abfss://…"
    assert str(caught.value) == f"a store cannot be at {start}…: {expected}"


@pytest.mark.parametrize("uri", ["s3/x", "s3", "/data/s3:/x", "runs/12:30", "12:30/x", "c:/x"])
def test_a_folder_may_look_a_little_like_a_scheme(uri):
    assert Location(uri).is_local


def test_the_nearest_folder_of_a_store_to_come_is_one_that_exists(tmp_path, monkeypatch):
    assert Location(str(tmp_path)).nearest_folder() == tmp_path
    assert Location(str(tmp_path / "a" / "b")).nearest_folder() == tmp_path
    monkeypatch.chdir(tmp_path)
    assert Location("a/b").nearest_folder() == tmp_path


@pytest.mark.parametrize("below", ["", "/x", "/x/y"])
def test_a_file_in_the_place_of_a_store_is_named(tmp_path, below):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(
            StoreError, match=f"cannot be at {tmp_path}/{name}{below}: {tmp_path}/{name} is not a folder"
        ):
            Location(f"{tmp_path}/{name}{below}").nearest_folder()


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIDINURI:hunter2hunter2@bucket/x",
        "s3://bucket/x?access_key=AKIDINURI&secret_key=hunter2hunter2",
        "s3://bucket/x#hunter2hunter2",
        "gs://hunter2hunter2@bucket/x",
        "abfss://AKIDINURI:hunter2hunter2@account/x",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri):
    with pytest.raises(
        SettingsError, match="URI carries credentials or options; give them as environment variables"
    ) as caught:
        Location(uri)
    assert "hunter2" not in str(caught.value)
    assert "AKIDINURI" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3:/AKIDINURI:hunter2hunter2@b",
        "s3:AKIDINURI:hunter2hunter2@b",
        "S3://AKIDINURI:hunter2hunter2@b",
        "file://AKIDINURI:hunter2hunter2@host/x",
        "file:///AKIDINURI:hunter2hunter2@host/x",
        "https://AKIDINURI:hunter2hunter2@host/x",
        "AKIDINURI:hunter2hunter2@b",
        "//AKIDINURI:hunter2/hunter2@b/x",
        "/data/AKIDINURI:hunter2hunter2@b",
        " s3:/ AKIDINURI:hunter2hunter2@b",
    ],
)
def test_what_reads_like_credentials_is_no_folder_and_not_repeated(uri):
    with pytest.raises(SettingsError, match="a store cannot be at|names a host") as caught:
        Location(uri)
    assert "hunter2" not in str(caught.value)
    assert "AKIDINURI" not in str(caught.value)


def test_one_line_leaves_out_colours_trees_backtraces_and_what_a_reply_quotes(monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "session-token-1")
    reply = "<?xml version='1.0'?>\n<Error><Code>InvalidToken</Code><Message>No.</Message><Token>x</Token></Error>"
    text = f"Generic error\n  \x1b[31m↳\x1b[0m GET http://u:p@host/ with session-token-1: {reply}\n  0: <unknown>\n  1: main"
    assert one_line(RuntimeError(text)) == "Generic error GET http://***@host/ with ***: InvalidToken: No."
    assert one_line(ValueError()) == "ValueError"


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    place = Location(str(tmp_path))
    place.write("a.json", b"old")

    def full_disk(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("weights_store.location.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        place.write("a.json", b"new")
    assert place.read("a.json") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_files_and_folders_are_listed_alike_everywhere(store_uri):
    place = Location(store_uri)
    assert (place.files(), list(place.folders()), place.exists("")) == ({}, [], False)
    for name in ("top.json", "b/x.json", "a/deep/y.json"):
        (place / name).exists("")
        place.write(name, name.encode())
    assert (list(place.files()), list(place.folders())) == (["top.json"], ["a", "b"])
    assert sorted(place.tree()) == ["a/deep/y.json", "b/x.json", "top.json"]
    assert place.exists("none", "b/x.json")
    assert place.exists("a")
    assert not place.exists("none")
    assert place.read("a/deep/y.json") == b"a/deep/y.json"
    place.delete("top.json")
    with pytest.raises(FileNotFoundError):
        place.read("top.json")


# What Amazon answers to a wrong secret: it repeats the key and what was to be signed.
DENIAL = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>SignatureDoesNotMatch</Code><Message>The request signature we calculated does not match.</Message>
<AWSAccessKeyId>AKIDTOKENWEIGHTS</AWSAccessKeyId><StringToSign>x-amz-security-token:abc</StringToSign></Error>"""


def answer(sender, status):
    """Answer every request with `status`; 0: never."""

    class Handler(BaseHTTPRequestHandler):
        def do(self):
            if not status:
                time.sleep(3600)
            body = b"" if self.command == "HEAD" else DENIAL
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do

        def log_message(self, *_args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    sender.send(server.server_port)
    server.serve_forever()


@contextlib.contextmanager
def process(target, *args):
    """Run `target(pipe, *args)` in a process of its own; yields the pipe."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=target, args=(theirs, *args), daemon=True)
    child.start()
    try:
        assert ours.poll(60)
        yield ours
    finally:
        child.kill()
        child.join()


def come_and_go(pipe, folder):
    """Make a folder and remove it, again and again."""
    pipe.send("started")
    while True:
        folder.mkdir()
        folder.rmdir()


def test_a_folder_that_a_writer_makes_just_now_is_listed(tmp_path):
    folder, until = Location(str(tmp_path / "table")), time.monotonic() + 3
    with process(come_and_go, tmp_path / "table"):
        while time.monotonic() < until:  # some 100,000 times
            assert folder.files() == {}


def check_one_clean_line(error, keys):
    text = str(error)
    assert "\n" not in text
    assert not [key for key in (*keys.values(), "StringToSign") if key in text]
    assert error.__cause__ is None or not [key for key in keys.values() if key in str(error.__cause__)]


def test_a_wrong_secret_is_one_line_without_keys(s3_keys, monkeypatch):
    with process(answer, 403) as pipe:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{pipe.recv()}")
        store = WeightStore("s3://shelf/x")
        table = store.table("logps/toy/x")
        for use in (store.list, table.version, lambda: table.append(rows("a"), METADATA)):
            with pytest.raises(
                StoreError, match="cannot read s3://shelf/x.*ACCESS_DENIED.*check the credentials"
            ) as caught:
                use()
            check_one_clean_line(caught.value, s3_keys)
        # deltalake's own requests get the same reply; our look at the log came through, as far as it knows.
        monkeypatch.setattr(Location, "exists", lambda *_names: True)
        with pytest.raises(
            StoreError, match="cannot open logps/toy/x in s3://shelf/x: .*SignatureDoesNotMatch: The req"
        ) as caught:
            table.version()
        check_one_clean_line(caught.value, s3_keys)


def test_an_endpoint_that_refuses_connections_is_named(s3_keys, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with pytest.raises(
        StoreError, match=f"cannot reach the object store at 127.0.0.1:{port}: .*refused; check AWS_END"
    ) as caught:
        WeightStore("s3://shelf/x").list()
    check_one_clean_line(caught.value, s3_keys)


def test_an_endpoint_that_never_answers_is_named(s3_keys, monkeypatch):
    monkeypatch.setattr("weights_store.location.PROBE_S", 0.3)
    monkeypatch.setattr("weights_store.location.PROBE_PAUSES_S", (0.1,))
    with process(answer, 0) as pipe:
        port = pipe.recv()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        with pytest.raises(StoreError, match=f"cannot reach the object store at 127.0.0.1:{port}: timed out"):
            WeightStore("s3://shelf/x").table("logps/toy/x").version()


def test_an_endpoint_without_a_scheme_is_refused(s3_keys, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(
        SettingsError, match=r"AWS_ENDPOINT_URL is not a URL: expected http://host:port or https://host"
    ):
        WeightStore("s3://shelf/x").list()


def test_an_unknown_bucket_is_one_line(s3_root, s3_keys):
    store = WeightStore("s3://no-such-bucket/x")
    with pytest.raises(
        StoreError, match="cannot write logps/toy/x in s3://no-such-bucket/x: .*NO_SUCH_BUCKET"
    ) as caught:
        store.table("logps/toy/x").append(rows("a"), METADATA)
    check_one_clean_line(caught.value, s3_keys)
    with pytest.raises(NotFoundError, match="no store at s3://no-such-bucket/x"):
        store.list()


def forward(pipe, port):
    """Pass connections on to `port`; for each number of seconds received, let none through and break those there are."""
    pairs = []

    def pump(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept(server):
        with contextlib.suppress(OSError):
            while True:
                near, _ = server.accept()
                far = socket.create_connection(("127.0.0.1", port))
                pairs.append((near, far))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    own_port = 0
    while True:
        listener = socket.create_server(("127.0.0.1", own_port))
        own_port = listener.getsockname()[1]
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        pipe.send(own_port)
        pause_s = pipe.recv()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for end in (end for pair in pairs for end in pair):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        pairs.clear()
        time.sleep(pause_s)


def test_a_short_hiccup_of_the_network_is_survived_by_reading_and_writing(s3_root, s3_endpoint, monkeypatch):
    with process(forward, urlsplit(s3_endpoint).port) as pipe:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{pipe.recv()}")
        table = WeightStore(s3_root).table("logps/toy/x")
        table.append(rows("a"), METADATA)
        uses = [lambda: table.append(rows("a", "b"), METADATA), table.pair_ids, lambda: list(table.batches())]
        for use in uses:
            pipe.send(1.5)
            use()
            assert pipe.poll(30)
            pipe.recv()
        assert sorted(table.pair_ids()) == ["a", "b"]
