"""The command: what it says, what it returns, and that a user's mistake costs one clear message and no computing."""

import contextlib
import errno
import io
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES
from support.graph import replaced
from support.tiny import write_rows
from typer.testing import CliRunner

from less_assets.cli import app
from less_assets.errors import LessAssetsError
from less_assets.running.terminal import print_event
from less_assets.steps.selection import select_subset


class Command:
    """Runs `less-assets` in this process, over one project and one DAGSTER_HOME."""

    def __init__(self, project) -> None:
        self.project = project

    def __call__(self, name: str, *arguments: str):
        result = CliRunner().invoke(app, [name, "--project", str(self.project.path), *arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception  # the user would have seen a traceback
        return result

    def fails(self, name: str, *arguments: str) -> str:
        """What it says when it refuses; it must have written nothing but its own records."""
        result = self(name, *arguments)
        assert result.exit_code == 1, result.output
        assert "Traceback" not in result.output
        assert not list((self.project.folder / "artifacts").rglob("manifest.json"))
        return result.output


@pytest.fixture
def command(tiny_project, tmp_path, monkeypatch) -> Command:
    home = tmp_path / "dagster"
    home.mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    return Command(tiny_project)


def help_of(*arguments: str) -> str:
    """What it prints, however it breaks lines."""
    return " ".join(CliRunner().invoke(app, list(arguments)).output.split())


def test_help_teaches_the_usual_order_and_where_things_are():
    shown = help_of("--help")
    for word in ("check", "plan", "run", "gc", "LESS_PROJECT", "DAGSTER_HOME", "--project"):
        assert word in shown
    assert shown.index("`check`") < shown.index("`plan`") < shown.index("`run`")


@pytest.mark.parametrize("name", ["check", "plan", "run", "gc"])
def test_every_command_says_in_its_help_what_it_changes(name):
    shown = help_of(name, "--help")
    assert re.search("Changes nothing|Computes nothing|what is done stays done|nothing current refers to", shown)
    assert "--project" in shown
    assert "LESS_PROJECT" in shown


def test_without_a_command_it_shows_the_help():
    assert "Typical use" in help_of()


def test_the_version_is_that_of_the_installed_package_and_needs_no_project():
    assert re.fullmatch(r"less-assets \d+\.\d+\.\d+", help_of("--version"))


def test_help_offers_shell_completion():
    assert "--install-completion" in help_of("--help")


def test_help_is_there_at_once_without_heavy_imports(tmp_path):
    code = (
        "import sys; from less_assets.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'dagster', 'transformers', 'polars') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_check_of_a_good_project_counts_what_it_has_and_changes_nothing(command):
    before = set(command.project.folder.rglob("*"))
    shown = command("check")
    assert shown.exit_code == 0
    assert "2 sources, 2 tasks, 4 recipes, 2 checkpoints" in shown.output
    assert set(command.project.folder.rglob("*")) - before == {command.project.folder / "project.yaml"}


@pytest.mark.parametrize("name", ["check", "plan", "run"])
def test_a_misspelt_key_is_named_with_its_line_and_the_nearest_valid_one(command, name):
    command.project.settings["warmup"]["lerning_rate"] = 1e-3
    shown = command.fails(name)
    assert "lerning_rate" in shown
    assert "learning_rate" in shown
    assert re.search(r"project\.yaml:\d+", shown)


@pytest.mark.parametrize("name", ["check", "plan", "run"])
@pytest.mark.parametrize("fraction", [0, 2])
def test_a_fraction_of_nothing_or_of_more_than_all_is_refused(command, name, fraction):
    command.project.settings["recipes"][0]["fraction"] = fraction
    assert "fraction" in command.fails(name)


@pytest.mark.parametrize("name", ["check", "plan", "run"])
def test_a_missing_pool_file_is_named(command, name):
    command.project.settings["pool"]["sources"][0]["path"] = "data/minus.jsonl"
    assert "minus.jsonl" in command.fails(name)


@pytest.mark.parametrize("name", ["check", "plan", "run"])
def test_a_missing_target_file_is_named_before_anything_is_computed(command, name):
    (command.project.folder / "targets/sky.jsonl").unlink()
    assert "sky.jsonl" in command.fails(name)


@pytest.mark.parametrize("name", ["check", "run"])
def test_a_task_without_examples_is_named_before_anything_is_computed(command, name):
    write_rows(command.project.folder / "targets/sky.jsonl", [])
    assert "sky" in command.fails(name)


@pytest.mark.parametrize("name", ["check", "run"])
def test_a_missing_held_out_file_is_named_before_anything_is_computed(command, name):
    (command.project.folder / "held_out/sums.jsonl").unlink()
    assert "held_out/sums.jsonl" in command.fails(name)


def test_check_reports_all_problems_at_once(command):
    (command.project.folder / "held_out/sums.jsonl").unlink()
    (command.project.folder / "targets/sky.jsonl").unlink()
    command.project.settings["model"]["base"] = "./nowhere"
    shown = command.fails("check")
    assert "3 problems found; nothing was computed." in shown


def test_a_project_file_that_is_not_there_is_named(tmp_path):
    shown = CliRunner().invoke(app, ["check", "--project", str(tmp_path / "none.yaml")])
    assert shown.exit_code == 1
    assert "none.yaml" in shown.output
    assert isinstance(shown.exception, SystemExit)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--task", "smus"], "sums"),
        (["--recipe", "random"], "random-seed0"),
        (["--until", "subset"], "selected_subset"),
    ],
)
@pytest.mark.parametrize("name", ["plan", "run"])
def test_an_unknown_name_is_answered_with_valid_ones(command, name, arguments, named):
    shown = command.fails(name, *arguments)
    assert arguments[1] in shown
    assert named in shown


def test_plan_counts_what_run_would_make_and_says_why(command):
    shown = command("plan").output
    (line,) = [line for line in shown.splitlines() if line.startswith("train_gradients")]
    assert line.split()[:3] == ["train_gradients", "0", "8"]
    (line,) = [line for line in shown.splitlines() if line.startswith("base_model")]
    assert "never made" in line
    assert "artifacts to make; `less-assets run` makes them" in shown
    assert not list((command.project.folder / "artifacts").rglob("manifest.json"))


def test_plan_of_one_recipe_leaves_out_what_it_does_not_need(command):
    shown = command("plan", "--recipe", "random-seed0").output
    assert "selected_subset" in shown
    assert "gradients" not in shown


def test_run_again_computes_nothing_then_plan_tells_what_a_change_costs(command):
    first = command("run", "--until", "pool_index")
    assert first.exit_code == 0
    assert re.search(r"10 artifacts made, 0 were fresh", first.output)
    second = command("run", "--until", "pool_index")
    assert "nothing was computed" in second.output
    assert re.search(r"0 artifacts made, 10 were fresh", second.output)

    rows = (command.project.folder / "data/colors.jsonl").read_text().splitlines(keepends=True)
    (command.project.folder / "data/colors.jsonl").write_text("".join(rows[:-1]))
    shown = command("plan", "--until", "pool_index").output
    (line,) = [line for line in shown.splitlines() if line.startswith("instruction_pool")]
    assert line.split()[:3] == ["instruction_pool", "3", "1"]
    assert "1 stale: files has changed" in line


def events(output: str) -> list[dict]:
    """What `--json` printed; every line must be an event."""
    return [json.loads(line) for line in output.splitlines()]


def test_a_program_can_follow_a_run_to_the_path_of_each_subset(command):
    command.project.settings["recipes"].append({"name": "short", "strategy": "random", "rows": 3})
    shown = command("run", "--json", "--until", "selected_subset", "--recipe", "short-seed0", "--task", "sums")
    told = events(shown.stdout)
    kinds = [event["event"] for event in told]
    assert kinds[-1] == "finished"
    assert told[-1]["fresh"] == 0
    made = [(event["asset"], key) for event in told if event["event"] == "made" for key in event["partitions"] or [""]]
    assert len(made) == len(set(made)) == told[-1]["made"]
    counts = {"rows": 44, "usable": 44, "quarantined": 0, "refused": 0, "reasons": []}
    (pool,) = [event for event in told if event["event"] == "pool"]
    assert {name: pool[name] for name in counts} == counts
    assert told[-1]["pool"] == counts
    assert kinds.index("pool") < kinds.index("subset"), "told before anything is drawn"
    started = [event for event in told if event["event"] == "asset_started"]
    assert all(event["stage"] <= event["stages"] for event in started)
    assert [event["stage"] for event in started] == sorted(event["stage"] for event in started)
    (subset,) = [event for event in told if event["event"] == "subset"]
    assert (subset["recipe"], subset["task"]) == ("short-seed0", "sums")
    assert len(Path(subset["path"]).read_text().splitlines()) == 3
    again = events(command("run", "--json", "--until", "selected_subset", "--recipe", "short-seed0").stdout)
    assert [event["event"] for event in again if event["event"] in ("made", "subset")] == ["subset", "made"], "sky's"


def test_the_path_of_a_subset_is_told_before_the_next_one_is_made(command, monkeypatch):
    command.project.settings["recipes"] = [
        {"name": name, "strategy": "random", "rows": rows} for name, rows in (("few", 3), ("more", 5), ("most", 7))
    ]
    there = []

    def tell(events, kind, values):
        if kind == "subset":
            assert Path(values["path"]).is_file()
            there.append(len(list((command.project.folder / "artifacts/selection").rglob("subset.jsonl"))))

    monkeypatch.setattr("less_assets.running.watch.JsonEvents.tell", tell)
    assert command("run", "--json", "--until", "selected_subset").exit_code == 0
    assert there == [1, 2, 3, 4, 5, 6], "all of them are made in one run of Dagster"


def test_the_path_of_a_subset_is_told_though_another_one_fails(command, monkeypatch):
    command.project.settings["recipes"] = [{"name": "few", "strategy": "random", "rows": 3}]

    def compute(work):
        if work.partition == "few-seed0|sky":
            raise LessAssetsError("no luck")
        return select_subset(work)

    replaced(monkeypatch, "selected_subset", compute=compute)
    shown = command("run", "--json", "--until", "selected_subset")
    assert shown.exit_code == 1
    told = events(shown.stdout)
    assert [event["task"] for event in told if event["event"] == "subset"] == ["sums"]
    assert told[-1]["event"] == "error"


def test_an_error_is_an_event_for_programs(command):
    told = events(command("run", "--json", "--task", "smus").stdout)
    assert [event["event"] for event in told] == ["error"]
    assert "sums" in told[0]["fix"] + told[0]["what"]
    assert told[0]["time"] > 1.7e9, "as every event has it"


@pytest.mark.parametrize("arguments", [("plan", "--task", "smus"), ("explain", "sums", "none"), ("trace", "none")])
def test_whatever_fails_with_json_says_so_in_json(command, arguments):
    shown = command(*arguments, "--json")
    (told,) = events(shown.stdout)
    assert shown.exit_code == 1
    assert told["event"] == "error"
    assert told["what"]


def test_a_full_disk_is_an_event_for_programs(command, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("less_assets.running.runner.register_shards", full)
    shown = command("run", "--json")
    assert shown.exit_code == 1
    assert events(shown.stdout)[-1]["event"] == "error"
    assert "No space left" in events(shown.stdout)[-1]["what"]


def test_a_reader_that_has_seen_enough_is_no_error(command):
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [sys.executable, "-m", "less_assets.cli", "check", "--json", "-p", str(command.project.path)]
    done = subprocess.run(arguments, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_terminal_without_our_characters_gets_the_result_all_the_same(command):
    arguments = [
        sys.executable,
        "-m",
        "less_assets.cli",
        "run",
        "--until",
        "pool_index",
        "-p",
        str(command.project.path),
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "TASK/recipes/RECIPE/\\u2026/subset.jsonl" in done.stdout


def test_a_name_that_is_no_utf_8_does_not_break_json(capsys):
    print_event("error", {"what": "bad\udcff.jsonl"})
    assert json.loads(capsys.readouterr().out)["what"] == "bad\udcff.jsonl"


def test_json_is_json_where_the_encoding_lacks_a_character():
    written = io.BytesIO()
    output = io.TextIOWrapper(written, encoding="ascii", errors="backslashreplace")
    print_event("error", {"what": "Ünï"}, output)
    assert json.loads(written.getvalue())["what"] == "Ünï"


def test_quiet_is_silent_until_the_end(command):
    shown = command("run", "--quiet", "--until", "pool_index")
    assert shown.stderr == ""
    assert "10 artifacts made" in shown.stdout


def test_check_and_plan_answer_programs(command):
    answer = json.loads(command("check", "--json").stdout)
    assert (answer["project"], answer["usable"], answer["problems"]) == ("tiny", True, [])
    planned = json.loads(command("plan", "--json", "--no-calibrate").stdout)
    by_name = {asset["asset"]: asset for asset in planned["assets"]}
    assert len(by_name["train_gradients"]["to_make"]) == 8
    assert "train_gradients" in planned["speeds_not_known"]
    (command.project.folder / "targets/sky.jsonl").unlink()
    refused = command("check", "--json")
    assert refused.exit_code == 1
    (problem,) = json.loads(refused.stdout)["problems"]
    assert "sky.jsonl" in problem["where"] + problem["what"]


def test_check_tells_programs_what_is_wrong_with_the_project_file_itself(command, tmp_path):
    command.project.settings["warmup"]["lerning_rate"] = 1e-3
    del command.project.settings["tasks"]
    refused = command("check", "--json")
    assert refused.exit_code == 1
    answer = json.loads(refused.stdout)
    assert (answer["usable"], answer["project"]) == (False, None)
    assert len(answer["problems"]) == 2
    (misspelt,) = [problem for problem in answer["problems"] if "lerning_rate" in problem["what"]]
    assert re.search(r"project\.yaml:\d+$", misspelt["where"])
    assert "learning_rate" in misspelt["fix"]
    missing = CliRunner().invoke(app, ["check", "--json", "--project", str(tmp_path / "none.yaml")])
    assert "none.yaml" in json.loads(missing.stdout)["problems"][0]["where"]


def test_in_a_terminal_a_run_has_one_block_and_leaves_the_result(command):
    parent, child = pty.openpty()
    arguments = [sys.executable, "-m", "less_assets.cli", "run", "-p", str(command.project.path)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    with subprocess.Popen(
        [*arguments, "--until", "warmup_sample"], stderr=child, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        os.close(child)
        seen = b""
        with contextlib.suppress(OSError):  # the terminal's end
            while data := os.read(parent, 65536):
                seen += data
        result = process.stdout.read()
    os.close(parent)
    assert process.returncode == 0, seen
    assert re.search(rb"stage \d+ of 5", seen), seen
    assert b"ready: " in seen
    assert "artifacts made, 0 were fresh" in result


def test_gc_lists_first_and_removes_only_what_nothing_refers_to(command):
    command("run", "--until", "instruction_pool")
    assert command("gc", "--dry-run").output.startswith("0 artifacts")
    rows = (command.project.folder / "data/colors.jsonl").read_text().splitlines(keepends=True)
    (command.project.folder / "data/colors.jsonl").write_text("".join(rows[:-1]))
    command("run", "--until", "instruction_pool")
    artifacts = command.project.folder / "artifacts"
    before = set(artifacts.rglob("manifest.json"))
    listed = command("gc", "--dry-run")
    assert "pool/colors-00001/" in listed.output
    assert "1 artifact, " in listed.output
    assert "would be removed" in listed.output
    assert set(artifacts.rglob("manifest.json")) == before
    assert "were removed" in command("gc").output
    assert len(before - set(artifacts.rglob("manifest.json"))) == 1
    assert "nothing was computed" in command("run", "--until", "instruction_pool").output


def test_a_damaged_artifact_is_made_again(command):
    command("run", "--until", "instruction_pool")
    (manifest,) = (command.project.folder / "artifacts/pool/plus-00000").rglob("manifest.json")
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:-40])
    shown = command("run", "--until", "instruction_pool")
    assert "1 artifact made" in shown.output
    assert manifest.read_bytes() == whole


def test_a_run_that_stops_says_what_is_kept_and_how_to_go_on(command, monkeypatch):
    from less_assets.errors import StorageError

    def full(*_):
        raise StorageError("Cannot write: the disk is full", fix="Check free space")

    replaced(monkeypatch, "pool_index", compute=full)
    result = command("run", "--until", "pool_index")
    assert result.exit_code == 1
    assert "what is finished is kept, the same command goes on from there" in result.output
    assert "error: Cannot write: the disk is full" in result.output
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_run_interrupted_in_a_step_says_how_to_go_on_and_closes_its_records(command, monkeypatch, name):
    def interrupted(work):
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(20)
        raise AssertionError("the signal was lost")

    replaced(monkeypatch, "pool_index", compute=interrupted)
    handler = signal.getsignal(signal.SIGTERM)
    result = command("run", "--until", "pool_index")
    assert result.exit_code == 130
    assert "interrupted; what is finished is kept, the same command goes on from there" in result.output
    assert "Traceback" not in result.output
    with dg.DagsterInstance.from_config(os.environ["DAGSTER_HOME"]) as instance:
        assert instance.get_runs(dg.RunsFilter(statuses=NOT_FINISHED_STATUSES)) == []
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == handler, "it is no business of whoever called"


def test_an_interrupt_between_two_steps_is_not_lost(command, monkeypatch):
    handle = dg.DagsterInstance.handle_new_event
    ended = []

    def interrupted(self, event, **more):
        handle(self, event, **more)
        if event.is_dagster_event and event.dagster_event.event_type == dg.DagsterEventType.RUN_SUCCESS:
            ended.append(event.run_id)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(dg.DagsterInstance, "handle_new_event", interrupted)
    result = command("run", "--until", "pool_index")
    assert result.exit_code == 130
    assert "interrupted; what is finished is kept" in result.output
    assert len(ended) == 1, "Dagster catches an interrupt at the end of a run, and forgets it"


def test_the_installed_command_works_from_another_folder(command, tmp_path):
    script = shutil.which("less-assets", path=os.path.dirname(sys.executable))
    if script is None:
        pytest.skip("the package is not installed beside this Python")
    done = subprocess.run(
        [script, "check"],
        cwd=tmp_path,
        env={**os.environ, "LESS_PROJECT": str(command.project.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "usable" in done.stdout
    assert done.stderr == ""


def test_init_names_the_next_commands_so_that_they_can_be_pasted(command, tiny_model, tmp_path):
    folder = command.project.folder
    given = ["init", "--pool", str(folder / "data/plus.jsonl"), "--model", str(tiny_model)]
    given += ["--examples", str(folder / "targets/sums.jsonl"), "-o", str(tmp_path / "my project.yaml")]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    (said,) = [line for line in done.output.splitlines() if line.startswith("next: ")]
    words = shlex.split(said.replace("(", "").replace(")", ""))
    assert words.count(str(tmp_path / "my project.yaml")) == 2
