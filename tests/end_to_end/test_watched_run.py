"""What a person asks of a run and reads at its end: without extras, with them later, one task's table, warnings."""

import dagster as dg
from support.graph import replaced
from typer.testing import CliRunner

from less_assets.cli import app
from less_assets.project.project import load_project
from less_assets.reading.certificates import lacks_certificate
from less_assets.steps.asset import Check
from less_assets.steps.registry import ASSETS, open_lineage, open_store
from less_assets.steps.shown import Verdict

EXTRAS = ("token_attribution", "selection_report")


def test_extras_are_left_out_and_made_later_and_warnings_and_the_tasks_table_stand_at_the_end(
    tiny_project, monkeypatch
):
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    for asset in ("pool_index", "instruction_pool"):
        warns = Check("odd", "Nothing is odd.", lambda lineage, key, models, log: Verdict(False, f"odd: [{key}]", {}))
        replaced(monkeypatch, asset, checks=(*ASSETS[asset].checks, warns))
    tiny_project.settings["gradients"]["certificate_rows"] = 8
    tiny_project.settings["recipes"] = [
        {"name": "less", "strategy": "less", "fraction": 0.2},
        {"name": "base", "strategy": "none"},
    ]
    path = tiny_project.path

    def command(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["run", "--project", str(path), "--task", "sky", *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    def status(asset: str, key: str) -> str:
        project = load_project(path)
        return open_lineage(project, open_store(project)).status(asset, key).state

    def certified() -> bool:
        project = load_project(path)
        return not lacks_certificate(open_lineage(project, open_store(project)), "sky")

    said = command("--no-extras")
    assert status("task_results", "sky") == "fresh"
    assert [status(asset, "less|sky") for asset in EXTRAS] == ["missing", "blocked"]
    assert not certified()
    assert "Answer loss" in said
    assert "Share of each source among the rows selected for sky" in said
    assert "sums" not in said
    warned = said.partition("Worth a look\n")[2].splitlines()
    assert [line.split() for line in warned if "odd" in line] == [
        *(["instruction_pool", key, "odd", "odd:", f"[{key}]"] for key in shards("plus", "colors")),
        ["pool_index", "odd", "odd:", "[]"],
    ]
    trained = status("finetuned_model", "less|sky")

    planned = CliRunner().invoke(app, ["plan", "--project", str(path), "--task", "sky", "--no-extras"]).stdout
    assert "nothing to do" in planned
    planned = CliRunner().invoke(app, ["plan", "--project", str(path), "--task", "sky"]).stdout
    assert "3 artifacts to make" in planned
    assert planned.index("certificates ") < planned.index("token_attribution ")
    said = command()
    assert [status(asset, "less|sky") for asset in EXTRAS] == ["fresh", "fresh"]
    assert certified()
    assert "3 artifacts made" in said, "extras cost nothing of what is there"
    assert trained == "fresh"
    assert "odd: [" not in said, "what was not made is not judged again"
    with dg.DagsterInstance.from_config(str(tiny_project.folder / "artifacts/.dagster")) as instance:
        assert len(instance.get_runs()) > 3


def shards(*sources: str) -> list[str]:
    """The two shards of each source."""
    return [f"{source}-0000{number}" for source in sources for number in (0, 1)]
