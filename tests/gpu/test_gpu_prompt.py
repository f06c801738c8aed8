"""`chat`, `generate` and `bench` on a GPU: kernels are prepared, turns reuse the cache, memory is planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from typer.testing import CliRunner

from q6k_convert.cli.main import app

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("libgguf")
    from tiny_chat import tiny_chat

    return tiny_chat(tmp_path_factory.mktemp("prompt"))[0]


def run(*arguments: str | Path, given: str = "") -> dict[str, Any]:
    done = CliRunner().invoke(app, [*map(str, arguments), "--device", "cuda", "--json"], input=given)
    assert done.exit_code == 0, done.output
    document: dict[str, Any] = json.loads(done.stdout)
    return document | {"stderr": done.stderr}


SAMPLING = (
    "--temperature",
    "1.2",
    "--top-k",
    "40",
    "--top-p",
    "0.9",
    "--repeat-penalty",
    "1.1",
    "--logprobs",
    "2",
    "--context",
    "200",
)


def test_turns_reuse_the_cache_and_draw_as_generate_does(bundle: Path) -> None:
    found = run("chat", bundle, "--max-new-tokens", "40", *SAMPLING, given="The dog\nAnd the fox?\n")
    first, second = found["turns"]
    assert (first["reused_tokens"], second["reused_tokens"] >= first["prompt_tokens"]) == (0, True)
    assert "of weights and" in found["stderr"]
    one = run("generate", bundle, "--chat", "-p", "The dog", "--max-new-tokens", "40", *SAMPLING)
    assert [row["token_id"] for row in first["logprobs"]] == one["token_ids"]
    assert found["messages"][1]["content"] == one["text"]


def test_a_benchmark_has_all_its_tests(bundle: Path) -> None:
    found = run("bench", bundle, "-p", "16", "-n", "16", "-d", "0", "-d", "32", "-r", "2")
    assert [row["test"] for row in found["tests"]] == ["pp16", "tg16", "pp16 @ d32", "tg16 @ d32"]
    assert all(row["avg_ts"] > 0 for row in found["tests"])
    assert (found["backend"], found["fused"]) == ("CUDA", True)
