"""What `less-assets check` finds in the data that a project names."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import fsspec  # noqa: F401 - its registry is looked up below
import pytest
from typer.testing import CliRunner

from less_assets.cli import app
from less_assets.method.data.conversations import example_id
from less_assets.project.data_check import check_data, skipped_files, unknown_excluded, unknown_keys_in_words
from less_assets.project.project import load_project

SHARED = Path(__file__).parents[3] / "shared" / "data"
GOOD = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

PROJECT = """\
name: checked
model: {base: owner/model}
pool:
  sources:
    - {name: good, path: good.jsonl}
tasks:
  - name: sums
    examples: {path: targets.jsonl}
    evaluation: {held_out: held-out.jsonl}
recipes:
  - {name: all, strategy: full}
"""


def write_rows(path: Path, *rows: object) -> None:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project whose data are fine."""
    write_rows(tmp_path / "good.jsonl", "not json\n", "\n", GOOD)
    write_rows(tmp_path / "targets.jsonl", GOOD)
    write_rows(tmp_path / "held-out.jsonl", GOOD)
    (tmp_path / "project.yaml").write_text(PROJECT)
    return tmp_path


def problems(folder: Path, old: str = "", new: str = "") -> list[str]:
    assert old in PROJECT
    (folder / "project.yaml").write_text(PROJECT.replace(old, new) if old else PROJECT)
    return [str(problem) for problem in check_data(load_project(folder / "project.yaml"))]


def test_usable_data_have_no_problems_and_stay_as_they_are(folder: Path):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert problems(folder) == []
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_all_problems_are_told_at_once_each_with_its_place_and_what_to_do(folder: Path):
    for name in ("good.jsonl", "targets.jsonl", "held-out.jsonl"):
        (folder / name).unlink()
    told = problems(folder, "owner/model", "./no-model")
    places = ["model.base", "source good (good.jsonl)", "task sums, examples (targets.jsonl)"]
    assert [each.startswith(place) for each, place in zip(told, places, strict=False)] == [True] * 3
    assert told[3].startswith("task sums, evaluation (held-out.jsonl)")
    assert all("to do:" in each for each in told)


def test_a_source_without_a_usable_row_says_why(folder: Path):
    write_rows(folder / "good.jsonl", "{]\n", {"messages": []}, {"text": "?"})
    (told,) = problems(folder)
    assert "no usable example in the first 256 rows" in told
    assert "invalid_json: 1" in told


def test_a_source_in_another_format_than_stated_is_told(folder: Path):
    (told,) = problems(folder, "path: good.jsonl", "path: good.jsonl, format: alpaca")
    assert "missing_field: 1" in told
    assert "check the files and the source's `format`" in told


def test_only_the_rows_that_will_be_used_count(folder: Path):
    (told,) = problems(folder, "path: good.jsonl", "path: good.jsonl, limit: 2")
    assert "no usable example in the first 2 rows" in told


def test_a_pattern_is_good_if_one_of_its_files_has_a_good_row(folder: Path):
    (folder / "pool").mkdir()
    write_rows(folder / "pool" / "a.jsonl", "not json\n")
    write_rows(folder / "pool" / "b.jsonl", GOOD)
    assert problems(folder, "good.jsonl", "pool/*.jsonl") == []


def test_files_that_are_not_read_are_named(folder: Path):
    (folder / "pool").mkdir()
    write_rows(folder / "pool" / "a.jsonl", GOOD)
    for name in ("README.md", "dataset_info.json", "notes.txt"):
        (folder / "pool" / name).write_text("{}")
    assert problems(folder, "good.jsonl", "pool") == []
    loaded = load_project(folder / "project.yaml")
    assert skipped_files(loaded) == ["source good: not read: README.md, dataset_info.json, notes.txt"]


def test_the_dialect_of_the_project_file_is_the_one_that_is_read(folder: Path):
    (folder / "rows.csv").write_text('prompt;completion\n"2, 2?";4\n')
    assert "no usable example" in problems(folder, "path: good.jsonl", "path: rows.csv")[0]
    assert problems(folder, "path: good.jsonl", "path: rows.csv, dialect: semicolon") == []


def test_an_unreadable_file_is_told_although_another_one_is_good(folder: Path):
    (folder / "pool").mkdir()
    write_rows(folder / "pool" / "a.jsonl", GOOD)
    (folder / "pool" / "b.parquet").write_bytes(b"PAR1 this is none")
    (told,) = problems(folder, "good.jsonl", "pool/*")
    assert "b.parquet" in told


def test_a_task_without_examples_is_told(folder: Path):
    write_rows(folder / "targets.jsonl")
    (told,) = problems(folder)
    assert told.startswith("task sums, examples")


