"""An exported model as one file: a PT2 archive with two compiled programs and one copy of their packed weights.

A PT2 archive is a ZIP file whose entries are uncompressed and begin at multiples of 64 bytes.

    data/aotinductor/prefill/…   AOTInductor's program for 2 tokens or more, without weights
    data/aotinductor/decode/…    AOTInductor's program for one token, without weights
    data/weights/q6k_0 …         weights, each the bytes of a contiguous tensor
    extra/q6k_program            UTF-8 text with these lines:
      q6k-program 1                          the format's name and version, the first line
      torch 2.11.0                           the version that compiled it; the same minor version runs it
      device cuda 9.0                        with its compute capability; or: device cpu
      architecture llama                     GGUF's name of the architecture
      dtype bfloat16                         dtype of activations and cache
      capacity 4096                          positions in the cache
      chunk 2048                             the most tokens of one call
      vocabulary 128256                      V of logits
      constant q6k_0 uint8 8016x16x3584 NAME entry in data/weights, dtype, shape (`scalar` for none), and its
                                             name in the programs; several names may share an entry
      state bfloat16 1x8x4096x128 NAME       a part of the cache: zeros at first, written in place

Both programs take int64 tokens (1, T), positions (T,) and slots (S,), see `exportable`, and return float32 logits
(1, V). A runner passes both the same tensors by name, as user-managed constants, so weights and cache are in memory
once. The programs are machine code: run only packages from sources that you trust.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.pt2_archive._package import PT2ArchiveReader, PT2ArchiveWriter
from torch.export.pt2_archive.constants import AOTINDUCTOR_DIR, EXTRA_DIR, WEIGHTS_DIR

from q6k_kernels.errors import ProgramError
from q6k_kernels.export import cpp_runtime

MAGIC = "q6k-program"
VERSION = 1
ENTRY = f"{EXTRA_DIR}q6k_program"
PROGRAMS = ("prefill", "decode")
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32)
}
MAX_TEXT = 1 << 24
_EXPORT = "Export it again: `q6k-convert export BUNDLE MODEL.pt2`."


@dataclass(frozen=True)
class Array:
    """A constant or a part of the state.

    Attributes:
        name: its name in the programs.
        dtype: one of `DTYPES`.
        shape: shape of the contiguous tensor.
        entry: its entry in data/weights; empty for state.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    entry: str = ""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Info:
    """The content of `extra/q6k_program`.

    Attributes:
        compiled_by: version of torch, as "2.11.0".
        device: "cpu" or "cuda".
        capability: compute capability, as (9, 0); None for the CPU.
        architecture: GGUF's name of the architecture.
        dtype: dtype of activations and cache.
        capacity: positions in the cache.
        chunk: the most tokens of one call.
        vocabulary: V of logits (1, V).
        constants: the weights.
        state: the tensors of the cache.
    """

    compiled_by: str
    device: str
    capability: tuple[int, int] | None
    architecture: str
    dtype: torch.dtype
    capacity: int
    chunk: int
    vocabulary: int
    constants: tuple[Array, ...]
    state: tuple[Array, ...]


def arrays_of(tensors: Mapping[str, Tensor]) -> tuple[tuple[Array, ...], list[Tensor]]:
    """Return the arrays that a package lists for these tensors, and the tensors to store, shared ones once."""
    entries, arrays = dict[tuple[Any, ...], int](), []
    stored = list[Tensor]()
    for name, tensor in tensors.items():
        key = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if key not in entries or not tensor.numel():
            entries[key] = len(stored)
            stored.append(tensor)
        arrays.append(Array(name, tensor.dtype, tuple(tensor.shape), f"q6k_{entries[key]}"))
    return tuple(arrays), stored


