"""The command line: what it prints where, how it fails, and that it loads no more than it needs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bundle_helpers import BROKEN_LATE, broken_late, failed, fork_cli, invoke, listing, run_cli, run_here
from gguf_builder import F32, Builder, small_model, weight
from q6k_convert import __version__
from q6k_convert.cli import contents
from q6k_convert.convert import repack, stream
from q6k_convert.text import parse_size

BUG = "This is a bug in q6k-convert: run again with --verbose and report the traceback."


# Commands and options


def test_convert_is_the_default_command(model: Path, tmp_path: Path) -> None:
    options = ("--scales", "exact", "--max-shard-size", "3kB")
    for name, args in {
        "named": ("convert", model, tmp_path / "named", *options),
        "default": (model, tmp_path / "default", *options),
        "options-first": (*options, model, tmp_path / "options-first"),
    }.items():
        done = run_cli(*args)
        assert done.returncode == 0, done.stderr
        assert listing(tmp_path / name) == listing(tmp_path / "named")
    manifest = json.loads((tmp_path / "default" / "bundle.json").read_bytes())
    assert (manifest["options"]["scales"], manifest["options"]["max_shard_size"]) == ("exact", 3000)


def test_the_version_is_printed() -> None:
    done = run_cli("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"q6k-convert {__version__}\n", "")


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_waiting_threads_leave_the_processor_to_others(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user says otherwise, and before torch, which reads it when it is imported."""
    code = (
        "import os, sys; from q6k_convert import __main__; sys.argv = ['q6k-convert', '--version']\n"
        "try: __main__.main()\n"
        "finally: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{given or 'PASSIVE'} False"


def test_help_lists_every_option_its_default_and_the_exit_codes() -> None:
    top, convert, inspect = invoke("--help"), invoke("convert", "--help"), invoke("inspect", "-h")
    for result in (top, convert, inspect):
        assert result.exit_code == 0
        words = " ".join(result.stdout.split())
        for text in ("0 done", "1 a bug", "2 usage", "3 input rejected", "4 I/O or output conflict"):
            assert text in words
        assert "6 environment" in words
        assert "130 interrupted" in words
    for text in ("--version", "--show-completion", "convert", "inspect"):
        assert text in top.stdout
    lines = convert.stdout.splitlines()
    for option, default in {
        "--scales": "bf16", "--other": "bf16", "--include": "(all)", "--exclude": "(none)",
        "--max-shard-size": "5GB", "--jobs": "(processors, at most 8)", "--allow-nonfinite": "", "--force": "",
        "--dry-run": "", "--json": "", "--quiet": "", "--verbose": "",
    }.items():  # fmt: skip
        assert any(option in line and (not default or f"[default: {default}]" in line) for line in lines), option
    assert all(option in inspect.stdout for option in ("--key", "--json", "--verbose"))
    commands = (
        "convert", "inspect", "verify", "generate", "chat", "bench", "perplexity", "export", "hf", "doctor",
        "build-ops", "ci",
    )  # fmt: skip
    for args in ((), *((command,) for command in commands)):
        assert "bool" not in invoke(*args, "--help").stdout.lower()  # flags take no value


def test_no_arguments_print_the_help() -> None:
    done = run_cli()
    assert "Usage: q6k-convert [OPTIONS] COMMAND [ARGS]..." in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_printed(shell: str) -> None:
    done = run_cli(env=os.environ | {"_Q6K_CONVERT_COMPLETE": f"source_{shell}"})
    assert done.returncode == 0, done.stderr
    assert f"_Q6K_CONVERT_COMPLETE=complete_{shell}" in done.stdout


def test_options_are_completed() -> None:
    words = {"_Q6K_CONVERT_COMPLETE": "complete_bash", "COMP_WORDS": "q6k-convert convert --max", "COMP_CWORD": "2"}
    assert run_cli(env=os.environ | words).stdout.split() == ["--max-shard-size"]


@pytest.mark.parametrize(
    "args", [("inspct", "model.gguf"), ("convrt", "model.gguf"), ("convrt", "model.gguf", "out/")]
)
def test_a_mistyped_command_gets_a_hint(args: tuple[str, ...]) -> None:
    result = invoke(*args)
    assert result.exit_code in (2, 4), result.output
    meant = "inspect" if args[0] == "inspct" else "convert"
    assert re.search(rf"Did you mean .*\b{meant}\b.?\?", result.stderr), result.stderr


def test_sizes_are_decimal_or_binary() -> None:
    sizes = {
        "5GB": 5_000_000_000, "512MiB": 512 << 20, "1000000B": 1_000_000, "1.5k": 1500, " 2 tb ": 2 * 10**12,
        "7B": 7, "3Ki": 3072, "0.5gib": 1 << 29,
    }  # fmt: skip
    assert {text: parse_size(text) for text in sizes} == sizes


@pytest.mark.parametrize(
    "size", ["", "GB", "-5", "1e9", "5XB", "5 5", "nan", "inf", "5iB", "1.", ".5", "9" * 16, "5GBB"]
)
def test_what_is_no_size_is_a_usage_error(size: str, model: Path, out: Path) -> None:
    with pytest.raises(ValueError, match="is not a size; write it like 5GB, 512MiB or 1000000B"):
        parse_size(size)
    result = invoke(model, out, f"--max-shard-size={size}")
    assert result.exit_code == 2
    assert f"error: --max-shard-size: {size!r} is not a size" in result.stderr
    assert not out.exists()


# Exit codes


def test_a_command_line_that_makes_no_sense_is_exit_2(model: Path, out: Path) -> None:
    for args, message in {
        ("--jobs", "0"): "Invalid value for '--jobs'",
        ("--jobs", "257"): "Invalid value for '--jobs'",
        ("--jobs", "many"): "Invalid value for '--jobs'",
        ("--scales", "int8"): "'bf16', 'exact'",
        ("--nope",): "No such option: --nope",
    }.items():
        result = invoke(model, out, *args)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
    assert invoke(model).exit_code == 2
    failed(invoke(model, out, "--include", "x*"), 2, "--include 'x*' matches none of the 7 tensors", "inspect")
    failed(invoke("inspect", model, "--key", "nope"), 2, "model.gguf: no key 'nope'", "without --key lists them")
    assert listing(out.parent) == {model.name: model.read_bytes()}


def test_an_input_that_is_rejected_is_exit_3(tmp_path: Path, out: Path) -> None:
    (tmp_path / "text").write_text("no GGUF at all, but long enough for a header")
    failed(invoke(tmp_path / "text", out), 3, "text: magic at byte 0: expected 'GGUF'", "Give a GGUF file.")
    broken = broken_late().write(tmp_path / "broken.gguf")
    failed(invoke(broken, out), 3, BROKEN_LATE, "--allow-nonfinite")
    (tmp_path / "empty").mkdir()
    failed(invoke("inspect", tmp_path / "empty"), 3, "is not a bundle: it has no bundle.json", "Make the bundle")
    assert sorted(listing(tmp_path)) == ["broken.gguf", "empty", "text"]


def test_an_output_conflict_or_a_missing_file_is_exit_4(model: Path, out: Path) -> None:
    failed(invoke(model.parent / "absent.gguf", out), 4, "absent.gguf: No such file", "Check the path")
    (empty := out.with_name("empty")).mkdir()
    failed(invoke(empty, out), 4, "is a directory", "Give the path of a .gguf file.")
    failed(invoke(model, model.parent), 4, "are the same or nested", "Give a new directory as output.")
    assert invoke(model, out).exit_code == 0
    failed(invoke(model, out), 4, f"the output {out} is already a bundle", "--force")
    assert invoke(model, out, "--force").exit_code == 0


def test_a_missing_compiled_repacker_is_exit_6(model: Path, out: Path, tmp_path: Path) -> None:
    def hide() -> None:
        repack._library.cache_clear()
        repack._EXTENSION = "q6k_convert._hidden"

    code, said = fork_cli(model, out, log=tmp_path / "log", patch=hide).wait()
    assert code == 6, said
    assert "error: the compiled repacker q6k_convert._hidden is not installed\n" in said
    assert "try: Install q6k-convert with a C compiler at hand" in said
    assert sorted(listing(tmp_path)) == ["log", "model.gguf"]


def test_a_source_that_breaks_its_format_is_exit_3_and_one_that_cannot_be_read_exit_4(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    failed(invoke(tmp_path / "m.gguf", tmp_path / "out"), 3, "24 bytes expected", "download or export it again")
    os.mkfifo(tmp_path / "fifo.gguf")
    failed(invoke(tmp_path / "fifo.gguf", tmp_path / "out"), 4, "is not a regular file", "Give the path of a .gguf")


def fail_inside(*_: object, **__: object) -> None:
    raise KeyError("inside")


def test_an_unforeseen_error_is_exit_1_and_says_that_it_is_a_bug(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_encode", fail_inside)
    failed(invoke(model, out), 1, "KeyError: 'inside'", BUG)
    assert not out.exists()


def test_verbose_shows_the_traceback_of_any_error(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out.parent / "text").write_text("no GGUF")
    expected = invoke(out.parent / "text", out, "--verbose")
    assert expected.exit_code == 3
    assert "Traceback (most recent call last)" in expected.stderr
    assert "GgufRejectedError" in expected.stderr
    monkeypatch.setattr(contents, "plan_contents", fail_inside)
    bug = invoke(model, out, "-v")
    assert bug.exit_code == 1
    assert "fail_inside" in bug.stderr
    assert BUG in bug.stderr


# JSON, quiet, dry run


def test_json_is_one_document_on_stdout_and_all_else_on_stderr(model: Path, out: Path) -> None:
    planned = run_cli(model, out, "--json", "--dry-run")
    done = run_cli(model, out, "--json")
    document = json.loads(done.stdout)
    assert (document["status"], done.returncode) == ("done", 0)
    assert document["plan"] == json.loads(planned.stdout)["plan"]
    assert json.loads(planned.stdout)["status"] == "planned"
    result = document["result"]
    assert result["output"] == str(out)
    assert (result["tensors_planar"], result["tensors_other"], result["tensors_skipped"]) == (4, 3, 0)
    assert result["bytes_in"] == model.stat().st_size
    assert result["bits_per_weight_planar"] == pytest.approx((7 * 4864 + 4.625 * 512) / 5376, abs=1e-4)
    assert result["peak_memory_bytes"] > 1 << 20
    assert document["plan"]["tied_head"] is True
    assert {(t["type"], t["storage"], t["format"], t["tensors"]) for t in document["plan"]["types"]} == {
        ("Q6_K", "planar", "q6_k", 3), ("Q4_K", "planar", "q4_k", 1), ("Q3_K", "dequantized", None, 1),
        ("F32", "plain", None, 1), ("F16", "plain", None, 1),
    }  # fmt: skip
    assert "packed as q6_k, 7 bits a weight" in done.stderr
    assert "bits per weight" in done.stderr


@pytest.mark.parametrize("more", [(), ("--quiet",), ("--verbose",)])
def test_json_describes_a_failure_too(more: tuple[str, ...], model: Path, out: Path) -> None:
    invoke(model, out)
    for args, code in (
        ((model, out), 4),
        ((model, out.with_name("new"), "--include", "x"), 2),
        ((out / "bundle.json", out / "x"), 3),
    ):
        done = run_here(*args, "--json", *more)
        document = json.loads(done.stdout)
        assert done.returncode == code
        assert set(document) == {"status", "exit_code", "error", "remedy"}
        assert (document["status"], document["exit_code"]) == ("error", code)
        assert f"error: {document['error']}\ntry: {document['remedy']}\n" in done.stderr


@pytest.mark.parametrize("builder", [small_model(), Builder([weight("a", (4,), F32)])], ids=["Q6_K", "no Q6_K"])
def test_quiet_prints_nothing_unless_it_fails(builder: Builder, tmp_path: Path, out: Path) -> None:
    path = builder.write(tmp_path / "m.gguf")
    done = run_cli(path, out, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    again = run_cli(path, out, "-q")
    assert (again.returncode, again.stdout) == (4, "")
    assert "is already a bundle" in again.stderr


def test_a_dry_run_writes_nothing_and_still_reports_conflicts(model: Path, out: Path) -> None:
    before = listing(out.parent)
    result = invoke(model, out.parent / "deep" / "out", "--dry-run")
    assert result.exit_code == 0
    assert "packed as q6_k, 7 bits a weight" in result.stdout
    assert "bits per weight" not in result.stdout
    assert listing(out.parent) == before
    invoke(model, out)
    before = listing(out.parent)
    failed(invoke(model, out, "--dry-run"), 4, "is already a bundle", "--force")
    assert invoke(model, out, "--dry-run", "--force").exit_code == 0
    assert listing(out.parent) == before


# What is loaded


@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_torch_is_never_imported(command: str, model: Path, out: Path, tmp_path: Path) -> None:
    # A torch that can be imported and tells; without one the test would hold of any program.
    (tmp_path / "path" / "torch").mkdir(parents=True)
    (tmp_path / "path" / "torch" / "__init__.py").write_text("print('torch was imported')")
    path = os.pathsep.join([str(tmp_path / "path"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    control = subprocess.run(
        [sys.executable, "-c", "import torch"], env=environment, capture_output=True, check=True
    )
    assert control.stdout == b"torch was imported\n"
    done = run_cli(command, model, *([out] if command == "convert" else []), env=environment)
    assert done.returncode == 0, done.stderr
    assert control.stdout.decode() not in done.stdout


def imported(*args: str | Path) -> set[str]:
    command = [sys.executable, "-X", "importtime", "-m", "q6k_convert", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


def test_help_and_version_import_no_numpy(model: Path) -> None:
    assert "numpy" in imported("convert", model, model.parent / "out")  # to dequantise
    for args in (("--help",), ("convert", "--help"), ("inspect", "--help"), ("--version",)):
        modules = imported(*args)
        assert "typer" in modules
        assert not {"numpy", "gguf", "xxhash", "tqdm"} & modules
