"""The torch ops: right on every device, honest about their arguments, and at home in torch's compilers."""

from __future__ import annotations

import math
from shutil import which
from typing import Any, Literal

import pytest

import oracles
import packed
from gguf_builder import q6k_blocks

torch = pytest.importorskip("torch")

from devices import DEVICES
from q6k_kernels.ops import accuracy, reference, schema

HALVES = [torch.bfloat16, torch.float16]
FLOATS = [*HALVES, torch.float32]
N, K = 20, 512


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def planes(n: int, k: int, scales: str, device: str = "cpu", seed: int = 5) -> dict[str, torch.Tensor]:
    """Random blocks as a bundle has them, by the per-element oracle."""
    dtypes = {"scale": torch.bfloat16 if scales == "bf16" else torch.int8, "steps": torch.float16}
    arrays = oracles.bundle_arrays(q6k_blocks(n * k // 256, seed), scales)
    return {
        role: torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        .view(dtypes.get(role, torch.uint8)).view(n, -1).to(device)
        for role, raw in arrays.items()
    }  # fmt: skip


def tiles_of(arrays: dict[str, torch.Tensor]) -> torch.Tensor:
    return packed.op_pack(arrays["ql"], arrays["qh"], arrays["scale"], arrays.get("steps"))


def inputs(m: int, k: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(3))
    x[-1:, :32] = 0
    return x.to(dtype).to(device)


def assert_right(
    y: torch.Tensor,
    x: torch.Tensor,
    arrays: dict[str, torch.Tensor],
    bias: Any,
    activations: Literal["int8", "bf16"],
) -> None:
    """Within the tolerance of any order of summation."""
    exact = accuracy.linear(x, packed.exact_of(**arrays), bias, activations=activations)
    found = accuracy.compare(y, exact)
    assert found.first is None, found


@pytest.mark.parametrize("activations", ["int8", "bf16"])
@pytest.mark.parametrize("scales", ["bf16", "exact"])
@pytest.mark.parametrize(("n", "k"), [(N, K), (1, 256), (33, 768), (64, 2304)])
def test_linear_is_the_formula(
    device: str, n: int, k: int, scales: str, activations: Literal["int8", "bf16"]
) -> None:
    arrays = planes(n, k, scales, device)
    tiles = tiles_of(arrays)
    for dtype in HALVES if device == "cuda" else FLOATS:
        bias = torch.linspace(-1, 1, n, device=device).to(dtype)
        for m in (0, 1, 3, 40):
            x = inputs(m, k, dtype, device)
            for b in (None, bias):
                y = packed.op_linear(x, tiles, b, n, activations)
                assert (y.shape, y.dtype, y.device) == ((m, n), dtype, x.device)
                assert_right(y, x, arrays, b, activations)


@pytest.mark.parametrize("activations", ["auto", "int8", "bf16"])
@pytest.mark.parametrize("scales", ["bf16", "exact"])
@pytest.mark.parametrize(("n", "k"), [(N, K), (1, 256), (700, 2304)])
def test_on_the_cpu_tiles_and_planes_give_the_same_bits(
    n: int, k: int, scales: str, activations: Literal["auto", "int8", "bf16"]
) -> None:
    """Also where rows are multiplied in several blocks, which 700 * 2304 weights are."""
    arrays = planes(n, k, scales)
    bias = torch.linspace(-1, 1, n)
    for dtype in FLOATS:
        for m in (1, 5, 33):
            x = inputs(m, k, dtype)
            y = packed.op_linear(x, tiles_of(arrays), bias, n, activations)
            assert torch.equal(y, packed.multiplied(x, **arrays, bias=bias, activations=activations))


def test_auto_is_one_of_the_two(device: str) -> None:
    arrays = planes(N, K, "bf16", device)
    for m in (1, 2, 4, 8, 16, 64, 300):
        x = inputs(m, K, torch.bfloat16, device)
        auto, *others = (packed.op_linear(x, tiles_of(arrays), None, N, each) for each in ("auto", "int8", "bf16"))
        assert any(torch.equal(auto, other) for other in others)


@pytest.mark.parametrize("activations", ["int8", "bf16"])
def test_shapes_and_strides_of_x(device: str, activations: str) -> None:
    tiles = tiles_of(planes(N, K, "exact", device))
    x = inputs(12, K, torch.bfloat16, device)
    y = packed.op_linear(x, tiles, None, N, activations)
    wide = torch.empty(12, 2 * K, dtype=x.dtype, device=device)
    shifted = torch.empty(12 * K + 1, dtype=x.dtype, device=device)[1:].view(12, K)
    for other in (wide[:, ::2], wide[:, K:], shifted, torch.empty_like(x.T).T):
        assert torch.equal(packed.op_linear(other.copy_(x), tiles, None, N, activations), y)
    assert torch.equal(packed.op_linear(x.view(2, 2, 3, K), tiles, None, N, activations), y.view(2, 2, 3, N))
    assert torch.equal(
        packed.op_linear(x.view(3, 4, K).mT.contiguous().mT, tiles, None, N, activations).view(12, N), y
    )
    assert packed.op_linear(x[4], tiles, None, N, activations).shape == (N,)
    assert (
        torch.equal(packed.op_linear(x[:1].expand(12, K), tiles, None, N, activations)[7], y[0]) or device == "cuda"
    )
    for lead in ((0,), (0, 3), (3, 0)):
        nothing = packed.op_linear(x.new_empty(*lead, K), tiles, None, N, activations)
        assert (nothing.shape, nothing.dtype) == ((*lead, N), x.dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scales", ["bf16", "exact"])
def test_weights_and_their_rows_are_the_references_bits(device: str, scales: str, dtype: torch.dtype) -> None:
    arrays = planes(47, 768, scales)
    expected = packed.dequantized(**arrays, dtype=dtype)
    tiles = tiles_of(planes(47, 768, scales, device))
    assert torch.equal(packed.op_dequantize(tiles, 47, dtype).cpu(), expected)
    for indices in (torch.tensor([[46, 0], [16, 8], [15, 15]]), torch.arange(47), torch.empty(0, 3).long()):
        for kind in (torch.int64, torch.int32):
            rows = packed.op_embedding(indices.to(device, kind), tiles, 47, dtype)
            assert (rows.shape, rows.dtype) == ((*indices.shape, 768), dtype)
            assert torch.equal(rows.cpu(), expected[indices])
    assert torch.equal(packed.op_embedding(torch.tensor(5, device=device), tiles, 47, dtype).cpu(), expected[5])
    strided = torch.arange(94, device=device)[::2] // 2
    assert torch.equal(packed.op_embedding(strided, tiles, 47, dtype).cpu(), expected)


def test_many_rows_are_gathered_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = planes(47, 768, "bf16")
    monkeypatch.setattr(reference, "BLOCK_WEIGHTS", 768 * 5)
    indices = torch.arange(1000) * 7 % 47
    expected = packed.dequantized(**arrays, dtype=torch.bfloat16)
    assert torch.equal(packed.op_embedding(indices, tiles_of(arrays), 47, torch.bfloat16), expected[indices])
    assert torch.equal(packed.op_dequantize(tiles_of(arrays), 47, torch.bfloat16), expected)


@pytest.mark.parametrize("scales", ["bf16", "exact"])
@pytest.mark.parametrize("shape", [(1, 256), (47, 768), (16, 512), (3, 5, 256), (2, 32, 512)])
def test_packing_is_the_same_everywhere(device: str, shape: tuple[int, ...], scales: str) -> None:
    count = math.prod(shape[:-1])
    arrays = {role: plane.view(*shape[:-1], -1) for role, plane in planes(count, shape[-1], scales).items()}
    found = tiles_of({role: plane.to(device) for role, plane in arrays.items()})
    assert torch.equal(found.cpu(), packed.tiles_of(**arrays))


@pytest.mark.parametrize("bad", [-1, N, 1 << 40, -(1 << 40)])
def test_an_index_out_of_range_is_named(bad: int) -> None:
    tiles = tiles_of(planes(N, K, "bf16"))
    indices = torch.tensor([[0, N - 1], [bad, -5]])
    with pytest.raises(IndexError, match=rf"indices: expected 0 to {N - 1}, found {bad} at position 2 of 4"):
        packed.op_embedding(indices, tiles, N, torch.bfloat16)


# What is refused, and in which words.

TILES = torch.zeros(2, 2, 3584, dtype=torch.uint8)
X = torch.zeros(3, K, dtype=torch.bfloat16)
LINEAR = {"x": X, "tiles": TILES, "bias": None, "n": N, "activations": "auto"}
INDICES = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[:, :256]}, r"k: 2 tiles of 256 columns hold 257 to 512 weights of a row, .*; found 256"),
        ({"x": X.double()}, r"x: expected bfloat16(,| or) float16.*, found float64 \(3, 512\)"),
        ({"x": X[0, 0]}, r"x: .*found bfloat16 \(\)"),
        ({"tiles": TILES.to(torch.int8)}, r"tiles of q6_k: expected contiguous uint8 .*found int8 \(2, 2, 3584\)"),
        (
            {"tiles": TILES[None]},
            r"found uint8 \(1, 2, 2, 3584\).*of a stack of experts take one, weight\[expert\]",
        ),
        (
            {"tiles": TILES[..., :3583]},
            r"tile_bytes 3584, found uint8 \(2, 2, 3583\)",
        ),
        ({"tiles": TILES.transpose(0, 1)}, r"contiguous.*found uint8 \(2, 2, 3584\), strides \(3584, 7168, 1\)"),
        ({"n": 16}, r"n: 2 tiles of 16 hold 17 to 32 rows, found 16"),
        ({"n": 33}, r"n: 2 tiles of 16 hold 17 to 32 rows, found 33"),
        ({"n": -5}, r"n: .*found -5"),
        (
            {"bias": torch.zeros(N + 1)},
            r"bias: expected bfloat16, float16 or float32 \(20,\), found float32 \(21,\)",
        ),
        ({"bias": torch.zeros(N, dtype=torch.int32)}, r"found int32 \(20,\)"),
        ({"activations": "fp8"}, "activations: expected auto, int8 or bf16, found 'fp8'"),
    ],
)
def test_linear_says_what_it_refuses(device: str, change: dict[str, Any], message: str) -> None:
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) and value.is_contiguous() else value
        for name, value in (LINEAR | change).items()
    }
    if device == "cuda" and not change.get("tiles", TILES).is_contiguous():
        arguments["tiles"] = arguments["tiles"].transpose(0, 1).to(device).transpose(0, 1)
    with pytest.raises(ValueError, match=message):
        packed.op_linear(*arguments.values())


