"""Tables of words: as plain text, Markdown or HTML, and printed."""

import re
from collections.abc import Iterable, Sequence
from html import escape

from rich import markup
from rich.console import Console
from rich.table import Table

from klrl.console import is_terminal, printable


def as_text(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """The table's lines. ``align``: < or > for each column."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{c:{a}{w}}" for c, a, w in zip(row, align, widths, strict=True)).rstrip() for row in rows]


def as_markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The table's lines in Markdown."""
    table = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(map(markdown, row)) + " |" for row in table]


def markdown(text: str) -> str:
    """The text as Markdown shows it: no HTML, no link or image, no further column or line."""
    plain = escape(" ".join(printable(text).split("\n")), quote=False)
    return re.sub(r"([\\|\[\]`])", r"\\\1", plain)


def as_html(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The table as an element that scrolls sideways."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = ["".join(f"<td>{escape(printable(cell))}</td>" for cell in row) for row in rows]
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def show(columns: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> None:
    """Print the table, as wide as the terminal or 140 columns. ``align`` as in ``as_text``."""
    table = Table(box=None, pad_edge=False)
    for name, side in zip(columns, align, strict=True):
        table.add_column(name, justify="right" if side == ">" else "left", overflow="fold")
    for row in rows:
        table.add_row(*(markup.escape(printable(cell)) for cell in row))
    console = Console(width=None if is_terminal() else 140)
    with console.capture() as text:  # rich would end the process where nobody reads
        console.print(table)
    print(text.get(), end="", flush=True)
