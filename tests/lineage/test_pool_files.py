"""The ledger: files in order of first sight, physical rows, shards that change only from an edited row on."""

import json
import zipfile

import pytest
import yaml

from less_assets.errors import CorruptArtifactError, MissingArtifactError, PoolFormatError
from less_assets.lineage.pool_files import LEDGER_FILE, PoolFiles
from less_assets.project.project import Project, load_project
from less_assets.store.artifacts import ArtifactStore

SHARD_SIZE = 4


def line(number: int, word: str = "row") -> str:
    """One good row."""
    turns = [{"role": "user", "content": f"{word} {number}"}, {"role": "assistant", "content": "yes"}]
    return json.dumps({"messages": turns})


class Pool:
    """Source files in a folder, and the ledger over them."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.sources = [{"name": "plus", "path": "plus*.jsonl"}]
        self.shard_size = SHARD_SIZE
        self.store = ArtifactStore(str(folder / "artifacts"))

    @property
    def project(self) -> Project:
        settings = {
            "name": "ledger",
            "model": {"base": "someone/some-model"},
            "pool": {"shard_size": self.shard_size, "sources": self.sources},
            "tasks": [{"name": "sums", "examples": {"path": "sums.jsonl"}}],
            "recipes": [{"name": "full", "strategy": "full"}],
        }
        path = self.folder / "project.yaml"
        path.write_text(yaml.safe_dump(settings))
        return load_project(path)

    def write(self, name: str, lines: list[str]) -> None:
        (self.folder / name).write_text("".join(f"{text}\n" for text in lines))

    def scan(self) -> PoolFiles:
        return PoolFiles.scan(self.project, self.store)

    def digests(self) -> dict[str, str]:
        return {shard.key: shard.digest for shard in self.scan().shards}


@pytest.fixture
def pool(tmp_path) -> Pool:
    found = Pool(tmp_path)
    found.write("plus.jsonl", [line(number) for number in range(10)])
    return found


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Shards that are new or have another digest."""
    return [key for key in after if before.get(key) != after[key]]


def test_rows_are_cut_into_shards_of_the_stated_size(pool):
    shards = pool.scan().shards
    assert [(shard.key, shard.rows) for shard in shards] == [("plus-00000", 4), ("plus-00001", 4), ("plus-00002", 2)]
    assert [shard.segments[0].first_row for shard in shards] == [0, 4, 8]


def test_the_ledger_knows_where_shards_begin_so_that_none_reads_those_before_it(pool):
    lines = [len(line(number).encode()) + 1 for number in range(10)]
    pool.scan()
    begins = [shard.segments[0].begins for shard in PoolFiles.load(pool.store).shards]
    assert begins == [(sum(lines[:number]), number) for number in (0, 4, 8)]


def test_rows_that_moved_are_not_read_where_they_were(pool):
    found = pool.scan()
    pool.write("plus.jsonl", [line(0, "longer"), *(line(number) for number in range(1, 10))])
    with pytest.raises(PoolFormatError, match="changed since the pool was scanned"):
        found.refuse_changed(pool.project, "plus-00001")


def test_a_ledger_of_before_places_were_kept_gets_them_by_the_next_scan(pool):
    before = pool.digests()
    path = pool.store.root / LEDGER_FILE
    content = json.loads(path.read_text())
    for shard in content["shards"]:
        for segment in shard["segments"]:
            del segment["begins"]
    path.write_text(json.dumps(content))
    assert PoolFiles.load(pool.store).shards[1].segments[0].begins is None
    assert pool.digests() == before
    assert PoolFiles.load(pool.store).shards[1].segments[0].begins is not None


def test_a_file_that_was_scanned_before_bare_carriage_returns_ended_lines_is_scanned_again(pool):
    """Its one line of then is several now, though nobody has touched it."""
    (pool.folder / "plus.jsonl").write_bytes("\r".join(line(number) for number in range(6)).encode())
    pool.scan()
    ledger = json.loads((pool.store.root / LEDGER_FILE).read_text())
    (file,) = ledger["files"]["plus"]
    file["rows"], file["stamp"] = 1, file["stamp"].rpartition("-")[0]
    ledger["shards"] = ledger["shards"][:1]
    ledger["shards"][0]["segments"][0]["rows"] = 1
    (pool.store.root / LEDGER_FILE).write_text(json.dumps(ledger))
    assert [shard.rows for shard in pool.scan().shards] == [4, 2]


def test_blank_and_broken_lines_are_rows_so_that_nothing_shifts(pool):
    pool.write("plus.jsonl", [line(0), "", "{broken", line(3, "\u2028"), line(4)])
    assert [shard.rows for shard in pool.scan().shards] == [4, 1]


def test_appended_rows_change_only_the_last_unfilled_shard(pool):
    before = pool.digests()
    pool.write("plus.jsonl", [line(number) for number in range(13)])
    assert changed(before, pool.digests()) == ["plus-00002", "plus-00003"]


def test_a_new_file_goes_to_the_end_even_if_its_name_sorts_first(pool):
    pool.write("plus.jsonl", [line(number) for number in range(8)])
    before = pool.digests()
    pool.write("plus-a.jsonl", [line(number, "new") for number in range(2)])
    assert changed(before, pool.digests()) == ["plus-00002"]
    (last,) = pool.scan().shard("plus-00002").segments
    assert last.path.endswith("plus-a.jsonl")


