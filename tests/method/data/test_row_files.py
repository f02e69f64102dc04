"""Physical rows: nothing shifts, whatever stands in the file, and every way of looking at a file agrees."""

import csv
import gzip
import io
import json
import lzma
import re
import tracemalloc
import zipfile
from pathlib import Path

import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import assume, given
from hypothesis import strategies as st

from less_assets.errors import PoolFormatError
from less_assets.method.data import json_array, raw_rows
from less_assets.method.data.row_files import (
    count_rows,
    file_digest,
    files_below,
    list_files,
    look_into,
    read_raw,
    scan_ranges,
)

CASES = Path(__file__).parents[2] / "data" / "cases"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


def write(path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def assert_every_range_agrees(path: str) -> list:
    rows = list(read_raw(path))
    assert count_rows(path) == len(rows)
    assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    begins = [found.begins for found in scan_ranges(path, [(first_row, 1) for first_row in range(len(rows) + 2)])]
    for first_row, place in enumerate(begins):
        for known in (None, place):
            assert list(read_raw(path, first_row, 2, known)) == rows[first_row : first_row + 2]
    return rows


def range_digests(path: str, ranges: list[tuple[int, int]]) -> list[str]:
    return [found.digest for found in scan_ranges(path, ranges)]


# ---- JSON lines ----

GOES_ON = re.compile(rb"(\xef\xbb\xbf)?\s*[\[{][^\r\n]*(?<=[\[{,])[ \t]*[\r\n]")
"""A first line that is not all of its value: refused."""
OTHER_KIND = re.compile(rb"\x1f\x8b|BZh|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|PK\x03\x04|PAR1|ARROW1|\xff\xfe|\xfe\xff")
"""How a file that is not text in UTF-8 starts: refused, whatever its name."""

json_line = st.one_of(
    st.binary(max_size=30).map(lambda raw: raw.replace(b"\n", b"").replace(b"\r", b"")),
    st.dictionaries(st.text(max_size=3), st.text(max_size=8), max_size=3).map(
        lambda record: json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ),
    st.sampled_from([b"", b"  ", b"{}", b"[1]", b"null", b'{"a": "\xe2\x80\xa8"}', b"[" * 5000]),
)


@given(
    lines=st.lists(json_line, max_size=8),
    line_end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    last_ends=st.booleans(),
    limit=st.integers(10, 60),
)
def test_any_jsonl_bytes_are_counted_and_sliced_alike(folder, lines, line_end, last_ends, limit):
    content = line_end.join(lines) + line_end * last_ends
    assume(not re.match(rb"(\xef\xbb\xbf)?\s*\[\s*(\{|\Z)", content))  # one array of objects: refused
    assume(not GOES_ON.match(content))
    assume(not OTHER_KIND.match(content))
    path = write(folder / "any.jsonl", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_rows, "MAX_ROW_BYTES", limit)
        rows = assert_every_range_agrees(path)
    expected = content.split(line_end)[: -1 if content.endswith(line_end) or not content else None]
    assert len(rows) == len(expected)
    expected[:1] = [first.removeprefix(b"\xef\xbb\xbf") for first in expected[:1]]
    for row, line in zip(rows, expected, strict=True):
        if row.status != "too_large":
            assert (row.status == "blank") == (not line.strip())
            assert (row.record is not None) == (row.status == "ok")


@given(st.lists(st.sampled_from([b'{"a": 1}', b"\r", b"\n", b"{", b"\xff"]), max_size=12), st.integers(10, 30))
def test_mixed_line_ends_in_jsonl_give_the_lines_of_an_editor(folder, parts, limit):
    assume(not GOES_ON.match(b"".join(parts)))
    path = write(folder / "mixed.jsonl", b"".join(parts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_rows, "MAX_ROW_BYTES", limit)
        rows = assert_every_range_agrees(path)
    lines = b"".join(parts).splitlines()
    assert len(rows) == len(lines)
    good = {number for number, line in enumerate(lines, start=1) if line == b'{"a": 1}'}
    assert {row.number for row in rows if row.record is not None} == good


def test_jsonl_with_bare_carriage_returns_is_read_and_counts_its_lines(folder):
    rows = assert_every_range_agrees(write(folder / "mac.jsonl", b'{"a": "x\\ry"}\r\r{"a": \r{"a": 2}\r'))
    assert [(row.number, row.status) for row in rows] == [(1, "ok"), (2, "blank"), (3, "invalid_json"), (4, "ok")]
    assert rows[0].record == {"a": "x\ry"}


def test_separators_inside_strings_are_data_and_broken_lines_keep_their_place(folder):
    lines = [
        '{"a": "one\u2028two\u2029three\x85four\x0b\x0c\x1c"}'.replace("\x0b\x0c\x1c", ""),
        "",
        '{"a": ',
        '{"a": "last"}\r',
    ]
    path = write(folder / "separators.jsonl", "\n".join(lines).encode())
    first, blank, broken, last = read_raw(path)
    assert first.record == {"a": "one\u2028two\u2029three\x85four"}
    assert (blank.number, blank.status) == (2, "blank")
    assert (broken.number, broken.status) == (3, "invalid_json")
    assert (last.number, last.record) == (4, {"a": "last"})


def test_each_broken_line_has_its_reason(folder):
    lines = [b'{"a": "\xff"}', b"[1, 2]", b'"text"', b"{'a': 1}", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
    rows = list(read_raw(write(folder / "broken.jsonl", b"\n".join(lines))))
    assert [row.status for row in rows] == [
        "invalid_utf8",
        "wrong_type",
        "wrong_type",
        "invalid_json",
        "invalid_json",
        "invalid_json",
    ]
    assert "0xff" in rows[0].detail
    assert "list" in rows[1].detail


def test_a_byte_order_mark_is_not_part_of_the_first_row(folder):
    assert next(read_raw(write(folder / "bom.jsonl", b'\xef\xbb\xbf{"a": 1}\n'))).record == {"a": 1}
    assert next(read_raw(write(folder / "bom.csv", b"\xef\xbb\xbfa\n1\n"))).record == {"a": "1"}


def test_a_row_over_the_limit_is_quarantined_and_its_neighbours_are_read(folder, monkeypatch):
    monkeypatch.setattr(raw_rows, "MAX_ROW_BYTES", 100)
    exactly, over = b'{"a": "' + b"x" * 91 + b'"}', b'{"a": "' + b"x" * 92 + b'"}'
    far_over = b'{"a": "' + b"x" * 1000 + b'"}'
    assert len(exactly) == 100
    path = write(folder / "large.jsonl", b"\n".join([exactly, over, far_over, exactly + b"\r"]) + b"\n")
    rows = assert_every_range_agrees(path)
    assert [row.status for row in rows] == ["ok", "too_large", "too_large", "ok"]
    assert rows[2].detail == "1,009 bytes, more than 100"


def test_memory_does_not_grow_with_the_file(folder):
    row = json.dumps({"a": "x" * 1000}).encode() + b"\n"
    giant = b'{"a": "' + b"y" * 12_000_000 + b'"}\n'
    path = write(folder / "big.jsonl", row * 5000 + giant + row * 5000)
    tracemalloc.start()
    statuses = {}
    for each in read_raw(path):
        statuses[each.status] = statuses.get(each.status, 0) + 1
    digests = range_digests(path, [(0, 5000), (5000, 1), (5001, 5000)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert statuses == {"ok": 10_000, "too_large": 1}
    assert digests[0] == digests[2] != digests[1]
    assert peak < 5_000_000


def test_a_json_array_named_as_json_lines_is_refused_with_advice(folder):
    pretty = write(folder / "pretty.jsonl.gz", gzip.compress(b'\xef\xbb\xbf[\n  {\n "a": 1}\n]'))
    case = CASES / "array-in-jsonl" / "pool.jsonl"
    for array in (pretty, str(case)):
        for read in (count_rows, lambda name: list(read_raw(name)), lambda name: range_digests(name, [(0, 1)])):
            with pytest.raises(PoolFormatError, match="one JSON array") as refused:
                read(array)
            assert "jq -c '.[]'" in str(refused.value.fix)
    assert [row.status for row in read_raw(write(folder / "a.jsonl", b'[1]\n{"a": 2}\n'))] == ["wrong_type", "ok"]
    assert len(list(read_raw(write(folder / "lines.json", b'{"a": 1}\n{"a": 2}\n')))) == 2


# ---- JSON arrays ----

json_value = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('ab"\\[]{},\n\u2028é'), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a"\\[{,', max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(
    elements=st.lists(json_value, max_size=6),
    indent=st.sampled_from([None, 2]),
    ascii=st.booleans(),
    block=st.integers(5, 40),
    limit=st.integers(8, 60),
    compress=st.booleans(),
)
def test_any_json_array_is_read_counted_and_sliced_alike(folder, elements, indent, ascii, block, limit, compress):
    content = b"\xef\xbb\xbf " + json.dumps(elements, indent=indent, ensure_ascii=ascii).encode() + b" \n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_rows, "MAX_ROW_BYTES", limit)
        patch.setattr(json_array, "BLOCK_BYTES", block)
        written = zstandard.ZstdCompressor().compress(content) if compress else content
        path = write(folder / f"any.json{'.zst' * compress}", written)
        rows = assert_every_range_agrees(path)
        digests = range_digests(path, [(number, 1) for number in range(len(rows))])
        patch.setattr(json_array, "BLOCK_BYTES", 1 << 20)
        assert range_digests(path, [(number, 1) for number in range(len(rows))]) == digests
    assert len(rows) == len(elements)
    for row, element in zip(rows, elements, strict=True):
        if row.status != "too_large":
            assert (row.status, row.record) == (("ok", element) if isinstance(element, dict) else ("wrong_type", None))


@given(st.binary(max_size=60), st.integers(3, 20))
def test_any_bytes_as_a_json_array_are_counted_and_sliced_alike_or_refused(folder, content, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "BLOCK_BYTES", block)
        path = write(folder / "bytes.json", b"[" + content)
        try:
            count_rows(path)
        except PoolFormatError:
            with pytest.raises(PoolFormatError):
                list(read_raw(path))
        else:
            assert_every_range_agrees(path)


def test_a_broken_element_of_an_array_has_its_reason_and_spoils_no_other(folder):
    elements = [
        b'{"a": 1}',
        b'{"a": }',
        b'{"a": "\xff"}',
        b'{"a": 1, "a": 2}',
        b"7",
        b"",
        b'{"a": 2}{"a": 3}',
        b'{"a": 4}',
    ]
    rows = assert_every_range_agrees(write(folder / "broken.json", b"[" + b",\n".join(elements) + b"]"))
    assert [row.status for row in rows] == [
        "ok",
        "invalid_json",
        "invalid_utf8",
        "invalid_json",
        "wrong_type",
        "blank",
        "invalid_json",
        "ok",
    ]
    assert assert_every_range_agrees(write(folder / "empty.json", b"[\n]\n")) == []


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'[{"a": 1}, {"a": 2}', "element 2 is cut off"),
        (b'[{"a": 1}, {"a": "2}]', "element 2 is cut off"),
        (b'[{"a": 1}, {"a": [2}, {"a": 3}]', "element 2 is cut off"),
        (b'[{"a": 1}]\n[{"a": 2}]', "ends after element 1, and something follows"),
        (b"[", "element 1 is cut off"),
    ],
)
def test_an_array_that_is_not_whole_is_refused(folder, content, what):
    path = write(folder / "part.json", content)
    for read in (count_rows, lambda name: list(read_raw(name)), lambda name: range_digests(name, [(0, 9)])):
        with pytest.raises(PoolFormatError, match=what):
            read(path)


def test_appended_elements_leave_earlier_ranges_as_they_were(folder):
    short = write(folder / "short.json", b'[\n {"a": 1},\n {"a": 2}\n]\n')
    long = write(folder / "long.json", b'[\n {"a": 1},\n {"a": 2},\n {"a": 3}\n]\n')
    assert range_digests(short, [(0, 2)]) == range_digests(long, [(0, 2)])
    assert range_digests(short, [(0, 3)]) != range_digests(long, [(0, 3)])


def test_memory_does_not_grow_with_an_array(folder):
    row = json.dumps({"a": "x" * 1000}).encode()
    giant = b'{"a": "' + b"y" * 12_000_000 + b'"}'
    path = write(folder / "big.json", b"[" + b", ".join([row] * 5000 + [giant] + [row] * 5000) + b"]")
    tracemalloc.start()
    statuses = {}
    for each in read_raw(path):
        statuses[each.status] = statuses.get(each.status, 0) + 1
    digests = range_digests(path, [(0, 5000), (5000, 1), (5001, 5000)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert statuses == {"ok": 10_000, "too_large": 1}
    assert digests[0] == digests[2] != digests[1]
    assert peak < 8_000_000


# ---- CSV ----


@given(
    table=st.lists(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=6), min_size=2, max_size=2),
        max_size=6,
    ),
    newline=st.sampled_from(["\n", "\r\n"]),
)
def test_any_csv_table_survives(folder, table, newline):
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=newline, quoting=csv.QUOTE_ALL)
    writer.writerows([["question", "answer"], *table])
    rows = assert_every_range_agrees(write(folder / "any.csv", text.getvalue().encode()))
    assert [row.record for row in rows] == [{"question": a, "answer": b} for a, b in table]


