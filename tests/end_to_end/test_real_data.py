"""The real pool and the paper's four tasks in LESS's own formats, from `check` to the leaderboard, on a tiny model."""

from pathlib import Path

import dagster as dg
import pytest
from support.graph import run

from less_assets.method.evaluation.leaderboard import of_number
from less_assets.project.data_check import check_data
from less_assets.project.project import load_project
from less_assets.reading.files import BOARD, SUBSET
from less_assets.steps.registry import open_lineage, open_store
from less_assets.store.tables import read_parquet

DATA = Path(__file__).parents[3] / "shared" / "data"
EXAMPLES = {"bbh": "bbh-three-shot.json", "mmlu": "dev", "tydiqa": "tydiqa-one-shot.json", "gsm8k": "cot-8-shot.json"}
TESTS = {"bbh": "test", "mmlu": "test", "tydiqa": "dev", "gsm8k": "test.jsonl"}


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here")
def test_real_pool_and_the_papers_tasks_run_end_to_end(tiny_project):
    sources = sorted(path.stem for path in (DATA / "pool").glob("*.jsonl"))
    tiny_project.settings["model"]["max_length"] = 192
    tiny_project.settings["pool"] = {
        "shard_size": 64,
        "sources": [{"name": name, "path": str(DATA / f"pool/{name}.jsonl"), "limit": 100} for name in sources],
    }
    tiny_project.settings["warmup"] |= {"fraction": 0.05, "batch_size": 8}
    tiny_project.settings["tasks"] = [
        {
            "name": task,
            "examples": {"format": task, "path": str(DATA / "tasks" / task / path)},
            "evaluation": {
                "format": task,
                "path": str(DATA / "tasks" / task / TESTS[task]),
                "limit": 1,
                "max_new_tokens": 2,
            },
        }
        for task, path in EXAMPLES.items()
    ]
    tiny_project.settings["recipes"] = [
        {"name": "less", "strategy": "less", "fraction": 0.05},
        {"name": "random", "strategy": "random", "fraction": 0.05},
    ]
    project = load_project(tiny_project.path)
    assert check_data(project) == []
    with dg.DagsterInstance.ephemeral() as instance:
        run(tiny_project.path, instance)

    lineage = open_lineage(project, open_store(project))
    pool = lineage.summary("pool_index")
    assert pool["usable"] + pool["refused"] == 600
    # Prompts that leave no room for an answer are refused before anything is drawn; so short a limit meets some.
    reasons = [lineage.summary("refused_rows", shard)["reasons"] for shard in pool["shards"]]
    assert {reason for shard in reasons for reason in shard} == {"prompt_too_long"}
    assert 0 < pool["refused"] < 60
    subtasks = {task: len(lineage.summary("influence_scores", task)["subtasks"]) for task in EXAMPLES}
    assert subtasks == {"bbh": 27, "mmlu": 57, "tydiqa": 9, "gsm8k": 1}
    assert {task: lineage.summary("target_examples", task)["examples"] for task in EXAMPLES} == {
        "bbh": 81,
        "mmlu": 285,
        "tydiqa": 9,
        "gsm8k": 8,
    }
    for task in EXAMPLES:
        subset = read_parquet(lineage.folder("selected_subset", f"less|{task}"), SUBSET)
        assert subset.height == int(0.05 * pool["unique"])
        assert subset["example_id"].n_unique() == subset.height
        assert subset["messages"].null_count() == 0
    board = read_parquet(lineage.folder("leaderboard"), BOARD)
    assert of_number(board, "answer_loss").height == 2 * len(EXAMPLES)
