"""Compare a bundle with its source: recompute every tensor from the GGUF, and measure how exact the bundle is.

The recomputation shares no code with the conversion's fast path: blocks go through `blocks.decode`
and `planes.pack`, both plain numpy. Errors are relative to the weights that the GGUF defines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from q6k_kernels.bundle.manifest import METADATA_NAME, Manifest, StoredTensor
from q6k_kernels.bundle.structure import Entry, Finding, read_header
from q6k_kernels.formats import planes
from q6k_kernels.formats.blocks import BLOCK_BYTES, D_AT, SCALES_AT, decode
from q6k_kernels.formats.ggml import GROUP, TYPE_SIZES
from q6k_kernels.gguf.file import GGUFFile
from q6k_kernels.gguf.model import GGUFModel, open_gguf
from q6k_kernels.gguf.tensors import TensorRecord

Bytes = npt.NDArray[np.uint8]
PIECE_WEIGHTS = 1 << 18
"""Weights compared at a time: a multiple of every block size, and few enough for a core's cache."""


@dataclass
class Exactness:
    """Comparison of a stored tensor with GGUF's weights.

    Attributes:
        equal: whether the stored arrays equal those recomputed from the source, bit for bit.
        signal: sum of the squares of GGUF's weights.
        noise: sum of the squares of the differences of the stored weights from them.
        max_scale_error: largest relative error of a stored scale; None where there are no scales.
    """

    equal: bool = True
    signal: float = 0.0
    noise: float = 0.0
    max_scale_error: float | None = None

    @property
    def exact(self) -> bool:
        """Whether every weight equals GGUF's."""
        return self.equal and self.noise == 0

    @property
    def snr_db(self) -> float | None:
        """Signal-to-noise ratio, 10 log10(signal / noise), in dB; None if one of the two is zero or not finite."""
        if not (self.signal > 0 and self.noise > 0 and math.isfinite(self.signal + self.noise)):
            return None
        return 10 * math.log10(self.signal / self.noise)

    def add(self, other: Exactness) -> None:
        """Add the figures of another part of the model."""
        self.equal &= other.equal
        self.signal += other.signal
        self.noise += other.noise
        if other.max_scale_error is not None:
            self.max_scale_error = max(self.max_scale_error or 0.0, other.max_scale_error)


@dataclass
class SourceReport:
    """Results of the stage: findings, figures for each tensor, and the total."""

    findings: list[Finding] = field(default_factory=list)
    tensors: dict[str, Exactness] = field(default_factory=dict)
    total: Exactness = field(default_factory=Exactness)


def check_source(
    directory: Path, manifest: Manifest, source: Path, *, jobs: int, progress: Callable[[int], None]
) -> SourceReport:
    """Compare a bundle, sound in structure and content, with the GGUF that it claims to be made from.

    Raises:
        GgufError: the GGUF cannot be read.
        OSError: the bundle cannot be read.
    """
    report = SourceReport()
    with open_gguf(source) as model:
        report.findings += _check_listing(manifest, model)
        report.findings += _check_metadata(directory, model)
        if report.findings:
            return report
        report.findings += _check_checksums(manifest, model, progress)
        shards = {name: read_header(directory / name) for name in manifest.files if name.endswith(".safetensors")}
        stored = {tensor.name: tensor for tensor in manifest.tensors}
        with ThreadPoolExecutor(jobs, "compare") as pool:

            def compare(item: tuple[GGUFFile, TensorRecord]) -> tuple[Exactness, list[Finding]]:
                part, record = item
                comparison = _Comparison(directory, shards, stored[record.name], part, record)
                return comparison.run()

            records = [item for item in model.tensors() if stored[item[1].name].arrays]
            try:
                for (_, record), (exactness, findings) in zip(records, pool.map(compare, records), strict=True):
                    report.tensors[record.name] = exactness
                    report.total.add(exactness)
                    report.findings += findings
                    progress(record.nbytes)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return report


