"""Recipes from files and from Python, checked as a whole: all faults together, with lines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError

from eutectic.errors import MethodError, RecipeError, suggest
from eutectic.methods import get_method
from eutectic.recipes.schema import ExpertSpec, Recipe, TensorRule

Location = tuple[str | int, ...]

# What PyYAML raises on a text that it cannot read: its own errors on syntax, and whatever Python
# raises while a value is built (`2020-13-45`, `!!int x`, brackets a thousand deep).
_UNREADABLE = (
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
    """Where a recipe came from, so that later faults can name a line too."""

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


def load_recipe(path: str | Path) -> tuple[Recipe, Source]:
    """Read and check a YAML recipe. Relative paths in it start at the recipe's folder.

    Raises:
        RecipeError: listing every fault of the schema, the method's parameters and the paths,
            each with its line.
    """
    path = Path(path)
    duplicates: list[str] = []
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values: object = yaml.safe_load(text)
        lines = _lines(node, duplicates) if node is not None else {}
    except OSError as error:
        raise RecipeError([f"{path}: {error.strerror or error}"], "the recipe") from None
    except UnicodeDecodeError:
        raise RecipeError([f"{path} is not a UTF-8 text file."], "the recipe") from None
    except _UNREADABLE as error:
        raise RecipeError([f"not valid YAML: {error}"], f"recipe {path}") from None
    source = Source(f"recipe {path}", path.parent, lines)
    if not isinstance(values, Mapping):
        raise RecipeError(["a recipe is a mapping with base, experts and method."], source.name)
    return check_recipe(_mapping(cast(object, values)), source, duplicates), source


def check_recipe(
    values: Mapping[str, Any], source: Source | None = None, faults: Sequence[str] = ()
) -> Recipe:
    """Return a checked recipe with resolved local paths.

    Raises:
        RecipeError: with every fault found.
    """
    source = source or Source()
    values = _mapping(_paths_as_text(values))
    faults = list(faults)
    recipe = None
    try:
        recipe = Recipe.model_validate(dict(values))
    except ValidationError as error:
        faults += [_sentence(item, source) for item in error.errors()]
    faults += _method_faults(values, source)
    faults += _path_faults(values, source)
    if recipe is not None and recipe.side_files not in ("base", *recipe.experts):
        faults.append(
            f"{source.at('side_files')}side_files: '{recipe.side_files}' is neither 'base' nor an "
            f"expert.{suggest(recipe.side_files, ['base', *recipe.experts])}"
        )
    if faults or recipe is None:
        raise RecipeError(sorted(faults, key=_line_of), source.name)
    return _resolve_paths(recipe, source)


def _paths_as_text(value: object) -> object:
    """Write every `Path` inside a recipe from Python as a string, as a file would."""
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return {key: _paths_as_text(inner) for key, inner in items}
    return str(value) if isinstance(value, Path) else value


def _line_of(fault: str) -> int:
    match = re.match(r"line (\d+): ", fault)
    return int(match[1]) if match else 0


def _method_faults(values: Mapping[str, Any], source: Source) -> list[str]:
    name = values.get("method")
    if not isinstance(name, str):
        return []
    parameters = _mapping(values.get("parameters"))
    try:
        method = get_method(name)
    except MethodError as error:
        return [f"{source.at('method')}{' '.join(str(error).splitlines())}"]
    faults: list[str] = []
    try:
        method.adapter.validate_python({str(key): value for key, value in parameters.items()})
    except ValidationError as error:
        for item, text in zip(error.errors(), method.faults(error), strict=True):
            faults.append(f"{source.at('parameters', *item['loc'])}method '{name}': {text}")
    experts = _mapping(values.get("experts"))
    if experts:
        try:
            method.check_expert_count(len(experts))
        except MethodError as error:
            faults.append(f"{source.at('experts')}{error}")
    return faults


def _path_faults(values: Mapping[str, Any], source: Source) -> list[str]:
    faults: list[str] = []
    for where, path in _paths(values):
        if _is_local(path) and not _exists(_inside(path, source)):
            faults.append(f"{source.at(*where)}{'.'.join(map(str, where))}: no such file: {path}")
    return faults


def _paths(values: Mapping[str, Any]) -> list[tuple[Location, str]]:
    """Return every path that a recipe names, even one that fails the schema elsewhere."""
    found: list[tuple[Location, Any]] = [(("base",), values.get("base"))]
    for name, spec in _mapping(values.get("experts")).items():
        if isinstance(spec, Mapping):
            inner = _mapping(cast(object, spec))
            found.append((("experts", name, "path"), inner.get("path")))
            found.append((("experts", name, "statistics"), inner.get("statistics")))
        else:
            found.append((("experts", name), spec))
    return [(where, path) for where, path in found if isinstance(path, str)]


def _is_local(path: str) -> bool:
    """Tell a path from a hub id: ids have at most one slash and never start with a dot or slash."""
    looks_like_path = path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path
    return looks_like_path or Path(path).suffix in {".safetensors", ".bin", ".pt", ".pth"}


def _resolve(path: str, source: Source) -> str:
    inside = _inside(path, source)
    return str(inside) if _is_local(path) or _exists(inside) else path


def _inside(path: str, source: Source) -> Path:
    try:
        return source.folder / Path(path).expanduser()
    except RuntimeError:  # `~nobody`: no such user, so no such folder
        return source.folder / path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, not ours to look at, or not a name at all
        return False


def _mapping(value: object) -> Mapping[str, Any]:
    """Return the value if it is a mapping, else an empty one: the schema has its own words."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _resolve_paths(recipe: Recipe, source: Source) -> Recipe:
    experts = {
        name: ExpertSpec(
            path=_resolve(spec.path, source),
            weight=spec.weight,
            statistics=None if spec.statistics is None else _resolve(spec.statistics, source),
        )
        for name, spec in recipe.experts.items()
    }
    base = _resolve(recipe.base, source)
    return recipe.model_copy(update={"base": base, "experts": experts})


def _sentence(item: Any, source: Source) -> str:
    location: Location = tuple(part for part in item["loc"])
    where = source.at(*location)
    name = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        known = _known_keys(location)
        return f"{where}unknown key '{name}'.{suggest(str(location[-1]), known)}"
    if item["type"] == "missing":
        return f"{where}'{name}' is missing."
    if location and location[-1] == "[key]":
        name = f"the key '{location[-2]}'" if len(location) > 1 else "a key"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    got = item.get("input")
    shown = f", got {got!r}" if isinstance(got, (str, int, float, bool)) else ""
    return f"{where}{name}: {message[0].lower()}{message[1:]}{shown}."


def _known_keys(location: Location) -> list[str]:
    nested = {"experts": ExpertSpec, "tensors": TensorRule}
    model = nested.get(str(location[0]), Recipe) if len(location) > 2 else Recipe
    return list(model.model_fields)


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
