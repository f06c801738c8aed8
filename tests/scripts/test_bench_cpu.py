"""The benchmark of decoding on a CPU: what its processes answer, and what it makes of that."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import bench_cpu
from model_cases import LLAMA


def test_all_contenders_give_the_same_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, _ = LLAMA.bundle(tmp_path)
    found = {}
    for who in bench_cpu.CONTENDERS:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
        bench_cpu.work(who, bundle, tmp_path / "model.gguf", [5, 6, 7], 4, 1)
        ready, *rows = capsys.readouterr().out.splitlines()
        assert ready == ""
        found[who] = [json.loads(row) for row in rows]
    assert [len(rows) for rows in found.values()] == [2, 2, 2]
    assert all(row["same_answer"] for row in bench_cpu.summary(found))


def test_ratios_are_taken_round_by_round() -> None:
    def rounds(*rates: float) -> list[bench_cpu.Row]:
        return [{"tokens_per_second": each, "tokens_per_cpu_second": 2 * each, "answer": [1]} for each in rates]

    found = {"transformers": rounds(1.0, 10.0, 2.0), "bytes": rounds(3.0, 20.0, 8.0), "packed": rounds(0.5)}
    first, second, third = bench_cpu.summary(found)
    assert (first["tokens_per_second"], first["ratio_of_tokens_per_second"]) == (2, 1)
    assert (second["tokens_per_second"], second["ratio_of_tokens_per_second"]) == (8, 3)
    assert (third["rounds"], third["ratio_of_tokens_per_cpu_second"]) == (1, 0.5)
    row = bench_cpu.line({"model": "m", "beside": "nothing", **second})
    assert row.split() == ["m", "nothing", "bytes", "8.00", "16.00", "3.00", "3.00", "1.00"]


def test_impossible_options_are_refused() -> None:
    for arguments in ([], ["m.gguf", "--threads", "0"], ["m.gguf", "--tokens", "1"], ["m.gguf", "--rounds", "0"]):
        with pytest.raises(SystemExit):
            bench_cpu.parsed(arguments)
