"""Models of one file or of several parts: how parts are found, and whether the head is tied."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gguf_builder import Builder, key_value, small_model, weight
from q6k_convert.convert.pipeline import convert
from q6k_kernels.gguf.model import open_gguf
from split_models import NAMES, model_keys, rejection, split_keys, tensor_names, three_parts, written


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
