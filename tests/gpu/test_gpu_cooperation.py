"""Launches whose blocks wait for each other: a ring through all multiprocessors, alone, dependent and recorded."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from q6k_kernels.cuda import device as launching
from q6k_kernels.errors import BlocksNotResidentError
from q6k_kernels.jit import loader
from ring_of_blocks import WAITS, after_ring, ring, source

pytestmark = pytest.mark.gpu


class Ring:
    """A kernel that hands values round its blocks, and room for the words of as many as are resident."""

    def __init__(self, folder: Path, wait: str, threads: int, shared_bytes: int | None = None) -> None:
        (folder / "common.cuh").write_text("")
        (folder / "ring.cuh").write_text(source(ring(WAITS[wait])))
        self.device = launching.device(torch.cuda.current_device())
        self.kernel = loader.load("ring.cuh", "test", (), self.device.index, sources=folder)
        self.threads, self.shared_bytes = threads, shared_bytes or self.device.shared_bytes
        self.blocks = self.kernel.most_blocks(threads, self.shared_bytes) * self.device.multiprocessors
        self.values = torch.arange(0, 3 * threads, 3, dtype=torch.int32, device="cuda")
        self.words = torch.zeros(self.blocks, threads, dtype=torch.int32, device="cuda")

    def launch(self, blocks: int, *, dependent: bool = False) -> None:
        self.words.zero_()
        arguments = struct.pack("@PP", self.values.data_ptr(), self.words.data_ptr())
        self.kernel.launch(
            (blocks, 1, 1),
            self.threads,
            arguments,
            stream=launching.stream(self.device),
            shared_bytes=self.shared_bytes,
            dependent=dependent,
            cooperative=True,
        )

    def check(self, blocks: int) -> None:
        np.testing.assert_array_equal(
            self.words[:blocks].cpu().numpy(), after_ring(self.values.cpu().numpy(), blocks)
        )


@pytest.mark.parametrize("wait", WAITS)
def test_a_ring_through_all_multiprocessors(wait: str, tmp_path: Path) -> None:
    wanted = Ring(tmp_path, wait, 512)
    assert wanted.blocks == wanted.device.multiprocessors
    for dependent in {False, wanted.device.arch >= 90}:
        for _ in range(3):
            wanted.launch(wanted.blocks, dependent=dependent)
        wanted.check(wanted.blocks)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            wanted.launch(wanted.blocks, dependent=dependent)
            wanted.launch(wanted.blocks, dependent=dependent)
        wanted.words.zero_()
        graph.replay()
        graph.replay()
        wanted.check(wanted.blocks)


@pytest.mark.parametrize(("threads", "shared_bytes"), [(1024, 4096), (256, 16 << 10), (128, 90 << 10), (512, None)])
def test_as_many_blocks_run_as_have_room_and_no_more(
    threads: int, shared_bytes: int | None, tmp_path: Path
) -> None:
    wanted = Ring(tmp_path, "sleep", threads, shared_bytes)
    with pytest.raises(BlocksNotResidentError, match=f"the {wanted.blocks + 1} blocks of test wait for each other"):
        wanted.launch(wanted.blocks + 1)
    wanted.launch(wanted.blocks)
    wanted.check(wanted.blocks)
    assert wanted.kernel.most_blocks(threads, wanted.device.shared_bytes + 1) == 0
