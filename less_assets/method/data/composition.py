"""What a set of rows is made of: classes of length and of the number of turns.

Belongs here: small expressions over tables of messages, for comparison of a subset with its pool. Not here: drawing
(`report/`).
"""

import polars as pl

LENGTH_BOUNDS = (16, 32, 64, 128, 256, 512, 1024)
"""Upper bounds of the classes of length, in tokens with loss."""

LENGTHS = tuple(
    f"{low + 1}–{high}" if high else f"over {low}"
    for low, high in zip((0, *LENGTH_BOUNDS), (*LENGTH_BOUNDS, None), strict=True)
)
"""Names of the classes of length, shortest first."""

TURNS = ("1", "2", "3–4", "5–8", "over 8")
"""Names of the classes of the number of the assistant's turns, fewest first."""


def length_class(tokens: pl.Expr) -> pl.Expr:
    """Name of the class of length of a number of loss tokens; null stays null."""
    return tokens.cut(LENGTH_BOUNDS, labels=LENGTHS).cast(pl.String)


def turn_class(turns: pl.Expr) -> pl.Expr:
    """Name of the class of a number of assistant turns."""
    return turns.cut((1, 2, 4, 8), labels=TURNS).cast(pl.String)


def assistant_turns(messages: pl.Expr) -> pl.Expr:
    """Number of the assistant's turns, UInt32."""
    return messages.list.eval(pl.element().struct.field("role") == "assistant").list.sum()
