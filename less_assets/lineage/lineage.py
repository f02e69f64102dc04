"""What every artifact is made from: its settings, its inputs, its place in the store. One function an asset.

Belongs here: the plan of each asset, and whether what is stored still matches it. Does not belong here: computing
anything, or Dagster; `assets/` do the work, `provenance.py` has the machinery.
"""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from less_assets.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError, TargetFormatError
from less_assets.lineage.plan import ArtifactPlan, digest
from less_assets.lineage.pool_files import PoolFiles
from less_assets.project.project import OPTIONAL_ASSETS, Project
from less_assets.store.artifacts import ArtifactFolder, ArtifactStore, Pointer
from less_assets.store.files import read_bytes, write_atomically
from less_assets.store.manifest import Manifest


@dataclass(frozen=True)
class Status:
    """Whether an artifact is there and matches its plan.

    Attributes:
        state: `missing`: never made, or its data is gone. `stale`: made from something else. `blocked`: what it needs
            is itself missing or stale.
        reasons: One line each; empty when fresh.
    """

    state: Literal["fresh", "stale", "missing", "blocked"]
    reasons: tuple[str, ...] = ()


class Lineage:
    """The plans of one project against one store, as they stand now; make a new one after anything was materialized.

    Args:
        project: The project file.
        store: Where artifacts are kept.
        verify_files: Whether `status` compares every file with its digest; reads everything that is stored.
    """

    def __init__(self, project: Project, store: ArtifactStore, *, verify_files: bool = False) -> None:
        self.project, self.store, self.verify_files = project, store, verify_files
        self._plans: dict[tuple[str, str | None], ArtifactPlan] = {}
        self._fresh: dict[tuple[str, str | None], Manifest] = {}
        self._pool_files: PoolFiles | None = None

    @property
    def pool_files(self) -> PoolFiles:
        """The pool's files and shards as last scanned."""
        if self._pool_files is None:
            self._pool_files = PoolFiles.load(self.store)
        return self._pool_files

    def plan(self, asset: str, partition: str | None = None) -> ArtifactPlan:
        """What the artifact is going to be made from.

        Raises:
            MissingArtifactError: Something it needs was never made.
            StaleArtifactError: Something it needs was made from other settings or inputs than the ones in force.
        """
        key = (asset, partition)
        if key not in self._plans:
            self._plans[key] = PLANS[asset](self, partition)
        return self._plans[key]

    def fresh(self, asset: str, partition: str | None = None) -> Manifest:
        """The manifest of an artifact that may be read: present, and made from what is in force.

        Raises:
            MissingArtifactError, StaleArtifactError: It is not; the message names the command that makes it.
        """
        key = (asset, partition)
        if key not in self._fresh:
            plan = self.plan(asset, partition)
            manifest = self.store.current(plan.pointer)
            if manifest is None:
                raise MissingArtifactError(
                    f"{asset} has not been materialized", where=partition, fix=f"less-assets run --until {asset}"
                )
            differences = plan.differences(manifest)
            if differences:
                raise StaleArtifactError(
                    f"{asset} was made from something else than what is in force now: {'; '.join(differences)}",
                    where=partition,
                    fix=f"less-assets run --until {asset}",
                )
            self._fresh[key] = manifest
        return self._fresh[key]

    def status(self, asset: str, partition: str | None = None) -> Status:
        """Whether the artifact is there and matches its plan, and if not, why."""
        try:
            plan = self.plan(asset, partition)
        except (MissingArtifactError, StaleArtifactError) as error:
            return Status("blocked", (error.what,))
        try:
            manifest = self.store.current(plan.pointer)
            if manifest is not None and self.verify_files:
                self.store.artifact(manifest.key, manifest.fingerprint).verify()
        except (MissingArtifactError, CorruptArtifactError) as error:
            return Status("missing", (error.what,))
        except StaleArtifactError as error:  # another version of LESS Assets wrote it
            return Status("stale", (error.what,))
        if manifest is None:
            return Status("missing", ("never materialized",))
        differences = plan.differences(manifest)
        return Status("stale", tuple(differences)) if differences else Status("fresh")

    def version(self, asset: str, partition: str | None = None) -> dict[str, str]:
        """One entry of a plan's inputs: `asset` or `asset/partition` → data version of the artifact in force."""
        name = asset if partition is None else f"{asset}/{partition}"
        return {name: self.fresh(asset, partition).data_version}

    def summary(self, asset: str, partition: str | None = None) -> dict[str, Any]:
        """The figures of an artifact that may be read."""
        return dict(self.fresh(asset, partition).summary)

    def shards(self) -> list[str]:
        """Keys of the shards that the pool index lists, in its order."""
        return list(self.summary("pool_index")["shards"])

    def other_subsets(self, recipe: str, task: str) -> dict[str, Pointer]:
        """The subsets that other recipes last selected for a task: what a report compares with.

        As they are, up to date or not: a report of one recipe shall not need all recipes to be selected. Their versions
        are among the report's inputs, so it is made again once one of them is selected anew.
        """
        others = [
            key for key in self.project.recipe_keys if key != recipe and self.project.needs(key, "selection_report")
        ]
        found = {key: self.store.pointer(subset_folder(key, task)) for key in others}
        return {key: pointer for key, pointer in found.items() if pointer is not None}

    def folder(self, asset: str, partition: str | None = None) -> ArtifactFolder:
        """The stored files of an artifact that may be read."""
        manifest = self.fresh(asset, partition)
        return self.store.artifact(manifest.key, manifest.fingerprint)


