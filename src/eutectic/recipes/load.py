"""Recipes from files and from Python, checked as a whole: all faults together, with lines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from eutectic.errors import MethodError, RecipeError, suggest
from eutectic.methods import get_method
from eutectic.recipes.schema import ExpertSpec, Recipe, TensorRule

Location = tuple[str | int, ...]


@dataclass(frozen=True)
class Source:
    """Where a recipe came from, so that later faults can name a line too."""

    name: str = "the request"
    folder: Path = field(default_factory=Path)
    lines: Mapping[Location, int] = field(default_factory=dict)

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
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except OSError as error:
        raise RecipeError([f"{path}: {error.strerror or error}"], "the recipe") from None
    except UnicodeDecodeError:
        raise RecipeError([f"{path} is not a UTF-8 text file."], "the recipe") from None
    except yaml.YAMLError as error:
        raise RecipeError([f"not valid YAML: {error}"], f"recipe {path}") from None
    duplicates: list[str] = []
    lines = _lines(node, (), duplicates) if node is not None else {}
    source = Source(f"recipe {path}", path.parent, lines)
    if not isinstance(values, dict):
        raise RecipeError(["a recipe is a mapping with base, experts and method."], source.name)
    return check_recipe(values, source, duplicates), source


def check_recipe(
    values: Mapping[str, Any], source: Source | None = None, faults: Sequence[str] = ()
) -> Recipe:
    """Return a checked recipe with resolved local paths.

    Raises:
        RecipeError: with every fault found.
    """
    source = source or Source()
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


def _line_of(fault: str) -> int:
    match = re.match(r"line (\d+): ", fault)
    return int(match[1]) if match else 0


def _method_faults(values: Mapping[str, Any], source: Source) -> list[str]:
    name, parameters = values.get("method"), values.get("parameters") or {}
    if not isinstance(name, str) or not isinstance(parameters, Mapping):
        return []
    try:
        method = get_method(name)
    except MethodError as error:
        return [f"{source.at('method')}{' '.join(str(error).splitlines())}"]
    faults: list[str] = []
    try:
        method.adapter.validate_python(dict(parameters))
    except ValidationError as error:
        for item, text in zip(error.errors(), method.faults(error), strict=True):
            faults.append(f"{source.at('parameters', *item['loc'])}method '{name}': {text}")
    experts = values.get("experts")
    if isinstance(experts, Mapping) and experts:
        try:
            method.check_expert_count(len(experts))
        except MethodError as error:
            faults.append(f"{source.at('experts')}{error}")
    return faults


def _path_faults(values: Mapping[str, Any], source: Source) -> list[str]:
    faults: list[str] = []
    for where, path in _paths(values):
        resolved = _resolve(path, source)
        if _is_local(path) and not Path(resolved).exists():
            faults.append(f"{source.at(*where)}{'.'.join(map(str, where))}: no such file: {path}")
    return faults


def _paths(values: Mapping[str, Any]) -> list[tuple[Location, str]]:
    """Return every path that a recipe names, even one that fails the schema elsewhere."""
    found: list[tuple[Location, Any]] = [(("base",), values.get("base"))]
    experts = values.get("experts")
    for name, spec in experts.items() if isinstance(experts, Mapping) else ():
        if isinstance(spec, Mapping):
            found.append((("experts", name, "path"), spec.get("path")))
            found.append((("experts", name, "statistics"), spec.get("statistics")))
        else:
            found.append((("experts", name), spec))
    return [(where, path) for where, path in found if isinstance(path, str)]


def _is_local(path: str) -> bool:
    """Tell a path from a hub id: ids have at most one slash and never start with a dot or slash."""
    looks_like_path = path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path
    return looks_like_path or Path(path).suffix in {".safetensors", ".bin", ".pt", ".pth"}


def _resolve(path: str, source: Source) -> str:
    inside = source.folder / Path(path).expanduser()
    return str(inside) if _is_local(path) or inside.exists() else path


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
    message = item["msg"].removeprefix("Value error, ")
    got = item.get("input")
    shown = f", got {got!r}" if isinstance(got, (str, int, float, bool)) else ""
    return f"{where}{name}: {message[0].lower()}{message[1:]}{shown}."


def _known_keys(location: Location) -> list[str]:
    if location[0] == "experts" and len(location) > 2:
        return list(ExpertSpec.model_fields)
    if location[0] == "tensors" and len(location) > 2:
        return list(TensorRule.model_fields)
    return list(Recipe.model_fields)


def _lines(node: yaml.Node, path: Location, duplicates: list[str]) -> dict[Location, int]:
    """Map every location of a YAML document to its line, and note keys that stand twice."""
    lines: dict[Location, int] = {path: node.start_mark.line + 1} if path else {}
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                duplicates.append(f"line {key.start_mark.line + 1}: key '{name}' stands twice.")
            seen.add(name)
            lines.update(_lines(value, (*path, name), duplicates))
            lines[(*path, name)] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            lines.update(_lines(value, (*path, position), duplicates))
    return lines
