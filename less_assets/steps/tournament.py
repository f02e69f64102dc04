"""Tournaments: small trials of several recipes, and the choice among them.

Belongs here: pilots, which are made by the functions that make any subset, model and validation, and the table of the
choice. The rule of the choice is `method/selection/tournament.py`; the winner's rows are selected in `selection.py`.

Pilots are assets of their own, for the rows of a tournament are made from them: Dagster's graph has no circles.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from pydantic import JsonValue

from less_assets.compute.models import ModelLoader
from less_assets.compute.speeds import TRAINING, Guess
from less_assets.compute.step import Log, StepInputs, StepResult
from less_assets.compute.timings import cost_with_inputs
from less_assets.compute.workload import Amount, Workload
from less_assets.errors import EvaluationError
from less_assets.lineage.lineage import Input, Keys, Lineage, split
from less_assets.lineage.plan import Versions
from less_assets.method.evaluation import VALIDATION_LOSS, VALIDATION_SCORE
from less_assets.project.project import Project
from less_assets.reading.files import CHOICE, SAMPLES
from less_assets.reading.tournaments import choice_in_words
from less_assets.steps.asset import Asset, Check
from less_assets.steps.evaluation import tuned_model
from less_assets.steps.fairness_checks import evaluated_rows
from less_assets.steps.finetuning import describe_training, train_on, work_of_trainings
from less_assets.steps.judging_examples import score_of_guessing, validation_examples
from less_assets.steps.selection import (
    RANKING_SECONDS,
    SCORES,
    describe_subset,
    seconds_to_rank,
    selection_work,
    store_selection,
)
from less_assets.steps.shown import Shown, Stored, Table, Verdict, one_table
from less_assets.steps.validation import validation_losses, validation_scores
from less_assets.store.tables import read_parquet, write_parquet


def select_pilot(work: StepInputs) -> StepResult:
    """Select as the candidate does, with the pilot's share of the budget."""
    key, task = split(work.partition)
    _refuse_evaluated_examples(work.project, task)
    pilot = work.project.pilots[key]
    return store_selection(work, pilot.recipe, task, {"recipe": pilot.candidate}, explained=False)


def _refuse_evaluated_examples(project: Project, task: str) -> None:
    """The verdict on a tournament is given on questions that no pilot was judged on.

    Raises:
        EvaluationError: A validation example is asked in the evaluation.
    """
    for member in project.member_tasks(task):
        asked = evaluated_rows(project.task(_task_of(project, member.name)))
        inside = asked.targets_inside(validation_examples(project, member)) if asked else []
        if inside:
            raise EvaluationError(
                f"{len(inside)} validation examples, on which the tournament judges its pilots, are asked in the "
                f"evaluation, which shall judge its choice: {', '.join(name for name, _ in inside[:3])} …",
                where=member.name,
                fix="take other validation examples, or leave these out of the evaluation",
            )


def _task_of(project: Project, key: str) -> str:
    """The task of a key of the task axis."""
    return project.folds[key].task if key in project.folds else key


def train_pilot(work: StepInputs) -> StepResult:
    """Train an adapter of the selecting model on the pilot's rows, with the pilot's seed."""
    seed = work.project.pilots[split(work.partition)[0]].seed
    return train_on(work, "pilot_subset", {**work.project.finetuning.training_values(), "seed": seed})


def judge_pilot(work: StepInputs) -> StepResult:
    """Take the loss of the task's validation examples, and grade the answers to them where that can say something.

    Of a group those of all members.
    """
    model, tokenizer = tuned_model(work, "pilot_model")
    _, task = split(work.partition)
    graded = _has_enough_questions(work.project, task)
    samples, units = [], 0
    for member in work.project.member_tasks(task):
        judged, tokens = validation_losses(work, member, model, tokenizer, work.progress(0, "validation examples"))
        scores = validation_scores(work, member, model, tokenizer) if graded else []
        samples.append(_with_scores(judged, scores).with_columns(pl.lit(member.name).alias("task")))
        units += tokens
    table = pl.concat(samples)
    write_parquet(work.folder, SAMPLES, table)
    return StepResult({"examples": table.height}, units=units)