@given(st.binary(max_size=120), st.integers(10, 60))
def test_any_bytes_as_csv_are_counted_and_sliced_alike(folder, content, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_rows, "MAX_ROW_BYTES", limit)
        path = write(folder / "bytes.csv", b"a,b\n" + content)
        assert_every_range_agrees(path)
        range_digests(path, [(0, 2), (2, 2)])


def test_broken_csv_records_have_a_reason_and_the_line_they_begin_at(folder, monkeypatch):
    monkeypatch.setattr(raw_rows, "MAX_ROW_BYTES", 60)
    content = (
        b'q,a\n"two\nlines",1\nonly one field\n\nx,\xff\n"'
        + b"long " * 30
        + b'\nstill",2\ngood,"quo""ted"\n"'
        + b"z" * 70
    )
    rows = assert_every_range_agrees(write(folder / "broken.csv", content))
    assert [row.status for row in rows] == [
        "ok",
        "invalid_csv",
        "blank",
        "invalid_utf8",
        "too_large",
        "ok",
        "too_large",
    ]
    assert rows[0].record == {"q": "two\nlines", "a": "1"}
    assert rows[1].detail == "line 4: 1 fields, the header has 2"
    assert rows[4].detail.startswith("line 7: ")
    assert rows[5].record == {"q": "good", "a": 'quo"ted'}


