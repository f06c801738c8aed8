"""Convert a GGUF to a bundle: open, plan, check the output, stream, finish, move into place."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from q6k_convert import __version__
from q6k_convert.convert.plan import Options, Plan, TensorPlan, make_plan
from q6k_convert.convert.staging import check_output, check_space, staged
from q6k_convert.convert.stream import stream
from q6k_kernels.bundle.manifest import METADATA_NAME, Manifest, StoredTensor
from q6k_kernels.bundle.writer import BundleWriter
from q6k_kernels.gguf.model import open_gguf

_MANIFEST_BYTES_A_TENSOR = 2048  # upper bound of a manifest entry, for the check of free space


@dataclass(frozen=True)
class Result:
    """A finished conversion.

    Attributes:
        output: directory of the bundle.
        manifest: manifest of the bundle.
        bytes_in: bytes of all source files.
        bytes_out: bytes of all files of the bundle except the manifest.
        seconds: wall time of the conversion.
    """

    output: Path
    manifest: Manifest
    bytes_in: int
    bytes_out: int
    seconds: float


def default_jobs() -> int:
    """Return the default number of worker threads: the processors this process may use, at most 8."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)


def convert(
    source: str | Path,
    output: str | Path,
    options: Options | None = None,
    *,
    jobs: int | None = None,
    force: bool = False,
) -> Result:
    """Convert a GGUF file, or all parts of a split one, to a bundle directory.

    Args:
        source: the file, or any part of a split one.
        output: directory to write; it must not exist, be empty or, with `force`, be a bundle.
        options: how tensors are stored; see `Options`.
        jobs: worker threads; the output does not depend on them.
        force: replace an existing bundle once the new one is complete.

    Raises:
        Q6KConvertError: one of the failures in `q6k_convert.errors`.
        GgufError: the source cannot be read, is broken, or holds what cannot be converted.
        OSError: a read or a write failed.
    """
    with open_gguf(source) as model:
        plan = make_plan(model, options or Options())
        return run(plan, Path(output), jobs=jobs or default_jobs(), force=force)


def run(
    plan: Plan,
    output: Path,
    *,
    jobs: int,
    force: bool,
    progress: Callable[[int], None] = lambda _: None,
) -> Result:
    """Carry out a plan, see `convert`. `progress` is called with the number of source bytes newly done."""
    started = time.monotonic()
    sources = [part.path for part in plan.model.parts]
    check_room(plan, output, force=force)
    with staged(output, sources, force=force) as directory:
        writer = BundleWriter(directory, plan.shards)
        try:
            writer.add_file(METADATA_NAME, plan.model.metadata())
            source_files = stream(plan, writer, jobs, progress)
            manifest = writer.finish(
                producer=f"q6k-convert {__version__}",
                options=plan.options.recorded(),
                architecture=plan.model.architecture,
                sources=source_files,
                tied=plan.tied,
                tensors=[_stored(tensor, writer) for tensor in plan.tensors],
            )
        finally:
            writer.close()
    bytes_out = sum(file.size for file in manifest.files.values())
    return Result(output, manifest, plan.bytes_in, bytes_out, time.monotonic() - started)


def check_room(plan: Plan, output: Path, *, force: bool) -> None:
    """Check that the output path is free and its file system has room.

    Raises:
        IOFailedError: the path is taken, or the file system is too full.
    """
    final = check_output(output, [part.path for part in plan.model.parts], force=force)
    index_and_manifest = _MANIFEST_BYTES_A_TENSOR * (len(plan.tensors) + 1)
    check_space(final, plan.bundle_bytes + index_and_manifest)


def _stored(tensor: TensorPlan, writer: BundleWriter) -> StoredTensor:
    return StoredTensor(
        name=tensor.record.name,
        type=tensor.record.type.name,
        shape=list(tensor.record.shape),
        storage=tensor.storage,
        format=tensor.format,
        arrays={role: writer.stored_array(spec) for role, spec in tensor.arrays.items()},
    )
