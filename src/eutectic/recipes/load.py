"""Recipes from files and from Python, checked as a whole: all faults together, with lines."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from eutectic.errors import Fault, MethodError, RecipeError, suggest
from eutectic.methods import Method, all_methods, all_posts, get_method, get_post
from eutectic.methods.solving import ZERO
from eutectic.recipes.document import (
    Location,
    Source,
    by_line,
    exists,
    inside,
    no_file,
    read_document,
    schema_fault,
)
from eutectic.recipes.mergekit import check_mergekit
from eutectic.recipes.mergekit_document import is_mergekit
from eutectic.recipes.particular import layer_faults, rule_faults, scripted, variants
from eutectic.recipes.paths import is_local, named, resolve
from eutectic.recipes.schema import (
    SCALE_TAGS,
    SPREAD_TAGS,
    ExpertSpec,
    LayerSpec,
    Recipe,
    ScaleSearch,
    TensorRule,
)
from eutectic.storage import is_url

_TAGS = {*SCALE_TAGS, *SPREAD_TAGS}


def load_recipe(
    path: str | Path, options: Mapping[str, Any] | None = None
) -> tuple[Recipe, Source]:
    """Read and check a YAML recipe. Relative paths in it start at the recipe's folder.

    A mergekit configuration is known by its keys; `options` are keys of ours that a command adds
    to one, and are left alone otherwise. RecipeError lists every fault of the schema, the method's
    parameters and the paths.
    """
    values, source, duplicates = read_document(path, "a recipe", "base, experts and method")
    if is_mergekit(values):
        return check_mergekit(values, source, duplicates, options), source
    return check_recipe(values, source, duplicates), source


def check_recipe(
    values: Mapping[str, Any], source: Source | None = None, faults: Sequence[Fault] = ()
) -> Recipe:
    """Return a checked recipe with resolved local paths."""
    source = source or Source()
    values = _mapping(_paths_as_text(values))
    if is_mergekit(values):
        return check_mergekit(values, source, faults)
    faults = list(faults)
    recipe = None
    try:
        recipe = Recipe.model_validate(dict(values))
    except ValidationError as error:
        faults += [_schema_fault(item, source) for item in error.errors()]
    faults += _method_faults(values, source)
    faults += [] if recipe is None else _post_faults(recipe, source)
    faults += _path_faults(values, source)
    if recipe is not None and recipe.side_files not in ("base", *recipe.experts):
        what = f"'{recipe.side_files}' is neither 'base' nor an expert."
        nearest = suggest(recipe.side_files, ["base", *recipe.experts])
        line = source.line("side_files")
        faults.append(Fault("unknown_expert", what, "side_files", line, next=nearest))
    if recipe is not None and not faults:
        faults += [*rule_faults(recipe, source), *layer_faults(recipe, source)]
    if faults or recipe is None:
        raise RecipeError(by_line(faults), source.name)
    return scripted(_resolve_paths(recipe, source), source)


def _paths_as_text(value: object) -> object:
    """Write every `Path` inside a recipe from Python as a string, as a file would."""
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return {key: _paths_as_text(inner) for key, inner in items}
    return named(value) if isinstance(value, Path) else value


def _method_faults(values: Mapping[str, Any], source: Source) -> list[Fault]:
    name = values.get("method")
    if not isinstance(name, str):
        return []
    parameters = _mapping(values.get("parameters"))
    try:
        method = get_method(name)
    except MethodError as error:
        what = " ".join(str(error).splitlines())
        line = source.line("method")
        if name in all_posts():
            what = f"'{name}' is no method: it follows one."
            choose = f"Name the method, and post: {name} (--post {name})."
            return [Fault("unknown_method", what, line=line, next=choose)]
        return [Fault("unknown_method", what, line=line)]
    faults = _parameter_faults(method, parameters, source, ("parameters",))
    experts = _mapping(values.get("experts"))
    for expert, spec in experts.items():
        own = _mapping(_mapping(spec).get("parameters"))
        where: Location = ("experts", expert, "parameters")
        if shared := [key for key in own if key not in method.per_expert]:
            allowed = ", ".join(sorted(method.per_expert)) or "none"
            what = f"method '{name}' has no {shared[0]} of each expert's own."
            line, at = source.line(*where, shared[0]), f"expert '{expert}'"
            faults.append(Fault("shared_parameter", what, at, line, allowed=allowed))
        elif own and not faults:
            faults += _parameter_faults(method, {**parameters, **own}, source, where)
    if experts and not values.get("layers"):
        try:
            method.check_expert_count(len(experts))
        except MethodError as error:
            faults.append(Fault("expert_count", str(error), line=source.line("experts")))
    return faults


def _post_faults(recipe: Recipe, source: Source) -> list[Fault]:
    """Return what is wrong with what follows the merge."""
    if recipe.post is None:
        return []
    stated = {"method": recipe.post} if isinstance(recipe.post, str) else dict(recipe.post)
    name, line = stated.pop("method", None), source.line("post")
    if not isinstance(name, str):
        what = "names no post-processor."
        choose = "Name it: post: svc, or post: {method: svc, metric: inputs}."
        return [Fault("no_post", what, "post", line, next=choose)]
    try:
        entry = get_post(name)
        entry.adapter.validate_python(stated)
    except MethodError as error:
        return [Fault("unknown_post", " ".join(str(error).splitlines()), "post", line)]
    except ValidationError as error:
        found = zip(error.errors(), get_post(name).faults(error), strict=True)
        return [
            replace(fault, line=source.line("post", *item["loc"]), where=f"post.{fault.where}")
            if fault.where
            else replace(fault, line=line, where="post")
            for item, fault in found
        ]
    if recipe.base is None:
        what = f"post-processor '{name}' works on changes of a base, and the recipe names none."
        return [Fault("no_base", what, "post", line, next="Name a base, or leave post out.")]
    return []


def _parameter_faults(
    method: Method, parameters: Mapping[str, Any], source: Source, place: Location
) -> list[Fault]:
    faults: dict[Fault, None] = {}
    at = f"method '{method.name}'"
    for values in variants(method, {str(key): value for key, value in parameters.items()}):
        try:
            method.adapter.validate_python(values)
        except ValidationError as error:
            for item, fault in zip(error.errors(), method.faults(error), strict=True):
                where = f"{at}: {fault.where}" if fault.where else at
                faults[replace(fault, line=source.line(*place, *item["loc"]), where=where)] = None
    return list(faults)


def _path_faults(values: Mapping[str, Any], source: Source) -> list[Fault]:
    """Find paths that lead nowhere, even in a recipe that fails the schema elsewhere."""
    paths: dict[Location, Any] = {(key,): values.get(key) for key in ("base", "base_adapter")}
    for name, spec in _mapping(values.get("experts")).items():
        paths["experts", name] = spec  # a path alone
        for key in ("path", "adapter", "statistics"):
            paths["experts", name, key] = _mapping(spec).get(key)
    tasks = ("scale", "tasks")
    paths[tasks] = _mapping(values.get("scale")).get("tasks")
    return [
        no_file(where, path, source)
        for where, path in paths.items()
        if isinstance(path, str) and (is_local(path, source, where[-1]) or where == tasks)
        if not is_url(path)  # told when it is opened
        if not exists(inside(path, source))
    ]


def _mapping(value: object) -> Mapping[str, Any]:
    """Return the value if it is a mapping, else an empty one: the schema reports any other."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _resolve_paths(recipe: Recipe, source: Source) -> Recipe:
    experts: dict[str, ExpertSpec] = {}
    for name, spec in recipe.experts.items():
        statistics = spec.statistics and resolve(spec.statistics, source, "statistics")
        adapter = spec.adapter and resolve(spec.adapter, source)
        found = {"path": resolve(spec.path, source), "adapter": adapter, "statistics": statistics}
        experts[name] = spec.model_copy(update=found)
    update: dict[str, Any] = {"experts": experts}
    if recipe.base is not None:
        update["base"] = resolve(recipe.base, source)
    if recipe.base_adapter is not None:
        update["base_adapter"] = resolve(recipe.base_adapter, source)
    init = recipe.parameters.get("init")
    if isinstance(init, str) and init != ZERO and init not in all_methods():
        update["parameters"] = {**recipe.parameters, "init": resolve(init, source)}
    if isinstance(recipe.scale, ScaleSearch) and recipe.scale.tasks is not None:
        tasks = named(inside(recipe.scale.tasks, source))
        update["scale"] = recipe.scale.model_copy(update={"tasks": tasks})
    return recipe.model_copy(update=update)


def _schema_fault(item: Any, source: Source) -> Fault:
    place: Location = item["loc"]
    if any(part in _TAGS for part in place):
        item = {**item, "loc": tuple(part for part in place if part not in _TAGS)}
    return schema_fault(item, source, _known_keys)


def _known_keys(location: Location) -> list[str]:
    nested = {
        "experts": ExpertSpec,
        "tensors": TensorRule,
        "layers": LayerSpec,
        "scale": ScaleSearch,
    }
    depth = 1 if location[0] == "scale" else 2
    model = nested.get(str(location[0]), Recipe) if len(location) > depth else Recipe
    return list(model.model_fields)