def write(path: Path, info: Info, programs: Mapping[str, Iterable[str]], stored: Iterable[Tensor]) -> None:
    """Write a package.

    Args:
        path: path of the package, ending in .pt2.
        info: its text.
        programs: AOTInductor's files of each of `PROGRAMS`.
        stored: the tensors of the entries, from `arrays_of`; copied to the host one at a time.

    Raises:
        OSError: the package cannot be written.
    """
    with PT2ArchiveWriter(str(path)) as archive:
        for name in PROGRAMS:
            for file in programs[name]:
                archive.write_file(f"{AOTINDUCTOR_DIR}{name}/{Path(file).name}", file)
        archive.write_string(ENTRY, _text(info))
        for index, tensor in enumerate(stored):
            host = tensor.detach().cpu().contiguous()
            storage = host.reshape(-1).view(torch.uint8).clone() if host.storage_offset() else host
            record = f"{WEIGHTS_DIR}q6k_{index}"
            archive.archive_file.write_record(record, storage.untyped_storage(), host.nbytes)  # type: ignore[arg-type]


def read(path: Path) -> tuple[Info, dict[str, Tensor]]:
    """Read a package: its text, and its constants by name on the CPU, as private views of the file.

    The file must not change while the constants are used.

    Raises:
        ProgramError: the file is not such a package, or its parts contradict each other.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as files, PT2ArchiveReader(str(path)) as archive:
            # Names without the folder that all entries are in.
            entries = {entry.filename.partition("/")[2]: entry for entry in files.infolist()}
            if ENTRY not in entries:
                raise ProgramError(f"{path}: a package, but not of an exported model: it has no {ENTRY}", _EXPORT)
            if (found := entries[ENTRY].file_size) > MAX_TEXT:
                raise ProgramError(f"{path}: {ENTRY} has {found} bytes, at most {MAX_TEXT} are read", _EXPORT)
            info = _parsed(path, archive.read_bytes(ENTRY).decode("utf-8", errors="replace"))
            offsets = dict[str, int]()
            for each in info.constants:
                record = f"{WEIGHTS_DIR}{each.entry}"
                if record not in entries:
                    raise ProgramError(f"{path}: no entry {record}, which {ENTRY} names", _EXPORT)
                entry = entries[record]
                if entry.file_size != each.nbytes or entry.compress_type != zipfile.ZIP_STORED:
                    packed = "" if entry.compress_type == zipfile.ZIP_STORED else ", compressed"
                    raise ProgramError(
                        f"{path}: {record} has {entry.file_size} bytes{packed}, expected {each.nbytes}, "
                        f"uncompressed, for {each.name}",
                        _EXPORT,
                    )
                offsets[each.entry] = archive.archive_file.get_record_offset(record)  # type: ignore[attr-defined]
    except (RuntimeError, zipfile.BadZipFile) as error:
        if isinstance(error, ProgramError):
            raise
        first = str(error).partition("\n")[0]
        raise ProgramError(f"{path}: not a PT2 archive: {first}", _EXPORT) from error
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    constants = dict[str, Tensor]()
    for each in info.constants:
        begin, end = offsets[each.entry], offsets[each.entry] + each.nbytes
        if end > size or begin % each.dtype.itemsize:
            raise ProgramError(
                f"{path}: {each.name} should be at {begin} to {end}, in a file of {size} bytes", _EXPORT
            )
        constants[each.name] = whole[begin:end].view(each.dtype).view(each.shape)
    return info, constants


def check_runtime(path: Path) -> None:
    """Check that a package's programs use the C++ runtime that torch does, before torch loads them.

    Raises:
        ProgramError: a program has its own copy, see `cpp_runtime`.
    """
    with zipfile.ZipFile(path) as files:
        for name in files.namelist():
            if AOTINDUCTOR_DIR in name and name.endswith(".so") and not cpp_runtime.is_shared(files.read(name)):
                raise ProgramError(
                    f"{path}: {name} has a C++ runtime of its own, and would crash in a process that has torch's",
                    _EXPORT,
                )


def _text(info: Info) -> str:
    if not _LINES["architecture"].fullmatch(info.architecture):
        raise ValueError(f"architecture: expected 1 to 64 characters and no blank, found {info.architecture!r:.80}")
    capability = "" if info.capability is None else f" {info.capability[0]}.{info.capability[1]}"
    lines = [
        f"{MAGIC} {VERSION}",
        f"torch {info.compiled_by}",
        f"device {info.device}{capability}",
        f"architecture {info.architecture}",
        f"dtype {_name(info.dtype)}",
        f"capacity {info.capacity}",
        f"chunk {info.chunk}",
        f"vocabulary {info.vocabulary}",
        *(f"constant {each.entry} {_name(each.dtype)} {_shape(each)} {each.name}" for each in info.constants),
        *(f"state {_name(each.dtype)} {_shape(each)} {each.name}" for each in info.state),
    ]
    return "\n".join(lines) + "\n"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(array: Array) -> str:
    return "x".join(map(str, array.shape)) or "scalar"


_ARRAY = r"(\w{1,16}) ((?:\d{1,12}x){0,7}\d{1,12}|scalar) (\S+)"
_LINES = {
    "constant": re.compile(rf"(q6k_\d{{1,9}}) {_ARRAY}", re.ASCII),
    "state": re.compile(rf"(){_ARRAY}", re.ASCII),
    "device": re.compile(r"(cpu|cuda (\d{1,2})\.(\d))", re.ASCII),
    **dict.fromkeys(("capacity", "chunk", "vocabulary"), re.compile(r"([1-9]\d{0,9})", re.ASCII)),
    **dict.fromkeys(("torch", "architecture", "dtype"), re.compile(r"(\S{1,64})")),
}


def _parsed(path: Path, text: str) -> Info:
    lines = text.split("\n")
    if lines[0] != f"{MAGIC} {VERSION}":
        raise ProgramError(f"{path}: {ENTRY} begins with {lines[0][:40]!r}, expected '{MAGIC} {VERSION}'", _EXPORT)
    if lines[-1]:
        raise ProgramError(f"{path}: {ENTRY} ends within the line {lines[-1][:80]!r}", _EXPORT)
    found: dict[str, list[re.Match[str]]] = {key: [] for key in _LINES}
    for number, line in enumerate(lines[1:-1], 2):
        key, _, rest = line.partition(" ")
        match = _LINES[key].fullmatch(rest) if key in _LINES else None
        if match is None:
            raise ProgramError(f"{path}: line {number} of {ENTRY} is {line[:80]!r}, which means nothing", _EXPORT)
        found[key].append(match)
    one = {key: matches[0] for key, matches in found.items() if len(matches) == 1}
    if missing := [key for key in _LINES if key not in one and key not in ("constant", "state")]:
        raise ProgramError(f"{path}: {ENTRY} should have one line of {', '.join(missing)}", _EXPORT)
    on_gpu = one["device"][2] is not None
    info = Info(
        compiled_by=one["torch"][1],
        device="cuda" if on_gpu else "cpu",
        capability=(int(one["device"][2]), int(one["device"][3])) if on_gpu else None,
        architecture=one["architecture"][1],
        dtype=_dtype(path, one["dtype"][1]),
        capacity=int(one["capacity"][1]),
        chunk=int(one["chunk"][1]),
        vocabulary=int(one["vocabulary"][1]),
        constants=tuple(_array(path, match) for match in found["constant"]),
        state=tuple(_array(path, match) for match in found["state"]),
    )
    names = [each.name for each in (*info.constants, *info.state)]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ProgramError(f"{path}: {ENTRY} has {twice[0]} twice", _EXPORT)
    if info.chunk > info.capacity:
        raise ProgramError(
            f"{path}: {ENTRY} has chunks of {info.chunk} tokens for {info.capacity} positions", _EXPORT
        )
    return info


def _array(path: Path, match: re.Match[str]) -> Array:
    shape = () if match[3] == "scalar" else tuple(map(int, match[3].split("x")))
    return Array(match[4], _dtype(path, match[2]), shape, match[1])


def _dtype(path: Path, name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ProgramError(f"{path}: {ENTRY} names a dtype {name}; known are {', '.join(DTYPES)}", _EXPORT)
    return DTYPES[name]
