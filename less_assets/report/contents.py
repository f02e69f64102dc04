"""What the page of a selection shows, gathered from stored artifacts: plain data, no HTML.

Belongs here: reading, counting, and the sentences that say what is worth a look. Not here: how it looks (`page.py`, and
the files beside it), or computing anything about a row (`assets/explanations.py`).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

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
from less_assets.method.data.conversations import Conversation, Message, carries_loss, full_text, stated
from less_assets.method.selection.neighbours import NEAR_DUPLICATE
from less_assets.project.project import ResolvedRecipe
from less_assets.reading.rows import checkpoint_weights, conversations_by_id, score_column, scores_of, subtask_label
from less_assets.reading.selection_cut import Cuts, score_matrix
from less_assets.report.certificate import Certificate, certificate_of, percent
from less_assets.steps.pool import EXAMPLES, INDEX
from less_assets.steps.selection import SUBSET
from less_assets.steps.targets import TARGETS
from less_assets.store.tables import read_parquet

NEIGHBOUR_CHARACTERS = 400
"""Characters shown of a neighbour's question and of its answer, where it is not in the page itself."""
MANY_ROWS = 4000
"""In a page of more rows than this only the nearest neighbour of a row, and near-duplicates, are shown with text."""
MANY_CHARACTERS = 120
ID_CHARACTERS = 12
"""Characters of a neighbour's id: enough for `explain` and `trace` to find it."""
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
    """

    head: dict[str, Any]
    columns: dict[str, list[Any]]
    details: list[dict[str, Any]]
    cut: "Cut | None"
    summary: dict[str, Any]


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
    certificate = certificate_of(lineage, key, subset)
    if scored:
        rows = read_parquet(lineage.folder("token_attribution", key), "rows.parquet")
    else:
        rows = subset.with_columns(pl.lit("selected").alias("group"))
    rows = rows.with_columns(
        subtask_label(lineage, task).alias("label") if scored else pl.col("subtask").alias("label")
    )
    rows = rows.with_row_index("place")
    cuts = Cuts.of(lineage, recipe, task) if scored else None
    pool = _look_through(lineage, rows, cuts.best_labels() if cuts else None, progress)
    facts = rows.join(pool.facts, on=["shard", "row"], how="left", maintain_order="left")
    if certificate:
        facts = certificate.judge(facts)
    else:
        facts = facts.with_columns(pl.lit(None, pl.Float32).alias("chance"), pl.lit(None, pl.Boolean).alias("certain"))
    explained = _Explained.of(lineage, recipe, task, facts, cuts.scores_of(facts)) if cuts else None
    others = _other_selections(lineage, recipe_key, task)
    details = _details(lineage, facts, explained, others)
    if explained is not None:
        facts = facts.with_columns(pl.Series("duplicate", explained.nearest_cosine(), pl.Float32))
    else:
        facts = facts.with_columns(pl.lit(None, pl.Float32).alias("duplicate"))
    selected = facts.filter(pl.col("group") == "selected")
    overlap = _overlap(lineage, subset, others)
    composition = _composition(selected, pool, scored)
    notes = _notes(selected, composition, facts, certificate, scored)
    targets = read_parquet(lineage.folder("target_examples", task), TARGETS)
    head: dict[str, Any] = {
        "project": lineage.project.name,
        "task": task,
        "recipe": recipe_key,
        "settings": _settings(lineage, recipe),
        "scored": scored,
        "exact": recipe.candidates is not None,
        "counts": {
            "selected": selected.height,
            "pool": int(lineage.summary("pool_index")["unique"]),
            "tokens": int(selected["tokens"].sum()),
            "estimated": not scored,
            "below_cut": int((facts["group"] == "below_cut").sum()),
            "most_negative": int((facts["group"] == "most_negative").sum()),
            "certain": int(selected["certain"].sum()) if certificate else None,
        },
        "certificate": certificate.text if certificate else None,
        "checkpoints": [
            {"name": name, "weight": _short(weight)} for name, weight in checkpoint_weights(lineage).items()
        ]
        if scored
        else [],
        "subtasks": cuts.labels if cuts else [],
        "cuts": {label: _short(value) for label, value in cuts.by_label().items()} if cuts else {},
        "composition": composition,
        "overlap": overlap,
        "notes": notes,
        "near_duplicate": NEAR_DUPLICATE,
        "targets": [_target(row) for row in targets.iter_rows(named=True)] if scored else [],
        "inputs": dict(sorted(_made_from(lineage, key).items())),
    }
    columns = {
        "id": facts["example_id"].to_list(),
        "group": facts["group"].to_list(),
        "rank": facts["rank"].to_list(),
        "score": [_short(score) for score in facts["score"].to_list()],
        "subtask": facts["label"].to_list(),
        "source": facts["source"].to_list(),
        "tokens": facts["tokens"].to_list(),
        "length": facts["length"].to_list(),
        "turns": facts["turns"].to_list(),
        "turn_class": facts["turn_class"].to_list(),
        "certain": facts["certain"].to_list(),
        "duplicate": [_short(cosine) for cosine in facts["duplicate"].to_list()],
        "heat": [detail.get("heat") is not None for detail in details],
    }
    summary = {
        "rows": selected.height,
        "rows_below_cut": head["counts"]["below_cut"],
        "most_negative_rows": head["counts"]["most_negative"],
        "notes": [note["text"] for note in notes],
        "overlap": {entry["recipe"]: entry["shared"] for entry in overlap},
    }
    return ReportContents(head, columns, details, _cut(cuts, certificate) if cuts else None, summary)


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
    index = read_parquet(lineage.folder("pool_index"), INDEX)
    done = progress(index.height, "rows")
    facts = []
    tallies: dict[str, dict[str, int]] = {name: {} for name in ("source", "length", "turns", "subtask")}
    lengths: dict[int, int] = {}
    for shard in lineage.shards():
        usable = index.filter(pl.col("shard") == shard)
        columns = ["example_id", "source", "source_file", "source_row", "messages"]
        table = read_parquet(lineage.folder("instruction_pool", shard), EXAMPLES, columns)[usable["row"].to_list()]
        table = table.with_columns(usable.select("shard", "row", "copies", "canonical"))
        if best_labels is not None:
            labels = next(best_labels)
            table = table.join(labels, on="row", how="left", maintain_order="left")
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


def _cut(cuts: Cuts, certificate: Certificate | None) -> Cut:
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
    edges = [float(_short(bound * 4 / _FINE_BINS - 2)) for bound in bounds]
    band = (offset, offset + certificate.band) if certificate and certificate.band is not None else None
    what = "exact influence" if cuts.exact is not None else "influence"
    axis = f"{what} above the cut of the row's subtask" if several else what
    rows = "candidates" if cuts.exact is not None else "rows of the pool"
    return Cut(edges, counts, float(_short(cut_at * 4 / _FINE_BINS - 2)), band, axis, rows)


# ---- rows, one by one ----


@dataclass
class _Explained:
    """What was computed about the rows, in their order.

    Attributes:
        totals: Influence per subtask, float32 (n, J).
        by_checkpoint: Cosine at each checkpoint with the row's own subtask, float32 (n, C).
        neighbours: Columns `targets` and `rows` of `token_attribution`.
        tokens: Token shares by example id, of those rows that have them.
        near_messages: Messages of neighbours that are not among the rows, by id.
    """

    totals: np.ndarray
    by_checkpoint: np.ndarray
    neighbours: pl.DataFrame
    tokens: dict[str, dict[str, Any]]
    near_messages: dict[str, Conversation]

    @classmethod
    def of(
        cls, lineage: Lineage, recipe: ResolvedRecipe, task: str, rows: pl.DataFrame, totals: np.ndarray
    ) -> "_Explained":
        """Read it."""
        folder = lineage.folder("token_attribution", f"{recipe.key}|{task}")
        form, rule = str(recipe.form), str(recipe.subtask)
        checkpoints = lineage.project.checkpoints
        names = [score_column(form, rule, name) for name in checkpoints]
        table = scores_of(lineage, task, rows, names)
        labels = [str(label) for label in lineage.summary("influence_scores", task)["subtasks"]]
        own = np.array([labels.index(label) for label in rows["label"]], dtype=np.int64)
        every = np.arange(rows.height)
        by_checkpoint = [score_matrix(table[name])[every, own] for name in names]
        neighbours = read_parquet(folder, "neighbours.parquet")
        near = neighbours["rows"].explode().drop_nulls().struct.unnest()
        elsewhere = near.filter(~pl.col("example_id").is_in(rows["example_id"].to_list())).unique("example_id")
        tokens = {
            row["example_id"]: row
            for row in read_parquet(
                folder, "tokens.parquet", ["example_id", "turn", "text", "share", "momentum", "influence", "cut"]
            ).iter_rows(named=True)
        }
        return cls(
            totals,
            np.stack(by_checkpoint, axis=1),
            neighbours,
            tokens,
            conversations_by_id(lineage, elsewhere.sort("shard", "row")),
        )

    def nearest_cosine(self) -> list[float | None]:
        """Cosine of each row with the nearest row of the pool."""
        return [rows[0]["cosine"] if rows else None for rows in self.neighbours["rows"].to_list()]

    def detail(self, place: int, row: Mapping[str, Any], places: Mapping[str, int]) -> dict[str, Any]:
        """What the page shows of one row besides its messages."""
        near = self.neighbours.row(place, named=True)
        found: dict[str, Any] = {
            "subtasks": [_short(value, 3) for value in self.totals[place]],
            "checkpoints": [_short(value) for value in self.by_checkpoint[place]],
            "targets": [[each["target"], _short(each["cosine"])] for each in near["targets"]],
            "near": [
                {
                    "id": each["example_id"][:ID_CHARACTERS],
                    "cosine": _short(each["cosine"]),
                    "place": places.get(each["example_id"]),
                    "messages": self._near_text(each, nearest=number == 0, many=len(places) > MANY_ROWS),
                }
                for number, each in enumerate(near["rows"])
            ],
        }
        if own := self.tokens.get(row["example_id"]):
            found["heat"] = {
                "turns": _turns(own),
                "momentum": _short(own["momentum"]),
                "influence": _short(own["influence"]),
                "cut": own["cut"],
            }
        return found

    def _near_text(self, near: Mapping[str, Any], *, nearest: bool, many: bool) -> list[list[str]] | None:
        """The beginnings of a neighbour's question and answer, if the page does not hold it and has the room."""
        conversation = self.near_messages.get(near["example_id"])
        twin = near["cosine"] >= NEAR_DUPLICATE
        if conversation is None or (many and not nearest and not twin):
            return None
        messages = conversation.messages
        asked = next((each for each in messages if each["role"] == "user"), messages[0])
        if many and not twin:
            return [[asked["role"], _cut_text(asked["content"], MANY_CHARACTERS)]]
        return [[each["role"], _cut_text(full_text(each), NEIGHBOUR_CHARACTERS)] for each in (asked, messages[-1])]