DRAW_FILE = "warmup_sample/draw.json"


def sample_draw(store: ArtifactStore) -> int:
    """How often the warm-up sample was asked to be drawn again."""
    try:
        return int(json.loads(read_bytes(store.root / DRAW_FILE)))
    except FileNotFoundError:
        return 0
    except (ValueError, TypeError) as error:
        raise CorruptArtifactError(
            "The record of warm-up draws is damaged.",
            where=str(store.root / DRAW_FILE),
            fix="delete it, or draw again with `less-assets run --resample-warmup`",
        ) from error


def draw_sample_again(store: ArtifactStore) -> None:
    """Make the next run draw another warm-up sample."""
    write_atomically(store.root / DRAW_FILE, json.dumps(sample_draw(store) + 1).encode())


def split(partition: str | None) -> tuple[str, str]:
    """The two parts of a grid key, in the order of their dimension names."""
    first, _, second = str(partition).partition("|")
    return first, second


def shared_settings(project: Project) -> dict[str, Any]:
    """Settings that all partitions of an asset share, by asset: what its `code_version` folds in."""
    model, gradients = project.model_settings(), project.gradient_settings()
    shared = {
        # A removed source changes no partition that is left; by this Dagster sees that the index is another one.
        "pool_index": {"sources": sorted(source.name for source in project.pool.sources)},
        "warmup_sample": project.sample_settings(),
        "warmup_checkpoints": {"model": model, **project.warmup_settings()},
        "train_gradients": {"model": model, **gradients},
        "target_gradients": {"model": model, **gradients},
        "pool_embeddings": {"model": model},
        "target_embeddings": {"model": model},
        "finetuned_model": project.finetuning_settings(),
    }
    unneeded = [name for name in OPTIONAL_ASSETS if not any(project.needs(key, name) for key in project.recipe_keys)]
    return {asset: settings for asset, settings in shared.items() if asset not in unneeded}


def files_digest(paths: list[str]) -> str:
    """Hash of the content of files and folders, whatever they are called.

    Raises:
        TargetFormatError: One does not exist.
    """
    from less_assets.method.data.row_files import file_digest, files_below

    digests = []
    for path in paths:
        files = files_below(path)
        if not files:
            raise TargetFormatError("A task's file or folder does not exist.", where=path, fix="correct the path")
        digests.append([file_digest(file) for file in files])
    return digest(digests)


def _model_stamp(base: str) -> str:
    """Tells cheaply whether a model's files may have changed; what they are is `base_model`'s data version."""
    if base.startswith("gguf:"):
        package, _, file = base.removeprefix("gguf:").partition("/")
        spec = importlib.util.find_spec(package)
        places = list(spec.submodule_search_locations or []) if spec else []
        found = [Path(place) / file for place in places if (Path(place) / file).is_file()]
        return f"{found[0].stat().st_size} bytes" if found else "not installed"
    folder = Path(base)
    if folder.is_dir():
        files = sorted(file for file in folder.iterdir() if file.is_file())
        return digest([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])
    return base


def _base_model(lineage: Lineage, _: str | None) -> ArtifactPlan:
    settings = {"model": lineage.project.model_settings(), "stamp": _model_stamp(lineage.project.model.base)}
    return ArtifactPlan("base_model", None, "model", "model", settings, {})


