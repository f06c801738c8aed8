"""The commands that run models, and what they take: generate, export, doctor, build-ops."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from q6k_convert.cli.options import JsonOption, QuietOption, VerboseOption
from q6k_convert.cli.reporting import reporting
from q6k_convert.errors import ExitCode

DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU if all it takes is there, else the CPU.")
]
DtypeOption = Annotated[
    Literal["auto", "bf16", "fp16", "fp32"],
    typer.Option(help="Of activations and unpacked weights; auto: bf16 on a GPU, fp32 on the CPU."),
]
ActivationsOption = Annotated[
    Literal["auto", "int8", "bf16"],
    typer.Option(help="How packed weights are multiplied; auto: int8 for few rows, by measurement."),
]


def generate(
    bundle: Annotated[Path, typer.Argument(metavar="OUT/", help="A bundle.")],
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", "-p", metavar="TEXT", help="What to continue; - reads it from stdin.", show_default="none"
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Ask it as a user, by the model's chat template.", show_default="off"),
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What the model is told first, with --chat.", show_default="none"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=1 << 24, metavar="N", help="Stop after as many.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=100.0, help="0: always the best token; above: one by its probability.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 32) - 1, help="Of the choices by probability.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    activations: ActivationsOption = "auto",
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A Hugging Face tokenizer instead of the model's.", show_default="none"),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Continue a text with a bundle's model, or answer it."""
    with reporting(as_json, quiet, verbose) as terminal:
        from q6k_convert.run.generate_command import GenerateRequest, run

        request = GenerateRequest(
            bundle=bundle,
            prompt=prompt,
            chat=chat,
            system=system,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            device=device,
            dtype=dtype,
            activations=activations,
            tokenizer=tokenizer,
        )
        terminal.document(run(request, terminal.stream, terminal.note, terminal.progress))


def export(
    bundle: Annotated[Path, typer.Argument(metavar="OUT/", help="A bundle.")],
    target: Annotated[Path, typer.Argument(metavar="MODEL.pt2", help="The package to write.")],
    capacity: Annotated[
        int | None,
        typer.Option(
            min=8,
            max=1 << 24,
            metavar="N",
            help="Tokens of prompt and answer together, at most.",
            show_default="4096, or all that the model knows",
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    activations: ActivationsOption = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Replace a file, once the new one is checked.", show_default="off")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compile a bundle's model into one file that runs without Python."""
    with reporting(as_json, quiet, verbose) as terminal:
        from q6k_convert.run.export_command import ExportRequest, run

        request = ExportRequest(bundle, target, capacity, device, dtype, activations, force)
        report = run(request, terminal.note, terminal.progress)
        if as_json:
            terminal.document(report)
        else:
            terminal.value("program", report["program"])


def doctor(as_json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """Say what of torch, driver, GPUs and compiler is here, and test the kernels."""
    with reporting(as_json, False, verbose) as terminal:
        from q6k_convert.machine.doctor import examine

        report = examine()
        terminal.examination(report)
        terminal.document(report)
        if report["status"] != "ok":
            raise typer.Exit(int(ExitCode.ENVIRONMENT))


def build_ops(
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the library goes.", show_default="ops in the cache of kernels"),
    ] = None,
    arch: Annotated[
        list[int] | None,
        typer.Option(
            metavar="XY",
            help="Compute capability to compile kernels for, 90 for 9.0; repeatable.",
            show_default="80, 86, 89, 90, 100, 120",
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, max=256, help="Compilers at a time.", show_default="processors")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Build the operations as a C++ library, for C++ programs and cheaper calls; needs CMake and a C++ compiler."""
    with reporting(as_json, quiet, verbose) as terminal:
        from q6k_convert.machine.build_ops import build

        report = build(out, arch or [], jobs, terminal.note)
        if as_json:
            terminal.document(report)
        else:
            terminal.value("library", report["library"])
