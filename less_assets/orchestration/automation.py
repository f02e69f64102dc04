"""What Dagster makes by itself, once a person has switched it on: assets that hold settings and small files.

Belongs here: when such an asset is made. Which assets these are is declared in `steps/`.
"""

from collections.abc import Sequence

import dagster as dg

from less_assets.errors import LessAssetsError
from less_assets.project.project import Project
from less_assets.steps.registry import open_lineage, open_store


class OutOfDate(dg.AutomationCondition[dg.AssetKey]):
    """True of partitions that are missing or stale, as `less-assets plan` says, while what they need is fresh.

    Dagster's own conditions cannot tell: a changed recipe or file changes no code version and no upstream asset.

    Args:
        project: The project.
    """

    def __init__(self, project: Project) -> None:
        self._project = project

    @property
    def name(self) -> str:
        """What the UI calls it."""
        return "missing_or_stale"

    def evaluate(self, context: dg.AutomationContext[dg.AssetKey]) -> dg.AutomationResult[dg.AssetKey]:
        """Which of the candidates are out of date; none, if that cannot be known."""
        asset = context.key.to_user_string()
        lineage = open_lineage(self._project, open_store(self._project))

        def is_due(partition: str | None) -> bool:
            return lineage.status(asset, partition).state in ("missing", "stale")

        candidates = context.candidate_subset
        try:
            if not candidates.is_partitioned:
                due = candidates if is_due(None) else context.get_empty_subset()
            else:
                keys = {key for key in candidates.expensively_compute_partition_keys() if is_due(key)}
                due = candidates.compute_intersection_with_partition_keys(keys)
        except LessAssetsError:  # such as a file that is not there; `less-assets check` says it
            due = context.get_empty_subset()
        return dg.AutomationResult(context, true_subset=due)


def settings_condition(project: Project) -> dg.AutomationCondition[dg.AssetKey]:
    """Out of date, not being made, and not failed the last time: what fails is left to a person."""
    nobody_is_at_it = ~dg.AutomationCondition.in_progress() & ~dg.AutomationCondition.execution_failed()
    return (OutOfDate(project) & nobody_is_at_it).with_label("settings_changed")


def settings_sensor(assets: Sequence[str]) -> dg.AutomationConditionSensorDefinition:
    """What looks at these conditions; off until a person switches it on, so that the UI launches nothing unasked.

    Args:
        assets: Names of the assets.
    """
    return dg.AutomationConditionSensorDefinition(
        name="settings",
        target=dg.AssetSelection.assets(*assets),
        description="Makes what holds settings and small files (recipes, target examples, excluded rows) as soon as "
        "they have changed and the definitions are reloaded. Nothing that loads a model.",
        use_user_code_server=True,  # the condition is a class of ours, which the daemon does not know
    )
