"""Tables for people, and cells in them: texts from files are printed, never interpreted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from q6k_convert import text
from q6k_convert.cli.contents import Row
from q6k_convert.text import displayable

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def make_table(*columns: str, header: bool = True) -> Table:
    """Make a table; a column named `…>` is aligned right, one named `…!` is never folded."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=header, header_style="bold")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.endswith(">") else "left"
        table.add_column(column.rstrip(">!"), justify=justify, overflow="fold", no_wrap=column.endswith("!"))
    return table


def styled(word: str, style: str) -> Text:
    """Return a word in a style of rich."""
    from rich.text import Text

    return Text(word, style)


def add_row(table: Table, *cells: str | Text) -> None:
    """Add a row; control characters are escaped, so names from a file cannot steer the terminal."""
    table.add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in cells))


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
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in displayable(name))


def compared(row: Row) -> str:
    """Return how the tensors of a type compare with the source."""
    source = row["source"]
    stored = f" as {row['format']}" if row["format"] else ""
    error = "exact" if source["exact"] else f"SNR {decibel(source) or '–'} dB"
    return f"{row['type']}{stored}, {text.plural(row['tensors'], 'tensor')}: {error}"


def decibel(source: Row) -> str:
    """Return the signal-to-noise ratio of a comparison in dB; nothing if it is not defined."""
    return "" if source.get("snr_db") is None else f"{source['snr_db']:.1f}"
