"""What a tournament has chosen: for whoever selects rows by it, shows it or explains it.

Belongs here: reading the result that is stored. Not here: holding one (`steps/tournament.py`), and the rule of the
choice (`method/selection/tournament.py`).
"""

from collections.abc import Mapping

import polars as pl

from less_assets.lineage.lineage import Lineage
from less_assets.project.recipes import ResolvedRecipe
from less_assets.reading.files import CHOICE
from less_assets.store.tables import read_parquet


def selecting_recipe(lineage: Lineage, key: str, task: str) -> ResolvedRecipe:
    """The recipe by which the rows of a recipe are selected for a task: of a tournament its winner, else itself."""
    recipe = lineage.project.recipe(key)
    if recipe.tournament is None:
        return recipe
    return lineage.project.candidates(key)[str(lineage.summary("tournament_results", f"{key}|{task}")["winner"])]


def choice_table(lineage: Lineage, key: str, task: str) -> tuple[pl.DataFrame, str] | None:
    """A tournament's table for people, numbers as text, and the sentence that says why; None for other recipes."""
    if lineage.project.recipe(key).tournament is None:
        return None
    partition = f"{key}|{task}"
    summary = lineage.summary("tournament_results", partition)
    table = read_parquet(lineage.folder("tournament_results", partition), CHOICE)
    return choice_in_words(table, str(summary["judged_by"])), str(summary["why"])


def choice_in_words(choice: pl.DataFrame, judged_by: str) -> pl.DataFrame:
    """The stored table of a choice as text: candidate, mean, difference with its interval, price, verdict."""
    measure = judged_by.replace("_", " ")
    return choice.select(
        "candidate",
        pl.col("mean").map_elements("{:.3f}".format, return_dtype=pl.String).alias(f"mean {measure}"),
        pl.struct("difference", "low", "high")
        .map_elements(_interval, return_dtype=pl.String, skip_nulls=False)
        .alias("difference from random"),
        pl.col("price").map_elements("{:,}".format, return_dtype=pl.String).alias("price (tokens to select)"),
        pl.when("winner")
        .then(pl.lit("chosen"))
        .when("beats_random")
        .then(pl.lit("beats random"))
        .otherwise(pl.lit(""))
        .alias("verdict"),
    )


def _interval(row: Mapping[str, float | None]) -> str:
    difference, low, high = row["difference"], row["low"], row["high"]
    if difference is None or low is None or high is None:
        return "–"
    return f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"
