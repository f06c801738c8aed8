"""What bench_texts.py measures, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import bench_texts


def test_texts_are_measured_beside_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = "--device cpu --shape tiny --context 8 --tokens 2 --rounds 1 --texts 1 3"
    args = bench_texts.parsed([*given.split(), "--json", str(tmp_path / "texts.json")])
    bench_texts.run(args, tmp_path)
    rows = json.loads((tmp_path / "texts.json").read_text())["rows"]
    assert [row["texts"] for row in rows] == [0, 1, 3]
    assert rows[0]["times"] == 1
    for row in rows[1:]:
        assert row["tokens_per_s"] * row["ms"] == pytest.approx(1000 * row["texts"])
        assert row["first_other_token"] is None  # all tokens are those of the texts alone
        assert row["target"] is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == bench_texts.HEADING
    assert lines[4].startswith("       3 texts")
    row = {"texts": 8, "ms": 2.0, "tokens_per_s": 4000.0, "times": 6.0, "target": 5.5, "first_other_token": 3}
    assert bench_texts.line(row).split() == ["8", "texts", "4000.0", "2.000", "6.00", "5.5", "yes", "3"]
    assert " NO" in bench_texts.line(row | {"times": 5.4})


def test_more_texts_than_there_can_be_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_texts.parsed(["--texts", "33"])
    assert "at most 32 texts" in capsys.readouterr().err
