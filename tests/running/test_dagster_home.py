"""Dagster's home: inside the project's storage, never another project's, and shared with those who hold it."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time

import dagster as dg
import pytest

from less_assets.errors import StorageError
from less_assets.running import dagster_home
from less_assets.running.dagster_home import OWNER_FILE, opened_records, prepare_home
from less_assets.running.killed_runs import process_name
from less_assets.store.artifacts import ArtifactStore
from less_assets.store.garbage import collect_garbage


@pytest.fixture(autouse=True)
def no_home_is_set(monkeypatch):
    monkeypatch.delenv("DAGSTER_HOME", raising=False)


def test_two_projects_have_records_of_their_own_inside_their_storage(tmp_path):
    for name in ("one", "other"):
        with opened_records("any", ArtifactStore(f"{tmp_path}/{name}")) as instance:
            assert instance.root_directory == str(tmp_path / name / ".dagster")
            assert not instance.telemetry_enabled
            assert instance.get_runs() == []
            instance.add_dynamic_partitions("shard", [name])
            assert instance.get_dynamic_partitions("shard") == [name]


def test_a_bucket_has_its_records_on_this_machine_by_its_address(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    homes = [dagster_home.dagster_home(ArtifactStore(f"memory://{name}")) for name in ("a/x", "b/x", "a/x")]
    assert homes[0] == homes[2] != homes[1]
    assert homes[0].parent == tmp_path / "less-assets"
    assert json.loads((prepare_home("any", ArtifactStore("memory://a/x")) / OWNER_FILE).read_text())[
        "storage"
    ].endswith("a/x")


def test_a_home_that_is_named_wins_and_is_refused_to_another_project(tmp_path, monkeypatch):
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "named"))
    assert prepare_home("any", ArtifactStore(str(tmp_path / "one"))) == tmp_path / "named"
    (tmp_path / "named/dagster.yaml").write_text("telemetry: {enabled: false}\n")
    assert prepare_home("any", ArtifactStore(str(tmp_path / "one"))) == tmp_path / "named"
    assert (tmp_path / "named/dagster.yaml").read_text() == "telemetry: {enabled: false}\n", "the user's own stays"
    with pytest.raises(StorageError, match="belongs to another project") as refused:
        prepare_home("any", ArtifactStore(str(tmp_path / "other")))
    assert str(tmp_path / "one") in str(refused.value)
    assert OWNER_FILE in refused.value.where
    assert "DAGSTER_HOME" in refused.value.fix


def test_two_projects_of_one_storage_do_not_share_records(tmp_path):
    store = ArtifactStore(str(tmp_path))
    home = prepare_home("small", store)
    with pytest.raises(StorageError, match="'small'; this one is named 'large'") as refused:
        prepare_home("large", store)
    assert "`storage.root` of its own" in refused.value.fix
    (home / OWNER_FILE).write_text(json.dumps({"storage": str(tmp_path)}))  # of a version that wrote no name
    assert prepare_home("large", store) == home
    with pytest.raises(StorageError):
        prepare_home("small", store)


def test_dagster_that_is_started_without_us_does_not_show_another_projects_records(tmp_path, tiny_project, monkeypatch):
    home = tmp_path / "named"
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    monkeypatch.setenv("LESS_PROJECT", str(tiny_project.path))
    prepare_home("any", ArtifactStore(str(tmp_path / "other")))
    code = "import less_assets.running.code_location"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "belongs to another project" in loaded.stderr
    (home / OWNER_FILE).unlink()
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    assert json.loads((home / OWNER_FILE).read_text())["storage"] == str(tmp_path / "artifacts")


def test_a_project_that_moved_takes_its_records_along(tmp_path):
    prepare_home("any", ArtifactStore(str(tmp_path / "before")))
    shutil.move(tmp_path / "before", tmp_path / "after")
    home = prepare_home("any", ArtifactStore(str(tmp_path / "after")))
    assert json.loads((home / OWNER_FILE).read_text())["storage"] == str(tmp_path / "after")


def test_records_are_no_garbage(tmp_path):
    store = ArtifactStore(str(tmp_path))
    left = prepare_home("any", store) / "storage" / ("a" * 32) / "manifest.json.partial-1"
    left.parent.mkdir(parents=True)
    left.write_text("{}")
    os.utime(left, (0, 0))
    assert collect_garbage(store, dry_run=False) == []
    assert left.exists()


def locked(home) -> sqlite3.Connection:
    """The database of runs, locked for writing."""
    connection = sqlite3.connect(home / "history/runs.db", isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN EXCLUSIVE")
    return connection


@dg.job
def nothing() -> None:
    @dg.op
    def step() -> None: ...

    step()


def test_a_locked_database_is_waited_for_longer_than_dagster_does(tmp_path):
    store = ArtifactStore(str(tmp_path))
    with opened_records("any", store) as instance:
        home = tmp_path / ".dagster"
        connection = locked(home)
        free = threading.Timer(6.5, connection.close)  # Dagster gives up after 5 s
        free.start()
        started = time.monotonic()
        assert nothing.execute_in_process(instance=instance).success
        assert time.monotonic() - started > 5
        free.join()


def test_who_holds_a_locked_database_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(dagster_home, "PATIENCE_SECONDS", 0.3)
    store = ArtifactStore(str(tmp_path))
    home = tmp_path / ".dagster"
    with opened_records("any", store):
        pass
    holder = os.fork()
    if holder == 0:
        with opened_records("any", store) as instance, process_name(instance):
            connection = locked(home)
            (tmp_path / "holding").touch()
            time.sleep(60)
            connection.close()
        os._exit(0)
    try:
        while not (tmp_path / "holding").exists():
            time.sleep(0.05)
        with pytest.raises(StorageError, match="stayed locked") as refused, opened_records("any", store) as instance:
            nothing.execute_in_process(instance=instance)
        assert f"process {holder} on {os.uname().nodename}" in str(refused.value)
        assert refused.value.where == str(home)
    finally:
        os.kill(holder, 9)
        os.waitpid(holder, 0)


@pytest.mark.skipif(not os.path.exists("/proc/locks"), reason="only Linux tells who holds a lock")
@pytest.mark.parametrize("database", ["history/runs.db", "history/runs/index.db"])
def test_a_stranger_that_holds_a_database_is_named(tmp_path, monkeypatch, database):
    monkeypatch.setattr(dagster_home, "PATIENCE_SECONDS", 0.3)
    store = ArtifactStore(str(tmp_path))
    with opened_records("any", store):
        pass
    code = (
        "import sqlite3, sys; connection = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "connection.execute('BEGIN EXCLUSIVE'); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / ".dagster" / database)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stranger:
        stranger.stdout.readline()
        with pytest.raises(StorageError, match="stayed locked") as refused, opened_records("any", store) as instance:
            nothing.execute_in_process(instance=instance)
        stranger.stdin.close()
    assert f"process {stranger.pid} on {os.uname().nodename}" in str(refused.value)
    assert database in str(refused.value), "its command is shown"


def test_a_storage_of_dagsters_records_whose_package_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dagster_postgres", None)  # importing it fails, as if it were not installed
    home = tmp_path / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text("storage: {postgres: {postgres_url: 'postgresql://nobody@nowhere/none'}}\n")
    with (
        pytest.raises(StorageError, match="dagster_postgres") as refused,
        opened_records("any", ArtifactStore(str(tmp_path / "artifacts")), home),
    ):
        pass
    assert refused.value.where == str(home / "dagster.yaml")
    assert "pip install dagster-postgres" in refused.value.fix
