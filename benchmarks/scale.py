"""Does the cost stay where it belongs? Growth, memory, overhead, loading, appending, and Ray: `results/scale.json`.

    python benchmarks/scale.py                       # everything, about two hours on two cores
    python benchmarks/scale.py --only load append    # some sections
    python benchmarks/scale.py --small --out small.json   # minutes: does it run at all?

Every section is a function of its own, keeps its raw times in the result file as soon as it has them, and goes on from
there when it is started again (`--again` forgets those of the sections that are asked for). Where two sides are
compared they take turns, round by round; medians are reported. Run it on a machine that does nothing else.

How to read it
    linearity_error            time per additional row from 30k to 100k rows, over that from 10k to 30k, minus 1
    scoring_peak_gib           highest resident memory of scoring and selecting, over both shapes
    scoring_over_matmul        their wall time over bare float32 products of decoded blocks, the worse shape
    orchestration_overhead     `less-assets run --until leaderboard` on the demo over the same work as plain function
                               calls, minus 1. Both sides draw the charts, compare the recipes and look for evaluation
                               rows in the pool; neither makes certificates or reports. Runs, events, provenance,
                               storage, tables of metadata and the other checks are the overhead.
    load_seconds               a fresh process loads the code location of a project with 60 shards × 4 checkpoints × 8
                               tasks × 12 recipes. The materializations are records that this benchmark reports to the
                               instance itself: nothing of that size was computed.
    partitions_for_new_shard   what one more shard makes after 60, by asset; `warmup_sample` is only checked again
    ray_speedup                gradients with one worker over those with two
    attribution_over_extraction  token attribution of a row over extraction of a row, at all checkpoints of the demo
    checks_over_extraction     certificates and real steps of the demo's tasks over the extraction of its pool
    checks_after_adding        the same after 8 rows were added to the pool, over the extraction of the whole pool
    padding                    share of padding in the batches of an extraction of ../shared/data/pool, by device
    idle_plan_seconds          `less-assets plan` and `run` with nothing to do, the slower of the two: a fresh process
"""

import argparse
import gc
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import dagster as dg
import yaml
from demo import smaller
from results import SCALE
from tiny_project import write_model, write_project, write_rows
from waiting import padding_of_pool, seconds_of_attribution, seconds_of_checks, seconds_with_nothing_to_do

from less_assets.compute.speeds import machine
from less_assets.demo import write_demo
from less_assets.orchestration.definitions import build_definitions
from less_assets.project.project import Project, load_project
from less_assets.running.dagster_home import WORKSPACE
from less_assets.running.runner import GraphRunner, Outcome, Request, open_instance, register_shards
from less_assets.steps.registry import ASSETS, open_lineage, open_store
from less_assets.store.tables import read_parquet

HERE = Path(__file__).resolve().parent


class Notes:
    """The result file: figures at the top, raw measurements below `raw`, written after every measurement.

    Args:
        path: Of the file.
        again: Sections whose earlier measurements are forgotten.
    """

    def __init__(self, path: Path, again: Sequence[str] = ()) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        raw = self.content.setdefault("raw", {})
        forgotten = tuple(start for section in again for start in RAW[section])
        for name in [name for name in raw if name.startswith(forgotten)]:
            del raw[name]
        self.content["machine"] = machine()
        commits = self.content.setdefault("commits", [])  # several, if the code has changed between sections
        commits += {_commit()} - set(commits)

    def raw(self, name: str) -> list:
        """Measurements of a name so far; extend it with `add`."""
        return self.content["raw"].setdefault(name, [])

    def add(self, name: str, value: Any) -> None:
        """Keep a measurement."""
        self.raw(name).append(value)
        self._write()
        print(f"{time.strftime('%H:%M:%S')}  {name}: {value}", file=sys.stderr)

    def report(self, name: str, value: Any) -> None:
        """Set a figure."""
        self.content[name] = value
        self._write()
        print(f"{name}: {value}")

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1, sort_keys=True) + "\n")


