"""A model in GGUF form: one file, or all parts of a split one found from any of them.

llama.cpp splits a model into `NAME-00001-of-00003.gguf` … and gives every part the keys `split.no`
(from 0), `split.count` and `split.tensors.count` (of the whole model). The first part holds the
model's own keys. Parts are looked for in the directory's listing, by the name of the file given.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from q6k_kernels.errors import GgufRejectedError
from q6k_kernels.gguf.file import ALIGNMENT, INTEGERS, GGUFFile, KeyValue, ValueType
from q6k_kernels.gguf.tensors import TensorRecord
from q6k_kernels.text import listing, shortened

_PART_NAME = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_PIECE = 1 << 20
_MAX_PADDING = 16 << 20
_OLD_COUNT = "general.split_count"
"""Key of the first release of llama.cpp's splitter, whose parts do not say which they are."""
_GET_ALL_PARTS = "Put all parts of one model, unrenamed and nothing else of that name, into one directory."


class GGUFModel:
    """All parts of a model. One file is open; those of a split model are opened for each read.

    Attributes:
        parts: the files in order; one for a model that is not split.
        architecture: `general.architecture`, or "" if the file names none.
    """

    def __init__(self, parts: list[GGUFFile]) -> None:
        self.parts = parts
        self.architecture = parts[0].architecture
        self._keys = dict[str, tuple[GGUFFile, KeyValue]]()
        for part in parts:
            for key, kv in part.kv.items():
                self._keys.setdefault(key, (part, kv))

    def close(self) -> None:
        """Close every part."""
        for part in self.parts:
            part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Size of all parts together in bytes."""
        return sum(part.size for part in self.parts)

    def tensors(self) -> Iterator[tuple[GGUFFile, TensorRecord]]:
        """Yield every tensor with its file, in the order of their data."""
        for part in self.parts:
            for record in part.tensors:
                yield part, record

    def key_values(self) -> Iterator[tuple[GGUFFile, KeyValue]]:
        """Yield every key once, with the first part that has it."""
        yield from self._keys.values()

    def value(self, key: str, default: Any = None) -> Any:
        """Read the value of a key from the first part that has it; see `GGUFFile.value`."""
        return self._keys[key][0].value(key) if key in self._keys else default

    def find(self, key: str) -> tuple[GGUFFile, KeyValue] | None:
        """Return the first part that has a key, and the place of its value there."""
        return self._keys.get(key)

    def is_tied(self) -> bool:
        """Check whether the head shares the token embedding: no `output.weight`, and not an encoder."""
        names = {record.name for _, record in self.tensors()}
        if "token_embd.weight" not in names or "output.weight" in names:
            return False
        part, kv = self._keys.get(f"{self.architecture}.attention.causal", (None, None))
        return part is None or kv is None or part.scalar(kv.key, ValueType.BOOL)

    def metadata(self) -> Iterator[bytes]:
        """Yield, in pieces, a GGUF file of this model's key-value pairs, byte for byte, without tensors.

        Keys that only later parts have follow those of the first.
        """
        first = self.parts[0]
        later = [(part, kv) for part, kv in self._keys.values() if part is not first]
        yield struct.pack("<4sIQQ", b"GGUF", first.version, 0, len(self._keys))
        length = 0
        for part, start, end in [
            (first, *first.kv_range),
            *((part, kv.start, kv.end) for part, kv in later),
        ]:
            for at in range(start, end, _PIECE):
                yield bytes(part.read(at, min(_PIECE, end - at)))
            length += end - start
        # Some readers look for the data section even if it is empty; none needs it behind a gigabyte of zeros.
        stated = self._keys.get(ALIGNMENT)
        padding = -(24 + length) % (stated[0].alignment if stated else first.alignment)
        for at in range(0, padding if padding <= _MAX_PADDING else 0, _PIECE):
            yield bytes(min(_PIECE, padding - at))


def open_gguf(path: str | Path) -> GGUFModel:
    """Open a GGUF file and, if it is a part of a split model, all other parts.

    Raises:
        GgufRejectedError: a file breaks the format, or the parts do not make up one model.
        GgufReadError: a file cannot be opened or read.
    """
    given = GGUFFile(Path(path))
    try:
        count = _split_number(given, "split.count", 1)
        if count > 1:
            return GGUFModel(_all_parts(given, count))
        if _split_number(given, _OLD_COUNT, 1) > 1 and "split.count" not in given.kv:
            raise given.reject(
                _OLD_COUNT,
                f"this is one of {given.value(_OLD_COUNT)} parts, and it lacks the keys that tell which",
                given.kv[_OLD_COUNT].start,
                remedy="Get the model in one file, or split by a current llama.cpp (llama-gguf-split).",
            )
        return GGUFModel([given])
    except BaseException:
        given.close()
        raise


def _all_parts(given: GGUFFile, count: int) -> list[GGUFFile]:
    """Return all parts of a split model, closed: there may be more than a process may hold open."""
    given.close()
    parts = list[GGUFFile]()
    for path in _siblings(given, count):
        part = given if path.name == given.path.name else GGUFFile(path)
        part.close()
        parts.append(part)
    _check_parts(parts, count)
    return parts


def _split_number(file: GGUFFile, key: str, default: int) -> int:
    kv = file.kv.get(key)
    if kv is None:
        return default
    if kv.type not in INTEGERS or (value := file.value(key)) < 0:
        found = kv.type.name if kv.type not in INTEGERS else value
        raise file.reject(key, f"expected a whole number, found {found}", kv.at)
    return int(value)


def _siblings(given: GGUFFile, count: int) -> list[Path]:
    """Return the paths of all parts in order, from the directory's listing."""
    match = _PART_NAME.fullmatch(given.path.name)
    number = _split_number(given, "split.no", 0) + 1
    if match is None or int(match["count"]) != count:
        raise given.reject(
            "file name",
            f"this is part {number} of {count}, but it is not named like 'NAME-{number:05}-of-{count:05}.gguf'",
            None,
            remedy="Give the parts back their names: the other parts are found by them.",
        )
    found = dict[int, Path]()
    extra = list[str]()
    for entry in sorted(given.path.parent.iterdir()):
        other = _PART_NAME.fullmatch(entry.name)
        if other is None or other["name"] != match["name"]:
            continue
        if int(other["count"]) == count and 1 <= int(other["number"]) <= count:
            found[int(other["number"])] = entry
        else:
            extra.append(entry.name)
    missing = [
        f"{match['name']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1) if number not in found
    ]
    problems = [f"{kind}: {listing(names)}" for kind, names in (("missing", missing), ("extra", extra)) if names]
    if problems:
        raise given.reject("split parts", "; ".join(problems), None, remedy=_GET_ALL_PARTS)
    return [found[number] for number in range(1, count + 1)]


