"""Checks that a person should see: nothing here stops a run. Gates that must stop one raise inside steps.

Belongs here: judging figures, and telling a person. Does not belong here: computing them, or Dagster.
"""

from typing import Any

import polars as pl

from less_assets.compute.models import ModelLoader
from less_assets.compute.step import Log
from less_assets.errors import LessAssetsError
from less_assets.lineage.lineage import Lineage, split
from less_assets.method.evaluation import LOSSES
from less_assets.method.evaluation.leaderboard import in_words
from less_assets.reading.subsets import recall_in_words
from less_assets.steps.asset import Check
from less_assets.steps.judging_examples import answers_of_another_form
from less_assets.steps.shown import Picture, Table, Verdict
from less_assets.store.tables import read_parquet

QUARANTINE_LIMIT = 0.05
"""Share of quarantined and refused rows above which a pool is worth a look."""
DOMINANCE_LIMIT = 0.5
"""How far above an even share one subtask may be, as a part of the rest: of two it may have 75 %, of many half."""

OVERLAP_LIMIT = 0.7
"""Expected overlap with the exact selection below which sketches are too coarse; LESS's own storage reaches 0.6."""
CORRELATION_LIMIT = 0.5
"""Correlation of predicted with real influence below which first-order influence says little about this model."""

RECALL_LIMIT = 0.8
"""Share of a selection that a prefilter should leave."""

SHORT_LIMIT = 0.5
"""Share of very short answers in a selection above which it is worth a look ..."""
SHORT_FACTOR = 2.0
"""... if it is also this many times the pool's own share."""

TROUBLE = (LessAssetsError, MemoryError, RuntimeError)
"""What a check that takes gradients may meet on a machine (torch raises RuntimeError) and tells instead of stopping."""


def _check_quarantine(lineage: Lineage, _: str, models: ModelLoader, log: Log) -> Verdict:
    shards = [lineage.summary("instruction_pool", shard) for shard in lineage.shards()]
    rows, bad = sum(shard["rows"] for shard in shards), sum(shard["quarantined"] for shard in shards)
    refused = lineage.summary("pool_index").get("refused", 0)
    share = (bad + refused) / max(1, rows)
    words = f"{bad:,} of {rows:,} rows ({bad / max(1, rows):.1%}) are quarantined"
    if refused:
        words += f" and {refused:,} refused by the chat template or for their length"
    lists = "`instruction_pool` and `refused_rows` list" if refused else "`instruction_pool` lists"
    return Verdict(
        share <= QUARANTINE_LIMIT,
        f"{words}; {lists} them with reasons.",
        {"rows": rows, "quarantined": bad, "refused": refused, "share": share},
    )


def _compare_with_base(lineage: Lineage, key: str, models: ModelLoader, log: Log) -> Verdict:
    recipe, task = split(key)
    model = lineage.project.recipe(recipe).model
    bases = [
        name
        for name, other in lineage.project.recipe_keys.items()
        if not other.traits.chooses_rows and other.model == model and name != recipe
    ]
    known = [name for name in bases if lineage.status("eval_results", f"{name}|{task}").state == "fresh"]
    ours = lineage.summary("eval_results", key).get("metrics") or {}
    if not ours:
        return Verdict(True, "The task has no evaluation.", {})
    if not known:
        return Verdict(True, "Not compared: the base model (strategy `none`) is not evaluated on this task.", {})
    base = lineage.summary("eval_results", f"{known[0]}|{task}")["metrics"]
    tasks = {member.name: member for member in lineage.project.member_tasks(task)}
    losses = [
        f"{name}/{metric}"
        for name, member in tasks.items()
        for metric in LOSSES
        if f"{name}/{metric}" in ours and not (metric == "loss" and answers_of_another_form(member))
    ]
    worse = [name for name in losses if not ours[name] <= base[name]]  # a diverged model's loss is NaN
    if not losses:
        return Verdict(True, "No loss says how good the model is on the task: see `losses_speak_of_the_targets`.", {})
    said = ", ".join(f"{_named(name)} {ours[name]:.3f}, base {base[name]:.3f}" for name in worse or losses)
    return Verdict(not worse, f"{'Worse' if worse else 'Not worse'} than the base model: {said}", {})


