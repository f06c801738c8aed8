"""The command hf."""

from __future__ import annotations

from typing import Annotated

import typer

from q6k_convert.cli.options import JsonOption, QuietOption, VerboseOption
from q6k_convert.cli.reporting import reporting
from q6k_convert.run.running import Weights


def hf(
    bundle: Annotated[str, typer.Argument(metavar="OUT/", help="Bundle of the model.")],
    weights: Annotated[
        Weights,
        typer.Option(help="Let transformers keep weights so on a CPU; auto: a byte each, fast, if memory allows."),
    ] = "packed",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write the files that transformers wants into a bundle: configuration, tokenizer, template, model card."""
    with reporting(as_json, quiet, verbose) as terminal:
        from q6k_convert.cli.given import local_bundle
        from q6k_convert.run.publishing import run

        terminal.document(run(local_bundle(bundle, "q6k-convert hf"), weights, terminal.note))
