"""The command `less-assets`: for terminals and clusters; it writes to the same Dagster instance as the UI.

Belongs here: arguments, printing, exit codes. What runs and in which order is `running/runner.py`.
"""

import io
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from less_assets.compute.progress import counted, duration
from less_assets.errors import LessAssetsError
from less_assets.running.terminal import KEPT, print_answer, print_json, print_warning, say, termination_as_ctrl_c, told

if TYPE_CHECKING:
    import dagster as dg

    from less_assets.lineage.lineage import Lineage
    from less_assets.planning.estimate import Estimate
    from less_assets.project.project import Project
    from less_assets.running.request import Request
    from less_assets.running.runner import GraphRunner, Outcome, Warned
    from less_assets.store.artifacts import ArtifactStore

app = typer.Typer(
    name="less-assets",
    help="Select the part of an instruction pool that teaches a task, fine-tune on it, and see why.\n\n"
    "The project file is named by --project or LESS_PROJECT; DAGSTER_HOME says where Dagster keeps its records "
    "(default: .dagster in the project's storage). Typical use: `check`, then `plan`, then `run`.",
    no_args_is_help=True,
    rich_markup_mode=None,
    # Rich's traceback prints local variables: gigabytes of tensors.
    pretty_exceptions_enable=False,
)
ProjectOption = Annotated[
    Path,
    typer.Option("--project", "-p", envvar="LESS_PROJECT", help="The project file."),
]
DEFAULT_PROJECT = Path("project.yaml")
TaskOption = Annotated[list[str], typer.Option("--task", help="Only this task; may be given several times.")]
RecipeOption = Annotated[list[str], typer.Option("--recipe", help="Only this recipe key; may be given several times.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
ExtrasOption = Annotated[
    bool, typer.Option(help="Also certificates of scores, shares of tokens, and reports; nothing is made from them.")
]
UntilOption = Annotated[str, typer.Option("--until", help="Stop with this asset, e.g. selected_subset.")]


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"less-assets {version('less-assets')}")
        raise typer.Exit


@app.callback()
def before_any_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """What holds for every command; typer takes the help from `app`."""


@app.command()
def init(
    pool: Annotated[
        list[str], typer.Option("--pool", help="File, folder, pattern or URL of instruction rows; may be repeated.")
    ] = [],  # noqa: B006 - typer reads the default once
    model: Annotated[str, typer.Option("--model", help="Hugging Face id, folder, or gguf:package/file.gguf.")] = "",
    examples: Annotated[str, typer.Option("--examples", help="JSON lines with a few examples of the task.")] = "",
    held_out: Annotated[str, typer.Option("--held-out", help="Rows of the task to evaluate on; optional.")] = "",
    task: Annotated[
        str, typer.Option("--task", help="Name of the task.", show_default="file name of its examples")
    ] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = DEFAULT_PROJECT,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented project file for your data, and check it; what no option says is asked for in a terminal."""
    with told():
        from less_assets.project.new_file import Answers, write_project_file

        pool = pool or [_asked("--pool", "Instruction rows (file, folder or pattern)")]
        model = model or _asked("--model", "Base model (Hugging Face id or folder)")
        examples = examples or _asked("--examples", "Examples of the task (JSON lines)")
        if not held_out and sys.stdin.isatty():
            held_out = typer.prompt("Held-out rows of the task (Enter: none)", default="", show_default=False)
        answers = Answers(pool, model, task or Path(examples).stem, examples, held_out or None)
        write_project_file(answers, output, overwrite=force)
        print(f"wrote {output}")
    check(output)
    at = "" if output == DEFAULT_PROJECT else f" --project {shlex.quote(str(output))}"
    print(f"next: less-assets plan{at}   (what it costs), then less-assets run{at}")


def _asked(option: str, question: str) -> str:
    """What a person answers; without a terminal, an error that names the option."""
    if not sys.stdin.isatty():
        raise LessAssetsError(f"{question}: not given.", fix=f"add {option}")
    return str(typer.prompt(question)).strip()


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where data, project file and artifacts go.")] = Path(
        "less-assets-demo"
    ),
    run_it: Annotated[bool, typer.Option("--run/--no-run", help="Run it, or only write it.")] = True,
) -> None:
    """Write a small pool of questions with two tasks into a folder, and run everything on it: minutes on a CPU."""
    with told():
        from less_assets.demo import write_demo

        project = write_demo(folder)
        print(f"wrote {project}; to go on with it: less-assets run --project {project}")
    if run_it:
        run(project)


@app.command()
def check(project: ProjectOption = DEFAULT_PROJECT, as_json: JsonOption = False) -> None:
    """Read the project file and look at the data; report every problem at once. Changes nothing."""
    from less_assets.inspection.pool_counts import counts_in_words
    from less_assets.inspection.project_check import check_project, verdict_as_data

    with told():
        try:
            checked = check_project(project)
        except LessAssetsError as error:
            if as_json:
                print_json(verdict_as_data(error))
            raise
        if as_json:
            print_json(verdict_as_data(checked))
            raise typer.Exit(1 if checked.problems else 0)
        loaded, problems = checked.project, checked.problems
        sampled = [counts_in_words(checked.sample, "Sample of the pool")] if checked.sample else []
        for line in (*problems, *checked.notes, *sampled):
            print(line)
        if problems:
            print(f"\n{counted(len(problems), 'problem')} found; nothing was computed.")
            raise typer.Exit(1)
        print(
            f"{loaded.name}: the project file and its data are usable: {counted(len(loaded.pool.sources), 'source')}, "
            f"{counted(len(loaded.tasks), 'task')}, {counted(len(loaded.recipe_keys), 'recipe')}, "
            f"{counted(len(loaded.checkpoints), 'checkpoint')}."
        )


@app.command()
def plan(
    project: ProjectOption = DEFAULT_PROJECT,
    task: TaskOption = [],  # noqa: B006 - typer reads the default once
    recipe: RecipeOption = [],  # noqa: B006
    until: UntilOption = "",
    extras: ExtrasOption = True,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Where earlier runs have not measured a speed, try it on the real model, for up to a minute.",
        ),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Say what `run` would make, why, and what it costs: tokens, time and bytes. Computes nothing that is kept."""
    with told(as_json):
        if idle := _nothing_to_do(project, task, recipe, until, extras):
            from less_assets.planning.estimate import nothing_due

            lineage, _, needed = idle
            _print_planned(nothing_due(lineage, needed), lineage, as_json)
            return
    with told(as_json), _opened(project) as (loaded, store, instance, runner):
        from less_assets.compute.models import ModelLoader, cache_folder
        from less_assets.planning.estimate import estimate
        from less_assets.running.runner import register_shards
        from less_assets.steps.registry import open_lineage

        register_shards(loaded, store, instance)
        models = ModelLoader(loaded, cache_folder(store))
        request = _request(task, recipe, until, extras, loaded)
        lineage = open_lineage(loaded, store)
        planned = estimate(runner, lineage, models, request, calibrate=calibrate, log=say)
        _print_planned(planned, lineage, as_json)
    if not planned.due:
        _remember_recorded(loaded, store, request)


def _print_planned(planned: "Estimate", lineage: "Lineage", as_json: bool) -> None:
    from less_assets.inspection.plan_words import plan_as_data, print_plan
    from less_assets.inspection.pool_counts import counts_in_words, pool_counts, prefilter_in_words

    if as_json:
        print_json(plan_as_data(planned) | {"pool": pool_counts(lineage)})
        return
    print_plan(planned)
    if counts := pool_counts(lineage):
        print(f"\n{counts_in_words(counts)}")
    if said := prefilter_in_words(lineage):
        print(f"\n{said}")


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
    extras: ExtrasOption = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing until the end, but errors.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON event a line, for programs, and nothing else.")
    ] = False,
) -> None:
    """Make what is missing or stale, in order, through Dagster; what is done stays done if it is interrupted."""
    started = time.monotonic()
    with told(as_json), termination_as_ctrl_c():
        if not (verify or resample_warmup) and (idle := _nothing_to_do(project, task, recipe, until, extras)):
            lineage, request, needed = idle
            fresh = sum(map(len, needed.values()))
            _say_finished(lineage.project, lineage.store, request, 0, fresh, (), started, as_json)
            return
    with (
        told(as_json),
        termination_as_ctrl_c(),
        _opened(project, lambda line: print_warning(line, as_json)) as (loaded, store, instance, runner),
    ):
        from less_assets.lineage.warmup_draw import draw_sample_again
        from less_assets.project.data_check import check_data
        from less_assets.project.yaml_file import problems_error
        from less_assets.running.runner import register_shards

        request = replace(_request(task, recipe, until, extras, loaded), verify=verify)
        if problems := check_data(loaded):  # a task's missing file shall not be found after hours of gradients
            raise problems_error(str(project), problems)
        if resample_warmup:
            draw_sample_again(store)
        register_shards(loaded, store, instance)
        try:
            outcome = _watched(runner, loaded, store, request, quiet=quiet, as_json=as_json)
        except (LessAssetsError, OSError):
            print(f"\nstopped after {duration(time.monotonic() - started)}; {KEPT}", file=sys.stderr)
            raise
        made = sum(map(len, outcome.materialized.values()))
        _say_finished(loaded, store, request, made, outcome.fresh, outcome.warned, started, as_json)
    _remember_recorded(loaded, store, request)