def _instruction_pool(lineage: Lineage, shard: str | None) -> ArtifactPlan:
    entry = lineage.pool_files.shard(str(shard))
    settings = lineage.project.source_settings(entry.source)
    return ArtifactPlan("instruction_pool", shard, f"pool/{shard}", f"pool/{shard}", settings, {"files": entry.digest})


def _pool_index(lineage: Lineage, _: str | None) -> ArtifactPlan:
    inputs: dict[str, str] = {}
    for shard in lineage.pool_files.shard_keys():
        inputs |= lineage.version("instruction_pool", shard)
    return ArtifactPlan("pool_index", None, "pool_index", "pool_index", {}, inputs)


def _warmup_sample(lineage: Lineage, _: str | None) -> ArtifactPlan:
    # Drawn once and frozen: the pool's version is recorded, but an appended shard never draws again.
    return ArtifactPlan(
        "warmup_sample",
        None,
        "warmup_sample",
        "warmup_sample",
        lineage.project.sample_settings() | {"draw": sample_draw(lineage.store)},
        lineage.version("pool_index"),
        determined_by={},
    )


def _warmup_checkpoints(lineage: Lineage, checkpoint: str | None) -> ArtifactPlan:
    settings = {
        "model": lineage.project.model_settings(),
        **lineage.project.warmup_settings(),
        "checkpoint": checkpoint,
    }
    inputs = lineage.version("base_model") | lineage.version("warmup_sample")
    if lineage.project.warmup.imported:
        place = lineage.project.checkpoints.index(str(checkpoint))
        inputs |= {"files": files_digest([lineage.project.warmup.imported[place]])}
    folder = f"warmup/{checkpoint}"
    return ArtifactPlan("warmup_checkpoints", checkpoint, folder, folder, settings, inputs)


def _train_gradients(lineage: Lineage, key: str | None) -> ArtifactPlan:
    checkpoint, shard = split(key)
    folder = f"gradients/train/{checkpoint}/{shard}"
    settings = {"model": lineage.project.model_settings(), **lineage.project.gradient_settings()}
    inputs = lineage.version("warmup_checkpoints", checkpoint) | lineage.version("instruction_pool", shard)
    return ArtifactPlan("train_gradients", key, folder, folder, settings, inputs)


def _gradient_datastore(lineage: Lineage, checkpoint: str | None) -> ArtifactPlan:
    inputs = lineage.version("pool_index")
    for shard in lineage.shards():
        inputs |= lineage.version("train_gradients", f"{checkpoint}|{shard}")
    folder = f"gradients/datastore/{checkpoint}"
    return ArtifactPlan("gradient_datastore", checkpoint, folder, folder, {}, inputs)


def _target_examples(lineage: Lineage, task: str | None) -> ArtifactPlan:
    folder = f"targets/{task}"
    paths: list[str] = []
    for member in lineage.project.member_tasks(str(task)):
        assert member.examples is not None
        paths.append(member.examples.path)
        if member.evaluation:
            harness = member.evaluation.harness
            named = [harness] if isinstance(harness, str) and harness.endswith((".yaml", ".yml")) else []
            paths += [path for path in (member.evaluation.path, member.evaluation.held_out, *named) if path]
    settings = lineage.project.task_settings(str(task))
    return ArtifactPlan("target_examples", task, folder, folder, settings, {"files": files_digest(paths)})


def _target_gradients(lineage: Lineage, key: str | None) -> ArtifactPlan:
    checkpoint, task = split(key)
    folder = f"gradients/target/{checkpoint}/{task}"
    settings = {"model": lineage.project.model_settings(), **lineage.project.gradient_settings()}
    checkpoint_version = lineage.version("warmup_checkpoints", checkpoint)
    examples = lineage.summary("target_examples", task)["examples_digest"]
    return ArtifactPlan(
        "target_gradients",
        key,
        folder,
        folder,
        settings,
        checkpoint_version | lineage.version("target_examples", task),
        # Another way to evaluate the task leaves its gradients as they are.
        determined_by=checkpoint_version | {"examples": examples},
    )


def _influence_scores(lineage: Lineage, task: str | None) -> ArtifactPlan:
    inputs = lineage.version("pool_index")
    for checkpoint in lineage.project.checkpoints:
        inputs |= lineage.version("gradient_datastore", checkpoint)
        inputs |= lineage.version("target_gradients", f"{checkpoint}|{task}")
    folder = f"selection/{task}/influence"
    return ArtifactPlan("influence_scores", task, folder, folder, {}, inputs)


