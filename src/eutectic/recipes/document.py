"""YAML documents written by people: values with line numbers, and their faults."""

import errno
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from eutectic.errors import Fault, RecipeError, suggest
from eutectic.recipes.plain_yaml import UNREADABLE, YAML_BYTES, compose_all, described, values_of
from eutectic.storage import is_url, local_path, meant, url_of, view
from eutectic.storage.small_files import decoded, read_bytes

Location = tuple[str | int, ...]


@dataclass(frozen=True)
class Source:
    """Where a document came from, so that later faults can name a line too."""

    name: str = "the request"
    folder: Path = field(default_factory=Path)
    lines: Mapping[Location, int] = field(default_factory=dict[Location, int])
    start: int = 0  # the line that it begins with, where it is one of several

    def line(self, *location: str | int) -> int:
        """Return the line of the deepest known part of a location, 0 where none is known.

        Of several documents in a file, the line that this one begins with.
        """
        ends = range(len(location), 0, -1)
        known = (self.lines[location[:n]] for n in ends if location[:n] in self.lines)
        return next(known, self.start)


Document = tuple[Mapping[str, Any], Source, list[Fault]]


def read_document(
    path: str | Path, what: str, holds: str, error: type[RecipeError] = RecipeError
) -> Document:
    """Return a YAML mapping, where its parts stand, and the faults found so far (double keys).

    Messages say `what` it is, such as "a recipe", and which keys it `holds`.
    """
    documents = read_documents(path, what, holds, error)
    if len(documents) > 1:
        line = documents[1][1].start
        why = f"holds {len(documents)} documents where one is expected."
        raise error([Fault("several_documents", why, line=line)], documents[0][1].name)
    return documents[0]


def read_documents(
    path: str | Path, what: str, holds: str, error: type[RecipeError] = RecipeError
) -> list[Document]:
    """Return every document of a YAML file, at least one, as `read_document` returns one."""
    path = view(path)
    noun = what.removeprefix("a ")
    try:
        raw = read_bytes(path, YAML_BYTES)
    except OSError as fault:
        known = {errno.ENOENT: "no such file", errno.EISDIR: "is a folder, not a YAML file"}
        why = known.get(fault.errno or 0, fault.strerror or fault)
        near = meant(path) if fault.errno == errno.ENOENT else ""
        raise error([Fault("unreadable", f"{why}.{near}", str(path))], f"the {noun}") from None
    except ValueError as fault:  # no path at all, such as one with a NUL
        raise error([Fault("unreadable", f"{fault}.", repr(path))], f"the {noun}") from None
    try:
        text = decoded(raw)
    except ValueError:
        why = f"{path} is not a UTF-8 text file."
        raise error([Fault("unreadable", why)], f"the {noun}") from None
    found: list[Document] = []
    try:
        nodes = compose_all(text)
        nodes = [n for n in nodes if not _is_empty(n)] or nodes[:1]
        for node in nodes or [None]:
            duplicates: list[Fault] = []
            values: object = None if node is None else values_of(node)
            lines = _lines(node, duplicates) if node is not None else {}
            start = 0 if node is None or len(nodes) < 2 else node.start_mark.line + 1
            source = Source(f"{noun} {path}", path.parent, lines, start)
            if not isinstance(values, Mapping):
                why = f"{what} is a mapping with {holds}."
                raise error([Fault("not_a_mapping", why)], source.name)
            found.append((cast("Mapping[str, Any]", values), source, duplicates))
    except UNREADABLE as fault:
        why, line = described(fault)
        invalid = Fault("not_yaml", f"not valid YAML: {why}.", line=line)
        raise error([invalid], f"{noun} {path}") from None
    return found


def _is_empty(node: yaml.Node) -> bool:
    """Tell whether nothing stands between two `---`."""
    return isinstance(node, yaml.ScalarNode) and cast(object, node.value) == ""


def by_line(faults: Iterable[Fault]) -> list[Fault]:
    """Return faults in the order of the document, those without a line first."""
    return sorted(faults, key=lambda fault: fault.line)


def schema_fault(item: Any, source: Source, known_keys: Callable[[Location], list[str]]) -> Fault:
    """Return an item of `ValidationError.errors()` as a fault; `known_keys` gives those allowed."""
    location: Location = tuple(item["loc"])
    line = source.line(*location)
    name = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        nearest = suggest(str(location[-1]), known_keys(location))
        return Fault("unknown_key", f"unknown key '{name}'.", line=line, next=nearest)
    if item["type"] == "missing":
        return Fault("missing_key", f"'{name}' is missing.", line=line)
    if location and location[-1] == "[key]":
        name = f"the key '{location[-2]}'" if len(location) > 1 else "a key"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    got = item.get("input")
    shown = repr(got) if isinstance(got, (str, int, float, bool)) else ""
    message = f"{message[0].lower()}{message[1:]}{'.' * (message[-1] not in '.?')}"
    return Fault(item["type"], message, name, line, shown)


def inside(path: str, source: Source) -> Path:
    """Return a path of a document, which starts at its folder; that of a URL shows its place."""
    if is_url(path):
        return local_path(path)
    try:
        return source.folder / Path(path).expanduser()
    except RuntimeError:  # `~nobody`: no such user, so no such folder
        return source.folder / path


def exists(path: Path) -> bool:
    """Tell whether something is there, whatever the path is."""
    try:
        return (path if url_of(path) is None else view(path)).exists()
    except (OSError, ValueError):  # too long, not ours to look at, or not a name at all
        return False


def no_file(location: Location, path: str, source: Source) -> Fault:
    """Return the fault of a path in a document that leads nowhere."""
    where = ".".join(map(str, location))
    near = meant(inside(path, source))
    said = f"no such file: {path}{'.' * bool(near)}{near}"
    return Fault("no_file", said, where, source.line(*location))


def _lines(root: yaml.Node, duplicates: list[Fault]) -> dict[Location, int]:
    """Map every location of a YAML document to its line, and note keys that stand twice."""
    lines: dict[Location, int] = {}

    def visit(node: yaml.Node, path: Location) -> None:
        if path:
            lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            names: set[str] = set()
            for key, value in cast("list[tuple[yaml.Node, yaml.Node]]", node.value):
                name, line = str(cast(object, key.value)), key.start_mark.line + 1
                if name in names:
                    what = f"key '{name}' stands twice."
                    duplicates.append(Fault("repeated_key", what, line=line))
                names.add(name)
                lines[(*path, name)] = line
                visit(value, (*path, name))
        elif isinstance(node, yaml.SequenceNode):
            for position, value in enumerate(cast("list[yaml.Node]", node.value)):
                visit(value, (*path, position))

    visit(root, ())
    return lines
