"""Certificates for influence scores: a sample of the pool scored exactly, and real optimizer steps.

Belongs here: wiring only; `checks.py` shows the outcome. Mathematics is `method/selection/fidelity.py`, reading a
certificate `reading/certificates.py`.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from less_assets.compute.models import ModelLoader
from less_assets.compute.speeds import Guess
from less_assets.compute.step import ComputeTogether, Log, StepInputs, StepResult, materialize_together
from less_assets.compute.workload import Amount, Workload
from less_assets.errors import LessAssetsError
from less_assets.lineage.lineage import Lineage
from less_assets.lineage.plan import ArtifactPlan
from less_assets.method.selection.ranking import Queue, score_matrix, select_from_sample
from less_assets.project.recipes import ResolvedRecipe
from less_assets.reading.certificates import (
    CERTIFICATE,
    MEASURED,
    POOL,
    REAL_STEPS,
    SAMPLE,
    STEPS,
    certificate_plan,
    certified_recipes,
    certified_rules,
    scored_sample,
    steps_plan,
)
from less_assets.reading.files import score_file
from less_assets.reading.pool_index import PoolIndex
from less_assets.reading.rows import checkpoint_weights, mean_learning_rates, score_column
from less_assets.reading.scores import recipe_queues
from less_assets.steps.gradients import encode_targets, total_tokens
from less_assets.steps.measured_rows import Measurement, Samples, in_force, measured_with
from less_assets.steps.ranking import budget_of
from less_assets.steps.rescoring import encode_rows, score_rows_exactly, weighted_total
from less_assets.store.artifacts import ArtifactFolder
from less_assets.store.tables import read_parquet, write_parquet

POOL_SAMPLE = 20_000
"""Rows of the pool whose scores a certificate keeps: enough to know where the cut lies."""
NEAR_SHARE = 0.75
"""Share of a certificate's rows that are drawn around the cuts; the others are drawn from the whole pool."""
NEAR_DEPTH = 3
"""How deep that reaches, in budgets."""
STEP_TARGETS = 32
"""Target examples whose loss is looked at after each real step: a forward pass over them for each row."""
SALT = b"fidelity"
Inclusion = Callable[[pl.DataFrame], np.ndarray]
"""Chance of each row of a table to be sampled, up to a factor, float64 (n,)."""
SPEEDS: dict[str, Guess] = {
    CERTIFICATE: Guess(("train_gradients",)),
    REAL_STEPS: Guess(("train_gradients",), times_longer=0.4),  # mostly forward passes (the demo)
}
"""What serves where the speeds of both were not measured."""


def _alike(table: pl.DataFrame) -> np.ndarray:
    return np.ones(table.height)


@dataclass(frozen=True)
class RecipeFidelity:
    """What the certificate says of one recipe before anything is selected.

    Attributes:
        recipe: The recipe's key.
        spearman: Rank correlation of sketched and exact scores over the pool, estimated by the sample.
        overlap: Expected share of the selection that exact scores would select, too.
        certain: Share of the selection that is certain.
        band: Distance above the cut from which rows are certain (the largest one, where there are several cuts).
        scores: Sketched and exact scores of the sample, as the recipe's first order ranks them; and the cut.
    """

    recipe: str
    spearman: float
    overlap: float
    certain: float
    band: float | None
    scores: tuple[np.ndarray, np.ndarray, tuple[float, float]]


def certify(lineage: Lineage, models: ModelLoader, task: str, log: Log) -> ArtifactFolder:
    """Make the certificate of a task's scores, unless it is there; with it those of other tasks that lack one."""
    return _make(lineage, models, certificate_plan, task, score_samples, log)


def take_real_steps(lineage: Lineage, models: ModelLoader, task: str, log: Log) -> ArtifactFolder:
    """Compare predicted with real influence on a task, unless that was done; likewise on others that lack it."""
    return _make(lineage, models, steps_plan, task, measure_steps, log)


def _make(
    lineage: Lineage,
    models: ModelLoader,
    plan_of: Callable[[Lineage, str], ArtifactPlan],
    task: str,
    compute: ComputeTogether,
    log: Log,
) -> ArtifactFolder:
    """Make what a check of a task stores; tasks share most sampled rows, so those that lack it are made together."""
    plan = plan_of(lineage, task)
    plans = [plan]
    if not lineage.store.artifact(plan.folder, plan.fingerprint).exists():
        plans += [other for other in _lacking(lineage, plan_of) if other.partition != task]
    manifest, *_ = materialize_together(lineage, plans, compute, models, log)
    return lineage.store.artifact(manifest.key, manifest.fingerprint)


