"""Tables too long or too large for rich: plain lines in columns, in time that grows with the text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bundle_helpers import invoke
from gguf_builder import F32, Builder, key_value, weight
from q6k_convert.cli import streams, tables


def shown(table: tables.Table, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    table.show(streams.console(stderr=False))
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_long_table_says_what_a_short_one_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tables.Table("name!", "what", "size>")
    for cells in (("a", "多 bytes", "1"), ("b\x1b[2J", "", "1,000"), ("c" * 300, "[red]x", "22")):
        table.add(*cells)
    short = shown(table, capsys)
    assert short == [
        ["name", "what", "size"],
        ["a", "多", "bytes", "1"],
        ["b\\x1b[2J", "1,000"],
        ["c" * 300, "[red]x", "22"],
    ]
    for limit in ("_LONGEST_TABLE", "_LARGEST_TABLE"):
        with monkeypatch.context() as patched:
            patched.setattr(tables, limit, 2)
            assert shown(table, capsys) == short
            table.show(streams.console(stderr=False))
            lines = capsys.readouterr().out.splitlines()
    # Columns are aligned up to a width that one long name does not set for all.
    assert lines[1] == f"{'a':<100}  多 bytes      1"
    assert lines[2] == f"{'b' + chr(92) + 'x1b[2J':<100}  {'':8}  1,000"


def test_a_listing_of_very_many_keys_and_tensors_takes_seconds(tmp_path: Path) -> None:
    pairs = [key_value("general.architecture", "llama")] + [key_value(f"k.{i}", "v" * 180) for i in range(9_999)]
    path = Builder([weight(f"blk.{i}.weight", (8,), F32) for i in range(5_000)], pairs).write(tmp_path / "m.gguf")
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "q6k_convert", "inspect", path], check=True, capture_output=True, text=True
    )
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 8
    lines = done.stdout.splitlines()
    assert lines[10_001].split() == ["k.9998", "v" * 180]
    assert lines[-2].split() == ["blk.4999.weight", "F32", "8", "32", "B"]
    assert invoke("inspect", path, "--json").exit_code == 0
