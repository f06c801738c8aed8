"""What people type in place of what is asked for: it works, or the command that does it is named."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import pytest

from bundle_helpers import failed, invoke
from q6k_convert.cli.options import parse_device, parse_dtype

OTHER_FILES = {
    "safetensors": (
        (40).to_bytes(8, "little") + b'{"a":1}' + bytes(40),
        "a safetensors file",
        "convert_hf_to_gguf",
    ),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "a pointer of Git LFS",
        "git lfs pull",
    ),
    "page": (b"\n<!DOCTYPE html>\n<html>" + bytes(40), "a web page", "/resolve/"),
    "old": (b"tjgg" + bytes(40), "a GGML file of 2023", "Download a GGUF"),
    "checkpoint": (b"PK\x03\x04" + bytes(40), "a PyTorch checkpoint", "convert_hf_to_gguf"),
    "compressed": (gzip.compress(b"GGUF" * 20), "compressed", "Unpack it"),
    "json": (b'{"architectures": ["LlamaForCausalLM"]}', "JSON", "convert_hf_to_gguf"),
}
NO_BUNDLE = {"verify": (), "generate": ("-p", "x"), "export": ("model.pt2",)}
"""Commands that take a bundle, and what else they need."""


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_file_of_another_kind_is_named(name: str, tmp_path: Path, out: Path) -> None:
    content, kind, remedy = OTHER_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    failed(invoke(path, out), 3, f"{path} is {kind}", remedy)
    failed(invoke("inspect", path), 3, ", not a bundle or GGUF file", remedy)
    failed(invoke("generate", path, "-p", "x"), 3, ", not a bundle", remedy)
    assert not out.exists()


@pytest.mark.parametrize("command", NO_BUNDLE)
def test_a_gguf_file_given_for_a_bundle_is_to_be_converted_first(command: str, model: Path, out: Path) -> None:
    then = f"then `q6k-convert {command} model/`."
    first = f"Convert it first: `q6k-convert convert {model} model/`, {then}"
    failed(invoke(command, model, *NO_BUNDLE[command]), 3, f"{model} is a GGUF file, not a bundle", first)
    folder = f"{model.parent} is not a bundle but a directory with 1 GGUF file: model.gguf"
    failed(invoke(command, model.parent, *NO_BUNDLE[command]), 3, folder, first)
    for reference, name in {"org/tiny:Q6_K": "tiny/", "https://hf.co/org/tiny/blob/main/X.gguf": "X/"}.items():
        remedy = f"Convert it first: `q6k-convert convert {reference} {name}`, then `q6k-convert {command} {name}`."
        failed(
            invoke(command, reference, *NO_BUNDLE[command]), 3, "is a GGUF file of the Hub, not a bundle", remedy
        )


@pytest.mark.parametrize("command", [*NO_BUNDLE, "inspect", "hf", "chat", "bench"])
def test_a_path_of_nothing_is_named_as_one(command: str, tmp_path: Path) -> None:
    """It could not be read; there is no bundle to make again."""
    done = invoke(command, tmp_path / "none", *NO_BUNDLE.get(command, ()))
    failed(done, 4, f"{tmp_path / 'none'}: No such file or directory", "Check the path and its permissions")


@pytest.mark.parametrize("command", [*NO_BUNDLE, "inspect"])
def test_a_part_or_the_parent_of_a_bundle_leads_to_it(command: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "made here" / "out"
    assert invoke(model, out).exit_code == 0
    run = f"`q6k-convert {command} '{out}'`."
    failed(invoke(command, out.parent, *NO_BUNDLE.get(command, ())), 3, "a directory with 1 bundle: out", run)
    for name in ("model.safetensors", "bundle.json"):
        done = invoke(command, out / name, *NO_BUNDLE.get(command, ()))
        failed(done, 3, f"{name} is a file of a bundle, not a ", run)


def test_a_bundle_given_for_a_gguf_file_is_named(model: Path, out: Path, tmp_path: Path) -> None:
    invoke(model, out)
    failed(invoke(out, tmp_path / "again"), 3, f"{out} is a bundle, which has been converted", f"inspect {out}`")
    failed(invoke("verify", out, "--source", out), 3, "is a bundle, which has been converted", "inspect")
    failed(invoke(out / "model.safetensors", tmp_path / "again"), 3, "is a file of a bundle", f"inspect {out}`")


def test_a_directory_lists_its_models(model: Path, tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    failed(invoke(folder, out), 4, "is a directory", "Give the path of a .gguf file.")
    (folder / "config.json").write_text("{}")
    failed(invoke(folder, out), 3, "a model in another format", "convert_hf_to_gguf")
    for name in ("b.gguf", "a-00001-of-00002.gguf", "a-00002-of-00002.gguf"):
        shutil.copy(model, folder / name)
    listed = f"{folder} is not a GGUF file but a directory with 2 GGUF files: a-00001-of-00002.gguf, b.gguf"
    failed(invoke(folder, out), 3, listed, f"`q6k-convert convert {folder}/a-00001-of-00002.gguf`")
    failed(invoke("inspect", folder), 3, "2 GGUF files", f"`q6k-convert inspect {folder}/a-00001-of-00002.gguf`")


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (("benchmark", "my out", "-r", "3"), "q6k-convert bench 'my out' -r 3"),
        (("ppl", "out"), "q6k-convert perplexity out"),
        (("run", "out"), "q6k-convert generate out"),
        (("serve", "out"), "q6k-convert chat out"),
        (("pull", "org/tiny:Q6_K"), "q6k-convert convert org/tiny:Q6_K"),
        (("quantize", "a.gguf", "out"), "q6k-convert convert a.gguf out"),
        (("help",), "q6k-convert --help"),
    ],
)
def test_other_words_for_commands_name_the_command(
    words: tuple[str, ...], command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*words)
    assert result.exit_code == 2
    assert f"`{command}`" in result.stderr
    (tmp_path / words[0]).write_bytes(b"no model, but a file of this name")
    assert "There is no command" not in invoke(*words).stderr


def test_dtypes_and_devices_have_other_names(model: Path) -> None:
    names = {
        "bfloat16": "bf16",
        "float16": "fp16",
        "F16": "fp16",
        "half": "fp16",
        "float32": "fp32",
        "FP32": "fp32",
    }
    assert {name: parse_dtype(name) for name in names} == names
    assert [parse_device(name) for name in ("auto", "CPU", "cuda", "cuda:0", "gpu")] == [
        "auto",
        "cpu",
        *["cuda"] * 3,
    ]
    for command in ("generate", "export"):
        numbered = " ".join(invoke(command, model, "x", "--device", "cuda:1").stderr.split())
        assert "put CUDA_VISIBLE_DEVICES=1 before the command, and give --device cuda." in numbered
        for option in (("--device", "mps"), ("--dtype", "int8")):
            result = invoke(command, model, "x", *option)
            assert result.exit_code == 2
            assert f"{option[1]!r} is not one of 'auto'" in result.stderr


def test_a_size_without_a_unit_asks_for_one(model: Path, out: Path) -> None:
    result = invoke(model, out, "--max-shard-size", "5")
    assert result.exit_code == 2
    assert "--max-shard-size: '5' has no unit; write 5GB, or 5B for bytes" in result.stderr
    assert invoke(model, out, "--max-shard-size", "100000B").exit_code == 0


@pytest.mark.parametrize("command", [*NO_BUNDLE, "inspect", "hf"])
def test_a_bundle_without_its_manifest_is_no_gguf_file(command: str, model: Path, out: Path) -> None:
    """Its `metadata.gguf` holds no model that could be converted."""
    assert invoke(model, out).exit_code == 0
    (out / "bundle.json").unlink()
    done = invoke(command, out, *NO_BUNDLE.get(command, ()))
    failed(done, 3, "is not a bundle: it has no bundle.json", "Make the bundle again from its GGUF file")
