"""Tables: whole in a pipe, a line a row; as wide as a terminal is, with what is longer on further lines."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import click

from tinychat.base import terminal

NARROWEST = 40
SHORT = 12  # cells up to this wide are never folded


def show(rows: Iterable[Sequence[str]], header: Sequence[str] = (), dim: Iterable[int] = ()) -> None:
    """Print rows of cells to stdout. dim: numbers of rows that are shown less bright."""
    lines = [[" ".join(str(cell).splitlines()) for cell in row] for row in rows]
    if not lines:
        return
    if sys.stdout.isatty():
        _on_terminal(lines, header, set(dim))
        return
    from rich.cells import cell_len

    lines = [list(header), *lines] if header else lines
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for row in lines:
        cells = (cell + " " * (w - cell_len(cell)) for cell, w in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip(" "))


def _on_terminal(rows: list[list[str]], header: Sequence[str], faint: set[int]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=bool(header), padding=(0, 2, 0, 0))
    for i, cells in enumerate(zip(*rows, strict=True)):
        no_wrap = max(map(len, cells)) <= SHORT
        table.add_column(header[i] if header else "", overflow="fold", no_wrap=no_wrap)
    for i, row in enumerate(rows):
        table.add_row(*map(terminal.clean, row), style="dim" if i in faint else None)
    console = terminal.console()
    console.width = max(NARROWEST, console.width)
    console.print(table)