def _say_finished(
    project: "Project",
    store: "ArtifactStore",
    request: "Request",
    made: int,
    fresh: int,
    warned: Sequence["Warned"],
    started: float,
    as_json: bool,
) -> None:
    """Say what a run has made, and show the results."""
    from less_assets.inspection import summary
    from less_assets.inspection.pool_counts import pool_counts
    from less_assets.running.watch import JsonEvents
    from less_assets.steps.registry import open_lineage

    if as_json:
        pool = pool_counts(open_lineage(project, store))
        finished = {"made": made, "fresh": fresh, "pool": pool, "warned": [asdict(check) for check in warned]}
        JsonEvents(sys.stdout).tell("finished", finished)
        return
    print(f"\n{counted(made, 'artifact')} made, {fresh:,} were fresh; {duration(time.monotonic() - started)}")
    if not made:
        print("nothing was computed: everything is as the project file says")
    print(summary.results(project, store, request.tasks))
    print(summary.warnings(warned), end="")


def _nothing_to_do(
    path: Path, task: list[str], recipe: list[str], until: str, extras: bool = True
) -> tuple["Lineage", "Request", dict[str, list[str | None]]] | None:
    """The plans, the request, and what it needs, if nothing of it is to be made; None: the run has to look."""
    from less_assets.project.project import load_project
    from less_assets.running.home_folder import nothing_to_do
    from less_assets.steps.registry import open_store

    project = load_project(path)
    request = _request(task, recipe, until, extras, project)
    idle = nothing_to_do(project, open_store(project), request)
    return None if idle is None else (idle[0], request, idle[1])


