"""The command `less-assets`: for terminals and clusters; it writes to the same Dagster instance as the UI.

Belongs here: arguments, printing, exit codes. What runs and in which order is `jobs.py`.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from less_assets.errors import LessAssetsError
from less_assets.progress import duration

if TYPE_CHECKING:
    import dagster as dg

    from less_assets.jobs import GraphRunner, Request
    from less_assets.project import Project
    from less_assets.store.artifacts import ArtifactStore

REPOSITORY = Path(__file__).resolve().parents[1]
KEPT = "what is finished is kept, the same command goes on from there"

app = typer.Typer(
    name="less-assets",
    help="Select the part of an instruction pool that teaches a task, fine-tune on it, and see why.\n\n"
    "The project file is named by --project or LESS_PROJECT; DAGSTER_HOME says where Dagster keeps its records "
    "(default: .dagster beside the code). Typical use: `check`, then `plan`, then `run`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    # Rich's traceback prints local variables: gigabytes of tensors.
    pretty_exceptions_enable=False,
)
ProjectOption = Annotated[
    Path,
    typer.Option("--project", "-p", envvar="LESS_PROJECT", help="The project file.", show_default="projects/demo.yaml"),
]
DEFAULT_PROJECT = REPOSITORY / "projects" / "demo.yaml"
TaskOption = Annotated[list[str], typer.Option("--task", help="Only this task; may be given several times.")]
RecipeOption = Annotated[list[str], typer.Option("--recipe", help="Only this recipe key; may be given several times.")]
UntilOption = Annotated[str, typer.Option("--until", help="Stop with this asset, e.g. selected_subset.")]


@app.command()
def check(project: ProjectOption = DEFAULT_PROJECT) -> None:
    """Read the project file and look at the data; report every problem at once. Changes nothing."""
    from less_assets.project import load_project
    from less_assets.project_check import check_data

    with _told():
        loaded = load_project(project)
        problems = check_data(loaded)
        for problem in problems:
            print(problem)
        if problems:
            print(f"\n{len(problems)} problem{'s' if len(problems) > 1 else ''} found; nothing was changed.")
            raise typer.Exit(1)
        print(
            f"{loaded.name}: the project file and its data are usable: {len(loaded.pool.sources)} sources, "
            f"{len(loaded.tasks)} tasks, {len(loaded.recipe_keys)} recipes, {len(loaded.checkpoints)} checkpoints."
        )


@app.command()
def plan(
    project: ProjectOption = DEFAULT_PROJECT,
    task: TaskOption = [],  # noqa: B006 - typer reads the default once
    recipe: RecipeOption = [],  # noqa: B006
    until: UntilOption = "",
) -> None:
    """Say what `run` would make, and why. Computes nothing."""
    with _told(), _opened(project) as (loaded, store, instance, runner):
        from less_assets.jobs import register_shards

        register_shards(loaded, store, instance)
        counts: dict[str, dict[str, int]] = {}
        reasons: dict[str, str] = {}
        for asset, _partition, status in runner.status(_request(task, recipe, until, loaded)):
            states = counts.setdefault(asset, {})
            states[status.state] = states.get(status.state, 0) + 1
            if status.state == "stale":
                reasons.setdefault(asset, "; ".join(status.reasons))
        due = 0
        print(f"{'asset':<22}{'fresh':>7}{'to make':>9}  why")
        for asset, states in counts.items():
            fresh = states.get("fresh", 0)
            to_make = sum(states.values()) - fresh
            due += to_make
            print(f"{asset:<22}{fresh:>7}{to_make:>9}  {_why(states, reasons.get(asset, ''))}")
        print("\nnothing to do" if not due else f"\n{due} artifacts to make; `less-assets run` makes them")


def _why(states: dict[str, int], reason: str) -> str:
    words = []
    if states.get("missing"):
        words.append(f"{states['missing']} never made")
    if states.get("stale"):
        words.append(f"{states['stale']} stale: {reason}")
    if states.get("blocked"):
        words.append(f"{states['blocked']} after what they need")
    return "; ".join(words)


@app.command()
def run(
    project: ProjectOption = DEFAULT_PROJECT,
    task: TaskOption = [],  # noqa: B006 - typer reads the default once
    recipe: RecipeOption = [],  # noqa: B006
    until: UntilOption = "",
    resample_warmup: Annotated[
        bool, typer.Option(help="Draw the warm-up sample again; trains everything anew.")
    ] = False,
    verify: Annotated[
        bool, typer.Option(help="Compare every stored file with its digest first; damaged artifacts are made again.")
    ] = False,
) -> None:
    """Make what is missing or stale, in order, through Dagster; what is done stays done if it is interrupted."""
    from less_assets import summary

    started = time.monotonic()
    with _told(), _opened(project) as (loaded, store, instance, runner):
        from less_assets.jobs import register_shards
        from less_assets.lineage import draw_sample_again
        from less_assets.project_check import check_data
        from less_assets.project_yaml import problems_error

        request = replace(_request(task, recipe, until, loaded), verify=verify)
        if problems := check_data(loaded):  # a task's missing file shall not be found after hours of gradients
            raise problems_error(str(project), problems)
        if resample_warmup:
            draw_sample_again(store)
        register_shards(loaded, store, instance)
        try:
            outcome = runner.run(request)
        except (LessAssetsError, OSError):
            print(f"\nstopped after {duration(time.monotonic() - started)}; {KEPT}", file=sys.stderr)
            raise
        made = sum(len(partitions) for partitions in outcome.materialized.values())
        seconds = duration(time.monotonic() - started)
        print(f"\n{made} artifacts made, {outcome.fresh} were fresh; {seconds}")
        if not made:
            print("nothing was computed: everything is as the project file says")
        print(summary.results(loaded, store))


@app.command()
def gc(
    project: ProjectOption = DEFAULT_PROJECT,
    dry_run: Annotated[bool, typer.Option(help="Only list what would be removed.")] = False,
) -> None:
    """Remove artifacts that nothing current refers to."""
    from less_assets.project import load_project
    from less_assets.resources import open_store
    from less_assets.store.garbage import collect_garbage

    with _told():
        removed = collect_garbage(open_store(load_project(project)), dry_run=dry_run)
        for path, size in removed:
            print(f"{size / 1e6:>10,.1f} MB  {path}")
        total = sum(size for _, size in removed)
        print(f"{len(removed)} artifacts, {total / 1e6:,.1f} MB {'would be' if dry_run else 'were'} removed")


def _request(task: list[str], recipe: list[str], until: str, project: "Project") -> "Request":
    from less_assets.jobs import Request
    from less_assets.partitions import ASSET_AXES

    for name in task:
        project.task(name)
    for key in recipe:
        project.recipe(key)
    if until and until not in ASSET_AXES:
        raise LessAssetsError(f"There is no asset {until!r}.", fix=f"choose one of {', '.join(ASSET_AXES)}")
    return Request(tuple(task), tuple(recipe), until or None)


@contextmanager
def _told() -> Iterator[None]:
    """Print a user's problem without a traceback, and leave with status 1."""
    try:
        yield
    except LessAssetsError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except OSError as error:  # of a disk or folder that nobody above has named better
        print(f"\nerror: {error}\n  to do: check free space and permissions; {KEPT}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print(f"\ninterrupted; {KEPT}", file=sys.stderr)
        raise typer.Exit(130) from None


@contextmanager
def _opened(path: Path) -> Iterator[tuple["Project", "ArtifactStore", "dg.DagsterInstance", "GraphRunner"]]:
    """The project, its store, the Dagster instance, and what runs the graph on them."""
    import dagster as dg

    from less_assets.build import build_definitions
    from less_assets.jobs import GraphRunner
    from less_assets.project import load_project
    from less_assets.resources import open_store

    loaded = load_project(path)
    definitions = build_definitions(loaded)
    store = open_store(loaded)
    with dg.DagsterInstance.from_config(str(dagster_home())) as instance:
        yield loaded, store, instance, GraphRunner(definitions, loaded, store, instance, _say)


def dagster_home() -> Path:
    """DAGSTER_HOME, with this project's instance defaults if it has none of its own."""
    home = Path(os.environ.get("DAGSTER_HOME") or REPOSITORY / ".dagster").absolute()
    home.mkdir(parents=True, exist_ok=True)
    defaults = REPOSITORY / "dagster.yaml"
    if not (home / "dagster.yaml").exists() and defaults.exists():
        shutil.copy(defaults, home / "dagster.yaml")
    os.environ["DAGSTER_HOME"] = str(home)
    return home


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr)


def main() -> None:
    """Entry point of the `less-assets` command."""
    # Telemetry and hub look-ups have no place in a command that must also work without a network.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()