def _recipe_settings(lineage: Lineage, recipe: str | None) -> ArtifactPlan:
    folder = f"recipes/{recipe}"
    return ArtifactPlan("recipe_settings", recipe, folder, folder, lineage.project.recipe_settings(str(recipe)), {})


def _selected_subset(lineage: Lineage, key: str | None) -> ArtifactPlan:
    recipe, task = split(key)
    project = lineage.project
    inputs = lineage.version("recipe_settings", recipe) | lineage.version("pool_index")
    ranking = project.ranked_by(recipe)
    if project.reads_scores(recipe):
        inputs |= lineage.version("influence_scores", task)
    for asset in ("exact_scores", "text_scores", "embedding_scores"):
        if project.needs(ranking, asset):
            inputs |= lineage.version(asset, f"{ranking}|{task}")
    if project.matches_targets(recipe):
        inputs |= lineage.version("target_examples", task)
    # How long rows are depends on the tokenizer.
    settings = {"tokenizer": project.tokenizer_settings()} if project.counts_tokens(recipe) else {}
    folder = subset_folder(recipe, task)
    return ArtifactPlan("selected_subset", key, folder, folder, settings, inputs)


def subset_folder(recipe: str, task: str) -> str:
    """Axis folder of a recipe's subsets for a task."""
    return f"selection/{task}/recipes/{recipe}"


def _pool_embeddings(lineage: Lineage, shard: str | None) -> ArtifactPlan:
    folder = f"embeddings/pool/{shard}"
    inputs = lineage.version("base_model") | lineage.version("instruction_pool", shard)
    return ArtifactPlan("pool_embeddings", shard, folder, folder, {"model": lineage.project.model_settings()}, inputs)


def _target_embeddings(lineage: Lineage, task: str | None) -> ArtifactPlan:
    folder = f"embeddings/target/{task}"
    model = lineage.version("base_model")
    return ArtifactPlan(
        "target_embeddings",
        task,
        folder,
        folder,
        {"model": lineage.project.model_settings()},
        model | lineage.version("target_examples", task),
        # Another way to evaluate the task leaves its embeddings as they are.
        determined_by=model | {"examples": lineage.summary("target_examples", task)["examples_digest"]},
    )


def _embedding_scores(lineage: Lineage, key: str | None) -> ArtifactPlan:
    recipe, task = split(key)
    strategy = lineage.project.recipe(recipe).strategy
    inputs = lineage.version("pool_index")
    for shard in lineage.shards():
        inputs |= lineage.version("pool_embeddings", shard)
    if strategy == "rds":
        inputs |= lineage.version("target_embeddings", task)
    # By fingerprint alone: recipes that differ in their budget only share the scores.
    pointer, folder = f"selection/{task}/embedding/{recipe}", f"selection/{task}/embedding"
    return ArtifactPlan("embedding_scores", key, pointer, folder, {"strategy": strategy}, inputs)


def _text_scores(lineage: Lineage, key: str | None) -> ArtifactPlan:
    recipe, task = split(key)
    settings = {"strategy": lineage.project.recipe(recipe).strategy}
    index = lineage.version("pool_index")
    pointer, folder = f"selection/{task}/text/{recipe}", f"selection/{task}/text"
    examples = lineage.summary("target_examples", task)["examples_digest"]
    return ArtifactPlan(
        "text_scores",
        key,
        pointer,
        folder,
        settings,
        index | lineage.version("target_examples", task),
        determined_by=index | {"examples": examples},
    )


def _exact_scores(lineage: Lineage, key: str | None) -> ArtifactPlan:
    recipe, task = split(key)
    inputs = lineage.version("influence_scores", task) | lineage.version("recipe_settings", recipe)
    inputs |= lineage.version("target_examples", task) | lineage.version("pool_index")
    for checkpoint in lineage.project.checkpoints:
        inputs |= lineage.version("warmup_checkpoints", checkpoint)
    folder = f"selection/{task}/exact/{recipe}"
    return ArtifactPlan("exact_scores", key, folder, folder, {}, inputs)


def _token_attribution(lineage: Lineage, key: str | None) -> ArtifactPlan:
    recipe, task = split(key)
    inputs = lineage.version("selected_subset", key) | lineage.version("influence_scores", task)
    inputs |= lineage.version("recipe_settings", recipe)
    inputs |= lineage.version("target_examples", task) | lineage.version("pool_index")
    for checkpoint in lineage.project.checkpoints:
        inputs |= lineage.version("warmup_checkpoints", checkpoint)
    folder = f"selection/{task}/attribution/{recipe}"
    return ArtifactPlan("token_attribution", key, folder, folder, lineage.project.report_settings(), inputs)


