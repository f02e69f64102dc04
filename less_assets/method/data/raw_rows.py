"""What reading a row of a data file yields, whatever the file's kind.

Belongs here: the raw row, the bytes of one, where it begins, and when it is too large. Files are `row_files.py`, their
kinds `text_rows.py`, `json_array.py` and `parquet_rows.py`.
"""

from dataclasses import dataclass
from typing import NamedTuple

MAX_ROW_BYTES = 1_000_000
"""Rows with more bytes are not parsed but reported as `too_large`: at 4 bytes a token far beyond any context."""


BLOCK_BYTES = 1 << 20
"""What is read at once where rows do not matter."""


@dataclass(frozen=True)
class Line:
    """A line, or an element of an array.

    Attributes:
        content: Its bytes, or their first ones (`MAX_ROW_BYTES` at least).
        size: Of all its bytes without line end.
        quotes: Quotation marks in a line; 0 of an element.
        digest: blake2b-128 of all of it.
    """

    content: bytes
    size: int
    quotes: int
    digest: bytes


@dataclass(frozen=True)
class RawRow:
    """One physical row of a file.

    Attributes:
        number: 1-based row in the file: the line of a JSONL file, the element of a JSON array, the record after the
            header of a CSV file, the row of a Parquet file.
        record: Field name to value; None if the row cannot be read.
        status: "ok", or why there is no record: "blank", "invalid_json", "invalid_csv", "invalid_utf8",
            "wrong_type", "too_large".
        detail: The same for a person; None if the row is ok or blank.
    """

    number: int
    record: dict[str, object] | None
    status: str = "ok"
    detail: str | None = None


class Place(NamedTuple):
    """Where a row of a text file begins; 0 and 0 for Parquet files, whose rows are found by their footer.

    Attributes:
        offset: Bytes before it, of the content after decompression.
        line: Lines before it, or elements of a JSON array.
    """

    offset: int = 0
    line: int = 0


def too_large(size: int) -> str:
    """Why a row of so many bytes is not parsed."""
    return f"{size:,} bytes, more than {MAX_ROW_BYTES:,}"
