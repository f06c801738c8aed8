"""Exported modules and models on a GPU: what AOTInductor compiles there, with the operations inside."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="transformers is not installed")

import lowering
from cpp_example import IN_PYTHON, build_example, called, generated
from model_cases import GEMMA2, LLAMA
from q6k_convert.run import export_command
from q6k_kernels import load_model
from q6k_kernels.cuda.dispatch import DECODE_M, PREFILL_M
from q6k_kernels.export.program import Program
from q6k_kernels.generate.generator import Generator

pytestmark = pytest.mark.gpu

SIZES = (2, 4, DECODE_M, DECODE_M + 1, 64, PREFILL_M - 1, PREFILL_M, 300, 4096)


@pytest.mark.parametrize("scales", ["bf16", "exact"])
def test_a_weight_from_gguf_to_a_compiled_program(scales: str, tmp_path: Path) -> None:
    lowering.check(tmp_path, scales, "cuda", torch.bfloat16, SIZES)


@pytest.mark.parametrize("model", [replace(GEMMA2, config=GEMMA2.config | {"num_hidden_layers": 2}), LLAMA])
def test_a_whole_model(model: Any, tmp_path: Path) -> None:
    """Its logits are the model's, in chunks, past where a ring has wrapped, and for a second text."""
    out, _ = model.bundle(tmp_path, scales="bf16")
    package = tmp_path / "model.pt2"
    report = export_command.run(
        export_command.ExportRequest(out, package, capacity=192, device="cuda"), print, no_progress
    )
    assert report["check"]["relative_difference"] <= report["check"]["allowed"]
    assert report["operations"]["decode"]["packed"] > 0
    before = torch.cuda.memory_allocated()
    program = Program(package)
    held = torch.cuda.memory_allocated() - before
    assert held < report["weights_bytes"] + report["state_bytes"] + (1 << 20)  # once for both programs
    packed = load_model(out, device="cuda")
    ids = torch.randint(3, 96, (150,), generator=torch.Generator().manual_seed(4)).tolist()
    generator = Generator(packed, capacity=192, fused=False)
    for begin in (0, 30, 99):
        for each in program.state.values():
            each.normal_()  # no slot may tell before it is written
        program.reset()
        text, new = list[int](), ids[begin:]
        for _ in range(6):  # a chunk, then one by one
            logits, text = program.prefill(new), [*text, *new]
            generator.reset()
            close(logits[0], generator.prefill(text))
            new = [int(logits.argmax())]


def test_without_python(tmp_path: Path) -> None:
    """The C++ example gives Python's tokens, with the library that the environment names."""
    library = os.environ.get("Q6K_OPS_LIBRARY")
    if library is None:
        pytest.skip("Q6K_OPS_LIBRARY names no library with this GPU's kernels")
    example = build_example()
    out, _ = LLAMA.bundle(tmp_path, scales="bf16")
    package = tmp_path / "model.pt2"
    export_command.run(export_command.ExportRequest(out, package, capacity=192, device="cuda"), print, no_progress)
    texts = [(torch.randint(3, 96, (length,)).tolist(), count) for length, count in ((1, 9), (100, 60), (150, 43))]
    of_python = called(sys.executable, "-c", IN_PYTHON, library, package, json.dumps(texts)).splitlines()
    for (ids, count), expected in zip(texts, of_python, strict=True):
        done = generated(example, package, library, count, *ids)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{expected}\n"
        assert len(expected.split()) == count


def close(found: Any, expected: Any) -> None:
    """As near as bf16 and 8-bit codes of activations leave two orders of rounding."""
    assert float((found - expected).norm() / expected.norm()) < 0.05


class no_progress:
    """A display that shows nothing."""

    def __init__(self, total: int, word: str) -> None:
        self.total, self.word = total, word

    def __enter__(self) -> Any:
        return lambda nbytes: None

    def __exit__(self, *_: object) -> None: ...
