"""Feature arrays: what is written is read, a killed writer resumes, no damage passes for data."""

from types import SimpleNamespace

import numpy as np
import pytest
from upath import UPath

from less_assets.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError
from less_assets.method.gradients.quantization import decode, encode
from less_assets.store.artifacts import ArtifactStore
from less_assets.store.features import UNWRITTEN, FeatureReader, FeatureWriter, open_features

FORMS, ROWS, DIMENSION, BLOCK = ("adamw", "marginal"), 21, 16, 8


def make_block(start: int, stop: int, seed: int = 0) -> SimpleNamespace:
    rows = np.random.default_rng(seed).standard_normal((ROWS, len(FORMS), DIMENSION)).astype(np.float32)
    index = np.arange(start, stop)
    return SimpleNamespace(
        features={form: rows[start:stop, place] for place, form in enumerate(FORMS)},
        norms={form: (index + 1.5 + place).astype(np.float32) for place, form in enumerate(FORMS)},
        loss=np.where(index == 3, np.nan, index).astype(np.float32),
        loss_tokens=index.astype(np.int32),
        status=np.where(index == 3, 4, 0).astype(np.uint8),
    )


def open_writer(path: UPath, storage: str = "int8") -> FeatureWriter:
    return FeatureWriter(path, FORMS, ROWS, DIMENSION, storage, block_rows=BLOCK)


def write_all(path: UPath, storage: str = "int8") -> FeatureWriter:
    writer = open_writer(path, storage)
    for index in range(writer.blocks):
        writer.write_block(index, make_block(*writer.bounds(index)))
    return writer


def read_features(reader: FeatureReader, form: str, rows: int = 3) -> np.ndarray:
    pieces = list(reader.blocks(form, rows))
    assert [first for first, _ in pieces] == list(np.cumsum([0] + [len(piece) for _, piece in pieces])[:-1])
    return np.concatenate([piece for _, piece in pieces])


@pytest.fixture(params=["local", "memory"])
def path(request, tmp_path) -> UPath:
    return UPath(tmp_path / "f.zarr") if request.param == "local" else UPath(f"memory://{tmp_path.name}/f.zarr")


@pytest.mark.parametrize("storage", ["float16", "int8", "int4", "int1"])
def test_features_come_back_as_their_codes_decode(path, storage):
    write_all(path, storage)
    reader = FeatureReader(path)
    block = make_block(0, ROWS)
    for form in FORMS:
        expected = np.where(block.status[:, None] == 0, block.features[form], 0)
        np.testing.assert_array_equal(
            read_features(reader, form), decode(*encode(expected, storage), storage, DIMENSION)
        )
        np.testing.assert_array_equal(reader.norms(form), block.norms[form])
        codes, scale = encode(expected, storage)
        for index in range(reader.code_blocks):
            first, found, scales = reader.codes(form, index)
            assert first == index * BLOCK
            np.testing.assert_array_equal(found, codes[first : first + BLOCK])
            np.testing.assert_array_equal(scales, scale[first : first + BLOCK])
            assert found.dtype == codes.dtype
    np.testing.assert_array_equal(reader.loss, block.loss)
    np.testing.assert_array_equal(reader.loss_tokens, block.loss_tokens)
    np.testing.assert_array_equal(reader.status, block.status)
    assert (reader.rows, reader.forms, reader.dimension) == (ROWS, FORMS, DIMENSION)


def test_unwritten_rows_are_marked_as_the_method_marks_pending_ones():
    features = pytest.importorskip("less_assets.method.gradients.features")
    assert features.RowStatus.PENDING == UNWRITTEN


def test_interrupted_writer_resumes_at_the_first_unfinished_block(path):
    writer = open_writer(path)
    writer.write_block(1, make_block(*writer.bounds(1)))
    with pytest.raises(MissingArtifactError, match="not finished"):
        FeatureReader(path)
    resumed = open_writer(path)
    assert resumed.finished_blocks() == {1}
    for index in (0, 2):
        resumed.write_block(index, make_block(*resumed.bounds(index)))
    np.testing.assert_array_equal(FeatureReader(path).loss_tokens, np.arange(ROWS))


def test_a_block_without_its_last_array_does_not_count(path):
    writer = open_writer(path)
    block = make_block(*writer.bounds(0))
    block.loss_tokens = "not numbers"  # as if killed before status was written
    with pytest.raises(ValueError):  # noqa: PT011
        writer.write_block(0, block)
    assert open_writer(path).finished_blocks() == set()


