"""Options and help texts that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

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