def test_tensors_on_several_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="one device, found x on meta, tiles on cpu"):
        packed.op_linear(X.to("meta"), TILES, None, N, "auto")
    with pytest.raises(ValueError, match="one device, found x on cpu, tiles on cpu, bias on meta"):
        packed.op_linear(X, TILES, torch.zeros(N, device="meta"), N, "auto")
    with pytest.raises(ValueError, match="one device, found indices on cpu, tiles on meta"):
        packed.op_embedding(INDICES, TILES.to("meta"), N, torch.bfloat16)
    arrays = planes(N, K, "bf16")
    with pytest.raises(ValueError, match="one device, found ql on cpu, qh on meta, scale on cpu"):
        packed.op_pack(arrays["ql"], arrays["qh"].to("meta"), arrays["scale"], None)


def test_the_others_say_what_they_refuse(device: str) -> None:
    tiles = TILES.to(device)
    dtypes = "dtype: expected bfloat16, float16 or float32, found torch.float64"
    with pytest.raises(ValueError, match=dtypes):
        packed.op_dequantize(tiles, N, torch.float64)
    with pytest.raises(ValueError, match=dtypes):
        packed.op_embedding(INDICES.to(device), tiles, N, torch.float64)
    with pytest.raises(ValueError, match=r"indices: expected int64 or int32 of any shape, found torch.float32"):
        packed.op_embedding(INDICES.to(device).float(), tiles, N, torch.bfloat16)
    with pytest.raises(ValueError, match=r"n: 2 tiles of 16 hold 17 to 32 rows, found 40"):
        packed.op_embedding(INDICES.to(device), tiles, 40, torch.bfloat16)
    with pytest.raises(ValueError, match=r"found uint8 \(1, 2, 2, 3584\)"):
        packed.op_dequantize(tiles[None], N, torch.bfloat16)
    with pytest.raises(ValueError, match=r"ql: expected uint8"):
        packed.op_pack(tiles[0, 0], tiles[0, 0], tiles[0, 0], None)


