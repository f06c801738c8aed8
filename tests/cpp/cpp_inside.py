"""Tests inside a process that has the C++ library loaded, in one of the orders; `test_cpp_ops.py` runs them.

Q6K_OPS_LIBRARY=libq6k_ops.so Q6K_OPS_ORDER=load pytest tests/cpp/cpp_inside.py
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

LIBRARY, ORDER = Path(os.environ["Q6K_OPS_LIBRARY"]), os.environ["Q6K_OPS_ORDER"]
if ORDER == "library first":
    assert "q6k" not in str(torch._C._dispatch_get_registrations_for_dispatch_key("CPU"))
    torch.ops.load_library(LIBRARY)
import any_type
import packed
from q6k_kernels.formats import tiles as layout
from q6k_kernels.formats.types import WEIGHT_TYPES, WeightType, weight_type
from q6k_kernels.ops import accuracy, library, reference
from q6k_kernels.ops import schema as ops

PYTHON_ALONE = torch._C._dispatch_dump("q6k::linear")
if ORDER == "python first":
    torch.ops.load_library(LIBRARY)
elif ORDER == "load":
    library.load(LIBRARY)

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
NAMES = ("linear", "embedding", "dequantize", "pack", "embedding_named", "dequantize_named")
BF16 = torch.bfloat16
EXACT = weight_type("q6_k_exact")
ROWS = pytest.mark.parametrize("row", WEIGHT_TYPES.values(), ids=lambda row: row.name)


def blocks_of(row: WeightType, k: int) -> int:
    """K, or 32 less of a weight type whose rows may end within a tile."""
    return k - 32 if row.block == 32 else k


def test_one_implementation_is_active_on_each_device() -> None:
    for name in NAMES:
        lines = torch._C._dispatch_dump(f"q6k::{name}").splitlines()
        for key in ("CPU", "CUDA"):
            active = [line for line in lines if line.startswith(f"{key}: ")]
            assert len(active) == 1
            assert "register.cpp" in active[0]
        assert sum(line.startswith("Meta: ") and "schema.py" in line for line in lines) == 1
        assert any("inactive" in line for line in lines) == (ORDER == "python first")


def test_schemas_and_tags_are_the_same() -> None:
    for name, (schema, *_) in zip(NAMES, ops._OPERATIONS, strict=True):
        operation = getattr(torch.ops.q6k, name).default
        assert str(operation._schema) == f"q6k::{schema}"
        if ORDER != "library first" or torch.__version__ >= "2.12":
            assert torch.Tag.pt2_compliant_tag in operation.tags
    assert (LIBRARY.name in PYTHON_ALONE) is False


def test_what_the_library_is() -> None:
    about = library.load(LIBRARY)
    assert about.path == LIBRARY.resolve()
    assert 90 in about.architectures
    assert library.load(LIBRARY) is about
    with pytest.raises(ValueError, match="another library of these operations is loaded"):
        library.load(__file__)


@ROWS
@pytest.mark.parametrize(("n", "k", "lead"), [(1, 256, ()), (37, 768, ()), (16, 512, (3,))])
def test_packing_and_rows_are_right_to_the_bit(n: int, k: int, lead: tuple[int, ...], row: WeightType) -> None:
    k, q6k, name = blocks_of(row, k), torch.ops.q6k, row.name
    arrays = any_type.planes(row, n, k, lead)
    tiles = ops.pack(arrays, name)
    assert torch.equal(tiles, layout.pack(arrays, row))
    assert torch.equal(ops.pack([strided(each) for each in arrays], name), tiles)
    one, matrix = (tiles[-1], [each[-1] for each in arrays]) if lead else (tiles, arrays)
    indices = torch.randint(0, n, (3, 5), generator=torch.Generator().manual_seed(1))
    for dtype in FLOATS:
        weights = reference.dequantize(matrix, row, dtype)
        assert torch.equal(ops.dequantize(one, n, k, name, dtype), weights)
        assert torch.equal(ops.embedding(indices, one, n, k, name, dtype), weights[indices])
        assert torch.equal(ops.embedding(indices.T.int(), one, n, k, name, dtype), weights[indices.T])
        assert ops.embedding(indices[:0], one, n, k, name, dtype).shape == (0, 5, k)
        text = str(dtype).removeprefix("torch.")
        assert torch.equal(q6k.dequantize_named(one, n, k, name, text), weights)
        assert torch.equal(q6k.embedding_named(indices, one, n, k, name, text), weights[indices])


def test_every_scale_is_read_to_the_bit() -> None:
    """Of types whose scales are bytes: all 256 values, subnormal ones among them."""
    for row in (row for row in WEIGHT_TYPES.values() if row.scales[0].dtype in ("U8", "I8")):
        arrays = any_type.planes(row, 256 * row.group // 256, 256)
        at = row.roles.index("scale")
        arrays[at] = torch.arange(256, dtype=torch.uint8).view(arrays[at].dtype).view(arrays[at].shape)
        found = ops.dequantize(ops.pack(arrays, row.name), len(arrays[0]), 256, row.name, torch.float32)
        assert torch.equal(found.view(torch.int32), reference.dequantize(arrays, row).view(torch.int32))


def strided(plane: torch.Tensor) -> torch.Tensor:
    """The same, in memory of which it is every other element."""
    return torch.stack((plane, plane), dim=-1)[..., 0]


@ROWS
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activations", ["auto", "int8", "bf16"])
def test_products_are_within_tolerance(activations: Any, dtype: torch.dtype, row: WeightType) -> None:
    """Of the order of summation that `reference` states."""
    for (n, k), m in itertools.product(((1, 256), (37, 768)), (0, 1, 5, 40)):
        k = blocks_of(row, k)
        arrays = any_type.planes(row, n, k)
        tiles, formula = ops.pack(arrays, row.name), "int8" if activations == "int8" else "bf16"
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        x[-1:, :32] = 0
        x = x.to(dtype)
        for bias in (None, torch.linspace(-1, 1, n), torch.linspace(-1, 1, 2 * n).to(BF16)[::2]):
            y = ops.linear(x, tiles, bias, n, row.name, activations)
            assert (y.shape, y.dtype) == ((m, n), dtype)
            right = accuracy.linear(x, accuracy.of_planes(arrays, row), bias, activations=formula)
            assert accuracy.compare(y, right, reference.roundings(k, row, formula)).worst <= 1


def test_strides_shapes_and_special_values_of_x() -> None:
    n, k = 37, 768
    tiles = ops.pack(any_type.planes(EXACT, n, k), EXACT.name)
    x = torch.randn(4, 6, k, generator=torch.Generator().manual_seed(0)).to(BF16)
    for activations in ("int8", "bf16"):
        y = packed.op_linear(x, tiles, None, n, activations)
        for other in (x.transpose(0, 1), x[::2, 1:], strided(x), x[:1].expand(4, 6, k), x[0, 0], x[:, :0]):
            assert torch.equal(
                packed.op_linear(other, tiles, None, n, activations),
                packed.op_linear(other.contiguous(), tiles, None, n, activations),
            )
        bad = x.clone()
        bad[1, 2, 7], bad[3, 3, 300] = float("inf"), float("nan")
        z = packed.op_linear(bad, tiles, None, n, activations)
        rows = torch.zeros(4, 6, dtype=torch.bool)
        rows[1, 2] = rows[3, 3] = True
        assert torch.equal(z[~rows], y[~rows])
        assert not z[rows].isfinite().any()


def test_int8_activations_are_rounded_to_the_bit() -> None:
    """Weights of one make the output the sum of what the activations became, halves and subnormals among them."""
    ql, qh = torch.full((1, 128), 0x11, dtype=torch.uint8), torch.full((1, 64), 0xAA, dtype=torch.uint8)
    tiles = packed.op_pack(ql, qh, torch.ones(1, 16, dtype=BF16), None)
    for scale in (1.0, 2.0**-130, 2.0**-146, 1e30):
        x = torch.zeros(8, 256)
        x[:, 0], x[:, 1] = 127 * scale, torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 63.5, 126.5, 1e-3]) * scale
        a, d_a = reference.quantize_activations(x)
        assert torch.equal(packed.op_linear(x, tiles, None, 1, "int8")[:, 0], (a.sum(1) * d_a[:, 0]))


def test_arguments_are_refused_in_pythons_words() -> None:
    n, k = 37, 512
    name, exact, short = "q6_k", "q6_k_exact", "q8_0"
    default = weight_type(name)
    tiles, stack = (ops.pack(any_type.planes(default, rows, k, lead), name) for rows, lead in ((n, ()), (16, (2,))))
    x, bias, index = torch.zeros(2, k, dtype=BF16), torch.zeros(n), torch.zeros(2, dtype=torch.int64)
    ql, qh, scale, steps = any_type.planes(EXACT, n, k)
    wanting, meta = x.clone().requires_grad_(), torch.zeros(2, k, dtype=BF16, device="meta")
    linears = [
        *(
            (x, bad, None, n, name, "auto")
            for bad in (tiles.float(), tiles[0], stack, tiles[..., :-1], tiles[:, :0])
        ),
        *((x, bad, None, n, name, "auto") for bad in (tiles.transpose(0, 1), tiles[:, ::2])),
        *((x, tiles, None, bad, name, "auto") for bad in (0, -1, 32, 49)),
        *((bad, tiles, None, n, name, "auto") for bad in (x.double(), x[:, :-1], x[0, 0], x.int(), meta)),
        *((x, tiles, bad, n, name, "auto") for bad in (bias[:-1], bias.double(), bias[None], bias.to("meta"))),
        *((x, tiles, None, n, bad, "auto") for bad in (exact, "", "Q6_K")),
        *((x, tiles, None, n, name, bad) for bad in ("", "INT8", "fp8")),
        *((wanting, tiles, None, n, name, "auto"), (x, tiles, bias.clone().requires_grad_(), n, name, "auto")),
        (wanting * 2, tiles, None, n, name, "auto"),
    ]
    embeddings = [
        *(
            (bad, tiles, n, k, name, BF16)
            for bad in (index.float(), index.short(), index - 1, index + n, index.to("meta"))
        ),
        *((index, tiles, n, k, name, torch.float64), (index, tiles, n, k, name, torch.int8)),
        *((index, tiles, n + 99, k, name, BF16), (index, tiles, n, k, exact, BF16)),
        *((index, tiles, n, bad, name, BF16) for bad in (0, -256, k - 256, k - 32, k + 1)),
    ]
    dequantizes = [(tiles, n, k, name, torch.complex64), (tiles, 0, k, name, BF16), (stack, 16, k, name, BF16)]
    of_short = ops.pack(any_type.planes(weight_type(short), n, k), short)
    dequantizes += [(of_short, n, bad, short, BF16) for bad in (k - 1, k - 256, k + 32)]
    packs = [
        *(([bad, qh, scale, steps], exact) for bad in (ql.int(), ql[0], ql[:0], ql[:, :-1])),
        *(([ql, qh[:-1], scale, steps], exact), ([ql, qh, scale], exact), ([ql, qh, scale.to(BF16), steps], exact)),
        *(([ql, qh, scale, steps.float()], exact), ([ql, qh, scale, steps[:, :-1]], exact)),
        *(([ql, qh.to("meta"), scale, steps], exact), ([ql, qh, scale, steps], name)),
    ]
    named = (
        [
            (index.float(), tiles, n, k, name, "float16"),
            *((index, tiles, n, k, name, bad) for bad in ("float64", "", "torch.float32")),
        ],
        [(tiles, 0, k, name, "bfloat16"), (tiles, n, k, name, "half"), (tiles, n, k, "q6k", "float16")],
    )
    cases = zip(ops._OPERATIONS, NAMES, (linears, embeddings, dequantizes, packs, *named), strict=True)
    for (_, on_cpu, *_), operation, calls in cases:
        for arguments in calls:
            with pytest.raises((ValueError, IndexError)) as expected:
                on_cpu(*arguments)
            if any(each.is_meta for each in tensors(arguments)):
                continue  # torch hands that to the function for fake tensors
            with pytest.raises(expected.type) as found:
                getattr(torch.ops.q6k, operation)(*arguments)
            assert str(found.value) == str(expected.value)


def tensors(arguments: Any) -> Iterator[torch.Tensor]:
    """Those among arguments, and in lists among them."""
    for each in arguments:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, list):
            yield from each


class Layer(torch.nn.Module):
    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.n = n
        self.register_buffer("tiles", ops.pack(any_type.planes(EXACT, n, k), EXACT.name))

    def forward(self, x: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = packed.op_embedding(indices, self.tiles, self.n, BF16)
        return packed.op_linear(x, self.tiles, None, self.n, "int8"), packed.op_linear(
            rows, self.tiles, None, self.n, "auto"
        )


def test_export_and_compile() -> None:
    layer, source = Layer(37, 512), torch.Generator().manual_seed(0)
    x, indices = torch.randn(6, 512, generator=source).to(BF16), torch.arange(5)
    with torch.no_grad():
        rows = torch.export.Dim("rows", min=2, max=64)
        program = torch.export.export(layer, (x, indices), dynamic_shapes=({0: rows}, None))
        assert "q6k.linear.default" in program.graph_module.code
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for m in (2, 6, 33):
            x = torch.randn(m, 512, generator=source).to(BF16)
            for run in (program.module(), compiled):
                for found, right in zip(run(x, indices), layer(x, indices), strict=True):
                    assert torch.equal(found, right)
    torch.library.opcheck(torch.ops.q6k.linear.default, (x, layer.tiles, None, 37, "q6_k_exact", "bf16"))
