"""Why rows were selected: shares of their tokens, what stands near them in gradient space, and the page of it all.

Belongs here: wiring only. Mathematics is `method/gradients/attribution.py`, `method/selection/neighbours.py` and
`method/selection/around_the_cut.py`; what the page shows is `report/contents.py`, how it looks `report/page.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from pydantic import JsonValue

from less_assets.compute.models import LoadedCheckpoint
from less_assets.compute.speeds import Guess
from less_assets.compute.step import StepInputs, StepResult
from less_assets.compute.workload import Amount, Workload
from less_assets.lineage.lineage import Input, Keys, Lineage, split
from less_assets.lineage.plan import Versions
from less_assets.project.project import Project
from less_assets.project.recipes import ResolvedRecipe
from less_assets.reading.certificates import CERTIFICATE, judge_selection, read_certificate
from less_assets.reading.files import NEIGHBOURS, REPORT, ROWS, SUBSET, TOKENS
from less_assets.reading.pool_index import PoolIndex
from less_assets.reading.rows import (
    ROWS_AT_ONCE,
    checkpoint_weights,
    conversations_by_id,
    features_of,
    subtask_label,
    target_influence,
)
from less_assets.reading.scores import candidates_of, exact_scores_of
from less_assets.reading.shard_features import ShardFeatures
from less_assets.reading.subsets import chooses_rows, other_subsets
from less_assets.report.page import page_digest
from less_assets.steps.asset import Asset
from less_assets.steps.gradients import encode_targets
from less_assets.steps.ranking import aggregate_of, restraints_of
from less_assets.steps.shown import TABLE_ROWS, File, ReportLink, Shown, Stored, Table
from less_assets.store.tables import read_parquet, write_parquet

if TYPE_CHECKING:
    from less_assets.method.data.chat import EncodedExample
    from less_assets.method.gradients.attribution import TokenShares

NEAREST = 3
"""Target examples, and rows of the pool, kept for each explained row."""


def attribute_rows(work: StepInputs) -> StepResult:
    """Choose the rows to explain, find what stands near them, and split their influence into tokens' shares."""
    recipe_key, task = split(work.partition)
    recipe = work.project.recipe(recipe_key)
    rows = rows_to_explain(work, recipe, task)
    write_parquet(work.folder, ROWS, rows)
    write_parquet(work.folder, NEIGHBOURS, find_neighbours(work.lineage, recipe, task, rows))
    limit = work.project.report.token_rows
    explained = rows.filter((pl.col("group") != "selected") | (pl.col("rank") <= limit))
    tokens, read = attribute(work, recipe, task, explained)
    write_parquet(work.folder, TOKENS, tokens)
    groups = dict(rows["group"].value_counts().sort("group").iter_rows())
    summary = {
        "rows": rows.height,
        "groups": groups,
        "rows_with_tokens": tokens.height,
        "loss_tokens": int(tokens["share"].list.len().sum()),
    }
    return StepResult(summary, units=read)


def rows_to_explain(work: StepInputs, recipe: ResolvedRecipe, task: str) -> pl.DataFrame:
    """Selected rows, rows just below the cut, and the most negative ones (`around_the_cut.EXPLAINED_SCHEMA`)."""
    from less_assets.method.selection.around_the_cut import EXPLAINED_SCHEMA, most_negative_rows, rows_below_the_cut

    lineage, key = work.lineage, f"{recipe.key}|{task}"
    subset = read_parquet(lineage.folder("selected_subset", key), SUBSET).drop("messages")
    sketched = candidates_of(lineage, recipe, task)
    exact = exact_scores_of(lineage, recipe, task)
    ranked = sketched if exact is None else candidates_of(lineage, recipe, task, exact=exact)
    count = lineage.project.report.context_rows
    # Rows that a mix has drawn are in the subset for no reason of their own.
    selected = subset.drop_nulls("score").select(pl.lit("selected").alias("group"), *EXPLAINED_SCHEMA.names()[1:])
    ids = subset["example_id"].to_list()
    below = rows_below_the_cut(ranked, ids, aggregate_of(recipe), count, restraints_of(work, recipe))
    known = [*ids, *below["example_id"]]
    return pl.concat([selected, below, most_negative_rows(sketched, known, count)])


