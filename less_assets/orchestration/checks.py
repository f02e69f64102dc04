"""Checks that a person should see in the UI: nothing here stops a run. Gates that must stop one raise inside assets.

Belongs here: judging figures, and telling a person. Does not belong here: computing them (`assets/`).
"""

from collections.abc import Callable
from typing import Any

import dagster as dg
import polars as pl

from less_assets.compute.models import ModelLoader
from less_assets.errors import LessAssetsError
from less_assets.lineage.lineage import Lineage, split
from less_assets.orchestration import ui_metadata as metadata
from less_assets.orchestration.partitions import Axes
from less_assets.project.project import Project
from less_assets.store.artifacts import ArtifactStore
from less_assets.store.tables import read_parquet

QUARANTINE_LIMIT = 0.05
"""Share of quarantined rows above which a pool is worth a look."""
DOMINANCE_LIMIT = 0.5
"""Share of the selection above which one subtask has won too much (issue with `max` aggregation, method.md)."""

OVERLAP_LIMIT = 0.7
"""Expected overlap with the exact selection below which sketches are too coarse; LESS's own storage reaches 0.6."""
CORRELATION_LIMIT = 0.5
"""Correlation of predicted with real influence below which first-order influence says little about this model."""

SHORT_LIMIT = 0.5
"""Share of very short answers in a selection above which it is worth a look ..."""
SHORT_FACTOR = 2.0
"""... if it is also this many times the pool's own share."""

TROUBLE = (LessAssetsError, MemoryError, RuntimeError)
"""What a check that takes gradients may meet on a machine (torch raises RuntimeError) and tells instead of stopping."""


def build_checks(axes: Axes) -> list[dg.AssetChecksDefinition]:
    """All asset checks."""

    @dg.asset_check(asset="pool_index", description="Few rows of the pool are quarantined.")
    def few_rows_quarantined(
        project: dg.ResourceParam[Project], store: dg.ResourceParam[ArtifactStore]
    ) -> dg.AssetCheckResult:
        lineage = Lineage(project, store)
        shards = [lineage.summary("instruction_pool", shard) for shard in lineage.shards()]
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
        return check_dominance(Lineage(project, store), partition_of(context))

    @dg.asset_check(
        asset="selected_subset",
        partitions_def=axes.of("selected_subset"),
        description="The selection does not consist of answers of a word or two, unless the pool does.",
    )
    def not_only_very_short_rows(
        context: dg.AssetCheckExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
    ) -> dg.AssetCheckResult:
        return check_short_rows(Lineage(project, store), partition_of(context))

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
        lineage = Lineage(project, store)
        recipe, task = split(partition_of(context))
        model = project.recipe(recipe).model
        bases = [
            key
            for key, each in project.recipe_keys.items()
            if each.strategy == "none" and each.model == model and key != recipe
        ]
        known = [key for key in bases if lineage.status("eval_results", f"{key}|{task}").state == "fresh"]
        ours = lineage.summary("eval_results", partition_of(context)).get("metrics") or {}
        if not known or not ours:
            return _warning(True, "There is no evaluation of the base model to compare with yet.", {})
        base = lineage.summary("eval_results", f"{known[0]}|{task}")["metrics"]
        losses = [name for name in ours if name.endswith("/loss")]
        worse = [name for name in losses if not ours[name] <= base[name]]  # a diverged model's loss is NaN
        said = ", ".join(f"{name} {ours[name]:.3f}, base {base[name]:.3f}" for name in worse or losses)
        return _warning(not worse, f"{'Worse' if worse else 'Not worse'} than the base model: {said}", {})

    @dg.asset_check(
        asset="influence_scores",
        partitions_def=axes.of("influence_scores"),
        pool="gpu",
        description="Exact scores would select nearly the same rows: a random sample of the pool is scored exactly.",
    )
    def sketch_is_faithful(
        context: dg.AssetCheckExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
        models: dg.ResourceParam[ModelLoader],
    ) -> dg.AssetCheckResult:
        return check_sketch(Lineage(project, store), partition_of(context), models, context.log.info)

    @dg.asset_check(
        asset="influence_scores",
        partitions_def=axes.of("influence_scores"),
        pool="gpu",
        description="Rows of higher predicted influence lower the targets' loss more when a real step is taken.",
    )
    def influence_is_real(
        context: dg.AssetCheckExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
        models: dg.ResourceParam[ModelLoader],
    ) -> dg.AssetCheckResult:
        return check_real_steps(Lineage(project, store), partition_of(context), models, context.log.info)

    return [
        few_rows_quarantined,
        no_subtask_dominates,
        not_only_very_short_rows,
        not_worse_than_base,
        sketch_is_faithful,
        influence_is_real,
    ]


