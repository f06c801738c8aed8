"""What a hostile Hub can cost: bodies of redirections, compressed and endless answers, time, pipes in the cache."""

from __future__ import annotations

import gzip
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bundle_helpers import failed, invoke
from gguf_builder import small_model
from hub_server import FakeHub, _Handler, fresh
from q6k_convert.hub import answers

MODEL = small_model().build()
Patch = pytest.MonkeyPatch


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: Patch) -> Iterator[FakeHub]:
    with fresh(tmp_path, monkeypatch) as served:
        served.add("org/tiny", {"tiny-Q6_K.gguf": MODEL})
        yield served


def test_bodies_of_redirections_are_not_read(hub: FakeHub, monkeypatch: Patch) -> None:
    real, bomb = _Handler._send, gzip.compress(bytes(1 << 20))
    redirected = []

    def send(self: Any, status: int, body: bytes, headers: Any = None, **more: Any) -> None:
        if "/api/" in self.path and "again" not in self.path:
            redirected.append(self.path)
            # One byte less than announced comes: who reads the body waits for it.
            status, body = 307, bomb
            headers = {
                "Location": self.path + "&again",
                "Content-Encoding": "gzip",
                "Content-Length": str(len(bomb) + 1),
            }
        real(self, status, body, headers, **more)

    monkeypatch.setattr(_Handler, "_send", send)
    monkeypatch.setattr(answers, "ANSWER_SECONDS", 5.0)
    assert invoke("inspect", "org/tiny:Q6_K").exit_code == 0
    assert len(redirected) == 1


def test_a_compressed_answer_is_refused(hub: FakeHub, monkeypatch: Patch) -> None:
    real = _Handler._send

    def send(self: Any, status: int, body: bytes, headers: Any = None, **more: Any) -> None:
        real(self, status, gzip.compress(body), {**(headers or {}), "Content-Encoding": "gzip"}, **more)

    monkeypatch.setattr(_Handler, "_send", send)
    failed(invoke("org/tiny:Q6_K", "out"), 3, "malformed: it is compressed, which was not asked for", "HF_ENDPOINT")
    assert {asked.headers["accept-encoding"] for asked in hub.asked} == {"identity"}


def test_a_listing_without_end_is_refused(hub: FakeHub, monkeypatch: Patch) -> None:
    monkeypatch.setattr(answers, "MAX_LISTING", 1000)
    hub.tamper = lambda listing: b" " * 100_000
    failed(invoke("org/tiny:Q6_K", "out"), 3, "malformed: a listing of more than 1000 bytes", "HF_ENDPOINT")


def test_an_answer_that_does_not_end_is_given_up(hub: FakeHub, monkeypatch: Patch) -> None:
    monkeypatch.setattr(answers, "ANSWER_SECONDS", 0.3)
    real = _Handler._send

    def send(self: Any, *args: Any, **more: Any) -> None:
        hub.ended.wait(5)
        real(self, *args, **more)

    monkeypatch.setattr(_Handler, "_send", send)
    began = time.monotonic()
    failed(invoke("org/tiny:Q6_K", "out"), 4, "has not answered in 0.3 s", "again later")
    assert time.monotonic() - began < 3
    hub.ended.set()


def test_a_file_that_comes_too_slowly_is_given_up(hub: FakeHub, monkeypatch: Patch) -> None:
    monkeypatch.setattr(answers, "START_SECONDS", -1e9)
    failed(invoke("org/tiny:Q6_K", "out"), 4, "tiny-Q6_K.gguf: it comes more slowly than 10 kB", "again later")


@pytest.mark.parametrize("where", ["blob", "note", "ref"])
def test_a_pipe_in_the_cache_does_not_hang(where: str, hub: FakeHub, tmp_path: Path) -> None:
    assert invoke("inspect", "org/tiny:Q6_K").exit_code == 0
    (blob,) = (tmp_path / "home" / "hub" / "models--org--tiny" / "blobs").iterdir()
    (note,) = (tmp_path / "home" / "assets" / "q6k-convert" / "checked").iterdir()
    ref = blob.parent.parent / "refs" / "main"
    place = {"blob": blob, "note": note, "ref": ref}[where]
    place.unlink()
    os.mkfifo(place)
    result = invoke("inspect", "org/tiny:Q6_K")
    if where == "blob":
        failed(result, 4, "expected a regular file", f"remove {blob} and run again")
    else:
        assert result.exit_code == 0
