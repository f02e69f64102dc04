"""The project file: one YAML file is the whole experiment.

Belongs here: loading it, and the views that the rest of the code reads. What its keys mean is `sections.py`; whether
the data it names is there and usable is `data_check.py`.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import JsonValue, PrivateAttr, ValidationError

from less_assets.errors import ProjectFileError
from less_assets.method import DEFAULT_DATE, DRAW_VERSION, SKETCH_VERSION
from less_assets.project.keys import Section, explain, nearest, setting, shown_path
from less_assets.project.model_files import template_writes_day
from less_assets.project.recipes import PREFILTER, Pilot, ResolvedRecipe, candidates_of, pilots_of, resolve
from less_assets.project.rules import rules_between_sections
from less_assets.project.sections import (
    Compute,
    Gradients,
    Lora,
    Model,
    Pool,
    Prefilter,
    Recipe,
    Report,
    Source,
    Storage,
    TargetTuning,
    Tracking,
    Training,
    Warmup,
)
from less_assets.project.task_sections import Task
from less_assets.project.values import Location, Name, is_url
from less_assets.project.yaml_file import MarkedData, Problem, parse_yaml, problems_error, read_yaml


@dataclass(frozen=True)
class Fold:
    """A part of a task's target examples that is left out: a key of the task axis of its own.

    Attributes:
        task: Name of the task.
        number: Which part, from 1.
        folds: Number of parts.
    """

    task: str
    number: int
    folds: int

    @property
    def key(self) -> str:
        """Its key on the task axis."""
        return f"{self.task}.fold-{self.number}"


_TOKENIZER_KEYS = ("base", "chat_format", "max_length", "date")

Value = TypeVar("Value")


class Project(Section):
    """A project file, checked; paths are absolute or URLs."""

    name: Name = setting(..., "Name of the project", type="name")
    storage: Storage = setting({}, "Where artifacts are kept", validate_default=True)
    model: Model = setting(..., "The model whose gradients are taken, and how examples become its input")
    lora: Lora = setting({}, "The adapter of warm-up and fine-tuning", validate_default=True)
    pool: Pool = setting(..., "The instruction data to select from")
    exclude: list[Location] = setting(
        [],
        "Files that name rows of the pool to leave out of every selection, and of a warm-up that is not drawn yet: "
        "JSON lines with `example_id` and `reason`, as the selection report copies them",
        type="list of paths or URLs",
    )
    warmup: Warmup = setting(
        {}, "Step 1: a short training on a random part of the pool, or imported checkpoints", validate_default=True
    )
    prefilter: Prefilter | None = setting(
        None, "Take gradients for a part of the pool only, chosen by a cheaper strategy; null: for the whole pool"
    )
    gradients: Gradients = setting({}, "Steps 2 and 3: the features of pool and target examples", validate_default=True)
    tasks: list[Task] = setting(..., "What the selected data shall teach", min_length=1)
    recipes: list[Recipe] = setting(..., "Ways to choose a subset", min_length=1)
    target_tuning: TargetTuning = setting(
        {}, "How `strategy: target_tuned` trains on the target examples", validate_default=True
    )
    finetuning: Training = setting({}, "Step 5: training on a subset", validate_default=True)
    report: Report = setting({}, "How much the selection report explains", validate_default=True)
    compute: Compute = setting({}, "Where the heavy assets run", validate_default=True)
    tracking: Tracking = setting({}, "Where runs are tracked besides Dagster", validate_default=True)

    _path: Path = PrivateAttr(default=Path("project.yaml"))

    @property
    def path(self) -> Path:
        """The project file, absolute."""
        return self._path

    @property
    def folder(self) -> Path:
        """The project file's folder, absolute: where relative paths start."""
        return self._path.parent

    def as_written(self, path: str) -> str:
        """A path relative to the project file's folder, so that it names the same thing after the project moved."""
        return path if is_url(path) or not os.path.isabs(path) else Path(os.path.relpath(path, self.folder)).as_posix()

    @cached_property
    def checkpoints(self) -> list[str]:
        """Keys of the checkpoint axis: `epoch-1`, … for each epoch, or for each imported checkpoint."""
        imported = self.warmup.imported
        return [f"epoch-{k}" for k in range(1, (len(imported) if imported else self.warmup.epochs) + 1)]

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, groups included, in the order of the file."""
        return [task.name for task in self.tasks]

    @cached_property
    def folds(self) -> dict[str, Fold]:
        """The folds of all tasks, by their keys on the task axis."""
        counts = {task.name: task.validation.folds or 0 for task in self.tasks if task.validation}
        folds = [Fold(name, number, count) for name, count in counts.items() for number in range(1, count + 1)]
        return {fold.key: fold for fold in folds}

    def folds_of(self, task: str) -> list[str]:
        """Keys of a task's folds on the task axis."""
        return [key for key, fold in self.folds.items() if fold.task == task]

    @property
    def task_keys(self) -> list[str]:
        """Keys of the task axis: each task, and after it the task without each of its folds."""
        return [key for name in self.task_names for key in [name, *self.folds_of(name)]]

    @cached_property
    def recipe_keys(self) -> dict[str, ResolvedRecipe]:
        """Keys of the recipe axis, in the order of the file, and what they stand for."""
        return {resolved.key: resolved for recipe in self.recipes for resolved in resolve(recipe, self.gradients.forms)}

    @cached_property
    def pilots(self) -> dict[str, Pilot]:
        """The pilots of all tournaments, by their keys on the pilot axis."""
        recipes = list(self.recipe_keys.values())
        held = [pilot for recipe in recipes if recipe.tournament for pilot in pilots_of(recipe, recipes)]
        return {pilot.key: pilot for pilot in held}

    def pilots_of(self, tournament: str) -> list[str]:
        """Keys of a tournament's pilots on the pilot axis."""
        return [key for key, pilot in self.pilots.items() if pilot.tournament == tournament]

    def candidates(self, key: str) -> dict[str, ResolvedRecipe]:
        """The candidates of the tournament that a recipe holds, by name, each with the whole budget; else none."""
        recipe = self.recipe(key)
        return candidates_of(recipe, list(self.recipe_keys.values())) if recipe.tournament else {}

    def judged_on(self, task: str) -> list[str]:
        """Keys of the task axis on which pilots for a task are trained and judged: its folds, or the task itself."""
        return self.folds_of(task) or [task]

    def combines(self, keys: Mapping[str, str]) -> bool:
        """Whether keys of several axes make a partition.

        Pilots are made for the keys on which they are judged. A tournament is none on the folds: its choice has seen
        the examples of all of them.
        """
        task = keys.get("task")
        if task is None:
            return True
        if "pilot" in keys:
            return not self.folds_of(task)
        return task not in self.folds or "recipe" not in keys or self.recipe(keys["recipe"]).tournament is None

    @cached_property
    def prefilter_recipe(self) -> dict[str, ResolvedRecipe]:
        """What the prefilter ranks the pool by, under its key: a recipe that nothing is trained on."""
        if self.prefilter is None:
            return {}
        stated = Recipe(name=PREFILTER, strategy=self.prefilter.strategy, fraction=self.prefilter.keep)
        return {resolved.key: resolved for resolved in resolve(stated, self.gradients.forms)}

    def task(self, name: str) -> Task:
        """The task of a key of the task axis; of a fold, the task without evaluation.

        Raises:
            ProjectFileError: There is none.
        """
        if fold := self.folds.get(name):
            return self.task(fold.task).model_copy(update={"name": name, "evaluation": None, "validation": None})
        return _by_name("task", {task.name: task for task in self.tasks}, name, self.path)

    def recipe(self, key: str) -> ResolvedRecipe:
        """What a recipe key stands for, that of the prefilter included, or the key of a pilot: a candidate's with less.

        Raises:
            ProjectFileError: There is none.
        """
        if key in self.pilots and key not in self.recipe_keys:
            return self.pilots[key].recipe
        return _by_name("recipe", self.prefilter_recipe | self.recipe_keys, key, self.path)

    def source(self, name: str) -> Source:
        """The pool source of a name.

        Raises:
            ProjectFileError: There is none.
        """
        return _by_name("source", {source.name: source for source in self.pool.sources}, name, self.path)

    def member_tasks(self, name: str) -> list[Task]:
        """The tasks with examples that a task stands for: a group's members, or the task itself."""
        task = self.task(name)
        return [self.task(member) for member in task.members] if task.members else [task]

    def ranked_by(self, key: str) -> str:
        """Key of the recipe whose scores a recipe reads: its own, or that of the recipe whose lengths it matches."""
        return self.recipe(key).match or key

    def _selecting(self, key: str) -> list[ResolvedRecipe]:
        """The recipes by which the rows of a recipe, or pilot, may be selected: of a tournament its candidates."""
        return list(self.candidates(key).values()) or [self.recipe(key)]

    def scored_by(self, key: str) -> list[str]:
        """Keys of the recipes whose scores a recipe, or pilot, reads: see `ranked_by`; a tournament reads several."""
        reading = [recipe for recipe in self._selecting(key) if recipe.scores is not None or recipe.match is not None]
        return list(dict.fromkeys(self.ranked_by(recipe.key) for recipe in reading))

    def selects_by_influence(self, key: str) -> bool:
        """Whether a recipe takes the rows of the highest influence itself."""
        return self.recipe(key).ranks_by_influence

    def reads_scores(self, key: str) -> bool:
        """Whether a recipe reads influence scores."""
        return any(self.recipe(other).scores == "influence" for other in self.scored_by(key))

    def matches_targets(self, key: str) -> bool:
        """Whether a recipe draws rows that are as long as the task's target examples."""
        return any(recipe.traits.draws_by_length and recipe.match is None for recipe in self._selecting(key))

    def counts_tokens(self, key: str) -> bool:
        """Whether a recipe's selection depends on the lengths of rows in tokens of the base model."""
        return any(
            recipe.traits.draws_by_length or (recipe.budget is not None and recipe.budget.unit == "tokens")
            for recipe in self._selecting(key)
        )

    # What follows names the settings that can change numbers, as plain data for fingerprints. Left out is what cannot:
    # where things are kept and run, batch sizes that only change rounding, and paths, whose content is hashed instead.

    def model_settings(self) -> dict[str, JsonValue]:
        """Settings of the base model and of how examples are encoded for it."""
        settings = self.model.model_dump(exclude={"device", "device_map", "date"})
        return settings | {"base": self.as_written(self.model.base)} | self._day_settings(self.model.base)

    def _day_settings(self, base: str) -> dict[str, JsonValue]:
        """The day that a model's template is told, if it asks for one; if that is not known, a day that was chosen."""
        asked = template_writes_day(base)
        if self.model.chat_format == "tulu" or not (self.model.date != DEFAULT_DATE if asked is None else asked):
            return {}
        return {"date": self.model.date.isoformat()}

    def source_settings(self, name: str) -> dict[str, JsonValue]:
        """Settings of a pool source; which rows it has is the ledger's matter."""
        return {"format": self.source(name).format}

    def sample_settings(self) -> dict[str, Any]:
        """Settings of the warm-up draw; empty if checkpoints are imported."""
        return {} if self.warmup.imported else self.warmup.model_dump(include={"fraction", "seed"})

    def warmup_settings(self) -> dict[str, JsonValue]:
        """Settings of the warm-up training and its adapter, or of the import."""
        if self.warmup.imported:
            paths: list[JsonValue] = [self.as_written(path) for path in self.warmup.imported]
            return {"import": paths} | self.warmup.model_dump(include={"mean_learning_rates"})
        return {"lora": self.lora.model_dump(), "warmup": self.warmup.training_settings()}

    def target_tuning_settings(self) -> dict[str, JsonValue]:
        """Settings of the training on a task's target examples and its adapter."""
        return {"lora": self.lora.model_dump(), "target_tuning": self.target_tuning.training_settings()}

    def gradient_settings(self) -> dict[str, JsonValue]:
        """Settings of features, except the token budget, which is resolved and recorded with them, and of checks."""
        left_out = {"token_budget", "gradient_checkpointing", "directions_limit", "certificate_rows", "real_step_rows"}
        left_out |= {"bytes_per_row"}  # what it chooses is there
        settings = self.gradients.model_dump(exclude=left_out)
        return settings | {"forms": sorted(self.gradients.forms), "sketch_version": SKETCH_VERSION}

    def task_settings(self, name: str) -> dict[str, JsonValue]:
        """Settings of a task; files are hashed by whoever reads them."""
        task = self.task(name)
        if task.members:
            return {"members": {member: self.task_settings(member) for member in task.members}}
        examples, evaluation = task.examples, task.evaluation
        assert examples is not None
        settings: dict[str, JsonValue] = {
            "examples": {"format": examples.format, "max_length": examples.max_length or self.model.max_length},
            "evaluation": None,
        }
        if evaluation is not None:
            stated = evaluation.model_dump(exclude={"path", "held_out", "token_budget", "grading"})
            if isinstance(evaluation.harness, str):
                stated["harness"] = self.as_written(evaluation.harness)
            settings["evaluation"] = stated | {"max_length": evaluation.max_length or self.model.max_length}
        if fold := self.folds.get(name):
            settings["fold"] = [fold.number, fold.folds]
        if task.validation and task.validation.path:
            settings["validation"] = "file"
        return settings

    def grading_settings(self, name: str) -> dict[str, JsonValue]:
        """How a task's answers are graded, by member, where that is not what it has been since the first version."""
        rules: dict[str, JsonValue] = {}
        for member in self.member_tasks(name):
            if evaluation := member.evaluation:
                if evaluation.format == "bbh" and evaluation.grading == "strict":
                    rules[member.name] = "strict"
                elif evaluation.held_out:
                    rules[member.name] = "exact_match without markdown"
        return {"grading": rules} if rules else {}

    def recipe_settings(self, key: str) -> dict[str, JsonValue]:
        """Settings of a selection: equal for recipes that differ in name or in the model to fine-tune only."""
        recipe = self.recipe(key)
        settings = self._choice_settings(recipe)
        if recipe.tournament:
            settings["candidates"] = {
                name: self._choice_settings(candidate) for name, candidate in self.candidates(key).items()
            }
            settings["pilot"], settings["seeds"] = recipe.tournament.pilot, [*recipe.tournament.seeds]
        return settings

    def _choice_settings(self, recipe: ResolvedRecipe) -> dict[str, JsonValue]:
        settings = asdict(recipe)
        del settings["scores_file"], settings["tournament"]  # the one's content is hashed, the other stands elsewhere
        for name in ("mix", "damping"):
            if settings[name] is None:  # recipes that were made before there was such a key stay what they are
                del settings[name]
        if recipe.mix is not None:
            settings["mix"] = recipe.mix.model_dump()
        if recipe.match:
            settings["match"] = self.recipe_settings(recipe.match)
        if recipe.seed is not None or recipe.mix is not None:
            settings["draw_version"] = DRAW_VERSION
        return {name: settings[name] for name in settings if name not in ("key", "name", "model")}

    def tokenizer_settings(self) -> dict[str, JsonValue]:
        """Settings that decide how long a row is in tokens."""
        return {name: value for name, value in self.model_settings().items() if name in _TOKENIZER_KEYS}

    def report_settings(self) -> dict[str, JsonValue]:
        """Settings of what a report explains."""
        return self.report.model_dump()

    def finetuning_settings(self, key: str | None = None) -> dict[str, JsonValue]:
        """Settings of a recipe's fine-tuning; without a key, those that all recipes share.

        The base model itself (`strategy: none`) is not trained: its settings do not change with the training's.
        """
        recipe = self.recipe(key) if key else None
        model = self.model_settings()
        if recipe and recipe.model:
            model = {name: value for name, value in model.items() if name != "date"}
            model |= {"base": self.as_written(recipe.model)} | self._day_settings(recipe.model)
        if recipe and not recipe.traits.chooses_rows:
            return {"model": model, "training": None}
        training = self.finetuning.training_settings()
        if key in self.pilots:
            training |= {"seed": self.pilots[key].seed}
        return {"model": model, "lora": self.lora.model_dump(), "training": training}


