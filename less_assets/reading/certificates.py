"""How far a selection can be trusted: reading the certificate that a check of `influence_scores` has left.

Belongs here: where certificates lie, when one counts or is due, and what it says of a selection; for whoever shows
selections. Not here: making one (`steps/certificates.py`) and the mathematics (`method/selection/fidelity.py`).

A certificate is no asset: nothing is computed from it, and a selection without one is as good. It is stored like an
artifact, and counts only while the scores that it was made for are in force.
"""

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import polars as pl
from pydantic import JsonValue

from less_assets.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError
from less_assets.lineage.lineage import Lineage, split
from less_assets.lineage.plan import ArtifactPlan
from less_assets.method.selection.ranking import score_matrix
from less_assets.project.project import Project
from less_assets.project.recipes import ResolvedRecipe
from less_assets.reading.scores import recipe_queues
from less_assets.store.artifacts import ArtifactFolder
from less_assets.store.tables import read_parquet

if TYPE_CHECKING:
    from less_assets.method.selection.fidelity import Judgement, ScoredSample

CERTIFICATE, REAL_STEPS = "fidelity_certificate", "real_steps"
CERTIFICATES = "certificates"
"""What runs and plans call the two together: a stage after the models, with the tasks as its partitions."""
SAMPLE, POOL, STEPS, MEASURED = "sample.parquet", "pool.parquet", "steps.parquet", "measured.parquet"


def certified_recipes(project: Project) -> list[ResolvedRecipe]:
    """The recipes whose selections a certificate is about."""
    return [recipe for recipe in project.recipe_keys.values() if recipe.ranks_by_influence]


def certified_rules(project: Project) -> list[str]:
    """The subtask rules that these recipes use."""
    return sorted({str(recipe.subtask) for recipe in certified_recipes(project)})


def certificate_plan(lineage: Lineage, task: str) -> ArtifactPlan:
    """What a task's certificate is made from.

    Raises:
        MissingArtifactError, StaleArtifactError: The scores are not there, or not those in force.
    """
    rules = certified_rules(lineage.project)
    settings: dict[str, JsonValue] = {"rows": lineage.project.gradients.certificate_rows, "rules": [*rules]}
    # More rows are sampled around the recipes' cuts than elsewhere.
    settings["cuts"] = [*sorted(map(_cut_settings, certified_recipes(lineage.project)))]
    folder = f"selection/{task}/fidelity"
    return ArtifactPlan(CERTIFICATE, task, folder, folder, settings, lineage.version("influence_scores", task))


def _cut_settings(recipe: ResolvedRecipe) -> str:
    """What decides where a recipe's cut lies."""
    budget = f"{recipe.budget.unit} {recipe.budget.amount}" if recipe.budget else ""
    return f"{recipe.form} {recipe.subtask} {recipe.aggregate} {budget} {recipe.candidates}"


def steps_plan(lineage: Lineage, task: str) -> ArtifactPlan:
    """What the comparison of predicted with real influence on a task is made from; raises as `certificate_plan`."""
    folder = f"selection/{task}/real_steps"
    settings: dict[str, JsonValue] = {"rows": lineage.project.gradients.real_step_rows}
    return ArtifactPlan(REAL_STEPS, task, folder, folder, settings, lineage.version("influence_scores", task))


def read_certificate(lineage: Lineage, task: str) -> ArtifactFolder | None:
    """The certificate of the scores in force; None if there is none, or a damaged one: no run makes those again."""
    try:
        plan = certificate_plan(lineage, task)
        manifest = lineage.store.current(plan.pointer)
        # One that was made with other settings still says the truth about what it covers.
        if manifest is None or manifest.inputs != dict(plan.inputs):
            return None
        folder = lineage.store.artifact(manifest.key, manifest.fingerprint)
        folder.verify()
    except (MissingArtifactError, StaleArtifactError, CorruptArtifactError):
        return None
    return folder


def certified_tasks(project: Project, tasks: Iterable[str | None]) -> list[str]:
    """Those of some tasks whose scores get a certificate, or a comparison with real steps: folds get none.

    Args:
        project: Says whether it asks for any.
        tasks: Partitions of `influence_scores`.
    """
    gradients = project.gradients
    if not gradients.real_step_rows and not (gradients.certificate_rows and certified_recipes(project)):
        return []
    return [str(task) for task in tasks if task not in project.folds]


def asked_plans(lineage: Lineage, task: str) -> list[ArtifactPlan]:
    """The certificate and the comparison with real steps of a task, as far as the project asks for them."""
    if not certified_tasks(lineage.project, [task]):
        return []
    gradients, plans = lineage.project.gradients, []
    if gradients.certificate_rows and certified_recipes(lineage.project):
        plans.append(certificate_plan(lineage, task))
    if gradients.real_step_rows:
        plans.append(steps_plan(lineage, task))
    return plans


def is_due(lineage: Lineage, task: str, scored: Collection[str | None]) -> bool:
    """Whether a run makes a task's certificate: it has scored the task itself, or nothing has certified its scores.

    Another budget alone makes none: the one there still says the truth.
    """
    return task in scored or lacks_certificate(lineage, task)


def lacks_certificate(lineage: Lineage, task: str) -> bool:
    """Whether a certificate, or a comparison with real steps, that the project asks for was never made.

    They are made after the models: a run that was killed before leaves none, nor does one without extras.
    """
    try:
        stored = [(lineage.store.current(plan.pointer), dict(plan.inputs)) for plan in asked_plans(lineage, task)]
    except CorruptArtifactError:
        return False
    return any(manifest is None or manifest.inputs != inputs for manifest, inputs in stored)


def judge_selection(lineage: Lineage, key: str, selected: pl.DataFrame) -> "Judgement | None":
    """The chance of each selected row to be selected by exact scores, too, and whether it is certain or borderline.

    Args:
        lineage: The project's lineage.
        key: Partition key `recipe|task`.
        selected: The subset as stored (`subset.parquet`).

    Returns:
        None if the recipe does not select by influence, or no certificate covers its scores.
    """
    from less_assets.method.selection.fidelity import judge

    recipe_key, task = split(key)
    recipe = lineage.project.recipe(recipe_key)
    if not recipe.ranks_by_influence or (folder := read_certificate(lineage, task)) is None:
        return None
    sample = scored_sample(folder, recipe)
    if sample is None or selected.is_empty():
        return None
    return judge(sample, recipe_queues(lineage, recipe, task), selected, candidates=recipe.candidates)


def scored_sample(folder: ArtifactFolder, recipe: ResolvedRecipe) -> "ScoredSample | None":
    """The certificate's scores of a recipe's form and subtask rule; None if it does not cover these, or by too few."""
    from less_assets.method.selection.fidelity import FEWEST, ScoredSample, row_traits

    sample, pool = read_parquet(folder, SAMPLE), read_parquet(folder, POOL)
    column = f"{recipe.form}.{recipe.subtask}"
    if column not in pool.columns or sample.height < FEWEST:
        return None
    arrays = (
        score_matrix(sample[f"sketched.{column}"]),
        score_matrix(sample[f"exact.{column}"]),
        score_matrix(pool[column]),
    )
    rows: Any = folder.manifest().summary["pool_rows"]
    if "inclusion" not in pool.columns:  # made when all rows were sampled alike
        return ScoredSample(*arrays, pool_rows=int(rows))
    traits_of = row_traits(pool)
    return ScoredSample(
        *arrays,
        pool_rows=int(rows),
        inclusion=pool["inclusion"].to_numpy(),
        traits=traits_of(sample),
        pool_traits=traits_of(pool),
        traits_of=traits_of,
    )
