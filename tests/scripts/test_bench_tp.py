"""What bench_tp.py measures, on a tiny model and one rank: other tests divide models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import bench_tp

TINY = [
    "--device",
    "cpu",
    "--shapes",
    "tiny",
    "--context",
    "8",
    "--prompts",
    "16",
    "--tokens",
    "4",
    "--rounds",
    "1",
]


def test_each_step_is_a_row_and_ranks_are_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda: True)
    args = bench_tp.parsed(TINY)
    bundles = {"tiny": bench_tp.made(tmp_path, "tiny", args.mix)}

    def spawned(work: object, given: tuple[object, ...], count: int) -> None:
        assert (work, count, given[0]) == (bench_tp.work, 2, 2)
        bench_tp.work(0, 1, *given[1:4], [files := given[4][0]])  # type: ignore[index, call-arg]
        given[4][1].write_bytes(files.read_bytes())  # type: ignore[index]

    monkeypatch.setattr(bench_tp.multiprocessing, "spawn", spawned)
    rows = bench_tp.measured(bundles, 2, args, tmp_path)
    assert [row["step"] for row in rows] == ["own", "transformers"]
    for row in rows:
        assert len(row["held_bytes"]) == 2
        assert min(row["decode_tokens_per_s"], *row["prompt_tokens_per_s"].values(), *row["held_bytes"]) > 0
        assert bench_tp.line(row).startswith("tiny ")
    assert "chosen" not in json.dumps(rows)


def test_a_later_run_adds_ranks_and_their_speed_beside_one(tmp_path: Path) -> None:
    args = bench_tp.parsed([*TINY, "--json", str(tmp_path / "tp.json")])
    report = bench_tp.begun(args)
    figures = {"shape": "tiny", "step": "own", "held_bytes": [1], "peak_bytes": [None], "load_seconds": 1.0}
    one = figures | {"ranks": 1, "decode_tokens_per_s": 100.0, "prompt_tokens_per_s": {"16": 1000.0}}
    bench_tp.add(report["rows"], one)
    args.json.write_text(json.dumps(report))
    later = bench_tp.begun(args)
    for decode in (1.0, 150.0):
        two = figures | {"ranks": 2, "decode_tokens_per_s": decode, "prompt_tokens_per_s": {"16": 1300.0}}
        bench_tp.add(later["rows"], two)
    assert later["rows"] == [one, two]
    assert two["times_one"] == {"decode": 1.5, "16": 1.3}
    assert "150.0 (1.50x)" in bench_tp.line(two)
    assert "16: 1,300 (1.30x)" in bench_tp.line(two)
    assert "x)" not in bench_tp.line(one)
    args.context = 9
    with pytest.raises(SystemExit, match="was measured with context 8, not 9: give another --json"):
        bench_tp.begun(args)


def test_numbers_below_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_tp.parsed(["--ranks", "0"])
    assert "expected 1 or more, found 0" in capsys.readouterr().err
