"""Modules on packed weights, exported by torch.export and compiled by AOTInductor, to run without this package.

    export_model(ExportableModel(model, capacity=4096), "model.pt2", architecture="llama")
    program = export_module(layer, (x,), "layer.pt2", dynamic_shapes=({0: Dim("M", min=2)},))

Packed weights stay packed: they are constants of the graph, uint8 tiles, and the operation `q6k::linear` multiplies
them. A process that runs the program has to load the operations first: `libq6k_ops.so` (see `ops.library`), or in
Python `import q6k_kernels.ops.schema`. The operation takes any number of rows M, so one program serves them all.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from q6k_kernels.errors import ExportFailedError
from q6k_kernels.export import cpp_runtime, program_file
from q6k_kernels.export.exportable import ExportableModel
from q6k_kernels.export.program_file import Info
from q6k_kernels.weights.layers import PackedEmbedding, PackedLinear

EXAMPLE = 16
"""Tokens and slots of the example that is traced; any number would do."""
# Compiling torch's headers ahead takes longer than it saves one or two programs, and leaves 280 MB behind.
_COMPILER = {"aot_inductor.precompile_headers": False}
_OPTIONS = _COMPILER | {"aot_inductor.package": True, "aot_inductor.package_constants_in_so": False}
_TRACING = "TORCH_LOGS=+export,+dynamic says more."
_COMPILING = "It takes g++ or clang++, and for a GPU Triton and CUDA's headers; TORCH_LOGS=inductor says more."
Note = Callable[[str], None]


@dataclass(frozen=True)
class OperationCounts:
    """The numbers of operations in a program's graph: all, and those on packed weights."""

    all: int
    packed: int


@dataclass(frozen=True)
class Exported:
    """An exported model.

    Attributes:
        info: the text of its package.
        operations: operation counts by program.
        weights_bytes: size of the weights in the package in bytes, each weight once.
    """

    info: Info
    operations: dict[str, OperationCounts]
    weights_bytes: int


def trace(module: ExportableModel) -> dict[str, ExportedProgram]:
    """Trace a model's two programs, "prefill" for 2 tokens or more and "decode" for one, for any number of slots.

    Raises:
        ExportFailedError: torch.export refuses the model, or its graph lacks packed operations.
    """
    device = module.model.device
    longest = min(EXAMPLE, module.chunk)
    slots = torch.arange(longest, device=device)
    length, seen = Dim("tokens", min=2, max=module.chunk), Dim("slots", min=2, max=module.capacity)
    one = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    # Fewer tokens than slots: torch.export would take two equal sizes for one.
    many = torch.zeros(1, longest - 1, dtype=torch.int64, device=device), slots[: longest - 1].clone()
    return {
        "prefill": traced(module, (*many, slots), ({1: length}, {0: length}, {0: seen})),
        "decode": traced(module, (*one, slots), ({}, {}, {0: seen})),
    }


def traced(module: nn.Module, arguments: tuple[Any, ...], dynamic_shapes: Any = None) -> ExportedProgram:
    """Trace a module with packed layers by torch.export, and check that each has an operation in the graph.

    Args:
        module: a module in eval mode.
        arguments: an example of its positional arguments.
        dynamic_shapes: see torch.export.

    Raises:
        ExportFailedError: torch.export refuses the module, or packed operations are missing.
    """
    try:
        with torch.no_grad():
            program = torch.export.export(
                module,
                arguments,
                dynamic_shapes=dynamic_shapes,
                strict=False,
                # Some guards hold for all sizes, but torch cannot prove them.
                prefer_deferred_runtime_asserts_over_guards=True,
            )
    except (RuntimeError, ValueError, torch._dynamo.exc.UserError) as error:
        raise _failed(f"torch.export refuses {type(module).__name__}", error, _TRACING) from error
    _name_dtypes(program)
    layers = sum(isinstance(each, PackedLinear | PackedEmbedding) for each in module.modules())
    found = len(packed_operations(program))
    if found < layers:
        raise ExportFailedError(
            f"the graph of {type(module).__name__} has {found} packed operations for {layers} packed layers",
            "Call every packed layer in its forward, or take those out that it does not use.",
        )
    return program


def _name_dtypes(program: ExportedProgram) -> None:
    """Make operations take dtypes by name, since AOTInductor of torch 2.11 passes a wrong ScalarType."""
    named = {
        torch.ops.q6k.embedding.default: torch.ops.q6k.embedding_named.default,
        torch.ops.q6k.dequantize.default: torch.ops.q6k.dequantize_named.default,
    }
    for node in program.graph.nodes:
        if node.target in named:
            node.target = named[node.target]
            node.args = tuple(_name(each) for each in node.args)
            node.kwargs = {key: _name(each) for key, each in node.kwargs.items()}
    program.graph_module.recompile()


