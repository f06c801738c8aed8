"""`q6k::linear` on a GPU with inputs of every layout and every value; what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

import fp64
import gpu_weights
from gpu_weights import EVERY, KINDS_OF_ROWS, bias_of, inputs, linear, weight, width

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
Layout = Callable[[torch.Tensor], torch.Tensor]


def in_wider_memory(columns: int, first: int) -> Layout:
    """The same values as columns of a wider matrix of NaN, from column `first` on."""

    def place(x: torch.Tensor) -> torch.Tensor:
        wide = x.new_full((len(x), x.shape[1] + columns), float("nan"))
        wide[:, first : first + x.shape[1]] = x
        return wide[:, first : first + x.shape[1]]

    return place


def every_second_column(x: torch.Tensor) -> torch.Tensor:
    wide = x.new_full((len(x), 2 * x.shape[1]), float("nan"))
    wide[:, ::2] = x
    return wide[:, ::2]


def every_third_row(x: torch.Tensor) -> torch.Tensor:
    tall = x.new_full((3 * len(x), x.shape[1]), float("nan"))
    tall[::3] = x
    return tall[::3]


def at_an_odd_offset(x: torch.Tensor) -> torch.Tensor:
    flat = x.new_full((x.numel() + 1,), float("nan"))
    flat[1:] = x.flatten()
    return flat[1:].view(x.shape)


LAYOUTS: dict[str, Layout] = {
    "rows apart, aligned": in_wider_memory(64, 8),
    "rows apart, unaligned": in_wider_memory(64, 3),
    "rows an odd distance apart": in_wider_memory(7, 0),
    "every second column": every_second_column,
    "every third row": every_third_row,
    "transposed": lambda x: x.T.contiguous().T,
    "an odd offset": at_an_odd_offset,
}


@pytest.mark.parametrize("m", [1, 2, 8, 17, 130])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("formula", ["int8", "bf16"])
def test_strides_change_no_bit(formula: str, layout: str, m: int) -> None:
    w, x = weight("genuine", 250, 768, "q6_k"), inputs(m, 768, BF16)
    placed = LAYOUTS[layout](x)
    assert torch.equal(placed, x)
    fp64.assert_same_bits(linear(placed, w, None, formula), linear(x, w, None, formula), layout)


@pytest.mark.parametrize("formula", ["int8", "bf16"])
def test_expanded_and_broadcast_rows(formula: str) -> None:
    w, x = weight("genuine", 250, 768, "q6_k_exact"), inputs(1, 768, FP16)
    exact = fp64.linear(x, w, formula)
    for m in (1, 3, 40):
        y = linear(x.expand(m, 768), w, None, formula)
        fp64.assert_right(y, exact[[0] * m], f"{m}")
    same = x[:, :1].expand(2, 768)  # stride 0 in both dimensions
    fp64.assert_right(linear(same, w, None, formula), fp64.linear(same.contiguous(), w, formula), "stride 0")


@pytest.mark.parametrize("formula", ["auto", "int8", "bf16"])
def test_leading_dimensions(formula: str) -> None:
    w, x = weight("genuine", 33, 512, "q6_k"), inputs(24, 512, BF16)
    for lead in ((24,), (1, 24), (2, 3, 4), (1, 1, 1, 1)):
        rows = x[: torch.Size(lead).numel()]
        y = linear(rows.view(*lead, 512), w, None, formula)
        assert y.shape == (*lead, 33)
        assert y.is_contiguous()
        fp64.assert_same_bits(y.view(-1, 33), linear(rows, w, None, formula), f"{lead}")
    fp64.assert_same_bits(linear(x[5], w, None, formula), linear(x[5:6], w, None, formula)[0], "a vector")
    swapped = x.view(4, 6, 512).transpose(0, 1)
    fp64.assert_same_bits(
        linear(swapped, w, None, formula), linear(swapped.contiguous(), w, None, formula), "swapped"
    )
    for lead in ((0,), (0, 3), (3, 0)):
        y = linear(x.new_empty(*lead, 512), w, None, formula)
        assert (y.shape, y.dtype, y.device) == ((*lead, 33), BF16, x.device)


@pytest.mark.parametrize("m", [1, 16, 300])
@pytest.mark.parametrize("bias_dtype", [BF16, FP16, torch.float32])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("formula", ["int8", "bf16"])
def test_biases(formula: str, dtype: torch.dtype, bias_dtype: torch.dtype, m: int) -> None:
    n, k = 99, 512
    w, x = weight("genuine", n, k, "q6_k_exact"), inputs(m, k, dtype)
    exact = fp64.linear(x, w, formula)
    bias = bias_of(n, bias_dtype)
    for placed in (bias, bias.repeat_interleave(2)[::2], torch.cat((bias[:1], bias))[1:], bias[:1].expand(n)):
        fp64.assert_right(linear(x, w, placed, formula), exact.plus(placed), f"strides {placed.stride()}")
    wild = bias.clone()
    wild[3], wild[4], wild[5] = float("inf"), float("nan"), float("-inf")
    fp64.assert_right(linear(x, w, wild, formula), exact.plus(wild), "not finite")
    learned = bias.clone().requires_grad_()
    fp64.assert_same_bits(linear(x, w, learned, formula), linear(x, w, bias, formula), "a parameter")


@pytest.mark.parametrize("m", [1, 5, 8, 20, 140])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("format", EVERY)
@pytest.mark.parametrize("kind", ["extreme", "random"])
@pytest.mark.parametrize("formula", ["int8", "bf16"])
def test_extreme_weights(formula: str, kind: str, format: str, dtype: torch.dtype, m: int) -> None:
    for n, k in ((61, 256), (250, width(2560, format))):
        w, x = weight(kind, n, k, format), inputs(m, k, dtype)
        fp64.assert_right(linear(x, w, None, formula), fp64.linear(x, w, formula), f"{n}x{k}")


def wild_rows(dtype: torch.dtype, k: int) -> torch.Tensor:
    """One row of each sort, ordinary ones between them."""
    x = inputs(24, k, dtype)
    tiny = 2.0**-24 if dtype == FP16 else 2.0**-133
    x[1] = 0
    x[3, :32] = 0
    x[5, 100] = 1e4 * x[5].float().abs().max().clamp(max=5)
    x[7] = tiny  # the smallest subnormal
    x[9] *= tiny * 100
    x[11, 0] = float("inf")
    x[13, k - 1] = float("nan")
    x[15, 3], x[15, 4] = float("inf"), float("-inf")
    x[17] = torch.arange(k, device=x.device) % 255 - 127  # every code
    x[19] = x[17] / 2  # ties
    x[21] = torch.finfo(dtype).max / 256
    x[22] = -0.0
    x[23] = torch.finfo(dtype).max * 2.0**-32  # large, but no sum overflows
    return x


@pytest.mark.parametrize("format", KINDS_OF_ROWS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("formula", ["int8", "bf16"])
def test_extreme_activations(formula: str, dtype: torch.dtype, format: str) -> None:
    n, k = 131, 1024
    w, x = weight("genuine", n, k, format), wild_rows(dtype, k)
    exact = fp64.linear(x, w, formula)
    if formula == "int8":
        assert torch.nonzero(exact.y.isnan().all(1)).flatten().tolist() == [11, 13, 15]
    fp64.assert_right(linear(x, w, None, formula), exact, "all rows at once")
    for row in range(len(x)):
        fp64.assert_right(linear(x[row : row + 1], w, None, formula), exact[[row]], f"row {row} alone")


@pytest.mark.parametrize("formula", ["int8", "bf16"])
def test_a_row_that_is_not_finite_touches_no_other(formula: str) -> None:
    w, x = weight("genuine", 100, 512, "q6_k"), inputs(17, 512, BF16)
    clean = linear(x, w, None, formula)
    for row in (0, 7, 8, 16):
        spoilt = x.clone()
        spoilt[row, 77] = float("nan")
        y = linear(spoilt, w, None, formula)
        assert y[row].isnan().all()
        keep = torch.arange(17, device=x.device) != row
        fp64.assert_same_bits(y[keep], clean[keep], f"row {row}")


@pytest.mark.parametrize("formula", ["int8", "bf16"])
@pytest.mark.parametrize("m", [1, 12])
def test_weights_past_the_range_of_fp16(formula: str, m: int) -> None:
    ordinary = weight("random", 40, 512, "q6_k_exact")
    large = ordinary.arrays | {"steps": torch.full_like(ordinary.arrays["steps"], 60000)}
    w = gpu_weights.Weight(ordinary.stored, large, ordinary.row)
    for dtype in (BF16, FP16):
        x = inputs(m, 512, dtype) / 64
        fp64.assert_right(linear(x, w, None, formula), fp64.linear(x, w, formula), f"{dtype}")


@pytest.mark.parametrize("m", [1, 8, 40])
@pytest.mark.parametrize("formula", ["int8", "bf16"])
def test_one_code_at_a_time(formula: str, m: int) -> None:
    """Activations that look at one weight each: every lane, group and row of a tile is where it belongs."""
    n, k = 16, 512
    w = weight("random", n, k, "q6_k_exact")
    for at in range(0, k, m):
        x = torch.zeros(m, k, dtype=BF16, device=gpu_weights.DEVICE)
        rows = torch.arange(min(m, k - at), device=x.device)
        x[rows, at + rows] = 1.25
        fp64.assert_right(linear(x, w, None, formula), fp64.linear(x, w, formula), f"from weight {at}")


def test_what_is_refused() -> None:
    w, x = weight("genuine", 33, 512, "q6_k"), inputs(2, 512, BF16)
    op = torch.ops.q6k.linear
    for arguments, words in (
        ((x.float(), w.tiles, None, 33, w.format, "auto"), "bfloat16 or float16"),
        ((x[:, :256], w.tiles, None, 33, w.format, "auto"), "512"),
        ((x, w.tiles, None, 50, w.format, "auto"), "33"),
        ((x, w.tiles, None, 33, w.format, "fp8"), "auto, int8 or bf16"),
        ((x, w.tiles, bias_of(32, BF16), 33, w.format, "auto"), "33"),
        ((x.cpu(), w.tiles, None, 33, w.format, "auto"), "one device"),
        ((x, w.tiles, bias_of(33, BF16).cpu(), 33, w.format, "auto"), "one device"),
    ):
        with pytest.raises(ValueError, match=words):
            op(*arguments)
    with torch.enable_grad(), pytest.raises(ValueError, match="requires a gradient"):
        op(x.clone().requires_grad_(), w.tiles, None, 33, w.format, "auto")