def test_an_unterminated_quote_ends_and_later_rows_are_read(folder, monkeypatch):
    monkeypatch.setattr(raw_rows, "MAX_ROW_BYTES", 50)
    content = b'q,a\n"never closed,1\n' + b"filler,2\n" * 20
    rows = assert_every_range_agrees(write(folder / "open.csv", content))
    assert rows[0].record is None
    assert rows[-1].record == {"q": "filler", "a": "2"}


def test_tab_separated_files_are_read(folder):
    assert next(read_raw(write(folder / "t.tsv", b"a\tb\n1,2\t3\n"))).record == {"a": "1,2", "b": "3"}


@pytest.mark.parametrize(
    ("name", "dialect", "rows"),
    [
        ("backslash.csv", "auto", [None]),
        ("backslash.csv", "backslash", [('say "hi"', "a")]),
        ("quotes.tsv", "auto", [('"Hello" she said', "a"), ('"open', "c"), ("q4", "d")]),
        ("quotes.tsv", "tab_quoted", [None, None]),
    ],
)
def test_text_is_what_the_dialect_says_or_refused(name, dialect, rows):
    read = list(read_raw(str(CASES / "csv-tsv-quotes" / name), dialect=dialect))
    records = [row.record and (row.record["instruction"], row.record["output"]) for row in read]
    assert records == rows
    assert {row.status for row in read if row.record is None} <= {"invalid_csv"}
    assert count_rows(str(CASES / "csv-tsv-quotes" / name), dialect) == len(rows)