def _remember_recorded(project: "Project", store: "ArtifactStore", request: "Request") -> None:
    """Let the next command know without Dagster that there is nothing to do."""
    from less_assets.running.home_folder import remember_recorded

    remember_recorded(project, store, request)


def _watched(
    runner: "GraphRunner",
    project: "Project",
    store: "ArtifactStore",
    request: "Request",
    *,
    quiet: bool,
    as_json: bool,
) -> "Outcome":
    """Run, and show it: one live block in a terminal, lines in a pipe, events for programs."""
    from rich.console import Console

    from less_assets.inspection.pool_counts import pool_counts
    from less_assets.orchestration.console_log import heard_by
    from less_assets.running.watch import JsonEvents, LiveBlock
    from less_assets.steps.registry import open_lineage

    console = Console(stderr=True)
    if as_json:
        events = JsonEvents(sys.stdout)

        def tell(kind: str, values: Mapping[str, Any]) -> None:
            events.tell(kind, values)
            if kind == "asset_finished" and values["asset"] == "pool_index":
                events.tell("pool", pool_counts(open_lineage(project, store)) or {})

        with events.watching():
            return runner.run(request, events.log, tell)
    if quiet:
        with heard_by(lambda entry: None):
            return runner.run(request, lambda line: None)
    if not console.is_terminal:
        return runner.run(request)
    block = LiveBlock(console, _planned_seconds(runner, project, store, request))
    with block.watching():
        return runner.run(request, block.log, block.tell)


def _planned_seconds(
    runner: "GraphRunner", project: "Project", store: "ArtifactStore", request: "Request"
) -> dict[str, float]:
    """Time that the plan expects of each asset, where speeds are known; nothing if the plan cannot be made."""
    from less_assets.compute.models import ModelLoader, cache_folder
    from less_assets.planning.estimate import estimate
    from less_assets.steps.registry import open_lineage

    models = ModelLoader(project, cache_folder(store))
    try:
        planned = estimate(
            runner, open_lineage(project, store), models, request, calibrate=False, log=lambda line: None
        )
    except LessAssetsError:  # the run will say it
        return {}
    return {asset.asset: asset.seconds for asset in planned.assets if asset.seconds}


