"""Chunks of prompts on a GPU: what lies between products against plain torch, then prompts of whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from chunk_cases import CASES, heads_in_chunks, nets_in_chunks, random
from q6k_kernels import load_model
from q6k_kernels.generate.chunk_cuda import ChunkKernels
from q6k_kernels.generate.generator import Generator
from q6k_kernels.generate.heads import Norm
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import TorchOperations

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16]
NAMES = ("llama 3.1", "mistral as llama", "mistral3", "qwen3", "gemma2", "gemma3", "gemma4")
MORE = ("gemma4, experts", "gemma4, shared keys")


def kernels(dtype: torch.dtype) -> ChunkKernels:
    device = torch.device("cuda", 0)
    return ChunkKernels(device, dtype, Kernels(device, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1, 9])
@pytest.mark.parametrize(("dim", "group", "window", "rotated", "more"), CASES)
def test_heads_in_chunks(
    dtype: torch.dtype, scale: int, dim: int, group: int, window: int, rotated: int, more: dict[str, Any]
) -> None:
    heads_in_chunks(kernels(dtype), dtype, "cuda", dim, group, window, rotated, more, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tiled", "scale"), [(False, 1), (True, 20)])
def test_delta_nets_in_chunks(dtype: torch.dtype, tiled: bool, scale: int) -> None:
    nets_in_chunks(kernels(dtype), dtype, "cuda", tiled, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k"), [(2, 96), (9, 4096), (300, 5376), (2048, 8192)])
def test_sums_norms_and_gates(dtype: torch.dtype, rows: int, k: int) -> None:
    hidden, delta = ((3 * random(rows, k, seed=seed)).to("cuda", dtype) for seed in (0, 1))
    norm, after = (Norm(1 + random(k, seed=seed).cuda() / 4, 1e-5) for seed in (2, 3))
    both = random(rows, 2 * k).to("cuda", dtype).split(k, -1)
    # A norm's result may be rounded another way before it is added to what nearly cancels it.
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    run, reference = kernels(dtype), TorchOperations()
    for given in ((delta, after, norm), (delta, None, norm), (delta, after, None), (None, None, norm)):
        (total, x), (expected_total, expected) = (each.add_norm(hidden, *given, []) for each in (run, reference))
        torch.testing.assert_close(total, expected_total, **close)
        torch.testing.assert_close(x.halves, expected.halves, **close)
    for activation in ("silu", "gelu_tanh"):
        found, right = (each.gate(*both, activation, []).halves for each in (run, reference))
        torch.testing.assert_close(found, right, **close)


@pytest.mark.parametrize("name", [*NAMES, *MORE])
@pytest.mark.parametrize("chunk", [2048, 40])
def test_prompts_are_those_of_transformers(name: str, chunk: int, tmp_path: Path) -> None:
    """Logits, without activations in 8 bits; and no chunk waits for the GPU."""
    pytest.importorskip("libgguf")
    from model_cases import MODELS

    out, _ = MODELS[name].bundle(tmp_path)
    model = load_model(out, device="cuda", dtype=torch.float16, activations="bf16")
    prompt = torch.randint(3, 96, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    found, expected = (
        Generator(model, capacity=160, chunk=chunk, fused=fused).prefill(prompt) for fused in (True, False)
    )
    assert float((found - expected).abs().max() / expected.std()) < 0.06
    generator = Generator(model, capacity=160, chunk=chunk, fused=True)
    generator.prefill(prompt)
    tokens = torch.tensor(prompt, device="cuda")
    step = generator._fused_step
    assert step is not None
    step._recorder = None  # for recorded chunks see test_gpu_chunk_recording
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.chunk(tokens, 0, last=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