def test_a_shard_may_span_two_files(pool):
    pool.scan()
    pool.write("plus-b.jsonl", [line(number, "new") for number in range(3)])
    assert [(segment.first_row, segment.rows) for segment in pool.scan().shard("plus-00002").segments] == [
        (8, 2),
        (0, 2),
    ]
    assert pool.scan().shard("plus-00003").rows == 1


def test_an_edited_row_changes_its_own_shard_only(pool):
    before = pool.digests()
    pool.write("plus.jsonl", [line(number, "edited" if number == 5 else "row") for number in range(10)])
    assert changed(before, pool.digests()) == ["plus-00001"]


def test_rows_inside_an_archive_are_a_source_and_edits_are_seen(pool):
    def pack(word: str) -> None:
        with zipfile.ZipFile(pool.folder / "all.zip", "w") as archive:
            archive.writestr("data/plus.jsonl", "".join(f"{line(number, word)}\n" for number in range(6)))

    pool.sources = [{"name": "plus", "path": f"zip://data/plus.jsonl::{pool.folder}/all.zip"}]
    pack("row")
    before = pool.digests()
    assert list(before) == ["plus-00000", "plus-00001"]
    assert pool.digests() == before
    pack("now")  # as long as before
    assert changed(before, pool.digests()) == list(before)


def test_an_inserted_row_changes_the_shards_from_there_on(pool):
    before = pool.digests()
    pool.write("plus.jsonl", [*(line(number) for number in range(5)), line(99), *(line(n) for n in range(5, 10))])
    assert changed(before, pool.digests()) == ["plus-00001", "plus-00002"]


def test_rows_that_only_moved_to_a_new_time_stamp_change_nothing(pool):
    before = pool.digests()
    (pool.folder / "plus.jsonl").touch()
    assert pool.digests() == before


def test_unchanged_files_are_not_read_again(pool, monkeypatch):
    pool.scan()
    from less_assets.method.data import row_files

    def read(path, *_):
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(row_files, "count_rows", read)
    monkeypatch.setattr(row_files, "scan_ranges", read)
    assert len(pool.scan().shards) == 3
    (pool.folder / "plus.jsonl").write_text(line(1) + "\n")
    with pytest.raises(AssertionError, match="was read again"):
        pool.scan()


def test_rows_that_change_while_they_are_read_are_refused(pool):
    found = pool.scan()
    found.refuse_changed(pool.project, "plus-00001")
    pool.write("plus.jsonl", [line(number) for number in range(7)] + [line(7, "edited")])
    found.refuse_changed(pool.project, "plus-00000")  # its own rows are what they were
    with pytest.raises(PoolFormatError, match=r"changed since the pool was scanned(.|\n)*rows 5 to 8"):
        found.refuse_changed(pool.project, "plus-00001")


def test_a_removed_source_drops_out_and_an_added_one_follows(pool):
    pool.write("red.jsonl", [line(number, "red") for number in range(3)])
    pool.sources.append({"name": "colors", "path": "red.jsonl"})
    before = pool.digests()
    assert list(before) == ["plus-00000", "plus-00001", "plus-00002", "colors-00000"]
    pool.sources = pool.sources[1:]
    assert pool.digests() == {"colors-00000": before["colors-00000"]}


def test_a_removed_file_closes_the_gap(pool):
    pool.scan()
    pool.write("plus-b.jsonl", [line(number, "new") for number in range(3)])
    pool.scan()
    (pool.folder / "plus.jsonl").unlink()
    (shard,) = pool.scan().shards
    assert shard.rows == 3


def test_a_limit_takes_the_first_rows(pool):
    pool.sources[0]["limit"] = 5
    assert [shard.rows for shard in pool.scan().shards] == [4, 1]


def test_the_limit_is_part_of_what_a_shard_is(pool):
    before = pool.digests()
    pool.sources[0]["limit"] = 9
    assert changed(before, pool.digests()) == ["plus-00002"]


def test_what_was_scanned_can_be_loaded(pool):
    scanned = pool.scan()
    assert PoolFiles.load(pool.store).shards == scanned.shards


def test_without_a_scan_the_ledger_is_empty(pool):
    assert PoolFiles.load(pool.store).shard_keys() == []


def test_an_unknown_shard_is_named(pool):
    with pytest.raises(MissingArtifactError, match="plus-00007"):
        pool.scan().shard("plus-00007")


def test_a_source_without_a_file_is_an_error_that_names_it(pool):
    pool.sources[0]["path"] = "nothing.jsonl"
    with pytest.raises(PoolFormatError) as error:
        pool.scan()
    assert "nothing.jsonl" in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"files": {}}', b'{"files": 3, "shards": []}'])
def test_a_damaged_ledger_is_refused_and_not_silently_started_afresh(pool, content):
    pool.scan()
    (pool.folder / "artifacts" / LEDGER_FILE).write_bytes(content)
    with pytest.raises(CorruptArtifactError, match="damaged"):
        pool.scan()


def test_an_empty_file_has_no_shard(pool):
    pool.write("plus.jsonl", [])
    assert pool.scan().shards == []
