"""The copy of a model's key-value pairs, of one file and of several parts."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import gguf
import pytest

from gguf_builder import Builder, key_value, small_model
from q6k_kernels.gguf.model import open_gguf
from split_models import model_keys, three_parts, written


def metadata(path: Path) -> bytes:
    with open_gguf(path) as model:
        return b"".join(model.metadata())


def expected_metadata(pairs: Sequence[bytes], version: int = 3, alignment: int = 32) -> bytes:
    raw = b"GGUF" + struct.pack("<IQQ", version, 0, len(pairs)) + b"".join(pairs)
    return raw + bytes(-len(raw) % alignment)


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_of_one_file_is_its_key_value_pairs_byte_for_byte(tmp_path: Path, version: int) -> None:
    model = small_model()
    model.version = version
    assert metadata(model.write(tmp_path / "model.gguf")) == expected_metadata(model.kv, version)


def test_metadata_of_a_split_model_is_the_first_part_plus_keys_that_only_later_parts_have(tmp_path: Path) -> None:
    parts = three_parts()
    only_second = [key_value("second.tokens", ["a", "bc", ""]), key_value("second.flag", True)]
    both = key_value("late.key", 0.5)
    parts[1].kv = [only_second[0], *parts[1].kv, both, only_second[1]]
    parts[2].kv = [key_value("third.key", 2**40, "u64"), both, *parts[2].kv]
    paths = written(tmp_path, parts)
    expected = expected_metadata([*parts[0].kv, only_second[0], both, only_second[1], parts[2].kv[0]])
    assert metadata(paths[2]) == expected
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(expected)
    reader = gguf.GGUFReader(copy)
    assert reader.tensors == []
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert values == {
        "general.architecture": "llama", "llama.block_count": 2, "tokenizer.ggml.tokens": ["<s>", "é", ""],
        "split.no": 0, "split.count": 3, "split.tensors.count": 5, "second.tokens": ["a", "bc", ""],
        "late.key": 0.5, "second.flag": True, "third.key": 2**40,
    }  # fmt: skip


@pytest.mark.parametrize("alignment", [1, 8, 4096, 1 << 21])
def test_metadata_is_padded_to_the_alignment_it_states(tmp_path: Path, alignment: int) -> None:
    model = small_model()
    model.alignment = alignment
    model.kv.append(key_value("general.alignment", alignment))
    written = metadata(model.write(tmp_path / "model.gguf"))
    assert written == expected_metadata(model.kv, alignment=alignment)


def test_metadata_is_not_padded_with_a_gigabyte(tmp_path: Path) -> None:
    kv = [*small_model().kv, key_value("general.alignment", 1 << 30)]
    written = metadata(Builder([], kv).write(tmp_path / "model.gguf"))
    assert written == expected_metadata(kv, alignment=1)
    (tmp_path / "again.gguf").write_bytes(written)
    assert (metadata(tmp_path / "again.gguf"), gguf.GGUFReader(tmp_path / "again.gguf").tensors) == (written, [])


def test_metadata_is_padded_to_the_alignment_that_only_a_later_part_states(tmp_path: Path) -> None:
    parts = three_parts()
    parts[1].alignment = 4096
    parts[1].kv.append(key_value("general.alignment", 4096))
    written_to = written(tmp_path, parts)
    expected = expected_metadata([*parts[0].kv, parts[1].kv[-1]], alignment=4096)
    assert metadata(written_to[0]) == expected


def test_metadata_of_a_large_vocabulary_is_copied_whole(tmp_path: Path) -> None:
    tokens = key_value("tokenizer.ggml.tokens", [f"token {i}" for i in range(200_000)])
    assert len(tokens) > 3 << 20
    model = Builder(kv=[*model_keys()[:2], tokens, key_value("last", "x")])
    path = model.write(tmp_path / "model.gguf")
    assert metadata(path) == expected_metadata(model.kv)
    with open_gguf(path) as opened:
        assert max(map(len, opened.metadata())) <= 1 << 20
