"""From artifacts to Dagster's log: one event a partition, with the versions that keep staleness true."""

from collections.abc import Iterator

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest

from less_assets.errors import TrainingError
from less_assets.orchestration.definitions import build_definitions
from less_assets.orchestration.materialization import RangeRun
from less_assets.project.project import load_project
from less_assets.running.runner import RANGE_END_TAG, RANGE_START_TAG
from less_assets.store.manifest import Manifest

KEYS = ["a", "b", "c"]
pytestmark = pytest.mark.filterwarnings("ignore::dagster.BetaWarning")


class Small:
    """Three partitions upstream, three below, both logged by `RangeRun` with the versions in `versions`."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self.versions = {key: f"version of {key}" for key in KEYS}
        self.fails_at: str | None = None
        partitions = dg.StaticPartitionsDefinition(KEYS)

        def logged(context: dg.AssetExecutionContext, upstream: bool) -> Iterator[dg.MaterializeResult]:
            yield from ()
            run = RangeRun(context)
            for key in context.partition_keys:
                if key == self.fails_at:
                    raise TrainingError("the machine went away")
                inputs = {f"upper/{key}": self.versions[key]} if upstream else {}
                version = f"below {self.versions[key]}" if upstream else self.versions[key]
                made = Manifest(
                    kind="x", key="x", fingerprint="f" * 32, inputs=inputs, data_version=version, summary={}
                )
                run.log(key, made, {"rows": len(key)})

        @dg.asset(
            partitions_def=partitions,
            code_version="1",
            output_required=False,
            backfill_policy=dg.BackfillPolicy.single_run(),
        )
        def upper(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult]:
            yield from logged(context, upstream=False)

        @dg.asset(
            partitions_def=partitions,
            code_version="1",
            output_required=False,
            deps=[upper],
            backfill_policy=dg.BackfillPolicy.single_run(),
        )
        def lower(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult]:
            yield from logged(context, upstream=True)

        self.assets = [upper, lower]
        self.graph = dg.Definitions(assets=self.assets).resolve_asset_graph()

    def run(self, name: str, first: str = "a", last: str = "c", *, succeeds: bool = True) -> None:
        """One run over a range."""
        tags = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
        done = dg.materialize(self.assets, selection=[name], tags=tags, instance=self.instance, raise_on_error=False)
        assert done.success is succeeds

    def statuses(self, name: str) -> list[str]:
        """What Dagster says of each partition."""
        resolver = CachingStaleStatusResolver(self.instance, self.graph, LoadingContextForTest(self.instance))
        return [resolver.get_status(dg.AssetKey(name), key).value for key in KEYS]

    def events(self, name: str) -> list[tuple[str, dict]]:
        """Partition and tags of every materialization, oldest first."""
        records = self.instance.fetch_materializations(dg.AssetKey(name), limit=50, ascending=True).records
        found = [record.asset_materialization for record in records]
        return [(str(event.partition), dict(event.tags or {})) for event in found]


@pytest.fixture
def small() -> Iterator[Small]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Small(instance)


def test_a_range_run_logs_one_event_per_partition_with_its_own_version(small):
    small.run("upper")
    small.run("lower")
    found = small.events("lower")
    assert [partition for partition, _ in found] == KEYS
    for partition, tags in found:
        assert tags["dagster/data_version"] == f"below version of {partition}"
        assert tags["dagster/data_version_is_user_provided"] == "true"
        assert tags["dagster/code_version"] == "1"
        assert "dagster/input_data_version/upper" in tags
        assert tags["dagster/input_event_pointer/upper"] != "NULL"


def test_after_a_range_run_everything_is_fresh(small):
    small.run("upper")
    small.run("lower")
    assert small.statuses("upper") == small.statuses("lower") == ["FRESH"] * 3


def test_a_changed_partition_makes_only_its_own_stale(small):
    small.run("upper")
    small.run("lower")
    small.versions["b"] = "edited"
    small.run("upper")
    assert small.statuses("lower") == ["FRESH", "STALE", "FRESH"]
    small.run("lower", "b", "b")
    assert small.statuses("lower") == ["FRESH"] * 3


def test_a_failing_range_run_keeps_the_partitions_that_were_finished(small):
    small.fails_at = "c"
    small.run("upper", succeeds=False)
    assert [partition for partition, _ in small.events("upper")] == ["a", "b"]
    assert small.statuses("upper") == ["FRESH", "FRESH", "MISSING"]
    small.fails_at = None
    small.run("upper", "c", "c")
    assert small.statuses("upper") == ["FRESH"] * 3


def test_the_version_of_several_upstream_partitions_is_a_hash_over_all_of_them():
    from less_assets.orchestration.materialization import _upstream_version

    both = {"upper/a": "1", "upper/b": "2", "other/a": "3"}
    assert _upstream_version(both, "upper") == _upstream_version(both | {"other/a": "4"}, "upper")
    assert _upstream_version(both, "upper") != _upstream_version(both | {"upper/b": "4"}, "upper")
    assert _upstream_version({"upper": "5"}, "upper") == "5"


def test_a_range_of_one_partition_is_checked_as_a_backfill_asks_for_it(explained_project):
    """Backfills of partitions that are no neighbours, such as all recipes of a task, are such runs."""
    job = build_definitions(load_project(explained_project)).resolve_implicit_global_asset_job_def()
    subset, tags = dg.AssetKey("selected_subset"), {RANGE_START_TAG: "few|sums", RANGE_END_TAG: "few|sums"}
    with dg.DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(instance=instance, asset_selection=[subset], tags=tags)
        assert result.success
        (record,) = instance.fetch_materializations(subset, limit=9).records
        assert record.partition_key == "few|sums"
        checks = result.get_asset_check_evaluations()
        assert {(check.check_name, check.partition) for check in checks} == {
            ("no_subtask_dominates", "few|sums"),
            ("not_only_very_short_rows", "few|sums"),
        }
