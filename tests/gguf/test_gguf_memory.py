"""What large hostile files cost in memory, and what their texts do to a terminal, through the command line."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gguf_builder import (
    Builder,
    header,
    key_value,
    record,
    string,
    tensors,
    weight,
)
from q6k_convert.errors import ExitCode

KEY_BYTES = 500
"""Bytes of a long key, so that all keys together come near their limit."""

MEMORY_LIMIT = 200 << 20

# A process of its own, and a small one: a child's figure starts from that of the process that forked it.
LAUNCHER = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
unit = 1 if sys.platform == "darwin" else 1024
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit)
"""


def inspected(path: Path) -> tuple[int, int, str]:
    """Exit code, peak memory and standard error of `q6k-convert inspect`."""
    command = [sys.executable, "-m", "q6k_convert", "inspect", str(path)]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *command], capture_output=True, text=True, check=True, timeout=60
    )
    code, peak = done.stdout.splitlines()[-1].split()
    return int(code), int(peak), done.stderr


def many_pairs() -> bytes:
    good = [key_value(f"key.{i:05}", i) for i in range(32_000 - 1)]
    return Builder(kv=[*good, key_value("key.00007", 1)]).build()


def many_long_keys() -> bytes:
    good = [key_value(f"{i:05}" + "k" * (KEY_BYTES - 5), 1, "u8") for i in range(32_767)]
    return Builder(kv=[*good, key_value("", 1)]).build()


def many_long_wide_keys() -> bytes:
    # One character outside the BMP makes Python take four bytes for every character.
    good = [key_value(f"{i:05}" + "k" * (KEY_BYTES - 9) + "🙂", 1, "u8") for i in range(32_767)]
    return Builder(kv=[*good, key_value("", 1)]).build()


def many_empty_strings() -> bytes:
    count = 2_000_000
    return header(0, 2) + string("tokens") + struct.pack("<IIQ", 9, 8, count) + bytes(8 * count) + b"\xff" * 64


def many_short_strings() -> bytes:
    count = 1 << 21
    strings = (struct.pack("<Q", 3) + b"abc") * count
    return header(0, 2) + string("tokens") + struct.pack("<IIQ", 9, 8, count) + strings + b"\xff" * 64


def many_tensors() -> bytes:
    good = [record(f"blk.{i}.weight", offset=32 * i) for i in range(16_000 - 1)]
    return tensors(*good, record("last", (1 << 63,)), data=16_000 * 32 + 64)()


def many_tensors_last_overlaps() -> bytes:
    good = [record(f"blk.{i}.weight", offset=32 * i) for i in range(16_000 - 1)]
    return tensors(*good, record("last", (9,), offset=32 * 15_999 - 32), data=16_000 * 32 + 64)()


def long_strings() -> bytes:
    longest = "k" * ((16 << 20) - 4) + "🙂"
    return header(0, 5) + b"".join(key_value(f"key.{i}", longest) for i in range(4)) + string("")


def long_numbers() -> bytes:
    array = struct.pack("<IIQ", 9, 0, 100_000_000) + bytes(100_000_000)
    return header(0, 2) + string("numbers") + array + string("")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (many_pairs, f"key 'key.00007' at byte {24 + 25 * 31_999}: appears twice, first at byte {24 + 25 * 7}"),
        (many_long_keys, "key 32767 at byte"),
        (many_long_wide_keys, "key 32767 at byte"),
        (many_empty_strings, "key 1 at byte 16000054: string of 18446744073709551615 bytes"),
        (many_short_strings, "key 1 at byte"),
        (many_tensors, "tensor 'last' at byte"),
        (many_tensors_last_overlaps, "tensor 'last' at byte"),
        (long_strings, "key 4 at byte"),
        (long_numbers, "key 1 at byte"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_large_hostile_file_costs_little_memory(
    tmp_path: Path, content: Callable[[], bytes], problem: str
) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content())
    code, peak, said = inspected(path)
    assert code == ExitCode.INPUT_REJECTED
    assert problem in said
    assert peak < MEMORY_LIMIT


TEXTS = ["[/INST] [bold]x", "a\x1b[31mb", "a\x07b", "a\x9bb", "[", "\\[/x]"]


@pytest.mark.parametrize("place", ["key", "value", "tensor"])
def test_inspect_shows_any_text_of_a_file_as_it_is_but_for_control_characters(tmp_path: Path, place: str) -> None:
    texts = [f"text {number} {text}" for number, text in enumerate(TEXTS)]
    model = Builder(tensors=[weight("w", (1, 256))], kv=[key_value("general.architecture", "llama")])
    if place == "tensor":
        # The reader itself refuses control characters here.
        texts = ["".join(c for c in text if c.isprintable()) for text in texts]
        model.tensors = [weight(text, (1, 256)) for text in texts]
    for number, text in enumerate(texts):
        if place != "tensor":
            model.kv.append(key_value(text, 1) if place == "key" else key_value(f"key.{number}", text))
    path = model.write(tmp_path / "model.gguf")
    command = [sys.executable, "-m", "q6k_convert", "inspect", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (ExitCode.DONE, "")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.stdout)
    for text in texts:
        for printable in re.split("[\x00-\x1f\x7f-\x9f]", text):
            assert printable in done.stdout


@pytest.mark.parametrize(
    ("key", "strings"), [("general.architecture", True), ("split.count", False), ("llama.attention.causal", True)]
)
def test_a_huge_array_where_one_value_belongs_costs_little_memory(tmp_path: Path, key: str, strings: bool) -> None:
    count = 1 << 21
    array = (8, count, (struct.pack("<Q", 12) + b"abcdefghijkl") * count) if strings else (
        4, 20_000_000, b"\x80\x81\x82\x83" * 20_000_000
    )  # fmt: skip
    pair = string(key) + struct.pack("<IIQ", 9, *array[:2]) + array[2]
    architecture = [] if key == "general.architecture" else [key_value("general.architecture", "llama")]
    model = Builder(kv=[*architecture, pair], tensors=[weight("token_embd.weight", (1, 256))])
    code, peak, said = inspected(model.write(tmp_path / "hostile.gguf"))
    assert code in (ExitCode.DONE, ExitCode.INPUT_REJECTED)
    assert len(said) < 10_000
    assert peak < MEMORY_LIMIT
