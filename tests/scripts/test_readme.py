"""The README's snippets run as printed, one after the other, in one directory."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from typer.testing import CliRunner

from hub_server import FakeHub, fresh
from inside import without_coverage
from q6k_convert.cli import main
from tiny_chat import tiny_chat

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ELSEWHERE = {
    "q6k-convert export",
    "q6k-convert bench",
    "./scripts/quickstart",
    "pip install",
    ". .venv/bin/activate",
}
"""Beginnings of lines that others run: tests/export, which compiles for minutes, tests/cli, and the gate."""


def commands() -> list[str]:
    """Lines of the indented blocks, without comments."""
    lines = [line.strip().partition("  #")[0].strip() for line in re.findall(r"^    \S.*", README, re.MULTILINE)]
    return [line for line in lines if line and not any(line.startswith(other) for other in ELSEWHERE)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny whole model with a vocabulary and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    tiny_chat(folder)
    return folder / "model.gguf"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fresh(tmp_path, monkeypatch) as served:
        yield served


def run(line: str) -> str:
    """Run a line of a shell: one command of ours, possibly behind `echo TEXT |`."""
    said, _, command = line.rpartition("|")
    first, *args = shlex.split(command)
    assert first == "q6k-convert", line
    typed = " ".join(shlex.split(said)[1:]) + "\n" if said else None
    done = CliRunner().invoke(main.app, args, input=typed)
    assert done.exit_code == 0, f"{line}\n{done.output}"
    return done.stdout


def test_every_snippet_runs_as_printed(model: Path, hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(model.read_bytes())
    hub.add("ORG/REPO", {"tiny-Q4_K_M.gguf": model.read_bytes()})
    lines = commands()
    for command in ("convert", "inspect", "verify", "generate"):
        assert any(command in line for line in lines), command
    for line in lines:
        run(line)
    assert (tmp_path / "report.html").stat().st_size > 1000
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippets
    for number, snippet in enumerate(snippets):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(snippet, f"README snippet {number}", "exec"), {})
        assert said.getvalue().strip()


def test_quickstart_ends_with_text_and_commands_that_run(model: Path, tmp_path: Path) -> None:
    """With an environment that is there already."""
    home = tmp_path / "a clone"
    (home / "scripts").mkdir(parents=True)
    shutil.copy2(ROOT / "scripts" / "quickstart", home / "scripts")
    (home / "scripts" / "environment").write_text('prepare() { PATH="$PWD/.venv/bin:$PATH"; echo "extras: $1"; }\n')
    program = home / ".venv" / "bin" / "q6k-convert"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m q6k_convert "$@"\n')
    program.chmod(0o755)
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = without_coverage() | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def shell(line: str) -> str:
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    (tmp_path / "my model.gguf").write_bytes(model.read_bytes())
    said, _, following = shell("'a clone/scripts/quickstart' 'my model.gguf' 'my out'").partition("\nnext:\n")
    assert said.startswith("extras: inference\n")
    assert said.partition("\nverified\n")[2].strip()  # the model's words
    commands = following.splitlines()
    assert [shlex.split(command)[:2] for command in commands] == [
        [str(program), name] for name in ("generate", "inspect", "verify")
    ]
    for command in commands:  # here, as processes import torch again
        words = shell(f"printf '%s\\n' {command}").splitlines()
        done = CliRunner().invoke(main.app, words[1:])
        assert done.exit_code == 0, f"{command}\n{done.output}"
        assert done.stdout
    assert (tmp_path / "my out.html").is_file()