def _selection_report(lineage: Lineage, key: str | None) -> ArtifactPlan:
    from less_assets.reading.certificates import CERTIFICATE, read_certificate
    from less_assets.report.page import page_digest

    recipe, task = split(key)
    inputs = lineage.version("selected_subset", key) | lineage.version("recipe_settings", recipe)
    inputs |= lineage.version("pool_index") | lineage.version("target_examples", task)
    if lineage.project.selects_by_influence(recipe):
        inputs |= lineage.version("influence_scores", task) | lineage.version("token_attribution", key)
        if certificate := read_certificate(lineage, task):
            inputs |= {f"{CERTIFICATE}/{task}": certificate.manifest().data_version}
    inputs |= {
        f"selected_subset/{other}|{task}": found.version for other, found in lineage.other_subsets(recipe, task).items()
    }
    folder = f"selection/{task}/reports/{recipe}"
    return ArtifactPlan("selection_report", key, folder, folder, {"page": page_digest()}, inputs)


def _finetuned_model(lineage: Lineage, key: str | None) -> ArtifactPlan:
    recipe, task = split(key)
    inputs = lineage.version("base_model") | lineage.version("selected_subset", key)
    subset = lineage.fresh("selected_subset", key)
    settings = lineage.project.finetuning_settings(recipe)
    if other := lineage.project.recipe(recipe).model:
        settings |= {"stamp": _model_stamp(other)}  # no asset stands for another model than the project's
    return ArtifactPlan(
        "finetuned_model",
        key,
        f"models/of/{recipe}/{task}",
        "models",  # by fingerprint alone: `full`, `random` and the base model are trained once for all tasks
        settings,
        inputs,
        determined_by=lineage.version("base_model") | {"rows": subset.data_version},
    )


def _eval_results(lineage: Lineage, key: str | None) -> ArtifactPlan:
    recipe, task = split(key)
    model = lineage.fresh("finetuned_model", key)
    # By fingerprint alone, as models: two recipes that have selected the same rows are evaluated once.
    pointer, folder = f"evaluation/{recipe}/{task}", f"evaluation/samples/{task}"
    inputs = lineage.version("finetuned_model", key) | lineage.version("target_examples", task)
    evaluation = lineage.summary("target_examples", task)["evaluation_digest"]
    return ArtifactPlan(
        "eval_results",
        key,
        pointer,
        folder,
        {},
        inputs,
        determined_by={"finetuned_model": model.data_version, "evaluation": evaluation},
    )


def _task_results(lineage: Lineage, task: str | None) -> ArtifactPlan:
    inputs: dict[str, str] = {}
    for recipe in lineage.project.recipe_keys:
        inputs |= lineage.version("eval_results", f"{recipe}|{task}")
    folder = f"evaluation/tasks/{task}"
    return ArtifactPlan("task_results", task, folder, folder, {}, inputs)


def _leaderboard(lineage: Lineage, _: str | None) -> ArtifactPlan:
    inputs: dict[str, str] = {}
    for task in lineage.project.task_names:
        inputs |= lineage.version("task_results", task)
    return ArtifactPlan("leaderboard", None, "evaluation/leaderboard", "evaluation/leaderboard", {}, inputs)


PLANS: dict[str, Callable[[Lineage, str | None], ArtifactPlan]] = {
    "base_model": _base_model,
    "instruction_pool": _instruction_pool,
    "pool_index": _pool_index,
    "warmup_sample": _warmup_sample,
    "warmup_checkpoints": _warmup_checkpoints,
    "train_gradients": _train_gradients,
    "gradient_datastore": _gradient_datastore,
    "target_examples": _target_examples,
    "target_gradients": _target_gradients,
    "influence_scores": _influence_scores,
    "recipe_settings": _recipe_settings,
    "pool_embeddings": _pool_embeddings,
    "target_embeddings": _target_embeddings,
    "embedding_scores": _embedding_scores,
    "text_scores": _text_scores,
    "exact_scores": _exact_scores,
    "selected_subset": _selected_subset,
    "token_attribution": _token_attribution,
    "selection_report": _selection_report,
    "finetuned_model": _finetuned_model,
    "eval_results": _eval_results,
    "task_results": _task_results,
    "leaderboard": _leaderboard,
}
