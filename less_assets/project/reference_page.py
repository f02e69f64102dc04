"""The reference page of the project file, written from the models: `python -m less_assets.project.reference_page`.

Belongs here: putting keys into Markdown tables. What keys mean is `sections.py`.
"""

from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from less_assets.project.keys import keys_of, section_of
from less_assets.project.project import Project

_INTRODUCTION = """\
# The project file

One YAML file is the whole experiment: `LESS_PROJECT` or `--project` names it; without them it is `project.yaml` in the
current folder, as `less-assets init` writes it. [`projects/template.yaml`](../projects/template.yaml) shows
every key in place. This page is written from the models in `less_assets/project/sections.py` by
`python -m less_assets.project.reference_page`.

- Relative paths are meant from the project file's folder. URLs are any that fsspec knows.
- Names (project, sources, tasks, recipes) consist of `a-z`, `0-9`, `_`, `.`, `-`, begin with a letter or digit, and are
  unique: they become partition keys and folders.
- Unknown keys, keys given twice, and keys that have no effect where they stand are errors. All problems are told at
  once, each with its line and what to do; `less-assets check` also looks at the data that the file names.
- Settings that cannot change numbers (`storage`, `compute`, `device`, `device_map`, `gradient_checkpointing`, the token
  budget of evaluations, paths) are in no fingerprint: changing them recomputes nothing. What files hold is hashed.
- Credentials belong in the environment, never in this file.

"Code" in the last column is the published code of LESS (princeton-nlp/LESS), "LESS" the paper (arXiv 2402.04333).
"""

_TYPES: dict[object, str] = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}


def describe_project_file() -> str:
    """The page `docs/project-file.md`: every key with type, unit, default, meaning and where the default comes from."""
    return "\n".join([_INTRODUCTION, *_tables("", "The file", Project, "")])


def _tables(path: str, title: str, section: type[BaseModel], about: str) -> list[str]:
    lines = [f"## {title}", ""]
    if about:
        lines += [f"{about}.", ""]
    lines += ["| key | type | default | meaning | source |", "|---|---|---|---|---|"]
    keys = keys_of(section)
    lines += [_row(name, field) for name, field in keys.items()]
    lines.append("")
    for name, field in keys.items():
        if below := section_of(field.annotation):
            full = f"{path}{name}{'[]' if get_origin(field.annotation) is list else ''}"
            about = (below.__doc__ or "").strip().rstrip(".")
            lines += _tables(f"{full}.", f"`{full}`", below, about)
    return lines


def _row(name: str, field: FieldInfo) -> str:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    kind = str(extra["type"] or _type(field.annotation))
    limits = _limits(field)
    unit = f", {extra['unit']}" if extra["unit"] else ""
    cells = [f"`{name}`", kind + unit + (f", {limits}" if limits else ""), _default(field, extra["shown"])]
    cells += [str(field.description), str(extra["source"] or "")]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(annotation: object) -> str:
    inner = [part for part in get_args(annotation) if part is not NoneType]
    if section_of(annotation):
        return "list of mappings" if get_origin(annotation) is list else "mapping"
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if get_origin(annotation) is list:
        return f"list of {_type(inner[0])}"
    return _TYPES.get(annotation) or _type(inner[0])


def _limits(field: FieldInfo) -> str:
    signs = {annotated_types.Gt: ("gt", ">"), annotated_types.Ge: ("ge", "≥")}
    signs |= {annotated_types.Lt: ("lt", "<"), annotated_types.Le: ("le", "≤")}
    limits = [
        f"{sign} {getattr(limit, name):,}"
        for kind, (name, sign) in signs.items()
        for limit in field.metadata
        if isinstance(limit, kind)
    ]
    return " and ".join(limits)


def _default(field: FieldInfo, shown: object) -> str:
    if field.is_required():
        return "required"
    if section_of(field.annotation):
        return "–" if field.default is None else "see below"
    value = shown if shown is not None else field.default
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    words = {None: "null", True: "true", False: "false"}
    return f"`{words[value] if value is None or isinstance(value, bool) else value}`"


if __name__ == "__main__":
    page = Path(__file__).parents[2] / "docs" / "project-file.md"
    page.write_text(describe_project_file(), encoding="utf-8")
    print(f"wrote {page}")
