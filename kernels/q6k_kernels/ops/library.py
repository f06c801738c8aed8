"""The ops as a C++ library, `libq6k_ops.so`, in the place of Python's implementations.

    q6k-convert build-ops --out DIR        # builds it
    from q6k_kernels.ops import library
    library.load("DIR/libq6k_ops.so")

The same kernels with the same results, for less time of the CPU a call; on the CPU the same formulas, in sums of
another order. Schemas are the same, and `q6k_kernels.ops.schema` adds what fake tensors take, so
`torch.compile` and `torch.export` go on working. C++ programs load the library alone, by `dlopen`, or as a package
of AOTInductor is loaded. Python programs may, too, by `torch.ops.load_library(path)`, before or after
`q6k_kernels.ops.schema` is imported; after it, torch warns that one implementation takes
another's place, which it does.
"""

from __future__ import annotations

import ctypes
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_torch_ops: Any = torch.ops  # which torch leaves without types
_BUILD = "build it with `q6k-convert build-ops`"
_loaded: list[About] = []


@dataclass(frozen=True)
class About:
    """A library that is loaded.

    Attributes:
        path: its file.
        version: of q6k-convert that built it.
        nvrtc: the version of its kernels' compiler, "13.0" say.
        architectures: compute capabilities that it has kernels for, 90 for 9.0.
    """

    path: Path
    version: str
    nvrtc: str
    architectures: tuple[int, ...]


def load(path: str | os.PathLike[str]) -> About:
    """Loads the library and puts its operations in the place of Python's; once more is no harm.

    Not while another thread uses the operations: for a moment there are none.

    Raises:
        OSError: there is no such file, or it does not load.
        ValueError: it is no library of these operations, or another one was loaded before.
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
        schema.implement()  # what the library has not registered
    found = about(file)
    _loaded.append(found)
    return found


def about(path: str | os.PathLike[str]) -> About:
    """What a library says of itself, which is loaded for that if it is not yet."""
    file = Path(path).resolve()
    library = ctypes.CDLL(str(file))
    library.q6k_ops_about.restype = ctypes.c_char_p
    text = json.loads(library.q6k_ops_about())
    return About(file, text["version"], text["nvrtc"], tuple(text["architectures"]))
