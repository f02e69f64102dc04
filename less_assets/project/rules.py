"""Rules between the sections of a project file: names that must exist, be unique, or be of the right kind.

Belongs here: what concerns several sections. Rules between keys of one section stand with it in `sections.py`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from less_assets.project.keys import BrokenRule, Section, nearest
from less_assets.project.recipes import PREFILTER, resolve
from less_assets.project.sections import Gradients, Prefilter, Recipe, Source
from less_assets.project.strategies import STRATEGIES
from less_assets.project.task_sections import Task
from less_assets.project.yaml_file import KeyPath

SomeSection = TypeVar("SomeSection", bound=Section)


def rules_between_sections(data: Mapping[str, object], context: dict[str, Path]) -> Iterator[BrokenRule]:
    """Rules that concern several sections, checked on all parts that are valid by themselves."""
    pool = data.get("pool")
    sources = _valid_parts(Source, pool.get("sources") if isinstance(pool, dict) else None, context)
    tasks = _valid_parts(Task, data.get("tasks"), context)
    recipes = _valid_parts(Recipe, data.get("recipes"), context)
    gradients = _valid_parts(Gradients, [data.get("gradients", {})], context)
    yield from _taken(("pool", "sources"), [(index, source.name) for index, source in sources.items()], "source")
    yield from _taken(("tasks",), [(index, task.name) for index, task in tasks.items()], "task")
    yield from _taken(("recipes",), [(index, recipe.name) for index, recipe in recipes.items()], "recipe")
    distinct = {recipe.name: index for index, recipe in reversed(recipes.items())}.values()
    keys = [(index, resolved.key) for index in sorted(distinct) for resolved in resolve(recipes[index], ["adamw"])]
    yield from _taken(("recipes",), keys, "recipe key")
    all_names = _stated("name", data.get("tasks"))
    yield from _names_of_folds(tasks)
    strategies = _stated("strategy", data.get("recipes")) | _stated("strategy", [data.get("prefilter")])
    if "target_tuning" in data and "target_tuned" not in strategies:
        what = "has no meaning: no recipe has strategy target_tuned"
        yield BrokenRule(("target_tuning",), what, "leave it out, or add such a recipe")
    groups = {task.name for task in tasks.values() if task.members}
    for index, task in tasks.items():
        for position, member in enumerate(task.members or []):
            path: KeyPath = ("tasks", index, "members", position)
            if member not in all_names:
                yield BrokenRule(path, f"there is no task {member!r}", nearest(member, sorted(all_names - {task.name})))
            elif member in groups:
                yield BrokenRule(path, f"{member!r} is a group itself", "name its members instead: groups do not nest")
    for index, recipe in recipes.items() if gradients else []:
        if recipe.form and recipe.form not in gradients[0].forms:
            yield BrokenRule(
                ("recipes", index, "form"),
                f"gradients.forms does not list {recipe.form!r}",
                f"add it there, or choose one of {', '.join(gradients[0].forms)}",
            )
    stated = _stated("name", pool.get("sources") if isinstance(pool, dict) else None)
    named = _stated("name", data.get("recipes"))
    yield from _names_in_recipes(recipes, stated, named)
    yield from _tournaments(recipes, named, tasks)
    for prefilter in _valid_parts(Prefilter, [data.get("prefilter")], context).values():
        yield from _recipes_beside(prefilter, recipes)


def _names_of_folds(tasks: Mapping[int, Task]) -> Iterator[BrokenRule]:
    """A task must not be called as another one's folds are."""
    folded = {task.name for task in tasks.values() if task.validation and task.validation.folds}
    for index, task in tasks.items():
        parent, separator, number = task.name.rpartition(".fold-")
        if separator and number.isdigit() and parent in folded:
            yield BrokenRule(("tasks", index, "name"), f"is what a fold of {parent!r} is called", "choose another name")


def _recipes_beside(prefilter: Prefilter, recipes: Mapping[int, Recipe]) -> Iterator[BrokenRule]:
    """Recipes must not be called as the prefilter is, nor choose more by influence than it keeps."""
    for index, recipe in recipes.items():
        if recipe.name == PREFILTER:
            yield BrokenRule(("recipes", index, "name"), "is what the prefilter is called", "choose another name")
        by_influence = STRATEGIES[recipe.strategy].scores == "influence"
        if by_influence and recipe.fraction is not None and recipe.fraction > prefilter.keep:
            what = f"is more than the prefilter keeps, {prefilter.keep:g}"
            yield BrokenRule(("recipes", index, "fraction"), what, "keep more, several times the fraction")


def _stated(key: str, parts: object) -> set[str]:
    """What the parts of a list, valid or not, say under a key."""
    listed = parts if isinstance(parts, list) else []
    return {part[key] for part in listed if isinstance(part, dict) and isinstance(part.get(key), str)}