@pytest.mark.parametrize(
    ("base", "what"),
    [
        ("gguf:no_such_package/a.gguf", "the Python package 'no_such_package' is not installed"),
        ("gguf:less_assets/a.gguf", "the package 'less_assets' has no file 'a.gguf'"),
        ("./absent", "there is no folder"),
        (".", "has no config.json and no tokenizer_config.json"),
    ],
)
def test_a_base_model_that_is_not_on_this_machine_is_told(folder: Path, base: str, what: str):
    (told,) = problems(folder, "owner/model", base)
    assert told.startswith("model.base")
    assert what in told


def test_the_model_of_a_recipe_is_looked_at_too(folder: Path):
    (told,) = problems(folder, "strategy: full", "strategy: full, model: ./absent")
    assert told.startswith("recipe all")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_a_model_with_an_adapter_beside_its_weights_is_told_before_anything_is_computed(folder: Path, name: str):
    model = folder / "adapted"
    model.mkdir()
    for file in ("config.json", "tokenizer_config.json", name):
        (model / file).write_text("{}")
    for old, new in (("owner/model", "./adapted"), ("strategy: full", "strategy: full, model: ./adapted")):
        (told,) = problems(folder, old, new)
        assert name in told
        assert "merge_and_unload" in told
    (model / name).unlink()
    assert problems(folder, "strategy: full", "strategy: full, model: ./adapted") == []


def test_imported_checkpoints_and_harness_files_must_exist(folder: Path):
    told = problems(
        folder, "evaluation: {held_out: held-out.jsonl}", "evaluation: {harness: task.yaml}\nwarmup: {import: [run/5]}"
    )
    assert [each.partition(":")[0] for each in told] == ["warmup.import (run/5)", "task sums, evaluation (task.yaml)"]


def test_a_file_system_whose_package_is_missing_is_a_problem_and_no_crash(folder: Path):
    (told,) = problems(folder, "good.jsonl", "nosuchprotocol://bucket/x.jsonl")
    assert told.startswith("source good (nosuchprotocol://bucket/x.jsonl)")


def test_a_missing_package_of_the_storage_is_told_before_anything_is_computed(folder: Path, monkeypatch):
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "gs", raising=False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # importing it fails, as if it were not installed
    (told,) = problems(folder, "name: checked", "name: checked\nstorage: {root: gs://bucket/prefix}")
    assert told.startswith("storage.root")
    assert "pip install gcsfs" in told


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not on this machine")
def test_the_real_data_in_lesss_own_formats_are_usable(tmp_path: Path):
    tasks = {
        "bbh": ("bbh/bbh-three-shot.json", "bbh/test"),
        "mmlu": ("mmlu", "mmlu"),
        "tydiqa": ("tydiqa/tydiqa-one-shot.json", "tydiqa/dev"),
        "gsm8k": ("gsm8k/cot-8-shot.json", "gsm8k/test.jsonl"),
    }
    lines = ["name: real", "model: {base: owner/model}", "pool:", "  sources:"]
    pool = sorted((SHARED / "pool").glob("*.jsonl"))
    lines += [*(f"    - {{name: {file.stem}, path: '{file}', limit: 100}}" for file in pool), "tasks:"]
    for name, (examples, test) in tasks.items():
        lines += [
            f"  - name: {name}",
            f"    examples: {{format: {name}, path: '{SHARED / 'tasks' / examples}'}}",
            f"    evaluation: {{format: {name}, path: '{SHARED / 'tasks' / test}', limit: 5}}",
        ]
    lines += ["recipes:", "  - {name: less, strategy: less, fraction: 0.05}"]
    (tmp_path / "real.yaml").write_text("\n".join(lines))
    assert check_data(load_project(tmp_path / "real.yaml")) == []


def test_keys_that_are_not_used_are_counted_by_source(folder: Path):
    write_rows(
        folder / "good.jsonl", GOOD, {**GOOD, "mood": "glad", "id": 1}, {**GOOD, "mood": "sad", "shape": "round"}
    )
    unknown: dict[str, Counter[str]] = {}
    assert check_data(load_project(folder / "project.yaml"), unknown) == []
    assert unknown == {"good": {"mood": 2, "shape": 1}}
    (line,) = unknown_keys_in_words(unknown)
    assert "source good" in line
    assert "in the rows looked at" in line
    assert "mood (2), shape (1)" in line
    many = Counter({f"key{number}": 1 for number in range(12)})
    assert unknown_keys_in_words({"a": many, "b": Counter()})[0].endswith("key9 (1) and 2 more")
    result = CliRunner().invoke(app, ["check", "--project", str(folder / "project.yaml")])
    assert result.exit_code == 0, result.output
    assert line in result.output


def test_more_folds_than_target_examples_are_told(folder: Path):
    (told,) = problems(folder, "    evaluation: {", "    validation: {folds: 2}\n    evaluation: {")
    assert told.startswith("task sums, validation (targets.jsonl)")
    assert "1 target examples for 2 folds" in told