def check_dominance(lineage: Lineage, key: str, *_: object) -> dg.AssetCheckResult:
    """Whether one subtask has won most of a selection (partition key `recipe|task`)."""
    recipe, task = split(key)
    counts = lineage.summary("selected_subset", key).get("subtasks") or {}
    shares = {f"{task}/{name}": count for task, part in counts.items() for name, count in part.items()}
    total = sum(shares.values())
    # A subtask that has won everything is the only one that was counted.
    choices = lineage.summary("target_examples", task)["subtasks"] if lineage.project.recipe(recipe).aggregate else []
    if len(choices) < 2 or not total:
        return _warning(True, "The recipe does not choose between subtasks.", {})
    name, most = max(shares.items(), key=lambda item: item[1])
    return _warning(
        most / total <= DOMINANCE_LIMIT,
        f"{name} has won {most / total:.0%} of the selection; `aggregate: round_robin` takes turns.",
        {"subtask": name, "share": most / total},
    )


def check_short_rows(lineage: Lineage, key: str, *_: object) -> dg.AssetCheckResult:
    """Whether a selection (partition key `recipe|task`) is made of answers of a word or two, and the pool is not."""
    found = lineage.summary("selected_subset", key)
    shards = [lineage.summary("instruction_pool", shard) for shard in lineage.shards()]
    if not found["rows"]:
        return _warning(True, "Nothing is selected.", {})
    share = found.get("very_short", 0) / found["rows"]
    pool = sum(each["very_short"] for each in shards) / max(1, sum(each["usable"] for each in shards))
    return _warning(
        share <= SHORT_LIMIT or share <= SHORT_FACTOR * pool,
        f"{share:.0%} of the selected answers have at most 20 characters, {pool:.0%} of the pool's.",
        {"share": share, "share_of_pool": pool},
    )


def check_sketch(lineage: Lineage, task: str, models: ModelLoader, log: Callable[[str], object]) -> dg.AssetCheckResult:
    """Certify a task's scores, unless that was done, and tell how far they can be trusted."""
    from less_assets.reading.certificates import certified_recipes
    from less_assets.steps.certificates import certified_on, certify

    project, store = lineage.project, lineage.store
    if not project.gradients.certificate_rows or not certified_recipes(project):
        return _warning(True, "No certificate is asked for.", {})
    try:
        folder = certify(project, store, models, task, log)
        return _judge_fidelity(folder.manifest().summary, certified_on(Lineage(project, store), folder, task))
    except TROUBLE as error:
        return _warning(False, f"No certificate could be made: {error}", {})


def check_real_steps(
    lineage: Lineage, task: str, models: ModelLoader, log: Callable[[str], object]
) -> dg.AssetCheckResult:
    """Compare a task's predicted influence with real steps, unless that was done, and tell how they agree."""
    from less_assets.reading.certificates import STEPS
    from less_assets.steps.certificates import take_real_steps

    if not lineage.project.gradients.real_step_rows:
        return _warning(True, "No real steps are asked for.", {})
    try:
        folder = take_real_steps(lineage.project, lineage.store, models, task, log)
        return _judge_steps(folder.manifest().summary, read_parquet(folder, STEPS))
    except TROUBLE as error:
        return _warning(False, f"No real step could be taken: {error}", {})


