"""Parts that do not make up one model: what keeps them from it is named, and no file stays open."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gguf_builder import Builder, key_value, string
from q6k_kernels.errors import GgufReadError, GgufRejectedError
from q6k_kernels.gguf.model import open_gguf
from split_models import NAMES, model_keys, open_files, part_name, rejection, split_keys, three_parts, written


@pytest.mark.parametrize(
    ("given", "gone"),
    [pytest.param(0, [1], id="second"), pytest.param(2, [0], id="first"), pytest.param(1, [0, 2], id="all-others")],
)
def test_missing_parts_are_listed_by_name(tmp_path: Path, given: int, gone: list[int]) -> None:
    paths = written(tmp_path, three_parts())
    for index in gone:
        paths[index].unlink()
    missing = ", ".join(NAMES[index] for index in gone)
    assert rejection(paths[given]).cause == f"{paths[given]}: split parts: missing: {missing}"


@pytest.mark.parametrize(
    "extra",
    [part_name(4), part_name(0), part_name(1, 2), part_name(2, 2), part_name(99999, 99999)],
)
def test_an_extra_part_is_listed_by_name(tmp_path: Path, extra: str) -> None:
    paths = written(tmp_path, three_parts())
    (tmp_path / extra).write_bytes(b"")
    assert rejection(paths[0]).cause == f"{paths[0]}: split parts: extra: {extra}"


def test_missing_and_extra_parts_are_listed_together(tmp_path: Path) -> None:
    paths = written(tmp_path, three_parts())
    paths[1].rename(tmp_path / part_name(2, 4))
    said = f"split parts: missing: {NAMES[1]}; extra: {part_name(2, 4)}"
    assert rejection(paths[2]).cause == f"{paths[2]}: {said}"


def test_many_missing_parts_are_counted(tmp_path: Path) -> None:
    path = Builder(kv=split_keys(0, 40000, 1)).write(tmp_path / part_name(1, 40000))
    message = rejection(path).cause
    assert f"missing: {part_name(2, 40000)}, {part_name(3, 40000)}" in message
    assert message.endswith(f"{part_name(11, 40000)}, and 39989 more")


@pytest.mark.parametrize(
    "name", ["model.gguf", "model-00002-of-00004.gguf", "model-2-of-3.gguf", NAMES[1] + ".bak"]
)
def test_a_misnamed_part_is_rejected_with_the_name_it_should_have(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, three_parts())[1].rename(tmp_path / name)
    assert rejection(path).cause == (
        f"{path}: file name: this is part 2 of 3, but it is not named like 'NAME-00002-of-00003.gguf'"
    )


def test_the_same_part_twice_is_rejected_with_both_names(tmp_path: Path) -> None:
    paths = written(tmp_path, three_parts())
    paths[2].write_bytes(paths[1].read_bytes())
    for given in paths:
        assert rejection(given).cause == (
            f"{paths[0]}: split parts: repeated: {NAMES[2]} (split.no 1, as {NAMES[1]}; expected 2)"
        )


def test_parts_named_in_the_wrong_order_are_both_listed(tmp_path: Path) -> None:
    first, second, third = three_parts()
    paths = written(tmp_path, [first, third, second])
    message = rejection(paths[0]).cause
    assert f"{NAMES[1]} (split.no 2; expected 1)" in message
    assert f"{NAMES[2]} (split.no 1; expected 2)" in message


def of_another_count(part: Builder) -> None:
    part.kv = split_keys(1, 4, 5)


def without_count(part: Builder) -> None:
    part.kv = []


def of_another_tensor_count(part: Builder) -> None:
    part.kv = split_keys(1, 3, 6)


def of_another_architecture(part: Builder) -> None:
    part.kv = [*model_keys("gemma3"), *split_keys(1, 3, 5)]


def of_another_vocabulary(part: Builder) -> None:
    part.kv = [*split_keys(1, 3, 5), key_value("tokenizer.ggml.tokens", ["<s>", "é", "x"])]


def of_another_type(part: Builder) -> None:
    part.kv = [*split_keys(1, 3, 5), key_value("llama.block_count", 2, "i32")]


@pytest.mark.parametrize(
    ("alter", "how"),
    [
        (of_another_count, "(split.count 4, expected 3)"),
        (without_count, "(split.count None, expected 3)"),
        (of_another_tensor_count, f"(split.tensors.count differs from {NAMES[0]})"),
        (of_another_architecture, f"('general.architecture' differs from {NAMES[0]})"),
        (of_another_vocabulary, f"('tokenizer.ggml.tokens' differs from {NAMES[0]})"),
        (of_another_type, f"('llama.block_count' differs from {NAMES[0]})"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_foreign_part_is_rejected_by_name(tmp_path: Path, alter: Callable[[Builder], None], how: str) -> None:
    parts = three_parts()
    alter(parts[1])
    paths = written(tmp_path, parts)
    for given in (paths[0], paths[2]):
        assert rejection(given).cause == f"{paths[0]}: split parts: foreign: {NAMES[1]} {how}"


def test_a_key_that_only_later_parts_have_must_be_the_same_in_all_of_them(tmp_path: Path) -> None:
    parts = three_parts()
    parts[1].kv.append(key_value("late.key", 1))
    parts[2].kv.append(key_value("late.key", 2))
    message = rejection(written(tmp_path, parts)[0]).cause
    assert message.endswith(f"split parts: foreign: {NAMES[2]} ('late.key' differs from {NAMES[1]})")


def test_every_culprit_is_listed(tmp_path: Path) -> None:
    parts = three_parts()
    of_another_architecture(parts[1])
    parts[2].kv = split_keys(0, 3, 5)
    assert rejection(written(tmp_path, parts)[0]).cause.endswith(
        f": split parts: foreign: {NAMES[1]} ('general.architecture' differs from {NAMES[0]}); "
        f"repeated: {NAMES[2]} (split.no 0, as {NAMES[0]}; expected 2)"
    )


def test_one_tensor_in_two_parts_is_rejected_with_both_names(tmp_path: Path) -> None:
    parts = three_parts()
    parts[2].tensors = [replace(parts[2].tensors[0], name="blk.0.w")]
    paths = written(tmp_path, parts)
    assert rejection(paths[0]).cause == (
        f"{paths[0]}: split parts: repeated: tensor 'blk.0.w' in {NAMES[2]} and {NAMES[1]}"
    )


@pytest.mark.parametrize("total", [4, 6, 2**31 - 1])
def test_tensors_fewer_or_more_than_announced_are_rejected(tmp_path: Path, total: int) -> None:
    parts = three_parts()
    for number, part in enumerate(parts):
        part.kv[-3:] = split_keys(number, 3, total)
    message = rejection(written(tmp_path, parts)[0]).cause
    assert message.endswith(f"the parts hold 5 tensors together, split.tensors.count says {total}")


@pytest.mark.parametrize(
    ("content", "kind", "shown"),
    [
        (True, "bool", "BOOL"),
        (2.0, "f32", "FLOAT32"),
        ("3", None, "STRING"),
        (-3, "i32", "-3"),
        ([3], "i32", "ARRAY"),
    ],
    ids=["bool", "float", "string", "negative", "array"],
)
@pytest.mark.parametrize("key", ["split.no", "split.count", "split.tensors.count"])
def test_split_keys_must_be_whole_numbers(tmp_path: Path, key: str, content: Any, kind: str, shown: str) -> None:
    good = {"split.no": 0, "split.count": 3, "split.tensors.count": 5}
    parts = three_parts()
    before = [*model_keys(), *(key_value(k, v) for k, v in good.items() if k != key)]
    parts[0].kv = [*before, key_value(key, content, kind)]
    paths = written(tmp_path, parts)
    error = rejection(paths[0])
    # The value itself, after the key and its type; for an array any byte of it.
    at = 24 + sum(map(len, before)) + len(string(key)) + 4
    assert error.item == key
    assert error.offset in ((at, at + 12) if isinstance(content, list) else (at,))
    assert f"expected a whole number, found {shown}" in str(error)


def test_a_broken_other_part_is_named(tmp_path: Path) -> None:
    paths = written(tmp_path, three_parts())
    paths[1].write_bytes(b"junk" + paths[1].read_bytes()[4:])
    assert rejection(paths[0]).cause.startswith(f"{paths[1]}: magic at byte 0: ")


def test_a_directory_in_place_of_a_part_is_an_io_failure(tmp_path: Path) -> None:
    paths = written(tmp_path, three_parts())
    paths[1].unlink()
    paths[1].mkdir()
    with pytest.raises(GgufReadError, match=re.escape(f"{paths[1]} is a directory")):
        open_gguf(paths[0])


def test_a_model_that_cannot_be_opened_leaves_no_file_open(tmp_path: Path) -> None:
    path = Builder(kv=[key_value("general.architecture", [b"\xff"])]).write(tmp_path / "model.gguf")
    before = open_files()
    for _ in range(3):
        # Accepted or rejected, it has to let go of the file.
        with suppress(GgufRejectedError):
            open_gguf(path).close()
    assert open_files() == before
