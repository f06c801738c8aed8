"""Unusual files, converted, inspected, verified: unknown types, empty tensors, long names, many parts, no keys."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

from bundle_helpers import failed, invoke, run_here
from gguf_builder import F32, Q3_K, Q6_K, Q8_0, Builder, Tensor, key_value, weight
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_convert.verify.stages import verify
from q6k_kernels.bundle import writer
from q6k_kernels.bundle.metadata import read_metadata
from q6k_kernels.errors import GgufRejectedError
from q6k_kernels.gguf.model import open_gguf
from q6k_kernels.weights.reader import open_bundle

Q2_0 = 42
LLAMA = key_value("general.architecture", "llama")


def verified(bundle: Path, source: Path) -> bool:
    run = verify(bundle, source=source, device="cpu")
    return not run.failed and run.source is not None


# Types


def with_type(number: int, data: bytes = bytes(range(72)), shape: tuple[int, ...] = (2, 128)) -> Builder:
    return Builder([weight("a", (2, 256)), Tensor("odd", shape, number, data), weight("b", (3,), F32)], [LLAMA])


def test_q2_0_is_listed_kept_raw_skipped_and_excluded(tmp_path: Path) -> None:
    path = with_type(Q2_0).write(tmp_path / "m.gguf")
    document = json.loads(run_here("inspect", path, "--json").stdout)
    odd = next(t for t in document["tensors"] if t["name"] == "odd")
    assert (odd["type"], odd["shape"], odd["bytes"]) == ("Q2_0", [2, 128], 72)
    with pytest.raises(GgufRejectedError, match="no dequantiser for Q2_0") as caught:
        convert(path, tmp_path / "no")
    assert "--other raw" in caught.value.remedy
    for name, options in {
        "raw": Options(other="raw"),
        "skip": Options(other="skip"),
        "x": Options(exclude=("odd",)),
    }.items():
        result = convert(path, tmp_path / name, options)
        storage = {t.name: t.storage for t in result.manifest.tensors}
        assert storage == {"a": "planar", "odd": "raw" if name == "raw" else "skipped", "b": "plain"}
        assert verified(tmp_path / name, path)
    with safetensors.safe_open(tmp_path / "raw" / "model.safetensors", "np") as shard:
        assert shard.get_tensor("odd").tobytes() == bytes(range(72))
        assert shard.get_tensor("odd").shape == (2, 36)


@pytest.mark.parametrize(
    ("number", "says", "remedy"),
    [
        (77, "tensor type 77 is unknown", "A newer release of q6k-convert may know it"),
        (4, "type 4 (Q4_2) was removed from ggml", "Quantise the model again with a current llama.cpp"),
    ],
)
def test_an_unknown_type_is_refused_until_it_is_left_out(
    tmp_path: Path, number: int, says: str, remedy: str
) -> None:
    path = with_type(number).write(tmp_path / "m.gguf")
    shown = run_here("inspect", path).stdout
    assert ("Q4_2" if number == 4 else "type 77") in shown
    with open_gguf(path) as model:
        odd = next(record.record_at for _, record in model.tensors() if record.name == "odd")
    for other in ("bf16", "raw"):
        result = invoke(path, tmp_path / "out", "--other", other)
        failed(result, 3, f"tensor 'odd' at byte {odd}: {says}", f"{remedy}; --other skip or --exclude leaves")
    for name, options in {"skip": ["--other", "skip"], "exclude": ["--exclude", "odd"]}.items():
        assert invoke(path, tmp_path / name, *options).exit_code == 0
        assert verified(tmp_path / name, path)
        assert run_here("inspect", tmp_path / name).returncode == 0
        assert open_bundle(tmp_path / name).load("a").shape == (2, 256)


# Shapes and names


def test_empty_tensors_and_more_dimensions_are_stored_as_they_are(tmp_path: Path) -> None:
    patch = weight("patch_embedding.weight", (2, 3, 1, 4, 5), F32)
    odd = weight("odd", (1, 1, 2, 3, 256), Q6_K)
    tensors = [
        weight("a", (2, 256)), patch, odd, Tensor("between", (0,), F32, b""), weight("b", (3, 64), Q8_0),
        Tensor("quantised", (0, 256), Q6_K, b""), Tensor("last", (0,), F32, b""), Tensor("late", (4, 0), Q3_K, b""),
    ]  # fmt: skip
    path = Builder(tensors, [LLAMA]).write(tmp_path / "m.gguf")
    assert run_here("inspect", path).returncode == 0
    for other in ("bf16", "raw"):
        out = tmp_path / other
        convert(path, out, Options(other=other))  # type: ignore[arg-type]
        assert verified(out, path)
        options = ("--source", path, "--device", "cpu", "--report", tmp_path / "r.html")
        assert run_here("verify", out, *options).returncode == 0
        assert run_here("inspect", out).returncode == 0
        with safetensors.safe_open(out / "model.safetensors", "pt") as shard:
            assert np.array_equal(shard.get_tensor(patch.name).numpy().tobytes(), patch.data)
            assert shard.get_tensor(patch.name).shape == patch.shape
            assert shard.get_tensor("last").shape == (0,)
            assert shard.get_tensor("quantised").shape == ((0, 256) if other == "bf16" else (0, 210))
        loaded = open_bundle(out).load("between")
        assert isinstance(loaded, torch.Tensor)
        assert (loaded.shape, loaded.dtype) == ((0,), torch.float32)


def test_a_file_of_empty_tensors_alone_is_converted(tmp_path: Path) -> None:
    path = Builder([Tensor("e", (0,), F32, b"")], [LLAMA]).write(tmp_path / "m.gguf")
    convert(path, tmp_path / "out")
    assert verified(tmp_path / "out", path)
    assert run_here("inspect", tmp_path / "out").returncode == 0


@pytest.mark.parametrize("name", ["n" * 64, "é" * 127 + "x", '"' * 255], ids=["64", "255", "quotes"])
def test_long_names_are_kept(tmp_path: Path, name: str) -> None:
    path = Builder([weight(name, (2, 256)), weight("b", (3,), F32)], [LLAMA]).write(tmp_path / "m.gguf")
    convert(path, tmp_path / "out")
    assert verified(tmp_path / "out", path)
    assert open_bundle(tmp_path / "out").load(name).shape == (2, 256)


# Keys


def test_what_is_only_copied_need_be_no_text_and_may_be_long(tmp_path: Path) -> None:
    whole = "{" + "x" * (33 << 20) + "}"
    keys = [
        LLAMA,
        key_value("quantize.imatrix.file", b"C:\\caf\xe9\\imatrix.dat"),
        key_value("tokenizer.huggingface.json", whole),
        key_value("k" * 300, 7),
        key_value(b"\xff", 8),
        key_value("tokenizer.chat_template", "{{ messages }}"),
    ]
    path = Builder([weight("a", (2, 256))], keys).write(tmp_path / "m.gguf")
    convert(path, tmp_path / "out")
    assert (tmp_path / "out" / "metadata.gguf").read_bytes()[24:].startswith(b"".join(keys))
    assert verified(tmp_path / "out", path)
    assert read_metadata(tmp_path / "out").string("tokenizer.chat_template") == "{{ messages }}"
    shown = run_here("inspect", path).stdout
    assert "C:\\caf\\xe9\\imatrix.dat" in shown
    assert "text of 34.60 MB" in shown
    document = json.loads(run_here("inspect", path, "--json").stdout)
    assert document["keys"]["tokenizer.huggingface.json"] == {"string": len(whole)}
    assert document["keys"]["quantize.imatrix.file"] == "C:\\caf\\xe9\\imatrix.dat"


def test_json_holds_no_nan_and_no_infinity(tmp_path: Path) -> None:
    keys = [LLAMA, *(key_value(f"x.{value}", value) for value in (float("nan"), float("inf"), -float("inf")))]
    path = Builder([weight("a", (2, 256))], [*keys, key_value("list", [1.0, float("nan")])]).write(
        tmp_path / "m.gguf"
    )

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads(run_here("inspect", path, "--json").stdout, parse_constant=refuse)["keys"]
    assert [found[f"x.{value}"] for value in ("nan", "inf", "-inf")] == ["NaN", "Infinity", "-Infinity"]
    one = json.loads(run_here("inspect", path, "--json", "--key", "list").stdout, parse_constant=refuse)
    assert one == {"key": "list", "value": [1.0, "NaN"]}


# Files that are no model, or a part of one


@pytest.mark.parametrize("options", [[], ["--exclude", "x*"], ["--other", "skip"], ["--dry-run"]], ids=" ".join)
def test_a_vocabulary_without_tensors_is_rejected(tmp_path: Path, options: list[str]) -> None:
    path = Builder(kv=[LLAMA, key_value("tokenizer.ggml.tokens", ["a", "b"])]).write(tmp_path / "vocab.gguf")
    result = invoke(path, tmp_path / "out", *options)
    failed(result, 3, f"{path}: holds no tensors, only 2 keys", "give the file that holds the model's weights")
    assert run_here("inspect", path).returncode == 0


def test_a_part_that_does_not_say_which_it_is_is_refused(tmp_path: Path) -> None:
    keys = [LLAMA, key_value("general.split_count", 3)]
    path = Builder([weight("a", (2, 256))], keys).write(tmp_path / "m-00001-of-00003.gguf")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(GgufRejectedError, match="general.split_count at byte .*: this is one of 3 parts") as caught:
        open_gguf(path)
    assert "split by a current llama.cpp" in caught.value.remedy
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    whole = Builder([weight("a", (2, 256))], [LLAMA, key_value("general.split_count", 1)])
    open_gguf(whole.write(tmp_path / "whole.gguf")).close()


def test_a_model_of_more_parts_than_files_may_be_open_converts(tmp_path: Path) -> None:
    parts, most = 150, 64
    for number in range(parts):
        split = [
            key_value("split.no", number, "u16"), key_value("split.count", parts, "u16"),
            key_value("split.tensors.count", parts, "i32"),
        ]  # fmt: skip
        part = Builder(
            [weight(f"blk.{number}.w", (2, 256), seed=number)], [*([LLAMA] if number == 0 else []), *split]
        )
        part.write(tmp_path / f"m-{number + 1:05}-of-{parts:05}.gguf")
    path, out = tmp_path / f"m-00007-of-{parts:05}.gguf", tmp_path / "out"
    for arguments in (
        [path, out, "--max-shard-size", "900B"],
        ["inspect", path],
        ["verify", out, "--source", path],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "q6k_convert", *map(os.fspath, arguments)],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most)),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert len(json.loads((out / "bundle.json").read_text())["sources"]) == parts


def test_few_shards_are_open_while_the_disk_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    tensors = [weight(f"blk.{number}.w", (2, 256), seed=number) for number in range(60)]
    path = Builder(tensors).write(tmp_path / "m.gguf")
    before, most, fsync = opened(), 0, os.fsync

    def slow(fd: int) -> None:
        nonlocal most
        time.sleep(0.005)
        most = max(most, opened() - before)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", slow)
    convert(path, tmp_path / "out", Options(max_shard_size=450), jobs=1)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 60
    # Beside those that wait: the one whose turn it is, the one being written, the lock and the file.
    assert writer.WAITING < most <= writer.WAITING + 4
