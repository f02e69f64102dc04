"""What the schemas and calls of tools say, and what of it a rendering leaves out.

Belongs here: texts inside JSON, as chat templates write them. Where they stand in a conversation is `chat_template.py`.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

_AS_PYTHON = {"true": "True", "false": "False", "null": "None"}
_SAID = ("name", "description")
_VALUES = ("enum", "const", "default")
"""Keys of a JSON schema whose text tells the model something; types and limits follow each template's own notation."""


def names_a_function(call: object) -> bool:
    """Return whether a call is in OpenAI's form and names its function."""
    function = call.get("function") if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def left_out_of_calls(written: str, calls: Sequence[Mapping[str, Mapping[str, object]]]) -> str | None:
    """Return which name, or which value among the arguments, of some calls is not written; None: all are.

    What several calls say must be there as often: some templates write the first call only.

    Args:
        written: What the template makes of the calls.
        calls: In OpenAI's form, with the names of functions.
    """
    names: Counter[str] = Counter()
    texts: Counter[str] = Counter()
    for call in calls:
        function = call["function"]
        arguments = function.get("arguments")
        if isinstance(arguments, str) and not any(form in written for form in _forms(arguments)):
            with contextlib.suppress(ValueError):
                arguments = json.loads(arguments)
        names[str(function["name"])] += 1
        texts.update(() if arguments is None else _texts(arguments))
    for said, needed in (names | texts).items():
        forms = _forms(said)
        if forms and sum(map(written.count, forms)) < needed:
            return f"{said!r} of a call is not in the text"
    return None


def left_out_of_tools(written: str, tools: Sequence[object]) -> str | None:
    """Return which name, description, parameter or possible value of some tools is not written; None: all are.

    White space in descriptions may differ.

    Args:
        written: What the template makes of the conversation, without what its turns say.
        tools: Schemas, bare or in OpenAI's form.
    """
    on_one_line = None
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        for said in _said_by_schema(function):
            if not said.strip() or any(form in written for form in _forms(said)):
                continue
            on_one_line = on_one_line or _on_one_line(written)
            if not any(_on_one_line(form) in on_one_line for form in _forms(said)):
                name = function.get("name")
                what = f"the tool {name!r}" if said == name else f"{said!r} of the tool {name!r}"
                return f"{what} is not in the text"
    return None


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def _said_by_schema(schema: object) -> Iterator[str]:
    if isinstance(schema, list):
        for item in schema:
            yield from _said_by_schema(item)
    elif isinstance(schema, Mapping):
        for key, value in schema.items():
            if key in _SAID and isinstance(value, str):
                yield value
            elif key in _VALUES:
                yield from () if value is None else _texts(value)
            elif key == "properties" and isinstance(value, Mapping):
                for name, described in value.items():
                    yield name
                    yield from _said_by_schema(described)
            else:
                yield from _said_by_schema(value)


def _forms(said: str) -> set[str]:
    """How a template may write a text: as it is, or as in JSON or Python; words of JSON also as Python has them."""
    as_json = json.dumps(said)[1:-1], json.dumps(said, ensure_ascii=False)[1:-1]
    return {said, *as_json, repr(said)[1:-1], _AS_PYTHON.get(said, said)} - {""}


def _texts(value: object) -> Iterator[str]:
    """The texts inside a JSON value; keys, numbers, truth values and nulls too."""
    if isinstance(value, str):
        yield value
    elif value is None or isinstance(value, int | float):
        yield json.dumps(value)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _texts(item)
