"""Stream the source through the encoders into the bundle: in parallel, in pieces that fit the cache.

Workers read a piece, encode it and write its arrays at their offsets. The calling thread takes the
finished pieces in source order and adds them to the checksums. The output therefore does not depend on
the number of workers, and memory depends on nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import xxhash

from q6k_convert.convert.plan import Plan, TensorPlan
from q6k_convert.convert.repack import array_bytes, dequantize, dequantizes_natively, first_nonfinite, to_planes
from q6k_convert.text import displayable
from q6k_kernels.bundle.manifest import SourceFile
from q6k_kernels.bundle.writer import BundleWriter
from q6k_kernels.formats.blocks import STEPS, ScaleNumber, block_bytes
from q6k_kernels.formats.types import weight_type
from q6k_kernels.gguf.file import GGUFFile

PIECE_BYTES = 3_400_000
"""Most source bytes in a piece. Smaller pieces cost more time in Python than they save."""
BUFFER_BYTES = 128 << 20
"""About the most bytes of all buffers together, for any number of workers."""
DEQUANTIZED_WEIGHTS = 1 << 17
"""Most weights in a piece that the gguf package dequantises; its temporary arrays are many times as large."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A range of a source file: part of a tensor, or bytes outside all tensors (tensor None)."""

    part: GGUFFile
    offset: int
    nbytes: int
    tensor: TensorPlan | None = None
    at: int = 0  # bytes of the tensor before this piece


