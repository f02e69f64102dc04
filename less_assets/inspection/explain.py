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
from less_assets.inspection.text_table import text_table
from less_assets.lineage.lineage import Lineage
from less_assets.method.data.conversations import (
    Conversation,
    Message,
    carries_loss,
    full_text,
    stated,
    with_all_fields,
)
from less_assets.method.data.conversations import example_id as conversation_id
from less_assets.method.selection.ranking import score_matrix
from less_assets.reading.excluded import excluded_reasons
from less_assets.reading.files import EXAMPLES, SUBSET, TARGETS, score_file
from less_assets.reading.rows import (
    checkpoint_weights,
    find_row,
    score_column,
    scores_of,
    target_features,
    target_influence,
)
from less_assets.reading.selection_cut import Cuts
from less_assets.reading.shard_features import PREFILTERED
from less_assets.reading.tournaments import choice_table
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
        scores = {name: score_matrix(table[score_column(form, rule, name)])[0] for name in (None, *weights)}
        influence.append(_influence(form, rule, labels, scores))
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
        "left_out": _left_out(lineage, facts["example_id"]),
        "loss_tokens": table["loss_tokens"][0],
        "messages": [stated(turn) for turn in stored["messages"]],
        "tools": stored["tools"],
        "checkpoint_weights": weights,
        "influence": influence,
        "recipes": [_stored_standing(lineage, task, key, row) for key in lineage.project.recipe_keys],
        "nearest_targets": _nearest(lineage, task, form, cosines),
        "tokens": _stored_tokens(lineage, task, facts["example_id"]),
    }


def selected_id(lineage: Lineage, task: str, recipe: str, rank: int) -> str:
    """Id of the row that a recipe has selected at a rank.

    Raises:
        LessAssetsError: There is no such task, recipe or rank, or the subset is missing or stale.
    """
    project = lineage.project
    partition = f"{project.recipe(recipe).key}|{project.task(task).name}"
    subset = read_parquet(lineage.folder("selected_subset", partition), SUBSET, ["rank", "example_id"])
    ids = subset.filter(pl.col("rank") == rank)["example_id"]
    if ids.is_empty():
        raise LessAssetsError(
            f"{recipe} has selected {subset.height:,} rows for {task}: there is no rank {rank:,}.",
            fix="choose a lower --rank" if subset.height else "choose a recipe that selects rows",
        )
    return str(ids[0])


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
    from less_assets.method.gradients.features import RowStatus, extract_features
    from less_assets.method.gradients.quantization import decode, encode
    from less_assets.method.selection.influence import score_block, target_directions
    from less_assets.method.selection.neighbours import target_cosines

    lineage.project.task(task)
    messages, tools = parse_row(text)
    model, settings = lineage.project.model, lineage.project.gradients
    row_id = conversation_id(messages, tools)
    encoded = models.encoder().row(row_id, messages, tools)
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
    for (form, rule), scores in by_pair.items():
        total = sum(np.float32(weights[name]) * scores[name] for name in weights)
        influence.append(_influence(form, rule, labels, {None: np.asarray(total), **scores}))
    totals = {(entry["form"], entry["rule"]): np.array(list(entry["subtasks"].values())) for entry in influence}
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
        "recipes": [_live_standing(lineage, task, key, totals) for key in _scoring_recipes(lineage)],
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
    recipes = [lineage.project.recipe(key) for key in _scoring_recipes(lineage)]
    pairs = dict.fromkeys((str(recipe.form), str(recipe.subtask)) for recipe in recipes)
    return list(pairs) or [(lineage.project.gradients.forms[0], "mean_cosine")]


