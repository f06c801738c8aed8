"""Packed weights as objects: what they say of themselves, how they are cut, joined, moved and saved."""

from __future__ import annotations

import copy
import copyreg
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from packed import multiplied, numbers, planes, weight

torch = pytest.importorskip("torch")

from q6k_kernels.formats.types import WEIGHT_TYPES
from q6k_kernels.weights.weight import PackedWeight, dequantize, embedding, linear

SHAPES = [(1, 256), (40, 512), (3, 20, 256)]


@pytest.mark.parametrize("scales", ["bf16", "exact"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_it_says_of_itself(shape: tuple[int, ...], scales: str) -> None:
    packed = weight(shape, scales)
    tiles = -(-shape[-2] // 16) * shape[-1] // 256 * (shape[0] if len(shape) == 3 else 1)
    assert packed.shape == shape
    assert type(packed.shape) is tuple
    name = "q6_k" if scales == "bf16" else "q6_k_exact"
    assert (packed.n, packed.k, packed.format, packed.device.type) == (*shape[-2:], name, "cpu")
    assert packed.row is WEIGHT_TYPES[name]
    assert packed.nbytes == packed.tiles.nbytes == tiles * (3584 if scales == "bf16" else 3456)
    assert repr(packed).startswith(f"PackedWeight({shape}, '{name}', device='cpu', ")
    with pytest.raises(AttributeError):
        packed.shape = (1, 1)  # type: ignore[misc]


def test_its_size_is_told() -> None:
    tiles = torch.zeros(64, 16, 3584, dtype=torch.uint8)
    assert "3.5 MiB)" in repr(PackedWeight(tiles, (1024, 4096), "q6_k"))


@pytest.mark.parametrize("scales", ["bf16", "exact"])
@pytest.mark.parametrize("shape", SHAPES)
def test_planes_and_numbers(shape: tuple[int, ...], scales: str) -> None:
    packed = weight(shape, scales)
    for found, plane in zip(packed.planes(), planes(shape, scales).values(), strict=True):
        assert torch.equal(found, plane)
    assert torch.equal(packed.dequantize(torch.bfloat16), numbers(shape, scales))
    assert torch.equal(dequantize(packed), numbers(shape, scales))
    assert packed.dequantize(torch.float32).dtype == torch.float32


def test_operations_take_it_whole() -> None:
    packed, arrays = weight((40, 512)), planes((40, 512), "bf16")
    x, bias = torch.randn(3, 512).bfloat16(), torch.randn(40)
    assert torch.equal(linear(x, packed), multiplied(x, **arrays))
    assert torch.equal(linear(x, packed, bias=bias), multiplied(x, **arrays, bias=bias))
    found = linear(x, packed, bias, "int8")
    assert torch.equal(found, multiplied(x, **arrays, bias=bias, activations="int8"))
    assert torch.equal(embedding(torch.tensor([39, 2]), packed), numbers((40, 512))[[39, 2]])
    assert embedding(torch.tensor([39, 2]), packed, torch.float16).dtype == torch.float16
    with pytest.raises(ValueError, match=r"of a stack of experts take one, weight\[expert\]"):
        linear(torch.zeros(3, 256), weight((3, 20, 256)))


def test_experts_of_a_stack_share_its_memory() -> None:
    stack, expected = weight((3, 20, 256), "exact"), numbers((3, 20, 256), "exact")
    for expert in (0, 2, -1):
        one = stack[expert]
        assert one.shape == (20, 256)
        assert torch.equal(one.dequantize(), expected[expert])
        assert one.tiles.untyped_storage().data_ptr() == stack.tiles.untyped_storage().data_ptr()
    assert [one.shape for one in stack] == [(20, 256)] * 3
    for expert in (3, -4):
        with pytest.raises(IndexError, match=rf"expert: expected 0 to 2, found {expert}"):
            stack[expert]
    with pytest.raises(ValueError, match=r"only a stack \(E, N, K\) has experts to index, found \(40, 512\)"):
        weight((40, 512))[0]


@pytest.mark.parametrize(("start", "stop"), [(0, 40), (0, 16), (16, 32), (32, 40), (16, 40)])
def test_rows_share_its_memory(start: int, stop: int) -> None:
    packed = weight((40, 512))
    part = packed.rows(start, stop)
    assert part.shape == (stop - start, 512)
    assert torch.equal(part.dequantize(), numbers((40, 512))[start:stop])
    assert part.tiles.data_ptr() == packed.tiles[start // 16].data_ptr()


@pytest.mark.parametrize(("start", "stop"), [(1, 40), (0, 17), (0, 48), (-16, 16), (16, 16), (32, 16), (0, 0)])
def test_rows_that_are_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=rf"multiples of 16 \(or stop = 40\), found {start} to {stop}"):
        weight((40, 512)).rows(start, stop)


def test_weights_below_each_other() -> None:
    parts = [weight((32, 512), seed=1), weight((16, 512), seed=2), weight((7, 512), seed=3)]
    joined = PackedWeight.cat(parts)
    assert joined.shape == (55, 512)
    expected = torch.cat([numbers((n, 512), seed=seed) for seed, n in ((1, 32), (2, 16), (3, 7))])
    assert torch.equal(joined.dequantize(), expected)
    x = torch.randn(2, 512)
    apart = torch.cat([linear(x, part) for part in parts], dim=-1)
    torch.testing.assert_close(linear(x, joined), apart)
    stacks = [weight((2, 16, 256), seed=1), weight((2, 3, 256), seed=2)]
    joined = PackedWeight.cat(stacks)
    assert joined.shape == (2, 19, 256)
    expected = torch.cat([numbers((2, 16, 256), seed=1), numbers((2, 3, 256), seed=2)], dim=1)
    assert torch.equal(joined.dequantize(), expected)
    assert torch.equal(PackedWeight.cat(parts[:1]).tiles, parts[0].tiles)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([], "expected one or more, found none"),
        ([(7, 512), (16, 512)], "N a multiple of 16 for all but the last, found 7 at 0"),
        ([(16, 512), (16, 256)], r"all but N as in \(16, 512\) of q6_k, found \(16, 256\) of q6_k at 1"),
        ([(2, 16, 256), (3, 16, 256)], r"found \(3, 16, 256\)"),
        ([(16, 256), (1, 16, 256)], r"found \(1, 16, 256\)"),
    ],
)
def test_weights_that_do_not_join(shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedWeight.cat([weight(shape) for shape in shapes])


def test_weight_types_do_not_mix() -> None:
    with pytest.raises(ValueError, match=r"\(16, 256\) of q6_k, found \(16, 256\) of q6_k_exact at 1"):
        PackedWeight.cat([weight((16, 256)), weight((16, 256), "exact")])


def test_moving() -> None:
    packed = weight((40, 512))
    assert packed.to("cpu") is packed
    assert packed.cpu() is packed
    moved = packed.to("meta")
    assert (moved.device.type, moved.shape) == ("meta", (40, 512))


def saved(thing: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("scales", ["bf16", "exact"])
@pytest.mark.parametrize("shape", SHAPES)
def test_saving_and_loading(shape: tuple[int, ...], scales: str) -> None:
    packed = weight(shape, scales)
    copies = [
        torch.load(saved(packed), weights_only=True),
        torch.load(saved({"w": [packed]}), weights_only=True)["w"][0],
        PackedWeight.from_state_dict(torch.load(saved(packed.state_dict()), weights_only=True)),
        pickle.loads(pickle.dumps(packed)),
        copy.deepcopy(packed),
        copy.copy(packed),
    ]
    for other in copies:
        assert isinstance(other, PackedWeight)
        assert (other.shape, other.format) == (shape, packed.format)
        assert torch.equal(other.tiles, packed.tiles)
    assert copies[-2].tiles.data_ptr() != packed.tiles.data_ptr()


def test_two_that_share_are_saved_once() -> None:
    packed = weight((64, 512))
    file = saved([packed, packed.rows(0, 16), packed])
    assert len(file.getvalue()) < 1.5 * packed.nbytes
    whole, part, again = torch.load(file, weights_only=True)
    assert whole is again
    assert part.tiles.data_ptr() == whole.tiles.data_ptr()


@pytest.mark.parametrize("way", ["without the constructor", "changed after it"])
def test_a_file_cannot_make_a_weight_around_the_constructor(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    good = weight((40, 512))
    state = {"tiles": good.tiles, "shape": (1 << 20, 512), "format": good.format}
    steps = {
        "without the constructor": (copyreg.__newobj__, (PackedWeight,), state),
        "changed after it": (PackedWeight, (good.tiles, good.shape, good.format), state),
    }[way]
    monkeypatch.setattr(PackedWeight, "__reduce__", lambda _: steps)
    file = saved(good)
    monkeypatch.undo()
    with pytest.raises((TypeError, pickle.UnpicklingError)):
        torch.load(file, weights_only=True)


def test_a_loaded_weight_does_not_change_with_the_tensor_of_its_file() -> None:
    """A pickle can give a loaded tensor other memory (BUILD), so the weight has a tensor of its own."""
    packed = weight((40, 512))
    tiles, loaded = torch.load(saved((packed.tiles, packed)), weights_only=True)
    tiles.set_(torch.zeros(1, dtype=torch.uint8))
    assert torch.equal(loaded.tiles, packed.tiles)


def test_what_was_saved_is_checked_when_it_is_loaded() -> None:
    packed = weight((40, 512))
    object.__setattr__(packed, "shape", (50, 512))
    with pytest.raises((ValueError, pickle.UnpicklingError), match="3 tiles of 16 hold 33 to 48 rows, found 50"):
        torch.load(saved(packed), weights_only=True)
    with pytest.raises(ValueError, match="state: expected tiles, shape, format, found nothing"):
        PackedWeight.from_state_dict({})
    state = weight((40, 512)).state_dict()
    with pytest.raises(ValueError, match="state: expected tiles, shape, format, found shape, tiles"):
        PackedWeight.from_state_dict({"tiles": state["tiles"], "shape": state["shape"]})
    exact = weight((40, 512), "exact").state_dict()["format"]
    with pytest.raises(ValueError, match="tiles of q6_k_exact: .*tile_bytes 3456, found"):
        PackedWeight.from_state_dict(state | {"format": exact})
    with pytest.raises(ValueError, match="format: expected one of q6_k, q6_k_exact, .*, mxfp4, found 'q6\ufffd'"):
        PackedWeight.from_state_dict(state | {"format": torch.tensor([*b"q6", 200], dtype=torch.uint8)})


TILES = torch.zeros(3, 2, 3584, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tiles", "shape", "message"),
    [
        (TILES, (49, 512), r"3 tiles of 16 hold 33 to 48 rows, found 49"),
        (TILES, (40, 256), r"k: 2 tiles of 256 columns hold 257 to 512 weights of a row, .*; found 256"),
        (TILES, (1, 40, 512), r"shape: expected \(N, K\) with tiles of 3.*, found \(1, 40, 512\) with tiles of 3"),
        (TILES[None], (2, 40, 512), r"shape: expected 1 weights for these tiles, found \(2, 40, 512\)"),
        (TILES[None], (40, 512), r"found \(40, 512\) with tiles of 4"),
        (TILES, (512,), r"found \(512,\) with tiles of 3"),
        (TILES.float(), (40, 512), r"tiles of q6_k: expected contiguous uint8 .*found float32 \(3, 2, 3584\)"),
        (TILES[:, :1], (40, 256), r"tiles of q6_k: .*strides"),
    ],
)
def test_what_does_not_belong_together(tiles: torch.Tensor, shape: tuple[int, ...], message: str) -> None:
    assert PackedWeight(TILES, (40, 512), "q6_k").n == 40
    with pytest.raises(ValueError, match=message):
        PackedWeight(tiles, shape, "q6_k")


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("q6_k_exact", r"tiles of q6_k_exact: .*tile_bytes 3456, found uint8 \(3, 2, 3584\)"),
        ("Q6_K", "format: expected one of q6_k, q6_k_exact, .*, mxfp4, found 'Q6_K'"),
    ],
)
def test_the_weight_type_is_no_guess(format: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedWeight(TILES, (40, 512), format)
    with pytest.raises(ValueError, match=r"planes: q6_k_exact has .*found 3 tensors|found 'Q6_K'"):
        PackedWeight.from_planes([*planes((40, 512), "bf16").values()], format)


def test_compiling_code_that_uses_one() -> None:
    stack = weight((3, 32, 256))

    def layer(x: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
        return torch.relu(linear(x, packed)) + linear(x, stack[1])

    x = torch.randn(3, 256)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, stack[0]), layer(x, stack[0]))
    assert torch.equal(compiled(x, stack[2]), layer(x, stack[2]))


def test_the_package_imports_torch_when_it_is_needed() -> None:
    program = """
import sys, q6k_kernels
assert "torch" not in sys.modules
assert {"PackedWeight", "open_bundle"} <= set(dir(q6k_kernels))
from q6k_kernels import PackedWeight, PackedLinear, PackedEmbedding, open_bundle, linear, dequantize, embedding
from q6k_kernels import load_model
assert "torch" in sys.modules
assert "transformers" not in sys.modules
assert q6k_kernels.linear is linear
assert set(q6k_kernels.__all__) <= set(vars(q6k_kernels)) | {"Bundle"}
try:
    q6k_kernels.nothing
except AttributeError as error:
    assert "no attribute 'nothing'" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_tiles_are_of_the_documented_size() -> None:
    sizes = {name: row.tile_bytes for name, row in WEIGHT_TYPES.items()}
    lines = {
        "q6_k": 28, "q6_k_exact": 27, "q4_k": 19, "q5_k": 23, "q8_0": 34, "q5_0": 22,
        "q4_0": 18, "q4_1": 20, "q5_1": 24, "iq4_nl": 18, "iq4_xs": 18, "mxfp4": 17,
    }  # fmt: skip
    assert sizes == {name: 128 * count for name, count in lines.items()}
