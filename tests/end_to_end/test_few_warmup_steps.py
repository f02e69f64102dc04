"""A warm-up of one step an epoch: its first checkpoint has no weight and no gradients, and everybody is warned."""

import dagster as dg
import numpy as np
import pytest
from support.graph import StoredSubsets
from support.tiny import TinyProject

from less_assets.compute.models import ModelLoader, cache_folder
from less_assets.inspection.explain import explain_row
from less_assets.inspection.trace import trace_row
from less_assets.method.selection.ranking import score_matrix
from less_assets.orchestration.definitions import build_definitions
from less_assets.planning.estimate import Estimate, estimate, nothing_due
from less_assets.project.project import load_project
from less_assets.reading.files import score_file
from less_assets.running.dagster_home import opened_records
from less_assets.running.home_folder import nothing_to_do, remember_recorded
from less_assets.running.request import Request
from less_assets.running.runner import GraphRunner, register_shards
from less_assets.steps.registry import open_lineage, open_store
from less_assets.store.tables import read_parquet

REPORT = Request(tasks=("sums",), recipes=("less", "exact"), until="selection_report")
SUBSETS = Request(tasks=("sums",), recipes=("less", "exact"), until="selected_subset", extras=False)
OF_CHECKPOINTS = ("train_gradients", "gradient_datastore", "target_gradients")


class Made(StoredSubsets):
    """And its plan."""

    def plan(self) -> Estimate:
        project = load_project(self.tiny.path)
        store = open_store(project)
        register_shards(project, store, self.instance)
        runner = GraphRunner(build_definitions(project), project, store, self.instance, print)
        models = ModelLoader(project, cache_folder(store))
        return estimate(runner, open_lineage(project, store), models, self.request, calibrate=False, log=print)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model):
    project = TinyProject(tmp_path_factory.mktemp("few-steps"), tiny_model)
    project.settings["warmup"]["batch_size"] = 64
    project.settings["recipes"].append(
        {"name": "exact", "strategy": "less", "fraction": 0.2, "rescore": "exact", "near_duplicates": 0.99}
    )
    with dg.DagsterInstance.ephemeral() as instance:
        found = Made(project, instance, REPORT)
        found.before = found.plan()
        found.first = found.run()
        yield found


def checkpoints_of(partitions) -> set[str]:
    return {str(partition).partition("|")[0] for partition in partitions}


def test_the_checkpoint_is_made_and_has_no_gradients(made):
    lineage = made.lineage
    assert made.first["warmup_checkpoints"] == ["epoch-1", "epoch-2"]
    assert lineage.summary("warmup_checkpoints", "epoch-1")["mean_learning_rate"] == 0
    assert [checkpoints_of(made.first[asset]) for asset in OF_CHECKPOINTS] == [{"epoch-2"}] * 3
    assert made.run() == {}


def test_the_plan_knows_it_before_and_after(made):
    for planned in (made.before, made.plan()):
        statuses = {line.asset: line.statuses for line in planned.assets}
        assert [checkpoints_of(statuses[asset]) for asset in OF_CHECKPOINTS] == [{"epoch-2"}] * 3
        assert "the warm-up has 2 optimizer steps, fewer than 20" in planned.few_warmup_steps
    assert made.plan().due == 0


def test_with_nothing_to_do_the_missing_gradients_are_not_missed(made):
    project = load_project(made.tiny.path)
    store = open_store(project)
    with opened_records(project.name, store):
        pass  # Dagster's database is there
    remember_recorded(project, store, SUBSETS)
    found = nothing_to_do(project, store, SUBSETS)
    assert found is not None
    lineage, partitions = found
    assert [checkpoints_of(partitions[asset]) for asset in OF_CHECKPOINTS] == [{"epoch-2"}] * 3
    planned = nothing_due(lineage, partitions)
    assert planned.due == 0
    assert "the warm-up has 2 optimizer steps, fewer than 20" in planned.few_warmup_steps


def test_scores_are_those_of_the_other_checkpoint(made):
    folder = made.lineage.folder("influence_scores", "sums")
    table = read_parquet(folder, score_file(made.lineage.shards()[0]))
    assert "marginal.mean_cosine.epoch-1" not in table.columns
    total, alone = (score_matrix(table[f"marginal.mean_cosine{part}"]) for part in ("", ".epoch-2"))
    assert np.array_equal(total, alone, equal_nan=True)


def test_the_report_warns_and_rows_are_explained_without_it(made):
    notes = made.lineage.summary("selection_report", "less|sums")["notes"]
    assert notes[0].startswith("The warm-up has 2 optimizer steps, fewer than 20")
    row = made.subset("less|sums")["example_id"][0]
    assert set(explain_row(made.lineage, "sums", row)["checkpoint_weights"]) == {"epoch-2"}
    assert [array["checkpoint"] for array in trace_row(made.lineage, row)["gradients"]] == ["epoch-2"]
