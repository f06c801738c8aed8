"""Loading many tensors the way to a GPU: through two slices of memory, the same for all of them.

The slices and the copies are stood in for on the CPU, where a copy is made at the last moment at which one on a GPU
may be: before its slice is used anew, and before the device computes with what was copied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from gguf_builder import F32, Builder, small_model, weight
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_kernels.weights import reader, transfer
from q6k_kernels.weights.reader import open_bundle
from q6k_kernels.weights.weight import PackedWeight


class Event:
    """Of a copy: it is made when somebody waits for it."""

    def __init__(self) -> None:
        self.copies: list[tuple[Any, Any]] = []

    def synchronize(self) -> None:
        for out, memory in self.copies:
            out.copy_(memory)
        self.copies.clear()


class StandIn(transfer.Staging):
    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.device = torch.device("cpu")
        self._slices = [torch.empty(0, dtype=torch.uint8)] * 2
        self._copied = [Event(), Event()]  # type: ignore[list-item]
        self._turn = 0
        self.used: list[int] = []

    def next(self, nbytes: int) -> Any:
        pin, torch.empty = torch.empty, lambda size, dtype, pin_memory=False: pin(size, dtype=dtype)
        try:
            memory = super().next(nbytes)
        finally:
            torch.empty = pin
        assert len(memory) == nbytes
        self.used.append(memory.data_ptr())
        return memory

    def copy(self, out: Any) -> None:
        event: Any = self._copied[self._turn]
        assert not event.copies
        event.copies.append((out, self._slices[self._turn][: out.numel()]))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    StandIn.made = 0
    staging = StandIn()
    real = transfer.schema.pack

    def pack(*planes: Any) -> Any:
        finish(staging)  # the stream's order
        return real(*planes)

    monkeypatch.setattr(transfer.schema, "pack", pack)
    monkeypatch.setattr(reader, "way_to", lambda _: staging)
    return staging


def finish(staging: StandIn) -> None:
    for event in staging._copied:
        event.synchronize()


@pytest.mark.parametrize("slice_bytes", [64, 20_000, 1 << 20])
@pytest.mark.parametrize("scales", ["bf16", "exact"])
def test_all_tensors_go_through_the_same_two_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: StandIn, scales: Any, slice_bytes: int
) -> None:
    tensors = [weight("odd", (3, 41, 512), seed=1), weight("flat", (300, 768), seed=2), weight("norm", (700,), F32)]
    model = small_model()
    model.tensors += tensors
    convert(Builder(model.tensors, model.kv).write(tmp_path / "in.gguf"), tmp_path / "out", Options(scales=scales))
    bundle = open_bundle(tmp_path / "out")
    monkeypatch.setattr(transfer, "GPU_SLICE_BYTES", slice_bytes)
    load = bundle.loader("cuda")
    found = {name: load(name) for name in bundle}
    finish(stand_in)
    monkeypatch.setattr(reader, "way_to", transfer.way_to)
    for name, expected in bundle.load_all("cpu").items():
        ours, theirs = (each.tiles if isinstance(each, PackedWeight) else each for each in (found[name], expected))
        assert torch.equal(ours, theirs), name
    assert StandIn.made == 1
    assert stand_in.used[0::2] != stand_in.used[1::2]
    # Memory changes only where a tile of a long row takes more than a slice.
    assert len(set(stand_in.used)) == 2 or slice_bytes < 20_000
    assert all(a != b for a, b in zip(stand_in.used, stand_in.used[1:], strict=False))


def test_a_bundle_makes_one_for_all_of_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: StandIn
) -> None:
    convert(small_model().write(tmp_path / "in.gguf"), tmp_path / "out", Options())
    asked = []
    monkeypatch.setattr(reader, "way_to", lambda device: (asked.append(device), stand_in)[1])
    open_bundle(tmp_path / "out").load_all("cuda")
    assert asked == ["cuda"]