def test_equal_names_are_refused_in_every_kind_of_file(folder):
    table = pa.table([pa.array(["x"]), pa.array(["y"])], names=["a", "a"])
    pq.write_table(table, folder / "equal.parquet")
    with pa.OSFile(str(folder / "equal.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    write(folder / "equal.tsv", b"a\ta\n1\t2\n")
    names = [
        CASES / "csv-tsv-quotes" / "twice.csv",
        *(folder / f"equal.{kind}" for kind in ("parquet", "arrow", "tsv")),
    ]
    for path in map(str, names):
        for read in (count_rows, lambda name: list(read_raw(name)), lambda name: range_digests(name, [(0, 1)])):
            with pytest.raises(PoolFormatError, match=r"the (same )?name '(output|a)'"):
                read(path)
    (row,) = read_raw(write(folder / "equal.jsonl", b'{"b": {"a": 1, "a": 2}}'))
    assert (row.status, row.detail) == ("invalid_json", "the field 'a' stands twice in an object")


@pytest.mark.parametrize(
    ("record", "dialect", "problem"),
    [
        ('q, "a"', "comma", "a quotation mark stands in a field that is not quoted"),
        ('say "hi",a', "comma", "a quotation mark stands in a field that is not quoted"),
        ('q;5" pipe', "semicolon", "a quotation mark stands in a field that is not quoted"),
        ('q\t5" pipe', "tab_quoted", "a quotation mark stands in a field that is not quoted"),
        (r'"C:\new",a', "backslash", "a backslash stands before 'n'"),
        (r"C:\\\new,a", "backslash", "a backslash stands before 'n'"),
        (r'"C:\\new, \"x\"",a', "backslash", None),
        (r"say \"hi\",x\,y", "backslash", None),
        ('"a,\n""b""",""', "comma", None),
    ],
)
def test_a_field_that_the_reader_would_guess_at_is_refused(folder, record, dialect, problem):
    header = {"semicolon": "q;a", "tab_quoted": "q\ta"}.get(dialect, "q,a")
    end = "x;y" if dialect == "semicolon" else "x\ty" if dialect == "tab_quoted" else "x,y"
    path = write(folder / "guess.csv", f"{header}\n{record}\n{end}\n".encode())
    first, last = read_raw(path, dialect=dialect)
    assert last.record == {"q": "x", "a": "y"}
    if problem:
        assert first.status == "invalid_csv"
        assert problem in first.detail
    else:
        assert first.status == "ok"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", gzip.compress(b"q,a\nx,y\n", mtime=0), "compressed with gzip"),
        ("a.jsonl", lzma.compress(b"{}"), "compressed with xz"),
        ("a.tsv", b"PK\x03\x04rest", "a zip archive"),
        ("a.csv", "q,a\nx,y\n".encode("utf-16"), "UTF-16"),
        ("a.json", '[{"a": 1}]'.encode("utf-16"), "UTF-16"),
        ("a.csv", b'"q,a\nx,y\n', "header cannot be read"),
        ("a.json", b'{"data": [\n{"a": 1},\n{"a": 2}\n]}', "goes on in the next line"),
        ("a.jsonl", b'\xef\xbb\xbf{"data": [\r\n{"a": 1},\r\n{"a": 2}\r\n]}', "goes on in the next line"),
        ("a.jsonl", b'{\n  "a": 1\n}\n', "goes on in the next line"),
        ("a.jsonl", b'{"a": 1},\n{"a": 2},\n{"a": 3}', "goes on in the next line"),
        ("a.ndjson", b'["x",\n{"a": 1}]', "goes on in the next line"),
    ],
)
def test_a_file_that_is_something_else_than_its_name_says_is_refused_as_a_whole(folder, name, content, words):
    path = write(folder / name, content)
    for read in (count_rows, lambda path: list(read_raw(path)), lambda path: range_digests(path, [(0, 1)])):
        with pytest.raises(PoolFormatError, match=words) as refused:
            read(path)
        assert refused.value.fix


