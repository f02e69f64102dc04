"""Tables and documents: what is written is read, in the same bytes, and damage is an error."""

import polars as pl
import pytest

from less_assets.errors import CorruptArtifactError, MissingArtifactError
from less_assets.store.artifacts import ArtifactStore
from less_assets.store.files import list_files
from less_assets.store.tables import (
    read_json,
    read_parquet,
    scan_parquet,
    write_json,
    write_parquet,
)

FRAME = pl.DataFrame(
    {"example_id": ["a", "b", None], "scores": [[0.5, 0.25], [1.0, float("nan")], None]},
    schema={"example_id": pl.String, "scores": pl.Array(pl.Float32, 2)},
)


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "root") if request.param == "local" else f"memory://{tmp_path.name}/root")


def write(store, fingerprint="0" * 16, frame=FRAME):
    with store.writing("scores/bbh", fingerprint) as folder:
        write_parquet(folder, "scores.parquet", frame)
        write_json(folder, "labels.json", {"labels": ["x", "ü"]})
        folder.seal(kind="influence_scores")
    return store.artifact("scores/bbh", fingerprint)


def test_tables_come_back_with_their_types(store):
    folder = write(store)
    assert read_parquet(folder, "scores.parquet").equals(FRAME, null_equal=True)
    assert read_parquet(folder, "scores.parquet", ["example_id"]).columns == ["example_id"]
    assert scan_parquet(folder, "scores.parquet").collect().schema == FRAME.schema
    assert read_json(folder, "labels.json") == {"labels": ["x", "ü"]}


def test_lazy_and_eager_frames_hold_the_same_rows_and_no_leftovers(store):
    folder = write(store, frame=FRAME.lazy())
    assert read_parquet(folder, "scores.parquet").equals(FRAME, null_equal=True)
    assert not [name for name in list_files(store.root, partial=True) if "partial" in name]


def test_same_table_same_bytes(store):
    assert write(store, "0" * 16).manifest().files == write(store, "1" * 16).manifest().files


def test_damage_is_an_error_that_names_file_and_command(store):
    folder = write(store)
    for name, read in [("scores.parquet", read_parquet), ("scores.parquet", scan_parquet), ("labels.json", read_json)]:
        path = folder.path(name)
        data = path.read_bytes()
        for damaged in (data[:-1], b"", data[:9] + bytes([data[9] ^ 1]) + data[10:]):
            path.write_bytes(damaged)
            with pytest.raises(CorruptArtifactError, match=rf"{name}(.|\n)*--until influence_scores"):
                read(store.artifact(folder.key, folder.fingerprint), name)
        path.write_bytes(data)


def test_an_unsealed_table_is_not_read(store):
    with store.resuming("scores/bbh", "2" * 16) as folder:
        write_parquet(folder, "scores.parquet", FRAME)
        with pytest.raises(MissingArtifactError):
            read_parquet(folder, "scores.parquet")


def test_a_file_the_artifact_does_not_have_is_missing(store):
    with pytest.raises(MissingArtifactError, match=r"no file other\.parquet"):
        read_parquet(write(store), "other.parquet")