@app.command()
def explain(
    task: Annotated[str, typer.Argument(help="The task whose target examples the row is compared with.")],
    example_id: Annotated[
        str, typer.Argument(help="Id of a row of the pool, its first characters, or FILE:LINE.")
    ] = "",
    text: Annotated[
        str,
        typer.Option(
            "--text",
            help="Score this row now instead: a question, a blank line and an answer, or JSON as in a pool file; "
            "`-` reads it from standard input.",
        ),
    ] = "",
    recipe: Annotated[str, typer.Option("--recipe", help="The row that this recipe ranks first, or at --rank.")] = "",
    rank: Annotated[int, typer.Option("--rank", help="With --recipe: the rank of the row.", min=1)] = 1,
    as_json: JsonOption = False,
    project: ProjectOption = DEFAULT_PROJECT,
) -> None:
    """Say why a row scores as it does for a task. Computes nothing, unless --text gives a new row."""
    with told(as_json), _read(project) as lineage:
        from less_assets.compute.models import ModelLoader, cache_folder
        from less_assets.inspection.explain import explain_row, explain_text, in_words, selected_id

        if sum(map(bool, (example_id, text, recipe))) != 1:
            raise LessAssetsError(
                "One row is to be explained.",
                fix="give the id of a row of the pool, or --recipe for its top row, or a row of your own with --text",
            )
        if text:
            models = ModelLoader(lineage.project, cache_folder(lineage.store))
            explanation = explain_text(lineage, models, task, sys.stdin.read() if text == "-" else text)
        else:
            explanation = explain_row(lineage, task, example_id or selected_id(lineage, task, recipe, rank))
        print_answer(explanation, in_words, as_json)


@app.command()
def trace(
    example_id: Annotated[str, typer.Argument(help="Id of a row of the pool, its first characters, or FILE:LINE.")],
    as_json: JsonOption = False,
    project: ProjectOption = DEFAULT_PROJECT,
) -> None:
    """Follow a row: back to its file, arrays, settings and code, forward to all that selected it. Computes nothing."""
    with told(as_json), _read(project) as lineage:
        from less_assets.inspection.trace import in_words, trace_row

        print_answer(trace_row(lineage, example_id), in_words, as_json)


@app.command()
def export(
    task: Annotated[str, typer.Option("--task", help="The task.")],
    recipe: Annotated[str, typer.Option("--recipe", help="Key of the recipe, such as less or random-seed0.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for exports; `latest` in it is the last one.")],
    keep_columns: Annotated[
        bool, typer.Option("--keep-columns", help="Read the pool's files again and keep their other columns.")
    ] = False,
    push: Annotated[str, typer.Option("--push", help="Upload to this repository of the Hugging Face Hub.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --push: say what would be uploaded.")] = False,
    project: ProjectOption = DEFAULT_PROJECT,
) -> None:
    """Write selected rows for others: data set, card, files for TRL, axolotl and LLaMA-Factory, the adapter."""
    with told(), _read(project) as lineage:
        from less_assets.inspection.export import export_selection, planned_uploads, upload

        if dry_run and not push:
            raise LessAssetsError("--dry-run is about uploading.", fix="add --push OWNER/NAME")
        exported = export_selection(lineage, task, recipe, output, keep_columns=keep_columns)
        print(f"{counted(exported.rows, 'row')} in {exported.latest}, which is {exported.folder}")
        if left_out := sum(exported.left_out.values()):
            print(f"{left_out:,} of them are not in LLaMA-Factory's file, which cannot express them: see README.md")
        if push and dry_run:
            for planned in planned_uploads(exported, push):
                print(f"would upload to the {planned.kind} {planned.repository}: {', '.join(planned.files)}")
        elif push:
            print("\n".join(upload(exported, push)))


@app.command()
def dev(
    project: ProjectOption = DEFAULT_PROJECT,
    port: Annotated[int, typer.Option(help="Port of the UI on this machine.", min=1, max=65535)] = 3000,
    reports_port: Annotated[
        int | None,
        typer.Option(help="Port of the reports' page.", min=1, max=65535, show_default="the port after the UI's"),
    ] = None,
) -> None:
    """Serve Dagster's UI for this project on http://127.0.0.1:3000, for this machine alone, until Ctrl-C.

    Beside it a page shows the project's reports, to which links of the UI lead.
    """
    with told():
        from less_assets.project.project import load_project
        from less_assets.running.dagster_home import WORKSPACE, prepare_home
        from less_assets.running.report_server import URL_VARIABLE, reports_served
        from less_assets.steps.registry import open_store

        loaded = load_project(project)
        store = open_store(loaded)
        home = prepare_home(loaded.name, store)
        dagster = ("-m", "dagster", "dev", "--host", "127.0.0.1", "--port", str(port), "--workspace", str(WORKSPACE))
        environment = {**os.environ, "DAGSTER_HOME": str(home), "LESS_PROJECT": str(loaded.path)}
        with reports_served(loaded, store, home, reports_port or port + 1) as url:
            if url:
                environment[URL_VARIABLE] = url
            where = url or f"in {store.root}: a bucket, to which no link of the UI leads"
            print(f"Dagster: http://127.0.0.1:{port}\nreports: {where}", flush=True)
            status = _serve([sys.executable, *dagster], environment)
        raise typer.Exit(status)


