"""Elements of a file that is one JSON array, as rows, in memory that does not grow with the file.

Belongs here: where elements begin and end. `text_rows.py` parses each, as it does a line.
"""

import hashlib
import io
import re

from less_assets.errors import PoolFormatError
from less_assets.method.data import raw_rows
from less_assets.method.data.raw_rows import BLOCK_BYTES, Line, Place

_BEGIN = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[")
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
# What matters next: between elements a comma too; a quotation mark only where the block ends inside its string.
_IN_ARRAY = re.compile(rb'[^"\[\]{},]*+(?:' + _STRING + rb'[^"\[\]{},]*+)*+([\[\]{},"]?)', re.DOTALL)
_IN_ELEMENT = re.compile(rb'[^"\[\]{}]*+(?:' + _STRING + rb'[^"\[\]{}]*+)*+([\[\]{}"]?)', re.DOTALL)
_IN_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+("?)', re.DOTALL)


class ArrayElements:
    """Elements of an array, each as a `Line`; of an oversized one only the start is kept.

    Brackets and strings say where an element ends, so that one which is no JSON spoils no other as long as they match.
    White space around elements is no part of them.

    Args:
        stream: Bytes after decompression, beginning with an array.
        path: What errors call it.
    """

    def __init__(self, stream: io.BufferedIOBase, path: str) -> None:
        self._stream, self._path = stream, path
        self._block, self._offset, self._element = b"", 0, 0
        self._depth, self._in_string = 0, False
        self._fill()
        begin = _BEGIN.match(self._block)
        assert begin is not None
        self._at = begin.end()

    @property
    def place(self) -> Place:
        """Where the next element begins; its `line` counts elements."""
        return Place(self._offset + self._at, self._element)

    def skip_to(self, begins: tuple[int, int]) -> None:
        """Go on with the element that begins there; streams that cannot seek are read up to it."""
        offset, self._element = begins
        if self._stream.seekable():
            self._stream.seek(offset)
            self._block, self._offset = b"", offset
        while self._offset + len(self._block) < offset and self._fill():
            pass
        self._at = offset - self._offset

    def _fill(self) -> bool:
        """Take the next block; false at the end. None ends in the middle of an escape."""
        self._offset += len(self._block)
        self._block, self._at = self._stream.read(BLOCK_BYTES), 0
        while self._block.endswith(b"\\") and (byte := self._stream.read(1)):
            self._block += byte
        return bool(self._block)

    def _end(self) -> int | None:
        """Where in the block the next element ends, at a comma or the array's bracket; None: not in this block."""
        at = self._at
        while at < len(self._block):
            inside = _IN_STRING if self._in_string else _IN_ELEMENT if self._depth else _IN_ARRAY
            match = inside.match(self._block, at)
            assert match is not None  # it matches the empty text
            at, found = match.end(), match[1]
            if found == b'"':
                self._in_string = not self._in_string
            elif found in (b"[", b"{"):
                self._depth += 1
            elif found and self._depth:
                self._depth -= 1
            elif found in (b",", b"]"):
                return at - 1
        return None

    def __iter__(self) -> "ArrayElements":
        return self

    def __next__(self) -> Line:
        begins, kept, size, digest, held = self.place, b"", 0, hashlib.blake2b(digest_size=16), b""
        while True:
            end = self._end()
            piece = held + self._block[self._at : end]
            piece = piece if size else piece.lstrip()
            body = piece.rstrip()
            held = piece[len(body) :]  # inside the element, unless it ends here
            size += len(body)
            digest.update(body)
            if len(kept) <= raw_rows.MAX_ROW_BYTES:
                kept += body
            if end is not None:
                break
            if not self._fill():
                raise self._broken(
                    f"does not end: element {begins.line + 1} is cut off, or a bracket or a string in it stays open",
                    begins,
                )
        if self._block[end : end + 1] == b",":
            self._at = end + 1
        elif size:
            self._at = end
        else:
            self._refuse_what_follows(end + 1)
            raise StopIteration
        self._element += 1
        return Line(kept, size, 0, digest.digest())

    def _refuse_what_follows(self, at: int) -> None:
        rest = self._block[at:]
        while rest or (rest := self._stream.read(BLOCK_BYTES)):
            if rest.strip():
                raise self._broken(f"ends after element {self._element}, and something follows", self.place)
            rest = b""

    def _broken(self, how: str, place: Place) -> PoolFormatError:
        return PoolFormatError(
            f"The JSON array {how}.",
            where=f"{self._path}, from byte {place.offset:,} on",
            fix="write the file again; in a .jsonl file, one object a line, a broken row spoils no other",
        )
