"""Models in several parts, and the error where parts make up none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from gguf_builder import F32, Q8_0, Builder, key_value, weight
from q6k_kernels.errors import GgufRejectedError
from q6k_kernels.gguf.model import GGUFModel, open_gguf


def split_keys(number: int, count: int, total: int) -> list[bytes]:
    """The keys that llama.cpp gives a part, in its types."""
    return [
        key_value("split.no", number, "u16"),
        key_value("split.count", count, "u16"),
        key_value("split.tensors.count", total, "i32"),
    ]


def model_keys(architecture: str = "llama") -> list[bytes]:
    return [
        key_value("general.architecture", architecture),
        key_value("llama.block_count", 2),
        key_value("tokenizer.ggml.tokens", ["<s>", "é", ""]),
    ]


def three_parts() -> list[Builder]:
    """A model of five tensors in three parts; only the first has the model's own keys."""
    return [
        Builder(
            tensors=[weight("token_embd.weight", (4, 256), seed=1), weight("output_norm.weight", (256,), F32, 2)],
            kv=[*model_keys(), *split_keys(0, 3, 5)],
        ),
        Builder(
            tensors=[weight("blk.0.w", (2, 512), seed=3), weight("blk.0.v", (2, 64), Q8_0, seed=4)],
            kv=split_keys(1, 3, 5),
        ),
        Builder(tensors=[weight("blk.1.w", (3, 256), seed=5)], kv=split_keys(2, 3, 5)),
    ]


def part_name(number: int, count: int = 3, name: str = "model") -> str:
    return f"{name}-{number:05}-of-{count:05}.gguf"


NAMES = [part_name(number) for number in (1, 2, 3)]


def written(directory: Path, parts: Sequence[Builder], name: str = "model") -> list[Path]:
    """The parts, as files."""
    directory.mkdir(exist_ok=True)
    return [part.write(directory / part_name(number, len(parts), name)) for number, part in enumerate(parts, 1)]


def tensor_names(model: GGUFModel) -> list[str]:
    return [record.name for _, record in model.tensors()]


def open_files() -> int:
    """How many files this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def rejection(path: Path) -> GgufRejectedError:
    """The error that opening `path` as a model ends in; no file stays open."""
    before = open_files()
    with pytest.raises(GgufRejectedError) as caught:
        open_gguf(path)
    assert open_files() == before
    assert caught.value.remedy
    return caught.value
