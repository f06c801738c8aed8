"""The script `ci_export`: it calls the command where it was called."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_script_calls_the_command_where_it_was_called(tmp_path: Path) -> None:
    """With an environment that is there already."""
    scripts = tmp_path / "a clone" / "scripts"
    scripts.mkdir(parents=True)
    shutil.copy2(ROOT / "scripts" / "ci_export", scripts)
    (scripts / "environment").write_text('prepare() { PATH="$PWD/.venv/bin:$PATH"; echo "extras: $1"; }\n')
    program = scripts.parent / ".venv" / "bin" / "q6k-convert"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        [scripts / "ci_export", "my model", "out", "--quiet"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [str(tmp_path), "ci", "my model", "out", "--quiet"]
    assert done.stderr == "extras: inference,hub\n"
