"""A hub on this machine, for the real clients: repositories of models and data sets over HTTP.

It answers what `huggingface_hub` asks, as the hub does: the commit of a repository, the list of its
files, HEAD and GET of a file, a redirect to another host for a weight file, and an error with the
headers that tell its kind. It has no Xet storage, so that files come over HTTP.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKEN = "hf_right"  # the token of an account that has accepted the terms of every gated repository
NO_ACCESS = "hf_other"  # the token of an account that has accepted none


@dataclass
class Repository:
    """The files of a model or a data set at its only commit."""

    files: dict[str, bytes]
    gated: bool = False

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    def info(self, name: str) -> dict[str, Any]:
        siblings = [{"rfilename": file} for file in sorted(self.files)]
        return {"id": name, "sha": self.commit, "siblings": siblings, "private": False, "tags": []}

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """The files in a folder, and with `recursive` also those further down; and its folders."""
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for path, content in sorted(self.files.items()):
            inside = path.removeprefix(prefix)
            if not path.startswith(prefix):
                continue
            if "/" in inside:
                name = prefix + inside.split("/")[0]
                entries[name] = {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
            if "/" not in inside or recursive:
                entries[path] = _entry(path, content)
        return list(entries.values())


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _etag(content)}
    if path.endswith(".safetensors"):
        oid = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 135}
    return entry


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@dataclass
class Hub:
    """What the server holds, what it was asked, and what it is to do wrong."""

    endpoint: str
    files_host: str  # another name of this machine: no token may go there
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)  # "GET /path"
    to_files_host: list[str | None] = field(default_factory=list)  # the tokens sent there
    broken_after: int | None = None  # no connection brings more of a file than these first bytes

    def add(self, name: str, files: dict[str, bytes], gated: bool = False) -> Repository:
        """Add `owner/name`, or `datasets/owner/name`."""
        self.repositories[name] = Repository(files, gated)
        return self.repositories[name]

    def asked(self, method: str = "") -> list[str]:
        """The requests so far, of one method; they are forgotten."""
        requests = [request for request in self.requests if request.startswith(method)]
        self.requests.clear()
        return requests


class _Refusal(Exception):
    """An answer that is an error: status, the hub's code for it, and its message."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        try:
            self.answer()
        except _Refusal as refusal:
            status, code, message = refusal.args
            self.reply(status, message.encode(), {"X-Error-Code": code, "X-Error-Message": message})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """paths-info: which of the named paths there are."""
        self.hub.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        given = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        try:
            repository, _ = self.repository(urlsplit(self.path).path.removeprefix("/api/"))
        except _Refusal as refusal:
            self.reply(refusal.args[0], b"", {"X-Error-Code": refusal.args[1]})
            return
        self.json([entry for entry in repository.tree("", True) if entry["path"] in given])

    def answer(self) -> None:
        url = urlsplit(self.path)
        path = url.path.removeprefix("/api/")
        if url.path.startswith("/files/"):
            self.hub.to_files_host.append(self.headers["Authorization"])
            self.file(self.repositories_file(url.path.removeprefix("/files/")))
        elif path == url.path:
            repository, steps = self.repository(path.removeprefix("/"))
            self.resolve(repository, "/".join(steps[2:]))  # resolve/<revision>/<file>
        else:
            repository, steps = self.repository(path.removeprefix("models/"))
            if steps[:1] == ["tree"]:
                recursive = "recursive=true" in url.query.lower()
                self.json(repository.tree("/".join(steps[2:]), recursive))
            else:
                self.json(repository.info("/".join(path.split("/")[1:3])))

    def repository(self, path: str) -> tuple[Repository, list[str]]:
        """The repository that a path begins with, and the rest of the path."""
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if token not in ("", TOKEN, NO_ACCESS):
            raise _Refusal(401, "", "Invalid credentials in Authorization header")
        path = path.removeprefix("models/")
        parts = 3 if path.startswith("datasets/") else 2
        name, steps = "/".join(path.split("/")[:parts]), path.split("/")[parts:]
        found = self.hub.repositories.get(name)
        if found is None:
            raise _Refusal(404 if token else 401, "RepoNotFound", "Repository not found")
        if found.gated and token != TOKEN and "resolve" in steps:
            message = f"Access to {name} is restricted."
            raise _Refusal(403 if token else 401, "GatedRepo", message)
        return found, steps

    def repositories_file(self, digest: str) -> bytes:
        contents = (c for r in self.hub.repositories.values() for c in r.files.values())
        return next(c for c in contents if hashlib.sha256(c).hexdigest() == digest)

    def resolve(self, repository: Repository, file: str) -> None:
        commit = {"X-Repo-Commit": repository.commit}
        content = repository.files.get(file)
        if content is None:
            headers = commit | {"X-Error-Code": "EntryNotFound"}
            self.reply(404, b"Entry not found", headers | {"X-Error-Message": "Entry not found"})
        elif file.endswith(".safetensors"):
            digest = hashlib.sha256(content).hexdigest()
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            location = {"Location": f"{self.hub.files_host}/files/{digest}"}
            self.reply(302, b"", commit | linked | location)
        else:
            self.file(content, commit | {"ETag": f'"{_etag(content)}"'})

    def file(self, content: bytes, headers: dict[str, str] | None = None) -> None:
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"Accept-Ranges": "bytes", **(headers or {})}
        if "Range" in self.headers:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self.reply(206 if "Range" in self.headers else 200, content[first:], headers, first)

    def json(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, body: bytes, headers: dict[str, str], first: int = 0) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")  # a hub that is gone answers on no connection
        self.end_headers()
        if self.command == "HEAD":
            return
        sizes = [size for size in (self.hub.broken_after, first + len(body)) if size is not None]
        self.wfile.write(body[: max(0, min(sizes) - first)])

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve() -> Iterator[Hub]:
    """A running hub; it is gone at the end."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    port = server.server_port
    handler.hub = Hub(f"http://127.0.0.1:{port}", f"http://localhost:{port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield handler.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
