"""Models of one file or of several parts: how parts are found, and what keeps them from being one model."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest

from gguf_builder import F32, Q8_0, Builder, key_value, small_model, string, weight
from q6k_convert.convert.pipeline import convert
from q6k_kernels.errors import GgufReadError, GgufRejectedError
from q6k_kernels.gguf.model import GGUFModel, open_gguf

# Split models


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


@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_part_finds_all_parts_in_order(tmp_path: Path, given: int) -> None:
    builders = three_parts()
    paths = written(tmp_path, builders)
    with open_gguf(paths[given]) as model:
        assert [part.path for part in model.parts] == paths
        assert model.architecture == "llama"
        assert model.size == sum(path.stat().st_size for path in paths)
        expected = [(path, t) for path, builder in zip(paths, builders, strict=True) for t in builder.tensors]
        found = [(part.path, r.name, bytes(part.read(r.offset, r.nbytes))) for part, r in model.tensors()]
        assert found == [(path, t.name, t.data) for path, t in expected]


@pytest.mark.parametrize("name", ["model", "[a]*?", "x-00001-of-00002", "new\nline", "-", ""], ids=repr)
def test_parts_are_found_whatever_the_model_is_called(tmp_path: Path, name: str) -> None:
    paths = written(tmp_path, three_parts(), name)
    with open_gguf(paths[2]) as model:
        assert [part.path for part in model.parts] == paths


def test_other_models_and_other_files_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    paths = written(tmp_path, three_parts())
    written(tmp_path, [small_model()] * 2, "model-b")
    written(tmp_path, [small_model()], "mode")
    for other in ("model.gguf", "model-00001-of-00003.gguf.part", "model-1-of-3.gguf", "model-00004-of-00003.txt"):
        (tmp_path / other).write_bytes(b"")
    with open_gguf(paths[0]) as model:
        assert [part.path for part in model.parts] == paths


def test_a_first_part_without_tensors_is_fine(tmp_path: Path) -> None:
    parts = three_parts()
    parts[0].tensors = []
    for number, part in enumerate(parts):
        part.kv[-3:] = split_keys(number, 3, 3)
    with open_gguf(written(tmp_path, parts)[0]) as model:
        assert tensor_names(model) == ["blk.0.w", "blk.0.v", "blk.1.w"]


def test_tensors_come_part_by_part_each_in_the_order_of_its_data(tmp_path: Path) -> None:
    parts = three_parts()
    late, early = parts[1].tensors
    parts[1].tensors = [replace(late, offset=256), replace(early, offset=0)]
    with open_gguf(written(tmp_path, parts)[1]) as model:
        assert tensor_names(model) == ["token_embd.weight", "output_norm.weight", "blk.0.v", "blk.0.w", "blk.1.w"]
        read = {record.name: bytes(part.read(record.offset, record.nbytes)) for part, record in model.tensors()}
    assert (read["blk.0.w"], read["blk.0.v"]) == (late.data, early.data)


def test_a_split_of_one_part_is_one_file_whatever_its_name(tmp_path: Path) -> None:
    path = Builder(tensors=[weight("w", (1, 256))], kv=[*model_keys(), *split_keys(0, 1, 1)]).write(
        tmp_path / "any.gguf"
    )
    with open_gguf(path) as model:
        assert [part.path for part in model.parts] == [path]


def test_values_come_from_the_first_part_that_has_the_key(tmp_path: Path) -> None:
    parts = three_parts()
    parts[2].kv.append(key_value("late.key", "late"))
    with open_gguf(written(tmp_path, parts)[2]) as model:
        assert model.value("split.no") == 0
        assert model.value("late.key") == "late"
        assert model.value("llama.block_count") == 2
        assert model.value("absent", "default") == "default"


def test_parts_are_found_through_the_symlinks_of_a_hugging_face_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "3f5a"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(written(blobs, three_parts())):
        blob = path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    with open_gguf(snapshot / NAMES[1]) as model:
        assert [part.path for part in model.parts] == [snapshot / name for name in NAMES]
        assert len(tensor_names(model)) == 5
    result = convert(snapshot / NAMES[2], tmp_path / "out")
    assert [source.name for source in result.manifest.sources] == NAMES
    blob = blobs / f"{1:064x}"
    assert rejection(blob).args[0].startswith(f"{blob}: file name: this is part 2 of 3, but it is not named like")


def test_a_split_model_converts_to_the_arrays_of_the_whole_one(tmp_path: Path) -> None:
    parts = three_parts()
    whole = Builder(tensors=[t for part in parts for t in part.tensors], kv=model_keys())
    one = convert(whole.write(tmp_path / "whole.gguf"), tmp_path / "one")
    many = convert(written(tmp_path, parts)[1], tmp_path / "many")
    assert [t.name for t in many.manifest.tensors] == [t.name for t in one.manifest.tensors]
    assert many.manifest.tensors == one.manifest.tensors
    shard = "model.safetensors"
    assert (tmp_path / "many" / shard).read_bytes() == (tmp_path / "one" / shard).read_bytes()


# Parts that do not make up one model


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


# The copy of the key-value pairs


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


# The tied head


@pytest.mark.parametrize(
    ("tensors", "keys", "tied"),
    [
        (["token_embd.weight", "blk.0.w"], [], True),
        (["token_embd.weight", "output.weight"], [], False),
        (["blk.0.w"], [], False),
        (["output.weight"], [], False),
        (["token_embd.weight"], [("llama.attention.causal", True)], True),
        (["token_embd.weight"], [("llama.attention.causal", False)], False),
        (["token_embd.weight"], [("bert.attention.causal", False)], True),
        (["token_embd.weight", "output_norm.weight"], [], True),
    ],
    ids=[
        "no-output", "output", "no-embedding", "output-alone", "causal", "encoder", "other-architecture", "norm"
    ],
)  # fmt: skip
def test_the_head_is_tied_without_output_weight_unless_it_is_an_encoder(
    tmp_path: Path, tensors: list[str], keys: list[tuple[str, bool]], tied: bool
) -> None:
    builder = Builder(
        tensors=[weight(name, (2, 256)) for name in tensors],
        kv=[key_value("general.architecture", "llama"), *(key_value(*pair) for pair in keys)],
    )
    path = builder.write(tmp_path / "model.gguf")
    with open_gguf(path) as model:
        assert model.is_tied() is tied
    manifest = convert(path, tmp_path / "out").manifest
    assert manifest.tied == ({"output.weight": "token_embd.weight"} if tied else {})


def test_an_output_weight_in_a_later_part_unties_the_head(tmp_path: Path) -> None:
    parts = three_parts()
    with open_gguf(written(tmp_path / "tied", parts)[0]) as model:
        assert model.is_tied()
    parts[2].tensors = [replace(parts[2].tensors[0], name="output.weight")]
    with open_gguf(written(tmp_path / "untied", parts)[0]) as model:
        assert not model.is_tied()


def test_a_model_without_an_architecture_opens(tmp_path: Path) -> None:
    path = Builder(tensors=[weight("token_embd.weight", (1, 256))], kv=[]).write(tmp_path / "model.gguf")
    with open_gguf(path) as model:
        assert model.architecture == ""
        assert model.is_tied()