@given(
    table=st.lists(st.lists(st.text("ab \"',;\\", max_size=4), min_size=2, max_size=2), max_size=5),
    newline=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    limit=st.integers(30, 60),
)
def test_every_line_end_ends_a_record(folder, table, newline, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_rows, "MAX_ROW_BYTES", limit)
        lines = [b"q\ta", *("\t".join(fields).encode() for fields in table)]
        rows = assert_every_range_agrees(write(folder / "ends.tsv", newline.join(lines) + newline))
    assert [row.record for row in rows] == [{"q": question, "a": answer} for question, answer in table]


def test_a_bare_carriage_return_inside_quotes_is_text(folder):
    rows = assert_every_range_agrees(write(folder / "quoted.csv", b'q,a\r"two\rlines",1\rx,2\r\ny,3'))
    assert [row.record for row in rows] == [
        {"q": "two\rlines", "a": "1"},
        {"q": "x", "a": "2"},
        {"q": "y", "a": "3"},
    ]


def test_another_dialect_gives_other_digests(folder):
    path = write(folder / "same.csv", b"a,b\n1,2\n")
    first, second = (scan_ranges(path, [(0, 1)], dialect)[0] for dialect in ("comma", "backslash"))
    assert first.begins == second.begins
    assert first.digest != second.digest


# ---- Parquet ----


@pytest.mark.parametrize("row_group_size", [1, 7, 64, 1000])
def test_parquet_rows_are_read_from_any_position(folder, row_group_size):
    path = str(folder / f"{row_group_size}.parquet")
    table = pl.DataFrame({"n": range(200), "turns": [[{"role": "user", "content": str(i)}] for i in range(200)]})
    table.write_parquet(path, row_group_size=row_group_size)
    rows = list(read_raw(path))
    assert count_rows(path) == len(rows) == 200
    assert rows[123].record == {"n": 123, "turns": [{"role": "user", "content": "123"}]}
    for first_row in (0, 1, 6, 7, 63, 64, 65, 128, 199, 200, 500):
        (found,) = scan_ranges(path, [(first_row, 70)])
        assert list(read_raw(path, first_row, 70)) == rows[first_row : first_row + 70]
        assert list(read_raw(path, first_row, 70, found.begins)) == rows[first_row : first_row + 70]


def test_a_parquet_file_that_counts_other_rows_than_it_holds_is_refused(folder):
    path = folder / "count.parquet"
    pl.DataFrame({"a": [f"row {number}" for number in range(5)]}).write_parquet(path, statistics=False)
    good, said = path.read_bytes(), []
    for place in [place for place, byte in enumerate(good) if byte == 10]:  # a 5 in Parquet's numbers
        path.write_bytes(good[:place] + b"\x08" + good[place + 1 :])
        try:
            assert len(list(read_raw(str(path)))) == count_rows(str(path))
        except PoolFormatError as error:
            said.append(str(error))
    assert any("its footer says 4 rows, its row groups 5" in each for each in said)


def test_large_parquet_rows_are_quarantined(folder, monkeypatch):
    monkeypatch.setattr(raw_rows, "MAX_ROW_BYTES", 100)
    path = str(folder / "large.parquet")
    pl.DataFrame({"a": ["x", "y" * 101, "z"]}).write_parquet(path)
    assert [row.status for row in read_raw(path)] == ["ok", "too_large", "ok"]


