"""Output streams as people have them: of other encodings than UTF-8, closed, or both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

from gguf_builder import F32, Builder, key_value, weight
from q6k_convert.cli.terminal import Terminal

NAME = "Größe 大 🦙"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = [weight("token_embd.weight", (4, 256)), weight("output_norm.weight", (256,), F32)]
    keys = [key_value("general.architecture", "llama"), key_value("general.name", NAME)]
    return Builder(tensors, keys).write(tmp_path / "model.gguf")


def run(*args: str | Path, **more: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "q6k_convert", *map(str, args)]
    return subprocess.run(command, capture_output=True, check=False, **more)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", b"Gr??e ? ?"),
        ("latin-1", b"Gr\xf6\xdfe ? ?"),
        ("cp1252", b"Gr\xf6\xdfe ? ?"),
        ("utf-8", NAME.encode()),
    ],
)
def test_what_an_encoding_lacks_is_replaced(source: Path, encoding: str, shown: bytes) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    table = run("inspect", source, env=environment)
    assert table.returncode == 0, table.stderr
    assert shown in table.stdout
    document = run("inspect", source, "--json", env=environment)
    assert document.returncode == 0, document.stderr
    assert json.loads(document.stdout.decode(encoding))["keys"]["general.name"] == NAME


def test_a_streamed_answer_is_replaced_too(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(raw, encoding="cp1252"))
    Terminal().stream(f"answer: {NAME}\n")
    assert raw.getvalue() == "answer: Größe ? ?\n".encode("cp1252")


@pytest.mark.parametrize("closed", ["1", "1 2"])
def test_a_closed_stdout_is_a_failed_write(source: Path, closed: str) -> None:
    close = " ".join(f"{number}>&-" for number in closed.split())
    done = subprocess.run(
        ["/bin/sh", "-c", f'"$0" -m q6k_convert inspect "$1" {close}', sys.executable, source],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 4
    assert (b"stdout is closed" in done.stderr) == ("2" not in closed)


def test_a_closed_stderr_takes_no_messages(source: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", '"$0" -m q6k_convert "$1" "$2" 2>&-', sys.executable, source, tmp_path / "out"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0
    assert (tmp_path / "out" / "bundle.json").exists()