def _check_parts(parts: list[GGUFFile], count: int) -> None:
    """Raise GgufRejectedError unless the parts belong to one model; its text lists those that do not."""
    first, problems, owner, numbers = parts[0], list[str](), dict[str, GGUFFile](), dict[int, str]()
    keys = dict[str, tuple[GGUFFile, KeyValue]]()
    total = _split_number(first, "split.tensors.count", 0)
    for index, part in enumerate(parts):
        name, number = part.path.name, _split_number(part, "split.no", 0)
        if _split_number(part, "split.count", 1) != count:
            problems.append(f"foreign: {name} (split.count {part.value('split.count')}, expected {count})")
        elif number != index:
            same = f", as {numbers[number]}" if number in numbers else ""
            problems.append(f"repeated: {name} (split.no {number}{same}; expected {index})")
        elif _split_number(part, "split.tensors.count", 0) != total:
            problems.append(f"foreign: {name} (split.tensors.count differs from {first.path.name})")
        elif differing := _differing_key(keys, part):
            problems.append(f"foreign: {name} ({shortened(differing)} differs from {keys[differing][0].path.name})")
        else:
            numbers[number] = name
            for record in part.tensors:
                if record.name in owner:
                    problems.append(
                        f"repeated: tensor {record.name!r} in {name} and {owner[record.name].path.name}"
                    )
                owner[record.name] = part
    if not problems and len(owner) != total:
        problems.append(f"foreign: the parts hold {len(owner)} tensors together, split.tensors.count says {total}")
    if problems:
        raise GgufRejectedError(first.path, "split parts", listing(problems, "; "), remedy=_GET_ALL_PARTS)


def _differing_key(known: dict[str, tuple[GGUFFile, KeyValue]], part: GGUFFile) -> str | None:
    """Return a key whose bytes differ from an earlier part's; if there is none, add the part's keys to `known`."""
    for key, kv in part.kv.items():
        # `split.no` differs between the parts of one model.
        if key in known and key != "split.no" and not _same(*known[key], part, kv):
            return key
    for key, kv in part.kv.items():
        known.setdefault(key, (part, kv))
    return None


def _same(first: GGUFFile, a: KeyValue, part: GGUFFile, b: KeyValue) -> bool:
    length = a.end - a.start
    return length == b.end - b.start and all(
        first.read(a.start + at, min(_PIECE, length - at)) == part.read(b.start + at, min(_PIECE, length - at))
        for at in range(0, length, _PIECE)
    )
