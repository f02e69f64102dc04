"""Rows of text: JSON lines and CSV records, with their digests and places, in memory that does not grow with the file.

Belongs here: bytes of a stream to raw rows. Opening files is `row_files.py`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from less_assets.method.data import raw_rows
from less_assets.method.data.conversations import parsed_json
from less_assets.method.data.json_array import ArrayElements
from less_assets.method.data.raw_rows import BLOCK_BYTES, Line, Place, RawRow, too_large

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

DialectName = Literal["comma", "semicolon", "backslash", "tab", "tab_quoted"]


class Dialect(NamedTuple):
    """How records and fields are told apart in a CSV or TSV file.

    Attributes:
        delimiter: Between fields.
        quoted: Whether quotation marks around a field protect delimiters and line ends inside it; else they are text.
        escape: What stands before a quotation mark inside a quoted field; None: the mark is doubled.
    """

    delimiter: str
    quoted: bool = True
    escape: str | None = None


DIALECTS: dict[DialectName, Dialect] = {
    "comma": Dialect(","),  # RFC 4180
    "semicolon": Dialect(";"),
    "backslash": Dialect(",", escape="\\"),
    "tab": Dialect("\t", quoted=False),  # IANA text/tab-separated-values
    "tab_quoted": Dialect("\t"),
}
_QUOTED = r'"[^"]*+(?:""[^"]*+)*+"'
_QUOTED_ESCAPED = r'"[^"\\]*+(?:\\["\\,\r\n][^"\\]*+)*+"'
_NOTHING_ESCAPED = re.compile(r'(?<!\\)(?:\\\\)*+\\([^"\\,\r\n])')
_ENDED_LINES = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


def _record_of(dialect: Dialect) -> re.Pattern[str]:
    """What a record of a dialect with quotation marks looks like: they are around a field, or there are none."""
    quoted, plain = _QUOTED, rf'[^"{dialect.delimiter}\r\n]*+'
    if dialect.escape:
        quoted, plain = _QUOTED_ESCAPED, r'[^"\\,\r\n]*+(?:\\["\\,][^"\\,\r\n]*+)*+'
    return re.compile(f"(?:{quoted}|{plain})(?:{dialect.delimiter}(?:{quoted}|{plain}))*+[\r\n]*")


_RECORDS = {name: _record_of(dialect) for name, dialect in DIALECTS.items() if dialect.quoted}


class Lines:
    r"""Lines of a stream, ended by `\n`, `\r\n` or `\r`; of an oversized line only the start is kept.

    Args:
        stream: Bytes after decompression.
        escape: What makes a quotation mark after it count for nothing.
    """

    def __init__(self, stream: io.BufferedIOBase, escape: str | None = None) -> None:
        self._stream, self._offset, self._line = stream, 0, 0
        self._escaped_quote = f'{escape}"'.encode() if escape else None
        self._read_ahead: deque[bytes] = deque()

    @property
    def place(self) -> Place:
        """Where the next line begins."""
        return Place(self._offset, self._line)

    def skip_to(self, begins: tuple[int, int]) -> None:
        """Go on with the line that begins there; streams that cannot seek are read up to it."""
        offset, self._line = begins
        if self._stream.seekable():
            self._read_ahead.clear()
            self._stream.seek(offset)
        else:
            left = offset - self._offset
            while left and (block := self._next_block(min(left, BLOCK_BYTES))):
                if len(block) > left:
                    self._read_ahead.appendleft(block[left:])
                left -= min(left, len(block))
        self._offset = offset

    def _next_block(self, size: int) -> bytes:
        return self._read_ahead.popleft() if self._read_ahead else self._stream.read(size)

    def _piece(self) -> bytes:
        """The next line, or as much of it as one reading gives; empty at the end."""
        if not self._read_ahead:
            # Two bytes more than the limit: room for `\r\n`.
            block = self._stream.readline(raw_rows.MAX_ROW_BYTES + 2)
            first = block.find(b"\r")
            if first < 0 or (first == len(block) - 2 and block.endswith(b"\n")):  # nearly every line there is
                return block
            block += _to_line_end(self._stream, block)
            self._read_ahead.extend(_ENDED_LINES.findall(block))
        return self._read_ahead.popleft() if self._read_ahead else b""

    def __iter__(self) -> Iterator[Line]:
        return self

    def __next__(self) -> Line:
        piece, kept = self._piece(), b""
        if not piece:
            raise StopIteration
        digest, size, quotes = hashlib.blake2b(digest_size=16), 0, 0
        is_first = not self._offset
        while piece:
            if size <= raw_rows.MAX_ROW_BYTES:
                kept += piece
            self._offset += len(piece)
            digest.update(piece.removesuffix(b"\n"))
            size += len(piece.removesuffix(b"\n").removesuffix(b"\r"))
            quotes += piece.count(b'"')
            if self._escaped_quote:
                quotes -= piece.count(self._escaped_quote)
            piece = b"" if piece.endswith((b"\n", b"\r")) else self._piece()
        self._line += 1
        if is_first:
            kept = kept.removeprefix(BYTE_ORDER_MARK)
        return Line(kept, size, quotes, digest.digest())


def _to_line_end(stream: io.BufferedIOBase, block: bytes) -> bytes:
    r"""What follows a block that ends in `\r`, so that it is not cut off between `\r` and `\n`."""
    more = b""
    while (more or block).endswith(b"\r") and (byte := stream.read(1)):
        more += byte
    return more


def count_lines(stream: io.BufferedIOBase) -> int:
    """Number of lines; the last one need not end."""
    lines, last = 0, b"\n"
    while block := stream.read(BLOCK_BYTES):
        block += _to_line_end(stream, block)
        lines += block.count(b"\n")
        if b"\r" in block:
            lines += block.count(b"\r") - block.count(b"\r\n")
        last = block
    return lines + (not last.endswith((b"\n", b"\r")))


def read_json(lines: Lines | ArrayElements, first_row: int, begins: tuple[int, int] | None) -> Iterator[RawRow]:
    """The rows from `first_row` on, one of each line or element; `begins` says where that is, if it is known."""
    _skip(lines, first_row, begins)
    for index, line in enumerate(lines, start=first_row + 1):
        if line.size > raw_rows.MAX_ROW_BYTES:
            yield RawRow(index, None, "too_large", too_large(line.size))
        elif not line.content.strip():
            yield RawRow(index, None, "blank")
        else:
            yield _parse_json(index, line.content)


def _skip(rows: Lines | ArrayElements | CsvRecords, count: int, begins: tuple[int, int] | None) -> None:
    """Leave out so many rows: go to where they end, if that is known."""
    if begins is not None:
        rows.skip_to(begins)
    else:
        for _ in itertools.islice(rows, count):
            pass


def _parse_json(number: int, line: bytes) -> RawRow:
    try:
        record = parsed_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RawRow(number, None, "invalid_utf8", f"byte {line[error.start]:#04x} at byte {error.start} of the row")
    except (ValueError, RecursionError) as error:
        return RawRow(
            number, None, "invalid_json", f"{error}" if isinstance(error, ValueError) else "nested too deeply"
        )
    if not isinstance(record, dict):
        return RawRow(number, None, "wrong_type", f"a JSON object is expected, not {type(record).__name__}")
    return RawRow(number, record)


def repeated(names: Iterable[str]) -> list[str]:
    """Names that stand more than once, in order of first sight."""
    return [name for name, count in Counter(names).items() if count > 1]


@dataclass(frozen=True)
class CsvRecord:
    """A record: its fields (None: not readable, see `error`), its first line, its bytes, and their digest."""

    fields: list[str] | None
    line: int
    size: int
    error: str | None
    digest: bytes


class CsvRecords:
    """Records of a CSV stream with what they are made of; an oversized record costs no memory and shifts nothing.

    What the dialect does not allow makes an unreadable record, never another text.
    """

    def __init__(self, stream: io.BufferedIOBase, dialect: DialectName) -> None:
        # An unterminated quote ends as an error after so many characters instead of swallowing the rest of the file.
        csv.field_size_limit(raw_rows.MAX_ROW_BYTES)
        self._dialect, self._record = DIALECTS[dialect], _RECORDS.get(dialect)
        self._lines = Lines(stream, escape=self._dialect.escape)
        self._reader = csv.reader(
            self._feed(),
            delimiter=self._dialect.delimiter,
            quoting=csv.QUOTE_MINIMAL if self._dialect.quoted else csv.QUOTE_NONE,
            escapechar=self._dialect.escape,
            doublequote=self._dialect.escape is None,
            strict=True,
        )
        self._begin_record()

    def _begin_record(self) -> None:
        self._first_line, self._size, self._digest = self.place.line + 1, 0, hashlib.blake2b(digest_size=16)
        self._text = ""

    @property
    def place(self) -> Place:
        """Where the next record begins."""
        return self._lines.place

    def skip_to(self, begins: tuple[int, int]) -> None:
        """Go on with the record that begins there."""
        self._lines.skip_to(begins)
        self._begin_record()

    def _feed(self) -> Iterator[str]:
        for line in self._lines:
            self._size += line.size
            self._digest.update(line.digest)
            if line.size > raw_rows.MAX_ROW_BYTES:
                # All that the reader needs to know of it is whether a quoted field goes on in the next line.
                yield '"\n' if line.quotes % 2 and self._dialect.quoted else "\n"
            else:
                text = line.content.decode("utf-8", errors="surrogateescape")
                self._text += text if self._size <= raw_rows.MAX_ROW_BYTES else ""
                yield text

    def __iter__(self) -> Iterator[CsvRecord]:
        return self

    def __next__(self) -> CsvRecord:
        fields, error = None, None
        try:
            fields = next(self._reader)
        except csv.Error as problem:
            error = str(problem)
        if fields and self._size <= raw_rows.MAX_ROW_BYTES and not self._is_written_right():
            fields, error = None, self._what_is_wrong()
        record = CsvRecord(fields, self._first_line, self._size, error, self._digest.digest())
        self._begin_record()
        return record

    def _is_written_right(self) -> bool:
        """Whether the record is what the dialect allows: Python's reader takes some other things, and guesses."""
        special = '"' in self._text or (self._dialect.escape is not None and self._dialect.escape in self._text)
        return not special or self._record is None or self._record.fullmatch(self._text) is not None

    def _what_is_wrong(self) -> str:
        if self._dialect.escape and (other := _NOTHING_ESCAPED.search(self._text)):
            return f"a backslash stands before {other[1]!r}, and what that means is not known"
        return "a quotation mark stands in a field that is not quoted"


def read_csv_records(
    records: CsvRecords, names: list[str], first_row: int, begins: tuple[int, int] | None
) -> Iterator[RawRow]:
    """The records from `first_row` on, after the header `names`; `begins` says where that is, if it is known."""
    _skip(records, first_row, begins)
    for number, record in enumerate(records, start=first_row + 1):
        yield _csv_row(number, names, record)


def _csv_row(number: int, names: list[str], record: CsvRecord) -> RawRow:
    at = f"line {record.line}: "
    if record.size > raw_rows.MAX_ROW_BYTES:
        return RawRow(number, None, "too_large", at + too_large(record.size))
    if record.fields is None:
        return RawRow(number, None, "invalid_csv", at + str(record.error))
    if not record.fields:
        return RawRow(number, None, "blank")
    if any(not _is_text(field) for field in record.fields):
        return RawRow(number, None, "invalid_utf8", at + "a field is not UTF-8")
    if len(record.fields) != len(names):
        return RawRow(number, None, "invalid_csv", at + f"{len(record.fields)} fields, the header has {len(names)}")
    return RawRow(number, dict(zip(names, record.fields, strict=True)))


def _is_text(field: str) -> bool:
    try:
        field.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