def test_every_operation_names_the_weight_type(device: str) -> None:
    """Tiles of another one are refused, though their size would tell which."""
    tiles, x, at = TILES.to(device), X.to(device), INDICES.to(device)
    arrays = list(planes(N, K, "bf16", device).values())
    for format, words, pack_words in (
        (
            "q6_k_exact",
            r"tiles of q6_k_exact: .*3456, found uint8 \(2, 2, 3584\)",
            "planes: q6_k_exact has ql, qh, sc",
        ),
        ("bf16", *["format: expected one of q6_k, q6_k_exact, .*, found 'bf16'"] * 2),
    ):
        for call in (
            lambda of: schema.linear(x, tiles, None, N, of, "auto"),
            lambda of: schema.embedding(at, tiles, N, K, of, torch.float32),
            lambda of: schema.dequantize(tiles, N, K, of, torch.float32),
            lambda of: torch.ops.q6k.embedding_named(at, tiles, N, K, of, "float32"),
            lambda of: torch.ops.q6k.dequantize_named(tiles, N, K, of, "float32"),
        ):
            with pytest.raises(ValueError, match=words):
                call(format)
        with pytest.raises(ValueError, match=pack_words):
            schema.pack(arrays, format)


def test_a_gradient_is_refused_while_it_would_be_recorded(device: str) -> None:
    tiles, x = TILES.to(device), X.to(device)
    bias = torch.zeros(N, device=device)
    for name, pair in (("x", (x.clone().requires_grad_(), bias)), ("bias", (x, bias.clone().requires_grad_()))):
        with pytest.raises(ValueError, match=rf"{name} requires a gradient, and q6k::linear has none: .*no_grad"):
            packed.op_linear(pair[0], tiles, pair[1], N, "auto")
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert not packed.op_linear(pair[0], tiles, pair[1], N, "auto").requires_grad


