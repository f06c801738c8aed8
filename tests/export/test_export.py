"""Exporting: single modules, whole models, the package they come in, and the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import lowering
from exported_model import SUPPRESSED, ExportedModel
from families import FAMILIES, VOCABULARY, tiny
from q6k_convert.cli.main import app
from q6k_kernels import PackedLinear, load_model
from q6k_kernels.errors import ExportFailedError, ProgramError, UnsupportedModelError
from q6k_kernels.export import exporting, program_file
from q6k_kernels.export.exportable import ExportableModel
from q6k_kernels.export.program import Program
from tiny_gemma4 import GEMMA4_EXPERTS, GEMMA4_SHARED, TinyGemma4

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def text(length: int, vocabulary: int = VOCABULARY) -> list[int]:
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.mark.parametrize(
    ("tiny_model", "problem"), [(GEMMA4_EXPERTS, "have no mixtures"), (GEMMA4_SHARED, "values of others")]
)
def test_models_that_programs_cannot_hold_are_named(tiny_model: TinyGemma4, problem: str) -> None:
    with pytest.raises(UnsupportedModelError, match=problem) as caught:
        ExportableModel(tiny_model.make(), capacity=8)
    assert "q6k-convert generate" in str(caught.value)


@needs_compiler
def test_a_weight_from_gguf_to_a_compiled_program(tmp_path: Path) -> None:
    # A layer alone, of one size: test_cpp_runtime.
    lowering.check(tmp_path, "bf16", "cpu", torch.bfloat16, (2, 4, 8, 9, 64, 300), decode=False)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen35"])
def test_the_exportable_model_is_transformers(family: str) -> None:
    """In chunks as they come, past where rings wrap, stale memory in every slot that was not written yet."""
    model = tiny(family)
    before = model.config._attn_implementation
    ids = text(190)
    expected = model(torch.tensor([ids])).logits[0]
    module = ExportableModel(model, capacity=195).eval()
    assert module.capacity == 200
    assert module.chunk == (72 if module.window else 200)
    for buffer in module.state.values():
        buffer.normal_()
    try:
        at = 0
        for length in (70, 1, 1, 72, 30, *[1] * 16):
            end = at + length
            slots = torch.arange(min(max(at, 2) + 5, 200) if end % 2 else 200)
            found = module(torch.tensor([ids[at:end]]), torch.arange(at, end), slots)
            torch.testing.assert_close(found[0], expected[end - 1], rtol=2e-4, atol=2e-4)
            at = end
        assert at == len(ids)
    finally:
        model.config._attn_implementation = before


def test_a_small_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 8 or more, found 7"):
        ExportableModel(tiny("llama"), 7)


def test_a_graph_without_the_operation_is_refused() -> None:
    class Unused(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = PackedLinear(256, 8)

        def forward(self, x: Any) -> Any:
            return x + 1

    with pytest.raises(ExportFailedError, match="has 0 packed operations for 1 packed layers"):
        exporting.traced(Unused(), (torch.zeros(1, 256),))


def test_what_torch_does_not_trace_is_refused() -> None:
    class Branches(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x + 1 if float(x.sum()) > 0 else x

    with pytest.raises(ExportFailedError, match="torch.export refuses Branches"):
        exporting.traced(Branches(), (torch.zeros(1, 256),))


def test_packages_of_modules_end_in_pt2(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a name that ends in \.pt2"):
        exporting.export_module(PackedLinear(256, 8), (torch.zeros(1, 256),), tmp_path / "layer.so")


# Whole models, compiled


def test_the_graphs_hold_the_operation(exported: ExportedModel) -> None:
    """For each packed layer once; and nothing of a packed weight's size is there but its tiles."""
    module = ExportableModel(load_model(exported.bundle), 128).eval()
    layers = [each for each in module.modules() if isinstance(each, PackedLinear)]
    assert set(exported.traced) == {"prefill", "decode"}
    for name, program in exported.traced.items():
        found = exporting.packed_operations(program)
        assert found.count("q6k.linear.default") == len(layers)
        assert found.count("q6k.embedding_named.default") == 1
        assert exported.report["operations"][name]["packed"] == len(layers) + 1