def _name(argument: Any) -> Any:
    return str(argument).removeprefix("torch.") if isinstance(argument, torch.dtype) else argument


def packed_operations(program: ExportedProgram) -> list[str]:
    """Return the operations of namespace q6k in a program's graph, in order: "q6k.linear.default" and others."""
    return [str(node.target) for node in program.graph.nodes if str(node.target).startswith("q6k.")]


def export_module(
    module: nn.Module,
    arguments: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    dynamic_shapes: Any = None,
) -> ExportedProgram:
    """Compile one module into a package, which `torch._inductor.aoti_load_package(path)` loads.

    Args:
        module: a module with packed layers, in eval mode, on the device that the package will run on.
        arguments: an example of its positional arguments.
        path: path of the package, ending in .pt2; an existing file is replaced.
        dynamic_shapes: see torch.export; `{0: Dim("M", min=2)}` for a number of rows.

    Returns:
        The traced program.

    Raises:
        ExportFailedError: torch refuses the module, or cannot compile it here.
        ValueError: the path does not end in .pt2.
    """
    target = _target(path)
    program = traced(module, arguments, dynamic_shapes)
    with _replacing(target) as temporary, _compiling(type(module).__name__):
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(temporary), inductor_configs=_COMPILER | cpp_runtime.link_options()
        )
    return program


@torch.no_grad()
def export_model(
    module: ExportableModel,
    path: str | os.PathLike[str],
    *,
    architecture: str,
    note: Note = lambda _: None,
) -> Exported:
    """Compile a whole model into a package, see `program_file`; `program.Program` runs it.

    Args:
        module: a model from `load_model`, on the device that the package will run on.
        path: path of the package, ending in .pt2; an existing file is replaced.
        architecture: GGUF's name of the architecture.
        note: called with a line of text at each stage.

    Raises:
        ExportFailedError: torch refuses the model, or cannot compile it here.
        ValueError: the path does not end in .pt2.
        OSError: the package cannot be written.
    """
    target = _target(path)
    note("tracing prefill and decode")
    programs = trace(module)
    with _compiling(type(module).__name__):
        options = _OPTIONS | cpp_runtime.link_options()
    operations, files = dict[str, OperationCounts](), dict[str, list[str]]()
    for name, program in programs.items():
        calls = sum(node.op == "call_function" for node in program.graph.nodes)
        operations[name] = OperationCounts(calls, len(packed_operations(program)))
        note(f"compiling {name}: {calls} operations, {operations[name].packed} of them on packed weights")
        inputs, named = program.example_inputs or ((), {})
        with _compiling(name):
            made: Any = torch._inductor.aot_compile(program.module(), inputs, named, options=options)
        files[name] = made
    state = module.state
    constants, stored = program_file.arrays_of(_constants(programs.values(), state))
    device: torch.device = module.model.device
    info = Info(
        compiled_by=str(torch.__version__).partition("+")[0],
        device=device.type,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        architecture=architecture,
        dtype=module.model.dtype,
        capacity=module.capacity,
        chunk=module.chunk,
        vocabulary=module.vocabulary,
        constants=constants,
        state=tuple(replace(each, entry="") for each in program_file.arrays_of(state)[0]),
    )
    with _replacing(target) as temporary:
        program_file.write(temporary, info, files, stored)
    return Exported(info, operations, sum(tensor.nbytes for tensor in stored))


def _constants(programs: Iterable[ExportedProgram], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the constants of all programs by name, without the state; shared ones under each of their names."""
    found = dict[str, Tensor]()
    for program in programs:
        for name, tensor in (*program.state_dict.items(), *program.constants.items()):
            if isinstance(tensor, Tensor) and name not in state:
                found[name] = tensor.detach()
    return found


def _target(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix != ".pt2":
        raise ValueError(f"{target}: expected a name that ends in .pt2")
    return target


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside the target; it replaces the target on success and is removed on failure."""
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.pt2")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _compiling(name: str) -> Iterator[None]:
    from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

    try:
        with warnings.catch_warnings():
            # Advice for the authors of inductor and Triton, or for users with float32 on a GPU.
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")
            yield
    except (CppCompileError, InductorError, InvalidCxxCompiler) as error:
        raise _failed(f"AOTInductor does not compile {name}", error, _COMPILING) from error


def _failed(what: str, error: Exception, remedy: str) -> ExportFailedError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    first = next((line for line in lines if "error:" in line.lower()), " ".join(lines[:2]))
    return ExportFailedError(f"{what}: {first}", remedy)