def source_bytes(manifest: Manifest) -> int:
    """Return the bytes that `check_source` reports as progress: every source byte is hashed, then compared."""
    return 2 * sum(source.size for source in manifest.sources)


def _check_listing(manifest: Manifest, model: GGUFModel) -> Iterator[Finding]:
    """Find the first difference between the source's tensors and the manifest's."""
    found = [(r.name, r.type.name, list(r.shape)) for _, r in model.tensors()]
    listed = [(t.name, t.type, t.shape) for t in manifest.tensors]
    name = model.parts[0].path.name
    if manifest.architecture != model.architecture:
        problem = f"the source is of architecture {model.architecture!r}, the bundle of {manifest.architecture!r}"
        yield Finding(problem, name)
    elif found != listed:
        for ours, theirs in zip(listed, found, strict=False):
            if ours != theirs:
                problem = f"the source has {theirs[0]!r} {theirs[1]} {theirs[2]} in its place"
                yield Finding(f"the bundle has {ours[1]} {ours[2]}; {problem}", name, ours[0])
                return
        yield Finding(f"the source has {len(found)} tensors, the bundle lists {len(listed)}", name)


def _check_metadata(directory: Path, model: GGUFModel) -> Iterator[Finding]:
    """Find the first difference between the source's key-value pairs and `metadata.gguf`."""
    with (directory / METADATA_NAME).open("rb") as file:
        at = 0
        for piece in model.metadata():
            if (stored := file.read(len(piece))) != piece:
                at += next((i for i, (a, b) in enumerate(zip(stored, piece, strict=False)) if a != b), len(stored))
                yield Finding(f"differs from the source's keys at byte {at}{_key_at(model, at)}", METADATA_NAME)
                return
            at += len(piece)
        if file.read(1):
            yield Finding(f"goes on after the source's keys, which end at byte {at}", METADATA_NAME)


def _key_at(model: GGUFModel, at: int) -> str:
    if len(model.parts) == 1:
        for _, kv in model.key_values():
            if kv.start <= at < kv.end:
                return f", in key {kv.key!r}"
    return ""


def _check_checksums(manifest: Manifest, model: GGUFModel, progress: Callable[[int], None]) -> Iterator[Finding]:
    """Check that the files are those the bundle was made from; their names may differ."""
    if len(manifest.sources) != len(model.parts):
        problem = f"made from {len(manifest.sources)} files, this source has {len(model.parts)}"
        yield Finding(problem, model.parts[0].path.name)
        return
    for recorded, part in zip(manifest.sources, model.parts, strict=True):
        hasher = xxhash.xxh3_128()
        for at in range(0, part.size, 4 << 20):
            piece = part.read(at, min(4 << 20, part.size - at))
            hasher.update(piece)
            progress(len(piece))
        if (recorded.size, recorded.checksum) != (part.size, hasher.hexdigest()):
            problem = (
                f"{part.size} bytes with checksum {hasher.hexdigest()}; the bundle was made from {recorded.name}, "
                f"{recorded.size} bytes with checksum {recorded.checksum}"
            )
            yield Finding(problem, part.path.name)


