"""The operations inside torch on a GPU: streams, graphs, compilation, export, several threads and GPUs."""

from __future__ import annotations

import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import fp64
import gpu_weights
from gpu_weights import CORE, EVERY, bias_of, inputs, linear, weight
from q6k_kernels.cpp import units
from q6k_kernels.cuda import gemm_wgmma
from q6k_kernels.jit import loader

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
OPS = torch.ops.q6k
SIZES = [(1, "int8"), (8, "int8"), (5, "bf16"), (16, "bf16"), (64, "bf16"), (300, "bf16")]


def test_memory_is_poisoned() -> None:
    """The means of all these tests: without it a result that nobody wrote could be an earlier, right one."""
    with gpu_weights.poisoned():
        assert torch.empty(1000, 33, dtype=BF16, device="cuda").isnan().all()
        assert torch.empty(100, dtype=torch.uint8, device="cuda").eq(255).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_kernels_load_and_keep_to_registers() -> None:
    """Of every file, weight type and value of a macro."""
    major, minor = torch.cuda.get_device_capability()
    for (_, file, defines), names in units.cover(units.plan([10 * major + minor])).items():
        for name in names:
            kernel = loader.load(file, name, defines, torch.cuda.current_device())
            assert kernel.local_bytes == 0, f"{name} {defines} spills, with {kernel.registers} registers"


@pytest.mark.parametrize("format", EVERY)
@pytest.mark.parametrize(("m", "formula"), SIZES)
def test_same_inputs_give_same_bits(m: int, formula: str, format: str) -> None:
    """While another stream keeps the GPU busy, so that blocks run in another order every time."""
    for n, k in ((1001, 2560), (4096, 14336)) if format in CORE else ((1001, 2560),):
        w, x, bias = weight("genuine", n, k, format), inputs(m, k, BF16), bias_of(n, torch.float32)
        first = linear(x, w, bias, formula)
        other, load = torch.cuda.Stream(), torch.randn(3072, 3072, device="cuda", dtype=BF16)
        torch.cuda.synchronize()
        with torch.cuda.stream(other):
            for _ in range(20):
                load @ load
        for _ in range(10):
            fp64.assert_same_bits(linear(x, w, bias, formula), first, f"{n}x{k}")
        torch.cuda.synchronize()


@pytest.mark.parametrize(("m", "formula"), SIZES)
def test_the_current_stream_is_used(m: int, formula: str) -> None:
    """Inputs are made in that stream right before, after much other work; the default stream stays idle."""
    w, x = weight("genuine", 1001, 2560, "q6_k"), inputs(m, 2560, BF16)
    exact = fp64.linear(x, w, formula)
    w.tiles  # noqa: B018  made now, in the default stream
    load = torch.randn(8192, 8192, device="cuda", dtype=BF16)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        late = torch.full_like(x, float("nan"))
        for _ in range(4):
            load @ load
        late.copy_(x)
        y = OPS.linear(late, w.tiles, None, w.n, w.format, formula)
        late.fill_(float("nan"))
        rows = OPS.embedding(torch.arange(5, device="cuda"), w.tiles, w.n, w.k, w.format, BF16)
        whole = OPS.dequantize(w.tiles, w.n, w.k, w.format, BF16)
    side.synchronize()
    fp64.assert_right(y, exact, "in a side stream")
    fp64.assert_same_bits(rows, whole[:5])


@pytest.mark.parametrize(("m", "formula"), SIZES)
def test_two_streams_share_a_weight(m: int, formula: str) -> None:
    w = weight("genuine", 1001, 2560, "q6_k_exact")
    xs = [inputs(m, 2560, BF16, seed) for seed in range(2)]
    expected = [linear(x, w, None, formula) for x in xs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in xs]
    found: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for stream, x, outputs in zip(streams, xs, found, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(OPS.linear(x, w.tiles, None, w.n, w.format, formula))
    torch.cuda.synchronize()
    for outputs, right in zip(found, expected, strict=True):
        for y in outputs:
            fp64.assert_same_bits(y, right)


def test_threads_share_a_weight() -> None:
    w = weight("genuine", 250, 1024, "q6_k")
    x = inputs(40, 1024, BF16)
    expected = {m: linear(x[:m], w) for m in (1, 3, 40)}
    torch.cuda.synchronize()
    problems: list[BaseException] = []

    def work() -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(30):
                    for m, right in expected.items():
                        y = OPS.linear(x[:m], w.tiles, None, w.n, w.format, "auto")
                        torch.cuda.current_stream().synchronize()
                        fp64.assert_same_bits(y, right, f"M={m}")
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]


