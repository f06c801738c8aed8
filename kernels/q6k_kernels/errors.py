"""What can go wrong in a GGUF file, from a kernel's source to its run on a GPU, and from a bundle to a model.

A closed set. Every exception carries one sentence for the cause and one for the remedy; its text is both.
"""

from __future__ import annotations

from pathlib import Path


class ExplainedError(RuntimeError):
    """Base of all errors here.

    Attributes:
        cause: what was expected and what was found, with the file, the key or the tensor.
        remedy: what the user can do.
    """

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause}. {remedy}")
        self.cause = cause
        self.remedy = remedy


class GgufError(ExplainedError):
    """Base of what goes wrong with a GGUF file."""


class GgufReadError(GgufError):
    """A GGUF file cannot be opened or read, or changes meanwhile."""


class GgufRejectedError(GgufError):
    """A GGUF file breaks the rules of its format, or holds what cannot be used.

    Args:
        path: the file.
        item: what in it is wrong: a key, a tensor, a header field.
        problem: what was expected and what was found.
        offset: where in the file, in bytes from its start; None where no one place is to blame.
        remedy: what the user can do.
    """

    def __init__(
        self,
        path: Path,
        item: str,
        problem: str,
        *,
        offset: int | None = None,
        remedy: str = "The file is damaged or not what it claims to be: download or export it again.",
    ) -> None:
        where = f" at byte {offset}" if offset is not None else ""
        super().__init__(f"{path}: {item}{where}: {problem}", remedy)
        self.path = path
        self.item = item
        self.offset = offset


class CudaError(ExplainedError):
    """Base of what goes wrong between a kernel's source and its run on a GPU."""


class DriverMissingError(CudaError):
    """The NVIDIA driver, or cuda-bindings to call it, is not installed, does not load, or is too old."""


class DriverCallError(CudaError):
    """A function of the driver failed.

    Attributes:
        result: the name of its CUresult, as "CUDA_ERROR_NOT_FOUND".
    """

    def __init__(self, cause: str, remedy: str, result: str) -> None:
        super().__init__(cause, remedy)
        self.result = result


class GpuMissingError(CudaError):
    """The NVIDIA driver is there, a GPU is not, or not one that this process may use."""


class GpuTooOldError(CudaError):
    """The GPU is older than compute capability 8.0 (Ampere)."""


class CompilerMissingError(CudaError):
    """The run-time compiler, NVRTC, is not installed, does not load, or does not know the GPU."""


class CompileFailedError(CudaError):
    """NVRTC refused a kernel's source.

    Attributes:
        log: what it printed.
    """

    def __init__(self, cause: str, remedy: str, log: str) -> None:
        super().__init__(cause, remedy)
        self.log = log


class SourceMissingError(CudaError):
    """The package's device code is not where it belongs, or has no such kernel."""


class ModelError(ExplainedError):
    """Base of what keeps a bundle from becoming a model; the bundle itself may be sound."""


class UnsupportedModelError(ModelError):
    """An architecture, or something about it, that no model is built for."""


class HyperparameterError(ModelError):
    """A key of the metadata is missing, impossible, or contradicts the tensors."""


class WeightsError(ModelError):
    """A tensor that the model needs is missing, mis-shaped or in no form that loads, or there is one too many."""


class PackageMissingError(ModelError):
    """A Python package that building models needs is not installed, or too old."""


class ProgramError(ModelError):
    """An exported model is damaged, or not for this machine."""


class ExportFailedError(ModelError):
    """torch could not trace or compile a module, or what it made has no packed operation."""
