"""Options of the commands that run a model: where it runs, how tokens are drawn, what ends an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from q6k_convert.cli.options import HUB_BUNDLE, parse_device, parse_dtype
from q6k_convert.run.running import Activations, Cache, Device, Dtype, Weights

_OF_FILE = "the file's, else "

ModelArgument = Annotated[str, typer.Argument(metavar="OUT/", help=f"Bundle of the model, or {HUB_BUNDLE}")]
DeviceOption = Annotated[
    Device,
    typer.Option(
        parser=parse_device,
        metavar="[auto|cpu|cuda]",
        help="Run on this device; auto: a GPU that is ready, else the CPU.",
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        parser=parse_dtype,
        metavar="[auto|bf16|fp16|fp32]",
        help="Compute in this dtype; auto: bf16 on a GPU, fp32 on the CPU.",
    ),
]
ActivationsOption = Annotated[
    Activations,
    typer.Option(help="Multiply packed weights with int8 or 16-bit activations; auto: int8 for few rows."),
]
WeightsOption = Annotated[
    Weights,
    typer.Option(
        help="On the CPU, give each weight a byte (fast; 1.1 to 1.5 bytes with scales), or keep them packed (the "
        "reference, slow); auto: bytes if they take at most half of the free memory."
    ),
]
CacheOption = Annotated[
    Cache,
    typer.Option(
        help="Keep keys and values in the model's dtype, or in 8 bits with a scale for each head and token; int8: "
        "half the memory of 16 bits, but for layers with short windows."
    ),
]
TokenizerOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Use this Hugging Face tokenizer, not the bundle's.", show_default="none"),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=100.0,
        metavar="T",
        help="Sample at temperature T; below 1e-6 take the likeliest token.",
        show_default=f"{_OF_FILE}0",
    ),
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        min=0,
        max=1 << 24,
        metavar="N",
        help="Sample from the N likeliest tokens; 0: from all.",
        show_default=f"{_OF_FILE}0",
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        min=0.0,
        max=1.0,
        metavar="P",
        help="Sample from the likeliest tokens that have the probability P together.",
        show_default=f"{_OF_FILE}1",
    ),
]
MinPOption = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        min=0.0,
        max=1.0,
        metavar="P",
        help="Sample from tokens at least P times as likely as the likeliest.",
        show_default=f"{_OF_FILE}0",
    ),
]
RepeatPenaltyOption = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        max=100.0,
        metavar="X",
        help="Make tokens that the text has less likely: divide their logits by X, or multiply negative ones.",
        show_default=f"{_OF_FILE}1",
    ),
]
RepeatLastOption = Annotated[
    int | None,
    typer.Option(
        min=-1,
        max=1 << 24,
        metavar="N",
        help="Penalise only tokens among the last N; -1: of the whole text.",
        show_default=f"{_OF_FILE}-1",
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, max=(1 << 32) - 1, metavar="N", help="Seed the sampling with N.")]
StopOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="End the answer before this text, wherever tokens part; repeatable.",
        show_default="none",
    ),
]
LogprobsOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=100,
        metavar="N",
        help="Tell the log-probability of each token, by the plain softmax, and of the N likeliest in its place.",
        show_default="off",
    ),
]
