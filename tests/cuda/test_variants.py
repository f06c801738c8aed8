"""The kernels that are compiled are those that some size is launched with: no more, and no less."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import pytest

from q6k_kernels.cpp import units, variants
from q6k_kernels.cuda import decode, decode_kernels, decode_plan, dispatch, gemm_mma, gemm_wgmma
from q6k_kernels.cuda.decode_plan import ANY, ROWS, TOKENS
from q6k_kernels.cuda.device import Device, Variant
from q6k_kernels.formats.ggml import SUPER_BLOCK
from q6k_kernels.formats.types import WEIGHT_TYPES, WeightType

GPUS = [
    replace(variants.device_like(arch), multiprocessors=count)
    for arch, count in ((80, 108), (86, 84), (89, 128), (90, 132), (90, 114), (90, 16), (100, 148), (120, 188))
]
LIMITS = sorted({row.tiles for row in ROWS if row.tiles < ANY})
"""Numbers of tiles a multiprocessor at which rows of `decode_plan` end."""
COLUMNS = [
    *(256, 2304, 4096, 4352, 4864, 5120, 8192, 8448, 12288, 13824, 16128, 16384, 21504, 24576),
    *range(26 << 10, 48 << 10, 1 << 10),
    *range(48 << 10, 112 << 10, 2 << 10),
    *range(112 << 10, 1 << 20, 24 << 10),
    *(1 << 20, 1 << 21),
]
"""K past what fits anywhere."""


def rows_of_weights(k: int, gpu: Device) -> set[int]:
    """N to 200 million, and those at which rows of `decode_plan` end."""
    last = {limit * gpu.multiprocessors // -(-k // SUPER_BLOCK) for limit in LIMITS}
    ends = {16 * row_tiles for row_tiles in last if row_tiles}
    return {1, 1000, 1 << 20, 1 << 23, 140 << 20, 200 << 20, *ends, *(end + 1 for end in ends)}


def named(gpu: Device) -> str:
    return f"sm_{gpu.arch}-{gpu.multiprocessors}"


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS if gpu.multiprocessors in (108, 84, 132, 188)], ids=named)
def test_decode_kernels_are_those_that_sizes_reach(gpu: Device) -> None:
    kinds = list(itertools.product(TOKENS, (False, True)))
    for row in WEIGHT_TYPES.values():
        reached = set()
        for k in COLUMNS:
            for n, (tokens, quantized) in itertools.product(rows_of_weights(k, gpu), kinds):
                plan = decode_plan.plan.__wrapped__(tokens, n, k, row, gpu, quantized=quantized)
                if plan is not None:
                    reached.add((plan.kernel, plan.cluster > 1))
        assert set(decode_kernels.reached(row, gpu)) == reached


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("gpu", GPUS, ids=named)
def test_an_architecture_has_what_its_gpus_reach(gpu: Device) -> None:
    """Whatever the number of multiprocessors that a build assumes."""
    assert set(decode.variants(gpu)) == set(decode.variants(variants.device_like(gpu.arch)))


def _gemm_of(m: int, n: int, k: int, row: WeightType, fp16: bool, gpu: Device) -> list[Variant]:
    """What `dispatch.linear` launches for 16-bit activations, but for those that cuBLAS multiplies."""
    if gpu.arch == gemm_wgmma.ARCH:
        return [gemm_wgmma._variant(gemm_wgmma.plan(m, n, k, gpu).config, row, fp16)]
    if m >= dispatch.PREFILL_M:
        return []
    plan = gemm_mma.plan(m, n, k, row, gpu)
    file, kernel, macros = gemm_mma._variant((plan.tokens, plan.parts), plan.slots, row, fp16)
    return [(file, kernel, macros), *([(file, gemm_mma.REDUCE, macros)] if plan.splits > 1 else ())]


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("gpu", GPUS, ids=named)
def test_gemm_kernels_are_those_that_sizes_reach(gpu: Device) -> None:
    tokens = (1, 9, 16, 17, 32, 33, 64, 100, 128, 200, 255, 256, 300, 1000, 4096)
    sizes = itertools.product(tokens, (1, 100, 1024, 4096, 21504, 128256), (256, 2560, 4096, 21504))
    kinds = itertools.product(WEIGHT_TYPES.values(), (False, True))
    reached = {
        each for size, kind in itertools.product(sizes, kinds) for each in _gemm_of(*size, *kind, gpu)
    }  # fmt: skip
    known = variants.all_variants(gpu.arch)
    assert {each for each in known if each[0] in (gemm_mma.FILE, gemm_wgmma.FILE)} == reached
    assert len(set(known)) == len(known)


@pytest.mark.usefixtures("untraced")
def test_every_size_has_a_row_and_every_row_a_size() -> None:
    chosen, counts = set(), [count for limit in LIMITS for count in (limit, limit + 1)]
    for format, tokens, k, tiles in itertools.product(WEIGHT_TYPES, TOKENS, COLUMNS, counts):
        row = next(row for row in ROWS if row.holds(format, tokens, k, tiles))
        assert not row.fused or tokens <= decode_plan.FUSED_TOKENS
        chosen.add((row, tokens))
    assert chosen == {(row, tokens) for row in ROWS for tokens in row.tokens}
    for format, tokens in itertools.product(WEIGHT_TYPES, TOKENS):
        assert any(row.holds(format, tokens, decode_plan.ANY, decode_plan.ANY) for row in ROWS)


@pytest.mark.parametrize(
    ("m", "n", "k", "format", "shape", "fused", "early", "blocks"),
    [
        # Short: blocks quantise, one a multiprocessor beside the next launch's.
        (1, 4096, 4096, "q6_k", (8, 3, 2), True, False, 132),
        # Two blocks a multiprocessor, which ask for tiles first.
        (1, 14336, 4096, "q6_k", (8, 3, 2), True, True, 264),
        (1, 14336, 4096, "q6_k_exact", (8, 3, 2), True, True, 264),
        # A launch of its own quantises.
        (1, 21504, 5376, "q6_k", (16, 3, 1), False, True, 132),
        (1, 21504, 5376, "q6_k_exact", (8, 3, 2), False, True, 264),
        (1, 5376, 21504, "q6_k", (16, 3, 1), False, True, 132),
        (2, 4096, 14336, "q6_k", (16, 3, 1), True, False, 132),
        (4, 14336, 4096, "q6_k", (16, 3, 1), True, False, 132),
        (8, 14336, 4096, "q6_k", (8, 2, 1), False, True, 132),
        (8, 21504, 5376, "q6_k_exact", (8, 5, 1), False, True, 132),
        (8, 262144, 5376, "q6_k", (8, 5, 1), False, True, 132),
        # Smaller tiles leave room for deeper rings.
        (8, 14336, 4096, "q4_k", (16, 3, 1), False, True, 132),
    ],
)
def test_choices_are_those_that_were_measured(
    m: int, n: int, k: int, format: str, shape: tuple[int, int, int], fused: bool, early: bool, blocks: int
) -> None:
    """On an H200; `kernels/NOTES.md` has the times."""
    plan = decode_plan.plan(m, n, k, WEIGHT_TYPES[format], replace(variants.device_like(90), multiprocessors=132))
    assert plan is not None
    assert ((plan.warps, plan.stages, plan.occupancy), plan.fused, plan.early) == (shape, fused, early)
    assert plan.ranges * plan.cluster == blocks


def test_the_few_that_a_check_compiles_have_every_kernel_weight_type_and_value() -> None:
    every = units.plan([80, 89, 90])
    few = units.cover(every)
    assert few.items() <= every.items()
    assert len(few) < len(every) / 3

    def values(some: Iterable[units.Unit]) -> set[object]:
        """With whole weight types on the oldest architecture and on Hopper; of the third, what they have not."""
        two = [(arch, file, defines) for arch, file, defines in some if arch != 89]
        own = {(arch, file, each) for arch, file, defines in two for each in defines}
        anywhere = {(file, each) for _, file, defines in some for each in defines}
        return own | anywhere | {(arch, file, units.format_macros((arch, file, each))) for arch, file, each in two}

    assert values(few) == values(every)
    assert {(arch, kernel) for (arch, _, _), kernels in few.items() for kernel in kernels} == {
        (arch, kernel) for (arch, _, _), kernels in every.items() for kernel in kernels
    }
