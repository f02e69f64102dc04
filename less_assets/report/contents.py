"""What the page of a selection shows, gathered from stored artifacts: plain data, no HTML.

Belongs here: reading, counting, and the sentences that say what is worth a look. Not here: how it looks (`page.py`, and
the files beside it), what opening one row shows (`row_details.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from less_assets.lineage.lineage import Lineage
from less_assets.method.data.composition import (
    LENGTHS,
    TURNS,
    assistant_turns,
    length_class,
    turn_class,
)
from less_assets.method.selection.neighbours import NEAR_DUPLICATE
from less_assets.project.recipes import ResolvedRecipe
from less_assets.reading.certificates import judge_selection
from less_assets.reading.excluded import excluded_reasons
from less_assets.reading.files import EXAMPLES, SUBSET, TARGETS
from less_assets.reading.pool_index import PoolIndex
from less_assets.reading.rows import checkpoint_weights, few_warmup_steps, subtask_label
from less_assets.reading.selection_cut import Cuts
from less_assets.reading.subsets import other_subsets, recall_in_words
from less_assets.reading.tournaments import choice_table
from less_assets.report.comparison import compared
from less_assets.report.row_details import (
    Explanations,
    JsonObject,
    page_conversation,
    rounded,
    row_details,
    tuned_losses,
)
from less_assets.store.tables import read_parquet

if TYPE_CHECKING:
    from less_assets.method.selection.fidelity import Judgement

CHARACTERS_PER_TOKEN = 4
BINS = 72
_FINE_BINS = 400_000  # of scores between −2 and 2: what the bins of the chart are added up from


@dataclass(frozen=True)
class ReportContents:
    """What a page is made of.

    Attributes:
        head: Everything but rows: settings, counts, charts' numbers, notes. JSON values.
        columns: The table of rows: column -> one value a row.
        details: What opening a row shows, one object a row.
        cut: Bins of the pool's scores; None where rows have no scores.
        summary: The figures for the manifest.
        others: What each other recipe selected and this one did not, in the order of `head["overlap"]`.
    """

    head: JsonObject
    columns: dict[str, list[Any]]
    details: list[JsonObject]
    cut: "Cut | None"
    summary: JsonObject
    others: list[JsonObject] = field(default_factory=list)


@dataclass(frozen=True)
class Cut:
    """Where the cut lies among the scores of the pool.

    Attributes:
        edges: Bounds of the n bins (n + 1,).
        counts: Rows in each (n,).
        at: The cut, in the units of the bins.
        band: Lower and upper end of the borderline; None without a certificate.
        axis: What the score is.
        rows: What the rows are.
    """

    edges: list[float]
    counts: list[int]
    at: float
    band: tuple[float, float] | None
    axis: str
    rows: str


def report_contents(
    lineage: Lineage,
    recipe_key: str,
    task: str,
    progress: Callable[[int, str], Callable[[int], object]],
) -> ReportContents:
    """Gather what the page of a recipe's selection for a task shows.

    Args:
        lineage: Reads artifacts that are up to date.
        recipe_key: Key of the recipe.
        task: The task.
        progress: Given a total and its unit, returns what is called with the units done.
    """
    recipe = lineage.project.recipe(recipe_key)
    scored = lineage.project.selects_by_influence(recipe_key)
    key = f"{recipe_key}|{task}"
    subset = read_parquet(lineage.folder("selected_subset", key), SUBSET).drop("messages")
    judgement = judge_selection(lineage, key, subset)
    cuts = Cuts.of(lineage, recipe, task) if scored else None
    rows = _rows(lineage, key, task, subset, scored)
    pool = _look_through(lineage, rows, cuts.best_labels() if cuts else None, progress)
    rows = rows.join(pool.facts, on=["shard", "row"], how="left", maintain_order="left")
    rows = _with_certificate(rows, judgement)
    explained = Explanations.of(lineage, recipe, task, rows, cuts.scores_of(rows)) if cuts else None
    others = _other_selections(lineage, recipe_key, task)
    details = row_details(lineage, rows, explained, others)
    if recipe.scores == "tuning":
        losses = tuned_losses(lineage, task, rows)
        details = [detail | both for detail, both in zip(details, losses, strict=True)]
    nearest = explained.nearest_cosine() if explained else [None] * rows.height
    rows = rows.with_columns(pl.Series("duplicate", nearest, pl.Float32))
    selected = rows.filter(pl.col("group") == "selected")
    composition = _composition(selected, pool, scored)
    queues = [queue for queue, _ in cuts.queues] if cuts else []
    head: JsonObject = {
        "project": lineage.project.name,
        "task": task,
        "recipe": recipe_key,
        "settings": _settings(lineage, recipe),
        "choice": _choice(lineage, recipe_key, task),
        "scored": scored,
        "exact": recipe.candidates is not None,
        "counts": _counts(lineage, rows, selected, judgement, scored),
        "certificate": _certificate_text(judgement) if judgement else None,
        "checkpoints": _checkpoints(lineage) if scored else [],
        "subtasks": cuts.labels if cuts else [],
        "cuts": {label: rounded(value) for label, value in cuts.by_label().items()} if cuts else {},
        "composition": composition,
        "overlap": _overlap(lineage, subset, others),
        "notes": [
            *_warmup_notes(lineage, recipe),
            *map(_note, filter(None, [recall_in_words(lineage, key)])),
            *_notes(selected, composition, rows, judgement, scored),
        ],
        "near_duplicate": NEAR_DUPLICATE,
        "targets": _targets(lineage, task) if scored else [],
        "turns": [queue.subtask or queue.task for queue in queues] if len(queues) > 1 else [],
        "tasks": _reported_tasks(lineage, recipe_key),
        "excluded": [list(row) for row in excluded_reasons(lineage).items()],
        "inputs": dict(sorted(_made_from(lineage, key).items())),
    }
    cut = _cut(cuts, judgement) if cuts else None
    return ReportContents(
        head, _columns(rows, details), details, cut, _summary(head), compared(lineage, subset, recipe_key, task)
    )


def _reported_tasks(lineage: Lineage, recipe: str) -> list[str]:
    """Tasks for which the recipe's selection has a page: those that have a subset, up to date or not."""
    folder = lineage.declarations["selected_subset"].folder
    return [
        task for task in lineage.project.task_names if lineage.store.pointer(folder.format(recipe=recipe, task=task))
    ]


