"""`q6k::experts` on the CPU: every weight type against fp64, and what it says of wrong arguments."""

from __future__ import annotations

from typing import Any

import pytest

import any_type

torch = pytest.importorskip("torch")

from q6k_kernels.formats import tiles as layout
from q6k_kernels.formats.types import WEIGHT_TYPES, WeightType
from q6k_kernels.ops import accuracy, grouped

COUNT, N, K = 5, 20, 512
CHOSEN = [[3, 0], [0, 4], [3, 3]]


def exact(x: Any, planes: list[Any], row: WeightType, expert: int, bias: Any, activations: Any) -> accuracy.Exact:
    weight = accuracy.of_planes([plane[expert] for plane in planes], row)
    return accuracy.linear(x, weight, None if bias is None else bias[expert], activations=activations)


@pytest.mark.parametrize("activations", ["int8", "bf16"])
@pytest.mark.parametrize("row", WEIGHT_TYPES.values(), ids=lambda row: row.name)
def test_every_pair_meets_its_expert(row: WeightType, activations: str) -> None:
    k = K - 32 if row.block == 32 else K
    planes = any_type.planes(row, N, k, (COUNT,))
    experts = torch.tensor(CHOSEN, dtype=torch.int32 if activations == "int8" else torch.int64)
    source = torch.Generator().manual_seed(1)
    x, bias = torch.randn(3, 2, k, generator=source).bfloat16(), torch.randn(COUNT, N, generator=source)
    for rows, each in ((x[:, 0], None), (x, bias)):
        y = grouped.experts(rows, layout.pack(planes, row), experts, each, N, row.name, activations)
        assert (y.shape, y.dtype) == ((3, 2, N), torch.bfloat16)
        for i, j in ((i, j) for i in range(3) for j in range(2)):
            own = rows[i : i + 1] if rows.ndim == 2 else rows[i, j : j + 1]
            found = accuracy.compare(y[i, j : j + 1], exact(own, planes, row, CHOSEN[i][j], each, activations))
            assert found.first is None, (i, j, found)


ROW = next(iter(WEIGHT_TYPES.values()))


def call(**changed: Any) -> torch.Tensor:
    arguments = {
        "x": torch.zeros(3, K),
        "tiles": layout.pack(any_type.planes(ROW, N, K, (COUNT,)), ROW),
        "experts": torch.tensor(CHOSEN),
        "bias": None,
        "n": N,
        "format": ROW.name,
        "activations": "auto",
    }
    return grouped.experts(*(arguments | changed).values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"experts": torch.zeros(3, 2)}, r"experts: expected int64 or int32 \(M, top\), found float32 \(3, 2\)"),
        ({"x": torch.zeros(2, K)}, r"x: expected .* \(3, K\) or \(3, 2, K\), found float32 \(2, 512\)"),
        ({"x": torch.zeros(3, 1, K)}, r"x: expected .* found float32 \(3, 1, 512\)"),
        ({"x": torch.zeros(3, 256)}, r"k: 2 tiles of 256 columns hold 257 to 512 .* found 256"),
        ({"tiles": layout.pack(any_type.planes(ROW, N, K), ROW)}, r"tiles: expected those of a stack"),
        ({"n": 40}, r"n: 2 tiles of 16 hold 17 to 32 rows, found 40"),
        ({"bias": torch.zeros(COUNT)}, r"bias: expected .* \(5, 20\), found float32 \(5,\)"),
        ({"activations": "int4"}, r"activations: expected auto, int8 or bf16, found 'int4'"),
        ({"experts": torch.zeros(3, 2, dtype=torch.int64, device="meta")}, r"x on cpu, experts on meta"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changed)


@pytest.mark.parametrize("bad", [-1, COUNT, 1 << 40])
def test_an_expert_that_does_not_exist_is_named(bad: int) -> None:
    with pytest.raises(IndexError, match=rf"experts: expected 0 to 4, found {bad} at \(1, 0\)"):
        call(experts=torch.tensor([[0, 1], [bad, 2], [3, 4]]))


def test_the_op_has_no_gradient_and_says_so() -> None:
    with pytest.raises(ValueError, match="x requires a gradient, and q6k::experts has none"):
        call(x=torch.zeros(3, K, requires_grad=True))


def test_nothing_comes_of_no_tokens_and_torch_accepts_the_op() -> None:
    assert call(x=torch.zeros(0, K), experts=torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 2, N)
    tiles = layout.pack(any_type.planes(ROW, N, K, (COUNT,)), ROW)
    arguments = torch.randn(3, K), tiles, torch.tensor(CHOSEN), None, N, ROW.name, "auto"
    torch.library.opcheck(grouped.experts, arguments)
