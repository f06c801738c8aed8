"""Fixtures for all tests: restored signal handlers, a wide terminal, models, the stand-in driver."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from exported_model import SUPPRESSED, ExportedModel
from fake_cuda import FakeCuda, build
from gguf_builder import small_model
from inside import without_coverage
from long_tests import LONGEST, PROCESSES, SHARING, UNTRACED

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each process of torch: there are as many as processors
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Or else torch compiles and loads a program for each set of instructions before it compiles one of ours.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# What calls the kernels of a compiled program is run a few times: optimising it takes longer.
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")
# For the one program that `torch.compile` makes, processes that compile and headers compiled ahead save nothing.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")


def group(path: str) -> str:
    """Name what a test file shares with others: "compiled" things or "tiny models"; its own path if nothing.

    What is compiled is the C++ library, the example and an exported model.
    """
    if Path(path).parent.name in ("cpp", "export"):
        return "compiled"
    return "tiny models" if Path(path).stem in SHARING else path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put first what takes long to build, and in a group what is traced: its imports are counted, too."""
    order = ("compiled", "tiny models")

    def place(item: pytest.Item) -> tuple[int, bool]:
        found, stem = group(str(item.path)), item.path.stem
        return (order.index(found), stem in UNTRACED) if found in order else (len(order), stem not in LONGEST)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each test file to one process, so that what its tests share is built once; each group of files, too.

    Only for `--dist loadfile`; pytest-xdist makes what other words name.
    Marks of groups would not do: pytest-xdist 3.8 writes them into a field that pytest 9.2 does not read.
    """
    from xdist.scheduler import LoadFileScheduling

    if config.getoption("dist") != "loadfile":
        return None

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid.partition("::")[0])

    return Files(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Leave coverage out where it would count nothing that it does not count elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        if item.path.stem not in PROCESSES:
            for name in os.environ.keys() - without_coverage().keys():
                patch.delenv(name)
        tracing, of_threads = sys.gettrace(), threading.gettrace()
        if UNTRACED & {item.path.stem, item.name.partition("[")[0]}:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
        try:
            return (yield)
        finally:
            sys.settrace(tracing)
            threading.settrace(of_threads)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Give SIGINT its default handler, and restore all handlers after a test: the command installs its own.

    A suite that is started in the background ignores SIGINT, and so would the commands that tests interrupt.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the terminal wide: tables folded at 80 columns would break the words that tests look for."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERM", "dumb")
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "GITHUB_ACTIONS", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def untraced() -> Iterator[None]:
    """Leave coverage out of a test that calls the same few functions a hundred thousand times: it triples the time.

    Other tests cover those functions.
    """
    tracing = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(tracing)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a GGUF with tensors of most types."""
    return small_model().write(tmp_path / "model.gguf")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return a path for a bundle that does not exist yet."""
    return tmp_path / "out"


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the library that stands in for libcuda."""
    return build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def cuda(fake_driver: Path) -> Iterator[FakeCuda]:
    """Put the stand-in in the place of the driver; later tests find a driver without GPUs."""
    fake = FakeCuda(fake_driver)
    yield fake
    fake.reset(devices=0)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    """Export a model with the command, once for all tests, because compiling takes a while."""
    from typer.testing import CliRunner

    pytest.importorskip("transformers", reason="transformers is not installed")
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH")
    from dataclasses import replace

    from model_cases import GEMMA2
    from q6k_convert.cli.main import app
    from q6k_kernels.export import exporting
    from untraced import untraced_export

    folder = tmp_path_factory.mktemp("exported")
    keys = GEMMA2.keys | {"tokenizer.ggml.suppress_tokens": SUPPRESSED}
    config = GEMMA2.config | {"num_hidden_layers": 2}
    bundle, _ = replace(GEMMA2, config=config, keys=keys).bundle(folder, scales="bf16")
    package = folder / "package" / "model.pt2"
    package.parent.mkdir()
    options = ["--device", "cpu", "--capacity", "128", "--json", "--quiet"]
    trace, traced = exporting.trace, dict[str, Any]()

    def kept(module: Any) -> dict[str, Any]:
        traced.update(trace(module))
        return traced

    with untraced_export(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "trace", kept)
        result = CliRunner().invoke(app, ["export", str(bundle), str(package), *options])
    assert result.exit_code == 0, result.output
    return ExportedModel(bundle, package, json.loads(result.stdout), traced)