def _names_in_recipes(recipes: Mapping[int, Recipe], sources: set[str], names: set[str]) -> Iterator[BrokenRule]:
    """Recipes name sources and other recipes: they must exist, and be of a kind that makes sense there."""
    strategies = {recipe.name: recipe.strategy for recipe in recipes.values()}
    matchable = sorted(name for name, strategy in strategies.items() if STRATEGIES[strategy].matchable)
    for index, recipe in recipes.items():
        for name in sorted({*(recipe.quotas or {})} - sources):
            path: KeyPath = ("recipes", index, "quotas", name)
            yield BrokenRule(path, f"there is no source {name!r}", nearest(name, sorted(sources)))
        for position, name in enumerate((recipe.mix.sources if recipe.mix else None) or []):
            if name not in sources:
                path = ("recipes", index, "mix", "sources", position)
                yield BrokenRule(path, f"there is no source {name!r}", nearest(name, sorted(sources)))
        path = ("recipes", index, "match")
        if recipe.match is not None and recipe.match not in names:
            yield BrokenRule(path, f"there is no recipe {recipe.match!r}", nearest(recipe.match, matchable))
        elif recipe.match in strategies and recipe.match not in matchable:
            what = f"{recipe.match!r} has strategy {strategies[str(recipe.match)]}"
            fitting = [name for name, strategy in STRATEGIES.items() if strategy.matchable]
            yield BrokenRule(path, what, f"name a recipe with strategy {', '.join(fitting)}")


def _tournaments(recipes: Mapping[int, Recipe], names: set[str], tasks: Mapping[int, Task]) -> Iterator[BrokenRule]:
    """Tournaments name recipes that select a part of the pool, and judge their trials on examples of every task."""
    held = {index: recipe for index, recipe in recipes.items() if STRATEGIES[recipe.strategy].holds_tournament}
    by_name = {recipe.name: recipe for recipe in recipes.values()}
    fitting = [name for name, recipe in by_name.items() if _may_be_candidate(recipe)]
    for index, tournament in held.items():
        listed = tournament.candidates if isinstance(tournament.candidates, list) else []
        for position, name in enumerate(listed):
            path: KeyPath = ("recipes", index, "candidates", position)
            if name not in names and name != "random":  # which is added if it is missing
                yield BrokenRule(path, f"there is no recipe {name!r}", nearest(name, fitting))
            elif (candidate := by_name.get(name)) and not _may_be_candidate(candidate):
                what = f"{name!r} has strategy {candidate.strategy}, which selects no share of the pool by itself"
                yield BrokenRule(path, what, "leave it out")
            elif candidate and candidate.rescore == "exact" and _budget(candidate) != _budget(tournament):
                what = f"{name!r} rescores the candidates of another budget than this one"
                yield BrokenRule(path, what, "give both recipes the same budget")
        drawn = [name for name in listed if name in by_name and by_name[name].strategy == "random"]
        if not drawn and "random" in by_name and by_name["random"].strategy != "random":
            what = "a recipe that is called random and is not"
            yield BrokenRule(("recipes", index), f"there is {what}", "list one with strategy random as a candidate")
        for other, recipe in recipes.items():
            if recipe.name.startswith(f"{tournament.name}.pilot-"):
                yield BrokenRule(("recipes", other, "name"), "is what pilots are called", "choose another name")
    yield from _without_validation(held, tasks)


def _without_validation(held: Mapping[int, Recipe], tasks: Mapping[int, Task]) -> Iterator[BrokenRule]:
    """Tasks on which a tournament cannot judge."""
    files = {task.name for task in tasks.values() if task.validation and task.validation.path}
    for index in held:
        for task in tasks.values():
            missing = ", ".join(name for name in task.members or [] if name not in files)
            if missing:
                what = f"task {task.name!r} has no examples to judge trials on: {missing} has no validation file"
                yield BrokenRule(("recipes", index, "strategy"), what, "give each member a `validation` with a `path`")
            elif not task.members and not task.validation:
                what = f"task {task.name!r} has no examples to judge trials on"
                fix = "give it a `validation`: `{folds: 3}`, or a `path` to examples of the targets' form"
                yield BrokenRule(("recipes", index, "strategy"), what, fix)


def _may_be_candidate(recipe: Recipe) -> bool:
    strategy = STRATEGIES[recipe.strategy]
    return strategy.has_budget and not strategy.holds_tournament


def _budget(recipe: Recipe) -> list[float | None]:
    return [recipe.fraction, recipe.rows, recipe.tokens]


def _valid_parts(kind: type[SomeSection], parts: object, context: dict[str, Path]) -> dict[int, SomeSection]:
    valid = {}
    for index, part in enumerate(parts if isinstance(parts, list) else []):
        try:
            valid[index] = kind.model_validate(part, context=context)
        except ValidationError:
            continue  # told already
    return valid


def _taken(path: KeyPath, names: list[tuple[int, str]], what: str) -> Iterator[BrokenRule]:
    first: dict[str, int] = {}
    for index, name in names:
        if first.setdefault(name, index) != index:
            yield BrokenRule((*path, index, "name"), f"the {what} {name!r} exists already", "choose another name")