@pytest.mark.parametrize("m", [1, 8, 40])
def test_a_thread_that_has_not_used_cuda_yet(m: int) -> None:
    """Its output's memory is cached, so that torch has no need to make a context its own, either."""
    w, x = weight("genuine", 250, 1024, "q6_k"), inputs(m, 1024, BF16)
    right = linear(x, w)
    for cached in (gemm_wgmma.tile_map, gemm_wgmma.x_map):
        cached.cache_clear()
    found = list[Any]()

    def work() -> None:
        with torch.no_grad():
            found.append(OPS.linear(x, w.tiles, None, w.n, w.format, "auto"))

    OPS.linear(x, w.tiles, None, w.n, w.format, "auto")  # leaves its memory behind
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    fp64.assert_same_bits(found[0], right, f"M={m}")


@pytest.mark.parametrize("format", EVERY)
@pytest.mark.parametrize(("m", "formula"), [*SIZES, (1, "auto"), (33, "auto")])
def test_a_graph_replays_with_other_inputs(m: int, formula: str, format: str) -> None:
    """A step of a model: embedding, two linears one after the other, all captured."""
    n = k = 1024
    w, bias = weight("genuine", n, k, format), bias_of(n, BF16)
    w.tiles  # noqa: B018  made before the capture

    def step(at: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        rows = OPS.embedding(at, w.tiles, n, w.k, w.format, BF16)
        hidden = OPS.linear(x + rows, w.tiles, bias, n, w.format, formula)
        return OPS.linear(hidden, w.tiles, None, n, w.format, formula)

    x = torch.zeros(m, k, dtype=BF16, device="cuda")
    at = torch.zeros(m, dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # where the indices become numbers of rows
    with torch.cuda.stream(side):
        step(at, x)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(at, x)
    for seed in range(3):
        x.copy_(inputs(m, k, BF16, seed))
        at.copy_(torch.randint(n, (m,), device="cuda", generator=gpu_weights.random_source(seed)))
        y.fill_(float("nan"))
        graph.replay()
        fp64.assert_same_bits(y.clone(), step(at, x), f"replay {seed}")


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("n", [512, 2048])
@pytest.mark.parametrize(("m", "formula"), SIZES)
def test_launches_that_overlap_wait_for_each_other(m: int, formula: str, n: int, graph: bool) -> None:
    """Each multiplies what the one before made, in memory that is used again and again: right after one another."""
    w = weight("genuine", n, n, "q6_k_exact")
    w.tiles  # noqa: B018
    scale = 1 / float(w.weights(torch.float32).std() * n**0.5)  # outputs as large as inputs
    x = inputs(m, n, BF16)

    def chain(wait: bool) -> list[torch.Tensor]:
        hidden, kept = x, []
        for _ in range(24):
            y = OPS.linear(hidden, w.tiles, None, n, w.format, formula)
            if wait:
                torch.cuda.synchronize()
            again = OPS.linear(hidden.neg(), w.tiles, None, n, w.format, formula)
            if wait:
                torch.cuda.synchronize()
            hidden = (
                OPS.linear(OPS.linear(y, w.tiles, None, n, w.format, formula), w.tiles, None, n, w.format, formula)
                * scale**3
            )
            kept += [y + again, hidden]
        return kept

    expected = chain(wait=True)
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            found = chain(wait=False)
        for _ in range(3):
            for y in found:
                y.fill_(float("nan"))
            captured.replay()
            for step, (y, right) in enumerate(zip(found, expected, strict=True)):
                fp64.assert_same_bits(y, right, f"step {step}")
        return
    for step, (y, right) in enumerate(zip(chain(wait=False), expected, strict=True)):
        fp64.assert_same_bits(y, right, f"step {step}")
        assert y.isfinite().all()


def test_first_use_inside_a_capture() -> None:
    """A kernel that nobody used before is compiled and loaded while the graph is captured."""
    w, x = weight("genuine", 48, 512, "q6_k_exact"), inputs(7, 512, torch.float16)
    w.tiles  # noqa: B018
    torch.cuda.synchronize()
    kept = dict(loader._kernels)
    loader._kernels.clear()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = OPS.linear(x, w.tiles, None, 48, w.format, "int8")
    finally:
        loader._kernels.update(kept)
    y.fill_(float("nan"))
    graph.replay()
    fp64.assert_right(y, fp64.linear(x, w, "int8"), "captured at once")


@pytest.mark.parametrize(
    ("formula", "backend"), [("auto", "inductor"), ("int8", "aot_eager"), ("bf16", "aot_eager")]
)
def test_compiled_without_a_break(formula: str, backend: str) -> None:
    w, bias = weight("genuine", 250, 512, "q6_k"), bias_of(250, BF16)
    tiles, of = w.tiles, w.format

    def layer(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        rows = OPS.embedding(at, tiles, 250, 512, of, BF16)
        return OPS.linear(torch.nn.functional.silu(x) + rows, tiles, bias, 250, of, formula) * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for m in (2, 9, 40):
        x, at = inputs(m, 512, BF16), torch.arange(m, device="cuda")
        # Compiled, silu and the sum stay in fp32 until their end: near, not the same.
        found, expected = compiled(x, at).double(), layer(x, at).double()
        assert (found - expected).norm() < 0.02 * expected.norm()

    def alone(x: torch.Tensor) -> torch.Tensor:
        return OPS.linear(x, tiles, bias, 250, of, formula)

    compiled_alone = torch.compile(alone, fullgraph=True, dynamic=True, backend=backend)
    for m in (2, 9, 40):
        x = inputs(m, 512, BF16)
        fp64.assert_same_bits(compiled_alone(x), OPS.linear(x, tiles, bias, 250, of, formula), f"M={m}")


@pytest.mark.parametrize("format", EVERY)
def test_exported_with_any_number_of_rows(format: str) -> None:
    w = weight("genuine", 250, 512, format)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("tiles", w.tiles)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return OPS.linear(x, self.tiles, None, 250, format, "auto")

    program = torch.export.export(Layer(), (inputs(4, 512, BF16),), dynamic_shapes=({0: torch.export.Dim("m")},))
    for m in (1, 2, 8, 9, 100):
        x = inputs(m, 512, BF16)
        fp64.assert_same_bits(program.module()(x), OPS.linear(x, w.tiles, None, 250, w.format, "auto"), f"M={m}")


@pytest.mark.parametrize("format", EVERY)
def test_torchs_own_check_of_the_ops(format: str) -> None:
    w = weight("genuine", 33, 512, format)
    at = torch.arange(6, device="cuda").view(2, 3)
    for m, formula in ((1, "auto"), (3, "int8"), (20, "bf16")):
        torch.library.opcheck(OPS.linear.default, (inputs(m, 512, BF16), w.tiles, None, 33, w.format, formula))
        arguments = (inputs(m, 512, BF16).view(1, m, 512), w.tiles, bias_of(33, BF16), 33, w.format, formula)
        torch.library.opcheck(OPS.linear.default, arguments)
    torch.library.opcheck(OPS.embedding.default, (at, w.tiles, 33, w.k, w.format, BF16))
    torch.library.opcheck(OPS.embedding.default, (at.int(), w.tiles, 33, w.k, w.format, torch.float32))
    torch.library.opcheck(OPS.dequantize.default, (w.tiles, 33, w.k, w.format, torch.float16))
    torch.library.opcheck(OPS.pack.default, (w.planes, w.format))


def test_under_inference_mode() -> None:
    w, x = weight("genuine", 33, 512, "q6_k"), inputs(3, 512, BF16)
    expected = linear(x, w)
    with torch.inference_mode():
        fp64.assert_same_bits(OPS.linear(x, w.tiles, None, 33, w.format, "auto"), expected)
    learned = x.clone().requires_grad_()
    fp64.assert_same_bits(OPS.linear(learned, w.tiles, None, 33, w.format, "auto"), expected)


@pytest.mark.parametrize("m", [1, 8, 64, 2048])
def test_nothing_waits_for_the_gpu(m: int) -> None:
    w, x = weight("genuine", 1001, 2560, "q6_k"), inputs(m, 2560, BF16)
    at = torch.arange(5, device="cuda")
    calls: list[Any] = [
        lambda: OPS.linear(x, w.tiles, None, 1001, w.format, "auto"),
        lambda: OPS.embedding(at, w.tiles, 1001, w.k, w.format, BF16),
        lambda: OPS.dequantize(w.tiles, 1001, w.k, w.format, BF16),
        lambda: OPS.pack(w.planes, w.format),
    ]
    for call in calls:
        call()  # compiled and loaded now
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("m", "formula"), SIZES)
def test_two_gpus_in_one_process(m: int, formula: str) -> None:
    """Whichever is current: the tensors decide."""
    w, x, bias = weight("genuine", 250, 1024, "q6_k_exact"), inputs(m, 1024, BF16), bias_of(250, BF16)
    expected = linear(x, w, bias, formula)
    second = [t.to("cuda:1") for t in (x, w.tiles, bias)]
    for current in (0, 1):
        with torch.cuda.device(current):
            there = OPS.linear(*second, 250, w.format, formula)
            here = OPS.linear(x, w.tiles, bias, 250, w.format, formula)
            rows = OPS.embedding(torch.arange(9, device="cuda:1"), second[1], 250, w.k, w.format, BF16)
            whole = OPS.dequantize(second[1], 250, w.k, w.format, BF16)
            tiles = OPS.pack([plane.to("cuda:1") for plane in w.planes], w.format)
        assert there.device == rows.device == tiles.device == torch.device("cuda:1")
        assert here.device == torch.device("cuda:0")
        fp64.assert_same_bits(here, expected, "GPU 0")
        fp64.assert_same_bits(there.cpu(), expected.cpu(), "GPU 1")
        fp64.assert_same_bits(rows, whole[:9])
        fp64.assert_same_bits(tiles.cpu(), w.tiles.cpu())