def check_trained_rows(lineage: Lineage, key: str, models: ModelLoader, log: Log) -> Verdict:
    """Whether the model that was trained could use every selected row (partition key `recipe|task`)."""
    summary = lineage.summary("finetuned_model", key)
    refused: dict[str, int] = summary.get("refused", {})
    rows, lost = summary["examples"], sum(refused.values())
    if not lost:
        return Verdict(True, "Every selected row was trained on." if summary["trained"] else "Nothing is trained.", {})
    reasons = ", ".join(f"{status}: {count:,}" for status, count in refused.items())
    return Verdict(
        False,
        f"{lost:,} of {rows + lost:,} selected rows were not trained on, since the recipe's own model refuses them "
        f"({reasons}); recipes with other models train on more.",
        {"trained": rows, "refused": lost},
    )


def _named(figure: str) -> str:
    """A figure of an evaluation's summary, `task/metric`, in words."""
    task, _, metric = figure.rpartition("/")
    return f"{task} {in_words(metric)}"


def check_dominance(lineage: Lineage, key: str, models: ModelLoader, log: Log) -> Verdict:
    """Whether one subtask has won most of a selection (partition key `recipe|task`)."""
    recipe, task = split(key)
    counts = lineage.summary("selected_subset", key).get("subtasks") or {}
    rows = {f"{task}/{name}": count for task, part in counts.items() for name, count in part.items()}
    total, aggregate = sum(rows.values()), lineage.project.recipe(recipe).aggregate
    # A subtask that has won everything is the only one that was counted.
    choices = lineage.summary("target_examples", task)["subtasks"] if aggregate else []
    if len(choices) < 2 or not total:
        return Verdict(True, "The recipe does not choose between subtasks.", {})
    name, most = max(rows.items(), key=lambda item: item[1])
    share, even = most / total, 1 / len(choices)
    said = f"{name} has won {most:,} of {total:,} selected rows ({share:.0%}; an even share is {even:.0%})"
    passed = share <= even + DOMINANCE_LIMIT * (1 - even)
    remedy = (
        "subtasks take turns, so the others had no rows left: look at quotas and `near_duplicates`"
        if aggregate == "round_robin"
        else "`aggregate: round_robin` takes turns"
    )
    return Verdict(passed, f"{said}." if passed else f"{said}; {remedy}.", {"subtask": name, "share": share})


def check_short_rows(lineage: Lineage, key: str, models: ModelLoader, log: Log) -> Verdict:
    """Whether a selection (partition key `recipe|task`) is made of answers of a word or two, and the pool is not."""
    subset = lineage.summary("selected_subset", key)
    shards = [lineage.summary("instruction_pool", shard) for shard in lineage.shards()]
    if not subset["rows"]:
        return Verdict(True, "Nothing is selected.", {})
    share = subset.get("very_short", 0) / subset["rows"]
    pool = sum(shard["very_short"] for shard in shards) / max(1, sum(shard["usable"] for shard in shards))
    return Verdict(
        share <= SHORT_LIMIT or share <= SHORT_FACTOR * pool,
        f"{share:.0%} of the selected answers have at most 20 characters, {pool:.0%} of the pool's.",
        {"share": share, "share_of_pool": pool},
    )


def check_recall(lineage: Lineage, key: str, models: ModelLoader, log: Log) -> Verdict:
    """Whether the prefilter has left most of a selection (partition key `recipe|task`)."""
    said = recall_in_words(lineage, key)
    if said is None:
        return Verdict(True, "A recipe of which the prefilter's loss is not estimated.", {})
    subset = lineage.summary("selected_subset", key)
    figures = {name: subset[name] for name in ("recall", "recall_low", "recall_high")}
    passed = subset["recall"] >= RECALL_LIMIT
    return Verdict(passed, said if passed else f"{said} A larger `prefilter.keep` leaves more.", figures)


def check_sketch_fidelity(lineage: Lineage, task: str, models: ModelLoader, log: Log) -> Verdict:
    """Certify a task's scores, unless that was done, and tell how far they can be trusted."""
    from less_assets.reading.certificates import certified_recipes
    from less_assets.steps.certificates import certified_on, certify

    if task in lineage.project.folds:
        return Verdict(True, "The certificate of the whole task speaks for its folds.", {})
    if not lineage.project.gradients.certificate_rows or not certified_recipes(lineage.project):
        return Verdict(True, "No certificate is asked for.", {})
    try:
        folder = certify(lineage, models, task, log)
        return _judge_fidelity(folder.manifest().summary, certified_on(lineage, folder, task))
    except TROUBLE as error:
        return Verdict(False, f"No certificate could be made: {error}", {})


