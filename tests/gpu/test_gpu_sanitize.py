"""What compute-sanitizer runs: every kernel and every path through it once, on the smallest sizes that have it.

Those of a decoding step are in test_gpu_sanitize_step.py, as one kernel in test_gpu_sanitize_persist.py; those of a
prompt's chunk are in test_gpu_sanitize_chunk.py.

    export PYTHONPATH=.:kernels PYTORCH_NO_CUDA_MEMORY_CACHING=1
    tests="python -m pytest tests/gpu/test_gpu_sanitize.py tests/gpu/test_gpu_sanitize_step.py \
        tests/gpu/test_gpu_sanitize_chunk.py"
    persist=tests/gpu/test_gpu_sanitize_persist.py
    $tests $persist
    compute-sanitizer --error-exitcode 1 --tool memcheck --report-api-errors no $tests $persist
    compute-sanitizer --error-exitcode 1 --tool racecheck --kernel-name kns=q6k_ $tests      (also synccheck)
    compute-sanitizer --error-exitcode 1 --tool initcheck --kernel-name kns=q6k_ $tests $persist

cuda-bindings asks the driver for functions that it may not have, which memcheck would report. racecheck calls
every read of a tile by q6k_persist a race: it does not follow the barriers on which bulk copies complete. Its one
other finding there is the number of the row that is multiplied, a volatile hint for the thread that requests
tiles.
`-m sanitize` selects the same. Without torch's cache every tensor is an allocation of its own: what is read past
its end, or before it is written, shows. The first run compiles the kernels into the disk cache. `--kernel-name`
leaves out cuBLAS and torch's own kernels, which only `test_expanding_slices` launches, after ours. (initcheck would
call what cuBLAS writes by tensor copies unwritten.)

Inputs and expected values are made on the CPU and copied to the GPU, outputs are compared on the CPU. So nearly
nothing else is launched, loaded or instrumented, and whatever a kernel reads was written by a copy or by a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

import fp64
import gpu_weights
from q6k_kernels.cuda import decode, decode_plan, device, expand, gemm_mma, gemm_wgmma
from q6k_kernels.formats import tiles as layout
from q6k_kernels.ops import reference

pytestmark = [pytest.mark.gpu, pytest.mark.sanitize]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
K = 1280
"""Five super-blocks: rings go round, and two or four blocks split them unevenly. Where a weight type allows, the
last is partial (`gpu_weights.width`)."""


@pytest.fixture(autouse=True)
def _inputs_on_the_cpu() -> Iterator[None]:
    with gpu_weights.made_on_the_cpu():
        yield


def this_gpu() -> device.Device:
    return device.device(torch.cuda.current_device())


def unwritten(m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """NaN on the GPU, by a copy."""
    return torch.full((m, n), float("nan"), dtype=dtype).cuda()


class Case:
    """Sizes and formats; x, tiles, bias and y on the GPU, and what y should become."""

    def __init__(
        self, m: int, n: int, k: int, format: str, dtype: torch.dtype, formula: str, bias: torch.dtype | None = BF16
    ) -> None:
        k = gpu_weights.width(k, format)
        w, x = gpu_weights.weight("random", n, k, format), gpu_weights.inputs(m, k, dtype)
        self.what = f"{n}x{k} M={m} {formula} {dtype} {format}"
        rounded = formula == "bf16" and dtype is BF16  # x is not on the GPU yet, where this is seen
        self.expected = fp64.linear(x, w, formula, scales_rounded=rounded)
        self.bias = None
        if bias is not None:
            b = gpu_weights.bias_of(n, bias)
            self.expected, self.bias = self.expected.plus(b), b.cuda()
        self.m, self.n, self.k, self.row = m, n, k, w.row
        self.x, self.tiles, self.y = x.cuda(), w.tiles.cuda(), unwritten(m, n, dtype)

    def check(self) -> None:
        """Waits for the GPU."""
        fp64.assert_right(self.y.cpu(), self.expected, self.what)


@pytest.mark.parametrize(
    ("m", "shape", "cluster", "ranges", "kind", "format", "dtype"),
    [
        # Quantised by every block, before or after tiles were asked for, or by a kernel of its own.
        (1, (8, 3, 2), 1, 2, "early", "q6_k", BF16),
        (2, (16, 3, 1), 1, 1, "late", "q4_k", FP16),
        (1, (8, 2, 2), 2, 1, "late", "q6_k_exact", BF16),
        (2, (16, 2, 1), 4, 2, "early", "q5_0", FP16),
        (3, (8, 2, 2), 1, 2, "separate", "q4_1", BF16),
        (4, (16, 3, 1), 1, 1, "late", "q8_0", BF16),
        (8, (16, 3, 1), 1, 1, "separate", "iq4_nl", FP16),
        (5, (8, 3, 2), 2, 2, "separate", "mxfp4", BF16),
        (7, (8, 2, 1), 1, 1, "separate", "q5_k", FP16),
    ],
)
def test_decode(
    m: int, shape: tuple[int, int, int], cluster: int, ranges: int, kind: str, format: str, dtype: torch.dtype
) -> None:
    """Few blocks have all tiles, so that warps share row tiles and fill a place of their ring again."""
    gpu = this_gpu()
    if cluster > 1 and gpu.arch < 90:
        pytest.skip(f"clusters are of compute capability 9.0 and later, this GPU has {gpu.arch / 10}")
    case = Case(m, 150, K, format, dtype, "int8")
    for each in (shape, decode_plan.SHAPES[-1]):  # the last one fits in every GPU's shared memory
        few = replace(gpu, multiprocessors=-(-ranges * cluster // each[2]))
        choice = decode_plan.Choice.of(each, kind != "separate", kind != "late")
        plan = decode_plan.plan(m, case.n, case.k, case.row, few, (cluster, choice))
        if plan is not None:
            break
    assert plan is not None
    assert (plan.fused, plan.early, plan.cluster, plan.ranges) == (
        kind != "separate",
        kind != "late",
        cluster,
        ranges,
    )
    decode._launch(plan, case.x, case.tiles, case.bias, case.n, case.row, case.y, gpu)
    case.check()


@pytest.mark.parametrize(
    ("tokens", "consumers", "blocks", "n", "format", "dtype"),
    [
        # Four outputs of five super-blocks: by one block; by three, who share the fourth; all shared, by 7, by 20.
        (16, 2, 1, 149, "q6_k", FP16),
        (16, 2, 20, 152, "q4_k", BF16),
        (64, 2, 7, 149, "q6_k_exact", BF16),
        (128, 1, 3, 85, "q5_0", FP16),
        (256, 2, 3, 136, "q4_1", BF16),
    ],
)
def test_gemm_wgmma(
    tokens: int,
    consumers: int,
    blocks: int,
    n: int,
    format: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two blocks of tokens by two of rows, the last of either a part."""
    gpu = this_gpu()
    if gpu.arch != gemm_wgmma.ARCH:
        pytest.skip(f"wgmma is of compute capability 9.0, this GPU has {gpu.arch / 10}")
    (config,) = [c for c in gemm_wgmma.CONFIGS if (c.tokens, c.consumers) == (tokens, consumers)]
    case = Case(tokens + 3, n, K, format, dtype, "bf16", FP32)
    plan = gemm_wgmma.plan_of(config, 1, True, case.m, n, case.k, replace(gpu, multiprocessors=blocks))
    assert (plan.token_blocks, plan.row_blocks, plan.shared) == (2, 2, {1: 0, 3: 1}.get(blocks, 4))
    # Flags are read before they are written; what is there must not matter, and initcheck must not mind.
    size = 4 * plan.scratch_floats + 8 * plan.scratch_flags
    scratch = torch.full((size,), 0xFF, dtype=torch.uint8).cuda()
    monkeypatch.setattr(gemm_wgmma, "_scratch", lambda *_: scratch)
    gemm_wgmma.linear(case.x, case.tiles, case.bias, n, case.row, case.y, gpu, plan)
    case.check()


