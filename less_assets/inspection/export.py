"""Export of a selection: a folder that others can train on, with a card that says what it is.

Belongs here: which files an export has, rows with the pool's other columns, the stable name `latest`, uploading. What
the cards say is `export_cards.py`, what trainers read `export_trainers.py`.
"""

import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from less_assets.errors import LessAssetsError, MissingArtifactError, StaleArtifactError
from less_assets.inspection.export_cards import dataset_card, model_card
from less_assets.inspection.export_trainers import hub_name, write_trainer_files
from less_assets.lineage.lineage import Lineage, split
from less_assets.lineage.pool_files import data_path
from less_assets.method.data.conversations import example_id, for_trainers, with_all_fields
from less_assets.reading.files import EXAMPLES, SUBSET
from less_assets.store.artifacts import ArtifactFolder
from less_assets.store.tables import read_parquet

DATA = "data/train-00000-of-00001.parquet"
ROWS = "rows.jsonl"
ADAPTER = "adapter"
LATEST = "latest"

_MESSAGE_FIELDS = {
    "role": pa.string(),
    "content": pa.string(),
    "reasoning_content": pa.string(),
    "tool_calls": pa.string(),
    "tool_call_id": pa.string(),
    "name": pa.string(),
    "train": pa.bool_(),
}
_COLUMNS = {
    "example_id": pa.string(),
    "source": pa.string(),
    "rank": pa.int64(),
    "score": pa.float32(),
    "subtask": pa.string(),
}


@dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
        folder: Where it lies; the name is a digest of what it holds.
        latest: The stable name beside it, which refers to the last export.
        rows: Selected rows.
        left_out: Why rows are not in LLaMA-Factory's file, and how many.
    """

    folder: Path
    latest: Path
    rows: int
    left_out: Mapping[str, int]

    @property
    def files(self) -> list[str]:
        """Files of the folder, sorted, relative to it."""
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())


def export_selection(
    lineage: Lineage, task: str, recipe_key: str, output: Path, *, keep_columns: bool = False
) -> Export:
    """Write a selection for others: data, card, files for trainers, and the adapter if it was trained.

    Args:
        lineage: Reads what is stored; computes nothing.
        task: The task.
        recipe_key: Key of the recipe.
        output: Folder for exports. This one lies below it, named by its content, and `latest` refers to it.
        keep_columns: Read the pool's files again, and keep what else each row says.

    Raises:
        ProjectFileError: There is no such task or recipe.
        MissingArtifactError, StaleArtifactError: The selection is not there or out of date, or a file of the pool has
            changed since it was read.
        LessAssetsError: The recipe selects nothing, or `latest` is a folder of somebody else.
    """
    project = lineage.project
    recipe, key = project.recipe(recipe_key), f"{recipe_key}|{project.task(task).name}"
    subset = with_all_fields(read_parquet(_selection(lineage, key), SUBSET))
    if subset.is_empty():
        raise LessAssetsError(
            f"{recipe_key} selects no rows: there is nothing to export.", fix="choose a recipe that selects rows"
        )
    if (output / LATEST).exists() and not (output / LATEST).is_symlink():
        raise LessAssetsError(
            f"{LATEST} is not a link that an export has made.", where=str(output / LATEST), fix="choose another folder"
        )
    kept = kept_columns(lineage, subset) if keep_columns else [{} for _ in range(subset.height)]
    base = recipe.model or project.model.base
    output.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=output))
    try:
        _write_rows(staging, subset, kept)
        rows = list(zip(subset["messages"].to_list(), subset["tools"].to_list(), strict=True))
        left_out = write_trainer_files(staging, project, base, rows)
        has_adapter = _copy_adapter(lineage, key, staging / ADAPTER, hub_name(base))
        card = dataset_card(lineage, recipe, task, subset, kept, left_out, has_adapter=has_adapter)
        (staging / "README.md").write_text(card, encoding="utf-8")
        folder = output / _content_digest(staging)
        staging.chmod(0o755)
        if folder.exists():  # the same export again
            shutil.rmtree(staging)
        else:
            staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    link = output / f".latest-{os.getpid()}"
    link.symlink_to(folder.name)
    link.replace(output / LATEST)
    return Export(folder, output / LATEST, subset.height, left_out)


def _selection(lineage: Lineage, key: str) -> ArtifactFolder:
    """The folder of a selection, or an error whose command brings it up to date with all that it is made from."""
    try:
        return lineage.folder("selected_subset", key)
    except (MissingArtifactError, StaleArtifactError) as error:
        recipe, task = split(key)
        project = shlex.quote(str(lineage.project.path))
        fix = f"less-assets run --project {project} --task {task} --recipe {recipe}"
        raise type(error)(error.what, where=error.where, fix=fix) from error


def _content_digest(folder: Path) -> str:
    """Digest of names and bytes of all files, 16 hex characters."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# ---- rows ----