def _lacking(lineage: Lineage, plan_of: Callable[[Lineage, str], ArtifactPlan]) -> list[ArtifactPlan]:
    """Plans of the tasks whose scores are in force, and have nothing that was made from them."""
    tasks = [task for task in lineage.project.task_keys if task not in lineage.project.folds]
    scored = [task for task in tasks if lineage.status("influence_scores", task).state == "fresh"]
    plans = [plan_of(lineage, task) for task in scored]
    return [plan for plan in plans if (made := in_force(lineage, plan)) is None or made.inputs != dict(plan.inputs)]


def score_samples(works: Sequence[StepInputs]) -> list[StepResult]:
    """Score a sample of the pool exactly for each task, and keep an even sample of the pool's own scores."""
    lineage, project = works[0].lineage, works[0].project
    pairs = [(form, rule) for form in project.gradients.forms for rule in certified_rules(project)]
    drawn, checkpoints = {work.partition: _draw_near_cuts(work) for work in works}, list(checkpoint_weights(lineage))
    exactly = Measurement(
        certificate_plan,
        MEASURED,
        [exact_column(*pair, checkpoint) for pair in pairs for checkpoint in checkpoints],
        {task: measured_with(lineage, task, checkpoints) for task in drawn},
        _score_exactly,
    )
    measured = exactly.of(works, {task: sample for task, (sample, _) in drawn.items()})
    results = []
    for work in works:
        (sample, pool_rows), (values, units) = drawn[work.partition], measured[work.partition]
        write_parquet(work.folder, MEASURED, values)
        exact = {
            score_column(*pair): {name: score_matrix(values[exact_column(*pair, name)]) for name in checkpoints}
            for pair in pairs
        }
        key = exactly.measured_with[work.partition]
        summary = _store_certificate(work, sample, exact) | {"pool_rows": pool_rows, "measured_with": key}
        results.append(StepResult(summary, units=units))
    return results


def exact_column(form: str, rule: str, checkpoint: str) -> str:
    """Name of the exact scores at a checkpoint in `MEASURED`."""
    return f"{score_column(form, rule)}.{checkpoint}"


def _score_exactly(work: StepInputs, samples: Samples) -> tuple[dict[str, pl.DataFrame], dict[str, float]]:
    """Exact scores of rows at every checkpoint, and the tokens that went through the model for each task."""
    forms, rules = work.project.gradients.forms, certified_rules(work.project)
    exact = score_rows_exactly(work, samples, forms=forms, rules=rules, known_norms=True)
    tables = {
        task: samples[task].select(
            "example_id",
            *(
                pl.Series(exact_column(*pair, checkpoint), scores, pl.Array(pl.Float32, len(scored.labels)))
                for pair, at_checkpoint in scored.scores.items()
                for checkpoint, scores in at_checkpoint.items()
            ),
        )
        for task, scored in exact.items()
    }
    return tables, {task: scored.tokens for task, scored in exact.items()}


def _store_certificate(
    work: StepInputs, sample: pl.DataFrame, exact: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, Any]:
    """Store both scores of a sample, and sum up; `exact` is score column -> checkpoint -> float32 (n, J)."""
    weights = checkpoint_weights(work.lineage)
    certified = _both_scores(sample, {column: weighted_total(scores, weights) for column, scores in exact.items()})
    if certified.is_empty():
        raise LessAssetsError(
            "None of the sampled rows has a gradient any more, although all had one when features were extracted.",
            where=f"influence_scores {work.partition}",
            fix="run `less-assets run --verify`",
        )
    write_parquet(work.folder, SAMPLE, certified)
    return {
        "rows": certified.height,
        "cosine_error": {column: _cosine_error(sample, column, scores) for column, scores in exact.items()},
        "theory": work.project.gradients.dimension**-0.5,
    }


def _draw_near_cuts(work: StepInputs) -> tuple[pl.DataFrame, int]:
    """A task's sample, more of it near the cuts than elsewhere; and how many rows the pool has."""
    lineage, task, settings = work.lineage, work.partition, work.project.gradients
    columns = [score_column(form, rule) for form in settings.forms for rule in certified_rules(work.project)]
    even, pool_rows = even_sample(lineage, task, ["source", "loss_tokens", *columns])
    inclusion = inclusion_near(cuts_of(lineage, task, even, pool_rows), even)
    write_parquet(work.folder, POOL, even.with_columns(inclusion=inclusion(even)))
    return draw_sample(lineage, task, settings.certificate_rows, inclusion), pool_rows