def attribute(work: StepInputs, recipe: ResolvedRecipe, task: str, rows: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """Token shares of rows, each against its own subtask, at every checkpoint and summed over them.

    The number that comes with them: tokens of these rows and of the target examples, at every checkpoint.
    """
    lineage, encoder = work.lineage, work.models.encoder()
    said = conversations_by_id(lineage, rows)
    examples = [encoder.row(name, *said[name]) for name in rows["example_id"]]
    words = [encoder.loss_token_texts(*said[name]) for name in rows["example_id"]]
    table = rows.select(
        "example_id",
        subtask_label(lineage, task).alias("subtask"),
        pl.Series("turn", [[token.turn for token in tokens] for tokens, _ in words], pl.List(pl.Int32)),
        pl.Series("text", [[token.text for token in tokens] for tokens, _ in words], pl.List(pl.String)),
        pl.Series("cut", [cut for _, cut in words], pl.Boolean),
    )
    weights = checkpoint_weights(lineage)
    progress = work.progress(len(weights) * len(examples), "rows")
    shares = [np.zeros(len(tokens), np.float64) for tokens, _ in words]
    momentum, influence = np.zeros((2, len(examples)))
    columns = []
    for checkpoint in weights:
        loaded = work.models.checkpoint(lineage, checkpoint)
        at_checkpoint: list[np.ndarray] = [np.zeros(0, np.float32)] * len(examples)
        for places, directions, which in _targets_in_parts(work, recipe, task, loaded, table["subtask"].to_list()):
            split = _shares(loaded, work, recipe, [examples[number] for number in places], directions, which, progress)
            for number, own, shared, whole in zip(places, split.shares, split.momentum, split.influence, strict=True):
                at_checkpoint[number] = own
                shares[number] += weights[checkpoint] * own
                momentum[number] += weights[checkpoint] * shared
                influence[number] += weights[checkpoint] * whole
        columns.append(pl.Series(f"share.{checkpoint}", [own.tolist() for own in at_checkpoint], pl.List(pl.Float32)))
    read = sum(len(example.input_ids) for example in [*examples, *encode_targets(work, task)[0]])
    shown = table.with_columns(
        pl.Series("share", [own.tolist() for own in shares], pl.List(pl.Float32)),
        pl.Series("momentum", momentum, pl.Float32),
        pl.Series("influence", influence, pl.Float32),
        *columns,
    )
    return shown, read * len(weights)


def _shares(
    loaded: LoadedCheckpoint,
    work: StepInputs,
    recipe: ResolvedRecipe,
    examples: list[EncodedExample],
    directions: np.ndarray,
    which: list[int],
    progress: Callable[[int], None],
) -> TokenShares:
    from less_assets.method.gradients.attribution import attribute_tokens

    longest = max(len(example.input_ids) for example in examples)
    return attribute_tokens(
        loaded.model,
        examples,
        directions,
        which,
        form=str(recipe.form),
        moments=loaded.moments,
        batching=loaded.batching(work.project.gradients, longest),
        on_progress=progress,
    )


def _targets_in_parts(
    work: StepInputs, recipe: ResolvedRecipe, task: str, loaded: LoadedCheckpoint, subtasks: list[str]
) -> Iterator[tuple[list[int], np.ndarray, list[int]]]:
    """Exact target directions of as many subtasks as fit into memory, and the rows that are compared with them.

    Yields the rows' places, directions float32 (D, P), and for each of these rows the number of its direction.
    """
    from less_assets.method.gradients.exact import mean_target_directions
    from less_assets.method.gradients.per_example import lora_slices

    encoded, labels = encode_targets(work, task)
    size = sum(part.size for part in lora_slices(loaded.model))
    at_once = max(1, work.project.gradients.directions_limit // (8 * size))  # two means of 4-byte numbers each
    wanted = sorted(set(subtasks))
    for start in range(0, len(wanted), at_once):
        part = wanted[start : start + at_once]
        members = [number for number, label in enumerate(labels) if label in part]
        targets = [encoded[number] for number in members]
        longest = max(len(example.input_ids) for example in targets)
        means = mean_target_directions(
            loaded.model,
            targets,
            [labels[number] for number in members],
            batching=loaded.batching(work.project.gradients, longest),
        )
        places = [number for number, label in enumerate(subtasks) if label in part]
        yield places, means.rule(str(recipe.subtask)), [means.subtasks.index(subtasks[number]) for number in places]


def comparison_form(lineage: Lineage, recipe: ResolvedRecipe) -> tuple[str, bool]:
    """The direction form in which rows are compared with each other, and whether their mean is taken off first.

    `marginal` and `sgd` hold nothing that all rows share; the others hold momentum, which would make all rows alike.
    """
    stored = lineage.project.gradients.forms
    for form in ("marginal", "sgd"):
        if form in stored:
            return form, False
    return str(recipe.form), True


def find_neighbours(lineage: Lineage, recipe: ResolvedRecipe, task: str, rows: pl.DataFrame) -> pl.DataFrame:
    """For each row the target examples that it helps most (of the most negative: harms), and its nearest rows."""
    from less_assets.method.selection.neighbours import NearestRows, best_places

    weights = checkpoint_weights(lineage)
    heaviest = max(weights, key=lambda name: weights[name])
    form, centered = comparison_form(lineage, recipe)
    offsets = _offsets(lineage)
    rows = rows.with_row_index("place")
    cosines = target_influence(lineage, str(recipe.form), task, rows, weights)
    negative = (rows["group"] == "most_negative").to_numpy()
    best = best_places(np.where(negative[:, None], -cosines, cosines), NEAREST)
    features = np.concatenate(
        [vectors for _, vectors in features_of(lineage, heaviest, form, rows)] or [np.zeros((0, 1), np.float32)]
    )
    ordered = rows.sort("shard", "row")
    places = [offsets[shard] + row for shard, row in ordered.select("shard", "row").iter_rows()]
    nearest = NearestRows(features, places, NEAREST, features.mean(axis=0) if centered else None)
    index = PoolIndex(lineage)
    for shard in lineage.shards():
        canonical = index.shard(shard, ["row", "canonical"]).filter("canonical")["row"].to_numpy()
        stored = ShardFeatures.of(lineage, heaviest, shard)
        numbers = np.arange(stored.rows) if stored.numbers is None else stored.numbers
        usable = (stored.reader.status == 0) & np.isin(numbers, canonical)
        for first, block in stored.reader.blocks(form, ROWS_AT_ONCE):
            within = slice(first, first + len(block))
            nearest.offer(offsets[shard] + numbers[within], block, usable[within])
    ids = {offsets[shard] + row: (name, shard, row) for name, shard, row in _named(index, nearest.neighbours, offsets)}
    near_rows = [
        [
            dict(zip(("example_id", "shard", "row"), ids[int(number)], strict=True), cosine=float(cosine))
            for number, cosine in zip(own, near, strict=True)
            if number >= 0
        ]
        for own, near in zip(nearest.neighbours, nearest.cosines, strict=True)
    ]
    near_targets = [
        [{"target": int(target), "cosine": float(cosines[number, target])} for target in best[number]]
        for number in range(rows.height)
    ]
    struct = {"example_id": pl.String, "shard": pl.String, "row": pl.Int64, "cosine": pl.Float32}
    by_place = ordered.select("place").with_columns(pl.Series("rows", near_rows, pl.List(pl.Struct(struct))))
    return (
        rows.select("place", "example_id")
        .with_columns(
            pl.Series("targets", near_targets, pl.List(pl.Struct({"target": pl.Int32, "cosine": pl.Float32})))
        )
        .join(by_place, on="place", how="left", maintain_order="left")
        .drop("place")
    )


def _offsets(lineage: Lineage) -> dict[str, int]:
    """Where each shard's first row stands when the shards are put one after the other."""
    offsets, total = {}, 0
    for shard in lineage.shards():
        offsets[shard] = total
        total += int(lineage.summary("instruction_pool", shard)["rows"])
    return offsets


def _named(index: PoolIndex, places: np.ndarray, offsets: Mapping[str, int]) -> Iterator[tuple[str, str, int]]:
    """Ids and addresses of the rows at some places of the whole pool."""
    first = pl.col("shard").replace_strict(dict(offsets), return_dtype=pl.Int64)
    wanted = np.unique(places[places >= 0])
    named = index.rows.filter((first + pl.col("row")).is_in(wanted.tolist()))
    return named.select("example_id", "shard", "row").collect().iter_rows()


def write_report(work: StepInputs) -> StepResult:
    """Collect what the page shows, and write it as one HTML file."""
    from less_assets.report.contents import report_contents
    from less_assets.report.page import render_page

    recipe, task = split(work.partition)
    contents = report_contents(work.lineage, recipe, task, work.progress)
    page = render_page(contents)
    work.folder.write_bytes(REPORT, page)
    return StepResult({**contents.summary, "bytes": len(page)})


def describe_attribution(stored: Stored) -> Shown:
    """The tokens that carry most of the best rows' influence."""
    tokens = stored.table(TOKENS)
    strongest = []
    for words, shares in tokens.head(TABLE_ROWS).select("text", "share").iter_rows():
        order = np.argsort(-np.abs(shares), kind="stable")[:5]
        strongest.append("  ".join(f"{words[token]!r} {shares[token]:+.2g}" for token in order))
    shown = tokens.head(TABLE_ROWS).select("example_id", "subtask", "influence", "momentum")
    rows: Any = stored.manifest.summary["rows"]
    table = Table(shown.with_columns(pl.Series("tokens", strongest, pl.String)))
    return Shown({"strongest_tokens": table}, rows, tokens.schema)


def describe_report(stored: Stored) -> Shown:
    """Where the page is, and how far the selection can be trusted, if its scores have a certificate."""
    # A click copies the path: browsers do not follow a link from the UI's web page to a file, only to a served page.
    page = {"open_report": ReportLink(stored.partition), "report": File(str(stored.folder.path(REPORT)))}
    subset = read_parquet(stored.lineage.folder("selected_subset", stored.partition), SUBSET)
    judged = judge_selection(stored.lineage, stored.partition, subset)
    if judged is None:
        return Shown(page)
    trust = {
        "certain_rows": judged.certain,
        "borderline_rows": judged.table.height - judged.certain,
        "expected_overlap_with_exact": judged.overlap,
    }
    return Shown(page | trust)


def attribution_work(workload: Workload, due: Sequence[str]) -> Amount:
    """Tokens of explained rows and targets, at every checkpoint."""
    report, checkpoints = workload.project.report, len(workload.project.checkpoints)
    tokens = 0.0
    for key in due:
        selected = min(workload.selected_rows(*split(key)), report.token_rows)
        rows = min(workload.pool_rows, selected + 2 * report.context_rows)
        tokens += checkpoints * (rows * workload.row_tokens + workload.target_sizes[split(key)[1]][1])
    return Amount(units={"token_attribution": tokens}, tokens=tokens, loads=checkpoints * len(due))


def _attribution_settings(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    return lineage.project.report_settings()


def _page(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    return {"page": page_digest()}


def _compared_with(lineage: Lineage, keys: Keys) -> Versions:
    """The certificate, and the subsets of other recipes as they are, up to date or not.

    A report of one recipe shall not need all recipes to be selected; it is made again once one of them is anew.
    """
    recipe, task = keys["recipe"], keys["task"]
    certificate = read_certificate(lineage, task) if lineage.project.selects_by_influence(recipe) else None
    certified = {f"{CERTIFICATE}/{task}": certificate.manifest().data_version} if certificate else {}
    others = other_subsets(lineage, recipe, task)
    return certified | {f"selected_subset/{key}|{task}": pointer.version for key, pointer in others.items()}


def _by_influence(project: Project, recipe: str) -> bool:
    return project.selects_by_influence(recipe)


def _by_tuning(project: Project, recipe: str) -> bool:
    return project.recipe(recipe).scores == "tuning"


ASSETS = (
    Asset(
        name="token_attribution",
        group="reports",
        kinds=frozenset({"pytorch", "parquet"}),
        description="Shares of the tokens of selected and nearby rows, exact; nearest target examples and pool rows.",
        axes=("recipe", "task"),
        # Features are read as well; the version of the scores made from them stands for theirs.
        inputs=(
            Input("selected_subset"),
            Input("recipe_settings"),
            Input("influence_scores"),
            Input("target_examples"),
            Input("warmup_checkpoints"),
            Input("pool_index"),
            Input("excluded_rows"),
        ),
        folder="selection/{task}/attribution/{recipe}",
        settings=_attribution_settings,
        needed_by=_by_influence,
        of_folds=False,
        compute=attribute_rows,
        describe=describe_attribution,
        loads_model=True,
        explains=True,
        amount=attribution_work,
        counts_tokens=True,
        speed=Guess(("train_gradients",), times_longer=2.5),  # three passes (the demo)
        columns_from={
            "selected_subset": {"example_id": ["example_id"], "subtask": ["subtask"], "text": ["messages"]},
            "influence_scores": {"example_id": ["example_id"]},
            "target_examples": {"share": ["messages", "completion"], "influence": ["messages", "completion"]},
        },
    ),
    Asset(
        name="selection_report",
        group="reports",
        kinds=frozenset({"html"}),
        description="One page that shows what was selected and why, row by row; opens from disk, asks for nothing.",
        axes=("recipe", "task"),
        inputs=(
            Input("selected_subset"),
            Input("recipe_settings"),
            Input("target_examples"),
            Input("pool_index"),
            Input("excluded_rows"),
            Input("influence_scores", read_by=_by_influence),
            Input("target_tuned_scores", read_by=_by_tuning),
            Input("token_attribution"),
            Input("tournament_results"),
        ),
        folder="selection/{task}/reports/{recipe}",
        entry=REPORT,
        settings=_page,
        outside=_compared_with,
        needed_by=chooses_rows,
        of_folds=False,
        compute=write_report,
        describe=describe_report,
        leads_to_reports=True,
        explains=True,
    ),
)