def kept_columns(lineage: Lineage, subset: pl.DataFrame) -> list[dict[str, Any]]:
    """What else the pool's files say of each selected row, in the subset's order.

    Args:
        lineage: Says where each row stands.
        subset: Columns example_id, shard and row.

    Raises:
        StaleArtifactError: A file has changed: the row says something else now.
    """
    from less_assets.method.data.row_files import read_raw
    from less_assets.method.data.row_formats import UnusableRowError, normalize, other_columns

    project = lineage.project
    wanted: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for (shard,), part in subset.with_row_index("place").group_by("shard", maintain_order=True):
        places = read_parquet(
            lineage.folder("instruction_pool", str(shard)), EXAMPLES, ["source", "source_file", "source_row"]
        )
        for position, row in part.select("place", "row").iter_rows():
            source, file, number = places.row(row)
            wanted[source, file][number] = position
    columns: list[dict[str, Any]] = [{} for _ in range(subset.height)]
    for (name, file), numbers in wanted.items():
        source, first = project.source(name), min(numbers)
        seen = set()
        raw_rows = read_raw(data_path(project, file), first - 1, max(numbers) - first + 1, dialect=source.dialect)
        for raw in raw_rows:
            if raw.number not in numbers:
                continue
            position = numbers[raw.number]
            try:
                conversation = normalize(raw.record or {}, source.format)
            except UnusableRowError:
                break
            if example_id(*conversation) != subset["example_id"][position]:
                break
            seen.add(raw.number)
            columns[position] = other_columns(raw.record or {}, source.format)
        if missing := sorted(numbers.keys() - seen):
            raise StaleArtifactError(
                "A file of the pool has changed since the selection was made: a row says something else now.",
                where=f"{file}:{missing[0]}",
                fix="less-assets run --until selected_subset",
            )
    return columns


def _write_rows(folder: Path, subset: pl.DataFrame, kept: Sequence[Mapping[str, Any]]) -> None:
    """The rows as JSON lines in the form that trainers read, and as Parquet."""
    names = list(dict.fromkeys(name for row in kept for name in row))
    own = {*_COLUMNS, "messages", "tools"}
    renamed = {name: f"pool_{name}" if name in own else name for name in names}
    lines, records = [], []
    for number, row in enumerate(subset.select(*_COLUMNS, "messages", "tools").iter_rows(named=True)):
        columns = {name: row[name] for name in _COLUMNS}
        said = for_trainers(row["messages"], row["tools"])
        for turn in said["messages"]:
            if turn.get("weight") == 0:
                turn["train"] = False  # axolotl's word for it
        others = {renamed[name]: value for name, value in kept[number].items()}
        lines.append(json.dumps({**columns, **said, **others}, ensure_ascii=False, default=str) + "\n")
        messages = [{**turn, "reasoning_content": turn["reasoning"]} for turn in row["messages"]]
        records.append({**columns, "messages": messages, "tools": row["tools"], **others})
    (folder / ROWS).write_text("".join(lines), encoding="utf-8")
    stated = [
        name
        for name in _MESSAGE_FIELDS
        if name in ("role", "content") or any(turn[name] is not None for row in records for turn in row["messages"])
    ]
    turns = pa.list_(pa.struct([(name, _MESSAGE_FIELDS[name]) for name in stated]))
    arrays = {name: pa.array([row[name] for row in records], dtype) for name, dtype in _COLUMNS.items()}
    arrays["messages"] = pa.array(
        [[{name: turn[name] for name in stated} for turn in row["messages"]] for row in records], turns
    )
    if any(row["tools"] for row in records):
        arrays["tools"] = pa.array([row["tools"] for row in records], pa.string())
    for name in renamed.values():
        arrays[name] = _column([row.get(name) for row in records])
    (folder / DATA).parent.mkdir()
    pq.write_table(pa.table(arrays), folder / DATA)