def _turns(tokens: Mapping[str, Any]) -> list[list[Any]]:
    """[turn, texts, shares] for each assistant turn; a token without text of its own joins the one before it."""
    turns: list[list[Any]] = []
    for turn, text, share in zip(tokens["turn"], tokens["text"], tokens["share"], strict=True):
        if not turns or turns[-1][0] != turn:
            turns.append([turn, [], []])
        if text == "" and turns[-1][1]:
            turns[-1][2][-1] += share
        else:
            turns[-1][1].append(text)
            turns[-1][2].append(share)
    return [[turn, texts, [_short(share) for share in shares]] for turn, texts, shares in turns]


def _details(
    lineage: Lineage, rows: pl.DataFrame, explained: _Explained | None, others: Mapping[str, set[str]]
) -> list[dict[str, Any]]:
    conversations = conversations_by_id(lineage, rows)
    places = {example_id: place for place, example_id in enumerate(rows["example_id"])}
    details = []
    for place, row in enumerate(rows.iter_rows(named=True)):
        detail = {
            **page_conversation(*conversations[row["example_id"]]),
            "file": row["source_file"],
            "line": row["source_row"],
            "shard": row["shard"],
            "row": row["row"],
            "copies": row["copies"],
            "also": [number for number, ids in enumerate(others.values()) if row["example_id"] in ids],
            "chance": _short(row["chance"], 2),
        }
        details.append(detail | (explained.detail(place, row, places) if explained else {}))
    return details