def _has_enough_questions(project: Project, task: str) -> bool:
    """Whether a task, all its folds together, has so many validation examples that a score may judge."""
    from less_assets.method.selection.tournament import ENOUGH_QUESTIONS

    parts = [member for part in project.judged_on(_task_of(project, task)) for member in project.member_tasks(part)]
    return sum(len(validation_examples(project, part)) for part in parts) >= ENOUGH_QUESTIONS


def _with_scores(samples: pl.DataFrame, scores: Sequence[float]) -> pl.DataFrame:
    """Samples of losses with a score besides, where there are scores."""
    if not scores:
        return samples
    graded = [[{"metric": VALIDATION_SCORE, "value": score}] for score in scores]
    kind = samples.schema["scores"]
    return samples.with_columns(pl.concat_list("scores", pl.Series("graded", graded, dtype=kind)).alias("scores"))


def hold_tournament(work: StepInputs) -> StepResult:
    """Compare the candidates on what their pilots were judged on, and choose."""
    from less_assets.method.selection.tournament import choose

    project, lineage = work.project, work.lineage
    key, task = split(work.partition)
    held = project.recipe(key).tournament
    assert held is not None
    judged_on = project.judged_on(task)
    pilots = {pilot.key: pilot for pilot in project.pilots.values() if pilot.tournament == key}
    candidates = project.candidates(key)
    tables = {pilot: _judged(lineage, pilot, judged_on) for pilot in pilots}
    examples = _common_examples(tables, work.partition)
    of_candidates = {
        name: [tables[pilot.key] for pilot in pilots.values() if pilot.candidate == name] for name in candidates
    }
    prices = {
        pilot.candidate: cost_with_inputs(lineage, "pilot_subset", f"{pilot.key}|{judged_on[0]}").tokens
        for pilot in pilots.values()
    }
    reference = next(name for name, recipe in candidates.items() if recipe.strategy == "random")
    guessing = {member.name: score_of_guessing(member) for member in project.member_tasks(task)}
    number = judging_number(of_candidates[reference], guessing)
    values = {name: np.stack([_values(table, number) for table in own]) for name, own in of_candidates.items()}
    clusters = examples.select(pl.concat_str("task", "subtask", separator="/")).to_series().to_list()
    choice = choose(values, clusters, prices, reference=reference, higher_is_better=number == VALIDATION_SCORE)
    rows = [
        {
            "candidate": standing.candidate,
            "strategy": candidates[standing.candidate].strategy,
            "mean": standing.mean,
            "by_seed": values[standing.candidate].mean(axis=1).tolist(),
            "difference": standing.difference and standing.difference.mean,
            "low": standing.difference and standing.difference.low,
            "high": standing.difference and standing.difference.high,
            "beats_random": standing.beats_reference,
            "price": int(standing.price),
            "winner": standing.candidate == choice.winner,
        }
        for standing in choice.standings
    ]
    write_parquet(work.folder, CHOICE, pl.DataFrame(rows, schema=CHOICE_SCHEMA))
    summary = {
        "winner": choice.winner,
        "why": choice.why,
        "judged_by": number,
        "examples": examples.height,
        "seeds": [*held.seeds],
        "candidates": len(rows),
    }
    return StepResult(summary)


_BY_SEED: Any = pl.List(pl.Float64)

CHOICE_SCHEMA = pl.Schema(
    {
        "candidate": pl.String,  # name of the recipe
        "strategy": pl.String,
        "mean": pl.Float64,  # validation loss, or score, of its pilots, over seeds and examples
        "by_seed": _BY_SEED,  # the same for each seed
        "difference": pl.Float64,  # paired difference of the mean from random's; null for random
        "low": pl.Float64,  # its interval, over examples and seeds
        "high": pl.Float64,
        "beats_random": pl.Boolean,  # the interval is without 0, on the better side
        "price": pl.Int64,  # tokens through a model for its selection and all that it was made from
        "winner": pl.Boolean,
    }
)