def test_parquet_strings_that_are_not_utf8_are_quarantined(folder):
    offsets, data = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")
    column = pa.Array.from_buffers(pa.string(), 2, [None, offsets, data])
    pq.write_table(pa.table({"a": column}), folder / "bytes.parquet")
    good, bad = read_raw(str(folder / "bytes.parquet"))
    assert good.record == {"a": "a"}
    assert bad.status == "invalid_utf8"


# ---- Arrow ----


def save_as_datasets_does(folder, rows: int, shards: int = 2):
    """A folder as Hugging Face's `save_to_disk` writes it: IPC streams, `state.json`, `dataset_info.json`, a cache."""
    folder.mkdir()
    names = [f"data-{shard:05d}-of-{shards:05d}.arrow" for shard in range(shards)]
    for shard, name in enumerate([*names, "cache-0a1b.arrow"]):
        table = pa.table({"n": range(shard * rows, (shard + 1) * rows), "turns": [[{"role": "user"}]] * rows})
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_folder_saved_to_disk_is_read_through_its_arrow_files(tmp_path):
    folder = save_as_datasets_does(tmp_path / "saved", 150)
    look = look_into(str(folder))
    assert [path.rsplit("/", 1)[-1] for path in look.files] == [
        "data-00000-of-00002.arrow",
        "data-00001-of-00002.arrow",
    ]
    assert [path.rsplit("/", 1)[-1] for path in look.skipped] == ["cache-0a1b.arrow", "dataset_info.json", "state.json"]
    rows = list(read_raw(look.files[1]))
    assert count_rows(look.files[1]) == len(rows) == 150
    assert rows[0].record == {"n": 150, "turns": [{"role": "user"}]}
    for first_row in (0, 1, 63, 64, 69, 70, 149, 150, 500):
        assert list(read_raw(look.files[1], first_row, 70)) == rows[first_row : first_row + 70]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"_data_files": [{"filename": "0.arrow"}, {"filename": "1.arrow"}]}, r"not there: 1\.arrow"),
        ({"_data_files": [{"filename": "0.arrow"}], "_indices_data_files": [{"filename": "i.arrow"}]}, "indices"),
    ],
)
def test_a_saved_dataset_that_is_not_all_of_its_files_is_refused(tmp_path, state, words):
    table = pa.table({"prompt": ["q"], "completion": ["a"]})
    with pa.OSFile(str(tmp_path / "0.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(PoolFormatError, match=words) as refused:
        list_files(str(tmp_path))
    assert refused.value.fix


def test_arrow_files_of_both_kinds_give_the_rows_and_digests_of_parquet(tmp_path):
    table = pa.table({"a": [f"row {number}" for number in range(100)]})
    pq.write_table(table, tmp_path / "t.parquet")
    for name, new in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        with pa.OSFile(str(tmp_path / f"{name}.arrow"), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=30)
        path = str(tmp_path / f"{name}.arrow")
        assert list(read_raw(path)) == list(read_raw(str(tmp_path / "t.parquet")))
        assert range_digests(path, [(3, 40)]) == range_digests(str(tmp_path / "t.parquet"), [(3, 40)])


# ---- whole files ----


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-0.parquet"], ["test*", "train*"]),
        (["chat.train.jsonl", "chat.dev.jsonl"], ["chat.dev*", "chat.train*"]),
        (["train/a.arrow", "validation/a.arrow", "dataset_dict.json"], ["train", "validation"]),
        (["data/train-00000-of-00001.parquet", "data/test-0.parquet", "README.md"], ["data/test*", "data/train*"]),
        (["default/train/0.parquet", "default/test/0.parquet"], ["default/train", "default/test"]),
        (["pool.jsonl", "held-out.jsonl"], ["held-out*", "pool.jsonl"]),
        (["a.jsonl", "test.jsonl"], ["a.jsonl", "test*"]),
    ],
)
def test_a_folder_of_several_splits_needs_a_pattern(tmp_path, names, patterns):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(PoolFormatError, match="several splits") as refused:
        list_files(str(tmp_path))
    for pattern in patterns:
        written = f"{tmp_path}/{pattern}"
        assert f"`{written}`" in refused.value.fix
        assert list_files(written)


@pytest.mark.parametrize(
    ("data", "other"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], ["README.md", "data/notes.txt"]),
        (["data/train-a.jsonl", "data/train-b.jsonl"], [".cache/old.jsonl", "empty/notes.txt", "dataset_infos.json"]),
        (["default/train/0000.parquet"], ["default/README.md"]),
        (["train/a.arrow"], ["dataset_dict.json", "train/dataset_info.json"]),
    ],
)
def test_data_in_the_one_subfolder_that_has_some_are_found(tmp_path, data, other):
    memory = fsspec.filesystem("memory")
    for name in [*data, *other]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
        memory.pipe(f"{tmp_path}/{name}", b"{}")
    for folder in (str(tmp_path), f"memory://{tmp_path}"):
        look = look_into(folder)
        assert look.files == [f"{folder}/{name}" for name in data]
        assert look.skipped == sorted(f"{folder}/{name}" for name in other if name[0] != "." and name[:5] != "empty")


