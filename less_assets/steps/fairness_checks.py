"""Checks of whether a comparison is fair: nothing evaluated was trained on, and gains are the target's own.

Belongs here: checks that a person should see; they warn and stop nothing. Comparing texts is
`method/data/contamination.py`; checks of the pool, of rankings and of models are `checks.py`.
"""

from typing import TYPE_CHECKING

import polars as pl

from less_assets.compute.models import ModelLoader
from less_assets.compute.step import Log
from less_assets.lineage.lineage import Lineage
from less_assets.method.evaluation.leaderboard import REFERENCES, in_words, judging, of_number, with_named_numbers
from less_assets.project.task_sections import Task
from less_assets.reading.files import BOARD, EXAMPLES, TARGETS
from less_assets.steps.asset import Check
from less_assets.steps.judging_examples import answers_of_another_form
from less_assets.steps.shown import TABLE_ROWS, Table, Verdict
from less_assets.store.tables import read_parquet

if TYPE_CHECKING:
    from less_assets.method.data.contamination import EvaluatedRows

FEW_EXAMPLES = 30
"""Validation examples below which only large differences can be told from chance."""


def _look_for_evaluation(lineage: Lineage, _: str, models: ModelLoader, log: Log) -> Verdict:
    evaluated = {
        task.name: looked_up for task in lineage.project.tasks if (looked_up := evaluated_rows(task)) is not None
    }
    for shard in lineage.shards():
        table = read_parquet(lineage.folder("instruction_pool", shard), EXAMPLES, ["example_id", "messages", "status"])
        rows = table.filter(status="ok").select("example_id", "messages").rows()
        for task_overlap in evaluated.values():
            task_overlap.look_up(rows)
    overlaps = {task: task_overlap.found() for task, task_overlap in evaluated.items()}
    bad = {task: overlap for task, overlap in overlaps.items() if overlap.shared}
    said = "; ".join(
        f"{task}: {overlap.shared:,} pool rows overlap with {overlap.evaluated:,} evaluated ones "
        f"({overlap.exact:,} are the same)"
        for task, overlap in bad.items()
    )
    pairs = [(task, *pair) for task, overlap in bad.items() for pair in overlap.pairs]
    table = pl.DataFrame(pairs, schema=["task", "pool_row", "evaluation_row"], orient="row")
    return Verdict(
        not bad,
        said or f"No overlap with the evaluation of {', '.join(overlaps) or 'any task (none could be read)'}.",
        {"overlaps": Table(table.head(TABLE_ROWS))} if bad else {},
    )


def _look_for_targets(lineage: Lineage, task_name: str, models: ModelLoader, log: Log) -> Verdict:
    from less_assets.method.data.targets import targets_from_table

    table = read_parquet(lineage.folder("target_examples", task_name), TARGETS)
    inside: list[tuple[str, str]] = []
    for task in lineage.project.member_tasks(task_name):
        rows = evaluated_rows(task)
        if rows is not None:
            inside += rows.targets_inside(targets_from_table(table.filter(member=task.name)))
    pairs = pl.DataFrame(inside, schema=["target_example", "evaluation_row"], orient="row")
    return Verdict(
        not inside,
        f"{len(inside)} of {table.height} target examples are in the evaluation."
        if inside
        else "No target example is in the evaluation, as far as it can be read.",
        {"pairs": Table(pairs.head(TABLE_ROWS))} if inside else {},
    )


def _judge_control(lineage: Lineage, task_name: str, models: ModelLoader, log: Log) -> Verdict:
    if not lineage.project.task(task_name).control:
        return Verdict(True, "The task is no control.", {})
    board = with_named_numbers(read_parquet(lineage.folder("task_results", task_name), BOARD))
    references = pl.col("strategy").is_in(list(REFERENCES.values()))
    compared = board.filter("decides", pl.col("vs_random").is_not_null(), ~references)
    if compared.is_empty():
        return Verdict(True, "There is no recipe to compare with random.", {})
    better = pl.when("higher_is_better").then(pl.col("vs_random_low") > 0).otherwise(pl.col("vs_random_high") < 0)
    profits = compared.filter(better)
    said = ", ".join(
        f"{row['recipe']} ({in_words(row['metric'])} {row['vs_random']:+.3f})" for row in profits.iter_rows(named=True)
    )
    return Verdict(
        profits.is_empty(),
        f"Better than random on what it was not selected for: {said}. Gains elsewhere may have other reasons too."
        if said
        else "No recipe beats random on the control.",
        {},
    )


