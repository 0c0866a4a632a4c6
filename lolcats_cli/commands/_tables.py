"""Tables on stdout: plain text in columns, as wide as it takes."""

from __future__ import annotations

import io
from collections.abc import Sequence

from lolcats_cli.progress import printable


def table(rows: Sequence[Sequence[str]], numbers: bool = True, indent: str = "") -> str:
    """Lines of a table; the first row is the header.

    numbers: the cells of all columns but the first are numbers, set to the right.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    for column in range(len(rows[0])):
        grid.add_column(justify="right" if numbers and column else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*(Text(printable(cell)) for cell in row))
    out = io.StringIO()
    width = sum(max(len(printable(row[column])) for row in rows) + 2 for column in range(len(rows[0])))
    Console(file=out, width=2 * width, color_system=None, legacy_windows=False).print(grid)
    return "\n".join(indent + line.rstrip() for line in out.getvalue().splitlines())
