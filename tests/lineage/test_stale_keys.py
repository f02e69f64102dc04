"""Every key of the project file: which artifacts it makes stale, and that nothing can be read together with them.

Artifacts are put into a store as planned, without computing anything; then one key changes. An artifact is `stale` if
its own plan has changed, `blocked` if something it reads is not fresh: nobody can mix the two sides.
"""

import json
from copy import deepcopy
from pathlib import Path

import dagster as dg
import pytest
import yaml
from support.project_keys import CHANGES, STRUCTURE, set_key

from less_assets.errors import MissingArtifactError, StaleArtifactError
from less_assets.lineage.lineage import Lineage
from less_assets.lineage.pool_files import PoolFiles
from less_assets.orchestration.partitions import Axes
from less_assets.project.project import load_project
from less_assets.steps.registry import ASSETS, open_lineage
from less_assets.store.artifacts import ArtifactStore

TURNS = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
BASE = {
    "name": "full",
    "storage": {"root": "artifacts"},
    "model": {"base": "model"},
    "lora": {"rank": 8},
    "pool": {"shard_size": 10, "sources": [{"name": "s", "path": "s.jsonl"}]},
    "warmup": {"fraction": 0.5, "epochs": 2},
    "gradients": {"forms": ["marginal", "adamw"]},
    "tasks": [
        {"name": "t", "examples": {"path": "t.jsonl"}, "evaluation": {"held_out": "t.jsonl"}},
        {"name": "u", "examples": {"path": "t.jsonl"}},
        {"name": "g", "members": ["t"]},
    ],
    "recipes": [
        {"name": "less", "strategy": "less", "fraction": 0.1, "rescore": "exact"},
        {"name": "random", "strategy": "random", "rows": 3},
        {"name": "base", "strategy": "none"},
    ],
    "finetuning": {"epochs": 1},
}
# What summaries say of content that others depend on.
SUMMARIES = {"target_examples": {"examples_digest": "e", "evaluation_digest": "v"}}