@pytest.mark.parametrize(
    ("config", "splits", "n", "format", "dtype"),
    [((16, 4), 2, 45, "q4_k", BF16), ((64, 1), 1, 133, "q6_k_exact", FP16)],
)
def test_gemm_mma(
    config: tuple[int, int],
    splits: int,
    n: int,
    format: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On every GPU, also those on which the operation has something better."""
    case = Case(config[0] + 3, n, K, format, dtype, "bf16", FP16)
    plan = gemm_mma._plan(config, splits, case.m, n, case.row, this_gpu())
    monkeypatch.setattr(gemm_mma, "plan", lambda *_: plan)
    gemm_mma.linear(case.x, case.tiles, case.bias, n, case.row, case.y)
    case.check()


@pytest.mark.parametrize(
    ("format", "dtype"), [(format, FP32 if at % 2 else BF16) for at, format in enumerate(gpu_weights.EVERY)]
)
def test_pack_dequantize_and_gather(format: str, dtype: torch.dtype) -> None:
    """A stack, the last tile of each weight a part; repeated rows, the first and the last among them."""
    n, k = 33, gpu_weights.width(512, format)
    w = gpu_weights.weight("random", n, k, format, 2)
    expected = layout.pack(w.planes, w.row)
    tiles = torch.ops.q6k.pack([plane.cuda() for plane in w.planes], w.format)
    fp64.assert_same_bits(tiles.cpu(), expected, "pack")
    rows = reference.dequantize([plane[1] for plane in w.planes], w.row, dtype)
    found = torch.ops.q6k.dequantize(tiles[1], n, w.k, w.format, dtype)
    fp64.assert_same_bits(found.cpu(), rows, "dequantize")
    at = torch.tensor([[0, 32, 7], [15, 16, 7]], dtype=torch.int32 if dtype is FP32 else torch.int64)
    found = torch.ops.q6k.embedding(at.cuda(), tiles[1], n, w.k, w.format, dtype)
    fp64.assert_same_bits(found.cpu(), rows[at], "embedding")


def test_expanding_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slices for cuBLAS, the last one row."""
    case = Case(5, 33, 256, "q6_k_exact", FP16, "bf16", None)
    monkeypatch.setattr(expand, "SCRATCH_BYTES", 1)
    assert expand.slice_rows(case.m, case.k) == 16
    expand.linear(case.x, case.tiles, case.bias, case.n, case.row, case.y)
    case.check()