def _rows(lineage: Lineage, key: str, task: str, subset: pl.DataFrame, scored: bool) -> pl.DataFrame:
    """The rows of the page: selected ones and, of those with scores, some others; `place` numbers them."""
    if scored:
        rows = read_parquet(lineage.folder("token_attribution", key), "rows.parquet")
        label = subtask_label(lineage, task)
    else:
        rows, label = subset.with_columns(pl.lit("selected").alias("group")), pl.col("subtask")
    return rows.with_columns(label.alias("label")).with_row_index("place")


def _counts(
    lineage: Lineage, rows: pl.DataFrame, selected: pl.DataFrame, judgement: "Judgement | None", scored: bool
) -> JsonObject:
    return {
        "selected": selected.height,
        "pool": int(lineage.summary("pool_index")["unique"]),
        "tokens": int(selected["tokens"].sum()),
        "estimated": not scored,
        "below_cut": int((rows["group"] == "below_cut").sum()),
        "most_negative": int((rows["group"] == "most_negative").sum()),
        "certain": int(selected["certain"].sum()) if judgement else None,
    }


def _checkpoints(lineage: Lineage) -> list[JsonObject]:
    return [{"name": name, "weight": rounded(weight)} for name, weight in checkpoint_weights(lineage).items()]


def _columns(rows: pl.DataFrame, details: Sequence[JsonObject]) -> dict[str, list[Any]]:
    """The table of rows by the names that `page.js` knows."""
    as_stored = ("source", "tokens", "length", "turns", "turn_class", "certain")
    return {
        "id": rows["example_id"].to_list(),
        "group": rows["group"].to_list(),
        "rank": rows["rank"].to_list(),
        "score": [rounded(score) for score in rows["score"]],
        "subtask": rows["label"].to_list(),
        **{name: rows[name].to_list() for name in as_stored},
        "duplicate": [rounded(cosine) for cosine in rows["duplicate"]],
        "heat": [detail.get("heat") is not None for detail in details],
    }


def _summary(head: JsonObject) -> JsonObject:
    return {
        "rows": head["counts"]["selected"],
        "rows_below_cut": head["counts"]["below_cut"],
        "most_negative_rows": head["counts"]["most_negative"],
        "notes": [note["text"] for note in head["notes"]],
        "overlap": {entry["recipe"]: entry["shared"] for entry in head["overlap"]},
    }