NOTHING: set[str] = set()
GRADIENTS = {"train_gradients", "target_gradients"}
TRAINED = {"warmup_checkpoints", "target_tuned_adapter", "finetuned_model"}
# key: the assets whose own artifacts become stale
STALE: dict[str, set[str]] = {
    "name": NOTHING,
    "model.base": {"base_model"},
    "model.dtype": {"base_model"},
    "model.device": NOTHING,
    "model.device_map": NOTHING,
    "model.max_length": {"base_model", "target_examples"},
    "model.chat_format": {"base_model"},
    "model.date": {"base_model"},
    "model.quantization": {"base_model"},
    "model.trust_remote_code": {"base_model"},
    "lora.rank": TRAINED,
    "lora.alpha": TRAINED,
    "lora.dropout": TRAINED,
    "lora.target_modules": TRAINED,
    "pool.shard_size": {"instruction_pool"},
    "pool.sources[].path": {"instruction_pool"},
    "pool.sources[].format": {"instruction_pool"},
    "pool.sources[].dialect": NOTHING,  # the source is JSON lines
    "pool.sources[].limit": {"instruction_pool"},
    "warmup.fraction": {"warmup_sample"},
    "warmup.seed": {"warmup_sample"},
    "warmup.gradient_checkpointing": NOTHING,
    "gradients.forms": GRADIENTS,
    "gradients.sketch": GRADIENTS,
    "gradients.dimension": GRADIENTS,
    "gradients.storage": GRADIENTS,
    "gradients.bytes_per_row": GRADIENTS,
    "gradients.seed": GRADIENTS,
    "gradients.block_rows": GRADIENTS,
    "gradients.token_budget": NOTHING,
    "gradients.gradient_checkpointing": NOTHING,
    "gradients.directions_limit": NOTHING,
    "gradients.certificate_rows": NOTHING,  # only checks read these two
    "gradients.real_step_rows": NOTHING,
    "report.token_rows": {"token_attribution"},
    "report.context_rows": {"token_attribution"},
    "compute.cpus_per_worker": NOTHING,
    "tasks[].control": NOTHING,  # only a check reads it
    "tasks[].evaluation.token_budget": NOTHING,
    "tasks[].evaluation.grading": {"eval_results"},
    "recipes[].model": {"finetuned_model"},
    "finetuning.gradient_checkpointing": NOTHING,
    "target_tuning.gradient_checkpointing": NOTHING,
    "compute.backend": NOTHING,
    "compute.address": NOTHING,
    "compute.gpus_per_worker": NOTHING,
    "compute.workers": NOTHING,
    "tracking.mlflow": NOTHING,
}
# Other values, or more than one change at once, where those of `test_project.py` do not fit this project.
VALUES: dict[str, object] = {"model.base": "model2", "gradients.forms": ["marginal", "adamw", "sgd"]}
VALUES |= {"tasks[].evaluation.path": "other.jsonl", "tasks[].evaluation.format": "mmlu"}
VALUES |= {"pool.shard_size": 11, "recipes[].form": "adamw"}
EXTRA: dict[str, dict[str, object]] = {
    # key: what else must hold before and after
    "tasks[].evaluation.path": {"tasks[].evaluation": {"path": "t.jsonl", "format": "bbh"}},
    "tasks[].evaluation.format": {"tasks[].evaluation": {"path": "t.jsonl", "format": "bbh"}},
    "tasks[].evaluation.few_shot": {"tasks[].evaluation": {"path": "t.jsonl", "format": "bbh"}},
    "tasks[].evaluation.grading": {"tasks[].evaluation": {"path": "t.jsonl", "format": "bbh"}},
    "tasks[].evaluation.num_fewshot": {"tasks[].evaluation": {"harness": "gsm8k"}},
    "tasks[].evaluation.apply_chat_template": {"tasks[].evaluation": {"harness": "gsm8k"}},
    "tasks[].evaluation.harness": {"tasks[].evaluation": {"harness": "gsm8k"}},
    "warmup.mean_learning_rates": {"warmup": {"import": ["import"], "mean_learning_rates": [1e-5]}},
    "recipes[].mix.sources": {"recipes[].mix": {"share": 0.4}},
    "recipes[].mix.seed": {"recipes[].mix": {"share": 0.4}},
    "recipes[].precondition": {"recipes[].rescore": "none"},
    "recipes[].damping": {"recipes[].rescore": "none", "recipes[].precondition": "pool"},
    "exclude": {"exclude": ["other-left-out.jsonl"]},
    "prefilter.strategy": {"prefilter": {"strategy": "rds", "keep": 0.4}},
    "prefilter.keep": {"prefilter": {"strategy": "bm25", "keep": 0.4}},
    "prefilter.sample_rows": {"prefilter": {"strategy": "bm25", "keep": 0.4}},
    "compute.backend": {"compute": {"backend": "ray"}},
    "compute.address": {"compute": {"backend": "ray"}},
    "compute.gpus_per_worker": {"compute": {"backend": "ray"}},
    "compute.workers": {"compute": {"backend": "ray"}},
    "compute.cpus_per_worker": {"compute": {"backend": "ray"}},
}
TUNED = [{"name": "tuned", "strategy": "target_tuned", "rows": 3}, *BASE["recipes"]]
EXTRA |= {path: {"recipes": TUNED} for path in CHANGES if path.startswith(("target_tuning.", "lora."))}
# Keys that rename an axis: what had the old name is out of the graph, what has the new one was never made.
STRUCTURAL: dict[str, tuple[object, set[str], set[str]]] = {
    # key: (another value, stale, missing)
    "pool.sources[].name": ("other", NOTHING, {"instruction_pool"}),
    "tasks[].validation.folds": (3, NOTHING, {"target_examples"}),
    "tasks[].members": (["t", "u"], {"target_examples"}, NOTHING),
    "recipes[].name": ("other", NOTHING, {"recipe_settings"}),
    "recipes[].tokens": (50, {"recipe_settings"}, NOTHING),
    "recipes[].seeds": ([4], NOTHING, {"recipe_settings"}),
    "recipes[].rows": (9, {"recipe_settings"}, NOTHING),
    "recipes[].keep": ("top", {"recipe_settings"}, NOTHING),
    "recipes[].match": ("less", {"recipe_settings"}, NOTHING),
    "recipes[].mix.sources": (["s"], {"recipe_settings"}, NOTHING),
    "recipes[].mix.seed": (7, {"recipe_settings"}, NOTHING),
    "recipes[].precondition": ("pool", {"recipe_settings"}, NOTHING),
    "recipes[].damping": (2.0, {"recipe_settings", "preconditioned_scores"}, NOTHING),
    "recipes[].scores": ("other.jsonl", {"external_scores"}, NOTHING),
    "warmup.import": (["import"], {"warmup_sample"}, NOTHING),
    "exclude": (["left-out.jsonl"], {"excluded_rows"}, NOTHING),
    "prefilter.strategy": ("bm25", {"prefiltered_pool"}, NOTHING),
    "prefilter.keep": (0.5, {"prefiltered_pool"}, NOTHING),
    "prefilter.sample_rows": (9, {"kept_rows"}, NOTHING),
    "warmup.mean_learning_rates": ([2e-5], {"warmup_checkpoints"}, NOTHING),
    "tasks[].evaluation.harness": ("bbh", {"target_examples"}, NOTHING),
    "tasks[].evaluation.held_out": ("other.jsonl", {"target_examples"}, NOTHING),
    "tasks[].evaluation.num_fewshot": (7, {"target_examples"}, NOTHING),
    "tasks[].evaluation.apply_chat_template": (True, {"target_examples"}, NOTHING),
}
# Changed by `test_renaming_a_task…`, `test_another_strategy…` and `test_another_root…`: they need more than one change;
# and what a tournament's pilots are, by `tests/end_to_end/test_tournaments.py`.
ELSEWHERE = {"tasks[].name", "recipes[].strategy", "recipes[].pilot", "storage.root"}


