"""What compute-sanitizer runs of a step as one kernel: see test_gpu_sanitize.py."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from q6k_kernels import load_model
from q6k_kernels.generate.generator import Generator
from test_gpu_persist import bundle
from test_gpu_persist import pytestmark as of_one_architecture

pytestmark = [*of_one_architecture, pytest.mark.sanitize]


@pytest.mark.filterwarnings("error:.* wait for each other")  # they have room
@pytest.mark.parametrize("name", ["gemma3", "wide"])
def test_a_step_as_one_kernel(name: str, tmp_path: Path) -> None:
    """On a few blocks, with windows and norms of summands; and on all, one row tile each."""
    model = load_model(bundle(name, tmp_path), device="cuda", dtype=torch.float16)
    persistent, launched = (Generator(model, capacity=40, persistent=each) for each in (True, False))
    for generator in (persistent, launched):
        generator.prefill(list(range(3, 24)))
    for _ in range(3):
        found, expected = (step._fused_step(step._token).cpu() for step in (persistent, launched))
        assert float((found - expected).abs().max()) < 0.12 * float(expected.std())
        for generator in (persistent, launched):
            generator._choose(expected.cuda())