# ---- the certificate ----


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _certificate_text(judgement: "Judgement") -> str:
    return (
        f"By the certificate of the scores, exact scores would select {_percent(judgement.overlap)} of these rows, "
        "too. A certain row is one of which that holds with a chance of 95 % or more."
    )


def _with_certificate(rows: pl.DataFrame, judgement: "Judgement | None") -> pl.DataFrame:
    """The rows with columns `chance` and `certain`, null for rows that no certificate speaks of."""
    if judgement is None:
        return rows.with_columns(pl.lit(None, pl.Float32).alias("chance"), pl.lit(None, pl.Boolean).alias("certain"))
    judged = judgement.table.select("example_id", "chance", "certain")
    return rows.join(judged, on="example_id", how="left", maintain_order="left")


def _borderline(judgement: "Judgement | None") -> float | None:
    """A selected row nearer to the cut than this may be borderline; None where every row may."""
    bands = judgement.bands if judgement else []
    widths = [band for band in bands if band is not None]
    return max(widths) if widths and len(widths) == len(bands) else None


# ---- the pool, once ----


@dataclass
class _Pool:
    """What one pass over the pool's messages found.

    Attributes:
        facts: Of the rows asked for: shard, row, tokens, length, turns, copies, source_file, source_row.
        counts: Property -> class -> distinct rows of the pool.
        median_tokens: Over the pool.
    """

    facts: pl.DataFrame
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    median_tokens: float = 0.0


def _look_through(
    lineage: Lineage,
    rows: pl.DataFrame,
    best_labels: Iterator[pl.DataFrame] | None,
    progress: Callable[[int, str], Callable[[int], object]],
) -> _Pool:
    """Count what the pool is made of, shard by shard, and keep the facts of some rows."""
    index = PoolIndex(lineage)
    done = progress(lineage.summary("pool_index")["usable"], "rows")
    facts = []
    tallies: dict[str, dict[str, int]] = {name: {} for name in ("source", "length", "turns", "subtask")}
    lengths: dict[int, int] = {}
    for shard in lineage.shards():
        usable = index.shard(shard)
        columns = ["example_id", "source", "source_file", "source_row", "messages"]
        table = read_parquet(lineage.folder("instruction_pool", shard), EXAMPLES, columns)[usable["row"].to_list()]
        table = table.with_columns(usable.select("shard", "row", "copies", "canonical"))
        if best_labels is not None:
            labels = next(best_labels)
            table = table.join(labels, on="row", how="left", maintain_order="left")
            table = table.with_columns(pl.coalesce("tokens", _estimated_tokens()))  # rows that a prefilter left out
        else:
            table = table.with_columns(_estimated_tokens().alias("tokens"), pl.lit(None, pl.String).alias("best"))
        turns = assistant_turns(pl.col("messages"))
        table = table.with_columns(
            turns.alias("turns"),
            turn_class(turns).alias("turn_class"),
            length_class(pl.col("tokens")).alias("length"),
        )
        distinct = table.filter("canonical")
        for name, column in (
            ("length", "length"),
            ("turns", "turn_class"),
            ("subtask", "best"),
        ):
            _add(tallies[name], distinct[column])
        _add(tallies["source"], distinct["source"])
        for tokens, count in distinct["tokens"].drop_nulls().value_counts().iter_rows():
            lengths[tokens] = lengths.get(tokens, 0) + count
        kept = ["shard", "row", "tokens", "length", "turns", "turn_class", "copies"]
        wanted = rows.filter(pl.col("shard") == shard)["row"].to_list()
        facts.append(table.filter(pl.col("row").is_in(wanted)).select(*kept, "source_file", "source_row"))
        done(usable.height)
    return _Pool(pl.concat(facts), tallies, _median(lengths))


