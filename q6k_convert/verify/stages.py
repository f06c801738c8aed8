"""Verify a bundle: structure, content, source, device.

The stages run in this order and each relies on the ones before. If the structure or the content is not sound, the
remaining stages are skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from q6k_convert.verify.device_stage import DeviceReport, DeviceRun, check_device
from q6k_convert.verify.source_stage import SourceReport, check_source, source_bytes
from q6k_kernels.bundle import manifest as manifests
from q6k_kernels.bundle.companions import check_companions
from q6k_kernels.bundle.content import ContentReport, check_content, content_bytes
from q6k_kernels.bundle.manifest import METADATA_NAME, BundleError, Manifest
from q6k_kernels.bundle.metadata import read_metadata
from q6k_kernels.bundle.structure import Finding, check_structure

State = Literal["passed", "failed", "skipped"]
Device = Literal["auto", "cpu", "cuda"]
Progress = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]


@dataclass
class Stage:
    """Stage of a verification: its state, a line of detail, its time in seconds, and the bytes it read."""

    name: str
    state: State = "skipped"
    detail: str = ""
    seconds: float = 0.0
    bytes: int = 0


@dataclass
class Verification:
    """Results of a verification.

    Attributes:
        directory: directory of the bundle.
        manifest: manifest of the bundle; None if `bundle.json` is damaged.
        stages: stages in order.
        findings: pairs of stage and finding, in the order they were found.
        content, source, device: reports of those stages, if they ran.
    """

    directory: Path
    manifest: Manifest | None = None
    stages: list[Stage] = field(default_factory=list)
    findings: list[tuple[str, Finding]] = field(default_factory=list)
    content: ContentReport | None = None
    source: SourceReport | None = None
    device: DeviceReport | None = None

    @property
    def failed(self) -> bool:
        """Whether any stage failed."""
        return any(stage.state == "failed" for stage in self.stages)

    def runs(self, name: str) -> list[DeviceRun] | None:
        """Return the runs of a tensor on the device, or None if there were none."""
        if self.device is None or not self.device.runs:
            return None
        # Each expert of a stack has its own entry, like NAME[3].
        mine = [runs for key, runs in self.device.runs.items() if key == name or key.startswith(f"{name}[")]
        return [run for runs in mine for run in runs] or None


@contextmanager
def _silent(_total: int, _what: str) -> Iterator[Callable[[int], None]]:
    yield lambda _: None


def verify(
    directory: str | Path,
    *,
    fast: bool = False,
    source: str | Path | None = None,
    device: Device = "auto",
    jobs: int = 2,
    progress: Progress = _silent,
) -> Verification:
    """Verify a bundle.

    Args:
        directory: directory of the bundle.
        fast: stop after the structure.
        source: a GGUF file, or any part of a split one, to compare with; None skips that stage.
        device: where to run the packed tensors: "cpu", "cuda", or "auto" (a GPU that is ready, else skip).
        jobs: number of threads.
        progress: makes a progress display from a total in bytes and a label.

    Raises:
        BundleError: the directory is not a bundle.
        GgufError: the source cannot be read.
        Q6KConvertError: something that the device needs is missing.
        OSError: a file cannot be read.
    """
    run = Verification(Path(directory))
    with _stage(run, "structure") as stage:
        try:
            run.manifest = manifests.read(run.directory)
        except BundleError as error:
            if not manifests.is_bundle(run.directory):
                raise
            run.findings.append((stage.name, Finding(str(error), manifests.NAME)))
            return run
        stage.detail = f"{len(run.manifest.tensors)} tensors in {len(run.manifest.files)} files"
        _record(run, stage, check_structure(run.directory, run.manifest))
    manifest = run.manifest
    skipped = "only the structure was asked for" if fast else "the structure is not sound"
    if fast or run.failed:
        run.stages += [Stage(name, detail=skipped) for name in ("content", "source", "device")]
        return run
    with _stage(run, "content") as stage:
        stage.bytes = content_bytes(manifest)
        with progress(stage.bytes, "checking content") as tell:
            run.content = check_content(run.directory, manifest, jobs=jobs, progress=tell)
        _record(run, stage, run.content.findings)
        _record(run, stage, list(_check_metadata(run)))
        _record(run, stage, list(check_companions(run.directory, manifest)))
        stage.detail = "every checksum, every scale, metadata.gguf"
        if manifest.companions:
            stage.detail += f", {len(manifest.companions)} files for transformers"
    if run.failed:
        run.stages += [Stage(name, detail="the content is not sound") for name in ("source", "device")]
        return run
    if source is None:
        run.stages.append(Stage("source", detail="no --source was given"))
    else:
        with _stage(run, "source") as stage:
            stage.bytes = source_bytes(manifest)
            with progress(stage.bytes, "comparing with source") as tell:
                run.source = check_source(run.directory, manifest, Path(source), jobs=jobs, progress=tell)
            _record(run, stage, run.source.findings)
            stage.detail = f"{len(run.source.tensors)} tensors recomputed from {Path(source).name}"
    with _stage(run, "device") as stage:
        stage.bytes = _packed_bytes(manifest)
        with progress(stage.bytes, "running tensors") as tell:
            run.device = check_device(run.directory, manifest, device, tell)
        _record(run, stage, run.device.findings)
        stage.state, stage.detail = run.device.state, run.device.detail
    return run


@contextmanager
def _stage(run: Verification, name: str) -> Iterator[Stage]:
    stage = Stage(name, "passed")
    run.stages.append(stage)
    started = time.monotonic()
    yield stage
    stage.seconds = time.monotonic() - started
    if any(where == name for where, _ in run.findings):
        stage.state = "failed"


def _packed_bytes(manifest: Manifest) -> int:
    return sum(tensor.nbytes for tensor in manifest.tensors if tensor.storage == "planar")


def _record(run: Verification, stage: Stage, findings: list[Finding]) -> None:
    run.findings += [(stage.name, finding) for finding in findings]


def _check_metadata(run: Verification) -> Iterator[Finding]:
    """Check that `metadata.gguf` is a GGUF without tensors and of the manifest's architecture."""
    assert run.manifest is not None  # noqa: S101 -- for the type checker
    try:
        architecture = read_metadata(run.directory).architecture
    except BundleError as error:
        yield Finding(str(error), METADATA_NAME)
        return
    if architecture != run.manifest.architecture:
        problem = f"is of architecture {architecture!r}, the manifest says {run.manifest.architecture!r}"
        yield Finding(problem, METADATA_NAME)
