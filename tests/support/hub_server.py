"""Serve a Hub on loopback: listings, files with ranges and redirections, and failures of all of them.

Written from the documentation and the clients of the Hub's API. It speaks plain HTTP; Xet is disabled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

SMALL = 1000
"""Largest file in bytes that is kept in git itself, with git's hash; larger ones have a SHA-256."""


@dataclass
class Asked:
    """A request that the server received."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class FakeRepository:
    """A repository: its files by revision, and who may see it."""

    revisions: dict[str, dict[str, bytes]]
    commits: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    token: str | None = None  # needed to see it at all

    def __post_init__(self) -> None:
        for revision, files in self.revisions.items():
            content = revision.encode() + b"".join(name.encode() + files[name] for name in sorted(files))
            self.commits.setdefault(revision, hashlib.sha1(content).hexdigest())

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit and the files of a branch, tag or commit."""
        for name, commit in self.commits.items():
            if revision in (name, commit):
                return commit, self.revisions[name]
        return None


class FakeHub:
    """State of the server: repositories, requests, and the next failures.

    Attributes:
        failures: failures of the next requests of files' content: ("status", number); ("cut", bytes), which closes
            the connection after so many bytes; or ("stall", bytes), which falls silent after them.
        stalled: set once a connection has fallen silent.
        listing_failures, head_failures: statuses for the next requests of listings, and of files' headers.
        tamper: changes a listing before it is sent.
        corrupt: changes content before it is sent, but not its headers.
        commit: commit that files' headers name instead of their own.
        storage: address of another server that content is redirected to.
        ranges: whether ranges of files are served.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, FakeRepository] = {}
        self.asked: list[Asked] = []
        self.failures: list[tuple[str, int]] = []
        self.listing_failures: list[int] = []
        self.head_failures: list[int] = []
        self.tamper: Callable[[dict[str, Any]], Any] = lambda listing: listing
        self.corrupt: Callable[[bytes], bytes] = lambda content: content
        self.storage: str | None = None
        self.commit: str | None = None
        self.ranges = True
        self.stalled = threading.Event()
        self.ended = threading.Event()
        self.endpoint = ""

    def add(self, name: str, files: dict[str, bytes], revision: str = "main", **more: Any) -> FakeRepository:
        """Add a revision to a repository, and the repository if it is new."""
        known = self.repositories.get(name)
        revisions = (known.revisions if known else {}) | {revision: files}
        self.repositories[name] = FakeRepository(revisions, **more)
        return self.repositories[name]

    def contents(self) -> list[Asked]:
        """Return the requests of files' content."""
        return [asked for asked in self.asked if asked.method == "GET" and "/resolve/" in asked.path]


def digest(content: bytes) -> str:
    """Return a file's hash as the Hub lists it, which is also its ETag."""
    if len(content) > SMALL:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def listing(name: str, commit: str, files: dict[str, bytes]) -> dict[str, Any]:
    """Return the answer to `/api/models/NAME/revision/REVISION?blobs=true`."""
    siblings = []
    for path, content in files.items():
        entry: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": digest(content)}
        if len(content) > SMALL:
            lfs = {"sha256": digest(content), "size": len(content), "pointerSize": 135}
            entry |= {"blobId": "0" * 40, "lfs": lfs}
        siblings.append(entry)
    return {"id": name, "sha": commit, "gated": False, "private": False, "siblings": siblings}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def _handle(self) -> None:
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.hub.asked.append(Asked(self.command, self.path, headers))
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            if self.hub.listing_failures:
                self._refuse(self.hub.listing_failures.pop(0))
            elif found := self._visible(match[1], match[2]):
                body = self.hub.tamper(listing(match[1], *found))
                self._send(200, body if isinstance(body, bytes) else json.dumps(body).encode())
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            if found := self._visible(match[1], match[2]):
                files = [
                    {"type": "file", "path": path, "size": len(c), "oid": digest(c)} for path, c in found[1].items()
                ]
                self._send(200, json.dumps(files).encode())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if found := self._visible(match[1], match[2], content=True):
                self._file(*found, match[3], headers)
        else:
            self._refuse(404)

    def _visible(self, name: str, revision: str, *, content: bool = False) -> tuple[str, dict[str, bytes]] | None:
        repository = self.hub.repositories.get(name)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository is None or (repository.token and not repository.gated and given != repository.token):
            self._refuse(401, "RepoNotFound")
        elif content and repository.gated and given != repository.token:
            self._refuse(403 if given else 401, "GatedRepo", "Access to model is restricted. " + given)
        elif (found := repository.files(revision)) is None:
            self._refuse(404, "RevisionNotFound")
        else:
            return found
        return None

    def _file(self, commit: str, files: dict[str, bytes], name: str, headers: dict[str, str]) -> None:
        if name not in files:
            self._refuse(404, "EntryNotFound")
            return
        content = files[name]
        etag, commit = f'"{digest(content)}"', self.hub.commit or commit
        if self.command == "HEAD" and self.hub.head_failures:
            self._refuse(self.hub.head_failures.pop(0))
            return
        if self.hub.storage is not None:
            linked = {"X-Linked-ETag": etag, "X-Linked-Size": str(len(content)), "X-Repo-Commit": commit}
            self._send(302, b"", linked | {"Location": self.hub.storage + self.path + "?signature=very-secret"})
            return
        more = {"ETag": etag, "Accept-Ranges": "bytes", "X-Repo-Commit": commit}
        if self.command == "HEAD":
            self._send(200, content, more)
            return
        content = self.hub.corrupt(content)
        kind, number = self.hub.failures.pop(0) if self.hub.failures else ("", 0)
        if kind == "status":
            self._refuse(number)
            return
        start = int(headers["range"].removeprefix("bytes=").removesuffix("-")) if "range" in headers else 0
        status = 200
        if start and self.hub.ranges:
            status = 206
            more["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content = content[start:]
        self._send(status, content, more, cut=number if kind else None, stall=kind == "stall")

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Code": code} if code else {}
        self._send(status, json.dumps({"error": message or f"no {self.path}"}).encode(), headers)

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
        stall: bool = False,
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
        if stall:
            self.hub.stalled.set()
            self.hub.ended.wait(30)
        if cut is not None:
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass  # a client that closes a connection early is no error


@contextmanager
def serving() -> Iterator[FakeHub]:
    """Yield a hub that answers at its `endpoint` until the block ends."""
    hub = FakeHub()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Yield a hub for commands inside this process, with an empty cache and no token, run in `tmp_path`."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # huggingface_hub waits before it tries again
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "home" / "assets"))
        for name, value in {
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield hub


def environment(tmp_path: Path, hub: FakeHub, **more: str) -> dict[str, str]:
    """Return the environment of a process that asks the hub, with a cache in `tmp_path`."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    own |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    return own | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | more
