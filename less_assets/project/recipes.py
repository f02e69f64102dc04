"""Recipes as the rest of the code reads them: defaults filled in, one for each recipe key.

Belongs here: what one key of the recipe axis stands for. What a recipe may say in the file is `sections.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from less_assets.project.sections import (
    BUDGETS,
    Aggregate,
    Form,
    Mix,
    Perplexities,
    Recipe,
    StrategyName,
    SubtaskRule,
    Unit,
)
from less_assets.project.strategies import STRATEGIES, Strategy

PREFILTER = "prefilter"
"""Key of the prefilter on the recipe axis, where it has scores as a recipe has."""


@dataclass(frozen=True)
class Budget:
    """How much to select: `amount` of `unit`."""

    unit: Unit
    amount: float | int


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe with defaults filled in and seeds written out; what one recipe key stands for.

    Attributes:
        key: Partition key.
        name: Name in the file; recipes of several seeds share it.
        strategy: How to choose.
        budget: None for `full` and `none`.
        form: Direction form; None unless the strategy is `less`, as the next.
        subtask: Influence on a subtask.
        aggregate: How subtasks make one ranking; None where there is one score only.
        candidates: Candidates for exact rescoring as a multiple of the budget; None: no rescoring.
        seed: Seed of the draw; None for strategies that draw nothing.
        keep: Rows to keep by perplexity; None for other strategies.
        match: Key of the recipe whose lengths are matched; None: those of the targets, or another strategy.
        near_duplicates: Cosine from which a row is passed over; None: never.
        quotas: Largest share of the budget by source; empty: no limits.
        model: Model to fine-tune instead of the project's.
        mix: Share of the budget that is drawn at random; None: nothing is.
        damping: Damping of the pool's covariance; None: target directions are not preconditioned.
        scores_file: File of scores; None for other strategies than `external`.
    """

    key: str
    name: str
    strategy: StrategyName
    budget: Budget | None
    form: Form | None
    subtask: SubtaskRule | None
    aggregate: Aggregate | None
    candidates: float | None
    seed: int | None
    keep: Perplexities | None
    match: str | None
    near_duplicates: float | None
    quotas: Mapping[str, float]
    model: str | None
    mix: Mix | None
    damping: float | None
    scores_file: str | None

    @property
    def traits(self) -> Strategy:
        """The strategy's entry in the table of strategies."""
        return STRATEGIES[self.strategy]

    @property
    def ranks_by_influence(self) -> bool:
        """Whether the rows with the highest influence are taken, so that there is a cut: not so where they match."""
        return self.scores == "influence" and self.aggregate != "match"

    @property
    def scores(self) -> str | None:
        """Scores of the pool that the recipe ranks by; None: it ranks by none."""
        return "preconditioned" if self.damping is not None else self.traits.scores


def resolve(recipe: Recipe, forms: Sequence[Form]) -> Iterator[ResolvedRecipe]:
    """What the keys of a recipe stand for: one for each seed, or one.

    Args:
        recipe: The recipe, as the file has it.
        forms: Direction forms that the project stores, at least one.
    """
    strategy = STRATEGIES[recipe.strategy]
    amounts = {unit: getattr(recipe, unit) for unit in BUDGETS}
    budget = next((Budget(unit, amount) for unit, amount in amounts.items() if amount is not None), None)
    for seed in recipe.seeds if strategy.draws else [None]:
        yield ResolvedRecipe(
            key=recipe.name if seed is None else f"{recipe.name}-seed{seed}",
            name=recipe.name,
            strategy=recipe.strategy,
            budget=budget,
            form=(recipe.form or ("marginal" if "marginal" in forms else forms[0])) if strategy.reads("form") else None,
            subtask=recipe.subtask if strategy.reads("subtask") else None,
            aggregate=recipe.aggregate if strategy.has_subtasks else None,
            candidates=recipe.candidates if recipe.rescore == "exact" else None,
            seed=seed,
            keep=recipe.keep if strategy.reads("keep") else None,
            match=recipe.match,
            near_duplicates=recipe.near_duplicates,
            quotas=recipe.quotas or {},
            model=recipe.model,
            mix=recipe.mix,
            damping=recipe.damping if recipe.precondition == "pool" else None,
            scores_file=recipe.scores,
        )
