"""The files around the shards, end to end: manifest, metadata, and bundles of split models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

import q6k_convert
from bundle_helpers import checked_manifest, listing, run_cli, shard_arrays, xxh3
from gguf_builder import F32, Builder, key_value, small_model, weight
from q6k_convert.convert import stream
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_kernels.errors import GgufReadError

# Manifest


def test_every_field_of_the_manifest_says_what_was_done(tmp_path: Path) -> None:
    builder = small_model()
    path = builder.write(tmp_path / "model é.gguf")
    options = Options("exact", "raw", ("blk.*", "token*"), ("*gate*",), 4000, allow_nonfinite=True)
    result = convert(path, tmp_path / "out", options)
    manifest = checked_manifest(tmp_path / "out")
    tensors = {t["name"]: t for t in manifest["tensors"]}
    assert list(manifest) == [
        "format", "version", "checksum", "producer", "options", "architecture", "sources", "files", "tied",
        "tensors", "manifest_checksum",
    ]  # fmt: skip
    assert (manifest["format"], manifest["version"], manifest["checksum"]) == ("q6k-planar", 2, "xxh3_128")
    assert manifest["producer"] == f"q6k-convert {q6k_convert.__version__}"
    assert manifest["options"] == {
        "scales": "exact",
        "other": "raw",
        "include": ["blk.*", "token*"],
        "exclude": ["*gate*"],
        "max_shard_size": 4000,
        "allow_nonfinite": True,
    }
    assert manifest["architecture"] == "llama"
    raw = path.read_bytes()
    assert manifest["sources"] == [{"name": "model é.gguf", "size": len(raw), "checksum": xxh3(raw)}]
    assert list(manifest["files"]) == sorted(manifest["files"])
    for name, file in manifest["files"].items():
        content = (tmp_path / "out" / name).read_bytes()
        whole = not name.endswith(".safetensors")
        assert file["checked_bytes"] == (len(content) if whole else 8 + int.from_bytes(content[:8], "little")), name
    # Order of the data in the file, which is that of the builder.
    assert list(tensors) == [t.name for t in builder.tensors]
    assert [t["shape"] for t in manifest["tensors"]] == [list(t.shape) for t in builder.tensors]
    assert {name: (t["type"], t["storage"]) for name, t in tensors.items()} == {
        "token_embd.weight": ("Q6_K", "planar"),
        "output_norm.weight": ("F32", "skipped"),
        "blk.0.attn_q.weight": ("Q6_K", "planar"),
        "blk.0.ffn_down_exps.weight": ("Q6_K", "planar"),
        "blk.0.ffn_up.weight": ("Q3_K", "raw"),
        "blk.0.attn_k.weight": ("Q4_K", "planar"),
        "blk.0.ffn_gate.weight": ("F16", "skipped"),
    }
    assert tensors["output_norm.weight"]["arrays"] == {}
    assert list(tensors["blk.0.ffn_up.weight"]["arrays"]) == ["data"]
    experts = tensors["blk.0.ffn_down_exps.weight"]["arrays"]
    assert {role: (a["key"], a["dtype"], a["shape"]) for role, a in experts.items()} == {
        "ql": ("blk.0.ffn_down_exps.weight.ql", "U8", [2, 3, 128]),
        "qh": ("blk.0.ffn_down_exps.weight.qh", "U8", [2, 3, 64]),
        "scale": ("blk.0.ffn_down_exps.weight.scale", "I8", [2, 3, 16]),
        "steps": ("blk.0.ffn_down_exps.weight.steps", "F16", [2, 3, 1]),
    }
    written = sum(p.stat().st_size for p in (tmp_path / "out").iterdir() if p.name != "bundle.json")
    assert (result.bytes_in, result.bytes_out) == (len(raw), written)
    assert result.output == tmp_path / "out"


def test_the_default_options_are_recorded(tmp_path: Path) -> None:
    convert(small_model().write(tmp_path / "m.gguf"), tmp_path / "out")
    manifest = checked_manifest(tmp_path / "out")
    assert manifest["options"] == {
        "scales": "bf16",
        "other": "bf16",
        "include": [],
        "exclude": [],
        "max_shard_size": 5_000_000_000,
        "allow_nonfinite": False,
    }
    assert {t["storage"] for t in manifest["tensors"]} == {"planar", "plain", "dequantized"}


def test_the_checksum_of_the_source_covers_what_no_tensor_uses(tmp_path: Path) -> None:
    builder = small_model()
    for tensor, offset in zip(builder.tensors, range(0, 1 << 20, 8192), strict=False):
        tensor.offset = offset
    raw = bytearray(builder.build() + b"trailing bytes of another program")
    raw[-9000] ^= 0xFF
    (tmp_path / "m.gguf").write_bytes(raw)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    assert checked_manifest(tmp_path / "out")["sources"][0]["checksum"] == xxh3(bytes(raw))


@pytest.mark.parametrize(
    ("names", "causal", "tied"),
    [
        (["token_embd.weight"], None, True),
        (["token_embd.weight"], True, True),
        (["token_embd.weight"], False, False),
        (["token_embd.weight", "output.weight"], None, False),
        (["blk.0.attn_q.weight"], None, False),
    ],
)
def test_a_head_tied_to_the_embedding_is_recorded(
    names: list[str], causal: bool | None, tied: bool, tmp_path: Path
) -> None:
    builder = Builder([weight(name, (2, 256)) for name in names])
    if causal is not None:
        builder.kv.append(key_value("llama.attention.causal", causal))
    convert(builder.write(tmp_path / "m.gguf"), tmp_path / "out")
    expected = {"output.weight": "token_embd.weight"} if tied else {}
    assert checked_manifest(tmp_path / "out")["tied"] == expected


def test_a_source_that_changes_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_model().write(tmp_path / "m.gguf")
    real, done = stream._process, []

    def process(*args: object) -> object:
        if not done:
            done.append(True)
            os.utime(path, ns=(1, 1))
        return real(*args)

    monkeypatch.setattr(stream, "_process", process)
    with pytest.raises(GgufReadError, match="m.gguf was modified while it was being read"):
        convert(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


# Metadata


def test_the_metadata_has_the_sources_keys_byte_for_byte_and_no_tensors(tmp_path: Path) -> None:
    builder = small_model()
    builder.kv += [key_value("z.empty", []), key_value("z.i64", -(1 << 60), "i64"), key_value("z.text", "a\0b\n é")]
    convert(builder.write(tmp_path / "m.gguf"), tmp_path / "out")
    raw = (tmp_path / "out" / "metadata.gguf").read_bytes()
    pairs = b"".join(builder.kv)
    header = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + len(builder.kv).to_bytes(8, "little")
    assert raw[: 24 + len(pairs)] == header + pairs
    assert len(raw) % 32 == 0
    assert set(raw[24 + len(pairs) :]) <= {0}
    original, copy = gguf.GGUFReader(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "out" / "metadata.gguf")
    assert copy.tensors == []
    known = [key for key in original.fields if key != "GGUF.tensor_count"]
    assert "tokenizer.ggml.tokens" in known
    for key in known:
        assert copy.fields[key].contents() == original.fields[key].contents(), key


def test_the_metadata_keeps_version_and_alignment(tmp_path: Path) -> None:
    builder = small_model()
    builder.version, builder.alignment = 2, 256
    builder.kv.append(key_value("general.alignment", 256))
    convert(builder.write(tmp_path / "m.gguf"), tmp_path / "out")
    raw = (tmp_path / "out" / "metadata.gguf").read_bytes()
    assert (raw[4], len(raw) % 256) == (2, 0)
    assert gguf.GGUFReader(tmp_path / "out" / "metadata.gguf").tensors == []


# Split models


def write_split(builder: Builder, directory: Path, cuts: list[int]) -> list[Path]:
    """The model's tensors over several parts, the first with all of its keys."""
    directory.mkdir()
    count, paths = len(cuts) + 1, []
    for number, (first, last) in enumerate(zip([0, *cuts], [*cuts, len(builder.tensors)], strict=True)):
        own = builder.kv if number == 0 else []
        split = [
            key_value("split.no", number, "u16"),
            key_value("split.count", count, "u16"),
            key_value("split.tensors.count", len(builder.tensors), "i32"),
        ]
        part = Builder(builder.tensors[first:last], [*own, *split])
        paths.append(part.write(directory / f"m-{number + 1:05}-of-{count:05}.gguf"))
    return paths