def load_project(path: str | os.PathLike[str]) -> Project:
    """Read and check a project file.

    Args:
        path: YAML file; relative paths inside are meant from its folder.

    Returns:
        The project.

    Raises:
        ProjectFileError: All that is wrong with it, each problem with line, key and what to do.
    """
    marked = read_yaml(Path(path).expanduser(), os.fspath(path))
    return _build(marked, Path(os.path.abspath(Path(path).expanduser())))


def parse_project(content: bytes, path: str | os.PathLike[str] = "project.yaml") -> Project:
    """Check the bytes of a project file that need not exist; see `load_project`."""
    return _build(parse_yaml(content, os.fspath(path)), Path(os.path.abspath(path)))


def _build(marked: MarkedData, path: Path) -> Project:
    context = {"folder": path.parent}
    project: Project | None = None
    problems = list(marked.problems)
    if not isinstance(marked.data, dict):
        raise ProjectFileError(
            "A project file is a mapping of keys to values.",
            where=marked.where(()),
            fix="`less-assets init` writes one; projects/template.yaml of the repository shows every key",
        )
    try:
        project = Project.model_validate(marked.data, context=context)
    except ValidationError as error:
        problems += explain(error, marked, Project)
    problems += [
        Problem(marked.where(rule.path), f"{shown_path(rule.path)}: {rule.what}", rule.fix)
        for rule in rules_between_sections(marked.data, context)
    ]
    if problems or project is None:
        raise problems_error(marked.file, sorted(set(problems), key=_line_number))
    project._path = path
    return project


def _line_number(problem: Problem) -> tuple[int, str]:
    return int(problem.where.rpartition(":")[2]), problem.what


def _by_name(what: str, known: Mapping[str, Value], name: str, path: Path) -> Value:
    if name not in known:
        raise ProjectFileError(f"There is no {what} {name!r}.", where=str(path), fix=nearest(name, list(known)))
    return known[name]