def _judge_recipes(lineage: Lineage, task_name: str, models: ModelLoader, log: Log) -> Verdict:
    board = with_named_numbers(read_parquet(lineage.folder("task_results", task_name), BOARD))
    compared = judging(board).filter(pl.col("vs_base").is_not_null())
    if compared.is_empty():
        return Verdict(True, "There is no recipe to compare with the base model (strategy `none`).", {})
    # A diverged model's loss is NaN, and so is its difference.
    below = pl.when("higher_is_better").then(pl.col("vs_base_high") < 0).otherwise(pl.col("vs_base_low") > 0)
    worse = compared.filter(below | pl.col("vs_base").is_nan())
    said = ", ".join(
        f"{row['recipe']} ({in_words(row['metric'])} {row['vs_base']:+.3f} [{row['vs_base_low']:+.3f}, "
        f"{row['vs_base_high']:+.3f}])"
        for row in worse.iter_rows(named=True)
    )
    return Verdict(
        worse.is_empty(),
        f"Worse than the base model on the same samples: {said}." if said else "No recipe is below the base model.",
        {},
    )


def _judge_losses(lineage: Lineage, task_name: str, models: ModelLoader, log: Log) -> Verdict:
    members = lineage.project.member_tasks(task_name)
    other = [why for why in map(answers_of_another_form, members) if why]
    board = with_named_numbers(read_parquet(lineage.folder("task_results", task_name), BOARD))
    counts: list[int] = of_number(board, "validation_loss")["n"].to_list()
    said = "No answers are of another form than the targets."
    if other:
        said = f"The answer loss takes part in no verdict, for answers and targets differ in form: {'; '.join(other)}."
    if not counts:
        said += " A `validation` of the task would give a loss that speaks of its targets." if other else ""
        return Verdict(not other, said, {})
    few = "; few, so that only large differences show" if min(counts) < FEW_EXAMPLES else ""
    return Verdict(not other, f"{said} {min(counts)} validation examples{few}.", {"validation_examples": min(counts)})


def evaluated_rows(task: Task) -> "EvaluatedRows | None":
    """What a task is evaluated on, without worked examples; None if it has no evaluation of its own.

    Tasks of the harness bring data that only the harness can read: they are not looked at.
    """
    from less_assets.method.data.contamination import EvaluatedRows
    from less_assets.method.data.targets import read_evaluation

    evaluation = task.evaluation
    path = evaluation and (evaluation.path or evaluation.held_out)
    if not evaluation or not path:
        return None
    shots = task.examples.path if task.examples and task.examples.format == evaluation.format else None
    examples = read_evaluation(
        evaluation.format or "messages", path, evaluation.limit, shots_path=shots, few_shot=False
    )
    return EvaluatedRows(examples, benchmark=evaluation.format is not None)


evaluation_not_in_pool = Check(
    "evaluation_not_in_pool",
    "No row of the pool is in an evaluation: by id, by 13 words in a row.",
    _look_for_evaluation,
)
targets_not_evaluated = Check(
    "targets_not_evaluated", "No target example is asked in the task's own evaluation.", _look_for_targets
)
control_does_not_profit = Check(
    "control_does_not_profit",
    "On a control task, whose evaluation is unrelated to its examples, no recipe beats random.",
    _judge_control,
)
losses_speak_of_the_targets = Check(
    "losses_speak_of_the_targets",
    "Reference answers are of the targets' form, so that their loss says whether the targets were learned.",
    _judge_losses,
)
no_recipe_below_base = Check(
    "no_recipe_below_base",
    "No recipe leaves the model worse than the base model, beyond the paired difference's interval.",
    _judge_recipes,
)
