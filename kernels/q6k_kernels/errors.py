"""The errors of this package: of GGUF files, of compiling and running kernels, of making a model from a bundle.

The set is closed. Every exception carries one sentence for the cause and one for the remedy; its text is both.
"""

from __future__ import annotations

from pathlib import Path


class ExplainedError(RuntimeError):
    """Base of all errors in this module.

    Attributes:
        cause: what was expected and what was found, with the file, the key or the tensor.
        remedy: what the user can do.
    """

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause}. {remedy}")
        self.cause = cause
        self.remedy = remedy


class GgufError(ExplainedError):
    """Base of the errors of GGUF files."""


class GgufReadError(GgufError):
    """A GGUF file cannot be opened or read, or changes while it is read."""


class GgufRejectedError(GgufError):
    """A GGUF file breaks the rules of its format, or holds what cannot be used.

    Args:
        path: the file.
        item: what is wrong in the file: a key, a tensor, a header field.
        problem: what was expected and what was found.
        offset: bytes from the start of the file to the problem; None if it has no single place.
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
    """Base of the errors between a kernel's source and its run on a GPU."""


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
    """The NVIDIA driver is installed, but there is no GPU that this process may use."""


class GpuTooOldError(CudaError):
    """The GPU is older than compute capability 8.0 (Ampere)."""


class CompilerMissingError(CudaError):
    """The run-time compiler, NVRTC, is not installed, does not load, or does not know the GPU."""


class CompileFailedError(CudaError):
    """NVRTC refused a kernel's source.

    Attributes:
        log: what NVRTC printed.
    """

    def __init__(self, cause: str, remedy: str, log: str) -> None:
        super().__init__(cause, remedy)
        self.log = log


class BlocksNotResidentError(CudaError):
    """The blocks of a kernel wait for each other, and the GPU does not run them all at the same time."""


class SourceMissingError(CudaError):
    """The package's device code is missing, or has no such kernel."""


class ModelError(ExplainedError):
    """Base of the errors of making a model from a bundle; the bundle itself may be sound."""


class UnsupportedModelError(ModelError):
    """The architecture, or a feature of it, is not supported."""


class HyperparameterError(ModelError):
    """A key of the metadata is missing, impossible, or contradicts the tensors."""


class WeightsError(ModelError):
    """A tensor that the model needs is missing, has a wrong shape or cannot be loaded, or there is one too many."""


class PackageMissingError(ModelError):
    """A Python package that building models needs is not installed, or too old."""


class ProgramError(ModelError):
    """An exported model is damaged, or made for another machine."""


class ExportFailedError(ModelError):
    """torch could not trace or compile a module, or the result has no packed operation."""
