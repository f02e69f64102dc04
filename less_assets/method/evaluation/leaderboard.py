"""Was the selection worth it: recipes side by side, and against base, random and full on the same samples.

Belongs here: tables in, tables and Markdown out, with Polars only. Running the evaluations lives in `evaluation.py`,
drawing in `report/charts.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from less_assets.errors import EvaluationError
from less_assets.method.evaluation.intervals import CONFIDENCE, REPLICATES, clustered_bootstrap

REFERENCES = {"base": "none", "random": "random", "full": "full"}
"""What recipes are compared with: column prefix and strategy."""
COSTS_HEADING = "Cost (mean over tasks; the selection's in full for each recipe, although recipes share most of it)"

Number = Literal["validation_loss", "answer_loss", "score"]
NUMBERS: dict[Number, str] = {
    "validation_loss": "validation loss",
    "answer_loss": "answer loss",
    "score": "score",
}
"""The three numbers that judge a recipe, best suited first, and what they are called: the loss of examples of the
targets' own form that no selection saw, the loss of the evaluation's reference answers, the task's own metric."""

HEADINGS: dict[Number, str] = {
    "validation_loss": "Validation loss (nats per token, lower is better)",
    "answer_loss": "Answer loss (nats per token, lower is better)",
    "score": "Score (higher is better)",
}
OTHER_FORM_NOTE = "° answers of another form than the targets: no verdict rests on their loss"

COSTS = ("rows", "tokens", "minutes", "selection_tokens", "selection_minutes")
_NUMBERS = ["value", "low", "high"]

LEADERBOARD_SCHEMA = pl.Schema(
    {
        "task": pl.String,  # of a group's members: group/member
        "recipe": pl.String,  # without the seed
        "strategy": pl.String,
        "model": pl.String,
        "metric": pl.String,
        "primary": pl.Boolean,  # the task's score
        "decides": pl.Boolean,  # false: shown, but no verdict rests on it, for answers and targets differ in form
        "higher_is_better": pl.Boolean,
        "n": pl.Int64,  # samples
        "value": pl.Float64,  # mean over seeds
        "low": pl.Float64,  # interval over samples
        "high": pl.Float64,
        "seeds": pl.Int64,
        "spread": pl.Float64,  # standard deviation over seeds; null for one
        **{
            f"vs_{reference}{suffix}": pl.Float64  # paired difference, recipe minus reference, and its interval
            for reference in REFERENCES
            for suffix in ("", "_low", "_high")
        },
        "random_spread": pl.Float64,  # `spread` of the random recipe that this one is compared with
        "rows": pl.Float64,  # training rows, mean over seeds
        "tokens": pl.Float64,  # training tokens seen, mean over seeds
        "minutes": pl.Float64,  # of training, mean over seeds
        "selection_tokens": pl.Float64,  # tokens through a model for the selection and all it was made from
        "selection_minutes": pl.Float64,  # minutes for them; what recipes share counts in full for each
    }
)


@dataclass(frozen=True)
class RecipeResult:
    """What one trained recipe (one seed) scored on a task.

    Attributes:
        recipe: Name of the recipe; seeds of one recipe share it.
        strategy: Its strategy; `none`, `random` and `full` are what others are compared with.
        samples: Table of `evaluation.SAMPLE_SCHEMA`, with a column `task` where members of a group are evaluated.
        metrics: Table of `evaluation.METRIC_SCHEMA`, with the same extra column.
        seed: Seed of this draw; None for a recipe without seeds.
        model: Model that was fine-tuned; only results on one model are compared.
        budget: Budget as written, such as `fraction 0.05`; a recipe is compared with the random one of its own budget.
        rows: Training rows.
        tokens: Training tokens seen.
        minutes: Minutes of training.
        selection_tokens: Tokens through a model for the selection and all that it was made from.
        selection_minutes: Minutes for them; None if they are not known for all.
    """

    recipe: str
    strategy: str
    samples: pl.DataFrame
    metrics: pl.DataFrame
    seed: int | None = None
    model: str = ""
    budget: str | None = None
    rows: int | None = None
    tokens: int | None = None
    minutes: float | None = None
    selection_tokens: int | None = None
    selection_minutes: float | None = None


