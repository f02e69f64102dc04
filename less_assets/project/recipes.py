"""Recipes as the rest of the code reads them: defaults filled in, one for each recipe key.

Belongs here: what one key of the recipe axis stands for. What a recipe may say in the file is `sections.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

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

TRIAL_SEEDS = (0, 1)
"""Seeds of pilots where the file names none."""
PREFILTER = "prefilter"
"""Key of the prefilter on the recipe axis, where it has scores as a recipe has."""


@dataclass(frozen=True)
class Budget:
    """How much to select: `amount` of `unit`."""

    unit: Unit
    amount: float | int


@dataclass(frozen=True)
class Tournament:
    """How a recipe chooses among others: by pilots, small trials of each.

    Attributes:
        candidates: Names of the recipes, as the file lists them.
        pilot: Share of the budget that a pilot selects.
        seeds: Seeds of the pilots' trainings and draws, at least two.
    """

    candidates: tuple[str, ...]
    pilot: float
    seeds: tuple[int, ...]


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
        tournament: Which recipes it chooses among, and how; None for other strategies than `tournament`.
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
    tournament: Tournament | None

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
    rescored = recipe.rescore == "exact"
    for seed in recipe.seeds if strategy.draws else [None]:
        yield ResolvedRecipe(
            key=recipe.name if seed is None else f"{recipe.name}-seed{seed}",
            name=recipe.name,
            strategy=recipe.strategy,
            budget=budget,
            form=(recipe.form or ("marginal" if "marginal" in forms else forms[0])) if strategy.reads("form") else None,
            subtask=recipe.subtask if strategy.reads("subtask") else None,
            aggregate=recipe.aggregate if strategy.has_subtasks else None,
            candidates=recipe.candidates if isinstance(recipe.candidates, float) and rescored else None,
            seed=seed,
            keep=recipe.keep if strategy.reads("keep") else None,
            match=recipe.match,
            near_duplicates=recipe.near_duplicates,
            quotas=recipe.quotas or {},
            model=recipe.model,
            mix=recipe.mix,
            damping=recipe.damping if recipe.precondition == "pool" else None,
            scores_file=recipe.scores,
            tournament=_tournament(recipe) if strategy.holds_tournament else None,
        )


def _tournament(recipe: Recipe) -> Tournament:
    names = recipe.candidates if isinstance(recipe.candidates, list) else []
    return Tournament(tuple(names), recipe.pilot, tuple(recipe.seeds if recipe.given("seeds") else TRIAL_SEEDS))


@dataclass(frozen=True)
class Pilot:
    """A small trial of a candidate of a tournament: rows, a model trained on them, and what it loses.

    Attributes:
        key: Its key on the pilot axis.
        tournament: Key of the recipe that holds the tournament.
        candidate: Name of the candidate.
        seed: Seed of the training, and of the draw if the candidate draws.
        recipe: What selects its rows; its `key` is the candidate's, whose scores it reads.
    """

    key: str
    tournament: str
    candidate: str
    seed: int
    recipe: ResolvedRecipe


def candidates_of(tournament: ResolvedRecipe, recipes: Sequence[ResolvedRecipe]) -> dict[str, ResolvedRecipe]:
    """The candidates of a tournament by name, each with the whole budget of the tournament, one at random among them.

    Of a recipe with several seeds the first one stands. Where the list has no recipe with strategy `random`, the
    project's first one is added, or a plain one.

    Args:
        tournament: The recipe that holds it.
        recipes: All recipes of the project.
    """
    assert tournament.tournament is not None
    first = {recipe.name: recipe for recipe in reversed(recipes)}
    chosen = [first[name] for name in tournament.tournament.candidates if name in first]
    if not any(recipe.strategy == "random" for recipe in chosen):
        plain = replace(tournament, key="random", name="random", strategy="random", seed=0, tournament=None)
        chosen.append(next((recipe for recipe in recipes if recipe.strategy == "random"), plain))
    return {recipe.name: replace(recipe, budget=tournament.budget, model=None) for recipe in chosen}


def pilots_of(tournament: ResolvedRecipe, recipes: Sequence[ResolvedRecipe]) -> Iterator[Pilot]:
    """The pilots of a tournament: of each candidate one for each seed."""
    held, budget = tournament.tournament, tournament.budget
    assert held is not None
    assert budget is not None
    share = budget.amount * held.pilot
    smaller = Budget(budget.unit, share if budget.unit == "fraction" else max(1, round(share)))
    for name, recipe in candidates_of(tournament, recipes).items():
        for seed in held.seeds:
            drawn = seed if recipe.traits.draws else recipe.seed
            key = f"{tournament.key}.pilot-{name}-seed{seed}"
            yield Pilot(key, tournament.key, name, seed, replace(recipe, budget=smaller, seed=drawn))