@dataclass(frozen=True)
class Cut:
    """Where a recipe stops taking rows in one order, if its budget were `NEAR_DEPTH` times as large.

    Attributes:
        column: The score column that it ranks by.
        queue: The order.
        score: The lowest score taken.
    """

    column: str
    queue: Queue
    score: float


def cuts_of(lineage: Lineage, task: str, even: pl.DataFrame, pool_rows: int) -> list[Cut]:
    """The cuts of all recipes that a certificate is about, from an even sample of the pool."""
    cuts = []
    for recipe in certified_recipes(lineage.project):
        column = score_column(str(recipe.form), str(recipe.subtask))
        share = budget_share(lineage, recipe, even["loss_tokens"], pool_rows)
        rows = round(NEAR_DEPTH * (recipe.candidates or 1) * share * even.height)
        queues = recipe_queues(lineage, recipe, task)
        selected = select_from_sample(score_matrix(even[column]), queues, min(even.height, max(1, rows)))
        taken = ((queue, queue.taken(selected)["score"].min()) for queue in queues)
        cuts += [Cut(column, queue, float(score)) for queue, score in taken if score is not None]  # type: ignore[arg-type]
    return cuts


def inclusion_near(cuts: list[Cut], even: pl.DataFrame) -> Inclusion:
    """The chance to be sampled, against one drawn evenly: a table with score columns to float64 (n,)."""

    def near(table: pl.DataFrame) -> np.ndarray:
        scores = {cut.column: score_matrix(table[cut.column]) for cut in cuts}
        return np.any([cut.queue.scores(scores[cut.column]) >= cut.score for cut in cuts], axis=0)

    share_near = float(near(even).mean())
    return lambda table: (1 - NEAR_SHARE) + NEAR_SHARE * near(table) / share_near


def _both_scores(sample: pl.DataFrame, exact: dict[str, np.ndarray]) -> pl.DataFrame:
    """The sample's rows with their sketched and exact scores, without those that have no exact one."""
    both = sample.select(
        "example_id",
        "source",
        "shard",
        "row",
        "loss_tokens",
        "inclusion",
        *(pl.col(column).alias(f"sketched.{column}") for column in exact),
        *(
            pl.Series(f"exact.{column}", scores, pl.Array(pl.Float32, scores.shape[1]))
            for column, scores in exact.items()
        ),
    )
    return both.filter(pl.Series(np.isfinite(np.stack(list(exact.values()))).all(axis=(0, 2))))


def _cosine_error(sample: pl.DataFrame, column: str, exact: Mapping[str, np.ndarray]) -> float:
    """Root mean square error of a column's sketched cosines, over rows, subtasks and checkpoints."""
    squares = [
        np.nanmean(np.square(score_matrix(sample[f"{column}.{checkpoint}"]) - scores, dtype=np.float64))
        for checkpoint, scores in exact.items()
    ]
    return float(np.sqrt(np.mean(squares)))


def draw_sample(lineage: Lineage, task: str, rows: int, inclusion: Inclusion = _alike) -> pl.DataFrame:
    """A sample of the pool's scored rows with all their scores and their `inclusion`, in the pool's order.

    It is the rows with the lowest keyed hash of their id, each divided by its inclusion (Rosén 1997, sequential Poisson
    sampling): the same ones however the pool is cut into shards.
    """
    drawn: pl.DataFrame | None = None
    for table in _scored_rows(lineage, task):
        keyed = table.with_columns(
            hash=pl.Series(list(map(_hash, table["example_id"])), dtype=pl.UInt64), inclusion=inclusion(table)
        ).with_columns(order=pl.col("hash") / pl.col("inclusion"))
        drawn = (keyed if drawn is None else pl.concat([drawn, keyed])).sort("order", "hash").head(rows)
    assert drawn is not None
    return drawn.sort("shard", "row")