class Planned:
    """A project whose artifacts lie in a store as planned."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("s.jsonl", "t.jsonl", "other.jsonl"):
            rows = [{"messages": [*TURNS, {"role": "user", "content": f"{name} {row}"}]} for row in range(12)]
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name in ("left-out.jsonl", "other-left-out.jsonl"):
            (folder / name).write_text(json.dumps({"example_id": "0" * 32, "reason": name}) + "\n")
        for name in ("model", "model2", "import"):
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps(name))
            (folder / name / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}")
        self.store = ArtifactStore(str(folder / "artifacts"))
        self._put: dict | None = None

    def lineage(self, settings: dict) -> Lineage:
        """The lineage of a project file, its pool scanned."""
        path = self.folder / "project.yaml"
        path.write_text(yaml.safe_dump(settings))
        project = load_project(path)
        PoolFiles.scan(project, self.store)
        return open_lineage(project, self.store)

    def partitions(self, lineage: Lineage) -> list[tuple[str, str | None]]:
        """Every partition of every asset of a project, upstream first."""
        axes, found = Axes(lineage.project), []
        with dg.DagsterInstance.ephemeral() as instance:
            instance.add_dynamic_partitions("shard", lineage.pool_files.shard_keys())
            for name, asset in ((name, asset) for name, asset in ASSETS.items() if asset.exists(lineage.project)):
                definition = axes.of(asset)
                keys = definition.get_partition_keys(dynamic_partitions_store=instance) if definition else []
                found += [(name, key) for key in (keys if asset.axes else [None])]
        return found

    def put(self, settings: dict) -> None:
        """Store an empty artifact for every plan."""
        if settings == self._put:
            return
        self._put, lineage = deepcopy(settings), self.lineage(settings)
        for asset, partition in self.partitions(lineage):
            plan = lineage.plan(asset, partition)
            if not self.store.artifact(plan.folder, plan.fingerprint).exists():
                summary = (
                    {"shards": lineage.pool_files.shard_keys()} if asset == "pool_index" else SUMMARIES.get(asset, {})
                )
                with self.store.writing(plan.folder, plan.fingerprint) as folder:
                    folder.seal(
                        kind=asset,
                        settings=plan.settings,
                        inputs=plan.inputs,
                        data_version=plan.fingerprint,
                        summary=summary,
                    )
            self.store.publish(self.store.artifact(plan.folder, plan.fingerprint), at=plan.pointer, inputs=plan.inputs)

    def states(self, settings: dict) -> dict[str, dict[str, str]]:
        """State → artifacts by name → why; fresh ones left out."""
        lineage = self.lineage(settings)
        found: dict[str, dict[str, str]] = {"stale": {}, "blocked": {}, "missing": {}}
        for asset, partition in self.partitions(lineage):
            status = lineage.status(asset, partition)
            if status.state != "fresh":
                found[status.state][name_of(asset, partition)] = "; ".join(status.reasons)
        return found

    def readers(self, names: set[str]) -> set[str]:
        """Every artifact in force that was made from one of these, directly or not, by what manifests say."""
        inputs = {}
        for key in self.names.keys() & set(self.store.published()):  # others are of recipes that another test has had
            manifest = self.store.current(key)
            inputs[key] = (manifest.kind, set(manifest.inputs))
        reached, more = set(names), True
        while more:
            found = {
                name
                for key, (kind, upstream) in inputs.items()
                if upstream & reached
                for name in [self.names[key]]
                if name not in reached
            }
            reached |= found
            more = bool(found)
        return reached - names

    def remember_names(self, settings: dict) -> None:
        """Which artifact each key of the store stands for."""
        lineage = self.lineage(settings)
        self.names = {
            lineage.plan(asset, partition).pointer: name_of(asset, partition)
            for asset, partition in self.partitions(lineage)
        }


def name_of(asset: str, partition: str | None) -> str:
    return asset if partition is None else f"{asset}/{partition}"


def assets(names: dict[str, str]) -> set[str]:
    return {name.partition("/")[0] for name in names}


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Planned:
    return Planned(tmp_path_factory.mktemp("planned"))


def before_and_after(path: str, value: object) -> tuple[dict, dict]:
    before = deepcopy(BASE)
    for other, given in EXTRA.get(path, {}).items():
        set_key(before, other, deepcopy(given))
    if path in ("recipes[].seeds", "recipes[].rows"):
        before["recipes"].insert(0, before["recipes"].pop(1))
    strategies = {"recipes[].keep": "perplexity", "recipes[].match": "length_matched"}
    if path in strategies:
        before["recipes"].insert(0, {"name": "added", "strategy": strategies[path], "rows": 3})
    if path == "recipes[].scores":
        before["recipes"].insert(0, {"name": "added", "strategy": "external", "rows": 3, "scores": "t.jsonl"})
    if path == "tasks[].members":
        before["tasks"].insert(0, before["tasks"].pop(2))
    after = deepcopy(before)
    if path == "warmup.import":
        after["warmup"] = {}
    if path == "recipes[].tokens":
        del after["recipes"][0]["fraction"]
    set_key(after, path, value)
    if path == "compute.backend":
        after["compute"] = {"backend": "local"}
    return before, after


def change(planned: Planned, path: str, value: object) -> tuple[dict[str, dict[str, str]], dict]:
    """States after a change of one key, everything having been made before it."""
    before, after = before_and_after(path, value)
    planned.put(before)
    planned.remember_names(before)
    assert not any(planned.states(before).values()), "made as planned, all is fresh"
    return planned.states(after), after


def expected_of(path: str) -> set[str]:
    if path in STALE:
        return STALE[path]
    section = path.partition(".")[0].removesuffix("[]")
    by_section = {"warmup": {"warmup_checkpoints"}, "finetuning": {"finetuned_model"}, "tasks": {"target_examples"}}
    by_section["target_tuning"] = {"target_tuned_adapter"}
    return by_section.get(section, {"recipe_settings"})


def of_others(path: str, after: dict, names: dict[str, str]) -> set[str]:
    """Artifacts that belong to another task or recipe than the one, the first, whose key was changed."""
    own = {"recipes[]": {after["recipes"][0]["name"]}, "tasks[]": {after["tasks"][0]["name"], "g"}}
    mine = own.get(path.partition(".")[0])
    return {name for name in names if mine and not mine & set(name.partition("/")[2].split("|"))}


def test_every_key_of_the_project_file_is_tried():
    assert set(CHANGES) | STRUCTURE == set(CHANGES) - ELSEWHERE | set(STRUCTURAL) | ELSEWHERE
    assert set(STALE) <= set(CHANGES)


@pytest.mark.parametrize("path", sorted(set(CHANGES) - ELSEWHERE))
def test_a_changed_key_makes_stale_just_what_depends_on_it_and_blocks_all_its_readers(planned, path):
    found, after = change(planned, path, VALUES.get(path, CHANGES[path][0]))
    assert assets(found["stale"]) == expected_of(path), found["stale"]
    assert of_others(path, after, found["stale"]) == set(), "one task's or recipe's key is nobody else's matter"
    unmade = set(found["stale"]) | set(found["missing"])
    # A report compares with the subsets that are in force and goes on without the others.
    readers = {each for each in planned.readers(unmade) - unmade if not each.startswith("selection_report/")}
    current = {name_of(asset, partition) for asset, partition in planned.partitions(planned.lineage(after))}
    assert set(found["blocked"]) >= readers & current, "a reader of something stale would go on"
    if unmade:
        lineage = planned.lineage(after)
        for name in list(found["blocked"])[:3]:
            asset, _, partition = name.partition("/")
            with pytest.raises((StaleArtifactError, MissingArtifactError)):
                lineage.plan(asset, partition or None)
    else:
        assert not found["blocked"]


@pytest.mark.parametrize("path", sorted(STRUCTURAL))
def test_a_key_that_changes_the_graph_leaves_nothing_of_the_old_one_in_force(planned, path):
    value, stale, missing = STRUCTURAL[path]
    found, _ = change(planned, path, value)
    # Reports compare recipes: one more or less of those changes the others' pages.
    assert assets(found["stale"]) - {"selection_report"} == stale, found
    assert assets(found["missing"]) >= missing, found
    assert "leaderboard" in found["blocked"] or "leaderboard" in found["stale"], "the results are not those any more"


def test_renaming_a_task_makes_it_a_new_one(planned):
    _, after = before_and_after("name", "full")
    planned.put(deepcopy(BASE))
    after["tasks"][0]["name"], after["tasks"][2]["members"] = "renamed", ["renamed"]
    found = planned.states(after)
    assert "target_examples/renamed" in found["missing"]
    assert "target_examples/g" in found["stale"], "a group is what its members are"
    assert "leaderboard" in found["blocked"]


def test_another_strategy_of_a_recipe_is_stale(planned):
    planned.put(deepcopy(BASE))
    after = deepcopy(BASE)
    after["recipes"][2]["strategy"] = "full"
    found = planned.states(after)
    assert set(found["stale"]) == {"recipe_settings/base"}
    assert {f"selected_subset/base|{task}" for task in "tug"} <= set(found["blocked"])


def test_another_root_is_another_store(planned):
    planned.put(deepcopy(BASE))
    after = deepcopy(BASE) | {"storage": {"root": "elsewhere"}}
    lineage = planned.lineage(after)
    elsewhere = open_lineage(lineage.project, ArtifactStore(lineage.project.storage.root))
    assert elsewhere.status("base_model").state == "missing"
    assert elsewhere.status("leaderboard").state == "blocked"


def test_artifacts_of_another_version_of_the_program_are_recognised_and_never_read(planned, monkeypatch):
    planned.put(deepcopy(BASE))
    old = planned.store.current("model")
    for module in ("less_assets.lineage.plan", "less_assets.store.manifest"):
        monkeypatch.setattr(f"{module}.FORMAT_VERSION", 2)
    lineage = planned.lineage(deepcopy(BASE))
    status = lineage.status("base_model")
    assert status.state == "stale"
    assert "format 1; this version of less-assets reads format 2" in status.reasons[0]
    assert lineage.status("leaderboard").state == "blocked"
    with pytest.raises(StaleArtifactError, match="less-assets run"):
        lineage.fresh("base_model")
    assert lineage.plan("base_model").fingerprint != old.fingerprint, "the old one is not overwritten"
    planned._put = None
    planned.put(deepcopy(BASE))
    assert not any(planned.states(deepcopy(BASE)).values()), "it is made again beside the old one"
    assert planned.store.artifact("model", old.fingerprint).exists()
    planned._put = None