def test_data_in_several_subfolders_are_refused_with_the_paths_to_write(tmp_path):
    for name in ("main/train-0.jsonl", "main/test-0.jsonl", "socratic/train-0.jsonl", "images/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(PoolFormatError, match="several subfolders") as refused:
        list_files(str(tmp_path))
    assert f"`{tmp_path}/main`, `{tmp_path}/socratic`; if all" in str(refused.value.fix)


def test_a_folder_of_one_split_or_none_is_read_whole_and_names_what_it_skips(tmp_path):
    data = ["constraint.jsonl", "latest.jsonl", "train-1.jsonl", "train-2.jsonl"]
    other = ["README.md", "dataset_info.json", "dataset_infos.json", "notes.txt", "state.json"]
    for name in [*data, *other]:
        (tmp_path / name).write_bytes(b"{}")
    (tmp_path / "more").mkdir()
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "rows.jsonl").write_bytes(b"{}")
    look = look_into(str(tmp_path))
    assert [path.rsplit("/", 1)[-1] for path in look.files] == data
    assert sorted(path.rsplit("/", 1)[-1] for path in look.skipped) == sorted([*other, "extra"])
    assert look_into(str(tmp_path / "*.json*")).files == look.files
    assert look_into(str(tmp_path / "state.json")) == ([str(tmp_path / "state.json")], [])


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstandard.ZstdCompressor().compress)],
)
def test_compressed_files_are_read(folder, suffix, compress):
    content = b'{"a": 1}\n\n{"a": 2}'
    path = write(folder / f"c.jsonl{suffix}", compress(content))
    assert [row.status for row in assert_every_range_agrees(path)] == ["ok", "blank", "ok"]
    assert range_digests(path, [(0, 3)]) == range_digests(write(folder / "c.jsonl", content), [(0, 3)])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.jsonl", None),
        ("cut.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 5000, mtime=0)[:60]),
        ("not.jsonl.gz", b"plain"),
        ("not.parquet", b"plain"),
        ("empty.parquet", b""),
        ("what.txt", b"{}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_cannot_be_read_as_a_whole_is_one_error_that_names_it(folder, name, content):
    path = folder / name
    if content is not None:
        path.write_bytes(content)
    for read in (count_rows, lambda each: list(read_raw(each)), lambda each: range_digests(each, [(0, 9999)])):
        with pytest.raises(PoolFormatError, match=name):
            read(str(path))


def test_unknown_protocols_are_a_clear_error():
    with pytest.raises(PoolFormatError, match="nosuch"):
        count_rows("nosuch://bucket/file.jsonl")


def test_remote_paths_work_as_local_ones():
    memory = fsspec.filesystem("memory")
    memory.pipe("/pool/b.jsonl", b'{"a": 1}\n')
    memory.pipe("/pool/a.jsonl", b'{"a": 2}\n{"a": 3}\n')
    files = list_files("memory://pool/*.jsonl")
    assert [file.rsplit("/", 1)[-1] for file in files] == ["a.jsonl", "b.jsonl"]
    assert [count_rows(file) for file in files] == [2, 1]
    assert len(list(read_raw(files[0], 1))) == 1
    assert file_digest(files[0]) != file_digest(files[1])


def test_files_inside_an_archive_work_as_local_ones(tmp_path):
    content = {"data/b.jsonl": b'{"a": 1}\n{"a": 2}\n', "data/a.csv": b"a\n1\n", "data/more/c.txt": b"x"}
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name, content_of in content.items():
            archive.writestr(name, content_of)
    write(tmp_path / "b.jsonl", content["data/b.jsonl"])
    inside = {name: f"zip://{name}::{tmp_path}/all.zip" for name in content}
    jsonl, table = inside["data/b.jsonl"], inside["data/a.csv"]
    assert list_files(f"zip://data::{tmp_path}/all.zip") == [table, jsonl]
    assert list_files(f"zip://data/*.jsonl::{tmp_path}/all.zip") == list_files(jsonl) == [jsonl]
    assert files_below(f"zip://data::{tmp_path}/all.zip") == [table, jsonl, inside["data/more/c.txt"]]
    assert files_below(f"zip://other::{tmp_path}/all.zip") == []
    assert [row.record for row in assert_every_range_agrees(jsonl)] == [{"a": 1}, {"a": 2}]
    assert [row.record for row in assert_every_range_agrees(table)] == [{"a": "1"}]
    assert file_digest(jsonl) == file_digest(str(tmp_path / "b.jsonl"))
    assert range_digests(jsonl, [(0, 1)]) == range_digests(str(tmp_path / "b.jsonl"), [(0, 1)])


def test_files_are_listed_in_a_stable_order_and_paths_stay_as_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("b.jsonl", "a.parquet", "c.csv.gz", "notes.md", "[odd].jsonl"):
        (tmp_path / "data" / name).write_bytes(b"")
    assert list_files("data/*.jsonl") == ["data/[odd].jsonl", "data/b.jsonl"]
    assert list_files("data") == ["data/[odd].jsonl", "data/a.parquet", "data/b.jsonl", "data/c.csv.gz"]
    assert list_files("data/[odd].jsonl") == ["data/[odd].jsonl"]
    for nothing in ("data/*.tsv", "data/missing.jsonl", "nowhere"):
        with pytest.raises(PoolFormatError, match="No data file"):
            list_files(nothing)


# ---- digests and places ----


def test_rows_before_a_known_place_are_not_read(folder):
    lines = [b'{"a": %d}\n' % number for number in range(6)]
    path = write(folder / "known.jsonl", b"".join(lines))
    (found,) = scan_ranges(path, [(4, 2)])
    assert found.begins == (sum(map(len, lines[:4])), 4)
    write(folder / "known.jsonl", b"?" * found.begins.offset + b"".join(lines[4:]))
    assert [(row.number, row.record) for row in read_raw(path, 4, 2, found.begins)] == [(5, {"a": 4}), (6, {"a": 5})]


def test_an_edited_row_changes_the_digest_of_its_range_only(folder):
    lines = [json.dumps({"a": i}).encode() for i in range(10)]
    ranges = [(0, 4), (4, 4), (8, 2)]
    before = range_digests(write(folder / "before.jsonl", b"\n".join(lines)), ranges)
    lines[5] = b'{"a": "edited"}'
    after = range_digests(write(folder / "after.jsonl", b"\n".join(lines)), ranges)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_appended_rows_leave_earlier_ranges_as_they_were(folder):
    short = write(folder / "short.jsonl", b'{"a": 1}\n{"a": 2}')
    long = write(folder / "long.jsonl", b'{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    assert range_digests(short, [(0, 2)]) == range_digests(long, [(0, 2)])
    assert range_digests(short, [(0, 3)]) != range_digests(long, [(0, 3)])


@given(rows=st.lists(st.text(st.characters(codec="utf-8"), max_size=4), min_size=1, max_size=8), data=st.data())
def test_range_digests_depend_on_the_rows_of_the_range_only(folder, rows, data):
    cut = data.draw(st.integers(0, len(rows)))
    records = [json.dumps({"a": row}) for row in rows]
    text = write(folder / "range.jsonl", "\n".join(records).encode())
    pl.DataFrame({"a": rows}).write_parquet(folder / "range.parquet")
    head = write(folder / "head.jsonl", "\n".join(records[:cut]).encode())
    pl.DataFrame({"a": rows[:cut]}, schema={"a": pl.String}).write_parquet(folder / "head.parquet")
    for whole, part in ((text, head), (str(folder / "range.parquet"), str(folder / "head.parquet"))):
        assert range_digests(whole, [(0, cut)]) == range_digests(part, [(0, cut)])
    first, second = range_digests(text, [(0, cut), (cut, len(rows) - cut)])
    assert second == range_digests(text, [(cut, len(rows) - cut)])[0]
    assert (first == second) == (rows[:cut] == rows[cut:])


def test_another_csv_header_changes_every_range(folder):
    before = range_digests(write(folder / "h1.csv", b"prompt,completion\na,b\nc,d\n"), [(0, 1), (1, 1)])
    after = range_digests(write(folder / "h2.csv", b"completion,prompt\na,b\nc,d\n"), [(0, 1), (1, 1)])
    assert not set(before) & set(after)


def test_ranges_out_of_order_are_a_mistake_of_the_caller(folder):
    path = write(folder / "order.jsonl", b"{}\n{}\n")
    with pytest.raises(ValueError, match="ascend"):
        range_digests(path, [(1, 1), (0, 1)])


def test_a_folder_that_lacks_a_numbered_part_of_a_table_is_refused(tmp_path):
    for name in ("train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl", "more.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(PoolFormatError, match=r"Of the 3 files .* 1 are not there: train-00001"):
        list_files(str(tmp_path))
    assert len(list_files(f"{tmp_path}/*.jsonl")) == 3, "a pattern says that these are meant"
    (tmp_path / "train-00001-of-00003.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert len(list_files(str(tmp_path))) == 4
