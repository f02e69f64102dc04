"""Why rows were selected: shares of their tokens, what stands near them in gradient space, and the page of it all.

Belongs here: wiring only. Mathematics is `method/attribution.py`, `method/neighbours.py` and
`method/around_the_cut.py`; what the page shows is `report/contents.py`, how it looks `report/page.py`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg
import numpy as np
import polars as pl

from less_assets.compute.models import LoadedCheckpoint, ModelLoader
from less_assets.lineage.lineage import Lineage, split
from less_assets.orchestration import ui_metadata as metadata
from less_assets.orchestration.materialization import StepInputs, StepResult, materialize_one
from less_assets.orchestration.partitions import Axes
from less_assets.project.project import Project, ResolvedRecipe
from less_assets.reading.rows import (
    ROWS_AT_ONCE,
    checkpoint_weights,
    conversations_by_id,
    feature_reader,
    features_of,
    subtask_label,
    target_influence,
)
from less_assets.steps.gradients import encode_targets
from less_assets.steps.pool import INDEX
from less_assets.steps.ranking import EXACT, aggregate_of, candidates_of, restraints_of
from less_assets.steps.selection import SUBSET
from less_assets.store.artifacts import ArtifactFolder, ArtifactStore
from less_assets.store.manifest import Manifest
from less_assets.store.tables import read_parquet, write_parquet

ROWS = "rows.parquet"
TOKENS = "tokens.parquet"
NEIGHBOURS = "neighbours.parquet"
REPORT = "report.html"
NEAREST = 3
"""Target examples, and rows of the pool, kept for each explained row."""


def build_assets(axes: Axes) -> list[dg.AssetsDefinition]:
    """The assets `token_attribution`, if a recipe selects by influence, and `selection_report`, if one selects."""
    assets = []
    scored, reported = axes.needed_by("token_attribution"), axes.needed_by("selection_report")
    if scored:

        @dg.asset(
            group_name="selection",
            kinds={"pytorch", "parquet"},
            pool="gpu",
            partitions_def=axes.of("token_attribution"),
            # Features are read as well; the version of the scores made from them stands for theirs.
            deps=[
                axes.same_key("selected_subset", scored),
                axes.by_recipe("recipe_settings", scored),
                axes.by_task("influence_scores", scored),
                axes.by_task("target_examples", scored),
                axes.all_partitions("warmup_checkpoints"),
                "pool_index",
            ],
        )
        def token_attribution(
            context: dg.AssetExecutionContext,
            project: dg.ResourceParam[Project],
            store: dg.ResourceParam[ArtifactStore],
            models: dg.ResourceParam[ModelLoader],
        ) -> dg.MaterializeResult:
            """Shares of the tokens of selected and nearby rows, exact; nearest target examples and pool rows."""
            return materialize_one(context, project, store, models, attribute_rows, describe_attribution)

        assets.append(token_attribution)
    if reported:
        explanations = [axes.by_task("influence_scores", scored), axes.same_key("token_attribution", scored)]

        @dg.asset(
            group_name="selection",
            kinds={"html"},
            partitions_def=axes.of("selection_report"),
            deps=[
                axes.same_key("selected_subset", reported),
                axes.by_recipe("recipe_settings", reported),
                axes.by_task("target_examples", reported),
                "pool_index",
                *(explanations if scored else []),
            ],
        )
        def selection_report(
            context: dg.AssetExecutionContext,
            project: dg.ResourceParam[Project],
            store: dg.ResourceParam[ArtifactStore],
            models: dg.ResourceParam[ModelLoader],
        ) -> dg.MaterializeResult:
            """One page that shows what was selected and why, row by row; opens from disk, asks for nothing."""
            return materialize_one(context, project, store, models, write_report, describe_report)

        assets.append(selection_report)
    return assets


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
    ranked = sketched
    if recipe.candidates is not None:
        exact = read_parquet(lineage.folder("exact_scores", key), EXACT)
        ranked = candidates_of(lineage, recipe, task, exact=exact)
    count = lineage.project.report.context_rows
    selected = subset.select(pl.lit("selected").alias("group"), *EXPLAINED_SCHEMA.names()[1:])
    ids = subset["example_id"].to_list()
    below = rows_below_the_cut(ranked, ids, aggregate_of(recipe), count, restraints_of(work, recipe))
    known = [*selected["example_id"], *below["example_id"]]
    return pl.concat([selected, below, most_negative_rows(sketched, known, count)])


def attribute(work: StepInputs, recipe: ResolvedRecipe, task: str, rows: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """Token shares of rows, each against its own subtask, at every checkpoint and summed over them.

    The number that comes with them: tokens of these rows and of the target examples, at every checkpoint.
    """
    from less_assets.method.data.chat import encode_messages, loss_token_texts

    lineage, model, tokenizer = work.lineage, work.project.model, work.models.tokenizer()
    style: dict[str, Any] = {"chat_format": model.chat_format, "max_length": model.max_length}
    said = {name: conversation.messages for name, conversation in conversations_by_id(lineage, rows).items()}
    examples = [encode_messages(name, said[name], tokenizer, **style) for name in rows["example_id"]]
    words = [loss_token_texts(said[name], tokenizer, **style) for name in rows["example_id"]]
    table = rows.select(
        "example_id",
        subtask_label(lineage, task).alias("subtask"),
        pl.Series("turn", [[token.turn for token in found] for found, _ in words], pl.List(pl.Int32)),
        pl.Series("text", [[token.text for token in found] for found, _ in words], pl.List(pl.String)),
        pl.Series("cut", [cut for _, cut in words], pl.Boolean),
    )
    checkpoints = work.project.checkpoints
    weights = checkpoint_weights(lineage)
    progress = work.progress(len(checkpoints) * len(examples), "rows")
    shares = [np.zeros(len(found), np.float64) for found, _ in words]
    momentum, influence = np.zeros((2, len(examples)))
    columns = []
    for checkpoint in checkpoints:
        loaded = work.models.checkpoint(lineage, checkpoint)
        at_checkpoint: list[np.ndarray] = [np.zeros(0, np.float32)] * len(examples)
        for places, directions, which in _targets_in_parts(work, recipe, task, loaded, table["subtask"].to_list()):
            found = _shares(loaded, work, recipe, [examples[place] for place in places], directions, which, progress)
            for place, own, shared, whole in zip(places, found.shares, found.momentum, found.influence, strict=True):
                at_checkpoint[place] = own
                shares[place] += weights[checkpoint] * own
                momentum[place] += weights[checkpoint] * shared
                influence[place] += weights[checkpoint] * whole
        columns.append(pl.Series(f"share.{checkpoint}", [own.tolist() for own in at_checkpoint], pl.List(pl.Float32)))
    read = sum(len(example.input_ids) for example in [*examples, *encode_targets(work, task, tokenizer)[0]])
    shown = table.with_columns(
        pl.Series("share", [own.tolist() for own in shares], pl.List(pl.Float32)),
        pl.Series("momentum", momentum, pl.Float32),
        pl.Series("influence", influence, pl.Float32),
        *columns,
    )
    return shown, read * len(checkpoints)


def _shares(
    loaded: LoadedCheckpoint,
    work: StepInputs,
    recipe: ResolvedRecipe,
    examples: list[Any],
    directions: np.ndarray,
    which: list[int],
    progress: Any,
) -> Any:
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

    encoded, labels = encode_targets(work, task, loaded.tokenizer)
    size = sum(part.size for part in lora_slices(loaded.model))
    at_once = max(1, work.project.gradients.directions_limit // (8 * size))  # two means of 4-byte numbers each
    wanted = sorted(set(subtasks))
    for start in range(0, len(wanted), at_once):
        part = wanted[start : start + at_once]
        members = [place for place, label in enumerate(labels) if label in part]
        targets = [encoded[place] for place in members]
        longest = max(len(example.input_ids) for example in targets)
        means = mean_target_directions(
            loaded.model,
            targets,
            [labels[place] for place in members],
            batching=loaded.batching(work.project.gradients, longest),
        )
        places = [place for place, label in enumerate(subtasks) if label in part]
        yield places, means.rule(str(recipe.subtask)), [means.subtasks.index(subtasks[place]) for place in places]


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
    heaviest = max(lineage.project.checkpoints, key=lambda name: weights[name])
    form, centered = comparison_form(lineage, recipe)
    offsets = _offsets(lineage)
    rows = rows.with_row_index("place")
    cosines = target_influence(lineage, str(recipe.form), task, rows, weights)
    negative = (rows["group"] == "most_negative").to_numpy()
    best = best_places(np.where(negative[:, None], -cosines, cosines), NEAREST)
    features = np.concatenate(
        [found for _, found in features_of(lineage, heaviest, form, rows)] or [np.zeros((0, 1), np.float32)]
    )
    ordered = rows.sort("shard", "row")
    places = [offsets[shard] + row for shard, row in ordered.select("shard", "row").iter_rows()]
    nearest = NearestRows(features, places, NEAREST, features.mean(axis=0) if centered else None)
    index = read_parquet(lineage.folder("pool_index"), INDEX)
    for shard in lineage.shards():
        canonical = index.filter((pl.col("shard") == shard) & pl.col("canonical"))["row"].to_numpy()
        reader = feature_reader(lineage, heaviest, shard)
        usable = (reader.status == 0) & np.isin(np.arange(reader.rows), canonical)
        for first, block in reader.blocks(form, ROWS_AT_ONCE):
            nearest.offer(offsets[shard] + first, block, usable[first : first + len(block)])
    ids = {offsets[shard] + row: (name, shard, row) for name, shard, row in _named(index, nearest.neighbours, offsets)}
    near_rows = [
        [
            dict(zip(("example_id", "shard", "row"), ids[int(place)], strict=True), cosine=float(cosine))
            for place, cosine in zip(own, near, strict=True)
            if place >= 0
        ]
        for own, near in zip(nearest.neighbours, nearest.cosines, strict=True)
    ]
    near_targets = [
        [{"target": int(target), "cosine": float(cosines[place, target])} for target in best[place]]
        for place in range(rows.height)
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


def _named(index: pl.DataFrame, places: np.ndarray, offsets: Mapping[str, int]) -> Iterator[tuple[str, str, int]]:
    """Ids and addresses of the rows at some places of the whole pool."""
    first = pl.col("shard").replace_strict(dict(offsets), return_dtype=pl.Int64)
    wanted = np.unique(places[places >= 0])
    found = index.filter((first + pl.col("row")).is_in(wanted.tolist()))
    return found.select("example_id", "shard", "row").iter_rows()


def describe_attribution(folder: ArtifactFolder, manifest: Manifest) -> Mapping[str, Any]:
    """Counts, and the tokens that carry most of the best rows' influence."""
    tokens = read_parquet(folder, TOKENS, ["example_id", "subtask", "influence", "momentum", "text", "share"])
    strongest = []
    for words, shares in tokens.head(metadata.TABLE_ROWS).select("text", "share").iter_rows():
        order = np.argsort(-np.abs(shares), kind="stable")[:5]
        strongest.append("  ".join(f"{words[place]!r} {shares[place]:+.2g}" for place in order))
    shown = tokens.head(metadata.TABLE_ROWS).select("example_id", "subtask", "influence", "momentum")
    return {
        **metadata.summary(folder, manifest),
        "dagster/partition_row_count": manifest.summary["rows"],
        "strongest_tokens": metadata.table(shown.with_columns(pl.Series("tokens", strongest, pl.String))),
        "dagster/column_schema": metadata.column_schema(read_parquet(folder, TOKENS)),
    }


def write_report(work: StepInputs) -> StepResult:
    """Collect what the page shows, and write it as one HTML file."""
    from less_assets.report.contents import report_contents
    from less_assets.report.page import render_page

    recipe, task = split(work.partition)
    contents = report_contents(work.lineage, recipe, task, work.progress)
    page = render_page(contents)
    work.folder.write_bytes(REPORT, page)
    return StepResult({**contents.summary, "bytes": len(page)})


def describe_report(folder: ArtifactFolder, manifest: Manifest) -> Mapping[str, Any]:
    """Where the page is, and what it found worth a look."""
    # A path, which a click copies: browsers do not follow a link from the UI's web page to a file.
    return {"report": dg.MetadataValue.path(str(folder.path(REPORT))), **metadata.summary(folder, manifest)}
