"""Recognise what was given in place of a GGUF file or a bundle, and name the command that does what was meant."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from q6k_convert.errors import InputRejectedError, IOFailedError
from q6k_convert.hub import fetched_bundle, parse
from q6k_convert.text import plural
from q6k_kernels.bundle.manifest import METADATA_NAME, is_bundle
from q6k_kernels.text import listing

if TYPE_CHECKING:
    from q6k_convert.cli.terminal import Terminal

Wanted = Literal["GGUF file", "bundle", "bundle or GGUF file"]

_HEAD_BYTES = 512
_MOST_ENTRIES = 10_000
_PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf", re.DOTALL | re.IGNORECASE)
_TO_GGUF = (
    "Make a GGUF file of the model with llama.cpp (`python convert_hf_to_gguf.py MODEL_DIR`), or download one: "
    "ORG/REPO:QUANTISATION."
)
_UNPACK = "Unpack it, and give the GGUF file that it holds."


def _starts(*magics: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(magics)


_KINDS: tuple[tuple[Callable[[bytes], bool], str, str], ...] = (
    (lambda head: head[8:9] == b"{" and head[5:8] == bytes(3), "a safetensors file", _TO_GGUF),
    (
        _starts(b"version https://git-lfs"),
        "a pointer of Git LFS, without the content",
        "Fetch the content: `git lfs pull` in its repository.",
    ),
    (
        lambda head: head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")),
        "a web page",
        "Download the file itself: its address on the Hub has /resolve/ in it, that of the page /blob/.",
    ),
    (_starts(b"lmgg", b"fmgg", b"tjgg", b"algg"), "a GGML file of 2023", "Download a GGUF file of the model."),
    (_starts(b"\x80\x02", b"PK\x03\x04"), "a PyTorch checkpoint or a ZIP archive", _TO_GGUF),
    (_starts(b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf"), "compressed", _UNPACK),
    (_starts(b"{", b"["), "JSON", _TO_GGUF),
)
"""Test of a file's first bytes, what such a file is, and what to do with it."""


def check_given(path: Path, wanted: Wanted, command: str) -> None:
    """Check that a path is not visibly something else than is wanted; the readers find all other faults.

    Args:
        path: path that was given, possibly of nothing.
        wanted: what the command takes.
        command: beginning of the command that was run, like "q6k-convert verify".

    Raises:
        InputRejectedError: it is a bundle in place of a GGUF file or the reverse, a part of a bundle, a directory
            with models, or a file of another kind.
    """
    if path.is_dir():
        if not is_bundle(path):
            _reject_directory(path, wanted, command)
        elif "bundle" not in wanted:
            raise InputRejectedError(
                f"{path} is a bundle, which has been converted",
                f"Look inside or run it: `q6k-convert inspect {_quoted(path)}`, "
                f"`q6k-convert generate {_quoted(path)} -p TEXT`.",
            )
    elif path.is_file():
        _check_file(path, wanted, command)


def local_bundle(given: str, command: str) -> Path:
    """Return the path of a bundle that was given, checked as by `check_given`.

    Raises:
        InputRejectedError: as `check_given`.
        IOFailedError: there is nothing of that name.
    """
    path = Path(given)
    check_given(path, "bundle", command)
    if not os.path.lexists(path):
        raise IOFailedError(f"{path}: No such file or directory", "Check the path and its permissions.")
    return path


def bundle_path(given: str, command: str, terminal: Terminal) -> Path:
    """Return the path of a bundle that was given, checked as by `check_given`; one of the Hub is downloaded.

    Raises:
        InputRejectedError: as `check_given`; or it is the name of a GGUF file on the Hub.
        IOFailedError: there is nothing of that name, and it is none of the Hub.
        Q6KConvertError: as `hub.resolve`.
    """
    reference = parse(given, bundle=True)
    if reference is None:
        return local_bundle(given, command)
    if not reference.bundle:
        name = _stem(Path(reference.file)) if reference.file else reference.repository.partition("/")[2]
        raise _unconverted(f"{reference.text} is a GGUF file of the Hub, not a bundle", given, name, command)
    return fetched_bundle(reference, terminal.note, terminal.progress)


def _check_file(path: Path, wanted: Wanted, command: str) -> None:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    is_gguf = head.startswith(b"GGUF")
    if is_gguf and "GGUF" in wanted:
        return
    if is_bundle(path.parent):
        raise InputRejectedError(
            f"{path} is a file of a bundle, not a {wanted}",
            f"Look inside the bundle: `q6k-convert inspect {_quoted(path.parent)}`."
            if wanted == "GGUF file"
            else f"Give its directory: `{command} {_quoted(path.parent)}`.",
        )
    if is_gguf:
        raise _unconverted(f"{path} is a GGUF file, not a bundle", str(path), _stem(path), command)
    for matches, kind, remedy in _KINDS:
        if matches(head):
            raise InputRejectedError(f"{path} is {kind}, not a {wanted}", remedy)


def _reject_directory(path: Path, wanted: Wanted, command: str) -> None:
    """Raise an error that lists what is in a directory, if it has bundles, GGUF files or another model."""
    entries = sorted(islice(path.iterdir(), _MOST_ENTRIES))
    if "bundle" in wanted and any(entry.name == METADATA_NAME for entry in entries):
        return  # of a bundle that has lost its manifest, which the readers say
    bundles = [entry for entry in entries if entry.is_dir() and is_bundle(entry)]
    files = [_first_part(entry) for entry in entries if entry.suffix.lower() == ".gguf" and entry.is_file()]
    for kind, found in (("bundle", bundles), ("GGUF file", list(dict.fromkeys(files)))):
        if not found or (kind == "bundle" and wanted == "GGUF file"):
            continue
        names = listing([each.name for each in found])
        cause = f"{path} is not a {wanted} but a directory with {plural(len(found), kind)}: {names}"
        if kind not in wanted:
            raise _unconverted(cause, str(found[0]), _stem(found[0]), command)
        raise InputRejectedError(cause, f"Name one: `{command} {_quoted(found[0])}`.")
    if any(entry.name == "config.json" or entry.suffix == ".safetensors" for entry in entries):
        raise InputRejectedError(f"{path} is not a {wanted} but a model in another format", _TO_GGUF)


def _unconverted(cause: str, source: str, name: str, command: str) -> InputRejectedError:
    out = shlex.quote(f"{name}/")
    return InputRejectedError(
        cause,
        f"Convert it first: `q6k-convert convert {shlex.quote(source)} {out}`, then `{command} {out}`.",
    )


def _first_part(path: Path) -> Path:
    part = _PART.fullmatch(path.name)
    return path.with_name(f"{part[1]}-00001-of-{part[2]}.gguf") if part else path


def _stem(path: Path) -> str:
    part = _PART.fullmatch(path.name)
    return part[1] if part else path.stem


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