def _judged(lineage: Lineage, pilot: str, judged_on: Sequence[str]) -> pl.DataFrame:
    """Samples of a pilot on all parts on which it is judged, those of folds under the task's own name."""
    parts = [read_parquet(lineage.folder("pilot_results", f"{pilot}|{part}"), SAMPLES) for part in judged_on]
    names = {fold.key: fold.task for fold in lineage.project.folds.values()}
    return pl.concat(parts).with_columns(pl.col("task").replace(names))


def _common_examples(tables: Mapping[str, pl.DataFrame], where: str) -> pl.DataFrame:
    """Task, subtask and id of the examples on which all pilots were judged, in their order."""
    first, *others = (table.select("task", "subtask", "example_id") for table in tables.values())
    if not all(first.equals(other) for other in others):
        raise EvaluationError(
            "The pilots were judged on different examples: their difference means nothing.",
            where=where,
            fix="less-assets run --until pilot_results",
        )
    return first


def judging_number(random_pilots: Sequence[pl.DataFrame], guessing: Mapping[str, float]) -> str:
    """What judges: the validation score if every example has one and they can tell candidates apart, else the loss.

    Args:
        random_pilots: Samples of the pilots that draw at random, one table a seed.
        guessing: Task -> what guessing scores on it.
    """
    from less_assets.method.selection.tournament import can_tell_apart

    scores = [_values(table, VALIDATION_SCORE) for table in random_pilots]
    if any(len(graded) < table.height for graded, table in zip(scores, random_pilots, strict=True)):
        return VALIDATION_LOSS
    chance = float(np.mean([guessing[task] for task in random_pilots[0]["task"]]))
    return VALIDATION_SCORE if can_tell_apart(np.stack(scores), chance) else VALIDATION_LOSS


def _values(samples: pl.DataFrame, metric: str) -> np.ndarray:
    """A metric of the samples that have it, in their order, float64."""
    scores = samples.select("scores").explode("scores").unnest("scores")
    return scores.filter(metric=metric)["value"].to_numpy()


def describe_choice(stored: Stored) -> Shown:
    """The table of the choice, and why."""
    summary: Any = stored.manifest.summary
    choice = stored.table(CHOICE)
    return Shown({"choice": Table(choice_in_words(choice, summary["judged_by"]))}, choice.height, choice.schema)


def _judge_choice(lineage: Lineage, key: str, models: ModelLoader, log: Log) -> Verdict:
    choice = read_parquet(lineage.folder("tournament_results", key), CHOICE)
    summary = lineage.summary("tournament_results", key)
    said = f"On {summary['examples']} validation examples and {len(summary['seeds'])} seeds {summary['why']}."
    return Verdict(bool(choice["beats_random"].any()), said, {"examples": summary["examples"]})


def pilot_selection_work(workload: Workload, due: Sequence[str]) -> Amount:
    """Rows that are ranked, and the bytes of the subsets."""
    return selection_work(workload, due, "pilot_subset")


def pilot_training_work(workload: Workload, due: Sequence[str]) -> Amount:
    """Tokens of the subsets, times epochs."""
    return work_of_trainings(workload, due, "pilot_model", "pilot_subset")


def judging_work(workload: Workload, due: Sequence[str]) -> Amount:
    """Tokens of the validation examples, of which each is taken to be as long as a target example."""
    project, tokens = workload.project, 0.0
    for key in due:
        task = split(key)[1]
        judged = sum(len(validation_examples(project, member)) for member in project.member_tasks(task))
        examples, target_tokens, _ = workload.target_sizes[task]
        tokens += judged * target_tokens / examples
    return Amount(units={"pilot_results": tokens}, tokens=tokens, loads=len(due))


