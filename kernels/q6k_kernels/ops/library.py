"""The ops as a C++ library, `libq6k_ops.so`, in place of Python's implementations.

    q6k-convert build-ops --out DIR        # builds it
    from q6k_kernels.ops import library
    library.load("DIR/libq6k_ops.so")

On a GPU it launches the same kernels with the same results, and takes less CPU time a call. On the CPU it computes
the same formulas, with sums in another order. Schemas are the same, and `q6k_kernels.ops.schema` adds the functions
for fake tensors, so that `torch.compile` and `torch.export` work.

C++ programs load the library alone, with `dlopen`. Python programs may load it alone, too, with
`torch.ops.load_library(path)`, before or after they import `q6k_kernels.ops.schema`. After that import torch warns
that one implementation replaces another, which is intended.
"""

from __future__ import annotations

import ctypes
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_torch_ops: Any = torch.ops  # torch leaves it without types
_BUILD = "build it with `q6k-convert build-ops`"
_loaded: list[About] = []


@dataclass(frozen=True)
class About:
    """A loaded library.

    Attributes:
        path: its file.
        version: version of q6k-convert that built it.
        nvrtc: version of its kernels' compiler, for example "13.0".
        architectures: compute capabilities that it has kernels for, 90 for 9.0.
    """

    path: Path
    version: str
    nvrtc: str
    architectures: tuple[int, ...]


def load(path: str | os.PathLike[str]) -> About:
    """Load the library and use its operations in place of Python's; loading it again does no harm.

    No other thread may use the operations meanwhile: for a moment there are none.

    Raises:
        OSError: there is no such file, or it does not load.
        ValueError: it is no library of these operations, or another one is loaded already.
    """
    from q6k_kernels.ops import schema

    file = Path(path).resolve()
    for other in _loaded:
        if other.path == file:
            return other
        raise ValueError(f"{file}: another library of these operations is loaded, {other.path}")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; {_BUILD}")
    if b"q6k_ops_about" not in file.read_bytes():
        raise ValueError(f"{file}: not a library of these operations; {_BUILD}")
    schema.withdraw()
    try:
        _torch_ops.load_library(str(file))
    except OSError as error:
        raise OSError(
            f"{file}: does not load: {error}; {_BUILD}, against this torch {torch.__version__}"
        ) from error
    finally:
        schema.implement()  # registers what the library has not
    found = about(file)
    _loaded.append(found)
    return found


def about(path: str | os.PathLike[str]) -> About:
    """Return what a library says of itself; load it first if it is not loaded."""
    file = Path(path).resolve()
    library = ctypes.CDLL(str(file))
    library.q6k_ops_about.restype = ctypes.c_char_p
    text = json.loads(library.q6k_ops_about())
    return About(file, text["version"], text["nvrtc"], tuple(text["architectures"]))
