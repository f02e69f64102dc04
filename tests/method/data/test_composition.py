"""What rows are made of."""

import polars as pl

from less_assets.method.data.composition import (
    LENGTHS,
    TURNS,
    assistant_turns,
    length_class,
    turn_class,
)
from less_assets.method.data.conversations import MESSAGES_TYPE


def messages(*contents: str) -> list:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]


def column(rows: list) -> pl.DataFrame:
    return pl.DataFrame({"messages": pl.Series(rows, dtype=MESSAGES_TYPE)})


def test_turns_and_lengths_fall_into_named_classes():
    frame = column([messages(*["a"] * turns) for turns in (2, 4, 6, 16, 40)])
    counted = frame.select(assistant_turns(pl.col("messages")).alias("turns"))
    assert counted["turns"].to_list() == [1, 2, 3, 8, 20]
    assert counted.select(turn_class(pl.col("turns"))).to_series().to_list() == ["1", "2", "3–4", "5–8", "over 8"]
    tokens = pl.DataFrame({"n": [1, 16, 17, 1024, 1025, None]})
    classes = tokens.select(length_class(pl.col("n"))).to_series().to_list()
    assert classes == ["1–16", "1–16", "17–32", "513–1024", "over 1024", None]
    assert set(classes[:-1]) <= set(LENGTHS)
    assert len(TURNS) == 5
