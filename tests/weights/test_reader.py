"""Loading from a bundle: the same bytes that another program reads, and named errors for what is amiss."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from devices import DEVICES
from gguf_builder import F16, F32, Q3_K, Builder, key_value, small_model, weight
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_kernels.bundle.manifest import BundleError
from q6k_kernels.formats.types import row_of

torch = pytest.importorskip("torch")

from safetensors.torch import load_file

from q6k_kernels.weights import transfer
from q6k_kernels.weights.reader import NotLoadableError, open_bundle
from q6k_kernels.weights.weight import PackedWeight, embedding, linear

F64, BF16, I8, I16, I32, I64 = 28, 30, 24, 25, 26, 27


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def bundle(path: Path, builder: Builder, **options: Any) -> Path:
    source = builder.write(path / "in.gguf")
    convert(source, path / "out", Options(**options))
    return path / "out"


def arrays(directory: Path) -> dict[str, torch.Tensor]:
    """All arrays of a bundle, as the safetensors library reads them."""
    found = dict[str, torch.Tensor]()
    for shard in sorted(directory.glob("*.safetensors")):
        found |= load_file(shard)
    return found


def assert_same(
    found: PackedWeight | torch.Tensor, name: str, stored: dict[str, torch.Tensor], at: Any = ...
) -> None:
    if isinstance(found, PackedWeight):
        for role, plane in zip(found.row.roles, found.planes(), strict=True):
            assert torch.equal(plane.cpu(), stored[f"{name}.{role}"][at]), role
    else:
        assert (found.dtype, found.shape) == (stored[name].dtype, stored[name].shape)
        assert torch.equal(found.cpu(), stored[name])


STACKS = Builder(
    [
        weight("even", (3, 48, 512), seed=1),
        weight("odd", (4, 41, 256), seed=2),
        weight("flat", (100, 768), seed=3),
        weight("row", (1, 256), seed=4),
    ]
)


@pytest.mark.parametrize("max_shard_size", [1 << 30, 1000])
@pytest.mark.parametrize("scales", ["bf16", "exact"])
def test_every_tensor_is_what_is_stored(
    tmp_path: Path, device: str, scales: Literal["bf16", "exact"], max_shard_size: int
) -> None:
    out = bundle(tmp_path, small_model(), scales=scales, max_shard_size=max_shard_size)
    stored, opened = arrays(out), open_bundle(out)
    kinds = dict[str, type]()
    for name in opened:
        found = opened.load(name, device)
        assert found.device.type == device
        assert tuple(found.shape) == tuple(opened.info(name).shape)
        assert_same(found, opened.info(name).name, stored)
        kinds[name] = type(found)
    assert [name for name, kind in kinds.items() if kind is PackedWeight] == [
        "token_embd.weight",
        "blk.0.attn_q.weight",
        "blk.0.ffn_down_exps.weight",
        "blk.0.attn_k.weight",
        "output.weight",
    ]


@pytest.mark.parametrize("slice_bytes", [1, 16 * 1000, 1 << 30])
@pytest.mark.parametrize("scales", ["bf16", "exact"])
def test_slices_join_up(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    scales: Literal["bf16", "exact"],
    slice_bytes: int,
) -> None:
    """Stacks whose weights begin with a tile of their own, and others; slices of one tile and of several."""
    monkeypatch.setattr(transfer, "CPU_SLICE_BYTES", slice_bytes)
    monkeypatch.setattr(transfer, "GPU_SLICE_BYTES", min(slice_bytes, 1 << 20))
    out = bundle(tmp_path, STACKS, scales=scales)
    stored, opened = arrays(out), open_bundle(out)
    for name in opened.names[:4]:
        found = opened.load(name, device)
        assert isinstance(found, PackedWeight)
        assert found.format == row_of("Q6_K", scales).name
        assert_same(found, name, stored)
        if len(found.shape) == 3:
            for expert in range(found.shape[0]):
                one = opened.load(name, device, expert=expert)
                assert one.shape == found.shape[1:]
                assert_same(one, name, stored, expert)


@pytest.mark.parametrize("slice_bytes", [24, 1 << 20])
def test_plain_tensors_of_every_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, slice_bytes: int
) -> None:
    monkeypatch.setattr(transfer, "GPU_SLICE_BYTES", slice_bytes)
    kinds = {"f16": F16, "f32": F32, "f64": F64, "bf16": BF16, "i8": I8, "i16": I16, "i32": I32, "i64": I64}
    tensors = [weight(name, (3, 5), kind) for name, kind in kinds.items()]
    out = bundle(tmp_path, Builder([*tensors, weight("q3", (2, 3, 256), Q3_K), weight("one", (1,), F32)]))
    stored, opened = arrays(out), open_bundle(out)
    found = opened.load_all(device, opened.names[:10])
    assert [str(tensor.dtype).removeprefix("torch.") for tensor in found.values()] == [
        *("float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64", "bfloat16", "float32")
    ]
    for name, tensor in found.items():
        assert_same(tensor, name, stored)


def test_what_a_bundle_says_of_itself(tmp_path: Path) -> None:
    out = bundle(tmp_path, small_model())
    opened = open_bundle(str(out))
    names = [str(tensor.name) for tensor in small_model().tensors]
    assert list(opened) == list(opened.names) == [*names, "output.weight"]
    assert len(opened) == len(names) + 1
    assert opened.tied == {"output.weight": "token_embd.weight"}
    assert all(name in opened for name in opened)
    assert "nothing" not in opened
    assert 5 not in opened
    assert opened.path == out
    assert opened.metadata_path.read_bytes()[:4] == b"GGUF"
    assert opened.info("output_norm.weight").shape == [512]
    assert opened.info("output.weight") is opened.info("token_embd.weight")
    assert repr(opened) == f"Bundle('{out}', llama, 8 tensors)"


def test_a_tied_head_is_the_embedding(tmp_path: Path, device: str) -> None:
    opened = open_bundle(bundle(tmp_path, small_model()))
    loaded = opened.load_all(device)
    assert tuple(loaded) == opened.names
    head, embed = loaded["output.weight"], loaded["token_embd.weight"]
    assert head is embed
    assert isinstance(head, PackedWeight)
    assert opened.load("output.weight", device) is not head
    rows = embedding(torch.arange(5, device=device), head)
    assert linear(rows, head).shape == (5, 5)
    some = opened.load_all(device, ["output.weight", "output_norm.weight"])
    assert list(some) == ["output.weight", "output_norm.weight"]


def test_a_head_of_its_own_is_not_tied(tmp_path: Path) -> None:
    model = small_model()
    model.tensors.append(weight("output.weight", (5, 512), seed=9))
    opened = open_bundle(bundle(tmp_path, model))
    assert opened.tied == {}
    loaded = opened.load_all()
    assert loaded["output.weight"] is not loaded["token_embd.weight"]


def test_no_file_stays_open(tmp_path: Path) -> None:
    out = bundle(tmp_path, small_model())

    def files() -> list[str]:
        return [str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]

    opened = open_bundle(out)
    opened.load_all()
    assert not [name for name in files() if str(out) in name]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("shape", [(4096, 8192), (256, 41, 4096)])
def test_memory_stays_bounded(tmp_path: Path, shape: tuple[int, ...]) -> None:
    out = bundle(tmp_path, Builder([weight("w", shape)]))

    def memory(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found
        return int(found[1]) << 10

    opened = open_bundle(out)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    loaded = opened.load("w")
    assert isinstance(loaded, PackedWeight)
    assert memory("VmHWM") - before < loaded.nbytes + (16 << 20)


# What cannot be loaded.


def test_forms_that_are_not_loaded(tmp_path: Path) -> None:
    out = bundle(tmp_path, small_model(), other="raw", exclude=("output_norm.weight",))
    opened = open_bundle(out)
    with pytest.raises(NotLoadableError, match=r"ffn_up.weight is stored as raw GGUF blocks of Q3_K.*--other bf16"):
        opened.load("blk.0.ffn_up.weight")
    with pytest.raises(NotLoadableError, match=r"output_norm.weight \(F32\) was left out.*--exclude"):
        opened.load("output_norm.weight")
    with pytest.raises(NotLoadableError):
        opened.load_all()


def test_names_devices_and_experts_that_are_not_there(tmp_path: Path) -> None:
    opened = open_bundle(bundle(tmp_path, small_model()))
    for ask in (opened.load, opened.info, lambda name: opened.load_all(names=[name])):
        with pytest.raises(KeyError, match="has no tensor 'nothing'; `names` lists its 8"):
            ask("nothing")
    with pytest.raises(ValueError, match="device: expected cpu or cuda, found meta"):
        opened.load("token_embd.weight", "meta")
    for expert in (-1, 2):
        with pytest.raises(IndexError, match=rf"blk.0.ffn_down_exps.weight has 0 to 1, found {expert}"):
            opened.load("blk.0.ffn_down_exps.weight", expert=expert)
    for name in ("token_embd.weight", "output_norm.weight"):
        with pytest.raises(ValueError, match=rf"expert: {name} is no stack of packed weights"):
            opened.load(name, expert=0)


def test_directories_that_are_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle: it has no bundle.json"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match="is not a bundle"):
        open_bundle(tmp_path / "nothing")


def cut(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 1)


def grow(shard: Path) -> None:
    with shard.open("ab") as file:
        file.write(b"\0")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"model.safetensors: \d+ bytes, expected \d+"),
        (grow, r"model.safetensors: \d+ bytes, expected \d+"),
        (lambda shard: shard.unlink(), "model.safetensors: missing"),
        (lambda shard: shard.write_bytes(b"\xff" * shard.stat().st_size), "model.safetensors: header of"),
        (lambda shard: (shard.parent / "more.safetensors").write_bytes(b""), r"more.safetensors: lies in"),
    ],
)
def test_bundles_that_break_a_rule(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    out = bundle(tmp_path, small_model())
    damage(out / "model.safetensors")
    with pytest.raises(BundleError, match=message):
        open_bundle(out)


def touch(shard: Path) -> None:
    os.utime(shard, ns=(0, 1))


@pytest.mark.parametrize(
    ("damage", "message"), [(cut, r"\d+ bytes, expected \d+"), (grow, r"\d+ bytes"), (touch, "it was written to")]
)
def test_a_file_that_changes_after_opening(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    out = bundle(tmp_path, small_model())
    opened = open_bundle(out)
    damage(out / "model.safetensors")
    for name in ("token_embd.weight", "output_norm.weight"):
        where = rf"model.safetensors, tensor {name}: the file has changed since the bundle was opened: "
        with pytest.raises(BundleError, match=where + message + ".*Open the bundle again"):
            opened.load(name)
    (out / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        opened.load("token_embd.weight")


def test_a_file_that_ends_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = bundle(tmp_path, small_model())
    opened = open_bundle(out)
    real, shard = os.preadv, out / "model.safetensors"

    def short(fd: int, buffers: list[memoryview], at: int) -> int:
        os.truncate(shard, min(shard.stat().st_size, at + 100))
        return real(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", short)
    with pytest.raises(
        BundleError,
        match=r"model.safetensors, tensor token_embd.weight, array ql: expected 1280 bytes .* after 100",
    ):
        opened.load("token_embd.weight")


def test_reads_that_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = bundle(tmp_path, small_model())
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:7]], at))
    for name, found in open_bundle(out).load_all().items():
        if name != "output.weight":
            assert_same(found, name, arrays(out))


def test_a_read_that_fails_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = bundle(tmp_path, small_model())
    opened = open_bundle(out)

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match=r"Input/output error: .*model.safetensors"):
        opened.load("token_embd.weight")


def test_every_key_value_pair_is_kept(tmp_path: Path) -> None:
    import gguf

    out = bundle(tmp_path, Builder([weight("w", (1, 256))], [key_value("general.architecture", "llama")]))
    fields = gguf.GGUFReader(open_bundle(out).metadata_path).fields
    assert fields["general.architecture"].contents() == "llama"