def _influence(form: str, rule: str, labels: Sequence[str], scores: Mapping[str | None, np.ndarray]) -> dict[str, Any]:
    """Scores (J,) by subtask: None names the total, every other key a checkpoint."""

    def by_label(values: np.ndarray) -> dict[str, float | None]:
        return {label: _number(value) for label, value in zip(labels, values, strict=True)}

    checkpoints = {name: by_label(values) for name, values in scores.items() if name is not None}
    return {"form": form, "rule": rule, "subtasks": by_label(scores[None]), "checkpoints": checkpoints}


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _stored_standing(lineage: Lineage, task: str, key: str, row: pl.DataFrame) -> dict[str, Any]:
    """What a recipe made of a row: whether it selected it, and how far it is from the cut."""
    partition = f"{key}|{task}"
    state = lineage.status("selected_subset", partition).state
    standing: dict[str, Any] = {"recipe": key, "state": state}
    if state != "fresh":
        return standing
    if choice := choice_table(lineage, key, task):
        table, why = choice
        standing["choice"] = {"why": why, "candidates": table.to_dicts()}
    subset = read_parquet(lineage.folder("selected_subset", partition), SUBSET)
    selected = subset.filter(pl.col("example_id") == row["example_id"][0])
    standing |= {"selected": bool(selected.height), "rows": subset.height}
    if selected.height:
        standing |= {name: selected[name][0] for name in ("rank", "score", "subtask")}
    if lineage.project.selects_by_influence(key):
        cuts = Cuts.of(lineage, lineage.project.recipe(key), task)
        standing |= _standing(cuts, float(cuts.margins_of(row)[0]))
    if lineage.project.recipe(key).scores == "tuning":
        file, columns = score_file(row["shard"][0]), ["base_loss", "tuned_loss"]
        losses = read_parquet(lineage.folder("target_tuned_scores", task), file, columns)
        standing |= {name: _number(losses[name][int(row["row"][0])]) for name in columns}
    return standing


def _live_standing(
    lineage: Lineage, task: str, key: str, totals: Mapping[tuple[str, str], np.ndarray]
) -> dict[str, Any]:
    """What a recipe would make of a row, by its total influence (J,) per form and subtask rule."""
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
    order = np.argsort(-cosines, kind="stable")[:NEAREST]
    return [
        {
            "influence": float(cosine),
            "form": form,
            "subtask": target["subtask"],
            "messages": [stated(turn) for turn in target["messages"]],
            "completion": target["assistant_prefix"] + target["completion"],
        }
        for cosine, target in zip(cosines[order], targets[order].iter_rows(named=True), strict=True)
    ]


def _stored_tokens(lineage: Lineage, task: str, example_id: str) -> dict[str, Any] | None:
    """A row's token shares, from the first recipe that has them."""
    for key in _scoring_recipes(lineage):
        partition = f"{key}|{task}"
        if lineage.status("token_attribution", partition).state != "fresh":
            continue
        columns = ["example_id", "subtask", "turn", "text", "share", "momentum", "influence"]
        table = read_parquet(lineage.folder("token_attribution", partition), "tokens.parquet", columns)
        tokens = table.filter(pl.col("example_id") == example_id)
        if tokens.height:
            return {"recipe": key, **tokens.drop("example_id").row(0, named=True)}
    return None


def _left_out(lineage: Lineage, example_id: str) -> str | None:
    """Why `exclude` leaves a row out; None if it does not, or its files have changed since the last run."""
    if not lineage.project.exclude or lineage.status("excluded_rows").state != "fresh":
        return None
    return excluded_reasons(lineage).get(example_id)


def _in_pool(lineage: Lineage, example_id: str) -> bool:
    try:
        find_row(lineage, example_id)
    except (MissingArtifactError, StaleArtifactError):
        raise
    except LessAssetsError:
        return False
    return True


# ---- in words ----


