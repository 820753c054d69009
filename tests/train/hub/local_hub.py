"""A hub on loopback: what huggingface_hub asks of the real one to push and pull, and no more. Everything is in memory.

A commit is visible at once or not at all, as on the real hub. Files of some endings go through git-LFS, the others into the
commit itself. Every write, and every read of a private repository, needs the token.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_local_not_to_be_printed"
LFS_ENDINGS = (".parquet", ".png", ".safetensors")


@dataclass
class Repository:
    """Commits, oldest first, each with all its files."""

    is_private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    @property
    def head(self):
        return self.commits[-1][0] if self.commits else None

    @property
    def files(self):
        return self.commits[-1][1] if self.commits else {}

    def at(self, revision):
        """Return the commit that a revision names, None if there is none."""
        if revision in ("main", "HEAD"):
            return self.commits[-1] if self.commits else None
        return next((commit for commit in self.commits if commit[0].startswith(revision)), None)

    def commit(self, files):
        sha = hashlib.sha1(repr((self.head, sorted(files.items()))).encode()).hexdigest()
        self.commits.append((sha, dict(files)))
        return sha


class LocalHub:
    """The server; `url` is its endpoint."""

    token = TOKEN

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.num_uploads = 0  # of large files
        self.stalls_after: int | None = None  # so many uploads are taken, and the next ones wait for `go_on`
        self.is_stalled = threading.Event()
        self.go_on = threading.Event()
        self.refuses_yaml = ""
        self.loses_commit_answers = False  # commits are made, and then the connection is cut
        self.answers: dict[str, tuple[int, dict[str, str]]] = {}
        """What the first request gets whose method and path begin so: a status and headers; status 0 cuts the connection."""
        self.requests: list[str] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def repository(self, repo_id, kind="dataset"):
        return self.repositories[kind, repo_id]

    def add(self, repo_id, files, kind="dataset", is_private=True):
        """Add a repository that somebody else filled."""
        made = self.repositories[kind, repo_id] = Repository(is_private)
        made.commit({".gitattributes": b"*.parquet filter=lfs", **files})
        return made

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.go_on.set()
            self.server.shutdown()
            self.server.server_close()


def is_large(path):
    return path.endswith(LFS_ENDINGS)


def oid_of(path, content):
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"
    routes = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/(\w+)s/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("POST", r"/api/(\w+)s/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/([0-9a-f]{64})", "upload"),
        ("POST", r"/api/(\w+)s/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("GET", r"/api/(\w+)s/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", "tree"),
        ("POST", r"/api/(\w+)s/([^/]+/[^/]+)/paths-info/([^/]+)", "paths"),
        ("HEAD", r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("GET", r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def answer(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = f"{self.command} {url.path}"
        self.hub.requests.append(asked)
        if begin := next(filter(asked.startswith, self.hub.answers), None):
            status, headers = self.hub.answers.pop(begin)
            self.refuse(status, headers)
            return
        for method, pattern, name in self.routes:
            found = re.fullmatch(pattern, url.path)
            if method == self.command and found:
                getattr(self, name)(*(part and unquote(part) for part in found.groups()))
                return
        self.reply(404, {"error": f"the local hub knows no {self.command} {url.path}"})

    def refuse(self, status, headers):
        self.close_connection = True
        if status:
            self.reply(status, {"error": f"the hub says {status}"}, **headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *arguments):
        pass

    def reply(self, status, content=b"", **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
            if status >= 400:
                self.send_header("X-Error-Message", content["error"])
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def is_known(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def find(self, kind, repo_id, writes=False):
        """Return a repository that the caller may see, or answer that there is none."""
        found = self.hub.repositories.get((kind, repo_id))
        if found is None or ((writes or found.is_private) and not self.is_known):
            self.reply(404 if self.is_known else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return found

    def create(self):
        asked = json.loads(self.body)
        key = (asked.get("type", "model"), f"{asked['organization']}/{asked['name']}")
        url = f"{self.hub.url}/{'datasets/' * (key[0] == 'dataset')}{key[1]}"
        if not self.is_known:
            self.reply(401, {"error": "Invalid username or password."})
        elif key in self.hub.repositories:
            self.reply(409, {"error": "You already created this repo", "url": url})
        else:
            made = self.hub.repositories[key] = Repository(asked.get("visibility") == "private")
            made.commit({".gitattributes": b"*.parquet filter=lfs"})
            self.reply(200, {"url": url})

    def validate(self):
        if self.hub.refuses_yaml:
            self.reply(400, {"error": "Bad Request", "errors": [{"message": self.hub.refuses_yaml}], "warnings": []})
        else:
            self.reply(200, {"errors": [], "warnings": []})

    def info(self, kind, repo_id, revision):
        if (found := self.find(kind, repo_id)) is None:
            return
        commit = found.at(revision or "main")
        if commit is None:
            self.reply(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
            return
        siblings = [{"rfilename": name} for name in commit[1]]
        self.reply(200, {"id": repo_id, "sha": commit[0], "private": found.is_private, "siblings": siblings})

    def preupload(self, kind, repo_id, revision):
        if (found := self.find(kind, repo_id, writes=True)) is None:
            return
        files = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            oid = oid_of(path, found.files[path]) if path in found.files else None
            mode = "lfs" if is_large(path) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply(200, {"files": files})

    def batch(self, prefix, repo_id):
        if self.find("dataset" if prefix else "model", repo_id, writes=True) is None:
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}?signature=secret"}}
            objects.append(asked if asked["oid"] in self.hub.large_files else {**asked, "actions": upload})
        self.reply(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid):
        with self.hub.lock:
            is_late = self.hub.stalls_after is not None and self.hub.num_uploads >= self.hub.stalls_after
            self.hub.num_uploads += not is_late
        if is_late:
            self.hub.is_stalled.set()
            self.hub.go_on.wait(60)
            self.close_connection = True
            return
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.large_files[oid] = self.body
        self.reply(200)

    def commit(self, kind, repo_id, revision):
        if (found := self.find(kind, repo_id, writes=True)) is None:
            return
        files = dict(found.files)
        for line in self.body.splitlines():
            action = json.loads(line)
            key, value = action["key"], action["value"]
            if key == "header" and value.get("parentCommit", found.head) != found.head:
                self.reply(412, {"error": "A commit has happened since. Please refresh and try again."})
                return
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = found.commit(files)
        if self.hub.loses_commit_answers:
            self.refuse(0, {})
            return
        self.reply(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha})

    def tree(self, kind, repo_id, revision, folder):
        if (found := self.find(kind, repo_id)) is None:
            return
        commit = found.at(revision)
        if commit is None:
            self.reply(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
            return
        start = f"{folder}/" if folder else ""
        below = {name: content for name, content in commit[1].items() if name.startswith(start)}
        if folder and not below:
            self.reply(404, {"error": f"{folder} does not exist"}, X_Error_Code="EntryNotFound")
            return
        is_recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries = [_entry(n, c) for n, c in below.items() if is_recursive or "/" not in n.removeprefix(start)]
        folders = {start + n.removeprefix(start).partition("/")[0] for n in below if "/" in n.removeprefix(start)}
        self.reply(200, [*map(_folder, sorted(folders)), *entries])

    def paths(self, kind, repo_id, revision):
        if (found := self.find(kind, repo_id)) is None:
            return
        is_json = self.headers.get("Content-Type", "").startswith("application/json")
        paths = json.loads(self.body)["paths"] if is_json else parse_qs(self.body.decode())["paths"]
        files = found.at(revision)[1]
        entries = [_entry(path, files[path]) for path in paths if path in files]
        entries += [_folder(path) for path in paths if any(name.startswith(f"{path}/") for name in files)]
        self.reply(200, entries)

    def resolve(self, prefix, repo_id, revision, path):
        if (found := self.find("dataset" if prefix else "model", repo_id)) is None:
            return
        commit = found.at(revision)
        if commit is None or path not in commit[1]:
            code = "RevisionNotFound" if commit is None else "EntryNotFound"
            self.reply(404, {"error": f"{path} does not exist"}, X_Error_Code=code)
            return
        content, status, headers = commit[1][path], 200, {}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        etag = f'"{oid_of(path, commit[1][path])}"'
        self.reply(
            status, content, ETag=etag, X_Repo_Commit=commit[0], Accept_Ranges="bytes", X_Linked_Etag=etag, **headers
        )


def _entry(path, content):
    entry = {"type": "file", "path": path, "size": len(content), "oid": oid_of(path, content)[:40]}
    if is_large(path):
        entry["lfs"] = {"oid": oid_of(path, content), "size": len(content), "pointerSize": 130}
    return entry


def _folder(path):
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}
