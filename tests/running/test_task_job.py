"""The job that brings one task up to date: what it needs and no more, from the launchpad's config."""

from typing import Any

import dagster as dg
import pytest
from support.tiny import TinyProject

from less_assets.orchestration.definitions import build_definitions
from less_assets.project.project import load_project
from less_assets.running.task_job import STEP, task_job


def launch(tiny: TinyProject, instance: dg.DagsterInstance, **config: Any) -> dg.ExecuteInProcessResult:
    """Run the job; without config, with what the launchpad is filled with."""
    project = load_project(tiny.path)
    job = task_job(build_definitions(project), project)
    given = {"ops": {STEP: {"config": config}}} if config else None
    return job.execute_in_process(run_config=given, instance=instance, raise_on_error=False)


def materialized(instance: dg.DagsterInstance, asset: str) -> set[str]:
    return set(instance.get_materialized_partitions(dg.AssetKey(asset)))


@pytest.fixture
def instance():
    """Records that last as long as the test."""
    with dg.DagsterInstance.ephemeral() as found:
        yield found


def test_it_makes_what_one_task_needs_and_nothing_twice(tiny_project, instance):
    config = {"task": "sky", "recipes": ["random-seed0"], "until": "selected_subset"}
    result = launch(tiny_project, instance, **config)
    assert result.success
    assert materialized(instance, "selected_subset") == {"random-seed0|sky"}
    assert materialized(instance, "recipe_settings") == {"random-seed0"}
    assert materialized(instance, "train_gradients") == set(), "random rows need none"
    runs = instance.get_runs_count()
    again = launch(tiny_project, instance, **config)
    assert again.success
    assert instance.get_runs_count() == runs + 1, "only the job itself: everything was fresh"


def test_a_task_that_does_not_exist_is_refused_before_anything_runs(tiny_project, instance):
    with pytest.raises(dg.DagsterInvalidConfigError, match="nonsense"):
        launch(tiny_project, instance, task="nonsense")
    assert instance.get_runs_count() == 0


def test_a_failure_is_the_jobs_and_names_what_to_do(tiny_project, instance):
    (tiny_project.folder / "targets/sums.jsonl").write_text("{}\n")
    result = launch(tiny_project, instance, task="sums", until="target_examples")
    assert not result.success
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert "sums.jsonl" in failure.step_failure_data.error.to_string()


def test_the_launchpad_is_filled_with_the_first_task(tiny_project):
    project = load_project(tiny_project.path)
    job = task_job(build_definitions(project), project)
    assert job.run_config == {"ops": {STEP: {"config": {"task": "sums"}}}}
    assert job.description
