"""A forger corrects every checksum of a manifest; with the source at hand its statements are computed again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broken_bundles import SHARD, edit_header, edit_manifest, resign
from bundle_helpers import failed, invoke
from gguf_builder import small_model
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import MAX_PATTERNS, Options
from q6k_convert.errors import UsageError
from q6k_convert.verify.stages import verify

Edit = Callable[[dict[str, Any]], object]


def options(**changed: Any) -> Edit:
    return lambda content: content["options"].update(changed)


FORGED: dict[str, tuple[Edit, str]] = {
    "tied to another": (
        lambda content: content["tied"].update({"output.weight": "blk.0.ffn_gate.weight"}),
        "tied: expected {'output.weight': 'token_embd.weight'}, as the source has it, found {'output.weight': 'blk",
    ),
    "not tied": (lambda content: content["tied"].clear(), "'token_embd.weight'}, as the source has it, found none"),
    "tensors left out": (
        options(exclude=["*norm*"]),
        "storage: the recorded options give 'skipped', found 'plain'",
    ),
    "other storage": (options(other="raw"), "storage: the recorded options give 'raw', found 'dequantized'"),
    "no such bundle": (options(other="error"), "the recorded options give no bundle of this source: "),
    "a pattern of nothing": (options(include=["x*"]), "no bundle of this source: --include 'x*' matches none"),
    "many patterns": (options(include=["*"] * (MAX_PATTERNS + 1)), f"{MAX_PATTERNS + 1} patterns; at most"),
    "smaller shards": (options(max_shard_size=3000), "arrays: the recorded options give {'ql': ('token_embd"),
    "no size": (options(max_shard_size=0), "options: max_shard_size: expected at least 1, found 0"),
    "unknown storage": (
        options(other="fp8"),
        "options: other: expected one of bf16, raw, skip, error, found 'fp8'",
    ),
    "an option more": (options(trust="all"), "options: expected scales, other, include, exclude, max_shard_size"),
    "an option less": (lambda content: content["options"].pop("other"), "options: expected scales, other, include"),
    "an option of another type": (options(allow_nonfinite=0), "options: expected scales, other, include"),
    "another producer": (
        lambda content: content.update(producer="q6k-convert 0.1.0\nsigned by the Hub"),
        r"producer: expected q6k-convert and its version, found 'q6k-convert 0.1.0\nsigned",
    ),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return small_model().write(tmp_path / "model.gguf")


@pytest.fixture
def bundle(source: Path) -> Path:
    convert(source, source.parent / "out", Options())
    return source.parent / "out"


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_statement_is_found_with_the_source(name: str, bundle: Path, source: Path) -> None:
    change, words = FORGED[name]
    edit_manifest(bundle, change)
    assert not verify(bundle).failed  # its own checksums are right
    run = verify(bundle, source=source)
    found = [finding for stage, finding in run.findings if stage == "source"]
    assert [finding.file for finding in found if words in finding.problem] == ["bundle.json"], found


def test_a_tensor_that_the_options_keep_cannot_be_left_out(bundle: Path, source: Path, tmp_path: Path) -> None:
    name = "output_norm.weight"
    convert(source, tmp_path / "less", Options(exclude=(name,)))
    edit_manifest(tmp_path / "less", options(exclude=[]))
    assert not verify(tmp_path / "less").failed
    (found,) = (f for _, f in verify(tmp_path / "less", source=source).findings if f.tensor is not None)
    assert (found.tensor, found.problem) == (name, "storage: the recorded options give 'plain', found 'skipped'")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling.py", "model.safetensors.index.json"])
def test_a_file_that_the_options_do_not_give_is_found(name: str, bundle: Path, source: Path) -> None:
    (bundle / name).write_bytes(json.dumps({"weight_map": {}, "metadata": {}}).encode())
    resign(bundle, name, (bundle / name).stat().st_size)
    problems = [finding.problem for _, finding in verify(bundle, source=source).findings]
    if name.endswith(".json"):
        assert problems
    else:
        assert problems == [f"files: {name!r} is no file of such a bundle"]


def test_a_header_with_more_in_it_is_found(bundle: Path, source: Path) -> None:
    edit_header(bundle, lambda text: text.replace(b'"pt"', b'"pt","licence":"stolen"'))
    assert not verify(bundle).failed
    (found,) = (finding for _, finding in verify(bundle, source=source).findings)
    assert (found.file, found.problem) == (SHARD, "its header is not the one that the recorded options give")


def test_the_command_says_so(bundle: Path, source: Path) -> None:
    edit_manifest(bundle, FORGED["not tied"][0])
    failed(invoke("verify", bundle, "--source", source), 5, "bundle.json: tied: expected", "Make the bundle again")


def test_patterns_are_bounded(source: Path, tmp_path: Path) -> None:
    Options(include=("*",) * MAX_PATTERNS)
    with pytest.raises(UsageError, match="at most 1000 are taken"):
        Options(exclude=("x" * 1001,))
    result = invoke(source, tmp_path / "out", *["--exclude=x"] * (MAX_PATTERNS + 1))
    failed(result, 2, "--include and --exclude: 1001 patterns", "fewer patterns")


def test_the_record_of_options_gives_them_back() -> None:
    made = Options("exact", "raw", ("a*",), ("b*", "c"), 3000, True)
    assert Options.of_record(made.recorded()) == made
