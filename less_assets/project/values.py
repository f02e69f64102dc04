"""Values of a project file that are more than plain text and numbers: names, places, sizes, harness tasks.

Belongs here: how one value is checked and brought into one form. Which keys have which values is `sections.py`.
"""

import datetime
import glob
import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainValidator, StringConstraints, ValidationInfo
from pydantic_core import PydanticCustomError

Harness = str | dict[str, Any] | None
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b)", re.IGNORECASE)
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def _checked_name(value: str) -> str:
    if not _NAME.fullmatch(value) or len(value) > 64:
        raise PydanticCustomError(
            "name", "a name has at most 64 of a-z, 0-9, '_', '.', '-' and begins with a letter or digit"
        )
    return value


def is_url(path: str) -> bool:
    """Whether a location is a URL, not a path of this machine."""
    return "://" in path or "::" in path


def _located(path: str, info: ValidationInfo) -> str:
    """An absolute path, relative ones being meant from the project file's folder; URLs stay as they are."""
    if "\0" in path:
        raise PydanticCustomError("path", "a path has no zero bytes")
    if is_url(path):
        return path
    folder = str((info.context or {}).get("folder", Path.cwd()))
    # The pattern is the user's part only: a folder called `data [old]` is no pattern.
    prefix = glob.escape(folder) if glob.has_magic(path) else folder
    return os.path.normpath(os.path.join(prefix, os.path.expanduser(path)))


def _tracking_uri(uri: str, info: ValidationInfo) -> str:
    """An address of MLflow; a database file of a relative path is meant from the project file's folder."""
    if not re.match(r"[a-z][a-z0-9+-]*:|databricks$|uc$", uri):
        raise PydanticCustomError("tracking_uri", "must be a URI: sqlite:///mlflow.db for a file, or http://host:5000")
    kind, file = "sqlite:///", uri.removeprefix("sqlite:///")
    return uri if file == uri or file.startswith("/") else f"{kind}{_located(file, info)}"


def _day(value: object) -> object:
    """A date, also as text: YAML reads `2025-01-01` as a date, and in quotes as text."""
    try:
        return datetime.date.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        raise PydanticCustomError("day", "must be a date such as 2025-01-31") from None


def _located_model(base: str, info: ValidationInfo) -> str:
    """A folder as absolute path; Hugging Face ids and `gguf:` references as they are."""
    if base.startswith("gguf:"):
        if not re.fullmatch(r"gguf:[A-Za-z_][\w.]*/[^\0]+\.gguf", base):
            raise PydanticCustomError("gguf", "write gguf:package/file.gguf for a file inside an installed package")
        return base
    folder = _located(base, info)
    return folder if base.startswith((".", "/", "~")) or os.path.isdir(folder) else base


def _size(value: object) -> object:
    """Bytes from a number or from text such as "2 GB"."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        return int(float(match[1]) * _UNITS[match[2].lower()])
    if isinstance(value, str):
        raise PydanticCustomError("size", 'must be a size such as "2 GB", "512 MiB" or a number of bytes')
    return value


def _auto_as_none(value: object) -> object:
    return None if value == "auto" else value


def _harness(value: object, info: ValidationInfo) -> Harness:
    """A harness task's name, the absolute path of its YAML file, or the task itself; None for no harness task."""
    if value is None:
        return None
    if isinstance(value, str) and value:
        return _located(value, info) if value.endswith((".yaml", ".yml")) else value
    if isinstance(value, dict) and value and _is_json(value):
        return value
    raise PydanticCustomError("harness", "must be a task name, the path of a .yaml file, or a mapping of plain data")


def _is_json(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, float):
        return value - value == 0  # neither infinite nor not-a-number
    return value is None or isinstance(value, bool | int)


def _number_or_names(value: object) -> float | list[str]:
    """A number of at least 1, or a list of names."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value < float("inf"):
        return float(value)
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return [_checked_name(name) for name in value]
    raise PydanticCustomError("candidates", "must be a number of at least 1, or a list of names of recipes")


Name = Annotated[str, AfterValidator(_checked_name)]
Text = Annotated[str, StringConstraints(min_length=1)]
Location = Annotated[Text, AfterValidator(_located)]
TrackingUri = Annotated[Text, AfterValidator(_tracking_uri)]
Day = Annotated[datetime.date, BeforeValidator(_day)]
ModelReference = Annotated[Text, AfterValidator(_located_model)]
Size = Annotated[int, BeforeValidator(_size)]
OptionalSize = Annotated[int | None, BeforeValidator(_size)]
Candidates = Annotated[float | list[str], PlainValidator(_number_or_names)]
AutoCount = Annotated[int | None, BeforeValidator(_auto_as_none)]
HarnessTask = Annotated[Harness, PlainValidator(_harness)]
