"""`q6k-convert bench` and `q6k-convert perplexity`: their figures, by definition, and how they fail."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import torch
from typer.testing import CliRunner

from bundle_helpers import failed, invoke
from q6k_convert.cli.main import app
from q6k_convert.run import speed
from q6k_convert.run.bench_command import table
from q6k_kernels.bundle import manifest
from q6k_kernels.generate.generator import Generator
from q6k_kernels.models.architecture import attach
from q6k_kernels.models.registry import ARCHITECTURES
from tiny_bundle import TinyBundle, ids_of, tiny_bundle

WORDS = "The lazy fox runs. It's 12345 o'clock, and the brown dog sleeps over the quick dog.\n" * 2


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyBundle:
    (tmp_path / "text.txt").write_text(WORDS)
    return tiny_bundle(tmp_path, monkeypatch)


def test_a_benchmark_runs_what_its_tests_are_named_after(tiny: TinyBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = list[Any]()
    prefill, generate = Generator.prefill, Generator.generate

    def noting(self: Generator, ids: list[int]) -> Any:
        ran.append(("read", self.length, len(ids)))
        return prefill(self, ids)

    def generating(self: Generator, tokens: int, *more: Any) -> Any:
        ran.append(("decode", self.length, tokens - 1))
        return generate(self, tokens, *more)

    clock = iter(range(10**6))  # a second passes between any two looks at the clock
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(Generator, "prefill", noting)
    monkeypatch.setattr(Generator, "generate", generating)
    lengths = ("-p", "24", "-p", "0", "-n", "6", "-d", "0", "-d", "9", "-r", "2")
    done = invoke("bench", tiny.path, *lengths, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    rows = document["tests"]
    assert [(row["test"], row["n_prompt"], row["n_gen"], row["n_depth"]) for row in rows] == [
        ("pp24", 24, 0, 0),
        ("tg6", 0, 6, 0),
        ("pp24 @ d9", 24, 0, 9),
        ("tg6 @ d9", 0, 6, 9),
    ]
    assert ran == [
        *[("read", 0, 24)] * 3,
        *[("read", 0, 1), ("decode", 1, 6)] * 3,
        *[("read", 0, 9), ("read", 9, 24)] * 3,
        *[("read", 0, 9), ("decode", 9, 6)] * 3,
    ]
    for row in rows:
        assert row["samples_ts"] == pytest.approx([row["n_prompt"] or row["n_gen"]] * 2)
        assert row["stddev_ts"] == pytest.approx(0)
    weights = manifest.read(tiny.path).tensors
    assert document["parameters"] == sum(math.prod(each.shape) for each in weights)
    assert (document["backend"], document["repetitions"], document["fused"]) == ("CPU", 2, False)


def test_a_table_is_laid_out_as_llama_bench_does() -> None:
    rows = [
        {"test": "pp512", "avg_ts": 11234.567, "stddev_ts": 12.3},
        {"test": "tg128 @ d4096", "avg_ts": 9.5, "stddev_ts": 0},
    ]
    document = {"model": "llama 8B Q4_K_M", "size_bytes": 5 << 30, "parameters": 8_030_000_000, "backend": "CUDA"}
    assert table(document | {"tests": rows}).splitlines() == [
        "| model           |     size | params | backend |          test |              t/s |",
        "| --------------- | -------: | -----: | ------- | ------------: | ---------------: |",
        "| llama 8B Q4_K_M | 5.00 GiB | 8.03 B | CUDA    |         pp512 | 11234.57 ± 12.30 |",
        "| llama 8B Q4_K_M | 5.00 GiB | 8.03 B | CUDA    | tg128 @ d4096 |      9.50 ± 0.00 |",
    ]


def test_the_deviation_is_that_of_the_repetitions(tiny: TinyBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    given = speed.Times([20.0, 25.0, 40.0])
    monkeypatch.setattr(speed, "times_of", lambda *_: given)
    tiny.write(general__size_label="1M", general__file_type=15)
    done = invoke("bench", tiny.path, "-p", "8", "-n", "0", "--device", "cpu")
    rates = [8e3 / ms for ms in given.ms]
    assert done.exit_code == 0, done.output
    last = done.stdout.splitlines()[-1]
    assert last.startswith("| llama 1M Q4_K_M | ")
    assert last.endswith(f"| CPU     |  pp8 | {statistics.fmean(rates):.2f} ± {statistics.stdev(rates):.2f} |")


def test_what_cannot_be_measured_is_usage(tiny: TinyBundle) -> None:
    nothing = invoke("bench", tiny.path, "-p", "0", "-n", "0", "--device", "cpu")
    failed(nothing, 2, "there is nothing to measure", "-p N")
    long = invoke("bench", tiny.path, "-p", "200", "-d", "101", "--device", "cpu")
    failed(long, 2, "a test needs 301 positions, and the model knows 300", "shorter")
    failed(invoke("perplexity", tiny.path, "--device", "cpu"), 2, "there is no text", "--file TEXT")
    text = tiny.path.with_name("text.txt")
    failed(
        invoke("perplexity", tiny.path, "--file", text, "--window", "301", "--device", "cpu"),
        2,
        "300 positions",
        "",
    )
    assert invoke("bench", text.parent / "none", "--device", "cpu").exit_code == 4


def test_a_perplexity_is_that_of_its_definition(tiny: TinyBundle) -> None:
    text = tiny.path.with_name("text.txt")
    done = invoke("perplexity", tiny.path, "--file", text, "--window", "20", "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    ids, logs = ids_of(WORDS)[1:], list[float]()
    with torch.no_grad():
        for at in range(0, len(ids), 19):
            window = [1, *ids[at : at + 19]]
            probabilities = tiny.model.float()(torch.tensor([window])).logits[0].double().softmax(dim=-1)
            logs += [math.log(float(probabilities[i, token])) for i, token in enumerate(window[1:])]
    value = math.exp(-statistics.fmean(logs))
    assert document["perplexity"] == pytest.approx(value, rel=1e-4)
    error = value * statistics.stdev(logs) / math.sqrt(len(logs))
    assert document["perplexity_error"] == pytest.approx(error, rel=1e-3)
    assert (document["tokens"], document["windows"]) == (len(ids), math.ceil(len(ids) / 19))
    first = invoke("perplexity", tiny.path, "-f", text, "--window", "20", "--windows", "1", "--device", "cpu")
    assert first.stdout.startswith("perplexity ")
    assert first.stdout.endswith(" of 19 tokens in 1 window\n")
    piped = ["perplexity", str(tiny.path), "-f", "-", "--window", "20", "--windows", "1", "--device", "cpu"]
    assert CliRunner().invoke(app, piped, input=text.read_bytes()).stdout == first.stdout


def test_a_text_that_is_none_is_refused(tiny: TinyBundle, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "bytes").write_bytes(b"caf\xe9")

    def run(name: str) -> Any:
        return invoke("perplexity", tiny.path, "--file", tmp_path / name, "--device", "cpu")

    failed(run("empty"), 3, "expected two tokens or more", "longer")
    failed(run("bytes"), 3, "is not UTF-8", "plain text")
    assert run("none").exit_code == 4


def test_logits_that_are_no_numbers_have_no_perplexity(tiny: TinyBundle) -> None:
    tiny.model.model.norm.weight.data.fill_(float("nan"))
    done = invoke("perplexity", tiny.path, "--file", tiny.path.with_name("text.txt"), "--device", "cpu")
    assert done.exit_code == 0
    assert done.stdout.startswith("perplexity not finite of ")
    assert "infinite or not numbers" in done.stderr


def test_a_cache_of_codes(tiny: TinyBundle) -> None:
    """Of a model with steps of our own; others are refused with what to do."""
    text = tiny.path.with_name("text.txt")
    given = ("--device", "cpu", "--cache", "int8", "--json")
    failed(invoke("bench", tiny.path, "-p", "4", *given), 3, "no fused decoding step", "leave --cache out")
    attach(tiny.model, ARCHITECTURES["llama"])
    done = invoke("perplexity", tiny.path, "--file", text, "--window", "20", *given)
    plain = invoke("perplexity", tiny.path, "--file", text, "--window", "20", *given[:2], "--json")
    documents = [json.loads(each.stdout) for each in (done, plain)]
    assert [each["cache"] for each in documents] == ["int8", "model"]
    one, other = (each["perplexity"] for each in documents)
    assert one != other
    assert one == pytest.approx(other, rel=0.02)
    measured = json.loads(invoke("bench", tiny.path, "-p", "4", "-n", "4", "-r", "1", *given).stdout)
    assert (measured["cache"], measured["fused"]) == ("int8", True)