def compare_recipes(
    task: str,
    results: Sequence[RecipeResult],
    *,
    other_form: Sequence[str] = (),
    replicates: int = REPLICATES,
    seed: int = 0,
) -> pl.DataFrame:
    """Compare the recipes of a task, metric by metric, each with the references of its model and budget.

    Values are means over the samples, and over seeds where a recipe has several; `spread` is the standard deviation of
    the seeds' means. Differences are paired: taken sample by sample (each the mean over seeds), then averaged and
    bootstrapped as `intervals.clustered_bootstrap` says. Intervals are over samples only: they say what other questions
    would have given, `spread` says what other draws would have given.

    Args:
        task: Name of the task.
        results: One per recipe and seed, in the order of the project file.
        other_form: Tasks (of a group: members) whose reference answers are of another form than the targets.
        replicates: Bootstrap replicates.
        seed: Seed of the bootstrap.

    Returns:
        Table of `LEADERBOARD_SCHEMA`, a row per recipe and metric, recipes in the order given, the answer loss first.

    Raises:
        EvaluationError: If two recipes were evaluated on different samples.
    """
    rows: list[dict[str, Any]] = []
    members = dict.fromkeys(member for result in results for member in _members(result.samples, task))
    for member in members:
        label = task if member == task else f"{task}/{member}"
        recipes: dict[str, list[RecipeResult]] = {}
        for result in results:
            if member in _members(result.samples, task):
                recipes.setdefault(result.recipe, []).append(result)
        values = {recipe: _sample_values(recipe, draws, member) for recipe, draws in recipes.items()}
        for recipe, draws in recipes.items():
            for metric in _metrics(draws[0].metrics, member):
                interval = {"replicates": replicates, "seed": seed}
                interval["average"] = metric["average"]
                rows.append(_row(label, draws, metric, values[recipe], interval))
                rows[-1]["decides"] = metric["metric"] != "loss" or member not in other_form
                for reference, strategy in REFERENCES.items():
                    against = _reference(recipes, draws[0], strategy)
                    if against is not None and against != recipe:
                        paired = _paired(metric["metric"], values[recipe], values[against], recipe, against, label)
                        columns = (f"vs_{reference}{end}" for end in ("", "_low", "_high"))
                        rows[-1] |= dict(zip(columns, _interval(paired, interval), strict=True))
                        if reference == "random":
                            own = values[against].filter(pl.col("metric") == metric["metric"])
                            rows[-1]["random_spread"] = _spread(own, len(recipes[against]), metric["average"])
    return with_named_numbers(pl.DataFrame(rows, schema=LEADERBOARD_SCHEMA))


def with_named_numbers(board: pl.DataFrame) -> pl.DataFrame:
    """A leaderboard whose losses bear their names; earlier versions called the answer loss `loss` and judged by it."""
    decides = [] if "decides" in board.columns else [pl.lit(True).alias("decides")]
    renamed = pl.when(pl.col("metric") == "loss").then(pl.lit("answer_loss")).otherwise("metric").alias("metric")
    return board.with_columns(renamed, *decides).select(LEADERBOARD_SCHEMA.names())


def in_words(metric: str) -> str:
    """A metric's name for sentences; `loss` is what evaluations call the answer loss."""
    return "answer loss" if metric == "loss" else metric.replace("_", " ")


def of_number(board: pl.DataFrame, number: Number) -> pl.DataFrame:
    """The rows of a leaderboard that hold one of `NUMBERS`."""
    return board.filter(pl.col("primary") if number == "score" else pl.col("metric") == number)


def judging(board: pl.DataFrame) -> pl.DataFrame:
    """The rows of a leaderboard on which a verdict may rest: losses and scores, without answers of another form."""
    return board.filter(pl.col("primary") | pl.col("metric").is_in(["validation_loss", "answer_loss"]), "decides")