def _commit() -> str:
    """The code that is measured, `-dirty` if it differs from the commit."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(HERE.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", "less_assets", "benchmarks/*.py")
    return f"{git('rev-parse', '--short', 'HEAD') or 'unknown'}{'-dirty' if changed else ''}"


def run(path: Path, home: Path, request: Request) -> Outcome:
    """Bring a project up to date as the command line does, in this process."""
    project = load_project(path)
    store = open_store(project)
    home.mkdir(parents=True, exist_ok=True)
    with open_instance(home) as instance:
        register_shards(project, store, instance)
        runner = GraphRunner(build_definitions(project), project, store, instance, lambda line: None)
        return runner.run(request)


def in_a_process(function: Callable, *arguments: Any) -> Any:
    """Result of a function of this module in a fresh process: no side inherits another's caches."""
    code = (
        f"import sys, json; sys.path.insert(0, {str(HERE)!r}); import scale\n"
        f"print('RESULT ' + json.dumps(scale.{function.__name__}(*json.loads(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, json.dumps(arguments)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.rpartition("RESULT ")[2])


# Growth -------------------------------------------------------------------------------------------------------------


def seconds_of_pool(rows: int, shard_size: int) -> float:
    """Seconds from nothing to influence scores for a pool of some size."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_project(Path(folder), rows=rows, shard_size=shard_size)
        started = time.perf_counter()
        run(path, Path(folder) / "home", Request(until="influence_scores"))
        return time.perf_counter() - started


def linearity(notes: Notes, small: bool, rounds: int) -> None:
    """Growth of the pool, 10k → 30k → 100k rows."""
    sizes = [200, 600, 2000] if small else [10_000, 30_000, 100_000]
    shard_size = sizes[0] // 5
    for _ in range(rounds):
        for rows in sizes:
            if len(notes.raw(f"pool_{rows}_s")) < rounds:
                notes.add(f"pool_{rows}_s", in_a_process(seconds_of_pool, rows, shard_size))
    first, second, third = (median(notes.raw(f"pool_{rows}_s")) for rows in sizes)
    slope = (second - first) / (sizes[1] - sizes[0])
    notes.report("linearity_error", abs((third - second) / (sizes[2] - sizes[1]) / slope - 1))


# Scoring ------------------------------------------------------------------------------------------------------------


def scoring(notes: Notes, small: bool, rounds: int) -> None:
    """`scoring.py` on a million rows and on 250,000 at four checkpoints, in turns."""
    shapes = [(16_384, 1), (8_192, 2)] if small else [(1_000_000, 1), (250_000, 4)]
    for _ in range(rounds):
        for rows, checkpoints in shapes:
            name = f"scoring_{rows}x{checkpoints}"
            if len(notes.raw(name)) < rounds:
                command = ["scoring.py", "--rows", str(rows), "--checkpoints", str(checkpoints)]
                done = subprocess.run(
                    [sys.executable, str(HERE / command[0]), *command[1:]],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                found = json.loads(done.stdout)
                notes.add(name, {key: found[key] for key in ("peak_gib", "over_matmul", "score_s", "select_s")})
    every = [notes.raw(f"scoring_{rows}x{checkpoints}") for rows, checkpoints in shapes]
    notes.report("scoring_peak_gib", max(each["peak_gib"] for shape in every for each in shape))
    notes.report("scoring_over_matmul", max(median(each["over_matmul"] for each in shape) for shape in every))


# Overhead -----------------------------------------------------------------------------------------------------------


def demo_project(folder: str, small: bool) -> str:
    """The demo over its data, with artifacts in a folder of their own; `small`: a tenth of it."""
    path = write_demo(HERE.parent / "demo")
    text = (
        path.read_text()
        .replace("path: data/", f"path: {path.parent}/data/")
        .replace("held_out: data/", f"held_out: {path.parent}/data/")
    )
    settings = yaml.safe_load(text)
    settings["storage"] = {"root": str(Path(folder) / "artifacts")}
    if small:
        smaller(settings)
    settings["gradients"] |= {"certificate_rows": 0, "real_step_rows": 0}  # the plain calls make none either
    path = Path(folder) / "project.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return str(path)


PLAIN_IMPORTS = (
    *("guardrails", "report.charts", "assets.evaluation", "assets.warmup"),
    *("method.chat", "method.evaluation", "method.examples", "method.features", "method.gradients", "method.influence"),
    *("method.leaderboard", "method.models", "method.quantization", "method.row_files", "method.selection"),
    *("method.sketch", "method.targets", "method.training", "method.warmup"),
)


def seconds_through_dagster(folder: str, path: str) -> float:
    """The project up to its leaderboard through Dagster, on an instance on the disk; what only explains is left out."""
    for name in PLAIN_IMPORTS:  # the plain calls' clock starts after these, too
        importlib.import_module(f"less_assets.{name}")
    started = time.perf_counter()
    run(Path(path), Path(folder) / "home", Request(until="leaderboard"))
    return time.perf_counter() - started


def seconds_of_plain_calls(folder: str, path: str) -> float:
    """The same work as function calls: nothing is stored but what training itself writes, nothing is recorded."""
    import polars as pl
    from less_assets.orchestration.fairness_checks import evaluated_rows

    from less_assets.method.data.chat import ChatEncoder
    from less_assets.method.data.examples import read_rows
    from less_assets.method.data.row_files import list_files
    from less_assets.method.data.targets import read_targets
    from less_assets.method.evaluation.evaluation import evaluate_examples
    from less_assets.method.evaluation.leaderboard import (
        RecipeResult,
        against_random,
        compare_recipes,
        merge,
        of_number,
        to_markdown,
    )
    from less_assets.method.gradients.features import extract_features, resolve_token_budget
    from less_assets.method.gradients.per_example import lora_parameters
    from less_assets.method.gradients.quantization import encode
    from less_assets.method.gradients.sketch import Sketch
    from less_assets.method.selection.influence import (
        SUBTASK_RULES,
        normalised_weights,
        score_shard,
        score_table,
        target_directions,
    )
    from less_assets.method.selection.selection import Budget, Candidates, select_at_random, select_by_score
    from less_assets.method.training.models import load_adapter, load_base
    from less_assets.method.training.training import TrainingSettings, train_adapter
    from less_assets.method.training.warmup import load_checkpoint, load_moments, warm_up
    from less_assets.report import charts
    from less_assets.steps.evaluation import evaluation_settings
    from less_assets.steps.judging_examples import evaluation_examples
    from less_assets.steps.warmup import lora_settings

    project = load_project(path)
    cache = Path(folder) / "cache"
    gc.freeze()  # as runs do: Dagster's objects, which these calls need none of, cost neither side the collector's time
    started = time.perf_counter()
    settings, gradients, lora = project.model, project.gradients, lora_settings(project)

    def base() -> tuple[Any, Any]:
        return load_base(settings.base, dtype=settings.dtype, device=settings.device, cache_dir=cache)

    model, tokenizer = base()

    def encoded(rows: pl.DataFrame) -> list:
        return [
            ChatEncoder(tokenizer, settings.chat_format, settings.max_length).row(name, messages)
            for name, messages in rows.select("example_id", "messages").iter_rows()
        ]

    shards = []
    for source in project.pool.sources:
        table = pl.concat(
            part for file in list_files(source.path) for part in read_rows(file, source.name, max_rows=source.limit)
        )
        number = pl.int_range(pl.len(), dtype=pl.Int64)
        kept = table.select("example_id", "source", "messages", "status", pl.lit(source.name).alias("shard"))
        shards.append(kept.with_columns(number.alias("row"), pl.lit(True).alias("canonical")))
    pool = pl.concat(shards)
    usable = pool.select("example_id", "messages").rows()
    for task in project.tasks:
        evaluated = evaluated_rows(task)
        evaluated.look_up(usable)
        evaluated.found()
    counts = [dict(pool["source"].value_counts().iter_rows())]
    sample = select_at_random(lambda: [pool], Budget("fraction", project.warmup.fraction), project.warmup.seed).table
    training = TrainingSettings(**project.warmup.training_values())
    chosen = pool.join(sample.select("example_id"), on="example_id", how="semi").unique(
        "example_id", maintain_order=True
    )
    for checkpoint in warm_up(model, tokenizer, encoded(chosen), training, Path(folder) / "warmup", lora=lora):
        charts.training_curve(list(range(len(checkpoint.losses))), list(checkpoint.losses))
    for shares in (*counts, dict(chosen["source"].value_counts().iter_rows())):
        charts.share_bars(shares, kind="source")
    targets = {
        task.name: [
            ChatEncoder(tokenizer, settings.chat_format, settings.max_length).target(example)
            for example in read_targets(task.examples.format, task.examples.path)
        ]
        for task in project.tasks
    }
    subtasks = {
        task.name: [example.subtask for example in read_targets(task.examples.format, task.examples.path)]
        for task in project.tasks
    }
    directions: dict[str, dict] = {}
    features: dict[str, list[Coded]] = {}
    weights = {}
    for checkpoint in project.checkpoints:
        place = Path(folder) / "warmup" / checkpoint
        weights[checkpoint] = load_checkpoint(place).mean_learning_rate
        adapted, moments = load_adapter(base()[0], place), load_moments(place)
        sketch = Sketch(gradients.sketch, gradients.dimension, gradients.seed, lora_parameters(adapted))

        def extract(rows: list, forms: tuple[str, ...], adapted=adapted, moments=moments, sketch=sketch) -> Any:
            budget = resolve_token_budget(
                adapted,
                forms=forms,
                dimension=gradients.dimension,
                longest=max(len(row.input_ids) for row in rows),
            )
            return extract_features(
                adapted,
                rows,
                forms=forms,
                moments=None if forms == ("sgd",) else moments,
                sketch=sketch,
                token_budget=budget,
                pad_token_id=tokenizer.pad_token_id or 0,
            )

        directions[checkpoint] = {}
        for task, examples in targets.items():
            found = extract(examples, ("sgd",)).features["sgd"]
            for rule in SUBTASK_RULES:
                directions[checkpoint][task, rule] = target_directions(found, subtasks[task], rule)[1]
        features[checkpoint] = []
        for shard in shards:
            block = extract(encoded(shard), tuple(gradients.forms))
            codes = {form: encode(values, gradients.storage) for form, values in block.features.items()}
            features[checkpoint].append(Coded(codes, gradients.storage))
    scores: dict[str, list[pl.DataFrame]] = {task: [] for task in targets}
    for number, shard in enumerate(shards):
        sources = {checkpoint: features[checkpoint][number] for checkpoint in project.checkpoints}
        found = score_shard(sources, directions, normalised_weights(weights), gradients.forms)
        for task in targets:
            scores[task].append(score_table(shard.drop("messages"), found[task]))
    for task in targets:
        for form in gradients.forms:
            charts.score_histogram(
                pl.concat(part[f"{form}.mean_cosine"].drop_nulls().arr.max() for part in scores[task])
            )
    finetuning = TrainingSettings(**project.finetuning.training_values())
    trained: dict[Any, Any] = {}
    boards = []
    for task in project.tasks:
        results = []
        for recipe in project.recipe_keys.values():
            key: Any = recipe.key
            rows = pool.unique("example_id", maintain_order=True)
            if recipe.strategy == "less":
                key = (recipe.key, task.name)
                labels = tuple(sorted(set(subtasks[task.name])))
                column = f"{recipe.form}.{recipe.subtask}"
                candidates = Candidates(task.name, column, labels, lambda task=task: iter(scores[task.name]))
                budget = Budget(recipe.budget.unit, recipe.budget.amount)
                ids = select_by_score([candidates], budget, str(recipe.aggregate)).table
                rows = rows.join(ids.select("example_id"), on="example_id", how="semi")
                best = pl.concat(part[column].drop_nulls().arr.max() for part in scores[task.name])
                charts.score_histogram(best, float(ids["score"].min()))
                charts.share_bars(dict(ids["subtask"].drop_nulls().value_counts().iter_rows()))
            elif recipe.strategy == "random":
                budget = Budget(recipe.budget.unit, recipe.budget.amount)
                ids = select_at_random(lambda: [pool], budget, recipe.seed, stream=recipe.strategy).table
                rows = rows.join(ids.select("example_id"), on="example_id", how="semi")
            if recipe.strategy != "none":
                charts.share_comparison(dict(rows["source"].value_counts().iter_rows()), counts[0])
            if recipe.strategy != "none" and key not in trained:
                place = Path(folder) / "models" / str(len(trained))
                examples = [row for row in encoded(rows) if row.loss_tokens]
                done = train_adapter(base()[0], tokenizer, examples, finetuning, place, lora=lora, keep="latest")
                trained[key] = done.folder
                charts.training_curve([step.step for step in done.curve], [step.loss for step in done.curve])
            judged = base()[0]
            if recipe.strategy != "none":
                judged = load_adapter(judged, trained[key])
            answers = evaluate_examples(
                judged, tokenizer, evaluation_examples(task), evaluation_settings(project, task), name=task.name
            )
            member = pl.lit(task.name).alias("task")
            samples, metrics = answers.samples.with_columns(member), answers.metrics.with_columns(member)
            results.append(
                RecipeResult(
                    recipe.name,
                    recipe.strategy,
                    samples,
                    metrics,
                    seed=recipe.seed,
                    model=settings.base,
                    budget=f"{recipe.budget.unit} {recipe.budget.amount}" if recipe.budget else None,
                )
            )
        boards.append(compare_recipes(task.name, results))
    for board in (*boards, merge(boards)):
        to_markdown(board)
        for what in ("answer_loss", "score"):
            charts.leaderboard_chart(of_number(board, what), value_title=what)
            if (compared := against_random(board, what)).height:
                charts.difference_chart(compared, value_title=f"{what} − random's")
    return time.perf_counter() - started


class Coded:
    """Features of a shard in memory, as `influence.FeatureSource`."""

    code_blocks, code_block_bytes = 1, 0

    def __init__(self, codes: dict[str, tuple], storage: str) -> None:
        self._codes, self.storage = codes, storage
        self.rows = len(next(iter(codes.values()))[0])

    def codes(self, form: str, index: int, buffer: Any = None) -> tuple:
        """First row, codes, scales."""
        return (0, *self._codes[form])

    def blocks(self, form: str) -> Any:
        """Not used: scoring multiplies codes."""
        raise NotImplementedError


def overhead(notes: Notes, small: bool, rounds: int) -> None:
    """The demo through Dagster and as plain calls, in turns; the dequantised model is there before."""
    sides = {"through_dagster_s": seconds_through_dagster, "plain_calls_s": seconds_of_plain_calls}
    cache = tempfile.mkdtemp(prefix="less-assets-cache-")
    for number in range(rounds):
        for name, side in sides.items() if number % 2 == 0 else reversed(sides.items()):
            if len(notes.raw(name)) < rounds:
                with tempfile.TemporaryDirectory() as folder:
                    path = demo_project(folder, small)
                    _fill_cache(load_project(path), Path(cache))
                    for place in ("artifacts/cache", "cache"):  # unfinished trainings are nobody else's
                        (Path(folder) / place).mkdir(parents=True)
                        os.symlink(Path(cache) / "gguf", Path(folder) / place / "gguf")
                    notes.add(name, in_a_process(side, folder, path))
    through, plain = (median(notes.raw(name)) for name in sides)
    notes.report("orchestration_overhead", through / plain - 1)


def _fill_cache(project: Project, cache: Path) -> None:
    from less_assets.method.training.models import find_base

    find_base(project.model.base, cache)


# Loading ------------------------------------------------------------------------------------------------------------

LOAD = (
    "import sys, time; started = time.perf_counter()\n"
    "from less_assets.running.code_location import defs\n"
    "repository = defs.get_repository_def(); repository.asset_graph.toposorted_asset_keys\n"
    "heavy = [name for name in ('torch', 'transformers', 'peft', 'ray', 'lm_eval') if name in sys.modules]\n"
    "print(time.perf_counter() - started, *heavy)"
)
PAGE = (
    '{assetNodeOrError(assetKey: {path: ["%s"]}) {... on AssetNode {id '
    "partitionKeyConnection(limit: 500, ascending: true) {results} "
    "partitionStats {numMaterialized numPartitions} staleStatus}}}"
)


def materialize_records(path: Path, home: Path) -> int:
    """Report a materialization for every partition of every asset; nothing is computed."""
    project = load_project(path)
    store = open_store(project)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        pool_files = register_shards(project, store, instance)
        axes = {
            "checkpoint": list(project.checkpoints),
            "shard": pool_files.shard_keys(),
            "task": project.task_names,
            "recipe": list(project.recipe_keys),
        }
        count = 0
        for asset, names in ASSETS.items():
            keys = [""]
            for name in names:
                keys = [f"{key}|{part}" if key else part for key in keys for part in axes[name]]
            for key in keys:
                tags = {"dagster/data_version": f"{count:032x}", "dagster/data_version_is_user_provided": "true"}
                event = dg.AssetMaterialization(asset, partition=key or None, metadata={"rows": count}, tags=tags)
                instance.report_runless_asset_event(event)
                count += 1
    return count


def loading(notes: Notes, small: bool, rounds: int) -> None:
    """Loading the code location, and the answers behind the largest asset pages."""
    with tempfile.TemporaryDirectory() as folder:
        place, home = Path(folder), Path(folder) / "home"
        home.mkdir()
        shape = (
            {"rows": 60, "shard_size": 10, "epochs": 2, "tasks": 2, "recipes": 2}
            if small
            else {"rows": 600, "shard_size": 10, "epochs": 4, "tasks": 8, "recipes": 12}
        )
        path = write_project(place, warmup_rows=20, **shape)
        notes.report("load_records", materialize_records(path, home))
        environment = {
            **os.environ,
            "LESS_PROJECT": str(path),
            "DAGSTER_HOME": str(home),
            "PYTHONPATH": str(HERE.parent),
        }
        for _ in range(rounds + 1):  # the first one also compiles byte code
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", LOAD],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=environment,
                cwd=HERE.parent,
            )
            seconds, *heavy = done.stdout.split()
            if heavy:
                raise SystemExit(f"loading the code location imports {', '.join(heavy)}")
            notes.add("load_s", float(seconds))
        notes.report("load_seconds", median(notes.raw("load_s")[1:]))
        notes.report("page_seconds", _page_seconds(environment))


def _page_seconds(environment: dict[str, str]) -> dict[str, float]:
    """Seconds of the queries behind asset pages, on a web server of this instance."""
    with socket.socket() as free:  # on a fixed port somebody else's server might answer
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "dagster_webserver", "-h", "127.0.0.1", "-p", str(port), "-w", str(WORKSPACE)],
        env=environment,
        cwd=HERE.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                _ask(port, "{version}")
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        found = {}
        for asset in ("train_gradients", "selected_subset", "influence_scores"):
            started = time.perf_counter()
            answer = _ask(port, PAGE % asset)
            if "errors" in answer:
                raise SystemExit(f"the page of {asset} cannot be asked for: {answer['errors']}")
            found[asset] = time.perf_counter() - started
        return found
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _ask(port: int, query: str) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/graphql",
        json.dumps({"query": query}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


# Appending ----------------------------------------------------------------------------------------------------------


def appending(notes: Notes, small: bool, rounds: int) -> None:
    """One more shard after 60, four checkpoints: what is made, and whether scores equal those from scratch."""
    shards, epochs = (4, 2) if small else (60, 4)
    until = Request(until="influence_scores")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        path = write_project(place, rows=shards * 20, shard_size=20, epochs=epochs, warmup_rows=20)
        run(path, place / "home", until)
        write_rows(place / "data/pool-b.jsonl", 10**6, 20)
        made = run(path, place / "home", until).materialized
        expected = {"instruction_pool": 1, "pool_index": 1, "warmup_sample": 1, "train_gradients": epochs}
        expected |= {"gradient_datastore": epochs, "influence_scores": 1}
        counts = {asset: len(partitions) for asset, partitions in made.items()}
        grown = _scores(path)
        settings = yaml.safe_load(path.read_text())
        settings["storage"] = {"root": "scratch"}
        path.write_text(yaml.safe_dump(settings))
        for kept in ("warmup_sample", "warmup"):  # frozen: from scratch it would be drawn from the larger pool
            shutil.copytree(place / "artifacts" / kept, place / "scratch" / kept)
        run(path, place / "other home", until)
        equal = grown.equals(_scores(path))
    notes.report(
        "partitions_for_new_shard",
        {**counts, "total": sum(counts.values()), "as_expected": counts == expected, "equals_scratch": equal},
    )


def _scores(path: Path) -> Any:
    import polars as pl

    project = load_project(path)
    lineage = open_lineage(project, open_store(project))
    folder = lineage.folder("influence_scores", "task-0")
    return pl.concat([read_parquet(folder, f"scores/{shard}.parquet") for shard in lineage.shards()])


# Ray ----------------------------------------------------------------------------------------------------------------


def seconds_with_workers(workers: int, rows: int, hidden: int, layers: int) -> float:
    """Seconds of the gradients of a pool of eight shards with so many workers, starting them included."""
    import ray

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_model(place / "model", hidden, layers)
        compute = {"backend": "ray", "address": "local", "gpus_per_worker": 0, "workers": workers}
        path = write_project(place, rows=rows, shard_size=rows // 8, answer_words=60, compute=compute)
        run(path, place / "home", Request(until="warmup_checkpoints"))
        os.environ["PYTHONPATH"] = str(HERE.parent)
        ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
        started = time.perf_counter()
        run(path, place / "home", Request(until="train_gradients"))
        seconds = time.perf_counter() - started
        ray.shutdown()
        return seconds


def ray_workers(notes: Notes, small: bool, rounds: int) -> None:
    """One and two Ray workers, in turns."""
    shape = (64, 64, 2) if small else (4000, 384, 8)
    for number in range(rounds):
        for workers in (1, 2) if number % 2 == 0 else (2, 1):
            if len(notes.raw(f"ray_{workers}_s")) < rounds:
                notes.add(f"ray_{workers}_s", in_a_process(seconds_with_workers, workers, *shape))
    notes.report("ray_speedup", median(notes.raw("ray_1_s")) / median(notes.raw("ray_2_s")))


# Waiting ------------------------------------------------------------------------------------------------------------


def checks(notes: Notes, small: bool, rounds: int) -> None:
    """Certificates and real steps against extraction, on the demo."""
    while len(notes.raw("checks_s")) < rounds:
        with tempfile.TemporaryDirectory() as folder:
            path = demo_project(folder, small)
            settings = yaml.safe_load(Path(path).read_text())
            for rows in ("certificate_rows", "real_step_rows"):
                del settings["gradients"][rows]  # as many as by default
            Path(path).write_text(yaml.safe_dump(settings, sort_keys=False))
            _fill_cache(load_project(path), Path(folder) / "artifacts/cache")
            notes.add("checks_s", in_a_process(seconds_of_checks, path))
    for figure, part in (("checks_over_extraction", "checks"), ("checks_after_adding", "checks_after_adding")):
        notes.report(figure, median(each[part] / each["extraction"] for each in notes.raw("checks_s")))


def attribution(notes: Notes, small: bool, rounds: int) -> None:
    """Token attribution of a row against its extraction, on the demo."""
    while len(notes.raw("attribution_s")) < rounds:
        with tempfile.TemporaryDirectory() as folder:
            path = demo_project(folder, small)
            _fill_cache(load_project(path), Path(folder) / "artifacts/cache")
            notes.add("attribution_s", in_a_process(seconds_of_attribution, path))
    ratios = [each["attribution"] / each["extraction"] for each in notes.raw("attribution_s")]
    notes.report("attribution_over_extraction", median(ratios))


def idle(notes: Notes, small: bool, rounds: int) -> None:
    """Commands with nothing to do, on a small project: what they cost grows with the artifacts, not with the pool."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_project(Path(folder), rows=100, shard_size=50, epochs=2, tasks=2, warmup_rows=20)
        for name, seconds in seconds_with_nothing_to_do(str(path), rounds).items():
            for one in seconds:
                notes.add(f"idle_{name}_s", one)
    notes.report("idle_plan_seconds", max(median(notes.raw(f"idle_{name}_s")) for name in ("plan", "run")))


def padding(notes: Notes, small: bool, rounds: int) -> None:
    """Batches of the real pool; nothing is computed on them."""
    pool = Path(os.environ.get("LESS_BENCHMARK_DATA", HERE.parents[1] / "shared/data")) / "pool"
    if not pool.is_dir():
        print(f"padding: {pool} is not there")
        return
    with tempfile.TemporaryDirectory() as cache:
        notes.report("padding", padding_of_pool(str(pool), cache))


# Section → how the names of its raw measurements begin.
RAW: dict[str, tuple[str, ...]] = {
    "linearity": ("pool_",),
    "scoring": ("scoring_",),
    "overhead": ("through_dagster", "plain_calls"),
    "load": ("load_",),
    "append": (),
    "ray": ("ray_",),
    "attribution": ("attribution_",),
    "checks": ("checks_",),
    "idle": ("idle_",),
    "padding": (),
}
SECTIONS: dict[str, Callable[[Notes, bool, int], None]] = {
    "linearity": linearity,
    "scoring": scoring,
    "overhead": overhead,
    "load": loading,
    "append": appending,
    "ray": ray_workers,
    "attribution": attribution,
    "checks": checks,
    "idle": idle,
    "padding": padding,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sections that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--small", action="store_true", help="a trial: its figures mean nothing")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="forget earlier measurements of these sections")
    parser.add_argument("--out", type=Path, default=SCALE)
    asked = parser.parse_args(arguments)
    if asked.small and asked.out == SCALE:
        parser.error("--small needs --out: its figures do not belong into the results")
    notes = Notes(asked.out, asked.only if asked.again else ())
    for name in asked.only:
        SECTIONS[name](notes, asked.small, asked.rounds)


if __name__ == "__main__":
    main()
