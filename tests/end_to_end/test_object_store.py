"""The store in a bucket: a whole run on a real S3 server on 127.0.0.1, and what happens when that server misbehaves."""

import threading
import time
from collections.abc import Callable, Iterator

import dagster as dg
import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from less_assets.errors import CorruptArtifactError, StorageError
from less_assets.orchestration.definitions import build_definitions
from less_assets.project.project import load_project
from less_assets.running.runner import GraphRunner, Outcome, Request, register_shards
from less_assets.steps.registry import open_store
from less_assets.store.artifacts import ArtifactFolder, ArtifactStore
from less_assets.store.features import FeatureWriter, open_features
from less_assets.store.garbage import collect_garbage
from less_assets.store.tables import read_parquet, write_parquet

pytest.importorskip("moto", reason="the S3 server of the tests is not installed: pip install 'less-assets[dev]'")
pytest.importorskip("s3fs", reason="the S3 client is not installed: pip install 'less-assets[s3]'")
pytest.importorskip("flask_cors", reason="moto's server needs flask and flask-cors: pip install 'less-assets[dev]'")

BUCKET = "less-assets-test"
FINGERPRINT = "0123456789abcdef"
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
BROKEN = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"

Answer = tuple[str, bytes] | None
Fault = Callable[[str, str, int], Answer]


