"""What a report shows of other recipes: how their rows divide by source, and the best of those that it has not.

Belongs here: reading the other subsets. Not here: how many rows are shared, which stands with the page's other counts.
"""

from typing import Any

import polars as pl

from less_assets.lineage.lineage import Lineage
from less_assets.method.data.conversations import full_text, stated, with_all_fields
from less_assets.reading.files import SUBSET
from less_assets.reading.subsets import other_subsets
from less_assets.store.tables import read_parquet

ROWS_OF_ONE = 200
ROWS_OF_ALL = 800
"""Rows with text of all other recipes together: what keeps a page small."""
CHARACTERS = 180


def compared(lineage: Lineage, subset: pl.DataFrame, recipe: str, task: str) -> list[dict[str, Any]]:
    """Compare a selection with what other recipes last selected for the task.

    Args:
        lineage: Reads the subsets.
        subset: The selection: columns example_id and source.
        recipe: Its recipe.
        task: The task.

    Returns:
        For each other recipe, in the order of `other_subsets`: `recipe`; `sources`, [source, rows of this one alone, of
        both, of the other alone]; `alone`, how many rows only the other has; `rows`, the best of these: [id, rank,
        score, question, answer], both texts cut.
    """
    others = other_subsets(lineage, recipe, task)
    shown = min(ROWS_OF_ONE, ROWS_OF_ALL // max(1, len(others)))
    ids = set(subset["example_id"])
    compared = []
    for name, pointer in others.items():
        theirs = with_all_fields(read_parquet(pointer.folder, SUBSET))
        alone = theirs.filter(~pl.col("example_id").is_in(list(ids))).sort("rank")
        shared = subset.filter(pl.col("example_id").is_in(theirs["example_id"].implode()))
        here = subset.filter(~pl.col("example_id").is_in(theirs["example_id"].implode()))
        counts = [dict(part["source"].value_counts().iter_rows()) for part in (here, shared, alone)]
        sources = sorted({*subset["source"], *theirs["source"]})
        compared.append(
            {
                "recipe": name,
                "sources": [[source, *(count.get(source, 0) for count in counts)] for source in sources],
                "alone": alone.height,
                "rows": [_row(row) for row in alone.head(shown).iter_rows(named=True)],
            }
        )
    return compared


def _row(row: dict[str, Any]) -> list[Any]:
    messages = [stated(turn) for turn in row["messages"]]
    question = next((message for message in messages if message["role"] == "user"), messages[0])
    score = None if row["score"] is None else float(f"{row['score']:.4g}")
    return [row["example_id"], row["rank"], score, _beginning(full_text(question)), _beginning(full_text(messages[-1]))]


def _beginning(text: str) -> str:
    return " ".join(text[: 2 * CHARACTERS].split())[:CHARACTERS]
