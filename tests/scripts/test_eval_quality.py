"""What eval_quality.py measures, on tiny models without a GPU; and the dense model that it measures by."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import torch

from model_cases import IDS, MODELS
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_convert.run.perplexity import windows
from q6k_kernels.weights.reader import NotLoadableError
from tiny_models import Q8_0, Tiny
from tokenizer_files import sentencepiece, sentencepiece_ids

SCRIPTS = Path(__file__).parents[2] / "scripts"

import eval_quality
from dense_model import dense_model

CPU = torch.device("cpu")
WORDS = """\
The lazy fox runs. It's 12345 o'clock, and the brown dog sleeps over the quick dog.
They've jumps, each at the lazy 3.14 apples: the friends of a fox, the dogs of Köln!
"""


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[int]]:
    """A GGUF with a vocabulary, the model that it was made of, and the ids of a text in "text.txt" beside it."""
    folder = tmp_path_factory.mktemp("spoken")
    keys = sentencepiece()
    tiny = Tiny(
        "llama",
        "llama",
        {"vocab_size": len(keys["ggml.tokens"])},
        {f"tokenizer.{key}": value for key, value in keys.items()},
        {"blk.0.ffn_down.weight": Q8_0},
    )
    _, model = tiny.bundle(folder)
    (folder / "text.txt").write_text(WORDS)
    return folder / "model.gguf", model, sentencepiece_ids(keys, WORDS)


@pytest.fixture
def run(spoken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command in an empty folder and returns its report."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str | Path) -> dict[str, Any]:
        text = spoken[0].with_name("text.txt")
        given = [*arguments, "--text", text, "--device", "cpu", "--window", "20"]
        monkeypatch.setattr(sys, "argv", ["eval_quality.py", *map(str, given)])
        eval_quality.main()
        report: dict[str, Any] = json.loads((tmp_path / "bench-quality.json").read_text())
        return report

    return command


def perplexity(model: Any, ids: list[int], length: int) -> float:
    """By the definition, one token after the other."""
    logs = list[float]()
    with torch.no_grad():
        for at in range(0, len(ids), length - 1):
            window = [1, *ids[at : at + length - 1]]
            probabilities = model(torch.tensor([window])).logits[0].double().softmax(dim=-1)
            logs += [math.log(float(probabilities[i, token])) for i, token in enumerate(window[1:])]
    return math.exp(-sum(logs) / len(logs))


@pytest.mark.parametrize("name", ["llama 3.1", "llama, biases", "qwen2", "gemma2", "gemma3", "qwen3, tied"])
def test_the_dense_model_is_the_one_that_the_file_was_made_of(name: str, tmp_path: Path) -> None:
    bundle, model = MODELS[name].bundle(tmp_path)
    late = torch.arange(400, 424)[None]
    with torch.no_grad():
        expected = model(IDS[:1], position_ids=late).logits
        for source in (tmp_path / "model.gguf", None):
            found = dense_model(bundle, source, CPU, torch.float32)
            torch.testing.assert_close(found(IDS[:1], position_ids=late).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any(type(module).__name__.startswith("Q6K") for module in found.modules())


def test_the_dense_model_wants_all_tensors(tmp_path: Path) -> None:
    MODELS["qwen3"].bundle(tmp_path)
    convert(
        tmp_path / "model.gguf", tmp_path / "less", Options(scales="exact", exclude=("blk.1.attn_q_norm.weight",))
    )
    with pytest.raises(NotLoadableError, match=r"blk\.1\.attn_q_norm\.weight \(F32\) was left out"):
        dense_model(tmp_path / "less", None, CPU, torch.float32)


def test_a_gguf_is_measured_with_all_scales_and_activations(spoken: Any, run: Any, capsys: Any) -> None:
    source, model, ids = spoken
    report = run(source, "--dtype", "fp32")
    rows = {(row["scales"], row["activations"]): row for row in report["rows"]}
    assert list(rows) == [("dense", "fp32"), *((s, a) for s in ("bf16", "exact") for a in ("int8", "bf16"))]
    assert report["tokens"] == len(ids)
    assert report["windows"] == math.ceil(len(ids) / 19)
    right = perplexity(model, ids, 20)
    assert rows["dense", "fp32"]["perplexity"] == pytest.approx(right, rel=1e-3)
    # Exact scales and whole activations change nothing but the bundle's Q8_0 tensor, which is bf16 there.
    assert rows["exact", "bf16"]["ratio"] == pytest.approx(1, abs=2e-3)
    assert len({round(row["perplexity"], 9) for row in rows.values()}) == 5
    for row in report["rows"]:
        assert row["ratio"] == pytest.approx(row["perplexity"] / rows["dense", "fp32"]["perplexity"], rel=1e-9)
    printed = capsys.readouterr().out.splitlines()
    assert (len(printed), printed[2].endswith("the reference"), printed[-1].endswith("within 1% met")) == (
        7,
        True,
        True,
    )


def test_a_worse_model_is_told(run: Any, spoken: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = eval_quality.load_model

    def worse(*arguments: Any, **more: Any) -> Any:
        model = right(*arguments, **more)
        model.lm_head.tiles[:2] = 0
        return model

    monkeypatch.setattr(eval_quality, "load_model", worse)
    with pytest.raises(SystemExit) as stopped:
        run(spoken[0], "--scales", "exact", "--activations", "bf16")
    assert stopped.value.code == 1
    rows = json.loads((tmp_path / "bench-quality.json").read_text())["rows"]
    assert [row.get("met") for row in rows] == [None, False]


def test_windows_begin_with_bos_and_leave_no_token_out() -> None:
    assert windows([5, 6, 7, 8, 9], 1, 3) == [[1, 5, 6], [1, 7, 8], [1, 9]]
    assert windows([5, 6, 7, 8, 9], None, 3) == [[5, 6, 7], [8, 9]]
    assert windows([5, 6, 7, 8], None, 3) == [[5, 6, 7]]  # one alone predicts nothing


def test_a_ratio_has_the_error_of_its_differences() -> None:
    reference = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    found = eval_quality.compared(reference + torch.tensor([0.1, -0.1, 0.1, 0.1], dtype=torch.float64), reference)
    assert found["perplexity"] == pytest.approx(math.exp(2.55))
    assert found["ratio"] == pytest.approx(math.exp(0.05))
    assert found["ratio_error"] == pytest.approx(math.exp(0.05) * 0.1 / 2)
