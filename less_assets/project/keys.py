"""Sections and keys of a YAML file: how they are documented, checked, and how errors in them are told.

Belongs here: what holds for any key. Which keys there are is `sections.py`; how YAML is parsed safely `yaml_file.py`.
"""

import difflib
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from less_assets.project.yaml_file import KeyPath, MarkedData, Problem


@dataclass(frozen=True)
class BrokenRule:
    """A rule between keys that does not hold: key path within the section, what is wrong, what to do."""

    path: KeyPath
    what: str
    fix: str


def setting(
    default: Any,
    description: str,
    *,
    type: str | None = None,
    unit: str | None = None,
    source: str | None = None,
    shown: str | None = None,
    **limits: Any,
) -> Any:
    """A documented key; `...` as default makes it required.

    Args:
        default: Default value, as it comes out of validation; or a function that makes it from the keys above it that
            are valid, by name.
        description: One sentence, without full stop.
        type: How to name the type, where the annotation does not say it well.
        unit: Unit of the value.
        source: Where the default comes from.
        shown: How the default is written in a file, if otherwise than its value.
        **limits: pydantic's: `gt`, `ge`, `lt`, `le`, `min_length`, `alias`.
    """
    extra: dict[str, Any] = {"type": type, "unit": unit, "source": source, "shown": shown}
    made = {"default_factory": default} if callable(default) else {"default": default}
    return Field(**made, description=description, json_schema_extra=extra, **limits)


class Section(BaseModel):
    """A part of a file: unknown keys are errors, values are not converted behind the user's back."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def _broken_rules(self) -> Iterator[BrokenRule]:
        """Rules between the section's keys that do not hold."""
        yield from ()

    @model_validator(mode="after")
    def _rules_hold(self) -> "Section":
        broken = list(self._broken_rules())
        if broken:
            raise PydanticCustomError("rules", "rules between keys do not hold", {"broken": broken})
        return self

    def given(self, *keys: str) -> list[str]:
        """Those of the keys that the file states, in the order asked."""
        return [key for key in keys if key in self.model_fields_set]


def explain(error: ValidationError, marked: MarkedData, schema: type[Section]) -> Iterator[Problem]:
    """Put pydantic's errors in words that a person can act on.

    Args:
        error: What validation raised.
        marked: The data that was validated, with its lines.
        schema: The section that stands for the whole file.
    """
    errors = error.errors(include_url=False)
    unknown = [broken["loc"] for broken in errors if broken["type"] == "extra_forbidden"]
    for broken in errors:
        path: KeyPath = broken["loc"]
        if broken["type"] == "missing" and any(_is_misspelt(path, other) for other in unknown):
            continue
        if broken["type"] == "default_factory_not_called":
            continue  # a key above it is wrong, which is told
        if broken["type"] == "rules":
            for rule in broken["ctx"]["broken"]:
                full = (*path, *rule.path)
                yield Problem(marked.where(full), f"{shown_path(full)}: {rule.what}", rule.fix)
            continue
        if broken["type"] == "invalid_key":
            path = (*path[:-1], str(path[-1])) if path else path
        what, fix = _in_words(broken, path, schema)
        yield Problem(marked.where(path), f"{shown_path(path)}: {what}", fix)


def _is_misspelt(path: KeyPath, unknown: KeyPath) -> bool:
    """Whether an unknown key of the same section is probably the one that is missing."""
    return path[:-1] == unknown[:-1] and bool(
        difflib.get_close_matches(str(unknown[-1])[:100], [str(path[-1])], cutoff=0.5)
    )


