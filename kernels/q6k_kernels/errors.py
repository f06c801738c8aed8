"""What can be missing or go wrong between a kernel's source and its run on a GPU: a closed set.

Every exception carries one sentence for the cause and one for the remedy; its text is both.
"""

from __future__ import annotations


class CudaError(RuntimeError):
    """Base of them all.

    Attributes:
        cause: what was expected and what was found.
        remedy: what the user can do.
    """

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause}. {remedy}")
        self.cause = cause
        self.remedy = remedy


class DriverMissingError(CudaError):
    """The NVIDIA driver is not installed, does not load, or lacks a function that is needed."""


class DriverCallError(CudaError):
    """A function of the driver failed.

    Attributes:
        code: its CUresult.
    """

    def __init__(self, cause: str, remedy: str, code: int) -> None:
        super().__init__(cause, remedy)
        self.code = code


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
