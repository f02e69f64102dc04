"""What Dagster makes by itself: assets of settings and small files, when they have changed, and nothing else."""

import json

import dagster as dg
import pytest
from support.tiny import TinyProject

from less_assets.orchestration.definitions import build_definitions
from less_assets.project.project import load_project
from less_assets.steps.registry import ASSETS

SETTINGS_ASSETS = {"recipe_settings", "target_examples", "excluded_rows"}


class Automated:
    """A tiny project, and what its automation asks for."""

    def __init__(self, tiny: TinyProject, instance: dg.DagsterInstance) -> None:
        self.tiny, self.instance = tiny, instance

    @property
    def definitions(self) -> dg.Definitions:
        """Of the project file as it is now."""
        return build_definitions(load_project(self.tiny.path))

    def asks_for(self) -> set[tuple[str, str | None]]:
        """Assets and partitions that would be launched."""
        result = dg.evaluate_automation_conditions(self.definitions, self.instance)
        return {
            (found.key.to_user_string(), partition)
            for found in result.results
            for partition in (
                found.true_subset.expensively_compute_partition_keys()
                if found.true_subset.is_partitioned
                else [None] * found.true_subset.size
            )
        }

    def make(self, asset: str, partition: str, *, raise_on_error: bool = True) -> None:
        """Materialize one partition."""
        self.definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            asset_selection=[dg.AssetKey(asset)],
            partition_key=partition,
            instance=self.instance,
            raise_on_error=raise_on_error,
        )


@pytest.fixture
def automated(tmp_path, tiny_model):
    """A project with one task and two recipes."""
    tiny = TinyProject(tmp_path, tiny_model)
    tiny.settings["tasks"] = tiny.settings["tasks"][:1]
    tiny.settings["recipes"] = tiny.settings["recipes"][:2]
    with dg.DagsterInstance.ephemeral() as instance:
        yield Automated(tiny, instance)


def test_what_is_missing_or_has_changed_is_asked_for_and_nothing_else(automated):
    assert automated.asks_for() == {
        ("recipe_settings", "less"),
        ("recipe_settings", "random-seed0"),
        ("target_examples", "sums"),
    }
    for asset, partition in sorted(automated.asks_for()):
        automated.make(asset, partition)
    assert automated.asks_for() == set()
    automated.tiny.settings["recipes"][0]["fraction"] = 0.4
    assert automated.asks_for() == {("recipe_settings", "less")}
    targets = automated.tiny.folder / "targets/sums.jsonl"
    targets.write_text(targets.read_text().replace("one", "two"))
    assert automated.asks_for() == {("recipe_settings", "less"), ("target_examples", "sums")}


def test_what_has_failed_is_left_to_a_person(automated):
    targets = automated.tiny.folder / "targets/sums.jsonl"
    targets.write_text(json.dumps({"nothing": "of use"}) + "\n")
    assert ("target_examples", "sums") in automated.asks_for()
    automated.make("target_examples", "sums", raise_on_error=False)
    assert ("target_examples", "sums") not in automated.asks_for()


def test_a_file_that_is_not_there_stops_nothing(automated):
    (automated.tiny.folder / "targets/sums.jsonl").unlink()
    assert automated.asks_for() == {("recipe_settings", "less"), ("recipe_settings", "random-seed0")}


def test_only_settings_are_automatic_and_a_person_switches_it_on(automated):
    automated.tiny.settings["exclude"] = ["left-out.jsonl"]
    (automated.tiny.folder / "left-out.jsonl").write_text("")
    definitions = automated.definitions
    (sensor,) = [each for each in definitions.sensors if isinstance(each, dg.AutomationConditionSensorDefinition)]
    assert sensor.default_status is dg.DefaultSensorStatus.STOPPED
    graph = definitions.resolve_asset_graph()
    automatic = {key.to_user_string() for key in graph.get_all_asset_keys() if graph.get(key).automation_condition}
    assert automatic == SETTINGS_ASSETS == {key.to_user_string() for key in sensor.asset_selection.resolve(graph)}
    assert not any(ASSETS[name].loads_model for name in automatic)