def _in_words(error: ErrorDetails, path: KeyPath, schema: type[Section]) -> tuple[str, str]:
    """What is wrong and what to do, for one of pydantic's errors."""
    kind, context = error["type"], error.get("ctx", {})
    key, field = str(path[-1]) if path else "", _field_at(path, schema)
    about = f"{key}: {field.description}" if field and field.description else "see docs/project-file.md"
    if kind in ("extra_forbidden", "invalid_key"):
        return "unknown key", _other_key(key, path[:-1], schema)
    if kind == "missing":
        return "is missing", f"add {about}"
    shown = _shown(error["input"])
    if kind == "literal_error":
        allowed = re.findall(r"'([^']+)'", context["expected"])
        return f"is {shown}, which is none of its values", nearest(str(error["input"]), allowed)
    words = {
        "string_type": ("must be text", "put it in quotes"),
        "int_type": ("must be a whole number", about),
        "int_from_float": ("must be a whole number", about),
        "float_type": ("must be a number", about),
        "finite_number": ("must be a finite number", about),
        "bool_type": ("must be true or false", about),
        "list_type": ("must be a list", about),
        "model_type": ("must be a mapping", about),
        "dict_type": ("must be a mapping", about),
        "too_short": ("must not be empty", about),
        "string_too_short": ("must not be empty", about),
        "greater_than": (f"must be more than {context.get('gt')}", about),
        "greater_than_equal": (f"must be at least {context.get('ge')}", about),
        "less_than": (f"must be less than {context.get('lt')}", about),
        "less_than_equal": (f"must be at most {context.get('le')}", about),
    }
    said, fix = words.get(kind, (error["msg"], about))
    return f"{said}; it is {shown}", fix


def _shown(value: object) -> str:
    if value is None:
        return "empty"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else f"a list of {len(value)}"
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def shown_path(path: KeyPath) -> str:
    """A key path for messages: `recipes[1].fraction`; the whole file is `project`."""
    shown = ""
    for part in path:
        if isinstance(part, int):
            shown += f"[{part}]"
        else:
            shown += ("." if shown else "") + (part if re.fullmatch(r"[\w.-]{1,60}", part) else _shown(part))
    return shown or "project"


def nearest(word: str, known: list[str]) -> str:
    """Advice for a word that is not known: the most similar one, and all there are."""
    close = difflib.get_close_matches(word.lower()[:100], known, n=1, cutoff=0.5)
    listed = f"there are: {', '.join(known[:30])}" if known else "there is none"
    return f"did you mean {close[0]!r}? {listed}" if close else listed


def _other_key(key: str, section: KeyPath, schema: type[Section]) -> str:
    """The nearest valid key, or the section where the key belongs."""
    field = _field_at(section, schema)
    owner = section_of(field.annotation) if field else schema
    advice = nearest(key, list(keys_of(owner)) if owner else [])
    homes = [path for path in all_keys(schema) if path.rpartition(".")[2] == key]
    return advice if advice.startswith("did you mean") or not homes else f"it belongs to {' or '.join(homes)}"


def keys_of(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """The keys of a section, as a file spells them."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def section_of(annotation: object) -> type[BaseModel] | None:
    """The section that an annotation such as `list[Task]` or `Evaluation | None` leads to; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)


def all_keys(section: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every key of a section and of those below it, by path (`tasks[].examples.path`), in order."""
    keys: dict[str, FieldInfo] = {}
    for name, field in keys_of(section).items():
        keys[prefix + name] = field
        if below := section_of(field.annotation):
            keys |= all_keys(below, f"{prefix}{name}{'[]' if get_origin(field.annotation) is list else ''}.")
    return keys


def _field_at(path: KeyPath, schema: type[Section]) -> FieldInfo | None:
    field: FieldInfo | None = None
    section: type[BaseModel] | None = schema
    for name in (part for part in path if isinstance(part, str)):
        field = keys_of(section).get(name) if section else None
        section = section_of(field.annotation) if field else None
    return field


def repeated(path: KeyPath, values: Iterable[Hashable]) -> Iterator[BrokenRule]:
    """A broken rule for each value that a list has more than once."""
    for value, count in Counter(values).items():
        if count > 1:
            yield BrokenRule(path, f"{value!r} is listed {count} times", "list it once")
