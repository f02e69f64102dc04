"""Dagster's event log that stays open during a run of the command line: same files, same content."""

import contextlib
import os
import sqlite3
from pathlib import Path

import dagster as dg
import yaml

from less_assets.running.runner import open_instance


@dg.asset
def thing(context: dg.AssetExecutionContext) -> None:
    context.log.info("made by run %s", context.run_id)


def open_databases(home: Path) -> set[str]:
    """Files of Dagster's records in a folder that this process holds open."""
    files = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.exists()]
    return {file for file in files if file.endswith(".db") and file.startswith(str(home))}


def test_the_event_log_that_stays_open_is_the_one_that_dagsters_ui_reads(tmp_path):
    with open_instance(tmp_path) as instance:
        runs = [dg.materialize([thing], instance=instance).run_id for _ in range(4)]
        with dg.DagsterInstance.from_config(str(tmp_path)) as page:  # while the other one is open
            said = [[record.user_message for record in page.all_logs(run)] for run in runs]
            assert [f"made by run {run}" in lines for run, lines in zip(runs, said, strict=True)] == [True] * 4
            assert [page.get_run_by_id(run).status for run in runs] == [dg.DagsterRunStatus.SUCCESS] * 4
            found = page.fetch_materializations(dg.AssetKey("thing"), limit=10).records
            assert [record.run_id for record in found] == runs[::-1]
        assert len(open_databases(tmp_path)) <= 2, "the index, and the last run's"
    assert open_databases(tmp_path) == set()
    schemas = []
    for run in runs:
        with contextlib.closing(sqlite3.connect(tmp_path / "history/runs" / f"{run}.db")) as database:
            tables = database.execute("select name, sql from sqlite_master order by name").fetchall()
            revision = database.execute("select * from alembic_version").fetchall()
            journal = database.execute("pragma journal_mode").fetchall()
            schemas.append((tables, revision, journal))
    assert schemas[1:] == schemas[:1] * 3, "a copied database is what Dagster would have made"
    with open_instance(tmp_path) as instance:
        assert dg.materialize([thing], instance=instance).success
        assert len(instance.get_runs()) == 5


def test_a_storage_that_dagster_yaml_names_is_used(tmp_path):
    named = tmp_path / "records"
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump({"storage": {"sqlite": {"base_dir": str(named)}}}))
    with open_instance(tmp_path) as instance:
        run = dg.materialize([thing], instance=instance).run_id
    assert list(named.rglob(f"{run}.db"))
