"""What the command line shows: plan, result, progress, listings; and that text from a file is only text."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from bundle_helpers import failed, invoke, run_cli, run_here, two_tensors
from gguf_builder import F32, Q3_K, Q4_0, Q4_K, Q5_0, Q6_K, Q8_0, Builder, key_value, small_model, weight
from q6k_convert import __version__
from q6k_convert.cli import contents, streams
from q6k_convert.convert import stream
from q6k_convert.text import size

# Tables and progress


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_the_plan_says_what_becomes_of_each_type(model: Path, out: Path) -> None:
    result = invoke(model, out, "--dry-run", "--other", "skip", "--max-shard-size", "3kB", "--exclude", "*gate*")
    lines = rows(result.stdout)
    assert f"{model}: llama, 7 tensors (head tied to the token embedding)".split() in lines
    packed = ["packed", "as", "q6_k,", "7", "bits", "a", "weight"]
    assert ["Q6_K", "3", "4,864", *packed, "3.99", "kB", "4.26", "kB"] in lines
    assert ["Q4_K", "1", "512", "packed", "as", "q4_k,", "4.625", *packed[-3:], "288", "B", "296", "B"] in lines
    assert ["Q3_K", "1", "1,024", "not", "stored", "440", "B", "0", "B"] in lines
    assert ["F32", "1", "512", "stored", "unchanged", "2.05", "kB", "2.05", "kB"] in lines
    assert ["F16", "1", "128", "not", "stored", "256", "B", "0", "B"] in lines
    assert any(line[-2:] == ["3", "shards"] for line in lines)
    assert "note: no tensor" not in result.stderr
    raw = invoke(model, out, "--dry-run", "--other", "raw", "--include", "*ffn_up*", "--include", "*norm*")
    assert "kept as GGUF blocks" in raw.stdout
    assert "note: no tensor of this model can stay packed" in raw.stderr


def test_the_result_says_what_was_made(model: Path, out: Path) -> None:
    lines = rows(invoke(model, out, "--exclude", "*gate*").stdout)
    table = {line[0]: " ".join(line[1:]) for line in lines}
    assert table["bundle"] == str(out)
    assert table["tensors"] == "4 packed, 2 other, 1 not stored"
    taken = sum(path.stat().st_size for path in out.iterdir() if path.name != "bundle.json")
    share = f"({taken / model.stat().st_size:.0%} of the source)"
    assert table["size"] == f"{size(model.stat().st_size)} in, {size(taken)} out {share}"
    assert any(
        line[:3] == ["bits", "per", "weight"] and "(6.7738 in packed weights)" in " ".join(line) for line in lines
    )
    assert any(line[:2] == ["look", "inside"] and line[-1] == str(out) for line in lines)


def whole(architecture: str, **more: Any) -> list[Any]:
    keys = {"context_length": 100, "embedding_length": 256, "block_count": 1, "feed_forward_length": 256}
    keys |= {"attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-5}
    named = (
        {f"{architecture}.{key}": value for key, value in keys.items()} | {"tokenizer.ggml.model": "llama"} | more
    )
    return [key_value("general.architecture", architecture), *(key_value(key, named[key]) for key in named)]


NAMES = ["token_embd", *(f"blk.0.{n}" for n in ("attn_q", "attn_k", "attn_v", "ffn_up", "ffn_gate", "ffn_down"))]
TENSORS = [weight(f"{name}.weight", (256, 256), Q8_0) for name in NAMES]
ONLY = "no, only single tensors from Python: "


@pytest.mark.parametrize(
    ("keys", "options", "verdict"),
    [
        (whole("llama"), (), "yes, with its own tokenizer"),
        (whole("phi9"), (), f"{ONLY}model.gguf: general.architecture: expected one of llama, "),
        (whole("llama", **{"llama.expert_count": 8}), (), f"{ONLY}model.gguf: llama.expert_count = 8: models of "),
        (
            whole("llama"),
            ("--exclude", "*gate*"),
            f"{ONLY}tensors that are not stored, or only as GGUF blocks: blk.",
        ),
        (
            whole("llama", **{"tokenizer.ggml.model": "t5"}),
            (),
            "yes, with a tokenizer that you give (--tokenizer DIR): model.gguf: tokenizer.ggml.model is 't5'",
        ),
        (
            whole("llama", **{"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "new"}),
            (),
            "yes, with a tokenizer that you give (--tokenizer DIR): model.gguf: tokenizer.ggml.pre is 'new'",
        ),
    ],
)
def test_plan_and_summary_say_whether_the_whole_model_runs(
    keys: list[Any], options: tuple[str, ...], verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Builder(TENSORS, keys).write(tmp_path / "model.gguf")
    said = invoke("model.gguf", "out", *options).stdout
    assert f"\nwhole model runs: {verdict}" in said
    assert f"\nwhole model runs  {verdict}" in said
    assert said.count("GPU memory") == 2
    assert ("q6k-convert generate out -p TEXT" in said) == (verdict == "yes, with its own tokenizer")


def test_without_the_package_tokenizers_a_file_is_not_said_to_need_another_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "find_spec", lambda _: None)
    said = invoke(Builder(TENSORS, whole("llama")).write(tmp_path / "model.gguf"), tmp_path / "out").stdout
    assert said.count("yes; whether with its own tokenizer is not known before the package tokenizers is") == 2
    assert "--tokenizer" not in said


def test_a_bundle_that_grows_says_why_and_what_to_do(tmp_path: Path) -> None:
    def noted(kind: int, *options: str) -> list[str]:
        path = Builder([weight("a.weight", (64, 512), kind)]).write(tmp_path / "grow.gguf")
        said = invoke(path, tmp_path / "out", "--dry-run", *options).stdout
        return [line.removeprefix("note: ") for line in said.splitlines() if line.startswith("note: ")]

    why, remedy = noted(Q3_K)
    assert why.startswith("the bundle takes 4.6")
    assert why.endswith(": Q3_K (3.438 bits a weight) is dequantised to bf16")
    assert remedy.startswith("Download a file of types that stay packed instead: IQ4_NL, IQ4_XS, MXFP4, Q4_0, ")
    assert noted(Q3_K, "--other", "raw") == []
    why, remedy = noted(Q6_K)
    assert why.endswith("Q6_K (6.562 bits a weight) is packed in 7")
    assert remedy == "With --scales exact it is smaller."
    assert noted(Q6_K, "--scales", "exact") == noted(Q8_0) == []


def test_a_dry_run_needs_no_output(model: Path) -> None:
    before = sorted(model.parent.iterdir())
    planned = invoke(model, "--dry-run", "--json")
    document = json.loads(planned.stdout)
    assert document["status"] == "planned"
    assert document["plan"]["bundle_bytes"] > document["plan"]["bytes_out"]
    assert sorted(model.parent.iterdir()) == before
    failed(
        invoke(model), 2, f"there is no OUT: no directory for the bundle of {model}", f"q6k-convert {model} OUT/`"
    )


def test_progress_off_a_terminal_is_plain_lines(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(stream, "PIECE_BYTES", 1050)
    result = invoke(model, out)
    total = f"{model.stat().st_size / 1000:.2f} kB"
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) > 5
    assert all(
        line.startswith("converting: ") and f" of {total} (" in line and line.endswith(" left") for line in lines
    )
    assert f"converting: {total} of {total} (100%), " in lines[-1]
    assert "converting" not in result.stdout


def test_the_first_piece_tells_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(streams, "LINE_SECONDS", 0.0)
    lines = streams.PlainLines(1000, "loading", streams.console(stderr=True))
    lines.add(9)
    lines.add(1)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "loading: 9 B of 1.00 kB (1%)"
    assert "/s, " in second
    assert second.endswith(" left")


def test_progress_on_a_terminal_is_a_bar_that_ends_full(model: Path, out: Path) -> None:
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 100))
    command = [sys.executable, "-m", "q6k_convert", str(model), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=side)
    os.close(side)
    seen = b""
    try:
        while piece := os.read(main, 4096):
            seen += piece
    except OSError:
        pass  # Linux's way to say that the other side has closed
    finally:
        os.close(main)
    printed = process.communicate()[0].decode()
    assert process.returncode == 0
    assert "converting: 100%|" in seen.decode()
    assert "bits per weight" in printed


def test_a_reader_of_the_output_that_has_gone_ends_the_run_quietly(model: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "q6k_convert", "inspect", str(model)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (4, "")


def test_a_refused_output_is_refused_before_the_plan(model: Path, out: Path) -> None:
    invoke(model, out)
    for more in ((), ("--dry-run",)):
        refused = invoke(model, out, *more)
        failed(refused, 4, f"the output {out} is already a bundle", "--force")
        assert refused.stdout == ""
    model.write_bytes(b"not even opened")
    failed(invoke(model, out), 4, f"the output {out} is already a bundle", "--force")


# Inspect


def test_inspect_lists_keys_and_tensors_of_a_gguf(model: Path) -> None:
    result = invoke("inspect", model)
    lines = rows(result.stdout)
    assert result.exit_code == 0
    assert "GGUF version 3, alignment 32" in result.stdout
    assert ["general.architecture", "llama"] in lines
    assert ["tokenizer.ggml.tokens", "4", "×", "STRING"] in lines
    assert ["tokenizer.ggml.add_bos_token", "True"] in lines
    assert ["blk.0.ffn_down_exps.weight", "Q6_K", "2×3×256", "1.26", "kB"] in lines
    assert "Q6_K: 3 tensors, 4,864 weights, 3.99 kB" in result.stdout
    document: dict[str, Any] = json.loads(run_here("inspect", model, "--json").stdout)
    assert document["kind"] == "gguf"
    assert document["keys"]["tokenizer.ggml.tokens"] == {"array": "STRING", "count": 4}
    assert [t["name"] for t in document["tensors"]] == [t.name for t in small_model().tensors]


def test_inspect_prints_the_elements_of_no_array_whatever_their_type(tmp_path: Path) -> None:
    pairs = [key_value("general.architecture", "llama"), key_value("bytes", [7] * 5, "u8")]
    path = Builder(kv=pairs, tensors=[weight("w", (1, 256))]).write(tmp_path / "m.gguf")
    document: dict[str, Any] = json.loads(run_here("inspect", path, "--json").stdout)
    assert document["keys"]["bytes"] == {"array": "UINT8", "count": 5}


def test_inspect_prints_no_table_beside_the_document(model: Path, out: Path) -> None:
    invoke(model, out)
    for source in (model, out):
        assert run_here("inspect", source, "--json").stderr == ""


def test_a_table_in_a_pipe_is_not_folded(tmp_path: Path) -> None:
    names = [f"blk.{number}.{'long' * 10}.weight" for number in range(2)]
    keys = [key_value("general.architecture", "llama"), key_value("general.description", "word " * 39)]
    path = Builder([weight(name, (1, 256)) for name in names], keys).write(tmp_path / f"{'model' * 20}.gguf")
    lines = rows(run_cli("inspect", path, env=os.environ | {"COLUMNS": "60"}).stdout)
    assert ["general.description", *["word"] * 39] in lines
    assert all([name, "Q6_K", "1×256", "210", "B"] in lines for name in names)


def test_inspect_lists_a_bundle(model: Path, out: Path) -> None:
    invoke(model, out, "--scales", "exact", "--other", "skip")
    result = invoke("inspect", out)
    assert result.exit_code == 0
    assert f"{out}: q6k-planar bundle by q6k-convert {__version__}" in result.stdout
    lines = rows(result.stdout)
    assert ["tied", "output.weight", "is", "token_embd.weight"] in lines
    assert any(line[:3] == ["made", "from", "model.gguf,"] for line in lines)
    assert any(line[:5] == ["blk.0.ffn_up.weight", "Q3_K", "4×256", "skipped", "0"] for line in lines)
    assert "scales=exact, other=skip" in result.stdout
    document = json.loads(run_here("inspect", out, "--json").stdout)
    assert (document["kind"], document["tied"]) == ("bundle", {"output.weight": "token_embd.weight"})
    assert set(document["tensors"][0]["arrays"]) == {"ql", "qh", "scale", "steps"}


def test_inspect_prints_the_whole_value_of_a_key(model: Path, out: Path) -> None:
    invoke(model, out)
    for path in (model, out):
        assert invoke("inspect", path, "--key", "tokenizer.ggml.tokens").stdout == "<s>\na\né\n\n"
        assert invoke("inspect", path, "--key", "llama.block_count").stdout == "1\n"
        failed(invoke("inspect", path, "--key", "no"), 2, f"{path}: no key 'no'", "without --key lists them")
    document = json.loads(run_here("inspect", model, "--key", "tokenizer.ggml.scores", "--json").stdout)
    assert document == {"key": "tokenizer.ggml.scores", "value": [0.0, -1.5, 2.0, 3.0]}


HOSTILE = "red \x1b[31m bell \a line\nend \x9b2J"


def test_control_characters_from_a_file_are_printed_escaped(tmp_path: Path, out: Path) -> None:
    builder = two_tensors()
    builder.kv = [
        key_value("general.architecture", HOSTILE),
        key_value("general.name", HOSTILE),
        key_value(HOSTILE, 1),
    ]
    path = builder.write(tmp_path / "m.gguf")
    for args in (("inspect", path), (path, out), ("inspect", out)):
        result = invoke(*args)
        assert result.exit_code == 0, result.output
        assert r"red \x1b[31m bell \x07 line\nend \x9b2J" in result.stdout, args
        assert not {"\x1b", "\a", "\x9b"} & set(result.output), args


def test_text_from_a_file_is_no_markup(tmp_path: Path) -> None:
    template = "[INST] {{ user }} [/INST] [bold]:heart:[/bold] \\[x]"
    builder = Builder([weight("[red]w[/red]:heart:", (2, 256))], [key_value("tokenizer.chat_template", template)])
    builder.kv.append(key_value("[b]key[/b]", 1))
    path, out = builder.write(tmp_path / "m.gguf"), tmp_path / "out[red]:heart:"
    seen = invoke("inspect", path)
    assert seen.exit_code == 0, seen.output
    assert template in seen.stdout
    assert "[b]key[/b]" in seen.stdout
    made = invoke(path, out)
    assert made.exit_code == 0, made.output
    assert ["bundle", str(out)] in rows(made.stdout)
    for args in ((path,), (out,)):
        assert "[red]w[/red]:heart:" in invoke("inspect", *args).stdout


def gpu_line(*args: object) -> str:
    result = invoke(*map(str, args))
    return next(line for line in result.stdout.splitlines() if line.startswith("GPU memory: "))


def small_llama() -> tuple[Builder, int]:
    """Return a model of two layers, four heads, two of keys, and the bytes of its weights on a GPU."""
    shapes = {
        "attn_q": (256, 256, Q4_K), "attn_k": (128, 256, Q4_K), "attn_v": (128, 256, Q6_K),
        "attn_output": (256, 256, Q4_0), "ffn_gate": (320, 256, Q8_0), "ffn_up": (320, 256, Q5_0),
        "ffn_down": (256, 320, Q5_0),
    }  # fmt: skip
    # Bytes of a tile of 16 rows and 256 columns, in whole lines of 128.
    tile = {Q4_K: 19 * 128, Q6_K: 28 * 128, Q4_0: 18 * 128, Q8_0: 34 * 128, Q5_0: 22 * 128}
    tensors = [weight("token_embd.weight", (40, 256), Q6_K), weight("output_norm.weight", (256,), F32)]
    # 40 rows lie in 3 tiles of 16, 320 columns in 2 tiles of 256; a norm has 16-bit numbers.
    size = 3 * tile[Q6_K] + 2 * 256
    for layer in range(2):
        for name, (n, k, kind) in shapes.items():
            tensors.append(weight(f"blk.{layer}.{name}.weight", (n, k), kind))
            size += n // 16 * (2 if k == 320 else 1) * tile[kind]
        for name in ("attn_norm", "ffn_norm"):
            tensors.append(weight(f"blk.{layer}.{name}.weight", (256,), F32))
            size += 2 * 256
    keys = {
        "block_count": 2, "embedding_length": 256, "feed_forward_length": 320, "attention.head_count": 4,
        "attention.head_count_kv": 2, "context_length": 3000, "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    kv = [key_value("general.architecture", "llama")]
    return Builder(tensors, kv + [key_value(f"llama.{key}", content) for key, content in keys.items()]), size


def test_gpu_memory_is_that_of_whole_tiles_and_of_the_cache(tmp_path: Path) -> None:
    model, weights = small_llama()
    source = model.write(tmp_path / "model.gguf")

    def expected(context: int, slots: int) -> str:
        cache = 2 * 2 * slots * 2 * 64 * 2  # layers, keys and values, heads of 64, 16 bits
        return (
            f"GPU memory: {size(weights)} of weights and {size(cache)} of keys and values for a context "
            f"of {context:,} tokens, {size(weights + cache)} together"
        )

    assert gpu_line(source, tmp_path / "out", "--dry-run") == expected(3000, 3000)
    invoke(source, tmp_path / "out")
    assert gpu_line("inspect", tmp_path / "out") == expected(3000, 3000)
    assert gpu_line("inspect", tmp_path / "out", "--context", "1001") == expected(1001, 1008)
    document = json.loads(run_here("inspect", tmp_path / "out", "--context", "8", "--json").stdout)
    gpu = {"weights_bytes": weights, "tensors_beside": 0, "context": 8, "cache_bytes": 8192, "cache_problem": None}
    gpu |= {"cache_type": "model", "prompt_bytes": 0}
    assert document["gpu"] == gpu


def test_gpu_memory_of_a_model_that_cannot_be_built_says_why(model: Path, out: Path) -> None:
    line = gpu_line(model, out, "--dry-run")
    assert line.startswith("GPU memory: ")
    assert "that of keys and values is not known: the model states no context length" in line
    failed(invoke("inspect", model, "--context", "5"), 2, "--context is for a bundle", "--dry-run")