class Server:
    """moto's S3 over HTTP; `fault` may answer a request in its place (method, path, number of the request)."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self._application = DomainDispatcherApplication(create_backend_app)
        self.fault: Fault | None = None
        self.requests = 0
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def _answer(self, environment, start_response):
        method, path = environment["REQUEST_METHOD"], environment["PATH_INFO"]
        self.requests += 1
        answer = self.fault(method, path, self.requests) if self.fault else None
        if answer is None:
            return self._application(environment, start_response)
        environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
        status, body = answer
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [b"" if method == "HEAD" else body]

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    import logging

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = Server()
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "2",  # five by default, with longer waits
        }.items():
            patched.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir(BUCKET)
        yield server
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def server(running) -> Iterator[Server]:
    yield running
    running.fault = None


@pytest.fixture
def store(server, request) -> ArtifactStore:
    return ArtifactStore(f"s3://{BUCKET}/{request.node.name}")


class Rows:
    """Features of a few rows, as `extract_features` gives them."""

    def __init__(self, rows: int, dimension: int) -> None:
        generator = np.random.default_rng(0)
        self.features = {"adamw": generator.standard_normal((rows, dimension)).astype(np.float32)}
        self.norms = {"adamw": np.ones(rows, np.float32)}
        self.loss = np.ones(rows, np.float32)
        self.loss_tokens = np.ones(rows, np.int32)
        self.status = np.zeros(rows, np.uint8)


TABLE = pl.DataFrame({"name": [f"row {place}" for place in range(200)], "place": range(200)})


def write_something(store: ArtifactStore) -> ArtifactFolder:
    """A table and features, sealed and published."""
    with store.resuming("things/one", FINGERPRINT) as folder:
        write_parquet(folder, "table.parquet", TABLE)
        writer = FeatureWriter(folder.path("features.zarr"), ["adamw"], 20, 64, "int8", 8)
        rows = Rows(20, 64)
        for index in range(writer.blocks):
            start, stop = writer.bounds(index)
            part = Rows(stop - start, 64)
            part.features = {"adamw": rows.features["adamw"][start:stop]}
            writer.write_block(index, part)
        folder.seal(kind="thing")
    store.publish(folder)
    return folder


def read_something(store: ArtifactStore) -> np.ndarray:
    """Reads all of it back, verified; returns the decoded features."""
    folder = store.require("things/one", "thing")
    assert_frame_equal(read_parquet(folder, "table.parquet"), TABLE)
    return np.concatenate([block for _, block in open_features(folder).blocks("adamw")])


def run(project_file, instance, request) -> Outcome:
    project = load_project(project_file)
    store = open_store(project)
    register_shards(project, store, instance)
    return GraphRunner(build_definitions(project), project, store, instance, print).run(request)


def contents(root) -> dict[str, bytes]:
    """Every file of every sealed artifact of a store."""
    manifests = list(root.glob("**/manifest.json"))
    base = str(root).rstrip("/") + "/"
    return {str(path).removeprefix(base): path.read_bytes() for path in manifests}


def test_a_whole_run_in_a_bucket_is_the_run_on_a_disk(tiny_project, server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where models and unfinished trainings are kept beside a bucket
    tiny_project.settings["tasks"] = tiny_project.settings["tasks"][:1]
    tiny_project.settings["recipes"] = [
        {"name": "less", "strategy": "less", "fraction": 0.2, "rescore": "exact"},
        {"name": "base", "strategy": "none"},
    ]
    tiny_project.settings["storage"]["root"] = f"s3://{BUCKET}/whole"
    with dg.DagsterInstance.ephemeral() as instance:
        made = run(tiny_project.path, instance, Request()).materialized
        assert made["leaderboard"] == [None]
        assert run(tiny_project.path, instance, Request()).materialized == {}
    project = load_project(tiny_project.path)
    store = open_store(project)
    for key in store.published():
        store.require(key, "any").verify()
    assert collect_garbage(store, dry_run=True) == []
    assert not (tiny_project.folder / "artifacts").exists()

    tiny_project.settings["storage"]["root"] = "artifacts"
    with dg.DagsterInstance.ephemeral() as instance:
        run(tiny_project.path, instance, Request(until="selected_subset"))
    in_bucket, on_disk = contents(store.root), contents(open_store(load_project(tiny_project.path)).root)
    assert len(on_disk) > 20
    assert {name: in_bucket[name] for name in on_disk} == on_disk, "a manifest has the digest of every file"


def test_throttling_and_passing_errors_are_waited_out(store, server):
    def sometimes(method: str, path: str, number: int) -> Answer:
        if number % 12 == 1:
            return ("503 Slow Down", SLOW_DOWN) if number % 24 == 1 else ("500 Internal Server Error", BROKEN)
        return None

    server.fault = sometimes
    write_something(store)
    throttled = read_something(store)
    server.fault = None
    expected = read_something(store)
    np.testing.assert_array_equal(throttled, expected)


def test_slow_reads_take_longer_and_give_the_same(store, server):
    write_something(store)
    expected = read_something(store)

    def slowly(method: str, path: str, number: int) -> Answer:
        if method == "GET":
            time.sleep(0.05)
        return None

    server.fault = slowly
    np.testing.assert_array_equal(read_something(store), expected)


@pytest.mark.parametrize(
    ("answer", "said"),
    [(("403 Forbidden", DENIED), "Access Denied"), (("500 Internal Server Error", BROKEN), "internal error")],
)
def test_a_bucket_that_cannot_be_written_is_one_clear_error_and_leaves_nothing_in_force(
    store, server, monkeypatch, answer, said
):
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)

    def refuses(method: str, path: str, number: int) -> Answer:
        return answer if method in ("PUT", "POST") else None

    server.fault = refuses
    with pytest.raises(StorageError, match=said) as error:
        write_something(store)
    assert "what is finished is kept" in str(error.value)
    assert f"s3://{BUCKET}" in str(error.value)
    server.fault = None
    assert store.current("things/one") is None
    write_something(store)
    read_something(store)


def refusal(read: Callable[[], object]) -> str:
    """What a reader says of a store that does not answer; empty if it needs no answer."""
    try:
        read()
    except StorageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "answer", [("403 Forbidden", DENIED), ("500 Internal Server Error", BROKEN)], ids=["403", "500"]
)
def test_a_bucket_that_cannot_be_read_is_one_clear_error_and_never_a_missing_artifact(
    store, server, monkeypatch, answer
):
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    write_something(store)
    reader = open_features(store.require("things/one", "thing"))
    for methods in (("GET",), ("HEAD",), ("GET", "HEAD")):
        server.fault = lambda method, path, number, methods=methods: answer if method in methods else None
        found = {
            "whole": refusal(lambda: read_something(store)),
            "features": refusal(lambda: list(reader.blocks("adamw"))),
            "existence": refusal(lambda: store.artifact("things/one", FINGERPRINT).exists() or pytest.fail("missing")),
        }
        server.fault = None
        assert all(f"s3://{BUCKET}" in said for said in found.values() if said), found
        if "GET" in methods:
            assert found["whole"]
            assert found["features"]
    assert refusal(lambda: read_something(store)) == ""


def test_an_upload_that_breaks_off_leaves_no_artifact_and_is_resumed(store, server, monkeypatch):
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    stored = []

    def breaks(method: str, path: str, number: int) -> Answer:
        if method == "PUT" and "/c/2" in path:  # the third block
            return "403 Forbidden", DENIED
        if method == "PUT" and "/c/" in path:
            stored.append(path)
        return None

    server.fault = breaks
    with pytest.raises(StorageError):
        write_something(store)
    assert not store.artifact("things/one", FINGERPRINT).exists()
    first = list(stored)
    server.fault = lambda method, path, number: stored.append(path) if method == "PUT" and "/c/" in path else None
    with store.resuming("things/one", FINGERPRINT) as folder:
        writer = FeatureWriter(folder.path("features.zarr"), ["adamw"], 20, 64, "int8", 8)
        assert writer.finished_blocks() == {0, 1}
    assert first


def test_an_object_that_was_changed_or_cut_is_recognised(store, server):
    folder = write_something(store)
    path = folder.path("table.parquet")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptArtifactError, match=r"table\.parquet"):
        read_something(store)
    path.write_bytes(whole)
    read_something(store)
    (chunk,) = list(folder.root.glob("**/adamw/features/c/1/0"))
    chunk.write_bytes(chunk.read_bytes()[:-3])
    with pytest.raises(CorruptArtifactError, match="features"):
        read_something(store)


def test_a_bucket_that_does_not_exist_is_one_clear_error(server):
    store = ArtifactStore("s3://no-such-bucket-anywhere/prefix")
    with pytest.raises(StorageError, match="no such bucket"):
        write_something(store)
    assert not store.root.fs.exists("no-such-bucket-anywhere"), "a misspelt bucket must not come into being"
