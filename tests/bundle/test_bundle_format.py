"""The bundle's files: safetensors layout, shards, manifest rules, and the writer's own guards."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from q6k_kernels.bundle import manifest as manifests
from q6k_kernels.bundle.manifest import BundleError, Manifest, SourceFile, StoredArray, StoredFile, StoredTensor
from q6k_kernels.bundle.shards import DTYPE_BYTES, ArraySpec, index_json, lay_out, plan_shards
from q6k_kernels.bundle.writer import BundleWriter

specs = st.builds(
    lambda dtype, shape: (dtype, tuple(shape)),
    st.sampled_from(sorted(DTYPE_BYTES)),
    st.lists(st.integers(1, 5), max_size=3),
)


def example() -> Manifest:
    array = StoredArray("x.ql", "U8", [3, 128], "model.safetensors", "00")
    return Manifest(
        producer="test",
        options={"scales": "bf16"},
        architecture="llama",
        sources=[SourceFile("m.gguf", 10, "11")],
        files={"model.safetensors": StoredFile(20, 8, "22")},
        tied={"output.weight": "token_embd.weight"},
        tensors=[
            StoredTensor("x", "Q6_K", [3, 256], "planar", "q6_k", {"ql": array}),
            StoredTensor("é\n", "Q8_0", [3, 256], "skipped", None, {}),
        ],
    )


def altered(directory: Path, **fields: object) -> Path:
    """A manifest with top-level fields replaced and its own checksum made right again."""
    content = json.loads(manifests.serialize(example()))
    del content["manifest_checksum"]
    content |= fields
    content["manifest_checksum"] = manifests.checksum(json.dumps(content, indent=1).encode())
    (directory / "bundle.json").write_text(json.dumps(content, indent=1) + "\n")
    return directory


@given(st.lists(specs, max_size=12))
def test_arrays_lie_back_to_back_aligned_and_in_header_order(arrays: list[tuple[str, tuple[int, ...]]]) -> None:
    shard = lay_out("s", [ArraySpec(f"a{i}", dtype, shape) for i, (dtype, shape) in enumerate(arrays)])
    (length,) = struct.unpack_from("<Q", shard.header)
    header = json.loads(shard.header[8:])
    assert length + 8 == len(shard.header)
    assert len(shard.header) % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    at = 0
    for key, entry in header.items():
        assert entry["data_offsets"][0] == at == shard.offsets[key] - len(shard.header)
        assert shard.offsets[key] % DTYPE_BYTES[entry["dtype"]] == 0
        at = entry["data_offsets"][1]
    assert shard.size == len(shard.header) + at


def test_shards_keep_a_tensor_together_and_only_split_past_the_limit() -> None:
    def group(name: str, *sizes: int) -> list[ArraySpec]:
        return [ArraySpec(f"{name}.{i}", "U8", (size,)) for i, size in enumerate(sizes)]

    shards = plan_shards([group("a", 6, 4), group("b", 1), group("c", 25, 5), group("d", 3)], 11)
    assert [[a.key for a in s.arrays] for s in shards] == [["a.0", "a.1", "b.0"], ["c.0", "c.1"], ["d.0"]]
    assert [s.name for s in shards] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    index = json.loads(index_json(shards))
    assert index["metadata"]["total_size"] == 44
    assert index["weight_map"]["c.1"] == "model-00002-of-00003.safetensors"
    assert [s.name for s in plan_shards([group("a", 5), group("b", 6)], 11)] == ["model.safetensors"]


def test_too_many_shards_are_refused() -> None:
    groups = [[ArraySpec(f"a{i}", "U8", (2,))] for i in range(100_000)]
    with pytest.raises(ValueError, match="100000 shards of at most 1 bytes, more than 99999"):
        plan_shards(groups, 1)


def test_the_writer_writes_what_the_library_reads_back(tmp_path: Path) -> None:
    shards = plan_shards([[ArraySpec("a", "U8", (3,)), ArraySpec("b", "F32", (2,))]], 100)
    writer = BundleWriter(tmp_path, shards)
    for key, data in (("b", struct.pack("<2f", 1.5, -2)), ("a", b"\x01\x02\x03")):
        for at in reversed(range(len(data))):
            writer.write(key, at, memoryview(data)[at : at + 1])
        writer.hash(key, memoryview(data))
    manifest = writer.finish(producer="t", options={}, architecture="", sources=[], tied={}, tensors=[])
    assert manifests.read(tmp_path) == manifest
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.get_tensor("a").tolist() == [1, 2, 3]
        assert file.get_tensor("b").tolist() == [1.5, -2]


def test_an_unfinished_bundle_gets_no_manifest(tmp_path: Path) -> None:
    writer = BundleWriter(tmp_path, plan_shards([[ArraySpec("a", "U8", (3,))]], 100))
    writer.write("a", 0, memoryview(b"abc"))
    with pytest.raises(RuntimeError, match="before every array was written"):
        writer.finish(producer="t", options={}, architecture="", sources=[], tied={}, tensors=[])
    writer.close()
    assert not (tmp_path / "bundle.json").exists()


def test_the_writer_never_opens_an_existing_file(tmp_path: Path) -> None:
    (tmp_path / "metadata.gguf").write_bytes(b"precious")
    writer = BundleWriter(tmp_path, plan_shards([[ArraySpec("a", "U8", (3,))]], 100))
    with pytest.raises(FileExistsError):
        writer.add_file("metadata.gguf", [b"x"])
    writer.close()
    assert (tmp_path / "metadata.gguf").read_bytes() == b"precious"


def test_a_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_bytes(manifests.serialize(example()))
    assert manifests.read(tmp_path) == example()
    assert manifests.is_bundle(tmp_path)


def test_every_flipped_bit_of_a_manifest_is_caught(tmp_path: Path) -> None:
    raw = manifests.serialize(example())
    for at in range(len(raw)):
        for bit in range(8):
            broken = bytearray(raw)
            broken[at] ^= 1 << bit
            (tmp_path / "bundle.json").write_bytes(broken)
            with pytest.raises(BundleError, match=str(tmp_path)):
                manifests.read(tmp_path)


def test_every_truncation_of_a_manifest_is_caught(tmp_path: Path) -> None:
    raw = manifests.serialize(example())
    for length in range(len(raw)):
        (tmp_path / "bundle.json").write_bytes(raw[:length])
        with pytest.raises(BundleError):
            manifests.read(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "other"}, "format: expected 'q6k-planar', found 'other'"),
        ({"version": 3}, "version 3 .* reads version 2 .*: a newer release of q6k-convert may read it"),
        ({"version": 1}, "version 1 .* reads version 2 .*: convert the model again"),
        ({"version": "1"}, "version '1' .* reads version 2"),
        ({"checksum": "crc"}, "checksums 'crc'; this program reads version 2 with 'xxh3_128'"),
        ({"sources": {}}, "sources: expected list, found dict"),
        ({"sources": [{"name": "x", "size": -1, "checksum": ""}]}, "size: -1 is not a size"),
        ({"sources": [{"name": "x", "size": True, "checksum": ""}]}, "size: expected int, found bool"),
        ({"sources": [7]}, "expected dict, found int"),
        (
            {"files": {"../x": {"size": 1, "checked_bytes": 1, "checksum": ""}}},
            r"'\.\./x' is not the name of a file",
        ),
        ({"files": {"bundle.json": {"size": 1, "checked_bytes": 1, "checksum": ""}}}, "is not the name of a file"),
        ({"tensors": [{"name": "x"}]}, "tensor 'x': storage: missing"),
        ({"tensors": [{"name": "x", "storage": "odd"}]}, "tensor 'x': storage: expected one of planar, .* 'odd'"),
        ({"tensors": [{}] * 20_000}, "tensors: 20000, more than the limit of 16384"),
        ({"options": {"x": {"y": 1}}}, "options: 'x' is neither text, a number nor a list of texts"),
        ({"options": {"x": [[]]}}, "options: 'x' is neither text, a number nor a list of texts"),
        ({"extra": 1}, "unknown fields: 'extra'"),
        ({"options": {"x": "\ud800"}}, "an escaped surrogate"),
    ],
)
def test_a_manifest_that_breaks_a_rule_is_refused(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        manifests.read(altered(tmp_path, **fields))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ({"dtype": "F8"}, "dtype: expected one of .* found 'F8'"),
        ({"shape": [-1]}, "impossible dimensions"),
        ({"shape": [1 << 63]}, "impossible dimensions"),
        ({"shape": [1] * 9}, "impossible dimensions"),
        ({"shape": ["1"]}, "shape: expected int, found str"),
    ],
)
def test_an_array_that_breaks_a_rule_is_refused(tmp_path: Path, array: dict[str, object], message: str) -> None:
    content = json.loads(manifests.serialize(example()))
    content["tensors"][0]["arrays"]["ql"] |= array
    with pytest.raises(BundleError, match=message):
        manifests.read(altered(tmp_path, tensors=content["tensors"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1, "format": 2}', "key 'format' appears twice"),
        ("[" * 200_000, "not valid JSON"),
        ("[]", "the manifest: expected dict, found list"),
        ("", "not valid JSON"),
        ("\xff", "not valid JSON"),
    ],
)
def test_a_manifest_that_is_no_json_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bundle.json").write_text(text, encoding="latin-1")
    with pytest.raises(BundleError, match=message):
        manifests.read(tmp_path)


def test_a_manifest_that_is_too_long_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "bundle.json").open("wb") as file:
        file.truncate(manifests.MAX_BYTES + 1)
    with pytest.raises(BundleError, match="more than the limit"):
        manifests.read(tmp_path)


def test_a_directory_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle: it has no bundle.json"):
        manifests.read(tmp_path)
    assert not manifests.is_bundle(tmp_path)


def test_the_manifest_checksum_covers_every_field() -> None:
    one = manifests.serialize(example())
    for other in (
        replace(example(), producer="x"),
        replace(example(), tied={}),
        replace(example(), files={}),
    ):
        assert json.loads(one)["manifest_checksum"] != json.loads(manifests.serialize(other))["manifest_checksum"]