def _estimated_tokens() -> pl.Expr:
    answers = pl.element().struct.field("content").str.len_chars() * (pl.element().struct.field("role") == "assistant")
    return (pl.col("messages").list.eval(answers).list.sum() // CHARACTERS_PER_TOKEN + 1).cast(pl.Int32)


def _add(tally: dict[str, int], values: pl.Series) -> None:
    for name, count in values.drop_nulls().value_counts().iter_rows():
        tally[name] = tally.get(name, 0) + count


def _median(counts: Mapping[int, int]) -> float:
    half, seen = sum(counts.values()) / 2, 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= half:
            return float(value)
    return 0.0


# ---- the cut ----


def _cut(cuts: Cuts, judgement: "Judgement | None") -> Cut:
    """Bin the pool's scores; where there are several cuts, by how far rows are above theirs."""
    fine = np.zeros(_FINE_BINS, dtype=np.int64)
    several = len(cuts.queues) > 1
    offset = 0.0 if several or not cuts.queues else cuts.queues[0].cut
    total = 0
    for margins in cuts.pool_margins():
        fine += np.histogram(margins + offset, bins=_FINE_BINS, range=(-2, 2))[0]
        total += len(margins)
    filled = np.flatnonzero(fine)
    low, high = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 1)
    cut_at = min(max(int((offset + 2) / 4 * _FINE_BINS), low), high)
    # The cut falls between two bins: no bar is half selected. Few rows make few bins.
    width = max(1, -(-(high - low) // min(BINS, max(12, int(2 * total**0.5)))))
    first = cut_at - -(-(cut_at - low) // width) * width
    bounds = np.arange(first, high + width, width)
    counts = [int(fine[max(0, a) : b].sum()) for a, b in pairwise(bounds)]
    edges = [_score_at(bound) for bound in bounds.tolist()]
    width_of_band = _borderline(judgement)
    band = None if width_of_band is None else (offset, offset + width_of_band)
    what = "exact influence" if cuts.exact is not None else "influence"
    axis = f"{what} above the cut of the row's subtask" if several else what
    rows = "candidates" if cuts.exact is not None else "rows of the pool"
    return Cut(edges, counts, _score_at(cut_at), band, axis, rows)


def _score_at(bin_bound: float) -> float:
    return float(f"{bin_bound * 4 / _FINE_BINS - 2:.4g}")


# ---- the whole ----


def _targets(lineage: Lineage, task: str) -> list[JsonObject]:
    targets = read_parquet(lineage.folder("target_examples", task), TARGETS)
    return [
        {
            "subtask": target["subtask"],
            **page_conversation(target["messages"], target.get("tools")),
            "prefix": target["assistant_prefix"],
            "completion": target["completion"],
        }
        for target in targets.iter_rows(named=True)
    ]


def _settings(lineage: Lineage, recipe: ResolvedRecipe) -> list[list[str]]:
    """The recipe in words, [name, value] each."""
    budget = recipe.budget
    settings = [["strategy", recipe.strategy]]
    if budget is not None:
        amount = f"{budget.amount:.3g} of the pool" if budget.unit == "fraction" else f"{budget.amount:,} {budget.unit}"
        settings.append(["budget", amount])
    if lineage.project.selects_by_influence(recipe.key):
        gradients = lineage.project.gradients
        settings += [
            ["direction form", str(recipe.form)],
            ["subtask rule", str(recipe.subtask)],
            ["aggregate", str(recipe.aggregate)],
            ["features", f"{gradients.sketch} sketch, k {gradients.dimension:,}, {gradients.storage}"],
        ]
        if recipe.candidates is not None:
            settings.append(["rescored", f"exactly, {recipe.candidates:g} × the budget"])
    if recipe.seed is not None:
        settings.append(["seed", str(recipe.seed)])
    return [*settings, ["base model", lineage.project.as_written(lineage.project.model.base)]]


def _choice(lineage: Lineage, recipe: str, task: str) -> JsonObject | None:
    """The candidates of a tournament, which one was chosen and why; None for other recipes."""
    choice = choice_table(lineage, recipe, task)
    if choice is None:
        return None
    table, why = choice
    return {"why": why, "columns": table.columns, "rows": [list(row) for row in table.iter_rows()]}


def _made_from(lineage: Lineage, key: str) -> dict[str, str]:
    """Data versions of everything that the selection was made from, first hand."""
    manifest = lineage.fresh("selected_subset", key)
    return {**manifest.inputs, f"selected_subset/{key}": manifest.data_version}


def _other_selections(lineage: Lineage, recipe: str, task: str) -> dict[str, set[str]]:
    """Ids that each other recipe last selected for the task."""
    return {
        other: set(read_parquet(pointer.folder, SUBSET, ["example_id"])["example_id"])
        for other, pointer in other_subsets(lineage, recipe, task).items()
    }


def _overlap(lineage: Lineage, subset: pl.DataFrame, others: Mapping[str, set[str]]) -> list[JsonObject]:
    """How many rows other recipes for the task selected as well; in the order of `others`."""
    selected = set(subset["example_id"])
    unique = max(1, int(lineage.summary("pool_index")["unique"]))
    return [
        {
            "recipe": recipe,
            "rows": len(ids),
            "shared": len(selected & ids),
            "expected": round(len(selected) * len(ids) / unique, 1),
        }
        for recipe, ids in others.items()
    ]


def _composition(selected: pl.DataFrame, pool: _Pool, scored: bool) -> list[JsonObject]:
    """Per property: its name, and for each class how many selected rows and rows of the pool it has."""
    length = "Loss tokens" if scored else "Answer length (characters / 4)"
    parts: list[tuple[str, str, str, tuple[str, ...]]] = [
        ("source", "Source", "source", ()),
        ("subtask", "Subtask helped most", "label", ()),
        ("length", length, "length", LENGTHS),
        ("turns", "Assistant turns", "turn_class", TURNS),
    ]
    composition = []
    for name, title, column, order in parts:
        chosen: dict[str, int] = dict(selected[column].drop_nulls().value_counts().iter_rows())
        counts = pool.counts[name]
        classes = [label for label in order if label in chosen or label in counts]
        classes = classes or sorted(
            {*chosen, *counts}, key=lambda label: (-chosen.get(label, 0), -counts.get(label, 0), label)
        )
        if classes:
            in_both = [[label, chosen.get(label, 0), counts.get(label, 0)] for label in classes]
            composition.append({"name": name, "title": title, "classes": in_both})
    return composition


def _notes(
    selected: pl.DataFrame,
    composition: Sequence[Mapping[str, Any]],
    rows: pl.DataFrame,
    judgement: "Judgement | None",
    scored: bool,
) -> list[JsonObject]:
    """What a person should look at before trusting the selection, most important first; each may name a filter."""
    notes: list[JsonObject] = []

    def note(text: str, **only: str) -> None:
        notes.append(_note(text, **only))

    total = max(1, selected.height)
    if scored and judgement is None:
        note("No certificate: how far sketched scores are from exact ones was not measured for this selection.")
    if judgement is not None and (unsure := int((~selected["certain"].fill_null(True)).sum())):
        note(f"{_row_count(unsure)} of {total:,} selected are borderline.", certain="borderline")
    if scored and (harmful := int((selected["score"] < 0).sum())):
        note(f"{_row_count(harmful)} selected with a negative influence: the budget is larger than the useful pool.")
    notes += [note for part in composition for note in _composition_notes(part)]
    if scored and (twins := int((selected["duplicate"] >= NEAR_DUPLICATE).sum())):
        note(
            f"{_row_count(twins)} selected with a near-duplicate in the pool (cosine at least {NEAR_DUPLICATE:g}).",
            duplicate="yes",
        )
    if worst := int((rows["group"] == "most_negative").sum()):
        text = f"{_row_count(worst)} of the pool with the most negative influence: look there for wrong labels."
        note(text, group="most_negative")
    return notes


def _warmup_notes(lineage: Lineage, recipe: ResolvedRecipe) -> Iterator[JsonObject]:
    if recipe.traits.scores == "influence" and (said := few_warmup_steps(lineage)):
        yield _note(f"{said[0].upper()}{said[1:]}.")


def _composition_notes(part: Mapping[str, Any]) -> Iterator[JsonObject]:
    """What is odd about the classes of one property."""
    of_pool_total = max(1, sum(count for *_, count in part["classes"]))
    selected_total = max(1, sum(count for _, count, _ in part["classes"]))
    fair = 1 / len(part["classes"])
    for name, count, pool_count in part["classes"]:
        share, of_pool = count / selected_total, pool_count / of_pool_total
        if part["name"] == "subtask" and share > max(0.5, 1.2 * fair) and fair < 1:
            yield _note(f"{name} took {_percent(share)} of the selection.", subtask=name)
        elif part["name"] == "source" and len(part["classes"]) > 1 and share > 0.5 and share > 1.5 * of_pool:
            text = f"{name} is {_percent(share)} of the selection and {_percent(of_pool)} of the pool."
            yield _note(text, source=name)
        elif part["name"] == "source" and of_pool > 0.05 and share < of_pool / 10:
            text = f"{name}, {_percent(of_pool)} of the pool, is all but absent ({_row_count(count)})."
            yield _note(text, source=name)
        elif part["name"] == "length" and name == LENGTHS[0] and share > 0.25 and share > 2 * of_pool:
            text = f"{_percent(share)} of the selected rows have at most 16 loss tokens"
            yield _note(f"{text}, {_percent(of_pool)} of the pool do.", length=name)


def _note(text: str, **only: str) -> JsonObject:
    return {"text": text, "filter": only or None}


def _row_count(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"