@pytest.mark.parametrize("cuts", [[3], [0, 2, 5]], ids=["two parts", "four, the first without tensors"])
def test_a_split_model_gives_the_arrays_of_the_single_file(cuts: list[int], tmp_path: Path) -> None:
    builder = small_model()
    convert(builder.write(tmp_path / "m.gguf"), tmp_path / "whole")
    paths = write_split(builder, tmp_path / "parts", cuts)
    whole = checked_manifest(tmp_path / "whole")
    bundles = []
    for number, given in enumerate(paths):
        convert(given, tmp_path / f"split-{number}")
        bundles.append(listing(tmp_path / f"split-{number}"))
    assert all(bundle == bundles[0] for bundle in bundles)
    split = checked_manifest(tmp_path / "split-0")
    assert shard_arrays(tmp_path / "split-0" / "model.safetensors") == shard_arrays(
        tmp_path / "whole" / "model.safetensors"
    )
    assert {**split, "sources": 0, "files": 0, "manifest_checksum": 0} == {
        **whole, "sources": 0, "files": 0, "manifest_checksum": 0
    }  # fmt: skip
    assert split["sources"] == [
        {"name": path.name, "size": path.stat().st_size, "checksum": xxh3(path.read_bytes())} for path in paths
    ]
    assert b"".join(builder.kv) in (tmp_path / "split-0" / "metadata.gguf").read_bytes()


def test_the_keys_of_a_bundle_made_from_a_split_model_can_be_inspected(tmp_path: Path) -> None:
    paths = write_split(small_model(), tmp_path / "parts", [3])
    convert(paths[1], tmp_path / "out")
    done = run_cli("inspect", tmp_path / "out", "--key", "llama.block_count")
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


# The package itself


def test_the_public_functions_are_functions_however_often_they_are_imported() -> None:
    script = """
from q6k_convert import convert_gguf, decode, open_gguf
import q6k_convert.convert.pipeline
from q6k_convert import convert_gguf as again
print(callable(convert_gguf), callable(again), callable(decode), callable(open_gguf))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "True True True True\n"


def test_a_source_whose_name_is_not_utf8_is_no_bug(tmp_path: Path) -> None:
    # The manifest is UTF-8; so either the name is spelt in it somehow or the run says what is wrong.
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.gguf"))
    Builder([weight("a.weight", (2, 256)), weight("n", (2,), F32)]).write(path)
    for more in ([], ["--json"]):
        done = run_cli(path, tmp_path / "out", "--force", *more, errors="backslashreplace")
        assert done.returncode in (0, 3, 4), done.stderr
        assert "Traceback" not in done.stderr
        assert (tmp_path / "out").exists() == (done.returncode == 0)