def check_real_steps(lineage: Lineage, task: str, models: ModelLoader, log: Log) -> Verdict:
    """Compare a task's predicted influence with real steps, unless that was done, and tell how they agree."""
    from less_assets.reading.certificates import STEPS
    from less_assets.steps.certificates import take_real_steps

    if task in lineage.project.folds:
        return Verdict(True, "The real steps of the whole task speak for its folds.", {})
    if not lineage.project.gradients.real_step_rows:
        return Verdict(True, "No real steps are asked for.", {})
    try:
        folder = take_real_steps(lineage, models, task, log)
        return _judge_steps(folder.manifest().summary, read_parquet(folder, STEPS))
    except TROUBLE as error:
        return Verdict(False, f"No real step could be taken: {error}", {})


def _judge_fidelity(summary: dict[str, Any], recipes: list[Any]) -> Verdict:
    """Show a certificate: figures per recipe, and the sample's scores as a picture for the first one."""
    from less_assets.report.charts import agreement_scatter

    figures: dict[str, Any] = {
        "sampled_rows": summary["rows"],
        "cosine_error": dict(summary["cosine_error"]),
        "one_over_root_k": summary["theory"],
    }
    if not recipes:
        return Verdict(True, "The pool is too small for a certificate.", figures)
    columns = ("recipe", "spearman", "overlap", "certain", "band")
    figures["recipes"] = Table(pl.DataFrame([{name: getattr(recipe, name) for name in columns} for recipe in recipes]))
    sketched, exact, cut = recipes[0].scores
    figures["sample"] = Picture(agreement_scatter(sketched, exact, cut=cut), "sketched and exact scores")
    worst = min(recipes, key=lambda recipe: recipe.overlap)
    figures["expected_overlap"] = worst.overlap  # by itself, so that the UI plots it
    return Verdict(
        worst.overlap >= OVERLAP_LIMIT,
        f"Exact scores would select about {worst.overlap:.0%} of the rows that {worst.recipe} selects; "
        f"{worst.certain:.0%} of them are certain, the others borderline. "
        "More dimensions, or `rescore: exact` in the recipe, make it more.",
        figures,
    )


def _judge_steps(summary: dict[str, Any], steps: pl.DataFrame) -> Verdict:
    """Show how predicted and real influence agree, as figures and as a picture."""
    from less_assets.report.charts import agreement_scatter

    names = sorted(summary["agreement"], key=lambda name: name != "predicted")
    agreement = [{"predictor": name, **summary["agreement"][name]} for name in names]
    axes = ("predicted fall of the loss", "real fall of the loss")
    chart = agreement_scatter(steps["predicted"].to_list(), steps["real"].to_list(), axes=axes)
    correlation = summary["agreement"]["predicted"]["spearman"]
    return Verdict(
        correlation is not None and correlation >= CORRELATION_LIMIT,
        f"Rank correlation of predicted with real influence: "
        f"{'none' if correlation is None else format(correlation, '.2f')} "
        f"({summary['rows']} rows, {summary['target_examples']} target examples, {summary['checkpoint']}).",
        {
            "agreement": Table(pl.DataFrame(agreement)),
            **({} if correlation is None else {"rank_correlation": correlation}),
            "learning_rate": summary["learning_rate"],
            "steps": Picture(chart, "predicted and real influence"),
        },
    )


few_rows_quarantined = Check(
    "few_rows_quarantined", "Few rows of the pool are quarantined or refused.", _check_quarantine
)
no_subtask_dominates = Check(
    "no_subtask_dominates", "No subtask has won far more than its even share of the selection.", check_dominance
)
not_only_very_short_rows = Check(
    "not_only_very_short_rows",
    "The selection does not consist of answers of a word or two, unless the pool does.",
    check_short_rows,
)
trained_on_every_row = Check(
    "trained_on_every_row",
    "The model that is trained refuses no selected row: its chat template and length take them all.",
    check_trained_rows,
)
prefilter_loses_little = Check(
    "prefilter_loses_little",
    "Most of the rows that gradients of the whole pool would select are left by the prefilter.",
    check_recall,
    needed_by=lambda project: project.prefilter is not None,
)
not_worse_than_base = Check(
    "not_worse_than_base",
    "The fine-tuned model's validation loss and answer loss are not above the base model's.",
    _compare_with_base,
)
sketch_is_faithful = Check(
    "sketch_is_faithful",
    "Exact scores would select nearly the same rows: a sample of the pool is scored exactly.",
    check_sketch_fidelity,
    loads_model=True,
    explains=True,
)
influence_is_real = Check(
    "influence_is_real",
    "Rows of higher predicted influence lower the targets' loss more when a real step is taken.",
    check_real_steps,
    loads_model=True,
    explains=True,
)
