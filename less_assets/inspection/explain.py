"""Why a row scores as it does: from what is stored, or live for a row that the pool does not have.

Belongs here: gathering the answer as plain data, and putting it into words for a terminal. Not here: arguments and
printing (`cli.py`), where a row comes from and goes to (`trace.py`).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from less_assets.compute.models import ModelLoader
from less_assets.errors import LessAssetsError, MissingArtifactError, PoolFormatError, StaleArtifactError
from less_assets.lineage.lineage import Lineage
from less_assets.method.data.conversations import Conversation, carries_loss, full_text, stated, with_all_fields
from less_assets.method.data.conversations import example_id as conversation_id
from less_assets.reading.rows import (
    checkpoint_weights,
    find_row,
    score_column,
    scores_of,
    target_features,
    target_influence,
)
from less_assets.reading.selection_cut import Cuts, score_matrix
from less_assets.steps.pool import EXAMPLES
from less_assets.steps.selection import SUBSET
from less_assets.steps.targets import TARGETS
from less_assets.store.tables import read_parquet

NEAREST = 5
STRONGEST = 12
TEXT_CHARACTERS = 110


def explain_row(lineage: Lineage, task: str, example_id: str) -> dict[str, Any]:
    """Everything that is stored about a row's worth for a task.

    Args:
        lineage: Reads artifacts that are up to date.
        task: The task or group.
        example_id: Id of a row of the pool, or the beginning of one.

    Returns:
        JSON values: the row, its influence per form (total and per checkpoint, by subtask), what each recipe made of
        it, the target examples that it helps most, and its tokens' shares where they were computed.

    Raises:
        LessAssetsError: There is no such task or row, or the scores are missing or stale.
    """
    lineage.project.task(task)
    row = find_row(lineage, example_id).head(1).with_row_index("place")
    facts = row.row(0, named=True)
    stored = with_all_fields(read_parquet(lineage.folder("instruction_pool", facts["shard"]), EXAMPLES)).row(
        facts["row"], named=True
    )
    weights = checkpoint_weights(lineage)
    labels = [str(label) for label in lineage.summary("influence_scores", task)["subtasks"]]
    pairs = _scored_pairs(lineage)
    names = [score_column(form, rule, name) for form, rule in pairs for name in (None, *weights)]
    table = scores_of(lineage, task, row, names)
    influence = []
    for form, rule in pairs:
        found = {name: score_matrix(table[score_column(form, rule, name)])[0] for name in (None, *weights)}
        influence.append(_influence(form, rule, labels, found))
    form = pairs[0][0]
    cosines = target_influence(lineage, form, task, row, weights)[0] if table["status"][0] == "ok" else np.zeros(0)
    return {
        "task": task,
        "example_id": facts["example_id"],
        "source": facts["source"],
        "source_file": stored["source_file"],
        "source_row": stored["source_row"],
        "shard": facts["shard"],
        "row": facts["row"],
        "copies": facts["copies"],
        "status": table["status"][0],
        "loss_tokens": table["loss_tokens"][0],
        "messages": [stated(turn) for turn in stored["messages"]],
        "tools": stored["tools"],
        "checkpoint_weights": weights,
        "influence": influence,
        "recipes": [_stored_place(lineage, task, key, row) for key in lineage.project.recipe_keys],
        "nearest_targets": _nearest(lineage, task, form, cosines),
        "tokens": _stored_tokens(lineage, task, facts["example_id"]),
    }


def explain_text(lineage: Lineage, models: ModelLoader, task: str, text: str) -> dict[str, Any]:
    """Score a row that need not be in the pool, against the task's stored target features.

    The model runs once at each checkpoint; its features are stored in the pool's number format before they are
    compared, so that the scores are those that the row would have in the pool.

    Args:
        lineage: Reads artifacts that are up to date.
        models: Loads the checkpoints.
        task: The task or group.
        text: See `parse_row`.

    Returns:
        As `explain_row`, without what only a row of the pool has.

    Raises:
        LessAssetsError: There is no such task, the text is no row, or something needed is missing or stale.
    """
    from less_assets.method.data.chat import encode_messages
    from less_assets.method.gradients.features import RowStatus, extract_features
    from less_assets.method.gradients.quantization import decode, encode
    from less_assets.method.selection.influence import score_block, target_directions
    from less_assets.method.selection.neighbours import target_cosines

    lineage.project.task(task)
    messages, tools = parse_row(text)
    model, settings = lineage.project.model, lineage.project.gradients
    row_id = conversation_id(messages, tools)
    tokenizer = models.tokenizer()
    encoded = encode_messages(row_id, messages, tokenizer, chat_format=model.chat_format, max_length=model.max_length)
    if not encoded.loss_tokens:
        raise PoolFormatError(
            "The row has no token to take the loss over.",
            where=encoded.problem or f"max_length {model.max_length}",
            fix="give it an answer that begins within the model's maximum length",
        )
    subtasks = read_parquet(lineage.folder("target_examples", task), TARGETS, ["subtask"])["subtask"].to_list()
    weights, pairs = checkpoint_weights(lineage), _scored_pairs(lineage)
    forms = list(dict.fromkeys(form for form, _ in pairs))
    by_pair: dict[tuple[str, str], dict[str | None, np.ndarray]] = {pair: {} for pair in pairs}
    labels: list[str] = []
    loss, cosines = {}, np.zeros(len(subtasks), dtype=np.float32)
    for checkpoint, weight in weights.items():
        targets = target_features(lineage, checkpoint, task)
        loaded = models.checkpoint(lineage, checkpoint)
        block = extract_features(
            loaded.model,
            [encoded],
            forms=forms,
            moments=loaded.moments,
            sketch=loaded.sketch(settings),
            token_budget=len(encoded.input_ids),
            pad_token_id=loaded.pad_token_id,
        )
        if block.status[0] != RowStatus.OK:
            raise PoolFormatError(f"The row has no usable gradient: {RowStatus(block.status[0]).name.lower()}.")
        loss[checkpoint] = float(block.loss[0])
        stored = {
            form: decode(*encode(block.features[form], settings.storage), settings.storage, settings.dimension)
            for form in forms
        }
        for form, rule in pairs:
            labels, directions = target_directions(targets, subtasks, rule)
            by_pair[form, rule][checkpoint] = score_block(stored[form], directions)[0]
        cosines += target_cosines({checkpoint: stored[forms[0]]}, {checkpoint: targets}, {checkpoint: weight})[0]
    influence = []
    for (form, rule), found in by_pair.items():
        total = sum(np.float32(weights[name]) * found[name] for name in weights)
        influence.append(_influence(form, rule, labels, {None: np.asarray(total), **found}))
    totals = {(each["form"], each["rule"]): np.array(list(each["subtasks"].values())) for each in influence}
    return {
        "task": task,
        "example_id": row_id,
        "in_pool": _in_pool(lineage, row_id),
        "loss_tokens": encoded.loss_tokens,
        "loss": loss,
        "messages": messages,
        "tools": tools,
        "checkpoint_weights": weights,
        "influence": influence,
        "recipes": [_live_place(lineage, task, key, totals) for key in _scoring_recipes(lineage)],
        "nearest_targets": _nearest(lineage, task, forms[0], cosines),
    }


def parse_row(text: str) -> Conversation:
    """The conversation of a row given on the command line.

    Args:
        text: A JSON object in one of the pool's formats, a JSON list of messages, or plain text: a question, a blank
            line, an answer.

    Raises:
        PoolFormatError: It is none of these, or no usable conversation.
    """
    from less_assets.method.data.row_formats import UnusableRowError, normalize

    stripped = text.strip()
    try:
        if stripped[:1] in ("{", "["):
            value = json.loads(stripped)
            return normalize({"messages": value} if isinstance(value, list) else value)
        question, _, answer = stripped.partition("\n\n")
        return normalize({"prompt": question, "completion": answer.strip()})
    except UnusableRowError as problem:
        how = "a question, a blank line and an answer, or JSON as in a pool file"
        raise PoolFormatError(
            f"The text is no usable row: {problem.status}: {problem}.", where="--text", fix=f"give {how}"
        ) from problem
    except ValueError as problem:
        raise PoolFormatError(f"The text begins like JSON and is none: {problem}.", where="--text") from problem


def _scoring_recipes(lineage: Lineage) -> list[str]:
    return [key for key in lineage.project.recipe_keys if lineage.project.selects_by_influence(key)]


def _scored_pairs(lineage: Lineage) -> list[tuple[str, str]]:
    """Form and subtask rule of every recipe that selects by influence; without one, of the first stored form."""
    found = []
    for key in _scoring_recipes(lineage):
        recipe = lineage.project.recipe(key)
        found.append((str(recipe.form), str(recipe.subtask)))
    return list(dict.fromkeys(found)) or [(lineage.project.gradients.forms[0], "mean_cosine")]


def _influence(form: str, rule: str, labels: Sequence[str], found: Mapping[str | None, np.ndarray]) -> dict[str, Any]:
    def values(scores: np.ndarray) -> dict[str, float | None]:
        return {label: _number(score) for label, score in zip(labels, scores, strict=True)}

    checkpoints = {str(name): values(scores) for name, scores in found.items() if name is not None}
    return {"form": form, "rule": rule, "subtasks": values(found[None]), "checkpoints": checkpoints}


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _stored_place(lineage: Lineage, task: str, key: str, row: pl.DataFrame) -> dict[str, Any]:
    """What a recipe made of a row: whether it selected it, and how far it is from the cut."""
    partition = f"{key}|{task}"
    state = lineage.status("selected_subset", partition).state
    place: dict[str, Any] = {"recipe": key, "state": state}
    if state != "fresh":
        return place
    subset = read_parquet(lineage.folder("selected_subset", partition), SUBSET)
    found = subset.filter(pl.col("example_id") == row["example_id"][0])
    place |= {"selected": bool(found.height), "rows": subset.height}
    if found.height:
        place |= {name: found[name][0] for name in ("rank", "score", "subtask")}
    if lineage.project.selects_by_influence(key):
        cuts = Cuts.of(lineage, lineage.project.recipe(key), task)
        place |= _standing(cuts, float(cuts.margins_of(row)[0]))
    return place


def _live_place(lineage: Lineage, task: str, key: str, totals: Mapping[tuple[str, str], np.ndarray]) -> dict[str, Any]:
    recipe = lineage.project.recipe(key)
    if lineage.status("selected_subset", f"{key}|{task}").state != "fresh":
        return {"recipe": key, "state": "not up to date"}
    cuts = Cuts.of(lineage, recipe, task)
    margin = float(cuts.margins(totals[str(recipe.form), str(recipe.subtask)][None])[0])
    standing = _standing(cuts, margin)
    note = {"note": "sketched, where the recipe compares exact scores"} if cuts.exact is not None else {}
    return {"recipe": key, "state": "fresh", "would_be_selected": margin >= 0, **standing, **note}


def _standing(cuts: Cuts, margin: float) -> dict[str, Any]:
    """How far above the cut a margin is, and how many rows of the pool are further."""
    if not np.isfinite(margin):
        return {"above_cut": None}
    ahead = total = 0
    for margins in cuts.pool_margins():
        ahead += int((margins > margin).sum())
        total += len(margins)
    return {"above_cut": margin, "rows_ahead": ahead, "of_rows": total, "cuts": cuts.by_label()}


def _nearest(lineage: Lineage, task: str, form: str, cosines: np.ndarray) -> list[dict[str, Any]]:
    targets = read_parquet(lineage.folder("target_examples", task), TARGETS)
    found = []
    for place in np.argsort(-cosines, kind="stable")[:NEAREST]:
        target = targets.row(int(place), named=True)
        found.append(
            {
                "influence": float(cosines[place]),
                "form": form,
                "subtask": target["subtask"],
                "messages": [stated(turn) for turn in target["messages"]],
                "completion": target["assistant_prefix"] + target["completion"],
            }
        )
    return found


def _stored_tokens(lineage: Lineage, task: str, example_id: str) -> dict[str, Any] | None:
    """A row's token shares, from the first recipe that has them."""
    for key in _scoring_recipes(lineage):
        partition = f"{key}|{task}"
        if lineage.status("token_attribution", partition).state != "fresh":
            continue
        columns = ["example_id", "subtask", "turn", "text", "share", "momentum", "influence"]
        table = read_parquet(lineage.folder("token_attribution", partition), "tokens.parquet", columns)
        found = table.filter(pl.col("example_id") == example_id)
        if found.height:
            return {"recipe": key, **found.drop("example_id").row(0, named=True)}
    return None


