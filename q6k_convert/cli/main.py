"""Commands that make and check bundles: parse, call, print. `model_commands` has those that run them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from q6k_convert import __version__
from q6k_convert.cli.ci_command import ci
from q6k_convert.cli.group import ConvertByDefault, PlainCommand
from q6k_convert.cli.hf_command import hf
from q6k_convert.cli.model_commands import build_ops, doctor, export, generate
from q6k_convert.cli.options import (
    EXIT_CODES,
    HUB_BUNDLE,
    HUB_REFERENCE,
    JsonOption,
    QuietOption,
    VerboseOption,
    parse_device,
    parse_output,
)
from q6k_convert.cli.prompt_commands import bench, chat, perplexity
from q6k_convert.cli.reporting import peak_memory, reporting
from q6k_convert.errors import ExitCode
from q6k_convert.run.running import Device
from q6k_convert.text import parse_size

app = typer.Typer(
    cls=ConvertByDefault,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"q6k-convert {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Convert GGUF files to q6k-planar bundles for PyTorch on NVIDIA GPUs; verify, run and export them.

    `q6k-convert MODEL.gguf OUT/` is short for `q6k-convert convert MODEL.gguf OUT/`.
    """


@app.command(cls=PlainCommand, epilog=EXIT_CODES)
def convert(
    source: Annotated[
        str, typer.Argument(metavar="MODEL.gguf", help=f"GGUF file, any part of a split one, or {HUB_REFERENCE}")
    ],
    output: Annotated[
        Path | None,
        typer.Argument(
            parser=parse_output,
            metavar="OUT/",
            help="Directory of the bundle to write; new or empty. --dry-run needs none.",
            show_default=False,
        ),
    ] = None,
    scales: Annotated[
        Literal["bf16", "exact"],
        typer.Option(help="Store scales of Q6_K weights rounded to bf16, or exactly as in the GGUF (smaller)."),
    ] = "bf16",
    other: Annotated[
        Literal["bf16", "raw", "skip", "error"],
        typer.Option(
            help="Dequantise other quantised tensors to bf16, store their GGUF blocks, skip or refuse them."
        ),
    ] = "bf16",
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Store only tensors whose name matches; repeatable.", show_default="all"),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Leave out tensors whose name matches; repeatable.", show_default="none"),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Start a new shard past this size, like 5GB or 512MiB.")
    ] = "5GB",
    allow_nonfinite: Annotated[
        bool,
        typer.Option("--allow-nonfinite", help="Keep blocks whose scale is NaN or infinite.", show_default="off"),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace an existing bundle once the new one is complete.", show_default="off"
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop.", show_default="off")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=256,
            metavar="N",
            help="Use N worker threads; the output stays the same.",
            show_default="processors, at most 8",
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Convert a GGUF file to a bundle."""
    with reporting(as_json, quiet, verbose) as terminal:
        from q6k_convert.cli import contents
        from q6k_convert.cli.given import check_given
        from q6k_convert.convert.pipeline import check_room, default_jobs, run
        from q6k_convert.convert.plan import Options, make_plan
        from q6k_convert.convert.staging import check_output
        from q6k_convert.errors import UsageError
        from q6k_convert.hub import resolve
        from q6k_kernels.gguf.model import open_gguf

        try:
            shard_bytes = parse_size(max_shard_size)
        except ValueError as error:
            raise UsageError(f"--max-shard-size: {error}") from error
        if shard_bytes < 1:
            raise UsageError("--max-shard-size must be at least one byte")
        options = Options(scales, other, tuple(include or ()), tuple(exclude or ()), shard_bytes, allow_nonfinite)
        if output is None and not dry_run:
            raise UsageError(
                f"there is no OUT: no directory for the bundle of {source}",
                f"Give one: `q6k-convert {shlex.quote(source)} OUT/`; or --dry-run, to see what would be written.",
            )
        local = [Path(source)] if Path(source).exists() else []
        if output is not None:
            check_output(output, local, force=force)  # before a download that may take hours
        found = resolve(source, terminal.note, terminal.progress, download=not dry_run)
        if found.path is None:
            terminal.document({"status": "planned"} | found.document)
            return
        check_given(found.path, "GGUF file", "q6k-convert convert")
        with open_gguf(found.path) as model:
            plan = make_plan(model, options)
            if output is not None:
                check_room(plan, output, force=force)
            planned = contents.plan_contents(plan)
            terminal.plan(planned)
            if output is None or dry_run:
                terminal.document({"status": "planned", "plan": planned} | found.document)
                return
            with terminal.progress(plan.bytes_in, "converting") as progress:
                result = run(plan, output, jobs=jobs or default_jobs(), force=force, progress=progress)
        summary = contents.result_contents(result, peak_memory())
        terminal.result(summary, planned, source)
        terminal.document({"status": "done", "plan": planned, "result": summary} | found.document)


@app.command(cls=PlainCommand, epilog=EXIT_CODES)
def inspect(
    source: Annotated[
        str, typer.Argument(metavar="MODEL.gguf|OUT/", help=f"GGUF file, bundle, or {HUB_REFERENCE}")
    ],
    key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Print only the full value of this GGUF key.", show_default="none"),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=(1 << 31) - 1,
            metavar="N",
            help="State a bundle's GPU memory with a context of N tokens.",
            show_default="the model's",
        ),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """List what is inside a GGUF file or a bundle."""
    with reporting(as_json, False, verbose) as terminal:
        from q6k_convert.cli import contents
        from q6k_convert.cli.given import check_given
        from q6k_convert.errors import UsageError
        from q6k_convert.hub import local_path
        from q6k_convert.run.memory import bundle_memory
        from q6k_kernels.bundle import manifest
        from q6k_kernels.bundle.metadata import metadata_file
        from q6k_kernels.gguf.file import GGUFFile
        from q6k_kernels.gguf.model import GGUFModel, open_gguf

        path = local_path(source, terminal.note, terminal.progress)
        check_given(path, "bundle or GGUF file", "q6k-convert inspect")
        directory = path.is_dir()
        if key is not None:
            # metadata.gguf may come from a split model, whose other parts are not in the bundle.
            with GGUFModel([GGUFFile(metadata_file(path))]) if directory else open_gguf(path) as model:
                try:
                    terminal.value(key, contents.key_value(model, key))
                except KeyError as error:
                    remedy = "`q6k-convert inspect` without --key lists them."
                    raise UsageError(f"{path}: no key {key!r}", remedy) from error
        elif context is not None and not directory:
            raise UsageError(
                "--context is for a bundle: of a GGUF file the GPU memory depends on the options of convert",
                "`q6k-convert convert --dry-run` states it with the model's own context length.",
            )
        elif directory:
            found = manifest.read(path)
            content = contents.bundle_contents(path, found) | {"gpu": bundle_memory(path, found, context)}
            terminal.bundle(content)
            terminal.document(content)
        else:
            with open_gguf(path) as model:
                content = contents.gguf_contents(model)
            terminal.gguf(content)
            terminal.document(content)


@app.command(cls=PlainCommand, epilog=EXIT_CODES)
def verify(
    bundle: Annotated[str, typer.Argument(metavar="OUT/", help=f"Bundle to check, or {HUB_BUNDLE}")],
    source: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL.gguf",
            help="Recompute every tensor from this GGUF file, or file on the Hub as for convert, and compare.",
            show_default="none",
        ),
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Check only the structure; read no array.", show_default="off")
    ] = False,
    device: Annotated[
        Device,
        typer.Option(
            parser=parse_device,
            metavar="[auto|cpu|cuda]",
            help="Also multiply with every packed tensor: by the reference on the cpu, or the kernels on cuda; "
            "auto uses a GPU that is ready, else skips this.",
        ),
    ] = "auto",
    all_tensors: Annotated[
        bool, typer.Option("--all", help="List every tensor, not only the worst.", show_default="off")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            parser=parse_output,
            metavar="FILE.html",
            help="Write the results to an HTML page.",
            show_default="none",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, max=256, metavar="N", help="Use N threads.", show_default="processors, at most 8"),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Check a bundle: structure and checksums; weights against its source; results on a device."""
    with reporting(as_json, quiet, verbose) as terminal:
        from q6k_convert.cli.given import bundle_path, check_given
        from q6k_convert.cli.verified import verification_contents
        from q6k_convert.convert.pipeline import default_jobs
        from q6k_convert.errors import UsageError
        from q6k_convert.hub import local_path
        from q6k_convert.verify.report import html_report
        from q6k_convert.verify.stages import verify as run_verification

        directory = bundle_path(bundle, "q6k-convert verify", terminal)
        if report is not None and (
            directory.resolve() in report.resolve().parents
            or (source is not None and report.exists() and Path(source).exists() and report.samefile(source))
        ):
            raise UsageError(
                f"--report {report} lies in the bundle or is the source, which verifying must not touch",
                "Give a file elsewhere.",
            )
        compared = None
        if source is not None:
            compared = local_path(source, terminal.note, terminal.progress)
            check_given(compared, "GGUF file", f"q6k-convert verify {directory} --source")
        run = run_verification(
            directory,
            fast=fast,
            source=compared,
            device=device,
            jobs=jobs or default_jobs(),
            progress=terminal.progress,
        )
        content = verification_contents(run, peak_memory())
        if report is not None:
            report.write_text(html_report(content), encoding="utf-8")
        terminal.verification(content, all_tensors=all_tensors)
        terminal.document(content)
        if run.failed:
            raise typer.Exit(int(ExitCode.VERIFICATION_FAILED))


for command in (generate, chat, bench, perplexity, export, hf, doctor, build_ops, ci):
    app.command(cls=PlainCommand, epilog=EXIT_CODES)(command)


def main() -> None:
    """Run `q6k-convert`."""
    app(prog_name="q6k-convert")