# torch's compilers.


def cases(device: str) -> list[tuple[Any, tuple[Any, ...]]]:
    arrays = planes(N, K, "exact", device)
    tiles = tiles_of(arrays)
    bias, of = torch.ones(N, device=device), "q6_k_exact"
    return [
        (schema.linear, (inputs(3, K, torch.bfloat16, device), tiles, bias, N, of, "int8")),
        (schema.linear, (inputs(6, K, torch.float16, device).view(2, 3, K), tiles, None, N, of, "bf16")),
        (schema.embedding, (torch.tensor([[3, 19], [0, 1]], device=device), tiles, N, K, of, torch.float16)),
        (schema.dequantize, (tiles, N, K, of, torch.bfloat16)),
        (schema.pack, (list(arrays.values()), of)),
    ]


@pytest.mark.parametrize("case", range(5))
def test_torchs_own_checks_of_an_op_pass(device: str, case: int) -> None:
    op, arguments = cases(device)[case]
    torch.library.opcheck(op, arguments)


def step(tokens: torch.Tensor, tiles: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """An embedding and its tied head, with something between that a compiler can fuse."""
    x = schema.embedding(tokens, tiles, N, K, "q6_k", torch.bfloat16)
    x = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).bfloat16()
    return schema.linear(x, tiles, bias, N, "q6_k", "auto").softmax(-1)


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [
        ("eager", False),
        ("eager", True),
        ("aot_eager", False),
        ("aot_eager", True),
        pytest.param(
            "inductor", True, marks=pytest.mark.skipif(not which("g++"), reason="it needs a C++ compiler")
        ),
    ],
)
def test_compiling_a_whole_graph(device: str, backend: str, dynamic: bool) -> None:
    torch.compiler.reset()
    tiles, bias = tiles_of(planes(N, K, "bf16", device)), torch.ones(N, device=device)
    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)
    with torch.inference_mode():
        for m in (3, 5, 12):
            tokens = torch.arange(m, device=device)
            torch.testing.assert_close(
                compiled(tokens, tiles, bias), step(tokens, tiles, bias), rtol=2**-7, atol=2**-9
            )


