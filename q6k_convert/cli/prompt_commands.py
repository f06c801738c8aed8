"""Commands at the prompt beside `generate`: chat, and what measures a bundle's model: bench, perplexity."""

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
from q6k_convert.cli.options import JsonOption, QuietOption, VerboseOption
from q6k_convert.cli.reporting import reporting


def chat(
    bundle: ModelArgument,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Begin with this system message.", show_default="none")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1 << 24,
            metavar="N",
            help="Stop an answer after N tokens.",
            show_default="where the context ends",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=8,
            max=1 << 24,
            metavar="N",
            help="Allow N tokens of all messages together; this sizes the cache.",
            show_default="8192, or the model's if shorter",
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
    """Chat with a bundle's model; messages are lines of stdin, typed or piped.

    Ctrl-C stops an answer and keeps the chat; Ctrl-D or /exit ends it.

    Commands: /help, /system TEXT, /reset, /save FILE, /exit. Begin a message with // to send it with one /.

    A line that ends in a backslash goes on in the next. A turn processes only what is new.

    At a terminal what is wrong with a message is told, and the chat goes on; in a pipe it ends the command.
    """
    with reporting(as_json, quiet, verbose) as terminal:
        from q6k_convert.cli.given import bundle_path
        from q6k_convert.cli.typed import TypedMessages
        from q6k_convert.run.chat_command import ChatRequest, run
        from q6k_convert.run.sampling_request import SamplingRequest
        from q6k_convert.run.session import ModelRequest

        path = bundle_path(bundle, "q6k-convert chat", terminal)
        request = ChatRequest(
            model=ModelRequest(path, device, dtype, activations, weights, tokenizer, cache),
            system=system,
            max_new_tokens=max_new_tokens,
            context=context,
            sampling=SamplingRequest(
                temperature, top_k, top_p, min_p, repeat_penalty, repeat_last, seed, tuple(stop or ()), logprobs
            ),
        )
        terminal.document(run(request, TypedMessages(quiet=quiet), terminal))


def bench(
    bundle: ModelArgument,
    prompt: Annotated[
        list[int] | None,
        typer.Option(
            "--prompt-tokens",
            "-p",
            min=0,
            max=1 << 24,
            metavar="N",
            help="Measure a prompt of N tokens, 0: none; repeatable.",
            show_default="512",
        ),
    ] = None,
    answer: Annotated[
        list[int] | None,
        typer.Option(
            "--new-tokens",
            "-n",
            min=0,
            max=1 << 24,
            metavar="N",
            help="Measure decoding of N tokens, 0: none; repeatable.",
            show_default="128",
        ),
    ] = None,
    depth: Annotated[
        list[int] | None,
        typer.Option(
            "--depth",
            "-d",
            min=0,
            max=1 << 24,
            metavar="N",
            help="Measure after a text of N tokens, which does not count; repeatable.",
            show_default="0",
        ),
    ] = None,
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", min=1, max=1000, metavar="N", help="Repeat each test N times.")
    ] = 5,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    activations: ActivationsOption = "auto",
    weights: WeightsOption = "auto",
    cache: CacheOption = "model",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure how many tokens a second a bundle's model reads and decodes, in the tests of llama-bench.

    ppN processes a prompt of N random tokens, up to the logits; tgN decodes N tokens behind one.

    With `@ dN` both follow a text of N tokens. Each runs once before it counts, so compiling does not.

    The table, in Markdown, has the mean of the repetitions and their standard deviation.
    """
    with reporting(as_json, quiet, verbose) as terminal:
        from q6k_convert.cli.given import bundle_path
        from q6k_convert.run.bench_command import BenchRequest, run, table
        from q6k_convert.run.session import ModelRequest

        path = bundle_path(bundle, "q6k-convert bench", terminal)
        request = BenchRequest(
            model=ModelRequest(path, device, dtype, activations, weights, cache=cache),
            prompts=tuple([512] if prompt is None else prompt),
            answers=tuple([128] if answer is None else answer),
            depths=tuple(depth or [0]),
            repetitions=repetitions,
        )
        document = run(request, terminal.note, terminal.progress)
        if as_json:
            terminal.document(document)
        else:
            terminal.show(table(document))


def perplexity(
    bundle: ModelArgument,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="TEXT", help="Text in UTF-8; - is stdin.", show_default="none"),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=3,
            max=1 << 24,
            metavar="N",
            help="Cut the text into windows of N tokens.",
            show_default="512, or the model's context if shorter",
        ),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(min=1, max=1 << 24, metavar="N", help="Read only the first N windows.", show_default="all"),
    ] = None,
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
    """Compute the perplexity of a text for a bundle's model.

    Each window of the text begins with BOS, if the tokenizer has one, and every token of it is predicted.

    The error is the standard error of the mean.

    llama-perplexity counts only the second half of a window, so its figures are mostly lower.
    """
    with reporting(as_json, quiet, verbose) as terminal:
        from q6k_convert.cli.given import bundle_path
        from q6k_convert.errors import UsageError
        from q6k_convert.run.perplexity_command import PerplexityRequest, run, summed_up
        from q6k_convert.run.session import ModelRequest

        if file is None:
            raise UsageError("there is no text", "Give a file: --file TEXT.")
        path = bundle_path(bundle, "q6k-convert perplexity", terminal)
        request = PerplexityRequest(
            ModelRequest(path, device, dtype, activations, weights, tokenizer, cache), file, window, windows
        )
        document = run(request, terminal.note, terminal.progress)
        if as_json:
            terminal.document(document)
        else:
            terminal.show(summed_up(document))