SUBSET_CHECKS = {"no_subtask_dominates": check_dominance, "not_only_very_short_rows": check_short_rows}
"""Checks of `selected_subset` by name, for runs of several partitions."""
SCORE_CHECKS = {"sketch_is_faithful": check_sketch, "influence_is_real": check_real_steps}
"""Checks of `influence_scores` by name, for runs of several tasks."""


def partition_of(context: dg.AssetCheckExecutionContext) -> str:
    """The one partition that a check looks at.

    Raises:
        LessAssetsError: The run has none, or several.
    """
    if not context.has_partition_key:
        raise LessAssetsError(
            f"The check {context.check_specs[0].name} looks at one partition, and this run has none or a range.",
            where=context.check_specs[0].asset_key.to_user_string(),
            fix="Materialize a single partition of the asset in Dagster, which runs its checks too; "
            "`less-assets run` checks each partition that it makes.",
        )
    return str(context.partition_key)


def _judge_fidelity(summary: dict[str, Any], recipes: list[Any]) -> dg.AssetCheckResult:
    """Show a certificate: figures per recipe, and the sample's scores as a picture for the first one."""
    from less_assets.report.charts import agreement_scatter

    figures: dict[str, Any] = {
        "sampled_rows": summary["rows"],
        "cosine_error": dg.MetadataValue.json(summary["cosine_error"]),
        "one_over_root_k": summary["theory"],
    }
    if not recipes:
        return _warning(True, "The pool is too small for a certificate.", figures)
    columns = ("recipe", "spearman", "sample_overlap", "overlap", "certain", "band")
    figures["recipes"] = metadata.table(
        pl.DataFrame([{name: getattr(each, name) for name in columns} for each in recipes])
    )
    sketched, exact, cut = recipes[0].scores
    figures["sample"] = metadata.picture(agreement_scatter(sketched, exact, cut=cut), "sketched and exact scores")
    worst = min(recipes, key=lambda each: each.overlap)
    figures["expected_overlap"] = worst.overlap  # by itself, so that the UI plots it
    return _warning(
        worst.overlap >= OVERLAP_LIMIT,
        f"Exact scores would select about {worst.overlap:.0%} of the rows that {worst.recipe} selects; "
        f"{worst.certain:.0%} of them are certain, the others borderline. "
        "More dimensions, or `rescore: exact` in the recipe, make it more.",
        figures,
    )


def _judge_steps(summary: dict[str, Any], steps: pl.DataFrame) -> dg.AssetCheckResult:
    """Show how predicted and real influence agree, as figures and as a picture."""
    from less_assets.report.charts import agreement_scatter

    names = sorted(summary["agreement"], key=lambda name: name != "predicted")
    agreement = [{"predictor": name, **summary["agreement"][name]} for name in names]
    axes = ("predicted fall of the loss", "real fall of the loss")
    chart = agreement_scatter(steps["predicted"].to_list(), steps["real"].to_list(), axes=axes)
    correlation = summary["agreement"]["predicted"]["spearman"]
    return _warning(
        correlation is not None and correlation >= CORRELATION_LIMIT,
        f"Rank correlation of predicted with real influence: "
        f"{'none' if correlation is None else format(correlation, '.2f')} "
        f"({summary['rows']} rows, {summary['target_examples']} target examples, {summary['checkpoint']}).",
        {
            "agreement": metadata.table(pl.DataFrame(agreement)),
            **({} if correlation is None else {"rank_correlation": correlation}),
            "learning_rate": summary["learning_rate"],
            "steps": metadata.picture(chart, "predicted and real influence"),
        },
    )


def _warning(passed: bool, description: str, shown: dict[str, Any]) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        passed=passed,
        severity=dg.AssetCheckSeverity.WARN,
        description=description,
        metadata=metadata.in_order(shown),
    )