def _subset_settings(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    project, pilot = lineage.project, keys["pilot"]
    settings: dict[str, Any] = {"recipe": project.recipe_settings(pilot)}
    return settings | ({"tokenizer": project.tokenizer_settings()} if project.counts_tokens(pilot) else {})


def _training_settings(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    return lineage.project.finetuning_settings(keys["pilot"])


def _tournament_settings(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    held = lineage.project.recipe(keys["recipe"]).tournament
    assert held is not None
    return {"candidates": [*lineage.project.candidates(keys["recipe"])], "seeds": [*held.seeds]}


def _trained_rows(lineage: Lineage, keys: Keys, inputs: Versions) -> Versions:
    """Equal rows are trained once for each seed: those of random for all folds."""
    rows = inputs[f"pilot_subset/{keys['pilot']}|{keys['task']}"]
    return {"base_model": inputs["base_model"], "rows": rows}


def _answers(lineage: Lineage, keys: Keys, inputs: Versions) -> Versions:
    """A model is judged once."""
    judged = lineage.summary("target_examples", keys["task"])["evaluation_digest"]
    return {"pilot_model": inputs[f"pilot_model/{keys['pilot']}|{keys['task']}"], "validation": judged}


def _holds_tournament(project: Project, recipe: str) -> bool:
    return project.recipe(recipe).tournament is not None


def _rehearsal_seconds(lineage: Lineage, keys: Keys) -> float | None:
    return seconds_to_rank(lineage, keys["pilot"], [lineage.project.recipe(keys["pilot"])])


ASSETS = (
    Asset(
        name="pilot_subset",
        group="tournament",
        kinds=frozenset({"polars", "parquet"}),
        description="The rows that a candidate of a tournament selects with a part of the budget, for its trial.",
        axes=("pilot", "task"),
        inputs=(Input("pool_index"), Input("excluded_rows"), *SCORES),
        folder="pilots/{pilot}/{task}/subset",
        settings=_subset_settings,
        needed_by=_holds_tournament,
        compute=select_pilot,
        describe=describe_subset,
        in_ranges=True,
        amount=pilot_selection_work,
        speed=Guess(("selected_subset",), seconds=RANKING_SECONDS),
        versioned_by_content=True,
        rehearsal_seconds=_rehearsal_seconds,
    ),
    Asset(
        name="pilot_model",
        group="tournament",
        kinds=frozenset({"pytorch", "huggingface"}),
        description="An adapter trained on a pilot's rows with one seed; equal rows are trained once a seed.",
        axes=("pilot", "task"),
        inputs=(Input("base_model"), Input("pilot_subset")),
        folder="pilots/{pilot}/{task}/model",
        shared_folder="pilots/models",
        settings=_training_settings,
        needed_by=_holds_tournament,
        determined_by=_trained_rows,
        compute=train_pilot,
        describe=describe_training,
        loads_model=True,
        same_run="pilot_results",
        amount=pilot_training_work,
        counts_tokens=True,
        speed=Guess(("finetuned_model", "warmup_checkpoints", TRAINING)),
    ),
    Asset(
        name="pilot_results",
        group="tournament",
        kinds=frozenset({"pytorch", "parquet"}),
        description="What a pilot loses on the validation examples, which its rows were not selected for.",
        axes=("pilot", "task"),
        inputs=(Input("pilot_model"), Input("target_examples")),
        folder="pilots/{pilot}/{task}/results",
        shared_folder="pilots/samples/{task}",
        needed_by=_holds_tournament,
        determined_by=_answers,
        compute=judge_pilot,
        describe=one_table(SAMPLES),
        loads_model=True,
        amount=judging_work,
        counts_tokens=True,
        speed=Guess(("train_gradients",)),  # a forward pass: at most what gradients take
    ),
    Asset(
        name="tournament_results",
        group="tournament",
        kinds=frozenset({"polars", "parquet"}),
        description="The candidates of a tournament side by side, which one gets the whole budget, and why.",
        axes=("recipe", "task"),
        inputs=(Input("pilot_results", with_folds=True),),
        folder="tournaments/{recipe}/{task}",
        settings=_tournament_settings,
        needed_by=_holds_tournament,
        of_folds=False,
        compute=hold_tournament,
        describe=describe_choice,
        checks=(
            Check(
                "a_candidate_beats_random",
                "A candidate's trial is better than random's, beyond the paired difference's interval.",
                _judge_choice,
            ),
        ),
    ),
)
