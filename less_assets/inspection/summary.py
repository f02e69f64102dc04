"""What `less-assets run` says at its end: results, what was selected, where it lies, how to look at it.

Belongs here: words for a terminal. The leaderboard's tables are made by `method/leaderboard.py`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import polars as pl

from less_assets.errors import MissingArtifactError, StaleArtifactError
from less_assets.inspection.pool_counts import counts_in_words, pool_counts, prefilter_in_words
from less_assets.inspection.text_table import text_table
from less_assets.lineage.lineage import Lineage
from less_assets.project.project import Project
from less_assets.reading.files import BOARD, REPORT, SUBSET
from less_assets.reading.subsets import recall_in_words
from less_assets.reading.tournaments import choice_table
from less_assets.steps.registry import open_lineage
from less_assets.store.artifacts import ArtifactStore
from less_assets.store.tables import read_parquet

if TYPE_CHECKING:
    from less_assets.running.runner import Warned


def results(project: Project, store: ArtifactStore, tasks: Sequence[str] = ()) -> str:
    """The leaderboard, the share of each source among the selected rows, and where everything is.

    Parts whose artifacts are not up to date are left out.

    Args:
        project: The project file.
        store: Its artifacts.
        tasks: Tables of these tasks instead of the leaderboard; empty for the leaderboard.
    """
    lineage = open_lineage(project, store)
    counts = pool_counts(lineage)
    parts = [counts_in_words(counts)] if counts else []
    parts += [_excluded(lineage), prefilter_in_words(lineage), _recalls(lineage, tasks or project.task_names)]
    try:
        boards = [lineage.folder("task_results", task) for task in tasks] or [lineage.folder("leaderboard")]
        parts += [_leaderboard(read_parquet(board, BOARD)) for board in boards]
        parts += [_shares(lineage, task) for task in tasks or project.task_names]
        parts.append(_choices(lineage, tasks or project.task_names))
    except (MissingArtifactError, StaleArtifactError):
        parts.append("(Tables of results are made by a run without --until and --recipe.)")
    if pages := _pages(lineage):
        parts.append("Reports, one page each; open them in a browser\n" + pages)
    parts.append(
        f"artifacts   {store.root}\n"
        f"subsets     {store.root}/selection/TASK/recipes/RECIPE/…/subset.jsonl\n"
        "look at it  less-assets dev   (Dagster on http://127.0.0.1:3000, e.g. /assets/leaderboard)"
    )
    return "\n\n".join(part for part in parts if part)


def _excluded(lineage: Lineage) -> str:
    """How many rows the files of `exclude` leave out."""
    if not lineage.project.exclude or lineage.status("excluded_rows").state != "fresh":
        return ""
    listed = lineage.summary("excluded_rows")
    unknown = f"; {listed['unknown']:,} ids that the pool does not have" if listed["unknown"] else ""
    return f"Left out by `exclude`: {listed['excluded']:,} rows{unknown}"


def _recalls(lineage: Lineage, tasks: Sequence[str]) -> str:
    """What the prefilter has left of each selection of which that is estimated."""
    if lineage.project.prefilter is None:
        return ""
    keys = [f"{recipe}|{task}" for task in tasks for recipe in lineage.project.recipe_keys]
    fresh = [key for key in keys if lineage.status("selected_subset", key).state == "fresh"]
    said = {key.replace("|", " for "): recall_in_words(lineage, key) for key in fresh}
    return text_table([(name, words) for name, words in said.items() if words])


def _pages(lineage: Lineage) -> str:
    """Path of every selection report that is up to date."""
    pages = []
    reported = lineage.declarations["selection_report"].recipes(lineage.project)
    for key, task in ((key, task) for task in lineage.project.task_names for key in reported):
        if lineage.status("selection_report", f"{key}|{task}").state == "fresh":
            page = lineage.folder("selection_report", f"{key}|{task}").path(REPORT)
            pages.append((f"{key} for {task}", str(page)))
    return text_table(pages)


def warnings(warned: Sequence["Warned"]) -> str:
    """What checks found in what a run has made, one line each; empty if nothing."""
    rows = [(check.asset, check.partition, check.check, check.said) for check in warned]
    return f"\nWorth a look\n{text_table(rows)}\n" if rows else ""


def _leaderboard(board: pl.DataFrame) -> str:
    from less_assets.method.evaluation.leaderboard import (
        COSTS_HEADING,
        HEADINGS,
        OTHER_FORM_NOTE,
        costs,
        differences,
        recipes_by_tasks,
        with_named_numbers,
    )

    board = with_named_numbers(board)
    if board.is_empty():
        return "No task has an evaluation."
    parts = [
        *((heading, recipes_by_tasks(board, what)) for what, heading in HEADINGS.items()),
        ("Difference from random, on the same samples", differences(board, "random")),
        (COSTS_HEADING, costs(board)),
    ]
    note = (
        "[95 % bootstrap interval over samples]  ± standard deviation over seeds  "
        "* better than random: the interval of the paired difference excludes 0"
    )
    note += "" if board["decides"].all() else f"  {OTHER_FORM_NOTE}"
    return "\n\n".join([*(f"{heading}\n{_table(table)}" for heading, table in parts if table.height), note])


def _shares(lineage: Lineage, task: str) -> str:
    """Share of each source in the pool and among the rows that each recipe selected for a task."""
    pool: dict[str, int] = dict(lineage.summary("pool_index")["sources"])
    columns: dict[str, dict[str, int]] = {"pool": pool}
    for key, recipe in lineage.project.recipe_keys.items():
        if recipe.traits.has_budget and recipe.seed in (None, 0):
            subset = read_parquet(lineage.folder("selected_subset", f"{key}|{task}"), SUBSET, ["source"])
            columns[key] = dict(subset["source"].value_counts().iter_rows())
    table = pl.DataFrame({"source": list(pool)}).with_columns(
        pl.Series(name, [f"{100 * counts.get(source, 0) / max(1, sum(counts.values())):.1f} %" for source in pool])
        for name, counts in columns.items()
    )
    return f"Share of each source among the rows selected for {task}\n{_table(table)}"


def _choices(lineage: Lineage, tasks: Sequence[str]) -> str:
    """What tournaments have chosen, and why."""
    held = [key for key, recipe in lineage.project.recipe_keys.items() if recipe.tournament]
    choices = [(f"{key} for {task}", choice_table(lineage, key, task)) for key in held for task in tasks]
    rows = [(name, choice[1]) for name, choice in choices if choice]
    return f"Tournaments\n{text_table(rows)}" if rows else ""


def _table(frame: pl.DataFrame) -> str:
    return text_table(frame.cast(pl.String).fill_null("").rows(), frame.columns)