class _Comparison:
    """Comparison of one stored tensor with its source, piece by piece."""

    def __init__(
        self,
        directory: Path,
        shards: dict[str, dict[str, Entry]],
        tensor: StoredTensor,
        part: GGUFFile,
        record: TensorRecord,
    ) -> None:
        self.directory, self.shards, self.tensor = directory, shards, tensor
        self.part, self.record = part, record
        self.exactness = Exactness()
        self.findings = dict[str, Finding]()

    def run(self) -> tuple[Exactness, list[Finding]]:
        """Compare the whole tensor; at most one finding for each array, its first difference."""
        block_weights, block_bytes = TYPE_SIZES[self.record.type]
        step = PIECE_WEIGHTS // block_weights
        blocks = self.record.nbytes // block_bytes
        for first in range(0, blocks, step):
            count = min(step, blocks - first)
            raw = self.part.read(self.record.offset + first * block_bytes, count * block_bytes)
            self._compare(np.frombuffer(raw, dtype=np.uint8), first, count)
        return self.exactness, list(self.findings.values())

    def _compare(self, raw: Bytes, first: int, count: int) -> None:
        block_weights, _ = TYPE_SIZES[self.record.type]
        with np.errstate(all="ignore"):
            if self.tensor.storage == "planar":
                self._compare_planar(raw, first, count)
            elif self.tensor.storage == "dequantized":
                truth = _dequantized(raw, self.record)
                expected = planes.round_to_bf16(truth)
                stored = self._stored("data", expected.view(np.uint8), 2 * first * block_weights)
                self._measure(truth, planes.bf16_to_float(stored.view(np.uint16)))
            else:
                self._stored("data", raw, len(raw) // count * first)

    def _compare_planar(self, raw: Bytes, first: int, count: int) -> None:
        q, true_scale = decode(raw)
        ql, qh = planes.pack(q)
        self._stored("ql", ql, len(ql) // count * first)
        self._stored("qh", qh, len(qh) // count * first)
        blocks = raw.reshape(count, BLOCK_BYTES)
        if "steps" in self.tensor.arrays:
            sub_scales = np.ascontiguousarray(blocks[:, SCALES_AT:D_AT]).reshape(-1)
            steps = np.ascontiguousarray(blocks[:, D_AT:]).reshape(-1)
            stored_steps = self._stored("steps", steps, 2 * first).view("<f2").astype(np.float32)
            stored_sub = self._stored("scale", sub_scales, 16 * first).view(np.int8).astype(np.float32)
            scale = np.repeat(stored_steps, 16) * stored_sub
        else:
            expected = planes.round_to_bf16(true_scale)
            scale = planes.bf16_to_float(self._stored("scale", expected.view(np.uint8), 32 * first).view(np.uint16))
        true = true_scale.astype(np.float64)
        difference = scale - true
        errors = np.abs(difference / true)[true != 0]
        worst = float(errors.max(initial=0.0))
        self.exactness.max_scale_error = max(self.exactness.max_scale_error or 0.0, worst)
        # The weights of a group share a scale and its error. Codes that differ are findings of their own.
        squares = np.square(q.reshape(-1, GROUP), dtype=np.int16).sum(axis=1, dtype=np.int32)
        self.exactness.signal += float(np.square(true) @ squares)
        self.exactness.noise += float(np.square(difference) @ squares)

    def _measure(self, truth: npt.NDArray[np.float32], stored: npt.NDArray[np.float32]) -> None:
        self.exactness.signal += float(np.square(truth, dtype=np.float64).sum())
        self.exactness.noise += float(np.square(stored.astype(np.float64) - truth).sum())

    def _stored(self, role: str, expected: Bytes, at: int) -> Bytes:
        """Return an array's stored bytes from offset `at`; a difference from `expected` becomes a finding."""
        array = self.tensor.arrays[role]
        entry = self.shards[array.file][array.key]
        with (self.directory / array.file).open("rb") as file:
            file.seek(entry.begin + at)
            stored = np.frombuffer(file.read(len(expected)), dtype=np.uint8)
        if len(stored) != len(expected):
            raise OSError(0, "became shorter while it was being read", array.file)
        if not np.array_equal(stored, expected):
            self.exactness.equal = False
            where = int(np.nonzero(stored != expected)[0][0])
            problem = (
                f"differs from the source at byte {at + where} of the array: expected "
                f"{expected[where]:#04x}, found {stored[where]:#04x}"
            )
            self.findings.setdefault(role, Finding(problem, array.file, self.tensor.name, array.key))
        return stored


def _dequantized(raw: Bytes, record: TensorRecord) -> npt.NDArray[np.float32]:
    import gguf

    weights = gguf.dequantize(raw.reshape(1, -1), gguf.GGMLQuantizationType(record.type))
    return np.ascontiguousarray(weights, dtype=np.float32).reshape(-1)
