"""Checkpoints from elsewhere instead of a warm-up: the numbers are those of the training that made them."""

import dagster as dg
import numpy as np
from support.graph import run

from less_assets.project.project import load_project
from less_assets.running.runner import Request
from less_assets.steps.registry import open_lineage, open_store
from less_assets.store.features import open_features


def features(project_file) -> np.ndarray:
    """The stored `adamw` features of the first shard at the first checkpoint."""
    project = load_project(project_file)
    folder = open_lineage(project, open_store(project)).folder("train_gradients", "epoch-1|plus-00000")
    return np.concatenate([block for _, block in open_features(folder).blocks("adamw")])


def test_imported_checkpoints_give_the_features_of_the_training_that_made_them(tiny_project):
    until = Request(until="train_gradients")
    with dg.DagsterInstance.ephemeral() as instance:
        run(tiny_project.path, instance, until)
    expected = features(tiny_project.path)
    project = load_project(tiny_project.path)
    lineage = open_lineage(project, open_store(project))
    folders = [str(lineage.folder("warmup_checkpoints", name).root) for name in project.checkpoints]
    rates = [lineage.summary("warmup_checkpoints", name)["mean_learning_rate"] for name in project.checkpoints]

    tiny_project.settings["warmup"] = {"import": folders, "mean_learning_rates": rates}
    tiny_project.settings["storage"] = {"root": "imported"}
    with dg.DagsterInstance.ephemeral() as instance:
        outcome = run(tiny_project.path, instance, until)
    assert outcome.materialized["warmup_checkpoints"] == ["epoch-1", "epoch-2"]
    np.testing.assert_array_equal(features(tiny_project.path), expected)
