"""Tables of the selection study, from the loss of every question: differences from random with their intervals.

Belongs here: arithmetic on stored losses. Making them is `selection_quality.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import t as student_t

from less_assets.method.evaluation.leaderboard import markdown_table

KEY = ("task", "recipe", "budget", "draw", "training_seed")
LOSSES = pl.Schema(
    {
        "task": pl.String,
        "recipe": pl.String,
        "budget": pl.Float64,  # share of the pool; null: the base model
        "draw": pl.Int64,  # seed of a random draw; null: the recipe draws nothing
        "training_seed": pl.Int64,  # null: the base model
        "number": pl.String,  # validation_loss or answer_loss
        "subtask": pl.String,
        "example_id": pl.String,
        "loss": pl.Float32,  # nats per loss token
    }
)
NUMBERS = {"validation_loss": "Validation loss", "answer_loss": "Answer loss"}


@dataclass(frozen=True)
class Difference:
    """A recipe's mean loss minus random's, with its 95 % interval, and what single trainings did.

    Attributes:
        mean: Over questions, training seeds and draws.
        low: Lower end of the interval.
        high: Upper end.
        worst: Highest mean loss of one training of the recipe.
        random_best: Lowest mean loss of one training of random rows.
        seeds: Training seeds of the recipe.
    """

    mean: float
    low: float
    high: float
    worst: float
    random_best: float
    seeds: int


def difference(recipe: np.ndarray, random: np.ndarray, draws: Sequence[int]) -> Difference:
    """Compare losses of the same questions; the interval covers the luck of questions, trainings and draws.

    The variance of the mean difference is the sum of three: that of the paired differences over questions, that of the
    recipe's trainings, and that of random's draws (each the mean of its trainings), every one over its number. Few
    trainings make the last two uncertain: Student's t with Welch and Satterthwaite's degrees of freedom (Welch 1947)
    widens the interval for it. What has one value only adds nothing, and the interval is then too narrow.

    Args:
        recipe: Losses float (trainings, questions).
        random: Losses float (n, questions): of n trainings on random rows.
        draws: Seed of the draw of each of the n.
    """
    by_draw = np.array([random[np.asarray(draws) == draw].mean(axis=0) for draw in sorted(set(draws))])
    samples = [recipe.mean(axis=0) - by_draw.mean(axis=0), recipe.mean(axis=1), by_draw.mean(axis=1)]
    parts = [(values.var(ddof=1) / len(values), len(values) - 1) for values in samples if len(values) > 1]
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts) if variance else 1.0
    mean = float(samples[0].mean())
    reach = float(student_t.ppf(0.975, freedom) * np.sqrt(variance))
    worst, random_best = float(samples[1].max()), float(random.mean(axis=1).min())
    return Difference(mean, mean - reach, mean + reach, worst, random_best, len(recipe))


def compared(losses: pl.DataFrame) -> list[dict[str, Any]]:
    """Every recipe against random of the same budget: one entry for each task, number, budget and recipe.

    Of an unfinished study only the training seeds count that both sides have: what a seed does to all models would else
    look like a difference of the recipes.

    Args:
        losses: Table of `LOSSES`.
    """
    found = []
    trained = losses.filter(pl.col("budget").is_not_null())
    for (task, number, budget), part in trained.group_by("task", "number", "budget", maintain_order=True):
        by_recipe = {name: _by_training(table) for (name,), table in part.group_by("recipe", maintain_order=True)}
        if "random" not in by_recipe:
            continue
        of_random, random = by_recipe.pop("random")
        for recipe, (of_recipe, trainings) in by_recipe.items():
            paired = of_random["training_seed"].is_in(of_recipe["training_seed"].implode())
            judged = of_recipe["training_seed"].is_in(of_random["training_seed"].implode())
            if judged.any():
                draws = of_random["draw"].filter(paired).to_list()
                result = difference(trainings[judged.to_numpy()], random[paired.to_numpy()], draws)
                found.append({"task": task, "number": number, "budget": budget, "recipe": recipe, "found": result})
    return found


def _by_training(losses: pl.DataFrame) -> tuple[pl.DataFrame, np.ndarray]:
    """Draw and seed of each of a recipe's trainings, and its losses: a line for each, questions by their ids."""
    wide = losses.pivot("example_id", index=["draw", "training_seed"], values="loss", aggregate_function="mean")
    questions = sorted(losses["example_id"].unique())
    return wide.select("draw", "training_seed"), wide.select(questions).to_numpy().astype(np.float64)


def tables(losses: pl.DataFrame) -> str:
    """The study as Markdown: for each budget and each number a table, recipes by their mean over the tasks."""
    entries = compared(losses)
    tasks = losses["task"].unique(maintain_order=True).to_list()
    parts = ["<!-- written by benchmarks/selection_quality.py -->"]
    for budget in sorted({entry["budget"] for entry in entries}):
        for number, name in NUMBERS.items():
            chosen = [entry for entry in entries if entry["budget"] == budget and entry["number"] == number]
            parts.append(
                f"**{name} minus random's, {100 * budget:g} % of the pool** (nats a token; lower is better; in "
                "brackets the 95 % interval over questions, training seeds and draws)\n\n"
                f"{markdown_table(_table(chosen, tasks))}"
            )
    parts.append(
        "\\*: the interval is below 0, †: above 0. !: the worst training of the recipe is still better than the best "
        "of random rows. A number in parentheses: training seeds, where fewer than three are finished."
    )
    return "\n\n".join(parts) + "\n"


def _table(entries: list[dict[str, Any]], tasks: list[str]) -> pl.DataFrame:
    lines: dict[str, dict[str, Difference]] = {}
    for entry in entries:
        lines.setdefault(entry["recipe"], {})[entry["task"]] = entry["found"]
    means = {recipe: float(np.mean([found.mean for found in row.values()])) for recipe, row in lines.items()}
    complete = {recipe: len(row) == len(tasks) for recipe, row in lines.items()}
    order = sorted(lines, key=lambda recipe: (not complete[recipe], means[recipe]))
    return pl.DataFrame(
        [
            {
                "recipe": recipe,
                "mean": f"{means[recipe]:+.3f}" if complete[recipe] else "",
                **{task: _cell(lines[recipe].get(task)) for task in tasks},
            }
            for recipe in order
        ]
    )


def _cell(found: Difference | None) -> str:
    if found is None:
        return ""
    mark = "*" if found.high < 0 else "†" if found.low > 0 else ""
    mark += "!" if found.worst < found.random_best else ""
    seeds = f" ({found.seeds})" if found.seeds < 3 else ""
    return f"{found.mean:+.3f}{mark} [{found.low:+.3f}, {found.high:+.3f}]{seeds}"
