"""Compile a bundle's model into a program in one file, and check its logits before keeping it."""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q6k_convert import text
from q6k_convert.errors import EnvironmentMissingError, IOFailedError, UsageError, VerificationFailedError
from q6k_convert.run.running import (
    Activations,
    Device,
    Dtype,
    check_packages,
    described,
    device_of,
    dtype_of,
    name_of,
)
from q6k_kernels.bundle import manifest as manifests

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from q6k_kernels.bundle.metadata import Metadata
    from q6k_kernels.export.exportable import ExportableModel
    from q6k_kernels.export.exporting import Exported

Progress = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]
Note = Callable[[str], None]
DEFAULT_CAPACITY = 4096
ALLOWED = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.15}
"""Largest accepted difference of logits, relative to their change from one token to the next.

The compiler fuses operations between which the model rounds, and a different rounding can change an 8-bit code of
the activations: differences of 0.02 to 0.04 were measured in 16 bits. A program that confuses tokens or positions
differs by about 1."""


@dataclass(frozen=True)
class ExportRequest:
    """Request of the command; see its options."""

    bundle: Path
    target: Path
    capacity: int | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    activations: Activations = "auto"
    force: bool = False


def run(request: ExportRequest, note: Note, progress: Progress) -> dict[str, Any]:
    """Export a bundle's model, and return the document for `--json`.

    Args:
        request: request of the command.
        note: called with each line about the progress.
        progress: makes a progress display from a total in bytes and a label.

    Raises:
        UsageError: the options contradict each other.
        IOFailedError: the target exists and may not be replaced, or its directory does not exist.
        EnvironmentMissingError: a package, a compiler or the GPU is missing.
        VerificationFailedError: the program's logits differ too far from the model's.
        ModelError: no model can be made from the bundle, or torch cannot export it.
        BundleError: the directory is not a bundle, or its files break the format.
        OSError: a file cannot be read or written.
    """
    _check_target(request)
    manifest = manifests.read(request.bundle)
    check_packages("exporting")
    from q6k_kernels.bundle.metadata import read_metadata
    from q6k_kernels.models.registry import architecture_of

    # Check the model first: the steps below take long or may fail for other reasons.
    metadata = read_metadata(request.bundle)
    architecture = architecture_of(metadata).name
    capacity = _capacity(request, metadata)
    device = device_of(request.device, note)
    dtype = dtype_of(request.dtype, device)
    _check_compilers(device)
    return _Export(request, device, dtype, capacity, note).document(manifest, architecture, progress)