def test_a_block_of_quarantined_rows_is_stored_and_finished(path):
    writer = open_writer(path)
    for index in range(writer.blocks):
        block = make_block(*writer.bounds(index))
        block.status[:] = 1
        block.loss[:] = 0
        block.features = {form: np.full_like(rows, np.nan) for form, rows in block.features.items()}
        writer.write_block(index, block)
    assert open_writer(path).finished_blocks() == {0, 1, 2}
    assert not read_features(FeatureReader(path), "adamw").any()


def test_same_rows_give_the_same_bytes(tmp_path):
    first, second = UPath(tmp_path / "a"), UPath(tmp_path / "b")
    write_all(first)
    writer = open_writer(second)
    for index in (2, 0, 1, 1):
        writer.write_block(index, make_block(*writer.bounds(index)))
    names = sorted(str(file.relative_to(first)) for file in first.rglob("*") if file.is_file())
    assert names == sorted(str(file.relative_to(second)) for file in second.rglob("*") if file.is_file())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_another_layout_is_refused(path):
    open_writer(path)
    with pytest.raises(StaleArtifactError, match="another layout"):
        FeatureWriter(path, FORMS, ROWS + 1, DIMENSION, "int8", block_rows=BLOCK)


def sealed_features(tmp_path):
    folder = ArtifactStore(str(tmp_path)).artifact("gradients/train/epoch-1/dolly-0", "ab" * 8)
    write_all(folder.path("features.zarr"))
    folder.seal(kind="train_gradients")
    return folder


def read_everything(folder) -> None:
    reader = open_features(folder)
    for form in reader.forms:
        reader.norms(form)
        read_features(reader, form)


def test_any_damage_to_any_file_ends_in_an_error_that_names_it(tmp_path):
    folder = sealed_features(tmp_path)
    read_everything(folder)
    names = list(folder.manifest().files)
    assert len(names) > 3 * 9
    for name in names:
        file = folder.root / name
        data = file.read_bytes()
        flips = [bytes([*data[:at], data[at] ^ 4, *data[at + 1 :]]) for at in (0, len(data) // 2, len(data) - 1)]
        for damaged in [*flips, data[: len(data) // 2], b"", None]:
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            with pytest.raises(CorruptArtifactError) as caught:
                read_everything(folder)
            assert name in str(caught.value)
            assert "less-assets run --until train_gradients" in str(caught.value)
            file.write_bytes(data)
    read_everything(folder)


def test_a_chunk_that_is_lost_while_features_are_read_is_no_block_of_zeros(tmp_path):
    folder = sealed_features(tmp_path)
    for name in ("adamw/features/c/1/0", "adamw/scale/c/1"):
        reader = open_features(folder)
        file = folder.root / "features.zarr" / name
        data = file.read_bytes()
        file.unlink()
        for read in (
            lambda of: of.codes("adamw", 1),
            lambda of: list(of.blocks("adamw")),
            lambda of: of.take("adamw", [9]),
        ):
            with pytest.raises(CorruptArtifactError, match="missing") as caught:
                read(reader)
            assert name in str(caught.value)
        file.write_bytes(data)
        reader.codes("adamw", 1)


def test_damaged_chunks_are_found_without_a_manifest_and_written_again(tmp_path):
    path = UPath(tmp_path / "f.zarr")
    write_all(path)
    for name in ("adamw/features/c/1/0", "marginal/scale/c/0", "status/c/2", "zarr.json"):
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[:7] + bytes([data[7] ^ 1]) + data[8:] if len(data) > 8 else b"")
        with pytest.raises(CorruptArtifactError):
            [read_features(FeatureReader(path), form) for form in FORMS]
        writer = open_writer(path)
        missing = set(range(writer.blocks)) - writer.finished_blocks()
        assert missing
        for index in missing:
            writer.write_block(index, make_block(*writer.bounds(index)))
        for form in FORMS:
            read_features(FeatureReader(path), form)


def test_no_rows_is_a_finished_set_of_features(path):
    FeatureWriter(path, FORMS, 0, DIMENSION, "int4")
    assert list(FeatureReader(path).blocks("adamw")) == []


def test_a_block_of_the_wrong_shape_is_refused(path):
    writer = open_writer(path)
    with pytest.raises(ValueError, match="block 0"):
        writer.write_block(0, make_block(0, 3))


@pytest.mark.parametrize("storage", ["float16", "int4"])
def test_single_rows_are_what_the_stream_gives(path, storage):
    write_all(path, storage)
    reader = FeatureReader(path)
    everything = read_features(reader, "marginal")
    wanted = [20, 0, 9, 9, 3]
    np.testing.assert_array_equal(reader.take("marginal", wanted), everything[wanted])
    assert reader.take("marginal", []).shape == (0, DIMENSION)