def test_missing_files_of_validation_examples_and_of_scores_are_told(folder: Path):
    (told,) = problems(folder, "    evaluation: {", "    validation: {path: none.jsonl}\n    evaluation: {")
    assert told.startswith("task sums, validation (none.jsonl)")
    (told,) = problems(folder, "strategy: full", "strategy: external, rows: 1, scores: none.csv")
    assert told.startswith("recipe all, scores (none.csv)")
    assert "to do:" in told


def test_rows_to_leave_out_are_looked_up_and_a_bad_line_is_named(folder: Path):
    known = example_id(GOOD["messages"])
    write_rows(folder / "out.jsonl", {"example_id": known, "reason": "wrong"}, "\n", {"example_id": "0" * 32})
    excluding = ("name: checked\n", "name: checked\nexclude: [out.jsonl]\n")
    assert problems(folder, *excluding) == []
    loaded = load_project(folder / "project.yaml")
    assert unknown_excluded(loaded) == [f"exclude: the pool has no usable row with 1 of the 2 ids: {'0' * 32}"]
    write_rows(folder / "out.jsonl", {"example_id": known})
    assert unknown_excluded(loaded) == []
    bad = {
        "broken\n": "is no JSON object",
        "{}\n": "names no example_id",
        f'{{"example_id": "{known}", "reason": 3}}\n': "no text",
    }
    for line, said in bad.items():
        write_rows(folder / "out.jsonl", {"example_id": known}, line)
        (problem,) = problems(folder, *excluding)
        assert said in problem
        assert "out.jsonl:2" in problem
    (folder / "out.jsonl").unlink()
    (problem,) = problems(folder, *excluding)
    assert "exclude (out.jsonl)" in problem


def imported(folder: Path, rates: list[float], more: str = "", *, epoch: float = 1.0) -> Path:
    """A checkpoint from elsewhere that logged these rates in an epoch of 40 steps, imported by the project."""
    checkpoint = folder / "run/checkpoint-40"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "adapter_config.json").write_text("{}")
    logged = [{"step": 40, "epoch": epoch, "learning_rate": rate} for rate in rates]
    state = {"global_step": 40, "epoch": epoch, "log_history": logged}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (folder / "project.yaml").write_text(PROJECT + "warmup: {import: [run/checkpoint-40]" + more + "}\n")
    return folder / "project.yaml"


@pytest.mark.parametrize(
    ("rates", "what"), [([0.0] * 40, "is 0, the mean of 40 logged steps"), ([], "not known"), ([-1e-5], "is -1e-05")]
)
def test_an_imported_checkpoint_without_weight_is_told_before_anything_is_computed(folder: Path, rates, what: str):
    (told,) = map(str, check_data(load_project(imported(folder, rates))))
    assert told.startswith("warmup.import (run/checkpoint-40)")
    assert what in told
    assert "warmup.mean_learning_rates" in told
    run = CliRunner().invoke(app, ["run", "--project", str(folder / "project.yaml")])
    assert run.exit_code == 1
    assert what in run.stderr
    assert check_data(load_project(imported(folder, rates, ", mean_learning_rates: [0.0001]"))) == []


@pytest.mark.parametrize(("logged", "told"), [(2, True), (10, False)])
def test_check_tells_of_rates_that_few_logged_steps_stand_for(folder: Path, logged: int, told: bool):
    project = imported(folder, [1e-5] * logged)
    checked = CliRunner().invoke(app, ["check", "--project", str(project)])
    assert checked.exit_code == 0, checked.output
    assert (f"{logged} logged steps of about 40" in checked.stdout) == told
    imported(folder, [1e-5] * logged, ", mean_learning_rates: [0.0001]")
    assert "logged steps" not in CliRunner().invoke(app, ["check", "--project", str(project)]).stdout


def test_a_damaged_trainer_state_is_a_problem_and_no_crash(folder: Path):
    project = imported(folder, [1e-5])
    (folder / "run/checkpoint-40/trainer_state.json").write_text('{"epoch": ')
    (told,) = map(str, check_data(load_project(project)))
    assert "damaged" in told


def test_check_names_both_sizes_where_a_pad_token_was_added_to_the_tokenizer_alone(folder: Path, tiny_model: Path):
    from transformers import AutoTokenizer

    model = Path(shutil.copytree(tiny_model, folder / "model"))
    embeddings = json.loads((model / "config.json").read_text())["vocab_size"]
    (folder / "project.yaml").write_text(PROJECT.replace("owner/model", "./model"))
    assert CliRunner().invoke(app, ["check", "--project", str(folder / "project.yaml")]).exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(model)
    checked = CliRunner().invoke(app, ["check", "--project", str(folder / "project.yaml")])
    assert checked.exit_code == 1
    assert f"{embeddings + 1} tokens, but the model only {embeddings} embeddings" in checked.stdout
    assert "[PAD]" in checked.stdout
