"""How the program ends: by signals at any time, and where nobody can take what it prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bundle_helpers import run_cli
from gguf_builder import small_model
from q6k_convert.convert.pipeline import convert

STRUCK_IMPORT = """
import builtins, os, signal, sys
import q6k_convert.__main__ as program
real, (module, name, spoilt) = builtins.__import__, sys.argv[1:4]
def struck(wanted, *more):
    if wanted.split('.')[0] == module:
        builtins.__import__ = real
        try:
            os.kill(os.getpid(), getattr(signal, name))
        except BaseException as error:
            raise (ImportError('initialization failed') if spoilt == 'yes' else error)
    return real(wanted, *more)
builtins.__import__ = struck
sys.argv[1:] = sys.argv[4:]
program.main()
"""
STRUCK_AT_EXIT = """
import atexit, os, signal, sys
import q6k_convert.__main__ as program
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
program.main()
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_model().write(tmp_path / "model.gguf")


def python(program: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, args)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("module", ["typer", "json"])
def test_a_signal_before_a_command_begins_ends_it_quietly(module: str, name: str, model: Path) -> None:
    done = python(STRUCK_IMPORT, module, name, "no", "inspect", model)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("spoilt", ["no", "yes"])
def test_a_signal_while_a_command_imports_is_named(spoilt: str, model: Path, tmp_path: Path) -> None:
    """Also where the import fails in its own way because of it."""
    done = python(STRUCK_IMPORT, "numpy", "SIGTERM", spoilt, model, tmp_path / "out")
    assert done.returncode == 130
    assert done.stderr == "error: interrupted (SIGTERM)\ntry: Run the same command again.\n"


def test_a_signal_after_the_work_ends_it_quietly(model: Path) -> None:
    done = python(STRUCK_AT_EXIT, "inspect", model)
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize(
    "args",
    [
        ("inspect", "{model}"), ("inspect", "{model}", "--json"),
        ("inspect", "{model}", "--key", "general.architecture"),
        ("verify", "{bundle}", "--json"), ("inspect", "{model}.no", "--json"), ("--help",), ("--version",),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_stdout_that_is_full_is_exit_4(args: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "out")
    with Path("/dev/full").open("w") as full:
        filled = [arg.format(model=model, bundle=tmp_path / "out") for arg in args]
        command = [sys.executable, "-m", "q6k_convert", *filled]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    expected = "No such file or directory" if f"{model}.no" in filled else "No space left on device"
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert expected in error
    assert "standard output: " in error or f"{model}.no" in filled


def test_the_usual_ends(model: Path) -> None:
    assert (run_cli("--version").returncode, run_cli().returncode, run_cli("inspect").returncode) == (0, 2, 2)
    assert run_cli("inspect", model, "--json").returncode == 0