def even_sample(lineage: Lineage, task: str, columns: list[str]) -> tuple[pl.DataFrame, int]:
    """Some columns of every row of a small pool, of every m-th scored row of a large one; and how many there are."""
    step = max(1, -(-lineage.summary("influence_scores", task)["scored"] // POOL_SAMPLE))
    kept: list[pl.DataFrame] = []
    seen = 0
    for table in _scored_rows(lineage, task, columns):
        kept.append(table.gather_every(step, offset=-seen % step).select(columns))
        seen += table.height
    return pl.concat(kept), seen


def _scored_rows(lineage: Lineage, task: str, columns: list[str] | None = None) -> Iterator[pl.DataFrame]:
    """The rows that can be selected, shard by shard; all columns by default."""
    folder = lineage.folder("influence_scores", task)
    index = PoolIndex(lineage)
    wanted = None if columns is None else ["shard", "row", "status", *columns]
    for shard in lineage.shards():
        canonical = index.shard(shard, ["row", "canonical"])
        table = read_parquet(folder, score_file(shard), wanted).join(canonical, on="row", how="left")
        yield table.filter((pl.col("status") == "ok") & pl.col("canonical").fill_null(False))


def _hash(example_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(example_id.encode(), digest_size=8, key=SALT).digest(), "big")


def recipe_fidelity(
    lineage: Lineage, folder: ArtifactFolder, recipe: ResolvedRecipe, task: str
) -> RecipeFidelity | None:
    """What a certificate says of a recipe, on the pool's even sample; None if it does not cover the recipe's scores."""
    from less_assets.method.selection.fidelity import QueueFidelity, judge, spearman

    sample = scored_sample(folder, recipe)
    if sample is None:
        return None
    queues = recipe_queues(lineage, recipe, task)
    even = read_parquet(folder, POOL)
    share = budget_share(lineage, recipe, even["loss_tokens"], sample.pool_rows)
    selected = select_from_sample(sample.pool, queues, max(1, round(share * len(sample.pool))))
    rows = even.select("source", "loss_tokens")[selected["example_id"].cast(pl.Int64)]
    judged = judge(sample, queues, selected.hstack(rows))
    sketched, exact = queues[0].scores(sample.sketched), queues[0].scores(sample.exact)
    best_sketched, best_exact = (_over_queues(queues, array) for array in (sample.sketched, sample.exact))
    taken = queues[0].taken(selected)
    cut = float(taken["score"].min()) if taken.height else float(sketched.max())  # type: ignore[arg-type]
    pool = queues[0].scores(sample.pool)
    share_above = max(float((pool >= cut).mean()), 1 / len(pool))
    bands = [band for band in judged.bands if band is not None]
    inclusion = read_parquet(folder, SAMPLE, ["inclusion"])["inclusion"].to_numpy()
    return RecipeFidelity(
        recipe.key,
        spearman(best_sketched, best_exact, 1 / inclusion),
        judged.overlap,
        judged.certain / selected.height,
        max(bands) if bands else None,
        (sketched, exact, (cut, QueueFidelity(sample, queues[0], cut).exact_cut(share_above))),
    )


def _over_queues(queues: list[Queue], array: np.ndarray) -> np.ndarray:
    """One score a row: the best over the recipe's orders."""
    return np.max([queue.scores(array) for queue in queues], axis=0)


def budget_share(lineage: Lineage, recipe: ResolvedRecipe, loss_tokens: pl.Series, pool_rows: int) -> float:
    """The share of the pool's rows that a budget takes; for tokens, at the pool's mean length."""
    budget = budget_of(lineage, recipe)
    mean: Any = loss_tokens.mean()
    rows = budget.amount / mean if budget.kind == "tokens" else budget.amount
    return min(1.0, max(1.0, rows) / pool_rows)


def measure_steps(works: Sequence[StepInputs]) -> list[StepResult]:
    """Take a true optimizer step on each of a few random rows, at the checkpoint that weighs most."""
    from less_assets.method.selection.fidelity import pearson, spearman

    lineage, settings = works[0].lineage, works[0].project.gradients
    checkpoint, rate = _heaviest(lineage)
    predictors = ["predicted", *(f"cosine.{form}" for form in settings.forms)]
    samples = {work.partition: draw_sample(lineage, work.partition, settings.real_step_rows) for work in works}
    keys = {task: measured_with(lineage, task, [checkpoint], rate, STEP_TARGETS) for task in samples}
    measured = Measurement(steps_plan, STEPS, ["real", *predictors], keys, _take_steps).of(works, samples)
    results = []
    for work in works:
        values, units = measured[work.partition]
        rows = samples[work.partition].select("example_id", "source")
        write_parquet(work.folder, STEPS, rows.join(values, on="example_id", maintain_order="left"))
        real = values["real"].to_numpy()
        agreement = {
            name: {
                "pearson": _number(pearson(values[name].to_numpy(), real)),
                "spearman": _number(spearman(values[name].to_numpy(), real)),
            }
            for name in predictors
        }
        summary = {
            "checkpoint": checkpoint,
            "learning_rate": rate,
            "rows": values.height,
            "target_examples": len(_looked_at(work, work.partition)),
            "agreement": agreement,
            "measured_with": keys[work.partition],
        }
        results.append(StepResult(summary, units=units))
    return results


def _heaviest(lineage: Lineage) -> tuple[str, float]:
    """The checkpoint that weighs most, and its mean learning rate."""
    rates = mean_learning_rates(lineage)
    return max(rates.items(), key=lambda item: item[1])


def _looked_at(work: StepInputs, task: str) -> list[Any]:
    """The target examples whose loss is looked at: at most `STEP_TARGETS`, from all over."""
    targets, _ = encode_targets(work, task)
    return targets[:: -(-len(targets) // STEP_TARGETS)]


def _take_steps(work: StepInputs, samples: Samples) -> tuple[dict[str, pl.DataFrame], dict[str, float]]:
    """What a step on each row does to the loss of each task, and the tokens of rows and targets."""
    from less_assets.method.selection.fidelity import step_effects

    settings = work.project.gradients
    checkpoint, rate = _heaviest(work.lineage)
    loaded = work.models.checkpoint(work.lineage, checkpoint)
    rows = pl.concat([sample.select("example_id", "shard", "row") for sample in samples.values()]).unique()
    rows = rows.sort("shard", "row")
    examples = encode_rows(work, rows)
    targets = {task: _looked_at(work, task) for task in samples}
    longest = max(len(example.input_ids) for part in (examples, *targets.values()) for example in part)
    effects = step_effects(
        loaded.model,
        examples,
        targets,
        forms=settings.forms,
        moments=loaded.moments,
        learning_rate=rate,
        batching=loaded.batching(settings, longest),
        on_progress=work.progress(len(examples), "steps"),
    )
    tables = {
        task: rows.select("example_id").with_columns(
            real=pl.Series(effect.real),
            predicted=pl.Series(effect.predicted),
            **{f"cosine.{form}": pl.Series(values) for form, values in effect.cosines.items()},
        )
        for task, effect in effects.items()
    }
    steps = len(examples)
    return tables, {task: steps * total_tokens(targets[task]) + total_tokens(examples) for task in samples}


def _number(value: float) -> float | None:
    """What JSON can hold: a correlation with a constant is not a number."""
    return value if np.isfinite(value) else None


def certified_on(lineage: Lineage, folder: ArtifactFolder, task: str) -> list[RecipeFidelity]:
    """What a certificate says of each recipe that it covers."""
    fidelities = [recipe_fidelity(lineage, folder, recipe, task) for recipe in certified_recipes(lineage.project)]
    return [fidelity for fidelity in fidelities if fidelity is not None]


def certificate_work(workload: Workload, due: Mapping[str, Sequence[str | None]]) -> Amount:
    """Tokens of certificates and of real steps.

    Args:
        workload: Counts rows and tokens.
        due: `CERTIFICATE`, `REAL_STEPS` -> the tasks whose scores still need it; both may be missing.
    """
    settings, checkpoints = workload.project.gradients, len(workload.project.checkpoints)
    tokens = {CERTIFICATE: 0.0, REAL_STEPS: 0.0}
    for task in due.get(CERTIFICATE, ()):
        sample = min(settings.certificate_rows, workload.pool_rows) * workload.row_tokens
        target_tokens = workload.target_sizes[str(task)][1]
        tokens[CERTIFICATE] += checkpoints * len(certified_rules(workload.project)) * (sample + target_tokens)
    for task in due.get(REAL_STEPS, ()):
        examples, target_tokens, _ = workload.target_sizes[str(task)]
        looked_at = target_tokens / max(1, -(-examples // STEP_TARGETS))
        tokens[REAL_STEPS] += min(settings.real_step_rows, workload.pool_rows) * (looked_at + workload.row_tokens)
    loads = checkpoints * len(due.get(CERTIFICATE, ())) + len(due.get(REAL_STEPS, ()))
    return Amount(
        units={name: amount for name, amount in tokens.items() if amount}, tokens=sum(tokens.values()), loads=loads
    )