def test_weights_stay_packed_and_are_there_once(exported: ExportedModel) -> None:
    info, constants = program_file.read(exported.package)
    model = load_model(exported.bundle)
    tiles = {f"model.{name}": each for name, each in model.named_parameters() if name.endswith("tiles")}
    assert tiles
    for name, each in tiles.items():
        assert constants[name].dtype is torch.uint8
        assert torch.equal(constants[name], each)
    by_name = {each.name: each.entry for each in info.constants}
    assert by_name["model.lm_head.tiles"] == by_name[next(name for name in by_name if "embed" in name)]
    matrices = [each for each in info.constants if each.dtype.is_floating_point and len(each.shape) > 1]
    assert not matrices
    stored = {each.entry: each.nbytes for each in info.constants}
    assert sum(stored.values()) == exported.report["weights_bytes"]
    assert exported.package.stat().st_size < sum(stored.values()) + 8_000_000


def best(model: Any, ids: list[int]) -> int:
    """The next token of those that may be chosen."""
    logits = model(torch.tensor([ids])).logits[0, -1]
    return max(set(range(96)) - {*SUPPRESSED}, key=logits.tolist().__getitem__)


def test_tokens_are_the_models(exported: ExportedModel) -> None:
    """Past where a ring has wrapped; the second time after another text, whose keys are still there."""
    model = load_model(exported.bundle)
    program = Program(exported.package)
    for each in program.state.values():
        each.normal_()
    for length in (100, 1, 73):
        ids = text(length, 96)
        answer = [*ids]
        for _ in range(8):
            answer.append(best(model, answer))
        program.reset()
        assert list(program.generate(8, program.prefill(ids))) == answer[length:]
        assert program.length == length + 7
    assert int(model(torch.tensor([text(100, 96)])).logits[0, -1].argmax()) in SUPPRESSED


def test_what_a_program_refuses(exported: ExportedModel) -> None:
    program = Program(exported.package)
    for ids, told in (([], "found 0"), ([1, 96], "of 1 to 96"), ([-1], "of -1"), ([1] * 129, "found 129")):
        with pytest.raises(ValueError, match=f"expected 1 to 128 of 0 to 95.*{told}"):
            program.prefill(ids)
    assert len(list(program.generate(10, program.prefill([3] * 126)))) == 3  # then the cache is full
    with pytest.raises(ProgramError, match="compiled for cpu, and is to run on cuda"):
        Program(exported.package, "cuda")


CHANGES = [
    ("q6k-program 1\n", "q6k-program 2\n", "begins with 'q6k-program 2'"),
    (f"torch {torch.__version__.partition('+')[0]}", "torch 1.0.0", r"compiled by torch 1\.0\.0, and this is"),
    ("device cpu", "device cuda 9.0", "compiled for cuda 9.0|compiled for a GPU|compiled for compute"),
    ("device cpu", "device tpu", "line 3 .* means nothing"),
    ("dtype float32", "dtype float128", "names a dtype float128"),
    ("capacity 128\n", "", "one line of capacity"),
    ("capacity 128\n", "capacity 128\ncapacity 128\n", "one line of capacity"),
    ("capacity 128\n", "capacity -1\n", "means nothing"),
    ("constant q6k_0 ", "constant q6k_999 ", "no entry data/weights/q6k_999"),
    (" uint8 ", " uint8 9x", "expected [0-9]+, uncompressed, for model"),
    ("constant q6k_0 ", "constant ../../x ", "means nothing"),
    ("keys_0\n", "keys_9\n", "asks for keys_0"),
    ("values_0\n", "keys_0\n", "has keys_0 twice"),
    ("chunk 72\n", "chunk 129\n", "chunks of 129 tokens for 128 positions"),
    ("chunk 72\n", "chunk ٧٢\n", "means nothing"),
    ("values_1\n", "values_1", "ends within the line 'state .* values_1'"),
]


@pytest.mark.parametrize(("old", "new", "told"), CHANGES)
def test_damaged_packages_are_refused(
    exported: ExportedModel, tmp_path: Path, old: str, new: str, told: str
) -> None:
    path = tmp_path / "changed.pt2"
    exported.changed(path, lambda content: content.replace(old.encode(), new.encode(), 1))
    with pytest.raises(ProgramError, match=told):
        Program(path)


