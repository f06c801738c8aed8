"""Options and help texts that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, get_args

import typer

from q6k_convert.run import places
from q6k_convert.run.running import Device, Dtype

EXIT_CODES = """\
Exit codes: 0 done; 1 a bug; 2 usage; 3 input rejected; 4 I/O or output conflict; 5 verification failed;
6 environment (a compiled piece, a package or a GPU is missing); 130 interrupted."""
HUB_REFERENCE = (
    "a file on the Hugging Face Hub: ORG/REPO:QUANTISATION or ORG/REPO/FILE.gguf; write ORG/REPO@REVISION for "
    "another revision than main."
)
HUB_BUNDLE = "one on the Hugging Face Hub: ORG/REPO or ORG/REPO@REVISION."

JsonOption = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON document on stdout, everything else on stderr.", show_default="off"
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.", show_default="off")]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show the traceback of an error.", show_default="off")
]

_DTYPES = {
    "bfloat16": "bf16",
    **dict.fromkeys(("float16", "f16", "half"), "fp16"),
    **dict.fromkeys(("float32", "f32", "float"), "fp32"),
}
"""Other names of dtypes -> ours."""


def one_of(choices: tuple[str, ...], others: dict[str, str]) -> Callable[[str], str]:
    """Return a parser of an option's value: one of the choices, or another name of one, in any case."""

    def parse(value: str) -> str:
        word = value.lower()
        word = others.get(word, word)
        if (numbered := re.fullmatch(r"(?:cuda|gpu):(\d{1,3})", word)) and "cuda" in choices:
            raise typer.BadParameter(
                f"{value!r}: the environment chooses the GPU: put CUDA_VISIBLE_DEVICES={numbered[1]} before the "
                "command, and give --device cuda."
            )
        if word not in choices:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(map(repr, choices))}.")
        return word

    return parse


def parse_output(value: str) -> Path:
    """Return the path of a file or directory that a command writes; - is refused."""
    try:
        return places.output(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def parse_output_or_stdout(value: str) -> Path:
    """Return the path of a file that a command writes, or `places.STDOUT`."""
    return places.output(value, stdout=True)


parse_device = one_of(get_args(Device), {"gpu": "cuda", "cuda:0": "cuda"})
parse_dtype = one_of(get_args(Dtype), _DTYPES)