def page_conversation(messages: list[Message], tools: str | None) -> dict[str, Any]:
    """Return what the page holds of a conversation.

    Args:
        messages: The turns; masks count at the assistant's.
        tools: JSON text of the tools.

    Returns:
        `messages`: [role, text] of each turn, or [role, text, {`name`, `reasoning`, `calls`, `masked`}] with what else
        it has; `tools` if there are any.
    """
    turns: list[list[Any]] = []
    for message in map(stated, messages):
        more: dict[str, Any] = {}
        for name in ("name", "reasoning"):
            if text := message.get(name):
                more[name] = text
        if calls := message.get("tool_calls"):
            more["calls"] = [call["function"] for call in json.loads(calls)]
        if message["role"] == "assistant" and not carries_loss(message):
            more["masked"] = True
        turns.append([message["role"], message["content"], *([more] if more else [])])
    return {"messages": turns, **({"tools": tools} if tools else {})}


def _cut_text(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


def _target(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "subtask": row["subtask"],
        **page_conversation(row["messages"], row.get("tools")),
        "prefix": row["assistant_prefix"],
        "completion": row["completion"],
    }


# ---- the whole ----


def _settings(lineage: Lineage, recipe: ResolvedRecipe) -> list[list[str]]:
    """The recipe in words, [name, value] each."""
    budget = recipe.budget
    found = [["strategy", recipe.strategy]]
    if budget is not None:
        amount = f"{budget.amount:.3g} of the pool" if budget.unit == "fraction" else f"{budget.amount:,} {budget.unit}"
        found.append(["budget", amount])
    if lineage.project.selects_by_influence(recipe.key):
        gradients = lineage.project.gradients
        found += [
            ["direction form", str(recipe.form)],
            ["subtask rule", str(recipe.subtask)],
            ["aggregate", str(recipe.aggregate)],
            ["features", f"{gradients.sketch} sketch, k {gradients.dimension:,}, {gradients.storage}"],
        ]
        if recipe.candidates is not None:
            found.append(["rescored", f"exactly, {recipe.candidates:g} × the budget"])
    if recipe.seed is not None:
        found.append(["seed", str(recipe.seed)])
    return [*found, ["base model", lineage.project.as_written(lineage.project.model.base)]]


def _made_from(lineage: Lineage, key: str) -> dict[str, str]:
    """Data versions of everything that the selection was made from, first hand."""
    manifest = lineage.fresh("selected_subset", key)
    return {**manifest.inputs, f"selected_subset/{key}": manifest.data_version}


def _other_selections(lineage: Lineage, recipe: str, task: str) -> dict[str, set[str]]:
    """Ids that each other recipe last selected for the task."""
    return {
        other: set(read_parquet(pointer.folder, SUBSET, ["example_id"])["example_id"])
        for other, pointer in lineage.other_subsets(recipe, task).items()
    }


def _overlap(lineage: Lineage, subset: pl.DataFrame, others: Mapping[str, set[str]]) -> list[dict[str, Any]]:
    """How many rows other recipes for the task selected as well; in the order of `others`."""
    own = set(subset["example_id"])
    unique = max(1, int(lineage.summary("pool_index")["unique"]))
    found = []
    for other, ids in others.items():
        expected = round(len(own) * len(ids) / unique, 1)
        found.append({"recipe": other, "rows": len(ids), "shared": len(own & ids), "expected": expected})
    return found


def _composition(selected: pl.DataFrame, pool: _Pool, scored: bool) -> list[dict[str, Any]]:
    """Per property: its name, and for each class how many selected rows and rows of the pool it has."""
    length = "Loss tokens" if scored else "Answer length (characters / 4)"
    parts: list[tuple[str, str, str, tuple[str, ...]]] = [
        ("source", "Source", "source", ()),
        ("subtask", "Subtask helped most", "label", ()),
        ("length", length, "length", LENGTHS),
        ("turns", "Assistant turns", "turn_class", TURNS),
    ]
    found = []
    for name, title, column, order in parts:
        own: dict[str, int] = dict(selected[column].drop_nulls().value_counts().iter_rows())
        counts = pool.counts[name]
        names = [each for each in order if each in own or each in counts]
        names = names or sorted({*own, *counts}, key=lambda each: (-own.get(each, 0), -counts.get(each, 0), each))
        if names:
            classes = [[each, own.get(each, 0), counts.get(each, 0)] for each in names]
            found.append({"name": name, "title": title, "classes": classes})
    return found


def _notes(
    selected: pl.DataFrame,
    composition: Sequence[Mapping[str, Any]],
    rows: pl.DataFrame,
    certificate: Certificate | None,
    scored: bool,
) -> list[dict[str, Any]]:
    """What a person should look at before trusting the selection, most important first; each may name a filter."""
    notes: list[dict[str, Any]] = []

    def note(text: str, **only: Any) -> None:
        notes.append({"text": text, "filter": only or None})

    total = max(1, selected.height)
    if scored and certificate is None:
        note("No certificate: how far sketched scores are from exact ones was not measured for this selection.")
    if certificate is not None and (unsure := int((~selected["certain"].fill_null(True)).sum())):
        note(f"{_rows(unsure)} of {total:,} selected are borderline.", certain="borderline")
    if scored and (harmful := int((selected["score"] < 0).sum())):
        note(f"{_rows(harmful)} selected with a negative influence: the budget is larger than the useful pool.")
    for part in composition:
        everything = max(1, sum(count for *_, count in part["classes"]))
        chosen = max(1, sum(count for _, count, _ in part["classes"]))
        for name, count, whole in part["classes"]:
            share, of_pool = count / chosen, whole / everything
            fair = 1 / len(part["classes"])
            if part["name"] == "subtask" and share > max(0.5, 1.2 * fair) and fair < 1:
                note(f"{name} took {percent(share)} of the selection.", subtask=name)
            elif part["name"] == "source" and len(part["classes"]) > 1 and share > 0.5 and share > 1.5 * of_pool:
                note(f"{name} is {percent(share)} of the selection and {percent(of_pool)} of the pool.", source=name)
            elif part["name"] == "source" and of_pool > 0.05 and share < of_pool / 10:
                note(f"{name}, {percent(of_pool)} of the pool, is all but absent ({_rows(count)}).", source=name)
        if part["name"] == "length":
            short = [entry for entry in part["classes"] if entry[0] in LENGTHS[:1]]
            if short and short[0][1] / chosen > 0.25 and short[0][1] / chosen > 2 * short[0][2] / everything:
                text = f"{percent(short[0][1] / chosen)} of the selected rows have at most 16 loss tokens"
                note(f"{text}, {percent(short[0][2] / everything)} of the pool do.", length=LENGTHS[0])
    if scored and (twins := int((selected["duplicate"] >= NEAR_DUPLICATE).sum())):
        note(
            f"{_rows(twins)} selected with a near-duplicate in the pool (cosine at least {NEAR_DUPLICATE:g}).",
            duplicate="yes",
        )
    if worst := int((rows["group"] == "most_negative").sum()):
        text = f"{_rows(worst)} of the pool with the most negative influence: look there for wrong labels."
        note(text, group="most_negative")
    return notes


def _rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"


def _short(value: Any, digits: int = 4) -> Any:
    """A number with few significant digits; None for what is no finite number."""
    if value is None or not np.isfinite(value):
        return None
    return float(f"{float(value):.{digits}g}")
