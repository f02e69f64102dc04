"""Files that name rows of the pool which shall not be used, each with a reason.

Belongs here: reading such files. Not here: what leaves the rows out (`reading/excluded.py`).
"""

import re
from collections.abc import Sequence

from less_assets.errors import PoolFormatError
from less_assets.method.data.row_files import list_files, read_raw

_ID = re.compile(r"[0-9a-f]{32}")
_FIX = 'a line is {"example_id": "32 hex digits", "reason": "text"}, as the selection report copies it'


def read_excluded(paths: Sequence[str]) -> dict[str, str]:
    """Read which rows to leave out.

    Args:
        paths: JSON lines with `example_id` and, if there is one, `reason`; other keys are not looked at. Also patterns,
            folders and URLs, as for sources of the pool.

    Returns:
        example_id -> reason, in the order of the files; where an id is named twice the first reason holds.

    Raises:
        PoolFormatError: A file is not there or cannot be read, or a line names no row.
    """
    reasons: dict[str, str] = {}
    for path in (file for named in paths for file in list_files(named)):
        for row in read_raw(path):
            if row.status == "blank":
                continue
            record = row.record or {}
            name, reason = record.get("example_id"), record.get("reason")
            if row.record is None:
                trouble = f"is no JSON object: {row.detail or row.status}"
            elif not isinstance(name, str) or not _ID.fullmatch(name):
                trouble = "names no example_id"
            elif reason is not None and not isinstance(reason, str):
                trouble = "has a reason that is no text"
            else:
                reasons.setdefault(name, reason or "")
                continue
            raise PoolFormatError(f"A line of a file of `exclude` {trouble}.", where=f"{path}:{row.number}", fix=_FIX)
    return reasons
