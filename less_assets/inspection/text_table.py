"""Tables for a terminal, or for a file or program that the output is piped into.

Belongs here: putting cells side by side. Not here: what they say.
"""

import io
from collections.abc import Collection, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

UNLIMITED_WIDTH = 1_000_000


def text_table(
    rows: Sequence[Sequence[str]],
    headings: Sequence[str] = (),
    *,
    right_aligned: Collection[int] = (),
    indent: int = 0,
) -> str:
    """Lines of plain text, columns as wide as their widest cell: no colours, nothing cut or wrapped at any width.

    Args:
        rows: One string a cell, all rows of the same length.
        headings: Of the columns; without them there is no heading line.
        right_aligned: Numbers of the columns, from 0, whose cells end below each other.
        indent: Spaces before each line.

    Returns:
        No line break at the end; empty without rows and headings.
    """
    table = Table(box=None, show_header=bool(headings), pad_edge=False, padding=(0, 2, 0, 0))
    for column in range(len(headings or next(iter(rows), ()))):
        heading = Text(headings[column]) if headings else ""
        table.add_column(heading, justify="right" if column in right_aligned else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))  # as Text: brackets in a cell are no markup
    output = io.StringIO()
    Console(file=output, width=UNLIMITED_WIDTH, color_system=None, legacy_windows=False).print(table)
    return "\n".join(" " * indent + line.rstrip() for line in output.getvalue().splitlines() if line.strip())