def _in_pool(lineage: Lineage, example_id: str) -> bool:
    try:
        find_row(lineage, example_id)
    except (MissingArtifactError, StaleArtifactError):
        raise
    except LessAssetsError:
        return False
    return True


# ---- in words ----


def in_words(found: Mapping[str, Any]) -> str:
    """An explanation for a terminal.

    Args:
        found: From `explain_row` or `explain_text`.
    """
    parts = [_row_words(found)]
    parts += [_influence_words(each, found["checkpoint_weights"], str(found["task"])) for each in found["influence"]]
    parts.append("\n".join(["recipes", *(f"  {_recipe_words(each)}" for each in found["recipes"])]))
    if found["nearest_targets"]:
        lines = [f"target examples that it helps most (form {found['nearest_targets'][0]['form']})"]
        width = max(len(each["subtask"]) for each in found["nearest_targets"])
        for each in found["nearest_targets"]:
            asked = _one_line(full_text(each["messages"][-1]), TEXT_CHARACTERS // 2)
            answer = _one_line(each["completion"], TEXT_CHARACTERS // 2)
            lines.append(f"  {each['influence']:+.4f}  {each['subtask']:<{width}}  {asked}  →  {answer}")
        parts.append("\n".join(lines))
    if tokens := found.get("tokens"):
        parts.append(_token_words(tokens))
    return "\n\n".join(parts)


def _row_words(found: Mapping[str, Any]) -> str:
    lines = [f"row {found['example_id']}"]
    if "source_file" in found:
        copies = f", {found['copies']} copies" if found["copies"] > 1 else ""
        lines.append(
            f"  {found['source_file']}:{found['source_row']}  (source {found['source']}, shard {found['shard']}, "
            f"row {found['row']}{copies})"
        )
        if found["status"] != "ok":
            lines.append(f"  it has no score: {found['status']}")
    else:
        lines.append("  the pool has it as well" if found["in_pool"] else "  not in the pool; scored now")
    for turn in found["messages"]:
        masked = "(no loss) " if turn["role"] == "assistant" and not carries_loss(turn) else ""
        lines.append(f"  {turn['role']:<10} {masked}{_one_line(full_text(turn), TEXT_CHARACTERS)}")
    if found["tools"]:
        lines.append(f"  {'tools':<10} {_one_line(found['tools'], TEXT_CHARACTERS)}")
    return "\n".join(lines)


def _influence_words(each: Mapping[str, Any], weights: Mapping[str, float], task: str) -> str:
    headings = ["subtask", "influence", *(f"{name} ({weight:.0%})" for name, weight in weights.items())]
    ranked = sorted(each["subtasks"].items(), key=lambda item: -(item[1] if item[1] is not None else -np.inf))
    rows = [
        [label, _signed(total), *(_signed(each["checkpoints"][name][label]) for name in weights)]
        for label, total in ranked
    ]
    widths = [max(len(line[place]) for line in [headings, *rows]) for place in range(len(headings))]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [headings, *rows]
    ]
    return "\n".join([f"influence on {task} (form {each['form']}, {each['rule']})", *lines])


def _recipe_words(place: Mapping[str, Any]) -> str:
    name = f"{place['recipe']:<16}"
    if place["state"] != "fresh":
        return f"{name}  its subset is {place['state']}; less-assets run --until selected_subset"
    if "would_be_selected" in place:
        words = "would be selected" if place["would_be_selected"] else "would not be selected"
    elif place["selected"]:
        words = f"selected, rank {place['rank']:,} of {place['rows']:,}"
        words += f", for {place['subtask']}" if place["subtask"] else ""
    else:
        words = "not selected"
    if place.get("above_cut") is not None:
        side = "above" if place["above_cut"] >= 0 else "below"
        words += (
            f"; {abs(place['above_cut']):.4g} {side} the cut, {place['rows_ahead']:,} of {place['of_rows']:,} ahead"
        )
    return f"{name}  {words}" + (f" ({place['note']})" if place.get("note") else "")


def _token_words(tokens: Mapping[str, Any]) -> str:
    order = sorted(range(len(tokens["share"])), key=lambda place: -abs(tokens["share"][place]))[:STRONGEST]
    momentum = f", of which {_signed(tokens['momentum'])} is momentum's" if tokens["momentum"] else ""
    lines = [f"tokens, of the exact influence {_signed(tokens['influence'])} on {tokens['subtask']}{momentum}"]
    return "\n".join([*lines, *(f"  {_signed(tokens['share'][place])}  {tokens['text'][place]!r}" for place in order)])


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.4f}"


def _one_line(text: str, characters: int) -> str:
    # Control characters of a pool's text must not reach the terminal.
    flat = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return flat if len(flat) <= characters else flat[: characters - 1] + "…"
