"""The code location: it loads light, as Dagster's own tools load it, and versions code by what can change numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml

from less_assets.errors import LessAssetsError
from less_assets.orchestration.definitions import build_definitions, code_versions
from less_assets.project.project import Project, parse_project
from less_assets.running.dagster_home import WORKSPACE
from less_assets.running.runner import RANGE_END_TAG, RANGE_START_TAG, register_shards
from less_assets.steps.registry import open_store

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = ["torch", "transformers", "peft", "lm_eval", "ray", "altair"]
SETTINGS = {
    "name": "small",
    "model": {"base": "someone/some-model"},
    "pool": {"sources": [{"name": "plus", "path": "plus.jsonl"}]},
    "tasks": [{"name": "sums", "examples": {"path": "sums.jsonl"}}],
    "recipes": [{"name": "less", "strategy": "less", "fraction": 0.1}, {"name": "base", "strategy": "none"}],
}


def project(**sections) -> Project:
    """The small project with some sections replaced."""
    return parse_project(yaml.safe_dump(SETTINGS | sections).encode())


def changed(**sections) -> set[str]:
    """Assets whose code version another setting changes."""
    before, after = versions(project()), versions(project(**sections))
    assert before.keys() == after.keys()
    return {asset for asset in before if before[asset] != after[asset]}


def versions(of: Project) -> dict[str, str | None]:
    """Code version of every asset, as Dagster sees it."""
    graph = build_definitions(of).resolve_asset_graph()
    return {key.to_user_string(): graph.get(key).code_version for key in graph.get_all_asset_keys()}


def sensor(definitions: dg.Definitions) -> dg.SensorDefinition:
    """The one that looks for new shards."""
    return next(each for each in definitions.sensors if each.name == "pool_shards")


def in_fresh_process(code: str, home: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python without anything this process has imported or set."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "DAGSTER_HOME": str(home)}
    environment |= {"LESS_PROJECT": str(REPOSITORY / "projects/template.yaml"), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *(["-c", code] if code else []), *arguments]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def home(tmp_path) -> Path:
    """An empty DAGSTER_HOME without telemetry."""
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    return tmp_path


def test_the_code_location_loads_without_heavy_libraries(home):
    code = (
        "import json, sys\n"
        "from less_assets.running.code_location import defs\n"
        "defs.resolve_asset_graph(); defs.get_repository_def()\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))\n"
    )
    done = in_fresh_process(code, home)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_dagster_validates_the_workspace(home):
    done = in_fresh_process("", home, "-m", "dagster", "definitions", "validate", "-w", str(WORKSPACE))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All code locations passed validation" in done.stdout + done.stderr


def test_every_asset_has_a_code_version_a_group_and_a_description():
    graph = build_definitions(project()).resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.code_version, key
        assert node.group_name != "default", key
        assert len(node.description or "") > 20, key


def test_every_asset_has_an_owner_kinds_and_tags_to_filter_by():
    graph = build_definitions(project(exclude=["left-out.jsonl"])).resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.owners == ["team:small"], key
        assert node.kinds, key
        assert set(node.tags) >= {"less-assets/partitioned-by", "less-assets/work", "less-assets/part"}, key
    assert graph.get(dg.AssetKey("selected_subset")).tags["less-assets/partitioned-by"] == "recipe-by-task"
    extras = {
        key.to_user_string()
        for key in graph.get_all_asset_keys()
        if graph.get(key).tags["less-assets/part"] == "extras"
    }
    assert extras == {"token_attribution", "selection_report"}


def description(of: Project, asset: str, reports_url: str | None) -> str:
    graph = build_definitions(of, reports_url=reports_url).resolve_asset_graph()
    return graph.get(dg.AssetKey(asset)).description or ""


def test_the_description_of_a_selection_leads_to_every_report_and_says_how_its_top_row_is_explained():
    recipes = [*SETTINGS["recipes"], {"name": "random", "strategy": "random", "fraction": 0.1, "seeds": [0]}]
    found = project(recipes=recipes)
    for asset in ("selected_subset", "selection_report"):
        shown = description(found, asset, "http://127.0.0.1:3001/small")
        for recipe in ("less", "random-seed0"):
            address = f"http://127.0.0.1:3001/small/selection/sums/reports/{recipe}/index.html"
            assert f"[{recipe}]({address})" in shown
        assert "/reports/base/" not in shown, "nothing is reported of a recipe that chooses nothing"
        assert "less-assets explain sums --recipe less --project " in shown
    assert "http" not in description(found, "selected_subset", None), "nobody serves them"
    assert "bucket" not in description(found, "selected_subset", None)
    assert "bucket" in description(project(storage={"root": "memory://far"}), "selection_report", None)
    assert "http" not in description(found, "pool_index", "http://127.0.0.1:3001/small")


def test_assets_that_load_a_model_share_the_gpu_pool():
    graph = build_definitions(project()).resolve_asset_graph()
    pooled = {key.to_user_string() for key in graph.get_all_asset_keys() if graph.get(key).pools == {"gpu"}}
    models = {"base_model", "warmup_checkpoints", "train_gradients", "target_gradients"}
    assert pooled == models | {"influence_scores", "token_attribution", "finetuned_model", "eval_results"}


def test_code_versions_follow_the_settings_that_all_partitions_share():
    gradients = {"train_gradients", "target_gradients"}
    sources = [*SETTINGS["pool"]["sources"], {"name": "more", "path": "more.jsonl"}]
    assert changed(pool={"sources": sources}) == {"pool_index"}
    assert versions(project(pool={"sources": sources})) == versions(project(pool={"sources": sources[::-1]}))
    assert changed(gradients={"dimension": 1024}) == gradients
    assert changed(warmup={"learning_rate": 1e-4}) == {"warmup_checkpoints"}
    assert changed(warmup={"fraction": 0.5}) == {"warmup_sample"}
    assert changed(finetuning={"epochs": 7}) == {"finetuned_model"}
    assert changed(lora={"rank": 4}) == {"warmup_checkpoints", "finetuned_model"}
    assert {"warmup_checkpoints", "finetuned_model", *gradients} <= changed(model={"base": "someone/another-model"})


@pytest.mark.parametrize(
    "sections",
    [
        {"name": "renamed"},
        {"storage": {"root": "elsewhere"}},
        {"model": {"base": "someone/some-model", "device": "cpu"}},
        {"gradients": {"token_budget": 64, "gradient_checkpointing": True}},
        {"compute": {"backend": "local"}},
        # A task's, a source's and a recipe's settings have their own assets: others must not become stale by them.
        {"tasks": [*SETTINGS["tasks"], {"name": "sky", "examples": {"path": "sky.jsonl"}}]},
        {"recipes": [{"name": "less", "strategy": "less", "rows": 7}, {"name": "base", "strategy": "none"}]},
        {"pool": {"shard_size": 99, "sources": [{"name": "plus", "path": "other.jsonl", "limit": 5}]}},
    ],
    ids=lambda sections: "-".join(sections),
)
def test_code_versions_do_not_follow_what_cannot_change_numbers_or_has_an_asset_of_its_own(sections):
    assert changed(**sections) == set()


def test_code_versions_name_only_assets_that_exist():
    assert set(code_versions(project())) == set(versions(project()))


def test_resources_can_be_replaced():
    store = object()
    assert build_definitions(project(), store=store).resources["store"] is store


def test_the_shard_sensor_is_on_by_default():
    assert sensor(build_definitions(project())).default_status is dg.DefaultSensorStatus.RUNNING


def test_the_shard_sensor_registers_new_shards_and_nothing_else(tmp_path):
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (tmp_path / "plus.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 5)
    settings = {**SETTINGS, "pool": {"shard_size": 2, "sources": [{"name": "plus", "path": "plus*.jsonl"}]}}
    found = parse_project(yaml.safe_dump(settings).encode(), tmp_path / "project.yaml")
    shards = sensor(build_definitions(found))
    with dg.DagsterInstance.ephemeral() as instance:

        def looks():
            context = dg.build_sensor_context(instance, resources={"store": open_store(found)})
            return shards.evaluate_tick(context)

        (request,) = looks().dynamic_partitions_requests
        assert request.partition_keys == ["plus-00000", "plus-00001", "plus-00002"]
        instance.add_dynamic_partitions("shard", request.partition_keys)
        assert "none of them new" in looks().skip_message
        (tmp_path / "plus-more.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 3)
        (request,) = looks().dynamic_partitions_requests
        assert request.partition_keys == ["plus-00003"]
        assert looks().run_requests == []


def test_the_shard_sensor_names_shards_whose_rows_have_changed(tmp_path):
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    file = tmp_path / "plus.jsonl"
    file.write_text((json.dumps({"messages": turns}) + "\n") * 4)
    settings = {**SETTINGS, "pool": {"shard_size": 2, "sources": [{"name": "plus", "path": "plus.jsonl"}]}}
    found = parse_project(yaml.safe_dump(settings).encode(), tmp_path / "project.yaml")
    definitions = build_definitions(found)
    shards = sensor(definitions)
    with dg.DagsterInstance.ephemeral() as instance:
        store = open_store(found)
        register_shards(found, store, instance)
        tags = {RANGE_START_TAG: "plus-00000", RANGE_END_TAG: "plus-00001"}
        job = definitions.resolve_implicit_global_asset_job_def()
        job.execute_in_process(asset_selection=[dg.AssetKey("instruction_pool")], tags=tags, instance=instance)

        def says() -> str:
            context = dg.build_sensor_context(instance, resources={"store": store})
            return shards.evaluate_tick(context).skip_message

        assert says() == "the pool has 2 shards, none of them new"
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join([*lines[:3], lines[3].replace("two", "three")]))
        assert says().endswith(
            "changed since they were read: plus-00001. Materialize these partitions of instruction_pool"
        )


def test_a_check_of_a_partition_says_so_where_a_run_has_none():
    definitions = build_definitions(project())
    job, graph = definitions.resolve_implicit_global_asset_job_def(), definitions.resolve_asset_graph()
    tried = 0
    with dg.DagsterInstance.ephemeral() as instance:
        for key in graph.asset_check_keys:
            if graph.get_check_spec(key) and graph.get(key.asset_key).partitions_def is not None:
                tried += 1
                with pytest.raises(LessAssetsError, match=f"{key.name} looks at one partition(.|\n)*less-assets run"):
                    job.get_subset(asset_selection=set(), asset_check_selection={key}).execute_in_process(
                        instance=instance, raise_on_error=True
                    )
    assert tried >= 7


def test_everything_that_loads_a_model_is_in_the_pool_of_which_one_step_runs_at_a_time():
    recipes = [
        {"name": "exact", "strategy": "less", "fraction": 0.1, "rescore": "exact"},
        {"name": "rds", "strategy": "rds", "fraction": 0.1},
        {"name": "tuned", "strategy": "target_tuned", "fraction": 0.1},
    ]
    assets = build_definitions(project(recipes=recipes)).assets
    pools = {key.to_user_string(): each.op.pool for each in assets for key in each.keys}
    assert {asset for asset, pool in pools.items() if pool == "gpu"} == {
        *(
            "base_model",
            "warmup_checkpoints",
            "train_gradients",
            "target_gradients",
            "influence_scores",
            "exact_scores",
        ),
        *("pool_embeddings", "target_embeddings", "token_attribution", "finetuned_model", "eval_results"),
        *("target_tuned_adapter", "target_tuned_losses"),
    }
    defaults = yaml.safe_load((REPOSITORY / "less_assets/running/dagster.yaml").read_text())
    assert defaults["concurrency"]["pools"] == {"granularity": "op", "default_limit": 1}