def merge(tables: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Put the tables of all tasks together, recipes in the same order in every task.

    Args:
        tables: Tables of `LEADERBOARD_SCHEMA`.
    """
    if not tables:
        return pl.DataFrame(schema=LEADERBOARD_SCHEMA)
    board = pl.concat([with_named_numbers(table) for table in tables])
    order = pl.Enum(board["recipe"].unique(maintain_order=True))
    tasks = pl.Enum(board["task"].unique(maintain_order=True))
    return board.sort(pl.col("task").cast(tasks), pl.col("recipe").cast(order), maintain_order=True)


def recipes_by_tasks(board: pl.DataFrame, what: Number) -> pl.DataFrame:
    """Return recipes × tasks with a text in each cell: value, interval, and spread over seeds.

    A star marks a value whose paired difference from random has an interval without 0, on the better side; ° an answer
    loss of answers of another form than the targets, which never has a star.

    Args:
        board: Table of `LEADERBOARD_SCHEMA`.
        what: One of `NUMBERS`.
    """
    chosen = of_number(board, what)
    better = pl.when("higher_is_better").then(pl.col("vs_random_low") > 0).otherwise(pl.col("vs_random_high") < 0)
    cell = pl.format(
        "{}{}{}{}",
        _text(pl.col("value")),
        pl.when(~pl.col("decides"))
        .then(pl.lit("°"))
        .when(better.fill_null(False))
        .then(pl.lit("*"))
        .otherwise(pl.lit("")),
        pl.when(pl.col("low").is_null())
        .then(pl.lit(""))
        .otherwise(pl.format(" [{}, {}]", _text(pl.col("low")), _text(pl.col("high")))),
        pl.when(pl.col("spread").is_null())
        .then(pl.lit(""))
        .otherwise(pl.format(" ± {} ({} seeds)", _text(pl.col("spread")), pl.col("seeds"))),
    )
    heading = pl.col("task") if what != "score" else pl.format("{} {}", "task", "metric")
    return (
        chosen.select("recipe", cell.alias("cell"), heading.alias("task"))
        .pivot("task", index="recipe", values="cell", maintain_order=True)
        .with_columns(pl.exclude("recipe").fill_null("–"))
    )


def against_random(board: pl.DataFrame, what: Number) -> pl.DataFrame:
    """Return what a chart of the paired differences from random shows; recipes that are not compared are left out.

    Args:
        board: Table of `LEADERBOARD_SCHEMA`.
        what: One of `NUMBERS`.

    Returns:
        Columns task, recipe, value (the difference), low, high, spread (of random over its seeds; may be null), and
        verdict: `better` or `worse` where the interval is without 0 and the number decides, else `undecided`.
    """
    sign = pl.when("higher_is_better").then(1.0).otherwise(-1.0)
    chosen = of_number(board, what)
    return chosen.filter(pl.col("vs_random").is_not_null(), pl.col("vs_random").is_finite()).select(
        "task",
        "recipe",
        pl.col("vs_random").alias("value"),
        pl.col("vs_random_low").alias("low"),
        pl.col("vs_random_high").alias("high"),
        pl.col("random_spread").alias("spread"),
        pl.when(~pl.col("decides") | ((pl.col("vs_random_low") <= 0) & (pl.col("vs_random_high") >= 0)))
        .then(pl.lit("undecided"))
        .when(sign * pl.col("vs_random") > 0)
        .then(pl.lit("better"))
        .otherwise(pl.lit("worse"))
        .alias("verdict"),
    )


def differences(board: pl.DataFrame, reference: Literal["base", "random", "full"]) -> pl.DataFrame:
    """Return recipes × tasks with the paired difference of losses and score from a reference, as text.

    Args:
        board: Table of `LEADERBOARD_SCHEMA`.
        reference: What to compare with.
    """
    column = f"vs_{reference}"
    numbers = pl.col("primary") | pl.col("metric").is_in(["validation_loss", "answer_loss"])
    chosen = board.filter(numbers, pl.col(column).is_not_null(), pl.col(column).is_not_nan())
    cell = pl.format("{} [{}, {}]", *(_text(pl.col(f"{column}{end}"), sign=True) for end in ("", "_low", "_high")))
    return (
        chosen.select("recipe", cell.alias("cell"), pl.format("{} {}", "task", "metric").alias("task"))
        .pivot("task", index="recipe", values="cell", maintain_order=True)
        .with_columns(pl.exclude("recipe").fill_null("–"))
    )


def to_markdown(board: pl.DataFrame) -> str:
    """Render the leaderboard: losses, score, paired differences from random, base and full, and what each recipe cost.

    Args:
        board: Table of `LEADERBOARD_SCHEMA`.
    """
    parts = [
        *((heading, recipes_by_tasks(board, what)) for what, heading in HEADINGS.items()),
        *((f"Difference from {name}, same samples", differences(board, name)) for name in ("random", "base", "full")),
        (COSTS_HEADING, costs(board)),
    ]
    shown = [f"**{heading}**\n\n{markdown_table(table)}" for heading, table in parts if table.height]
    note = (
        f"Brackets: {100 * CONFIDENCE:.0f} % bootstrap interval over samples, clustered by subtask; ±: "
        "standard deviation over seeds; \\*: better than random, interval of the paired difference without 0."
    )
    if not board["decides"].all():
        note += f" {OTHER_FORM_NOTE}."
    return "\n\n".join([*shown, note])


def costs(board: pl.DataFrame) -> pl.DataFrame:
    """Return what each recipe cost, mean over tasks, as text: rows and training, and what the selection took.

    Args:
        board: Table of `LEADERBOARD_SCHEMA`.
    """
    return (
        board.unique(["task", "recipe"], keep="first", maintain_order=True)
        .group_by("recipe", maintain_order=True)
        .agg(pl.col(COSTS).mean())
        .with_columns(
            pl.col("rows", "tokens", "selection_tokens").round(0).cast(pl.Int64).cast(pl.String).fill_null("–"),
            *(_text(pl.col(name), digits=1).fill_null("–") for name in ("minutes", "selection_minutes")),
        )
        .rename(
            {
                "tokens": "training tokens",
                "minutes": "training minutes",
                "selection_tokens": "selection tokens",
                "selection_minutes": "selection minutes",
            }
        )
    )


def markdown_table(table: pl.DataFrame) -> str:
    """Render a table as a Markdown pipe table.

    Args:
        table: Any table; nulls become empty cells.
    """
    lines = [table.columns, ["---"] * table.width, *table.cast(pl.String).fill_null("").rows()]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _members(table: pl.DataFrame, task: str) -> list[str]:
    return table["task"].unique(maintain_order=True).to_list() if "task" in table.columns else [task]


def _of_member(table: pl.DataFrame, member: str) -> pl.DataFrame:
    return table.filter(pl.col("task") == member) if "task" in table.columns else table


def _metrics(metrics: pl.DataFrame, member: str) -> list[dict[str, Any]]:
    """Return the totals of a metrics table, the loss first."""
    return list(_of_member(metrics, member).filter(pl.col("subtask").is_null()).iter_rows(named=True))


def _sample_values(recipe: str, draws: Sequence[RecipeResult], member: str) -> pl.DataFrame:
    """Return metric, subtask, example_id, occurrence, value (mean over seeds) and one column `seed:i` per draw."""
    tables = []
    for i, draw in enumerate(draws):
        samples = _of_member(draw.samples, member)
        # The same question may stand twice in an evaluation file: its occurrences are paired in order.
        keyed = samples.with_columns(
            pl.col("example_id").cum_count().over("subtask", "example_id").alias("occurrence"),
            pl.col("scores").list.concat(
                pl.concat_list(pl.struct(pl.lit("loss").alias("metric"), pl.col("loss").alias("value")))
            ),
        )
        tables.append(
            keyed.select("subtask", "example_id", "occurrence", "scores")
            .explode("scores")
            .unnest("scores")
            .drop_nulls("value")
            .rename({"value": f"seed:{i}"})
        )
    joined = tables[0]
    keys = ["metric", "subtask", "example_id", "occurrence"]
    for table in tables[1:]:
        joined = _same_samples(joined, table, keys, recipe, f"another seed of {recipe}", member)
    return joined.with_columns(pl.mean_horizontal(pl.col("^seed:.*$")).alias("value"))


def _same_samples(
    left: pl.DataFrame, right: pl.DataFrame, keys: list[str], left_name: str, right_name: str, where: str
) -> pl.DataFrame:
    joined = left.join(right, on=keys, how="inner", maintain_order="left")
    if not len(joined) == len(left) == len(right):
        raise EvaluationError(
            f"{left_name} and {right_name} were evaluated on different samples "
            f"({len(left)} and {len(right)}, {len(joined)} in common): their difference means nothing.",
            where=where,
            fix="evaluate both again with the same evaluation settings",
        )
    return joined


def _paired(
    metric: str, ours: pl.DataFrame, theirs: pl.DataFrame, our_name: str, their_name: str, where: str
) -> pl.DataFrame:
    """Return subtask and value (ours minus theirs) of the samples of a metric."""
    keys = ["subtask", "example_id", "occurrence"]
    left = ours.filter(pl.col("metric") == metric).select(*keys, "value")
    right = theirs.filter(pl.col("metric") == metric).select(*keys, pl.col("value").alias("other"))
    joined = _same_samples(left, right, keys, our_name, their_name, where)
    return joined.select("subtask", pl.col("value") - pl.col("other"))


def _reference(recipes: dict[str, list[RecipeResult]], ours: RecipeResult, strategy: str) -> str | None:
    """Return the recipe of that strategy on our model: the one with our budget if there is one, else the first."""
    rivals = [draws[0] for draws in recipes.values() if draws[0].strategy == strategy and draws[0].model == ours.model]
    return next((rival.recipe for rival in rivals if rival.budget == ours.budget), rivals[0].recipe if rivals else None)


def _row(
    task: str,
    draws: Sequence[RecipeResult],
    metric: dict[str, Any],
    values: pl.DataFrame,
    interval: dict[str, Any],
) -> dict[str, Any]:
    """Return a row of `LEADERBOARD_SCHEMA` without the comparisons."""
    own = values.filter(pl.col("metric") == metric["metric"])
    row = {
        "task": task,
        "recipe": draws[0].recipe,
        "strategy": draws[0].strategy,
        "model": draws[0].model,
        "metric": metric["metric"],
        "primary": metric["primary"],
        "higher_is_better": metric["higher_is_better"],
        "seeds": len(draws),
        "n": len(own) or metric["n"],
        **{name: _mean([getattr(draw, name) for draw in draws]) for name in COSTS},
    }
    if own.is_empty():  # a figure of the harness's own, without samples
        return row | {name: metric[name] for name in _NUMBERS}
    row |= dict(zip(_NUMBERS, _interval(own, interval), strict=True))
    return row | {"spread": _spread(own, len(draws), interval["average"])}


def _spread(values: pl.DataFrame, seeds: int, average: str) -> float | None:
    """Return the standard deviation over seeds of the seeds' means; None for one seed."""
    if seeds < 2:
        return None
    return float(np.std([_average(values, f"seed:{i}", average) for i in range(seeds)], ddof=1))


def _average(values: pl.DataFrame, column: str, average: str) -> float:
    """Return the mean of a column over samples, or over subtasks' means."""
    if average == "subtasks":
        values = values.group_by("subtask").agg(pl.col(column).mean())
    return float(values[column].to_numpy().mean())


def _interval(values: pl.DataFrame, settings: dict[str, Any]) -> tuple[float, float, float]:
    interval = clustered_bootstrap(values["value"].to_numpy(), values["subtask"].to_list(), **settings)
    return interval.mean, interval.low, interval.high


def _mean(numbers: Sequence[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if known else None


def _text(column: pl.Expr, *, sign: bool = False, digits: int = 3) -> pl.Expr:
    """Format to some decimals: 1.5934 gives "1.593"."""
    pattern = f"{{:{'+' if sign else ''}.{digits}f}}"
    return column.map_elements(pattern.format, return_dtype=pl.String)
