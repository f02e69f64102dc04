"""The sensor that registers new shards of the pool, so that they appear as partitions without anybody asking.

Belongs here: sensors only; scanning is `lineage/pool_files.py`.
"""

import dagster as dg

from less_assets.errors import LessAssetsError
from less_assets.lineage.pool_files import PoolFiles
from less_assets.orchestration.partitions import SHARDS
from less_assets.project.project import Project
from less_assets.steps.registry import open_lineage
from less_assets.store.artifacts import ArtifactStore

INTERVAL_SECONDS = 60


def shard_sensor(project: Project) -> dg.SensorDefinition:
    """A sensor, on by default, that scans the pool's files and adds partitions for new shards."""

    @dg.sensor(
        name="pool_shards",
        minimum_interval_seconds=INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Looks for new files and rows of the pool and registers their shards. Launches nothing.",
    )
    def pool_shards(
        context: dg.SensorEvaluationContext, store: dg.ResourceParam[ArtifactStore]
    ) -> dg.SensorResult | dg.SkipReason:
        try:
            pool_files = PoolFiles.scan(project, store)
        except LessAssetsError as error:
            return dg.SkipReason(str(error))
        known = set(context.instance.get_dynamic_partitions(str(SHARDS.name)))
        new = [key for key in pool_files.shard_keys() if key not in known]
        if not new:
            return dg.SkipReason(
                f"the pool has {len(pool_files.shard_keys())} shards, none of them new{_changed(store)}"
            )
        return dg.SensorResult(dynamic_partitions_requests=[SHARDS.build_add_request(new)])

    def _changed(store: ArtifactStore) -> str:
        """Which shards have other rows than those that were read, in words; Dagster cannot know it by itself."""
        lineage = open_lineage(project, store)
        keys = [
            key for key in lineage.pool_files.shard_keys() if lineage.status("instruction_pool", key).state == "stale"
        ]
        if not keys:
            return ""
        return f"; changed since they were read: {', '.join(keys)}. Materialize these partitions of instruction_pool"

    return pool_shards
