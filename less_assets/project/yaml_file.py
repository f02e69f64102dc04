"""YAML text to plain data that remembers its lines; safe against anything a file can contain.

Belongs here: parsing, duplicate keys, alias bombs, and the way from a key path back to a line. What the keys mean is
`sections.py`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from less_assets.errors import ProjectFileError

MAX_BYTES = 256 * 1024
"""A longer file is no project file."""
MAX_NODES = 100_000
"""Keys and values with all aliases written out; more is an alias bomb."""
MAX_DEPTH = 50
"""Mappings and lists inside one another; whoever walks the data may recurse."""

KeyPath = tuple[str | int, ...]

_KEYS_WITH_A_MEANING = {"tag:yaml.org,2002:merge", "tag:yaml.org,2002:value"}  # << and =, no data by themselves


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which knows only data; `2e-5` is a number, as in YAML 1.2, JSON and Python."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a project.

    Attributes:
        where: File and line, or file, or task; whatever leads there.
        what: What is wrong, with the key path if there is one.
        fix: What to do about it.
    """

    where: str
    what: str
    fix: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"\n    to do: {self.fix}" if self.fix else "")


@dataclass(frozen=True)
class MarkedData:
    """The data of a YAML file, and where each part of it stands.

    Attributes:
        file: The file as the user named it.
        data: Plain data: mappings, lists, text, numbers.
        problems: What is wrong with the file although it can be read (duplicate keys).
    """

    file: str
    data: object
    problems: tuple[Problem, ...]
    _root: yaml.Node

    def where(self, path: KeyPath) -> str:
        """`file:line` of a key path, or of the nearest enclosing part that exists."""
        node, line = self._root, _line(self._root)
        for part in path:
            if isinstance(node, yaml.MappingNode):
                # The last pair wins, as it does in the data; merged pairs (<<) come first.
                pair = next((pair for pair in reversed(node.value) if pair[0].value == str(part)), None)
                if pair is None:
                    break
                line, node = _line(pair[0]), pair[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = _line(node)
            else:
                break
        return f"{self.file}:{line}"


def read_yaml(path: Path, shown: str | None = None) -> MarkedData:
    """Read a YAML file as plain data.

    Args:
        path: The file.
        shown: How to name it in messages; the path by default.

    Raises:
        ProjectFileError: It does not exist, is too long, is no UTF-8 text or no YAML, or holds anything but plain data.
    """
    shown = shown or str(path)
    try:
        content = path.read_bytes() if path.stat().st_size <= MAX_BYTES else None
    except FileNotFoundError as error:
        raise ProjectFileError(
            "There is no such project file.",
            where=shown,
            fix="name one with --project or LESS_PROJECT; `less-assets init` writes one for your data, "
            "`less-assets demo` an example",
        ) from error
    except (OSError, ValueError) as error:
        raise ProjectFileError(
            f"The project file cannot be read: {error}", where=shown, fix="name a readable YAML file"
        ) from error
    if content is None:
        raise ProjectFileError(
            f"The project file is longer than {MAX_BYTES // 1024} KiB.", where=shown, fix="is it the right file?"
        )
    return parse_yaml(content, shown)


def parse_yaml(content: bytes, file: str) -> MarkedData:
    """Parse the bytes of a YAML file as plain data.

    Args:
        content: UTF-8 text, with or without byte order mark.
        file: How to name the file in messages.

    Raises:
        ProjectFileError: See `read_yaml`.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ProjectFileError(
            "The project file is not UTF-8 text.", where=f"{file}:{line}", fix="save it as UTF-8"
        ) from error
    try:
        return _parse(text, file)
    except yaml.reader.ReaderError as error:
        where = f"{file}:{text.count(chr(10), 0, error.position) + 1}"
        raise ProjectFileError(
            f"The project file holds a character that YAML does not allow: {chr(error.character)!r}."
            if isinstance(error.character, int)
            else "The project file holds bytes that are no text.",
            where=where,
            fix="delete that character",
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        told = ", ".join(part for part in (error.context, error.problem) if part)
        raise ProjectFileError(
            f"The project file is not valid YAML: {told}.",
            where=f"{file}:{mark.line + 1}" if mark else file,
            fix="check indentation, colons and quotes there and in the line before",
        ) from error
    except RecursionError as error:
        raise ProjectFileError(
            "The project file is nested too deeply, or refers to itself.", where=file, fix="write it flat"
        ) from error


def _parse(text: str, file: str) -> MarkedData:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise ProjectFileError(
                "The project file is empty.",
                where=file,
                fix="`less-assets init` writes one; projects/template.yaml of the repository shows every key",
            )
        size, depth = _expanded(root, {})
        if depth > MAX_DEPTH:
            raise RecursionError
        if size > MAX_NODES:
            raise ProjectFileError(
                f"The project file has more than {MAX_NODES:,} values once its aliases are written out.",
                where=file,
                fix="use fewer aliases (*name)",
            )
        nodes = list(_all_nodes(root))
        problems = [problem for node in nodes for problem in _duplicate_keys(node, file)]
        broken = [problem for node in nodes for problem in _unreadable_scalar(loader, node, file)]
        if broken:
            raise problems_error(file, problems + broken)
        return MarkedData(file, loader.construct_document(root), tuple(problems), root)
    finally:
        loader.dispose()


def problems_error(file: str, problems: Sequence[Problem]) -> ProjectFileError:
    """One error that tells all problems of a file."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    error = ProjectFileError("\n".join([f"{file} has {count}:", *(f"  {problem}" for problem in problems)]))
    error.problems = tuple(ProjectFileError(problem.what, where=problem.where, fix=problem.fix) for problem in problems)
    return error


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _expanded(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Nodes below and with this one, counting an aliased node each time that it is used, and how deep they go."""
    if id(node) not in known:
        known[id(node)] = (0, 0)
        below = [_expanded(child, known) for child in _children(node)]
        known[id(node)] = (1 + sum(size for size, _ in below), 1 + max((depth for _, depth in below), default=0))
    elif known[id(node)] == (0, 0):
        raise RecursionError  # an alias inside its own anchor
    return known[id(node)]


def _all_nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    """Every node once, in the order of the file."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            stack += reversed(_children(node))


def _duplicate_keys(node: yaml.Node, file: str) -> Iterator[Problem]:
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in first:
            yield Problem(
                f"{file}:{_line(key)}",
                f"{key.value!r} is given twice; the first time in line {first[key.tag, key.value]}",
                "keep one of the two",
            )
        elif isinstance(key, yaml.ScalarNode):
            first[key.tag, key.value] = _line(key)


def _unreadable_scalar(loader: _Loader, node: yaml.Node, file: str) -> Iterator[Problem]:
    """What YAML takes for a date or number that is none: 2024-99-99, an integer of 5,000 digits."""
    if isinstance(node, yaml.ScalarNode) and node.tag not in _KEYS_WITH_A_MEANING:
        try:
            loader.construct_object(node)
        except yaml.MarkedYAMLError:
            raise
        except (ValueError, OverflowError, LookupError) as error:
            value = node.value if len(node.value) <= 40 else node.value[:39] + "…"
            yield Problem(f"{file}:{_line(node)}", f"{value!r} cannot be read: {error}", "put text in quotes")