def _serve(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a server until it ends, which Ctrl-C in the terminal and SIGTERM to this process make it do."""
    server = subprocess.Popen(command, env=environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the server as well
    signal.signal(signal.SIGTERM, lambda number, frame: server.send_signal(number))
    return server.wait()


@app.command()
def gc(
    project: ProjectOption = DEFAULT_PROJECT,
    dry_run: Annotated[bool, typer.Option(help="Only list what would be removed.")] = False,
) -> None:
    """Remove artifacts that nothing current refers to, and what killed runs and trainings have left for a day."""
    from less_assets.compute.models import cache_folder, scratch_folder
    from less_assets.inspection.text_table import text_table
    from less_assets.project.project import load_project
    from less_assets.steps.registry import open_store
    from less_assets.store.garbage import collect_garbage, collect_scratch

    with told():
        store = open_store(load_project(project))
        removed = collect_garbage(store, dry_run=dry_run)
        removed += collect_scratch(scratch_folder(cache_folder(store)), dry_run=dry_run)
        if removed:
            print(text_table([(f"{size / 1e6:,.1f} MB", path) for path, size in removed], right_aligned=[0]))
        total = sum(size for _, size in removed)
        print(f"{counted(len(removed), 'artifact')}, {total / 1e6:,.1f} MB {'would be' if dry_run else 'were'} removed")


def _request(task: list[str], recipe: list[str], until: str, extras: bool, project: "Project") -> "Request":
    from less_assets.running.request import Request
    from less_assets.steps.registry import ASSETS

    for name in task:
        project.task(name)
    for key in recipe:
        project.recipe(key)
    if until and until not in ASSETS:
        raise LessAssetsError(f"There is no asset {until!r}.", fix=f"choose one of {', '.join(ASSETS)}")
    return Request(tuple(task), tuple(recipe), until or None, extras=extras)


@contextmanager
def _read(path: Path) -> Iterator["Lineage"]:
    """What is stored of a project, to be read only."""
    from less_assets.project.project import load_project
    from less_assets.steps.registry import open_lineage, open_store

    loaded = load_project(path)
    yield open_lineage(loaded, open_store(loaded))


@contextmanager
def _opened(
    path: Path, warn: Callable[[str], object] | None = None
) -> Iterator[tuple["Project", "ArtifactStore", "dg.DagsterInstance", "GraphRunner"]]:
    """The project, its store, the Dagster instance, and what runs the graph on them.

    With `warn`, the project is about to be run: it is told if that cannot be tracked, and then it is not tried again.
    """
    from less_assets.orchestration.definitions import build_definitions
    from less_assets.orchestration.tracking import trouble
    from less_assets.project.project import load_project
    from less_assets.project.sections import Tracking
    from less_assets.running.dagster_home import dagster_home, opened_records
    from less_assets.running.report_server import reports_url
    from less_assets.running.runner import GraphRunner
    from less_assets.steps.registry import open_store

    loaded = load_project(path)
    if warn and (untracked := trouble(loaded)):
        warn(f"{untracked}. This run is not tracked; nothing else is different")
        loaded = loaded.model_copy(update={"tracking": Tracking()})
    store = open_store(loaded)
    definitions = build_definitions(loaded, reports_url=reports_url(loaded, store, dagster_home(store)))
    with opened_records(loaded.name, store) as instance:
        yield loaded, store, instance, GraphRunner(definitions, loaded, store, instance, say)


def main() -> None:
    """Entry point of the `less-assets` command."""
    # Telemetry and hub look-ups have no place in a command that must also work without a network.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):  # an encoding without ± shall not end a run of hours with a traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():  # other libraries' progress bars, of downloads and conversions, are for terminals
        os.environ.setdefault("TQDM_DISABLE", "1")
    app()


if __name__ == "__main__":
    main()