def in_words(explanation: Mapping[str, Any]) -> str:
    """An explanation for a terminal.

    Args:
        explanation: From `explain_row` or `explain_text`.
    """
    weights, task = explanation["checkpoint_weights"], str(explanation["task"])
    parts = [_row_words(explanation)]
    parts += [_influence_words(influence, weights, task) for influence in explanation["influence"]]
    recipes = [(standing["recipe"], _recipe_words(standing)) for standing in explanation["recipes"]]
    parts.append(f"recipes\n{text_table(recipes, indent=2)}")
    parts += [_choice_words(standing) for standing in explanation["recipes"] if "choice" in standing]
    if targets := explanation["nearest_targets"]:
        rows = [
            (
                _signed(target["influence"]),
                target["subtask"],
                _one_line(full_text(target["messages"][-1]), TEXT_CHARACTERS // 2),
                "→",
                _one_line(target["completion"], TEXT_CHARACTERS // 2),
            )
            for target in targets
        ]
        heading = f"target examples that it helps most (form {targets[0]['form']})"
        parts.append(f"{heading}\n{text_table(rows, indent=2)}")
    if tokens := explanation.get("tokens"):
        parts.append(_token_words(tokens))
    return "\n\n".join(parts)


def _row_words(explanation: Mapping[str, Any]) -> str:
    lines = [f"row {explanation['example_id']}"]
    if "source_file" in explanation:
        copies = f", {explanation['copies']} copies" if explanation["copies"] > 1 else ""
        lines.append(
            f"  {explanation['source_file']}:{explanation['source_row']}  (source {explanation['source']}, "
            f"shard {explanation['shard']}, row {explanation['row']}{copies})"
        )
        if explanation["status"] != "ok":
            lines.append(f"  it has no score: {explanation['status']}")
        if explanation["status"] == PREFILTERED:
            lines.append("  the prefilter ranks it too low for every task, so that it can be selected for none")
        if (reason := explanation["left_out"]) is not None:
            lines.append(f"  left out by `exclude`: {_one_line(reason, TEXT_CHARACTERS) or 'no reason given'}")
    else:
        lines.append("  the pool has it as well" if explanation["in_pool"] else "  not in the pool; scored now")
    turns = [(turn["role"], _turn_words(turn)) for turn in explanation["messages"]]
    if explanation["tools"]:
        turns.append(("tools", _one_line(explanation["tools"], TEXT_CHARACTERS)))
    return "\n".join([*lines, text_table(turns, indent=2)])


def _turn_words(turn: Message) -> str:
    masked = "(no loss) " if turn["role"] == "assistant" and not carries_loss(turn) else ""
    return masked + _one_line(full_text(turn), TEXT_CHARACTERS)


def _influence_words(influence: Mapping[str, Any], weights: Mapping[str, float], task: str) -> str:
    headings = ["subtask", "influence", *(f"{name} ({weight:.0%})" for name, weight in weights.items())]
    ranked = sorted(influence["subtasks"].items(), key=lambda item: -(item[1] if item[1] is not None else -np.inf))
    rows = [
        [label, _signed(total), *(_signed(influence["checkpoints"][name][label]) for name in weights)]
        for label, total in ranked
    ]
    title = f"influence on {task} (form {influence['form']}, {influence['rule']})"
    return f"{title}\n{text_table(rows, headings, indent=2)}"


def _recipe_words(standing: Mapping[str, Any]) -> str:
    if standing["state"] != "fresh":
        return f"its subset is {standing['state']}; less-assets run --until selected_subset"
    if "would_be_selected" in standing:
        words = "would be selected" if standing["would_be_selected"] else "would not be selected"
    elif standing["selected"]:
        words = f"selected, rank {standing['rank']:,} of {standing['rows']:,}"
        words += f", for {standing['subtask']}" if standing["subtask"] else ""
    else:
        words = "not selected"
    if (margin := standing.get("above_cut")) is not None:
        side = "above" if margin >= 0 else "below"
        words += f"; {abs(margin):.4g} {side} the cut, {standing['rows_ahead']:,} of {standing['of_rows']:,} ahead"
    before, after = standing.get("base_loss"), standing.get("tuned_loss")
    if before and after is not None:
        words += f"; loss {before:.4g} before and {after:.4g} after training on the targets ({after / before - 1:+.1%})"
    return f"{words} ({standing['note']})" if standing.get("note") else words


def _choice_words(standing: Mapping[str, Any]) -> str:
    choice = standing["choice"]
    rows = [[str(value) for value in candidate.values()] for candidate in choice["candidates"]]
    headings = list(choice["candidates"][0])
    return f"tournament {standing['recipe']}: {choice['why']}\n{text_table(rows, headings, indent=2)}"


def _token_words(tokens: Mapping[str, Any]) -> str:
    strongest = sorted(zip(tokens["share"], tokens["text"], strict=True), key=lambda token: -abs(token[0]))[:STRONGEST]
    momentum = f", of which {_signed(tokens['momentum'])} is momentum's" if tokens["momentum"] else ""
    title = f"tokens, of the exact influence {_signed(tokens['influence'])} on {tokens['subtask']}{momentum}"
    return f"{title}\n{text_table([(_signed(share), repr(text)) for share, text in strongest], indent=2)}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.4f}"


def _one_line(text: str, characters: int) -> str:
    # Control characters of a pool's text must not reach the terminal.
    flat = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return flat if len(flat) <= characters else flat[: characters - 1] + "…"
