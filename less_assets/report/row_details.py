"""What the page of a selection shows of one row when it is opened: plain data, no HTML.

Belongs here: messages, scores, neighbours and token shares of rows, from stored artifacts. Not here: what the page says
of all rows (`contents.py`), or computing anything about a row (`steps/explanations.py`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, SupportsFloat

import numpy as np
import polars as pl

from less_assets.lineage.lineage import Lineage
from less_assets.method.data.conversations import Conversation, Message, carries_loss, full_text, stated
from less_assets.method.selection.neighbours import NEAR_DUPLICATE
from less_assets.method.selection.ranking import score_matrix
from less_assets.project.recipes import ResolvedRecipe
from less_assets.reading.files import score_file
from less_assets.reading.rows import checkpoint_weights, conversations_by_id, score_column, scores_of
from less_assets.store.tables import read_parquet

JsonObject = dict[str, Any]
NEIGHBOUR_CHARACTERS = 400
"""Characters shown of a neighbour's question and of its answer, where it is not in the page itself."""
MANY_ROWS = 4000
"""In a page of more rows than this only the nearest neighbour of a row, and near-duplicates, are shown with text."""
MANY_CHARACTERS = 120
ID_CHARACTERS = 12
"""Characters of a neighbour's id: enough for `explain` and `trace` to find it."""


@dataclass
class Explanations:
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
    ) -> "Explanations":
        """Read it.

        Args:
            lineage: Reads artifacts that are up to date.
            recipe: A recipe that selects by influence.
            task: The task.
            rows: The rows, with `place`, their number from 0.
            totals: Influence per subtask, float32 (n, J).
        """
        folder = lineage.folder("token_attribution", f"{recipe.key}|{task}")
        form, rule = str(recipe.form), str(recipe.subtask)
        names = [score_column(form, rule, name) for name in checkpoint_weights(lineage)]
        table = scores_of(lineage, task, rows, names)
        labels = [str(label) for label in lineage.summary("influence_scores", task)["subtasks"]]
        subtasks = np.array([labels.index(label) for label in rows["label"]], dtype=np.int64)
        by_checkpoint = [score_matrix(table[name])[np.arange(rows.height), subtasks] for name in names]
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

    def detail(self, row: int, example_id: str, places: Mapping[str, int]) -> JsonObject:
        """What the page shows of one row besides its messages; `places` numbers the rows of the page by id."""
        near = self.neighbours.row(row, named=True)
        detail: JsonObject = {
            "subtasks": [rounded(value, 3) for value in self.totals[row]],
            "checkpoints": [rounded(value) for value in self.by_checkpoint[row]],
            "targets": [[target["target"], rounded(target["cosine"])] for target in near["targets"]],
            "near": [
                {
                    "id": neighbour["example_id"][:ID_CHARACTERS],
                    "cosine": rounded(neighbour["cosine"]),
                    "place": places.get(neighbour["example_id"]),
                    "messages": self._near_text(neighbour, nearest=number == 0, many=len(places) > MANY_ROWS),
                }
                for number, neighbour in enumerate(near["rows"])
            ],
        }
        if tokens := self.tokens.get(example_id):
            detail["heat"] = {
                "turns": _turns(tokens),
                "momentum": rounded(tokens["momentum"]),
                "influence": rounded(tokens["influence"]),
                "cut": tokens["cut"],
            }
        return detail

    def _near_text(self, near: Mapping[str, Any], *, nearest: bool, many: bool) -> list[list[str]] | None:
        """The beginnings of a neighbour's question and answer, if the page does not hold it and has the room."""
        conversation = self.near_messages.get(near["example_id"])
        twin = near["cosine"] >= NEAR_DUPLICATE
        if conversation is None or (many and not nearest and not twin):
            return None
        messages = conversation.messages
        question = next((message for message in messages if message["role"] == "user"), messages[0])
        if many and not twin:
            return [[question["role"], _cut_text(question["content"], MANY_CHARACTERS)]]
        return [
            [message["role"], _cut_text(full_text(message), NEIGHBOUR_CHARACTERS)]
            for message in (question, messages[-1])
        ]


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
    return [[turn, texts, [rounded(share) for share in shares]] for turn, texts, shares in turns]


def tuned_losses(lineage: Lineage, task: str, rows: pl.DataFrame) -> list[JsonObject]:
    """Loss of each row before and after the training on a task's targets, as `losses` of what opening it shows."""
    folder, columns = lineage.folder("target_tuned_scores", task), ["base_loss", "tuned_loss"]
    tables = {shard: read_parquet(folder, score_file(shard), columns) for shard in rows["shard"].unique()}
    return [
        {"losses": [rounded(loss) for loss in tables[shard].row(row)]}
        for shard, row in rows.select("shard", "row").iter_rows()
    ]


def row_details(
    lineage: Lineage, rows: pl.DataFrame, explained: Explanations | None, others: Mapping[str, set[str]]
) -> list[JsonObject]:
    """What opening each row shows, in the rows' order.

    Args:
        lineage: Reads the rows' messages.
        rows: The rows with the facts of the pool's.
        explained: Of rows that have scores.
        others: Ids that each other recipe selected.
    """
    conversations = conversations_by_id(lineage, rows)
    places = {example_id: number for number, example_id in enumerate(rows["example_id"])}
    details = []
    for number, row in enumerate(rows.iter_rows(named=True)):
        detail = {
            **page_conversation(*conversations[row["example_id"]]),
            "file": row["source_file"],
            "line": row["source_row"],
            "shard": row["shard"],
            "row": row["row"],
            "copies": row["copies"],
            "also": [number for number, ids in enumerate(others.values()) if row["example_id"] in ids],
            "chance": rounded(row["chance"], 2),
        }
        details.append(detail | (explained.detail(number, row["example_id"], places) if explained else {}))
    return details


def page_conversation(messages: list[Message], tools: str | None) -> JsonObject:
    """Return what the page holds of a conversation.

    Args:
        messages: The turns; masks count at the assistant's.
        tools: JSON text of the tools.

    Returns:
        `messages`: [role, text] of each turn, or [role, text, {`name`, `reasoning`, `calls`, `masked`, …}] with what
        else it has; `tools` if there are any.
    """
    turns: list[list[Any]] = []
    for message in map(stated, messages):
        more: JsonObject = {name: text for name in ("name", "reasoning") if (text := message.get(name))}
        if calls := message.get("tool_calls"):
            made = json.loads(calls)
            more["calls"] = [call["function"] for call in made]
            if any("id" in call for call in made):
                more["call_ids"] = [call.get("id") for call in made]
        if answered := message.get("tool_call_id"):
            more["call_id"] = answered
        if message["role"] == "assistant" and not carries_loss(message):
            more["masked"] = True
        turns.append([message["role"], message["content"], *([more] if more else [])])
    return {"messages": turns, **({"tools": tools} if tools else {})}


def _cut_text(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


def rounded(value: SupportsFloat | None, digits: int = 4) -> float | None:
    """A number with few significant digits; None for what is no finite number."""
    if value is None or not np.isfinite(float(value)):
        return None
    return float(f"{float(value):.{digits}g}")
