"""Packing, dequantising and embedding on a GPU: right to the bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import fp64
import gpu_weights
from gpu_weights import EVERY, poisoned_call, random_source, weight
from q6k_kernels.formats import tiles as layout
from q6k_kernels.formats.types import WEIGHT_TYPES
from q6k_kernels.ops import reference
from q6k_kernels.weights.weight import PackedWeight

pytestmark = pytest.mark.gpu

KINDS = ["genuine", "random", "extreme"]
SHAPES = [(1, 256), (16, 256), (17, 768), (31, 2560), (33, 5376), (250, 1024), (1001, 512)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
THIRTY_TWO = [format for format in EVERY if WEIGHT_TYPES[format].block == 32]
CASES = list(itertools.product(KINDS, SHAPES, EVERY[:2]))
CASES += list(itertools.product(KINDS, [(1, 256), (17, 768), (33, 5376)], EVERY[2:]))
CASES += [(kind, shape, format) for kind in KINDS for shape in [(33, 32), (17, 736)] for format in THIRTY_TWO]


def on_the_cpu(planes: list[torch.Tensor]) -> list[torch.Tensor]:
    return [plane.cpu() for plane in planes]


def unaligned(plane: torch.Tensor) -> torch.Tensor:
    """The same plane one element further in memory."""
    flat = plane.new_empty(plane.numel() + 1)
    flat[1:] = plane.flatten()
    return flat[1:].view(plane.shape)


@pytest.mark.parametrize(("kind", "shape", "format"), CASES)
def test_pack_is_that_of_the_cpu(kind: str, shape: tuple[int, int], format: str) -> None:
    w = weight(kind, *shape, format)
    expected = layout.pack(on_the_cpu(w.planes), w.row)
    tiles = poisoned_call(torch.ops.q6k.pack, w.planes, w.format)
    fp64.assert_same_bits(tiles, expected, f"{kind} {shape}")
    assert tiles.is_contiguous()
    assert tiles.data_ptr() % 16 == 0
    fp64.assert_same_bits(
        poisoned_call(torch.ops.q6k.pack, [*map(unaligned, w.planes)], w.format), expected, "unaligned"
    )


@pytest.mark.parametrize("format", EVERY)
@pytest.mark.parametrize(("experts", "n", "k"), [(1, 17, 256), (3, 33, 512), (8, 64, 768)])
def test_stacks_are_packed_and_sliced(experts: int, n: int, k: int, format: str) -> None:
    k = gpu_weights.width(k, format)
    w = weight("genuine", n, k, format, experts)
    tiles = poisoned_call(torch.ops.q6k.pack, w.planes, w.format)
    fp64.assert_same_bits(tiles, layout.pack(on_the_cpu(w.planes), w.row))
    x = gpu_weights.inputs(9, k, torch.bfloat16)
    for expert in range(experts):
        one = w[expert]
        fp64.assert_same_bits(tiles[expert], one.tiles, f"expert {expert}")
        found = poisoned_call(torch.ops.q6k.dequantize, tiles[expert], n, w.k, w.format, torch.float32)
        fp64.assert_same_bits(found, one.weights(torch.float32), f"expert {expert}")
        for m, formula in ((1, "int8"), (9, "bf16")):
            y = poisoned_call(torch.ops.q6k.linear, x[:m], tiles[expert], None, n, w.format, formula)
            fp64.assert_right(y, fp64.linear(x[:m], one, formula), f"expert {expert}")


def test_a_plane_with_strides_is_packed() -> None:
    w = weight("random", 40, 512, "q6_k_exact")
    wide = [torch.cat((plane, plane), 1)[:, : plane.shape[1]] for plane in w.planes]
    assert not any(plane.is_contiguous() for plane in wide)
    fp64.assert_same_bits(poisoned_call(torch.ops.q6k.pack, wide, w.format), w.tiles)


def test_a_large_weight_is_packed_and_unpacked() -> None:
    """21504 x 5376: tiles by the GPU, planes from them again by plain torch."""
    w = weight("genuine", 21504, 5376, "q6_k")
    for found, expected in zip(layout.unpack(w.tiles, w.n, w.k, w.row), w.planes, strict=True):
        fp64.assert_same_bits(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "shape", "format"), CASES)
def test_dequantize_is_the_references(kind: str, shape: tuple[int, int], format: str, dtype: torch.dtype) -> None:
    w = weight(kind, *shape, format)
    found = poisoned_call(torch.ops.q6k.dequantize, w.tiles, w.n, w.k, w.format, dtype)
    fp64.assert_same_bits(found, reference.dequantize(on_the_cpu(w.planes), w.row, dtype), "reference")
    fp64.assert_same_bits(found, w.weights(dtype), "codes times scales")


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "shape", "format"), CASES)
def test_embedding_is_rows_of_the_reference(
    kind: str, shape: tuple[int, int], format: str, dtype: torch.dtype, index_dtype: torch.dtype
) -> None:
    w = weight(kind, *shape, format)
    rows = reference.dequantize(on_the_cpu(w.planes), w.row, dtype).to(gpu_weights.DEVICE)
    some = torch.randint(w.n, (37,), device=gpu_weights.DEVICE, generator=random_source(w.n))
    every = torch.arange(w.n, device=gpu_weights.DEVICE).flip(0)
    for indices in (some, every, some[:36].view(3, 4, 3), some[:1], some[0], some[:0], some[:0].view(0, 5)):
        at = indices.to(index_dtype)
        found = poisoned_call(torch.ops.q6k.embedding, at, w.tiles, w.n, w.k, w.format, dtype)
        fp64.assert_same_bits(found, rows[indices], f"indices {tuple(indices.shape)}")
    for at in (some[::3], some[:36].view(6, 6).T):
        assert not at.is_contiguous()
        found = poisoned_call(torch.ops.q6k.embedding, at.to(index_dtype), w.tiles, w.n, w.k, w.format, dtype)
        fp64.assert_same_bits(found, rows[at], "indices with strides")


@pytest.mark.parametrize("format", EVERY)
def test_embedding_of_a_large_vocabulary(format: str) -> None:
    """262144 x 5376: expanded it takes more bytes than 32 bits can count."""
    n, k = 262144, 5376
    w = weight("genuine", n, k, format)
    at = torch.randint(n, (4096,), device=gpu_weights.DEVICE, generator=random_source())
    at[:3] = torch.tensor([0, n - 1, n - 17], device=at.device)
    found = poisoned_call(torch.ops.q6k.embedding, at, w.tiles, n, w.k, w.format, torch.bfloat16)
    fp64.assert_same_bits(found, some_rows(w, at))
    every = poisoned_call(torch.ops.q6k.dequantize, w.tiles, n, w.k, w.format, torch.bfloat16)
    fp64.assert_same_bits(every[at], found)
    fp64.assert_same_bits(every[-40:], some_rows(w, slice(n - 40, n)))


def some_rows(w: gpu_weights.Weight, which: Any) -> torch.Tensor:
    return w[which].weights(torch.bfloat16)


@pytest.mark.parametrize("format", EVERY)
def test_slices_of_rows(format: str) -> None:
    n, k = 250, gpu_weights.width(1024, format)
    w = weight("genuine", n, k, format)
    whole = PackedWeight.from_planes(w.planes, w.format)
    x = gpu_weights.inputs(20, k, torch.bfloat16)
    for start, stop in ((0, 16), (16, 240), (240, 250), (0, 250), (64, 128)):
        part = whole.rows(start, stop)
        for m, formula in ((1, "int8"), (20, "bf16")):
            y = poisoned_call(torch.ops.q6k.linear, x[:m], part.tiles, None, part.n, part.format, formula)
            fp64.assert_right(y, fp64.linear(x[:m], w[start:stop], formula), f"rows {start} to {stop}")
        found = poisoned_call(torch.ops.q6k.dequantize, part.tiles, part.n, part.k, part.format, torch.float16)
        fp64.assert_same_bits(found, w.weights(torch.float16)[start:stop])


def test_what_is_refused() -> None:
    w = weight("genuine", 33, 512, "q6_k_exact")
    ql, qh, scale, steps = w.planes
    at = torch.zeros(3, dtype=torch.int64, device=ql.device)
    for call, words in (
        (lambda: torch.ops.q6k.pack([ql, qh.cpu(), scale, steps], w.format), "one device"),
        (lambda: torch.ops.q6k.pack([ql, qh[:, :-1], scale, steps], w.format), "qh"),
        (lambda: torch.ops.q6k.embedding(at.cpu(), w.tiles, 33, w.k, w.format, torch.bfloat16), "one device"),
        (lambda: torch.ops.q6k.embedding(at.float(), w.tiles, 33, w.k, w.format, torch.bfloat16), "indices"),
        (lambda: torch.ops.q6k.embedding(at, w.tiles, 33, w.k, w.format, torch.float64), "float64"),
        (lambda: torch.ops.q6k.dequantize(w.tiles, 49, w.k, w.format, torch.bfloat16), "49"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("graph", [False, True])
def test_an_embedding_waits_for_what_is_before_it(graph: bool) -> None:
    """Indices are ready no sooner than a launch before, and rows are read by one whose memory the next may take."""
    n, k = 1001, 512
    w = weight("genuine", n, k, "q6_k")
    rows = w.weights(torch.bfloat16)
    start = torch.randint(0, n, (70,), generator=random_source(0), device="cuda")
    sums, indices = torch.zeros(70, k, dtype=torch.float64, device="cuda"), start.clone()

    def follow() -> None:
        for _ in range(50):
            sums.add_(torch.ops.q6k.embedding(indices, w.tiles, n, w.k, w.format, torch.bfloat16))
            indices.mul_(7).add_(3).remainder_(n)

    if graph:
        follow()
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            follow()
        sums.zero_()
        indices.copy_(start)
        recorded.replay()
    else:
        follow()
    expected, at = torch.zeros_like(sums), start.clone()
    for _ in range(50):
        expected += rows[at]
        at = (at * 7 + 3) % n
    assert torch.equal(indices, at)
    assert torch.equal(sums, expected)