def test_a_program_with_a_runtime_of_its_own_is_refused(exported: ExportedModel, tmp_path: Path) -> None:
    """It would crash as torch loads it, so it is not loaded."""
    path = tmp_path / "static.pt2"
    exported.changed(path, lambda content: content.replace(b"libstdc++.so.6\0", b"libother++.so1\0"), ".so")
    with pytest.raises(ProgramError, match=r"\.so has a C\+\+ runtime of its own.* Export it again"):
        Program(path)


def test_files_that_are_no_packages_are_refused(tmp_path: Path, exported: ExportedModel) -> None:
    path = tmp_path / "x.pt2"
    path.write_bytes(b"PK" + bytes(1000))
    with pytest.raises(ProgramError, match="not a PT2 archive"):
        program_file.read(path)
    whole = exported.package.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ProgramError, match="not a PT2 archive"):
        program_file.read(path)
    with pytest.raises(FileNotFoundError):
        program_file.read(tmp_path / "none.pt2")


@pytest.mark.parametrize("name", ["llama\nconstant q6k_0 uint8 1 x", "a b", "", "x" * 65])
def test_a_name_cannot_add_a_line_to_a_package(name: str) -> None:
    info = program_file.Info("2.11.0", "cpu", None, name, torch.float32, 8, 8, 96, (), ())
    with pytest.raises(ValueError, match="architecture: expected 1 to 64 characters and no blank"):
        program_file._text(info)


# The command


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_the_report(exported: ExportedModel) -> None:
    report = exported.report
    assert report["status"] == "done"
    assert report["bytes"] == exported.package.stat().st_size
    assert (report["device"], report["dtype"], report["architecture"]) == ("cpu", "float32", "gemma2")
    assert (report["capacity"], report["chunk"], report["vocabulary"]) == (128, 72, 96)
    assert 0 <= report["check"]["relative_difference"] <= report["check"]["allowed"] == 1e-3
    assert not [path for path in exported.package.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("target", "options", "code", "told"),
    [
        ("model.so", (), 2, "ends in .pt2"),
        ("out/model.pt2", (), 2, "lies in the bundle"),
        ("none/model.pt2", (), 4, "no such directory"),
        ("taken.pt2", (), 4, "there is a file already"),
        ("model.pt2", ("--capacity", "513"), 2, "the model knows 512 positions"),
        ("model.pt2", ("--capacity", "7"), 2, "capacity"),
        ("model.pt2", ("--device", "cuda"), 6, "--device cuda cannot run"),
    ],
)
def test_what_the_command_refuses_at_once(
    exported: ExportedModel, tmp_path: Path, target: str, options: tuple[str, ...], code: int, told: str
) -> None:
    shutil.copytree(exported.bundle, tmp_path / "out")
    (tmp_path / "taken.pt2").write_text("mine")
    result = command(tmp_path / "out", tmp_path / target, *options, "--json")
    assert result.exit_code == code
    assert told in result.stderr
    assert (tmp_path / "taken.pt2").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "taken.pt2"]


def test_without_a_compiler(exported: ExportedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    result = command(exported.bundle, tmp_path / "model.pt2", "--device", "cpu", "--json")
    assert result.exit_code == 6
    assert "/nowhere/c++ is not on PATH" in json.loads(result.stdout)["error"]


def test_a_program_with_other_logits_is_not_kept(
    exported: ExportedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled is the model; what it is held against is not."""
    from q6k_convert.run import export_command

    def copied(_: Any, path: Path, **__: Any) -> Any:
        shutil.copy2(exported.package, path)
        info, _constants = program_file.read(path)
        return exporting.Exported(info, {}, 0)

    expected = export_command._logits_of_module
    monkeypatch.setattr(exporting, "export_model", copied)
    target = tmp_path / "model.pt2"
    target.write_text("an earlier one")
    arguments = (exported.bundle, target, "--device", "cpu", "--capacity", "128", "--force")
    monkeypatch.setattr(export_command, "_logits_of_module", lambda module: [2 * each for each in expected(module)])
    result = command(*arguments)
    assert result.exit_code == 5
    assert "differ from the model's by " in result.stderr
    assert target.read_text() == "an earlier one"
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    monkeypatch.setattr(export_command, "_logits_of_module", expected)
    assert command(*arguments).exit_code == 0
    assert program_file.read(target)[0].architecture == "gemma2"
