"""Commands that run models or prepare the machine for that: generate, export, doctor, build-ops."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from q6k_convert.cli.model_options import (
    ActivationsOption,
    CacheOption,
    DeviceOption,
    DtypeOption,
    LogprobsOption,
    MinPOption,
    ModelArgument,
    RepeatLastOption,
    RepeatPenaltyOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    TokenizerOption,
    TopKOption,
    TopPOption,
    WeightsOption,
)
from q6k_convert.cli.options import (
    JsonOption,
    QuietOption,
    VerboseOption,
    parse_output,
    parse_output_or_stdout,
)
from q6k_convert.cli.reporting import reporting
from q6k_convert.errors import ExitCode


def generate(
    bundle: ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Continue this text, or answer it with --chat; - reads stdin.",
            show_default="none",
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Send the prompt as a user's message, in the model's chat template.", show_default="off"
        ),
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Put this system message before the prompt; needs --chat.", show_default="none"
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=1 << 24, metavar="N", help="Stop after N tokens.")
    ] = 128,
    context: Annotated[
        int | None,
        typer.Option(
            min=8,
            max=1 << 24,
            metavar="N",
            help="Make the cache for N tokens of prompt and answer together.",
            show_default="as many as there can be",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help='Answer the prompts of a file, several at once: a line like {"prompt": "Once"} each; - is stdin.',
            show_default="none",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=parse_output_or_stdout,
            metavar="FILE.jsonl",
            help="Write the answers to --prompts to this file, in their order; it is FILE.jsonl.part until whole. "
            "- is stdout, which keeps nothing for a later run.",
            show_default="none",
        ),
    ] = None,
    texts: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=32,
            metavar="N",
            help="Answer N of --prompts at once.",
            show_default="32 on a GPU if they fit, 8 on the CPU",
        ),
    ] = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repeat_penalty: RepeatPenaltyOption = None,
    repeat_last: RepeatLastOption = None,
    seed: SeedOption = 0,
    stop: StopOption = None,
    logprobs: LogprobsOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    activations: ActivationsOption = "auto",
    weights: WeightsOption = "auto",
    cache: CacheOption = "model",
    tokenizer: TokenizerOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Continue a text with a bundle's model, or answer it with --chat; or answer a file of prompts.

    A line of --prompts has `prompt`, or `messages` as of a chat; it may have an `id`, and in place of options
    settings of its own: max_new_tokens, temperature, top_k, top_p, min_p, repeat_penalty, repeat_last, seed, stop.

    The file is checked before the first answer. The seed grows by one from line to line.

    A line of --out has `text`, `token_ids` and `stop_reason`, or `error`: then the exit code is 3.

    A run that was stopped goes on where it was: give the same command again. It also tries lines again that failed.
    """
    with reporting(as_json, quiet, verbose) as terminal:
        from q6k_convert.cli.given import bundle_path
        from q6k_convert.errors import UsageError
        from q6k_convert.run import generate_command, prompts_command
        from q6k_convert.run.places import STDOUT
        from q6k_convert.run.sampling_request import SamplingRequest
        from q6k_convert.run.session import ModelRequest

        if (prompts is None) != (out is None) or (prompts is None and texts is not None):
            raise UsageError("--prompts, --out and --texts belong together", "Give --prompts and --out.")
        if prompts is not None and prompt is not None:
            raise UsageError("--prompt and --prompts are both given", "Give one of them.")
        if out == STDOUT and as_json:
            raise UsageError("--out - and --json both write to standard output", "Give one of them.")
        path = bundle_path(bundle, "q6k-convert generate", terminal)
        model = ModelRequest(path, device, dtype, activations, weights, tokenizer, cache)
        sampling = SamplingRequest(
            temperature, top_k, top_p, min_p, repeat_penalty, repeat_last, seed, tuple(stop or ()), logprobs
        )
        if prompts is None or out is None:
            request = generate_command.GenerateRequest(
                model, prompt, chat, system, max_new_tokens, context, sampling
            )
            document = generate_command.run(request, terminal.stream, terminal.note, terminal.progress)
        else:
            several = prompts_command.PromptsRequest(
                model, prompts, out, texts, chat, system, max_new_tokens, context, sampling
            )
            document = prompts_command.run(several, terminal.show, terminal.note, terminal.progress)
        terminal.document(document)
        if document["status"] != "done":
            raise typer.Exit(int(ExitCode.INPUT_REJECTED))


def export(
    bundle: Annotated[str, typer.Argument(metavar="OUT/", help="Bundle of the model.")],
    target: Annotated[
        Path, typer.Argument(parser=parse_output, metavar="MODEL.pt2", help="Program file to write.")
    ],
    capacity: Annotated[
        int | None,
        typer.Option(
            min=8,
            max=1 << 24,
            metavar="N",
            help="Allow N tokens of prompt and answer together.",
            show_default="4096, or the model's context if shorter",
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    activations: ActivationsOption = "auto",
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace an existing file once the new one is checked.", show_default="off"),
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compile a bundle's model into one file that runs without Python."""
    with reporting(as_json, quiet, verbose) as terminal:
        from q6k_convert.cli.given import bundle_path
        from q6k_convert.run.export_command import ExportRequest, run

        path = bundle_path(bundle, "q6k-convert export", terminal)
        request = ExportRequest(path, target, capacity, device, dtype, activations, force)
        report = run(request, terminal.note, terminal.progress)
        if as_json:
            terminal.document(report)
        else:
            terminal.value("program", report["program"])


def doctor(as_json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """Check torch, driver, GPUs, compiler and cache, and test the kernels on every GPU."""
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
        typer.Option(
            parser=parse_output,
            metavar="DIR",
            help="Write the library to this directory.",
            show_default="ops in the kernel cache",
        ),
    ] = None,
    arch: Annotated[
        list[int] | None,
        typer.Option(
            metavar="XY",
            help="Compile kernels for this compute capability, 90 for 9.0; repeatable.",
            show_default="80, 86, 89, 90, 100, 120",
        ),
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Compile kernels for this weight type, as q4_k; repeatable.", show_default="all"
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, max=256, metavar="N", help="Run N compilers at a time.", show_default="processors"),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Build the operations as a C++ library, for C++ programs and faster calls; needs CMake and a C++ compiler."""
    with reporting(as_json, quiet, verbose) as terminal:
        from q6k_convert.machine.build_ops import build

        report = build(out, arch or [], jobs, terminal.note, formats=format or [])
        if as_json:
            terminal.document(report)
        else:
            terminal.value("library", report["library"])
