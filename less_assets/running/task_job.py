"""The job that brings one task up to date from Dagster's UI, as `less-assets run --task` does from a terminal.

Belongs here: the job and its config. What it makes, and in which order, is `runner.py`.
"""

from typing import Any

import dagster as dg

from less_assets.project.project import Project
from less_assets.running.runner import GraphRunner, Request, register_shards
from less_assets.steps.registry import ASSETS, open_store

JOB = "bring_task_up_to_date"
STEP = "bring_up_to_date"
"""The job's one step, whose config names the task; Dagster wants it to have another name than the job."""


def task_job(graph: dg.Definitions, project: Project) -> dg.JobDefinition:
    """A job that makes what a task needs and is missing or stale; what is fresh stays.

    A job of Dagster's own over the assets is not possible, since their partitions differ. This one has a single step,
    which launches a run for each asset that has something to make; they stand beside it under Runs.

    Args:
        graph: Definitions of the project's assets.
        project: The project.
    """
    names = dg.Enum("Task", [dg.EnumValue(name) for name in project.task_names])
    recipes = dg.Enum("Recipe", [dg.EnumValue(key) for key in project.recipe_keys])
    assets = dg.Enum("LastAsset", [dg.EnumValue(name) for name in ASSETS if ASSETS[name].exists(project)])
    settings: dict[str, Any] = {
        "task": dg.Field(names, description="The task."),
        "recipes": dg.Field([recipes], default_value=[], description="Only these recipes; empty for all."),
        "until": dg.Field(assets, is_required=False, description="Stop with this asset, such as selected_subset."),
        "extras": dg.Field(bool, default_value=True, description="Also certificates, shares of tokens, and reports."),
    }

    @dg.op(name=STEP, config_schema=settings, description="Makes what is missing or stale, upstream first.")
    def bring_up_to_date(context: dg.OpExecutionContext) -> None:
        config, instance, store = context.op_config, context.instance, open_store(project)
        register_shards(project, store, instance)
        runner = GraphRunner(graph, project, store, instance, context.log.info)
        request = Request((config["task"],), tuple(config["recipes"]), config.get("until"), extras=config["extras"])
        outcome = runner.run(request)
        made = {asset: len(partitions) for asset, partitions in outcome.materialized.items()}
        for check in outcome.warned:
            context.log.warning(f"{check.asset} {check.partition}: {check.said}")
        context.log.info(f"{sum(made.values())} artifacts made, {outcome.fresh} were fresh")
        context.add_output_metadata({"fresh": outcome.fresh, **made})

    @dg.job(
        name=JOB,
        description="Makes everything that one task needs and that is missing or stale: up to its evaluation and its "
        "reports, or up to the asset that `until` names. Interrupted, launch it again: what is finished is kept.",
        config={"ops": {STEP: {"config": {"task": project.task_names[0]}}}},
        executor_def=dg.in_process_executor,
    )
    def bring_task_up_to_date() -> None:
        bring_up_to_date()

    return bring_task_up_to_date
