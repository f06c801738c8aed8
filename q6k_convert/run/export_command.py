"""A bundle's model as a compiled program in one file, held against the model it was made from before it is kept."""

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
"""Largest difference of logits, relative to how far they change from one token to the next. The compiler fuses what
the model rounds in between, and where activations become 8-bit codes a rounding may tip a code over: 0.02 to 0.04
were seen in 16 bits. A program that mistakes one token or position for another is off by about 1."""


@dataclass(frozen=True)
class ExportRequest:
    """What is asked for; see the command's options."""

    bundle: Path
    target: Path
    capacity: int | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    activations: Activations = "auto"
    force: bool = False


def run(request: ExportRequest, note: Note, progress: Progress) -> dict[str, Any]:
    """Exports, and returns what `--json` prints.

    Args:
        request: what is asked for.
        note: told, line by line, what is under way.
        progress: makes a progress display from a total in bytes and a word for what is done.

    Raises:
        UsageError: the options make no sense together.
        IOFailedError: there is a file already, not to be replaced.
        EnvironmentMissingError: a package, a compiler or the GPU is missing.
        VerificationFailedError: the program's logits are not the model's.
        ModelError: no model can be made from the bundle, or torch does not export it.
        BundleError: it is no bundle, or its files break the format.
        OSError: a file cannot be read or written.
    """
    _check_target(request)
    manifest = manifests.read(request.bundle)
    check_packages("exporting")
    from q6k_kernels.bundle.metadata import read_metadata
    from q6k_kernels.models.registry import architecture_of

    # Before all that takes long, or that may fail for a reason which would not matter then.
    metadata = read_metadata(request.bundle)
    architecture_of(metadata)
    capacity = _capacity(request, metadata)
    device = device_of(request.device, note)
    dtype = dtype_of(request.dtype, device)
    _check_compilers(device)
    return _Export(request, device, dtype, capacity, note).document(manifest, progress)


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

    def document(self, manifest: manifests.Manifest, progress: Progress) -> dict[str, Any]:
        """Loads, exports to a file beside the target, checks that, and puts it in its place."""
        target = self.request.target
        temporary = target.with_name(f".{target.stem}.{os.getpid()}.checked.pt2")
        try:
            with progress(sum(tensor.nbytes for tensor in manifest.tensors), "loading") as tell:
                module = self._module(tell)
            with self._timed("expect"):
                expected = _logits_of_module(module)
            with self._timed("export"):
                exported = self._exported(module, manifest.architecture, temporary)
            state_bytes = sum(each.nbytes for each in exported.info.state)
            # Before the program takes as much memory again.
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
        """The largest difference between the program's logits and those expected, see `ALLOWED`."""
        from q6k_kernels.export.program import Program

        program = Program(path, self.device)
        for each in program.state.values():
            each.normal_()  # no slot may tell before it is written
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
    """Some tokens, the same every time."""
    return [(7919 * number + 2) % vocabulary for number in range(8)]


def _logits_of_module(module: ExportableModel) -> list[Tensor]:
    """Of the model itself: after a chunk of tokens, and after one more."""
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
