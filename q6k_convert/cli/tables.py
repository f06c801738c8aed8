"""Tables for people, and cells in them: texts from files are printed, never interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from q6k_convert import text
from q6k_convert.cli.contents import TOKENIZERS_ABSENT, Row
from q6k_convert.text import displayable
from q6k_kernels.formats.types import PACKED_TYPES

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_LONGEST_TABLE = 1000
"""Rows that rich lays out; it takes about a millisecond for each, more than a listing of a whole model may."""
_LARGEST_TABLE = 1 << 18
"""Characters that rich lays out."""
_WIDEST = 100
"""Cells of a terminal up to which plain columns are aligned: one long name does not widen every line."""
_GAP = "  "


class Table:
    """Rows of cells below each other; control characters are escaped, so names from a file are only text.

    Args:
        columns: their headings; one named `…>` is aligned right, one named `…!` is never folded.
        header: whether the headings are shown.
    """

    def __init__(self, *columns: str, header: bool = True) -> None:
        self._columns, self._header = columns, header
        self._rows: list[tuple[str | Text, ...]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, *cells: str | Text) -> None:
        """Add a row."""
        self._rows.append(tuple(printable(cell) if isinstance(cell, str) else cell for cell in cells))

    def show(self, console: Console) -> None:
        """Print the table, one too long or too large for rich as plain lines in columns."""
        if len(self) <= _LONGEST_TABLE and sum(len(cell) for row in self._rows for cell in row) <= _LARGEST_TABLE:
            self._lay_out(console)
        else:
            console.out(*self._lines(), sep="\n", highlight=False)

    def _lay_out(self, console: Console) -> None:
        from rich.table import Table as RichTable

        table = RichTable(box=None, pad_edge=False, show_header=self._header, header_style="bold")
        for column in self._columns:
            justify: Literal["left", "right"] = "right" if column.endswith(">") else "left"
            table.add_column(column.rstrip(">!"), justify=justify, overflow="fold", no_wrap=column.endswith("!"))
        for row in self._rows:
            table.add_row(*row)
        console.print(table)

    def _lines(self) -> Iterator[str]:
        from rich.cells import cell_len

        heading = [tuple(column.rstrip(">!") for column in self._columns)] if self._header else []
        rows = heading + [tuple(map(str, row)) for row in self._rows]
        widths = [[min(cell_len(cell), _WIDEST) for cell in column] for column in zip(*rows, strict=True)]
        widest = list(map(max, widths))
        for row, own in zip(rows, zip(*widths, strict=True), strict=True):
            cells = []
            for column, cell, width, most in zip(self._columns, row, own, widest, strict=True):
                blanks = " " * (most - width)
                cells.append(blanks + cell if column.endswith(">") else cell + blanks)
            yield _GAP.join(cells).rstrip()


def styled(word: str, style: str) -> Text:
    """Return a word in a style of rich."""
    from rich.text import Text

    return Text(word, style)


def readable(value: Any) -> str:
    """Return a key's value in one line; of an array its type and length, of a long text its length."""
    if isinstance(value, dict) and "string" in value:
        return f"text of {text.size(value['string'])}"
    if isinstance(value, dict):
        return f"{value['count']} × {value['array']}"
    shown = value if isinstance(value, str) else repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}… ({len(shown)} characters)"


def printable(name: str) -> str:
    """Return a text with everything that does not print escaped."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in displayable(name))


STORAGE_WORDS = {
    "planar": "packed as {format}, {bits_per_weight:g} bits a weight",
    "plain": "stored unchanged",
    "dequantized": "dequantised to bf16",
    "raw": "kept as GGUF blocks",
    "skipped": "not stored",
}


def sizes(bytes_in: int, bytes_out: int) -> str:
    """Return the size of a bundle against that of its source."""
    return f"{text.size(bytes_in)} in, {text.size(bytes_out)} out ({bytes_out / bytes_in:.0%} of the source)"


def growth(plan: Row) -> tuple[str, str]:
    """Return why the bundle is larger than its source, and what to do; nothing where it is not."""
    if not plan["growing"]:
        return "", ""
    reasons = [
        f"{row['type']} ({8 * row['bytes_in'] / row['weights']:.4g} bits a weight) is "
        + ("dequantised to bf16" if row["storage"] == "dequantized" else f"packed in {row['bits_per_weight']:.4g}")
        for row in plan["growing"]
    ]
    times = f"{plan['bundle_bytes'] / plan['bytes_in']:.2f} times"
    if any(row["storage"] == "dequantized" for row in plan["growing"]):
        remedy = f"Download a file of types that stay packed instead: {', '.join(sorted(PACKED_TYPES))}."
    elif plan["options"]["scales"] != "exact":
        remedy = "With --scales exact it is smaller."
    else:
        remedy = ""
    return f"the bundle takes {times} the size of the source: {'; '.join(reasons)}", remedy


def runnable(model: Row) -> str:
    """Return whether the whole model can run."""
    if model["problem"]:
        return f"no, only single tensors from Python: {model['problem']}"
    if model["tokenizer_problem"] == TOKENIZERS_ABSENT:
        return f"yes; whether with its own tokenizer is {TOKENIZERS_ABSENT}"
    if model["tokenizer_problem"]:
        return f"yes, with a tokenizer that you give (--tokenizer DIR): {model['tokenizer_problem']}"
    return "yes, with its own tokenizer"


def memory(gpu: Row) -> str:
    """Return the GPU memory of weights, and of keys and values at a context length."""
    weights, cache = gpu["weights_bytes"], gpu["cache_bytes"]
    beside = gpu["tensors_beside"]
    without = (
        f"; without {text.plural(beside, 'tensor')} of encoders or for predicting several tokens" if beside else ""
    )
    if cache is None:
        known = f"{text.size(weights)} of weights{without}"
        return f"{known}; that of keys and values is not known: {gpu['cache_problem']}"
    return (
        f"{text.size(weights)} of weights and {text.size(cache)} of keys and values for a context of "
        f"{gpu['context']:,} tokens, {text.size(weights + cache)} together{without}"
    )


def compared(row: Row) -> str:
    """Return how the tensors of a type compare with the source."""
    source = row["source"]
    stored = f" as {row['format']}" if row["format"] else ""
    error = "exact" if source["exact"] else f"SNR {decibel(source) or '–'} dB"
    return f"{row['type']}{stored}, {text.plural(row['tensors'], 'tensor')}: {error}"


def decibel(source: Row) -> str:
    """Return the signal-to-noise ratio of a comparison in dB; nothing if it is not defined."""
    return "" if source.get("snr_db") is None else f"{source['snr_db']:.1f}"
