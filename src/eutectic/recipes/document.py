"""YAML documents written by people: values with line numbers, faults in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from eutectic.errors import RecipeError, suggest

Location = tuple[str | int, ...]

# What PyYAML raises on a text that it cannot read: its own errors on syntax, and whatever Python
# raises while a value is built (`2020-13-45`, `!!int x`, brackets a thousand deep).
UNREADABLE = (
    yaml.YAMLError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    OverflowError,
    RecursionError,
)


@dataclass(frozen=True)
class Source:
    """Where a document came from, so that later faults can name a line too."""

    name: str = "the request"
    folder: Path = field(default_factory=Path)
    lines: Mapping[Location, int] = field(default_factory=dict[Location, int])

    def at(self, *location: str | int) -> str:
        """Return `line N: ` of the deepest known part of a location, or nothing."""
        for end in range(len(location), 0, -1):
            line = self.lines.get(location[:end])
            if line is not None:
                return f"line {line}: "
        return ""


def read_document(
    path: str | Path, what: str, holds: str, error: type[RecipeError] = RecipeError
) -> tuple[Mapping[str, Any], Source, list[str]]:
    """Return a YAML mapping, where its parts stand, and the faults found so far (double keys).

    Args:
        path: the file.
        what: what it is, for messages, such as "a recipe".
        holds: the keys that it should hold, for messages.
        error: what to raise.

    Raises:
        RecipeError: (or `error`) the file cannot be read, is not YAML, or is no mapping.
    """
    path = Path(path)
    noun = what.removeprefix("a ")
    duplicates: list[str] = []
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values: object = yaml.safe_load(text)
        lines = _lines(node, duplicates) if node is not None else {}
    except FileNotFoundError:
        raise error([f"{path}: no such file."], f"the {noun}") from None
    except IsADirectoryError:
        raise error([f"{path}: is a folder, not a YAML file."], f"the {noun}") from None
    except OSError as fault:
        raise error([f"{path}: {fault.strerror or fault}."], f"the {noun}") from None
    except UnicodeDecodeError:
        raise error([f"{path} is not a UTF-8 text file."], f"the {noun}") from None
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        where = "" if mark is None else f"line {mark.line + 1}: "
        what = ", ".join(part for part in (fault.context, fault.problem) if part)
        raise error([f"{where}not valid YAML: {what}."], f"{noun} {path}") from None
    except UNREADABLE as fault:
        raise error([f"not valid YAML: {fault}"], f"{noun} {path}") from None
    source = Source(f"{noun} {path}", path.parent, lines)
    if not isinstance(values, Mapping):
        raise error([f"{what} is a mapping with {holds}."], source.name)
    return cast("Mapping[str, Any]", values), source, duplicates


def by_line(fault: str) -> int:
    """Return the line that a fault begins with, or 0: a key for sorting."""
    match = re.match(r"line (\d+): ", fault)
    return int(match[1]) if match else 0


def sentence(item: Any, source: Source, known_keys: Callable[[Location], list[str]]) -> str:
    """Return one of pydantic's errors in words, with its line.

    Args:
        item: from `ValidationError.errors()`.
        source: where the document came from.
        known_keys: location -> the keys that are allowed there.
    """
    location: Location = tuple(part for part in item["loc"])
    where = source.at(*location)
    name = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        return f"{where}unknown key '{name}'.{suggest(str(location[-1]), known_keys(location))}"
    if item["type"] == "missing":
        return f"{where}'{name}' is missing."
    if location and location[-1] == "[key]":
        name = f"the key '{location[-2]}'" if len(location) > 1 else "a key"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    got = item.get("input")
    shown = f", got {got!r}" if isinstance(got, (str, int, float, bool)) else ""
    return f"{where}{name}: {message[0].lower()}{message[1:]}{shown}."


def _lines(root: yaml.Node, duplicates: list[str]) -> dict[Location, int]:
    """Map every location of a YAML document to its line, and note keys that stand twice."""
    lines: dict[Location, int] = {}
    above: list[yaml.Node] = []

    def visit(node: yaml.Node, path: Location) -> None:
        if any(node is outer for outer in above):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: an alias is part of itself")
        above.append(node)
        if path:
            lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            names: set[str] = set()
            for key, value in cast("list[tuple[yaml.Node, yaml.Node]]", node.value):
                name, line = str(cast(object, key.value)), key.start_mark.line + 1
                if name in names:
                    duplicates.append(f"line {line}: key '{name}' stands twice.")
                names.add(name)
                lines[(*path, name)] = line
                visit(value, (*path, name))
        elif isinstance(node, yaml.SequenceNode):
            for position, value in enumerate(cast("list[yaml.Node]", node.value)):
                visit(value, (*path, position))
        above.pop()

    visit(root, ())
    return lines