class _Export:
    def __init__(self, request: ExportRequest, device: str, dtype: torch.dtype, capacity: int, note: Note) -> None:
        import torch

        self.request, self.note, self.capacity = request, note, capacity
        self.device = torch.device(device)
        self.dtype = dtype
        self.seconds = dict[str, float]()
        note(
            f"{request.bundle} -> {request.target}: {name_of(self.dtype)} on {described(self.device)}, "
            f"{capacity} positions; compiling takes minutes"
        )

    def document(self, manifest: manifests.Manifest, architecture: str, progress: Progress) -> dict[str, Any]:
        """Load, export to a file beside the target, check that file, move it into place; return the document."""
        target = self.request.target
        temporary = target.with_name(f".{target.stem}.{os.getpid()}.checked.pt2")
        try:
            with progress(sum(tensor.nbytes for tensor in manifest.tensors), "loading") as tell:
                module = self._module(tell)
            with self._timed("expect"):
                expected = _logits_of_module(module)
            with self._timed("export"):
                exported = self._exported(module, architecture, temporary)
            state_bytes = sum(each.nbytes for each in exported.info.state)
            # Free the model first: the program takes as much memory again.
            del module
            gc.collect()
            if self.device.type == "cuda":
                import torch

                torch.cuda.empty_cache()
            with self._timed("check"):
                difference = self._difference(temporary, expected)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        size = target.stat().st_size
        self.note(
            f"checked: logits differ from the model's by {difference:.2e} of what one token changes in them; "
            f"{text.size(size)} in {text.seconds(sum(self.seconds.values()))}"
        )
        info = exported.info
        return {
            "status": "done",
            "bundle": str(self.request.bundle),
            "program": str(target),
            "bytes": size,
            "architecture": info.architecture,
            "device": str(self.device),
            "capability": None if info.capability is None else ".".join(map(str, info.capability)),
            "dtype": name_of(info.dtype),
            "activations": self.request.activations,
            "torch": info.compiled_by,
            "capacity": info.capacity,
            "chunk": info.chunk,
            "vocabulary": info.vocabulary,
            "weights_bytes": exported.weights_bytes,
            "state_bytes": state_bytes,
            "operations": {name: vars(each) for name, each in exported.operations.items()},
            "check": {"relative_difference": difference, "allowed": ALLOWED[name_of(self.dtype)]},
            "seconds": self.seconds,
        }

    def _module(self, progress: Callable[[int], None]) -> ExportableModel:
        from q6k_kernels import load_model
        from q6k_kernels.export.exportable import ExportableModel

        with self._timed("load"):
            model = load_model(
                self.request.bundle,
                device=self.device,
                dtype=self.dtype,
                activations=self.request.activations,
                progress=progress,
            )
        return ExportableModel(model, self.capacity).eval()

    def _exported(self, module: ExportableModel, architecture: str, path: Path) -> Exported:
        from q6k_kernels.export.exporting import export_model

        return export_model(module, path, architecture=architecture, note=self.note)

    def _difference(self, path: Path, expected: list[Tensor]) -> float:
        """Return the largest difference between the program's logits and the expected ones, see `ALLOWED`."""
        from q6k_kernels.export.program import Program

        program = Program(path, self.device)
        for each in program.state.values():
            each.normal_()  # the result must not depend on slots that are not yet written
        ids = _sample(program.info.vocabulary)
        found = [program.prefill(ids[:-1]), program.prefill(ids[-1:])]
        change = (expected[1] - expected[0]).norm()
        worst = max(float((one - other).norm() / change) for one, other in zip(found, expected, strict=True))
        allowed = ALLOWED[name_of(self.dtype)]
        if not worst <= allowed:  # NaN, too
            raise VerificationFailedError(
                f"the program's logits differ from the model's by {worst:.3g} of what one token changes in them; "
                f"allowed is {allowed}",
                "Verify the bundle; if it is right, this is a bug: report it with what `q6k-convert doctor` says.",
            )
        return worst

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def _sample(vocabulary: int) -> list[int]:
    """Return 8 token ids, the same on every call."""
    return [(7919 * number + 2) % vocabulary for number in range(8)]


def _logits_of_module(module: ExportableModel) -> list[Tensor]:
    """Return the model's own logits after a chunk of tokens, and after one more."""
    import torch

    device = module.model.device
    ids, slots = _sample(module.vocabulary), torch.arange(8, device=device)
    tokens = torch.tensor([ids], device=device)
    with torch.no_grad():
        return [
            module(tokens[:, begin:end], slots[begin:end], slots).clone()
            for begin, end in ((0, len(ids) - 1), (len(ids) - 1, len(ids)))
        ]


def _capacity(request: ExportRequest, metadata: Metadata) -> int:
    longest = metadata.context_length
    if request.capacity is None:
        return min(DEFAULT_CAPACITY, longest or DEFAULT_CAPACITY)
    if longest is not None and request.capacity > longest:
        raise UsageError(
            f"--capacity {request.capacity}: the model knows {longest} positions", f"Give {longest} or less."
        )
    return request.capacity


def _check_target(request: ExportRequest) -> None:
    target = request.target
    if target.suffix != ".pt2":
        raise UsageError(f"{target}: expected a name that ends in .pt2", "torch loads no other packages.")
    if request.bundle.resolve() in target.resolve().parents:
        raise UsageError(f"{target} lies in the bundle, which is not touched", "Give a file elsewhere.")
    if not target.parent.is_dir():
        raise IOFailedError(f"{target.parent}: no such directory", "Make it first.")
    if target.exists() and not request.force:
        raise IOFailedError(f"{target}: there is a file already", "Give --force to replace it, or another name.")


def _check_compilers(device: str) -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise EnvironmentMissingError(
            f"exporting needs a C++ compiler, and {compiler} is not on PATH", "Install g++ or clang++, or set CXX."
        )
    if device == "cuda" and find_spec("triton") is None:
        raise EnvironmentMissingError(
            "exporting for a GPU needs Triton: not installed", "Install it: `pip install triton`."
        )