@pytest.mark.parametrize("strict", [False, True])
def test_exporting_with_any_number_of_rows(device: str, strict: bool) -> None:
    tiles, bias = tiles_of(planes(N, K, "bf16", device)), torch.ones(N, device=device)

    class Model(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return step(tokens, self.tiles, self.bias)

    model = Model()
    model.register_buffer("tiles", tiles)
    model.register_buffer("bias", bias)
    shapes = {"tokens": {0: torch.export.Dim("m", min=1, max=4096)}}
    program = torch.export.export(model, (torch.arange(3, device=device),), dynamic_shapes=shapes, strict=strict)
    for m in (1, 2, 17):
        tokens = torch.arange(m, device=device)
        assert torch.equal(program.module()(tokens), model(tokens))


def test_meta_tensors_have_the_right_shapes() -> None:
    tiles = TILES.to("meta")
    y = packed.op_linear(torch.empty(2, 5, K, dtype=torch.float16, device="meta"), tiles, None, N, "int8")
    assert (y.shape, y.dtype, y.device.type) == ((2, 5, N), torch.float16, "meta")
    rows = packed.op_embedding(torch.empty(4, dtype=torch.int32, device="meta"), tiles, N, torch.bfloat16)
    assert (rows.shape, rows.dtype) == ((4, K), torch.bfloat16)
    assert packed.op_dequantize(tiles, N, torch.float32).shape == (N, K)


def test_autocast_changes_nothing(device: str) -> None:
    tiles, x = tiles_of(planes(N, K, "bf16", device)), inputs(3, K, torch.float16, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = packed.op_linear(x, tiles, None, N, "bf16")
    assert torch.equal(y, packed.op_linear(x, tiles, None, N, "bf16"))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes_by_name(dtype: torch.dtype, device: str) -> None:
    """What compiled programs call."""
    tiles, at = tiles_of(planes(N, K, "exact", device)), torch.tensor([3, 0, 19], device=device)
    name, of = str(dtype).removeprefix("torch."), "q6_k_exact"
    assert torch.equal(torch.ops.q6k.dequantize_named(tiles, N, K, of, name), packed.op_dequantize(tiles, N, dtype))
    assert torch.equal(
        torch.ops.q6k.embedding_named(at, tiles, N, K, of, name), packed.op_embedding(at, tiles, N, dtype)
    )
    torch.library.opcheck(torch.ops.q6k.embedding_named.default, (at, tiles, N, K, of, name))
    torch.library.opcheck(torch.ops.q6k.dequantize_named.default, (tiles, N, K, of, name))
    for bad in ("float64", "half", ""):
        with pytest.raises(ValueError, match=f"expected bfloat16, float16 or float32, found '{bad}'"):
            torch.ops.q6k.dequantize_named(tiles, N, K, of, bad)
