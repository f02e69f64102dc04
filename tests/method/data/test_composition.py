"""Guesses about what rows are made of."""

import polars as pl
import pytest

from less_assets.method.data.composition import (
    LENGTHS,
    TURNS,
    assistant_turns,
    language,
    length_class,
    turn_class,
)
from less_assets.method.data.examples import MESSAGES_TYPE

TEXTS = {
    "English": "What is the capital of the country that you are in?",
    "German": "Wie heißt der höchste Berg und wo ist das?",
    "Finnish": "Mikä on Suomen pääkaupunki ja mikä se oli?",
    "Swahili": "Mji mkuu wa Kenya ni nini kwa sasa na ya nani?",
    "Indonesian": "Apa ibu kota negara yang besar dan indah ini?",
    "Cyrillic": "Какая столица Франции?",
    "Arabic": "ما هي عاصمة فرنسا؟",
    "Bengali": "ফ্রান্সের রাজধানী কী?",
    "Telugu": "ఫ్రాన్స్ రాజధాని ఏది?",
    "Korean": "프랑스의 수도는 어디입니까?",
    "Japanese": "フランスの首都はどこですか。東京都",
    "Chinese": "法国的首都是哪里",
    "Latin script": "Zxqv Brrt",
    "no letters": "12 + 30 = 42",
    "several scripts": "abc где 首都是 αβγ",
}


def messages(*contents: str) -> list:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]


def column(rows: list) -> pl.DataFrame:
    return pl.DataFrame({"messages": pl.Series(rows, dtype=MESSAGES_TYPE)})


@pytest.mark.parametrize("name", TEXTS)
def test_language_by_script_and_short_words(name):
    found = column([messages(TEXTS[name])]).select(language(pl.col("messages"))).to_series()
    assert found.to_list() == [name]


def test_a_row_of_code_in_english_is_english():
    text = "What is the output of this?\n```python\nfor i in range(3): print(i)\n```"
    assert (
        column([messages(text, "It is the list of the numbers.")]).select(language(pl.col("messages"))).item()
        == "English"
    )


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
