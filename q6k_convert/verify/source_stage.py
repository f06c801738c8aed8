"""Compare a bundle with its source: tensors, plan (see `plan_check`) and keys first, then every stored array.

Arrays are compared by `comparison`, which shares no code with the conversion.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from q6k_convert.verify.comparison import Compared, Comparison, Exactness, keep_freed_memory
from q6k_convert.verify.plan_check import check_plan
from q6k_kernels.bundle.manifest import METADATA_NAME, Manifest
from q6k_kernels.bundle.naming import naming
from q6k_kernels.bundle.structure import Finding, read_header
from q6k_kernels.gguf.model import GGUFModel, open_gguf
from q6k_kernels.text import shortened


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
    report, lock = SourceReport(), threading.Lock()

    def tell(count: int) -> None:
        with lock:
            progress(count)

    with open_gguf(source) as model:
        report.findings += _check_listing(manifest, model)
        if not report.findings:
            report.findings += check_plan(manifest, model)
        report.findings += _check_metadata(directory, model)
        if report.findings:
            return report
        shards = {name: read_header(directory / name) for name in manifest.files if name.endswith(".safetensors")}
        stored = {tensor.name: tensor for tensor in manifest.tensors}
        comparisons = [
            Comparison(directory, shards, stored[record.name], part, record)
            for part, record in model.tensors()
            if stored[record.name].arrays
        ]
        ranges = [(comparison, first) for comparison in comparisons for first in comparison.ranges]
        allowed = bool(manifest.options.get("allow_nonfinite"))
        keep_freed_memory()
        with ThreadPoolExecutor(jobs, "compare") as pool:
            try:
                hashed = pool.submit(lambda: list(_check_checksums(manifest, model, tell)))
                results = pool.map(lambda item: item[0].run(item[1], tell), ranges)
                for comparison in comparisons:
                    compared = next(results)
                    for _ in comparison.ranges[1:]:
                        compared.add(next(results))
                    _record(report, comparison, compared, allowed=allowed)
                report.findings = hashed.result() + report.findings
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return report


def _record(report: SourceReport, comparison: Comparison, compared: Compared, *, allowed: bool) -> None:
    """Add the result of a whole tensor to the report; `allowed` scales that are not finite are no finding."""
    if not compared.exactness.equal:
        compared = comparison.measured()  # for the signal of the pieces that are equal
    report.tensors[comparison.tensor.name] = compared.exactness
    report.total.add(compared.exactness)
    report.findings += compared.findings.values()
    if compared.nonfinite_at is not None and not allowed:
        report.findings.append(comparison.not_finite(compared))


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
    path = directory / METADATA_NAME
    with naming(path), path.open("rb") as file:
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
                return f", in key {shortened(kv.key)}"
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
