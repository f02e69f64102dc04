"""The table of strategies says of each what is true: in the code it names, in the README, in what a project accepts."""

import re
from pathlib import Path

import pytest

from less_assets.errors import ProjectFileError
from less_assets.method.evaluation.leaderboard import REFERENCES
from less_assets.project.project import parse_project
from less_assets.project.sections import Recipe
from less_assets.project.strategies import STRATEGIES, STRATEGY_KEYS, Strategy

README = Path(__file__).parents[2] / "README.md"
VALUES = {
    "form": "marginal",
    "subtask": "mean_cosine",
    "aggregate": "max",
    "rescore": "exact",
    "candidates": "2.0, rescore: exact",
    "near_duplicates": "0.9",
    "seeds": "[4, 5]",
    "keep": "top",
    "match": "other",
    "quotas": "{dolly: 0.5}",
    "precondition": "pool",
    "damping": "0.5, precondition: pool",
    "scores": "s.parquet",
    "pilot": "0.5",
}
TOURNAMENT = {"candidates": "[other]"}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=list(STRATEGIES))


@every_strategy
def test_a_strategys_function_is_where_its_entry_says(strategy: Strategy):
    if strategy.function is None:
        assert strategy.name == "none"
        return
    assert callable(strategy.load())
    assert strategy.ranks_by is None or callable(strategy.load_ranks_by())


def test_recipes_are_compared_with_strategies_of_the_table():
    assert set(REFERENCES.values()) <= set(STRATEGIES)
    assert {name for name in REFERENCES.values() if STRATEGIES[name].scores} == set()


def test_the_readmes_table_of_recipes_is_the_table_of_strategies():
    table = README.read_text().split("## Recipes")[1].split("|---|---|---|---|\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in table.splitlines()]
    documented = [(name.strip("`"), chooses, tuple(re.findall(r"`(\w+)`", keys))) for name, chooses, keys in rows]
    assert documented == [(entry.name, entry.chooses, entry.keys) for entry in STRATEGIES.values()]


def test_every_key_of_a_strategy_is_a_key_of_recipes():
    assert set(STRATEGY_KEYS) == set(VALUES) <= set(Recipe.model_fields)


@every_strategy
@pytest.mark.parametrize("key", STRATEGY_KEYS)
def test_a_recipe_may_state_exactly_the_keys_that_its_strategy_reads(strategy: Strategy, key: str):
    budget = ", rows: 3" if strategy.has_budget else ""
    budget += ", scores: s.parquet" if strategy.name == "external" and key != "scores" else ""
    budget += ", candidates: [other]" if strategy.holds_tournament and key != "candidates" else ""
    value = TOURNAMENT.get(key, VALUES[key]) if strategy.holds_tournament else VALUES[key]
    recipe = f"{{name: r, strategy: {strategy.name}{budget}, {key}: {value}}}"
    text = (
        "name: p\nmodel: {base: owner/model}\npool: {sources: [{name: dolly, path: d.jsonl}]}\n"
        "tasks: [{name: t, examples: {path: t.jsonl}, validation: {folds: 2}}]\n"
        f"recipes: [{{name: other, strategy: bm25, rows: 3}}, {recipe}]\n"
    )
    if strategy.reads(key):
        keys = [name for name in parse_project(text.encode()).recipe_keys if name != "other"]
        seeds = ["0"] if key != "seeds" else ["4", "5"]
        assert keys == ([f"r-seed{seed}" for seed in seeds] if strategy.draws else ["r"])
    else:
        with pytest.raises(ProjectFileError, match=rf"recipes\[1\]\.{key}: .*strategy {strategy.name}"):
            parse_project(text.encode())
