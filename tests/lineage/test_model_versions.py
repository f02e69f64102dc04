"""A Hugging Face id without a commit: what is stale, and what is loaded, once the cache has another commit."""

import shutil
from pathlib import Path

import pytest
from support.bench import Bench
from support.tiny import TinyProject

from less_assets.compute.models import ModelLoader
from less_assets.lineage.model_versions import cached_commit, model_stamp, pinned
from less_assets.project.project import load_project
from less_assets.steps.registry import open_lineage, open_store

BEFORE, AFTER = "a" * 40, "b" * 40


class Cache:
    """A cache of Hugging Face's layout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "models--owner--name"

    def move(self, commit: str, branch: str = "main") -> None:
        """What a branch stands for, as a download leaves it."""
        (self.folder / "refs").mkdir(parents=True, exist_ok=True)
        (self.folder / "refs" / branch).write_text(commit)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Cache:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return Cache(tmp_path / "hub")


@pytest.fixture
def bench(tmp_path) -> Bench:
    bench = Bench(tmp_path)
    bench.settings["model"]["base"] = "owner/name"
    return bench


def test_the_commit_of_a_name_is_the_caches_unless_the_name_has_one(cache, tmp_path):
    assert cached_commit("owner/name") is None
    cache.move(BEFORE)
    cache.move(AFTER, "v1")
    assert (cached_commit("owner/name"), cached_commit("owner/name@v1")) == (BEFORE, AFTER)
    for base in (f"owner/name@{AFTER}", "owner/name@v2", "owner/other", str(tmp_path), "gguf:package/file.gguf"):
        assert cached_commit(base) is None


def test_a_model_is_stale_as_soon_as_the_cache_has_another_commit_and_fresh_once_that_is_recorded(bench, cache):
    bench.put("base_model", base="owner/name", revision=BEFORE)  # the cache was empty: the run has filled it
    for commit in (None, BEFORE):
        if commit:
            cache.move(commit)
        assert bench.lineage.status("base_model").state == "fresh"
    cache.move(AFTER)
    status = bench.lineage.status("base_model")
    assert status.state == "stale"
    assert f"owner/name@{AFTER}" in status.reasons[0]
    bench.put("base_model", base="owner/name", revision=AFTER)
    assert bench.lineage.status("base_model").state == "fresh"
    shutil.rmtree(cache.folder)  # another machine
    assert bench.lineage.status("base_model").state == "fresh"
    cache.move(BEFORE)
    assert bench.lineage.status("base_model").state == "stale"


def test_a_model_with_its_commit_in_the_name_never_moves(bench, cache):
    bench.settings["model"]["base"] = f"owner/name@{BEFORE}"
    bench.put("base_model", base=f"owner/name@{BEFORE}", revision=BEFORE)
    cache.move(AFTER)
    assert bench.lineage.status("base_model").state == "fresh"


def test_another_model_that_a_recipe_trains_is_stale_likewise(bench, cache):
    bench.settings["model"]["base"] = "model"
    recipe = {"name": "random-t", "strategy": "random", "fraction": 0.5, "seeds": [0], "model": "owner/name"}
    bench.settings["recipes"].append(recipe)
    cache.move(BEFORE)
    bench.put_everything()
    trained = ["random-t-seed0|sky", "random-t-seed0|sums"]
    for partition in trained:
        plan = bench.lineage.plan("finetuned_model", partition)
        bench.store.artifact(plan.folder, plan.fingerprint).discard()
        bench.put("finetuned_model", partition, base="owner/name", revision=BEFORE)
    assert bench.states() == {}
    cache.move(AFTER)
    stale = {name for name, state in bench.states().items() if state == "stale"}
    assert stale == {f"finetuned_model/{partition}" for partition in trained}


def test_pinned_names():
    made = {"base": "owner/name@v1", "revision": BEFORE}
    assert pinned("owner/name@v1", made) == f"owner/name@{BEFORE}"
    assert pinned("owner/name", made) == "owner/name"
    assert pinned("owner/name", {}) == "owner/name"
    assert pinned(None, made) is None
    assert model_stamp("owner/other") == "owner/other"


def test_the_recorded_commit_is_loaded_whatever_the_cache_has_by_now(tmp_path, tiny_model, cache):
    for commit in (BEFORE, AFTER):
        snapshot = cache.folder / "snapshots" / commit
        shutil.copytree(tiny_model, snapshot)
        (snapshot / "chat_template.jinja").write_text((tiny_model / "chat_template.jinja").read_text() + commit)
    cache.move(BEFORE)
    tiny = TinyProject(tmp_path / "project", tiny_model)
    tiny.settings["model"]["base"] = "owner/name"
    project = load_project(tiny.path)
    store = open_store(project)
    models = ModelLoader(project, tmp_path / "models")
    described = models.describe_base("owner/name")
    assert described["revision"] == BEFORE
    plan = open_lineage(project, store).plan("base_model")
    with store.writing(plan.folder, plan.fingerprint) as folder:
        folder.seal(kind="base_model", settings=plan.settings, data_version=described["digest"], summary=described)
    store.publish(store.artifact(plan.folder, plan.fingerprint), at=plan.pointer, inputs=plan.inputs)
    models.pin(open_lineage(project, store))
    assert models.tokenizer().chat_template.endswith(BEFORE)
    cache.move(AFTER)
    models = ModelLoader(project, tmp_path / "models")
    assert models.tokenizer().chat_template.endswith(AFTER)
    models.pin(open_lineage(project, store))
    assert models.tokenizer().chat_template.endswith(BEFORE), "what was loaded before is let go"
    assert models.base()[1].chat_template.endswith(BEFORE)
    assert models.commit_of("owner/name") == {"base": "owner/name", "revision": AFTER}
    assert models.commit_of(str(tiny_model)) == models.commit_of(None) == {}
