"""What fine-tuning costs against selecting, in compute, for each recipe of a plan; and what would select for less.

Belongs here: the ratio and the alternatives, from the plan's own amounts of work. Not here: time (`estimate.py`), words
(`inspection/plan_words.py`).

Compute is counted in forward passes of the selecting model over one token; a backward pass through activations counts
as one more, since the base model's own weights need no gradient. What recipes share, such as the gradients of the pool,
counts in full for each, whatever of it is stored already: the question is what a selection costs, not what is left of
it. Where the same compute is better spent on more rows, chosen more cheaply: Yin and Rush 2024, "Compute-Constrained
Data Selection" (arXiv 2410.16208); gradients paid there from a trained model ten times larger than the selecting one.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from less_assets.compute.models import ModelLoader
from less_assets.compute.workload import Workload
from less_assets.lineage.lineage import Lineage, split
from less_assets.project.project import Project
from less_assets.steps.registry import ASSETS

ENOUGH = 10.0
"""Ratio from which on the selection's cost matters little."""
_CLEARLY_LESS = 0.95
"""Share of a selection's cost that another way may have to count as cheaper."""
Partitions = Mapping[str, set[str | None]]


@dataclass(frozen=True)
class CostRatio:
    """What a recipe's fine-tuning costs against its selection.

    Attributes:
        recipe: Key of the recipe.
        selection: Compute of the selection, forward passes over a token.
        training: Compute of the fine-tuning in the same unit; None where the size of the recipe's model is not known.
        cheaper: Strategy -> the ratio it would have, for those that select for less; infinite if no model is needed.
    """

    recipe: str
    selection: float
    training: float | None
    cheaper: Mapping[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """How many times what the selection costs the fine-tuning does."""
        return None if self.training is None else self.training / self.selection

    @property
    def is_low(self) -> bool:
        """Whether a cheaper way to select is worth a thought."""
        return self.ratio is not None and self.ratio < ENOUGH


def cost_ratios(
    workload: Workload, lineage: Lineage, models: ModelLoader, trained: Iterable[str | None]
) -> list[CostRatio]:
    """The ratio of each recipe that needs a model to select, in the order of the project file.

    Args:
        workload: Counts tokens.
        lineage: The plans as they would stand after the run.
        models: Knows how large models are.
        trained: Partitions of `finetuned_model` that the request needs.
    """
    by_recipe: dict[str, list[str]] = {}
    for key in map(str, trained):
        by_recipe.setdefault(split(key)[0], []).append(key)
    return [
        _ratio(workload, lineage, models, recipe, by_recipe[recipe], selection)
        for recipe in lineage.project.recipe_keys
        if recipe in by_recipe
        and (selection := _compute(workload, lineage, _made_from(lineage, "selected_subset", by_recipe[recipe])))
    ]


def _ratio(
    workload: Workload, lineage: Lineage, models: ModelLoader, recipe: str, keys: list[str], selection: float
) -> CostRatio:
    times_larger = _times_larger(models, lineage.project, recipe)
    if times_larger is None:
        return CostRatio(recipe, selection, None)
    training = times_larger * _compute(workload, lineage, {"finetuned_model": set(keys)})
    others = _other_selections(workload, [split(key)[1] for key in keys])
    cheaper = {
        strategy: training / cost if cost else math.inf
        for strategy, cost in others.items()
        if cost < _CLEARLY_LESS * selection
    }
    return CostRatio(recipe, selection, training, cheaper)


def _times_larger(models: ModelLoader, project: Project, recipe: str) -> float | None:
    """How many times larger the model is that a recipe trains than the one that selects."""
    other = project.recipe(recipe).model
    if other is None:
        return 1.0
    sizes = models.parameters(other), models.parameters(project.model.base)
    return None if sizes[0] is None or sizes[1] is None else sizes[0] / sizes[1]


def _made_from(lineage: Lineage, asset: str, keys: Iterable[str | None]) -> Partitions:
    """Everything that partitions of an asset are made from, directly or not, by asset."""
    reached: dict[str, set[str | None]] = {}
    waiting = [(asset, key) for key in keys]
    while waiting:
        name, partition = waiting.pop()
        declared = ASSETS[name]
        for read in declared.inputs:
            known = reached.setdefault(read.asset, set())
            upstream = ASSETS[read.asset].read(
                lineage.project, declared, read, declared.keys(partition), lineage.keys_of
            )
            new = {key for key in upstream if not lineage.is_left_out(read.asset, key)} - known
            known |= new
            waiting += [(read.asset, key) for key in new]
    return reached


def _compute(workload: Workload, lineage: Lineage, partitions: Partitions) -> float:
    """Forward passes over a token that some partitions take in all; equal work counts once."""
    total = 0.0
    for name, keys in partitions.items():
        asset = ASSETS[name]
        if asset.passes and asset.amount and keys:
            distinct = {lineage.plan(name, key).fingerprint: str(key) for key in sorted(keys, key=str)}
            total += asset.passes * asset.amount(workload, list(distinct.values())).tokens
    return total


def _other_selections(workload: Workload, tasks: list[str]) -> dict[str, float]:
    """What other strategies would cost for some tasks, cheapest last."""
    pool = workload.tokens(workload.lineage.pool_files.shards)
    targets = sum(workload.target_sizes[task][1] for task in tasks)
    epochs = workload.project.target_tuning.epochs
    return {
        "target_tuned": (1 + len(tasks)) * pool + 2 * epochs * targets,
        "rds": pool + targets,
        "bm25": 0.0,
    }
