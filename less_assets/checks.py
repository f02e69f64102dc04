"""Checks that a person should see in the UI: nothing here stops a run. Gates that must stop one raise inside assets.

Belongs here: judging figures that assets have recorded. Does not belong here: computing new ones.
"""

import dagster as dg

from less_assets.lineage import Lineage, split
from less_assets.partitions import Axes
from less_assets.project import Project
from less_assets.store.artifacts import ArtifactStore

QUARANTINE_LIMIT = 0.05
"""Share of quarantined rows above which a pool is worth a look."""
DOMINANCE_LIMIT = 0.5
"""Share of the selection above which one subtask has won too much (issue with `max` aggregation, method.md)."""


def build_checks(axes: Axes) -> list[dg.AssetChecksDefinition]:
    """All asset checks."""

    @dg.asset_check(asset="pool_index", description="Few rows of the pool are quarantined.")
    def few_rows_quarantined(
        project: dg.ResourceParam[Project], store: dg.ResourceParam[ArtifactStore]
    ) -> dg.AssetCheckResult:
        line = Lineage(project, store)
        shards = [line.summary("instruction_pool", shard) for shard in line.shards()]
        rows, bad = sum(shard["rows"] for shard in shards), sum(shard["quarantined"] for shard in shards)
        share = bad / max(1, rows)
        return _warning(
            share <= QUARANTINE_LIMIT,
            f"{bad:,} of {rows:,} rows ({share:.1%}) are quarantined; `instruction_pool` lists them with reasons.",
            {"rows": rows, "quarantined": bad, "share": share},
        )

    @dg.asset_check(
        asset="selected_subset",
        partitions_def=axes.of("selected_subset"),
        description="No subtask has won more than half of the selection.",
    )
    def no_subtask_dominates(
        context: dg.AssetCheckExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
    ) -> dg.AssetCheckResult:
        line = Lineage(project, store)
        recipe, task = split(context.partition_key)
        counts = line.summary("selected_subset", context.partition_key).get("subtasks") or {}
        shares = {f"{task}/{name}": count for task, part in counts.items() for name, count in part.items()}
        total = sum(shares.values())
        # A subtask that has won everything is the only one that was counted.
        choices = line.summary("target_examples", task)["subtasks"] if project.recipe(recipe).aggregate else []
        if len(choices) < 2 or not total:
            return _warning(True, "The recipe does not choose between subtasks.", {})
        name, most = max(shares.items(), key=lambda item: item[1])
        return _warning(
            most / total <= DOMINANCE_LIMIT,
            f"{name} has won {most / total:.0%} of the selection; `aggregate: round_robin` takes turns.",
            {"subtask": name, "share": most / total},
        )

    @dg.asset_check(
        asset="eval_results",
        partitions_def=axes.of("eval_results"),
        description="The fine-tuned model's held-out loss is not above the base model's.",
    )
    def not_worse_than_base(
        context: dg.AssetCheckExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
    ) -> dg.AssetCheckResult:
        line = Lineage(project, store)
        recipe, task = split(context.partition_key)
        bases = [key for key, each in project.recipe_keys.items() if each.strategy == "none" and key != recipe]
        known = [key for key in bases if line.status("eval_results", f"{key}|{task}").state == "fresh"]
        ours = line.summary("eval_results", context.partition_key).get("metrics") or {}
        if not known or not ours:
            return _warning(True, "There is no evaluation of the base model to compare with yet.", {})
        base = line.summary("eval_results", f"{known[0]}|{task}")["metrics"]
        worse = [name for name, loss in ours.items() if name.endswith("/loss") and loss > base[name]]
        said = ", ".join(f"{name} {ours[name]:.3f}, base {base[name]:.3f}" for name in worse)
        return _warning(not worse, f"Worse than the base model: {said}" if worse else "Not worse than the base.", {})

    return [few_rows_quarantined, no_subtask_dominates, not_worse_than_base]


def _warning(
    passed: bool, description: str, metadata: dict[str, dg.MetadataValue | float | int | str]
) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        passed=passed, severity=dg.AssetCheckSeverity.WARN, description=description, metadata=metadata
    )