def _column(values: Sequence[Any]) -> pa.Array:
    """Values of one plain type as they are, others as JSON text: a column of Parquet has one type."""
    types = {type(value) for value in values if value is not None}
    if types <= {int, float} or (len(types) == 1 and types <= {bool, str}):
        try:
            return pa.array(values, pa.float64() if float in types else None)
        except (pa.ArrowInvalid, OverflowError):
            pass  # an integer beyond 64 bits
    texts = [None if value is None else json.dumps(value, ensure_ascii=False, default=str) for value in values]
    return pa.array(texts, pa.string())


# ---- the adapter ----


def _copy_adapter(lineage: Lineage, key: str, folder: Path, base: str | None) -> bool:
    """Copy the fine-tuned model with its card, if it was trained and is up to date."""
    try:
        trained = lineage.summary("finetuned_model", key)["trained"]
        stored = lineage.folder("finetuned_model", key)
    except (MissingArtifactError, StaleArtifactError):
        return False
    if not trained:
        return False
    folder.mkdir()
    with stored.local(write=False) as local:
        for path in sorted(local.glob("adapter_*")):
            shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = (
        base.partition("@")[0] if base else None
    )  # a folder of this machine is nobody else's
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(lineage, key, base), encoding="utf-8")
    return True


# ---- the Hub ----


def upload(export: Export, repository: str) -> list[str]:
    """Upload an export: the data set, private if it is new, and the adapter as `REPOSITORY-adapter`.

    Never run where this was written: it needs the network and a token.

    Args:
        export: The export.
        repository: `owner/name` on the Hub.

    Returns:
        Addresses of what was uploaded.
    """
    from huggingface_hub import HfApi

    api, addresses = HfApi(), []
    try:
        for planned in planned_uploads(export, repository):
            address = api.create_repo(planned.repository, repo_type=planned.kind, private=True, exist_ok=True)
            api.upload_folder(
                repo_id=planned.repository,
                repo_type=planned.kind,
                folder_path=planned.folder,
                ignore_patterns=[f"{ADAPTER}/*"] if planned.kind == "dataset" else None,
                commit_message=f"less-assets export {export.folder.name}",
            )
            addresses.append(str(address))
    except Exception as error:  # of the Hub, of whichever HTTP client it uses, of the network
        raise LessAssetsError(
            f"The upload failed: {error}",
            where=repository,
            fix=f"look at the name and the network, and log in with `hf auth login`; the export is in {export.folder}",
        ) from error
    return addresses


@dataclass(frozen=True)
class Upload:
    """A folder that goes into a repository of a kind (`dataset` or `model`), with its files."""

    repository: str
    kind: str
    folder: Path
    files: list[str]


def planned_uploads(export: Export, repository: str) -> list[Upload]:
    """What `upload` uploads, and where to.

    Raises:
        LessAssetsError: The name is none of a repository.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise LessAssetsError(f"This names no repository: {error}", where=repository, fix="write OWNER/NAME") from error
    if repository.count("/") != 1:
        raise LessAssetsError("A repository has an owner and a name.", where=repository, fix="write OWNER/NAME")
    inside = f"{ADAPTER}/"
    data = [name for name in export.files if not name.startswith(inside)]
    uploads = [Upload(repository, "dataset", export.folder, data)]
    if model := [name.removeprefix(inside) for name in export.files if name.startswith(inside)]:
        uploads.append(Upload(f"{repository}-adapter", "model", export.folder / ADAPTER, model))
    return uploads
