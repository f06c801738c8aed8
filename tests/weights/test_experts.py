"""PackedExperts against transformers' own modules on the dequantised weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import any_type

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from q6k_kernels.formats.types import weight_type
from q6k_kernels.weights.experts import PackedExperts, PackedStack
from q6k_kernels.weights.weight import PackedWeight

COUNT, HIDDEN, BETWEEN, TOP, M = 6, 64, 32, 3, 7


def stack(n: int, k: int, format: str, seed: int = 0) -> PackedWeight:
    planes = any_type.planes(weight_type(format), n, k, (COUNT,))
    return PackedWeight.from_planes([plane.roll(seed, 0) for plane in planes], format)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(2)
    index = torch.stack([torch.randperm(COUNT, generator=source)[:TOP] for _ in range(M)])
    return torch.randn(M, HIDDEN, generator=source), index, torch.rand(M, TOP, generator=source)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("formats", [("q8_0", "q8_0", "q5_0"), ("q4_0", "q5_1", "q8_0"), ("q8_0", "q4_1")])
def test_qwen3moe(formats: tuple[str, ...]) -> None:
    """Gate and up in one stack of the file, in two of one type, and in two of different types."""
    *first, last = formats
    rows = 2 * BETWEEN // len(first)
    gate_up = [stack(rows, HIDDEN, format, seed) for seed, format in enumerate(first)]
    down = stack(HIDDEN, BETWEEN, last)
    config = Qwen3MoeConfig(num_experts=COUNT, hidden_size=HIDDEN, moe_intermediate_size=BETWEEN)
    theirs = Qwen3MoeExperts(config)
    theirs.gate_up_proj.data = torch.cat([each.dequantize(torch.float32) for each in gate_up], 1)
    theirs.down_proj.data = down.dequantize(torch.float32)
    ours = PackedExperts(gate_up, down, "silu")
    assert len(ours.gate_up) == len(set(first))
    hidden, index, weights = inputs()
    with torch.no_grad():
        expected = theirs(hidden, index, weights)
        assert_close(ours(hidden, index, weights), expected)
        assert_close(copy.deepcopy(ours)(hidden, index.int(), weights), expected)


def test_gpt_oss() -> None:
    """With biases, and gate and up apart in the file, which transformers interleaves."""
    gate, up = (stack(BETWEEN, HIDDEN, "mxfp4", seed) for seed in (0, 1))
    down = stack(HIDDEN, BETWEEN, "mxfp4", 2)
    source = torch.Generator().manual_seed(4)
    biases = [torch.randn(COUNT, n, generator=source) for n in (BETWEEN, BETWEEN, HIDDEN)]
    config = GptOssConfig(num_local_experts=COUNT, hidden_size=HIDDEN, intermediate_size=BETWEEN)
    theirs = GptOssExperts(config)
    both = [torch.stack(pair, 2).flatten(1, 2) for pair in (
        (gate.dequantize(torch.float32), up.dequantize(torch.float32)),
        tuple(biases[:2]),
    )]  # fmt: skip
    theirs.gate_up_proj.data, theirs.gate_up_proj_bias.data = both[0].mT.contiguous(), both[1]
    theirs.down_proj.data, theirs.down_proj_bias.data = down.dequantize(torch.float32).mT.contiguous(), biases[2]
    ours = PackedExperts([gate, up], down, "clamped_swiglu", biases)
    hidden, index, weights = inputs()
    with torch.no_grad():
        assert_close(ours(hidden, index, weights), theirs(hidden, index, weights))


def test_what_does_not_fit_together_is_named() -> None:
    gate, down = stack(BETWEEN, HIDDEN, "q8_0"), stack(HIDDEN, BETWEEN, "q8_0")
    cases: list[tuple[Any, str]] = [
        (lambda: PackedExperts([gate, gate], down, "relu"), "activation: expected one of silu, .* found 'relu'"),
        (
            lambda: PackedExperts([gate, down], down, "silu"),
            r"expected gate and up .* found \(6, 32, 64\), \(6, 64",
        ),
        (lambda: PackedExperts([gate, gate], down, "silu", [torch.zeros(6, 32)]), "biases: expected 3"),
        (lambda: PackedStack(down[0]), r"weight: expected a stack \(E, N, K\), found \(64, 32\)"),
        (lambda: PackedStack(down, torch.zeros(6, 32)), r"bias: expected \(6, 64\) on cpu, found \(6, 32\)"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()