class _Slot:
    """Buffers for one piece in progress, of at most `most` source bytes."""

    def __init__(self, plan: Plan, most: int) -> None:
        self.source = memoryview(bytearray(most))
        rows = [weight_type(name) for name in {tensor.format for tensor in plan.tensors} if name is not None]
        sizes = [most // block_bytes(row) * sum(array_bytes(row).values()) for row in rows]
        native = any(
            tensor.storage == "dequantized" and dequantizes_natively(tensor.record.type.name)
            for tensor in plan.tensors
        )
        self._target = memoryview(bytearray(max([*sizes, most if native else 0])))

    def arrays(self, sizes: Mapping[str, int]) -> dict[str, memoryview]:
        """Return one buffer for each role, of the given sizes in bytes, cut from the target memory."""
        ends = accumulate(sizes.values())
        return {role: self._target[end - size : end] for (role, size), end in zip(sizes.items(), ends, strict=True)}


@dataclass(frozen=True, slots=True)
class _Done:
    """A piece that has been written and waits to be hashed in order."""

    source: memoryview
    arrays: list[tuple[str, memoryview]]


def stream(plan: Plan, writer: BundleWriter, jobs: int, progress: Callable[[int], None]) -> list[SourceFile]:
    """Run the plan: write and hash every array, and hash every source file.

    Args:
        plan: the plan, with its model open.
        writer: writer of the bundle, made for the plan's shards.
        jobs: worker threads.
        progress: called in the calling thread with the number of source bytes newly done.

    Returns:
        The source files with their checksums.

    Raises:
        GgufRejectedError: a block has a scale that is not finite, and the options forbid it.
        GgufReadError, OSError: reading or writing failed.
    """
    hashes = {part.path: xxhash.xxh3_128() for part in plan.model.parts}
    under_way = deque[tuple[_Piece, _Slot, Future[_Done]]]()
    slots = jobs + 2
    most = min(PIECE_BYTES, BUFFER_BYTES // (2 * slots))
    free = [_Slot(plan, most) for _ in range(slots)]
    pool = ThreadPoolExecutor(jobs, "encode")

    def finish_oldest() -> None:
        piece, slot, future = under_way.popleft()
        done = future.result()
        hashes[piece.part.path].update(done.source)
        for key, data in done.arrays:
            writer.hash(key, data)
        free.append(slot)
        progress(piece.nbytes)

    try:
        for piece in _pieces(plan, most):
            if not free:
                finish_oldest()
            slot = free.pop()
            under_way.append((piece, slot, pool.submit(_process, plan, writer, piece, slot)))
        while under_way:
            finish_oldest()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    for part in plan.model.parts:
        part.check_unchanged()
    return [
        SourceFile(displayable(part.path.name), part.size, hashes[part.path].hexdigest())
        for part in plan.model.parts
    ]


def _pieces(plan: Plan, most: int) -> Iterator[_Piece]:
    """Yield all bytes of all parts in order, also those between tensors, which the checksum covers."""
    by_part: dict[Any, list[TensorPlan]] = {}
    for tensor in plan.tensors:
        by_part.setdefault(tensor.part, []).append(tensor)
    for part in plan.model.parts:
        at = 0
        for tensor in by_part.get(part, []):
            record = tensor.record
            yield from _cut(part, at, record.offset, None, most)
            yield from _cut(part, record.offset, record.offset + record.nbytes, tensor, _piece_bytes(tensor, most))
            at = record.offset + record.nbytes
        yield from _cut(part, at, part.size, None, most)


def _cut(part: GGUFFile, begin: int, end: int, tensor: TensorPlan | None, step: int) -> Iterator[_Piece]:
    for offset in range(begin, end, step):
        yield _Piece(part, offset, min(step, end - offset), tensor, offset - begin)


def _piece_bytes(tensor: TensorPlan, most: int) -> int:
    """Return the bytes of a tensor's pieces, at most `most`: whole blocks."""
    block_weights, size = tensor.record.block
    if tensor.storage != "dequantized":
        return most // size * size
    weights = most // 2 if dequantizes_natively(tensor.record.type.name) else DEQUANTIZED_WEIGHTS
    return min(weights // block_weights, most // size) * size


def _process(plan: Plan, writer: BundleWriter, piece: _Piece, slot: _Slot) -> _Done:
    """Read, encode and write one piece; runs in a worker."""
    source = slot.source[: piece.nbytes]
    piece.part.read_into(source, piece.offset)
    arrays = list[tuple[str, memoryview]]()
    if piece.tensor is not None:
        for role, at, data in _encode(plan, piece, piece.tensor, source, slot):
            key = piece.tensor.arrays[role].key
            writer.write(key, at, data)
            arrays.append((key, data))
    return _Done(source, arrays)


def _encode(
    plan: Plan, piece: _Piece, tensor: TensorPlan, source: memoryview, slot: _Slot
) -> Iterator[tuple[str, int, memoryview]]:
    """Yield the encoded arrays of a piece of a tensor: role, byte offset in the array, data."""
    if tensor.storage == "skipped":
        return
    block_weights, size = tensor.record.block
    first, count = piece.at // size, piece.nbytes // size
    if not plan.options.allow_nonfinite:
        bad = first_nonfinite(source, size, STEPS.get(tensor.record.type.name, ()))
        if bad is not None:
            raise _not_finite(tensor, first + bad[0], bad[1])
    if tensor.format is not None:
        row = weight_type(tensor.format)
        each = array_bytes(row)
        planes = slot.arrays({role: count * bytes_out for role, bytes_out in each.items()})
        to_planes(source, planes, row)
        for role, data in planes.items():
            yield role, first * each[role], data
    elif tensor.storage == "dequantized":
        yield "data", 2 * first * block_weights, _dequantized(source, tensor, count * block_weights, slot)
    else:
        yield "data", piece.at, source


def _dequantized(source: memoryview, tensor: TensorPlan, weights: int, slot: _Slot) -> memoryview:
    """Return the weights of blocks as bf16."""
    if dequantizes_natively(tensor.record.type.name):
        target = slot.arrays({"data": 2 * weights})["data"]
        dequantize(source, target, tensor.record.type.name)
        return target
    # Imported here: importing them takes longer than planning a model without such tensors.
    import gguf
    import numpy as np

    from q6k_kernels.formats.planes import round_to_bf16

    # As one row: the package works row by row, and is slow on narrow rows.
    row = np.frombuffer(source, dtype=np.uint8).reshape(1, -1)
    with np.errstate(all="ignore"):
        values = gguf.dequantize(row, gguf.GGMLQuantizationType[tensor.record.type.name])
        bits = round_to_bf16(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
    return bits.view(np.uint8).data


def _not_finite(tensor: TensorPlan, block: int, number: ScaleNumber) -> Exception:
    record = tensor.record
    block_weights, size = record.block
    row, column = divmod(block, record.shape[-1] // block_weights)
    return tensor.part.reject(
        f"tensor {record.name!r}",
        f"block {block} (row {row}, block {column} of it) has a scale {number.name} that is NaN or infinite",
        record.offset + block * size + number.at,
        remedy="The file is damaged or badly quantised; --allow-nonfinite keeps such blocks unchanged.",
    )
