"""What a notebook or script uses: an opened project, and selection from rows in memory.

Belongs here: typed functions over what the other rooms do. Names that users import are listed in `__init__.py`; heavy
libraries are imported inside functions.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from less_assets.errors import LessAssetsError

if TYPE_CHECKING:
    import polars as pl

    from less_assets.lineage.lineage import Lineage
    from less_assets.project.project import Project
    from less_assets.running.runner import Outcome
    from less_assets.store.artifacts import ArtifactStore

TASK, RECIPE = "targets", "selected"


def open_project(path: str | os.PathLike[str]) -> "OpenProject":
    """Open a project file: read what was computed, or compute it.

    Args:
        path: The YAML file.

    Raises:
        ProjectFileError: All that is wrong with it, each problem with line, key and what to do.
    """
    from less_assets.project.project import load_project
    from less_assets.steps.registry import open_store

    project = load_project(path)
    return OpenProject(project, open_store(project))


class OpenProject:
    """A project and its artifacts. Reading computes nothing; only `run` does.

    Every method that reads raises `MissingArtifactError` or `StaleArtifactError` if what it reads was never made, or
    was made from something else than the project says now.

    Args:
        project: The project file.
        store: Where its artifacts are kept.
    """

    def __init__(self, project: "Project", store: "ArtifactStore") -> None:
        self.project, self.store = project, store

    def __repr__(self) -> str:
        return f"OpenProject({str(self.project.path)!r})"

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return self.project.task_names

    @property
    def recipes(self) -> list[str]:
        """Keys of the recipes; one with seeds has a key for each, such as `random-seed0`."""
        return list(self.project.recipe_keys)

    def _lineage(self) -> "Lineage":
        from less_assets.steps.registry import open_lineage

        return open_lineage(self.project, self.store)

    def subset(self, task: str, recipe: str) -> "pl.DataFrame":
        """The rows that a recipe selects for a task, best first.

        Returns:
            The columns of `subset.parquet` (docs/tables.md): rank, example_id, source, score, subtask, messages, ….

        Raises:
            ProjectFileError: There is no such task or recipe.
        """
        from less_assets.reading.files import SUBSET
        from less_assets.store.tables import read_parquet

        key = f"{self.project.recipe(recipe).key}|{self.project.task(task).name}"
        return read_parquet(self._lineage().folder("selected_subset", key), SUBSET)

    def scores(self, task: str) -> "pl.DataFrame":
        """Influence of every row of the pool on a task.

        Returns:
            One row a pool row, in the pool's order: example_id, source, status, shard, row, loss_tokens, and for each
            form, subtask rule and checkpoint a column of float32 arrays (J,), one score a subtask; null where the row
            has none.

        Raises:
            ProjectFileError: There is no such task.
        """
        import polars as pl

        from less_assets.reading.files import score_file
        from less_assets.store.tables import read_parquet

        lineage = self._lineage()
        folder = lineage.folder("influence_scores", self.project.task(task).name)
        return pl.concat([read_parquet(folder, score_file(shard)) for shard in lineage.shards()])

    def subtasks(self, task: str) -> list[str]:
        """The subtasks of a task, in the order of the arrays that `scores` has.

        Raises:
            ProjectFileError: There is no such task.
        """
        summary = self._lineage().summary("influence_scores", self.project.task(task).name)
        return [str(subtask) for subtask in summary["subtasks"]]

    def explain(self, task: str, example_id: str) -> dict[str, Any]:
        """Why a row of the pool scores as it does for a task: what `less-assets explain --json` prints.

        Args:
            task: Whose target examples the row is compared with.
            example_id: The row's id, its first characters, or `FILE:LINE`.

        Raises:
            LessAssetsError: The pool has no such row.
        """
        from less_assets.inspection.explain import explain_row

        return explain_row(self._lineage(), self.project.task(task).name, example_id)

    def run(
        self,
        until: str | None = None,
        *,
        tasks: Sequence[str] = (),
        recipes: Sequence[str] = (),
        progress: Callable[[str], object] = print,
        home: str | os.PathLike[str] | None = None,
    ) -> "Outcome":
        """Make what is missing or stale, through Dagster, as `less-assets run` does.

        Args:
            until: Stop with this asset, such as `selected_subset`; None makes everything.
            tasks: Only these; empty for all.
            recipes: Only these recipe keys; empty for all.
            progress: Receives one line for each asset that has something to make. Lines from within an asset go to
                standard error.
            home: Dagster's folder; None: the environment's DAGSTER_HOME, or `.dagster` in the storage root.

        Returns:
            What was made, and how much was there already.

        Raises:
            LessAssetsError: Something cannot be made, or there is no such asset, task or recipe.
        """
        from less_assets.orchestration.definitions import build_definitions
        from less_assets.project.data_check import check_data
        from less_assets.project.yaml_file import problems_error
        from less_assets.running.dagster_home import opened_records
        from less_assets.running.runner import GraphRunner, Request, register_shards
        from less_assets.steps.registry import ASSETS

        if until is not None and until not in ASSETS:
            raise LessAssetsError(f"There is no asset {until!r}.", fix=f"choose one of {', '.join(ASSETS)}")
        names = tuple(self.project.task(name).name for name in tasks)
        keys = tuple(self.project.recipe(key).key for key in recipes)
        if problems := check_data(self.project):
            raise problems_error(str(self.project.path), problems)
        with opened_records(self.project.name, self.store, home) as instance:
            register_shards(self.project, self.store, instance)
            runner = GraphRunner(build_definitions(self.project), self.project, self.store, instance, progress)
            return runner.run(Request(names, keys, until))


def select(
    rows: "pl.DataFrame | Iterable[Mapping[str, Any]]",
    targets: "pl.DataFrame | Iterable[Mapping[str, Any]]",
    model: str | os.PathLike[str],
    *,
    fraction: float | None = None,
    count: int | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[str], object] = print,
) -> "pl.DataFrame":
    """Select the rows that teach what the targets show: LESS without a project file and without Dagster.

    Args:
        rows: The pool, in any of the row formats of a source: messages, prompt and completion, Alpaca or ShareGPT.
            What has other fields, too, keeps them out of it.
        targets: Examples of the task, in the same formats; `subtask` is optional.
        model: Base model: Hugging Face id, folder, or `gguf:package/file.gguf`.
        fraction: Share of the pool to select; 0.05 if neither this nor `count` is given.
        count: Rows to select, instead of a share.
        settings: Sections of a project file that differ from its defaults, such as
            `{"warmup": {"epochs": 2}, "lora": {"rank": 16}, "recipe": {"aggregate": "max"}}`; `recipe` stands for the
            one recipe.
        cache: Folder that keeps what is computed: a second call goes on from there, and computes only what differs.
            None computes in a temporary folder, which is removed.
        progress: Receives lines of progress.

    Returns:
        The selected rows, best first: rank (1 is the best), index (position in `rows`, from 0), score, subtask (the one
        that the row helps most), example_id and messages. What was not usable is not among them.

    Raises:
        LessAssetsError: A setting, a row of `targets` or the model cannot be used.
    """
    import polars as pl

    from less_assets.project.project import parse_project
    from less_assets.reading.files import EXAMPLES, SUBSET
    from less_assets.running.without_dagster import make_with_inputs
    from less_assets.steps.registry import open_store
    from less_assets.store.tables import read_parquet

    if fraction is not None and count is not None:
        raise LessAssetsError("Both `fraction` and `count` say how much to select.", fix="leave one of the two out")
    budget = {"rows": count} if count is not None else {"fraction": 0.05 if fraction is None else fraction}
    with ExitStack() as opened:
        folder = Path(cache or opened.enter_context(tempfile.TemporaryDirectory(prefix="less-assets-"))).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        _write_rows(folder / "rows.jsonl", rows, "rows")
        _write_rows(folder / "targets.jsonl", targets, "targets")
        base = str(Path(model).absolute()) if Path(model).is_dir() else str(model)  # else meant from the cache folder
        written = _project_settings(base, budget, settings or {})
        # JSON is YAML; the file lies there for whoever wants to look into the folder with `less-assets`.
        content = json.dumps(written, indent=1).encode()
        (folder / "project.yaml").write_bytes(content)
        project = parse_project(content, folder / "project.yaml")
        key = f"{next(iter(project.recipe_keys))}|{TASK}"
        lineage = make_with_inputs(project, open_store(project), "selected_subset", key, progress)
        subset = read_parquet(lineage.folder("selected_subset", key), SUBSET)
        places = pl.concat(
            [
                read_parquet(lineage.folder("instruction_pool", shard), EXAMPLES, ["source_row"]).select(
                    pl.lit(shard).alias("shard"),
                    pl.int_range(pl.len(), dtype=pl.Int64).alias("row"),
                    (pl.col("source_row") - 1).alias("index"),
                )
                for shard in lineage.shards()
            ]
        )
        joined = subset.join(places, on=["shard", "row"], how="left", maintain_order="left")
        described = ["rank", "index", "score", "subtask", "example_id"]
        return joined.select(*described, *(name for name in ("messages", "tools") if name in joined.columns))


def _project_settings(
    model: str, budget: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """A project file over the two files, with a user's sections laid over it."""
    recipe = {"name": RECIPE, "strategy": "less", **budget, **settings.get("recipe", {})}
    defaults: dict[str, Any] = {
        "name": "notebook",
        "storage": {"root": "artifacts"},
        "model": {"base": model},
        "pool": {"sources": [{"name": "rows", "path": "rows.jsonl"}]},
        "tasks": [{"name": TASK, "examples": {"path": "targets.jsonl"}}],
        "recipes": [recipe],
    }
    sections = {name: {**defaults.get(name, {}), **section} for name, section in settings.items() if name != "recipe"}
    return defaults | sections


def _write_rows(path: Path, rows: "pl.DataFrame | Iterable[Mapping[str, Any]]", what: str) -> None:
    """Write rows as JSON lines, one a line whatever they say, so that line n is row n - 1."""
    records: Iterable[Mapping[str, Any]] = rows.iter_rows(named=True) if hasattr(rows, "iter_rows") else rows
    with path.open("w", encoding="utf-8") as file:
        for number, record in enumerate(records):
            if not isinstance(record, Mapping):
                raise LessAssetsError(
                    f"Row {number} of `{what}` is a {type(record).__name__}, not a mapping of fields.",
                    fix="pass a Polars frame or mappings; of a pandas frame `polars.from_pandas(frame)`",
                )
            try:
                file.write(json.dumps(dict(record), ensure_ascii=False, allow_nan=False) + "\n")
            except (TypeError, ValueError) as error:
                raise LessAssetsError(
                    f"Row {number} of `{what}` cannot be written as JSON: {error}",
                    fix="pass mappings of texts, numbers, lists and mappings; leave other fields out",
                ) from error
