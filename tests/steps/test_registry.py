"""Which recipes need which of the assets that exist only for some."""

from support.tiny import TinyProject

from less_assets.project.project import load_project
from less_assets.steps.registry import ASSETS

RECIPES = [
    {"name": "less", "strategy": "less", "fraction": 0.2},
    {"name": "exact", "strategy": "less", "fraction": 0.2, "rescore": "exact"},
    {"name": "bm25", "strategy": "bm25", "fraction": 0.2},
    {"name": "rds", "strategy": "rds", "fraction": 0.2},
    {"name": "mid", "strategy": "perplexity", "fraction": 0.2},
    {"name": "against-pool", "strategy": "less", "fraction": 0.2, "precondition": "pool"},
    {"name": "match", "strategy": "less", "fraction": 0.2, "aggregate": "match"},
    {"name": "tuned", "strategy": "target_tuned", "fraction": 0.2},
    {"name": "given", "strategy": "external", "fraction": 0.2, "scores": "scores.csv"},
    {"name": "best", "strategy": "tournament", "fraction": 0.2, "candidates": ["rds", "match"]},
    {"name": "full", "strategy": "full"},
    {"name": "base", "strategy": "none"},
]
NEEDED_BY = {
    "excluded_rows": [],
    "exact_scores": ["exact"],
    "text_scores": ["bm25"],
    "prefiltered_pool": [],
    "kept_rows": [],
    "preconditioned_scores": ["against-pool"],
    "external_scores": ["given"],
    "pool_embeddings": ["rds", "mid", "tuned"],
    "target_embeddings": ["rds"],
    "embedding_scores": ["rds", "mid"],
    "target_tuned_adapter": ["tuned"],
    "target_tuned_losses": ["tuned"],
    "target_tuned_scores": ["tuned"],
    "token_attribution": ["less", "exact"],
    "selection_report": ["less", "exact", "bm25", "rds", "mid", "against-pool", "match", "tuned", "given", "best"],
    "pilot_subset": ["best"],
    "pilot_model": ["best"],
    "pilot_results": ["best"],
    "tournament_results": ["best"],
}


def test_optional_assets_exist_for_the_recipes_that_need_them(tiny_model, tmp_path):
    tiny = TinyProject(tmp_path, tiny_model)
    tiny.settings["recipes"] = RECIPES
    for task in tiny.settings["tasks"]:
        task["validation"] = {"folds": 2}
    project = load_project(tiny.path)
    optional = {name: asset for name, asset in ASSETS.items() if asset.needed_by is not None}
    assert {name: asset.recipes(project) for name, asset in optional.items()} == NEEDED_BY
    tiny.settings["recipes"] = RECIPES[-2:]
    project = load_project(tiny.path)
    assert not [name for name, asset in optional.items() if asset.exists(project)]
