"""What is compared: methods with their parameters, and the ways to choose α for each of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from eutectic.errors import RequestError, suggest
from eutectic.recipes.named_values import name_and_values
from eutectic.recipes.schema import NOT_TAKEN, Recipe, ScaleSearch

USUAL = ("average", "task_arithmetic", "ties", "tsv_m", "iso_c", "iso_cts")
WITH_STATISTICS = ("regmean", "esm", "iso_a", "iso_regmean")  # where every expert has some
_PLUS = re.compile(r"\+(?=[A-Za-z_])")  # before a post-processor
SEARCHES = ("default", "norm", "auto", "divergence", "validation")


@dataclass(frozen=True)
class Candidate:
    """A method with parameters."""

    name: str  # of its rows, and unique among the candidates
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    post: str | Mapping[str, Any] | None = None  # what follows it; None: what the recipe says
    stated: bool = True  # by the user: what keeps it from being merged is an error


@dataclass(frozen=True)
class Way:
    """A way to choose α."""

    name: str  # one of SEARCHES, or a number
    scale: float | ScaleSearch | None  # as a recipe says it; None: the method's default

    @property
    def search(self) -> ScaleSearch | None:
        """The search, where it is one."""
        return self.scale if isinstance(self.scale, ScaleSearch) else None


def candidates_of(
    methods: Sequence[str | Mapping[str, Any]] | None, recipe: Mapping[str, Any], statistics: bool
) -> list[Candidate]:
    """Return the methods to compare: those that are named, or the recipe's own and the usual ones.

    Args:
        methods: `NAME`, `NAME:KEY=VALUE,…`, either with `+POST` or `+POST:KEY=VALUE,…` behind it,
            or `{method, parameters, post, name}`; None for the usual.
        recipe: as stated; its `parameters` are those of its own `method`, however that is named.
        statistics: whether every expert has statistics, so that methods that need some are usual.
    """
    own = recipe.get("method")
    before = dict(recipe.get("parameters") or {})
    if methods is None:
        names = [*USUAL, *(WITH_STATISTICS if statistics else ())]
        found = [Candidate(name, name, stated=False) for name in names if name != own]
        return [*([Candidate(str(own), str(own), before)] if own else []), *found]
    if not methods:
        raise RequestError(
            "no method to compare.\nName some, or leave them out for the usual ones."
        )
    found = [_candidate(item) for item in methods]
    found = [
        replace(c, parameters={**before, **c.parameters}) if c.method == own else c for c in found
    ]
    _refuse_twice([c.name for c in found], "method")
    return found


def _candidate(item: str | Mapping[str, Any]) -> Candidate:
    if isinstance(item, str):
        words = _PLUS.split(item, maxsplit=1)
        method, parameters = name_and_values(words[0], "method", "ties:density=0.3")
        post = words[1].strip() if len(words) > 1 else None
        return Candidate(item.replace(" ", ""), method, parameters, post)
    unknown = sorted(item.keys() - {"method", "parameters", "post", "name"})
    if unknown or not isinstance(item.get("method"), str):
        what = f"has no '{unknown[0]}'" if unknown else "needs its name under 'method'"
        raise RequestError(f"a method to compare {what}; it has: method, parameters, post, name.")
    parameters: Mapping[str, Any] = item.get("parameters") or {}
    listed = ",".join(f"{key}={value}" for key, value in parameters.items())
    post = item.get("post")
    after = post.get("method") if isinstance(post, Mapping) else post
    name = f"{item['method']}:{listed}" if listed else item["method"]
    name = item.get("name") or (f"{name}+{after}" if after else name)
    return Candidate(str(name), item["method"], dict(parameters), post)


def ways_of(
    searches: Sequence[str | float] | None,
    stated: Mapping[str, Any],
    tasks: str | None,
    splits: Iterable[Iterable[str]],
    statistics: bool,
) -> list[Way]:
    """Return the ways to choose α: those that are named, or the default and the best there is.

    The best that all tasks and experts allow is `validation`, `divergence`, `auto`, then `norm`.

    Args:
        searches: `default`, numbers, `auto`, `divergence`, `validation`; None as above.
        stated: keys of searches (`range`, `points`, `tolerance`, `compare`), where they apply.
        tasks: file of tasks; None where there is none, only tasks from Python.
        splits: of every task, the names of its splits.
        statistics: whether every expert has statistics.
    """
    if searches is None:
        common = set[str].intersection(*(set(own) for own in splits)) if tasks else set[str]()
        best = [s for s, split in _SPLIT_OF.items() if split in common]
        best += ["auto" if statistics else "norm"]
        searches = ["default", *best[:1]]
    found = [_way(item, stated, tasks) for item in searches]
    if not found:
        raise RequestError("no way to choose α.\nName some, or leave them out.")
    _refuse_twice([way.name for way in found], "search")
    return found


_SPLIT_OF = {"validation": "validation", "divergence": "proxy"}


def _way(item: str | float, stated: Mapping[str, Any], tasks: str | None) -> Way:
    text = str(item).strip()
    name = "auto" if text == "gram" else text
    if name == "default":
        return Way(name, None)
    if name in SEARCHES:
        search = "gram" if name == "auto" else name
        reads = search in _SPLIT_OF
        if reads and tasks is None:
            raise RequestError(
                f"search '{name}' reads its data from a file of tasks (YAML).\nName the file."
            )
        own = {key: value for key, value in stated.items() if key not in NOT_TAKEN[search]}
        values = {"search": search, **own} | ({"tasks": tasks} if reads else {})
        # Checked as a recipe's, so that faults are told in the same words.
        return Way(name, checked_search(values))
    try:
        return Way(f"{float(text):g}", float(text))
    except ValueError:
        raise RequestError(
            f"search '{text}' is none of {', '.join(SEARCHES)} and no number."
            f"{suggest(text, SEARCHES)}"
        ) from None


def checked_search(values: Mapping[str, Any]) -> ScaleSearch:
    """Return a search with its keys checked."""
    from pydantic import ValidationError

    try:
        return ScaleSearch.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "search"
        raise RequestError(f"{where}: {first['msg']}.") from None


def _refuse_twice(names: Sequence[str], what: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RequestError(f"{what} '{twice[0]}' is given twice.")


def has_statistics(recipe: Recipe) -> bool:
    """Tell whether a recipe names statistics of every expert."""
    return all(spec.statistics is not None for spec in recipe.experts.values())
