"""The command that makes a bundle to ship, step by step, for CI: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from q6k_convert.cli.options import (
    HUB_REFERENCE,
    JsonOption,
    QuietOption,
    VerboseOption,
    one_of,
    parse_device,
    parse_output,
)
from q6k_convert.cli.reporting import reporting
from q6k_convert.cli.shipping_request import STEPS, ShippingRequest
from q6k_convert.run.running import Device
from q6k_convert.run.sanity import PROMPT


def ci(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"GGUF file, or {HUB_REFERENCE}")],
    out: Annotated[
        Path,
        typer.Argument(parser=parse_output, metavar="OUT/", help="Output directory, new or of an earlier run."),
    ],
    skip: Annotated[
        list[str] | None,
        typer.Option(
            parser=one_of(STEPS, {}), metavar="STEP", help="Leave out this step; repeatable.", show_default="none"
        ),
    ] = None,
    scales: Annotated[
        Literal["bf16", "exact"], typer.Option(help="Store scales as `convert --scales` does.")
    ] = "bf16",
    other: Annotated[
        Literal["bf16", "raw", "skip", "error"],
        typer.Option(help="Treat other quantised tensors as `convert --other` does."),
    ] = "bf16",
    device: Annotated[
        Device,
        typer.Option(
            parser=parse_device, metavar="[auto|cpu|cuda]", help="Verify, answer and export on this device."
        ),
    ] = "auto",
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="Continue this text.", show_default="a well-known sentence")
    ] = PROMPT,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=1 << 24, metavar="N", help="Stop the answer after N tokens.")
    ] = 48,
    max_perplexity: Annotated[
        float, typer.Option(metavar="P", help="Fail if the perplexity of the prompt is larger.")
    ] = 100.0,
    max_repetition: Annotated[
        float, typer.Option(metavar="R", help="Fail if the share of repeated tokens, 0 to 1, is larger.")
    ] = 0.9,
    export: Annotated[
        Literal["auto", "always"], typer.Option(help="Export a program; auto: only if --device finds a GPU.")
    ] = "auto",
    capacity: Annotated[
        int | None,
        typer.Option(
            min=8,
            max=1 << 24,
            metavar="N",
            help="Give the program room for N tokens, as `export --capacity` does.",
            show_default="4096, or the model's context if shorter",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace a bundle in OUT that this command did not make.", show_default="off"),
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Make a bundle to ship from a GGUF file: convert, verify, test and describe it; for CI.

    \b
    download    fetch MODEL's files that the cache lacks
    convert     write OUT/bundle
    verify      check checksums, every tensor against MODEL, and the operations
    answer      continue a text, with perplexity and repetition in bounds
    export      write OUT/model.pt2, a program that runs without Python
    provenance  write OUT/provenance.spdx.json: files, hashes, sources and tools
    checksums   write OUT/SHA256SUMS, for `sha256sum -c`

    OUT/report.json has the results of all steps. A step that was done is
    skipped while its inputs and outputs are unchanged: a run that was cut short
    resumes, and a repeated run does nothing. An answer out of bounds is exit
    code 5, as a failed verification is.
    """  # noqa: D301, "\b" keeps the line breaks of the table, and of the lines after it
    with reporting(as_json, quiet, verbose) as terminal:
        from q6k_convert.cli.shipping import Shipping

        request = ShippingRequest(
            model=model,
            out=out,
            skip=tuple(skip or ()),
            scales=scales,
            other=other,
            device=device,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            max_perplexity=max_perplexity,
            max_repetition=max_repetition,
            export=export,
            capacity=capacity,
            force=force,
        )
        Shipping(request, terminal).run()
