"""What a set of rows is made of: length, turns, and the language it is written in.

Belongs here: small, fast, documented guesses over tables of messages, for comparison of a subset with its pool. Not
here: drawing (`report/`).
"""

import re
from typing import Any

import polars as pl

SCRIPTS = {
    "Cyrillic": r"\p{Cyrillic}",
    "Greek": r"\p{Greek}",
    "Arabic": r"\p{Arabic}",
    "Hebrew": r"\p{Hebrew}",
    "Devanagari": r"\p{Devanagari}",
    "Bengali": r"\p{Bengali}",
    "Tamil": r"\p{Tamil}",
    "Telugu": r"\p{Telugu}",
    "Thai": r"\p{Thai}",
    "Korean": r"\p{Hangul}",
    "Japanese": r"[\p{Hiragana}\p{Katakana}]",
    "Chinese": r"\p{Han}",
}
"""Scripts other than Latin, by the name that is shown, and a pattern for one of their characters."""

# Frequent short words that the other languages of the list do not have, or rarely.
FUNCTION_WORDS = {
    "English": ["the", "and", "is", "of", "to", "what", "you", "this", "that", "are", "with", "how"],
    "German": ["der", "und", "das", "nicht", "ist", "ein", "eine", "wie"],
    "French": ["les", "est", "une", "dans", "pour", "qui", "pas", "des"],
    "Spanish": ["los", "las", "una", "por", "para", "el", "y", "qué"],
    "Portuguese": ["não", "uma", "os", "com", "você", "são", "em", "do"],
    "Italian": ["il", "che", "di", "gli", "sono", "della", "è", "per"],
    "Dutch": ["het", "een", "van", "niet", "zijn", "voor", "met", "ik"],
    "Finnish": ["ja", "on", "ei", "että", "oli", "mikä", "hän", "kuin"],
    "Indonesian": ["yang", "dan", "ini", "itu", "dengan", "untuk", "adalah", "apa"],
    "Swahili": ["na", "ya", "wa", "kwa", "katika", "ni", "nini", "za"],
}
"""Languages in Latin script, and words that give them away."""

LEAST_WORDS = 2
"""So many of them decide; one may be chance."""

LANGUAGE_CHARACTERS = 2000
"""The guess looks at the first so many characters of a row."""

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


def language(messages: pl.Expr) -> pl.Expr:
    """A guess at the language: the script of most letters, and in Latin script the language of most short words.

    Otherwise "no letters", "Latin script" (too little to tell) or "several scripts". It counts characters and looks up
    a few words: that tells a Finnish pool from an English one, and is no language model.
    """
    text = (
        messages.list.eval(pl.element().struct.field("content"))
        .list.join("\n")
        .str.slice(0, LANGUAGE_CHARACTERS)
        .str.to_lowercase()
    )
    letters = text.str.count_matches(r"\p{L}")
    counts = {name: text.str.count_matches(pattern) for name, pattern in SCRIPTS.items()}
    # Japanese mixes Han characters with its own; a fifth of kana decides for it.
    japanese = pl.col("Japanese") * 4 >= pl.col("Chinese")
    words = {name: text.str.count_matches(_any_word(own)) for name, own in FUNCTION_WORDS.items()}
    return pl.struct(
        letters.alias("letters"),
        *(count.alias(name) for name, count in counts.items()),
        text.str.count_matches(r"\p{Latin}").alias("Latin"),
        *(count.alias(f"in {name}") for name, count in words.items()),
    ).map_batches(lambda found: found.struct.unnest().select(_decide(japanese)).to_series(), return_dtype=pl.String)


def _any_word(words: list[str]) -> str:
    return rf"\b(?:{'|'.join(map(re.escape, words))})\b"


def _decide(japanese: pl.Expr) -> pl.Expr:
    """One label from the counts of one row's characters and words."""
    east = pl.col("Japanese") + pl.col("Chinese")
    decided: Any = pl.when(pl.col("letters") == 0).then(pl.lit("no letters"))
    for name in SCRIPTS:
        if name not in ("Japanese", "Chinese"):
            decided = decided.when(pl.col(name) * 2 > pl.col("letters")).then(pl.lit(name))
    decided = decided.when((east * 2 > pl.col("letters")) & japanese).then(pl.lit("Japanese"))
    decided = decided.when(east * 2 > pl.col("letters")).then(pl.lit("Chinese"))
    best = pl.max_horizontal(*(f"in {name}" for name in FUNCTION_WORDS))
    latin = pl.col("Latin") * 2 > pl.col("letters")
    for name in FUNCTION_WORDS:
        decided = decided.when(latin & (best >= LEAST_WORDS) & (pl.col(f"in {name}") == best)).then(pl.lit(name))
    return decided.when(latin).then(pl.lit("Latin script")).otherwise(pl.lit("several scripts")).alias("language")
