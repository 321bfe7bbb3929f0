"""Methods × ways to choose α × tasks: each method merged once, everything measured, one table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eutectic.checkpoint.writer import write_atomically
from eutectic.cluster.where import taken_for_merge
from eutectic.comparison.candidates import Candidate, Way, candidates_of, has_statistics, ways_of
from eutectic.comparison.folder import (
    LOCK,
    RESULTS,
    TABLE,
    WORK,
    check_folder,
    remove,
    write_recipes,
)
from eutectic.comparison.merging import Measured, Tell, measure, planned
from eutectic.comparison.table import Comparison, Made, file_name, ranked, references_of
from eutectic.errors import Note, RequestError
from eutectic.evaluation.checkpoints import Checkpoint, named_checkpoints
from eutectic.evaluation.figures import results_of
from eutectic.evaluation.measured_pairs import open_journal
from eutectic.evaluation.pairs import EvaluationSettings, Pairs
from eutectic.evaluation.results import Results
from eutectic.evaluation.run import EvaluationOptions, check_trust, checked_splits
from eutectic.evaluation.task_files import Task, load_tasks
from eutectic.execution.executors import limits_of
from eutectic.execution.run import recipe_from
from eutectic.notebook import with_bar
from eutectic.options import options_from
from eutectic.recipes.schema import Recipe
from eutectic.storage import kept_folder, local_path
from eutectic.tuning.objectives import Opened

_SPLIT_READ = {"divergence": "proxy", "validation": "validation"}


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """What is compared, besides the recipe; see `compare`."""

    methods: Sequence[str | Mapping[str, Any]] | None = None
    searches: Sequence[str | float] | None = None
    search: Mapping[str, Any] | None = None
    models: Mapping[str, str | Path] | None = None
    proxy: Mapping[str, str | Path | Sequence[str | Path]] | None = None


@with_bar("comparing")
def compare(
    recipe: str | Path | Mapping[str, Any] | None = None,
    *,
    tasks: str | Path | Mapping[str, Task],
    output: str | Path,
    threads: int | None = None,
    memory: str | int | None = None,
    progress: Tell | None = None,
    **options: Any,
) -> Comparison:
    """Compare methods of merging, and ways to choose their α, on tasks.

    Every method is merged once, before α; each way chooses an α for these deltas, and the model at
    it is written aside and measured as `eutectic.evaluate` measures it. Base and experts are run
    once for all methods, and the recipe's statistics serve all of them. Rows are ranked by the mean
    over tasks of the share of the experts' figures; differences are paired, on the same resamples.

    A killed comparison is continued by the same call; a finished one may be asked for more methods
    or searches. What is known of the same inputs, tasks and settings is not computed again.

    Args:
        recipe: as for `eutectic.merge`. Its `scale` plays no part; its `method`, if it has one, is
            among the usual ones, with its `parameters`.
        tasks: a YAML file, or what `load_tasks` returned (searches over data need the file).
        output: a folder: `comparison.json`, `results.json`, `recipes/`, and what is known already.
            On the way it holds the deltas of one method and one model.
        threads: tensors merged side by side.
        memory: limit while merging.
        progress: told steps done, steps in all, and what is being done.
        **options: `methods`: names, `NAME:KEY=VALUE,…`, either with `+POST` behind
            it, or `{method, parameters, post, name}` (default:
            average, task_arithmetic, ties, tsv_m, iso_c, iso_cts; with statistics of every expert
            regmean, esm, iso_a, iso_regmean too); `searches`: `default` (the method's own α),
            numbers, `norm`, `auto`, `divergence`, `validation` (default: `default` and the first of
            `validation`, `divergence`, `auto`, `norm` that the data allow); `search`: keys of
            searches (`range`, `points`, `tolerance`, `compare`); `models`: name -> folder of models
            to measure beside, sweeps and routed ones among them; settings and `proxy` of
            `eutectic.evaluate` (`seed` is that of the bootstrap); `executor`, `ray_address`,
            `device` of `eutectic.merge`, where models run too; keys of a recipe (`base`,
            `experts`, `dtype`, …).

    Returns:
        The table, the best row first.

    Raises:
        RequestError: the request is wrong for a method that is named; nothing was started.
        EutecticError: the work failed; what is finished is kept for the next call. NaN or Inf in a
            merge or its outputs costs its row the figures, and the others go on.

    Example:
        >>> eutectic.compare("recipe.yaml", tasks="tasks.yaml", output="comparison",
        ...                  methods=["iso_c", "ties:density=0.3"])  # doctest: +SKIP
    """
    limits = limits_of(threads, memory, **taken_for_merge(options), models=True)
    asked, settings, options = _sorted(options)
    folder = local_path(output)
    check_folder(folder)
    known = dict(tasks) if isinstance(tasks, Mapping) else load_tasks(tasks)
    check_trust(known, settings.trust_code)
    values, stated = _recipe(recipe, options, asked)
    file = None if isinstance(tasks, Mapping) else str(tasks)
    statistics = has_statistics(stated)
    candidates = candidates_of(asked.methods, values, statistics)
    splits = [task.data for task in known.values()]
    ways = ways_of(asked.searches, asked.search or {}, file, splits, statistics)
    _check_names(candidates, ways)
    opened, explicit = Opened(), asked.searches is not None
    common = stated.model_dump(mode="json", exclude_unset=True)
    requests, left_out = planned(candidates, ways, common, limits, opened, stated=explicit)
    counted = checked_splits(known, asked.proxy or {}, settings.trust_code)
    wanted = {task.expert_name for task in known.values()}
    paths = requests[0].paths
    experts = {name: path for name, path in paths.experts.items() if name in wanted}
    checkpoints = named_checkpoints(
        known, paths.base, experts, asked.models or {}, settings.routing
    )
    references = len(checkpoints.all)
    meter = _Meter(references + sum(1 + 2 * len(r.ways) for r in requests), progress)
    pairs = Pairs(
        checkpoints, known, counted, settings, meter.within(references, ""), limits.models
    )
    with kept_folder(folder, LOCK) as place, open_journal(place / RESULTS) as journal:
        outcomes = pairs.outcomes(journal)
        meter.finish(references)
        rows = [Measured(Made(c.name)) for c in checkpoints.all if c.role == "model"]
        for request in requests:
            rows += measure(request, pairs, journal, place, limits, opened, meter.within)
            meter.finish(1 + 2 * len(request.ways))
        for row in rows:
            outcomes |= row.outcomes
        records = {row.made.name: row.record for row in rows if row.record is not None}
        merged = [Checkpoint(name, "model", folder / name) for name in records]
        results = results_of(pairs.of(*checkpoints.all, *merged), outcomes, records)
        made = [row.made for row in rows]
        notes = _notes(results, made, known, experts)
        comparison = _comparison(results, made, left_out, folder, notes)
        recipes = {r.name(way): r.recipe for r in requests for way in r.ways}
        write_recipes(place, recipes, made)
        text = json.dumps(comparison.as_record(), indent=1, ensure_ascii=False)
        write_atomically(place / RESULTS, (results.model_dump_json(indent=1) + "\n").encode())
        write_atomically(place / TABLE, (text + "\n").encode())
        remove(place / WORK)
    return comparison


def _sorted(
    options: Mapping[str, Any],
) -> tuple[ComparisonOptions, EvaluationSettings, dict[str, Any]]:
    """Return what is compared, how it is measured, and what is left for the recipe."""
    rest = dict(options)
    own = {n: rest.pop(n) for n in ComparisonOptions.__dataclass_fields__ if n in rest}
    measured = {n: rest.pop(n) for n in EvaluationOptions.__annotations__ if n in rest}
    settings = options_from(EvaluationSettings, measured, "compare")
    settings.check()
    return options_from(ComparisonOptions, own, "compare"), settings, rest


def _recipe(
    recipe: str | Path | Mapping[str, Any] | None,
    options: Mapping[str, Any],
    asked: ComparisonOptions,
) -> tuple[dict[str, Any], Recipe]:
    """Return the recipe with what it says of a method, and checked."""
    unknown = [key for key in options if key not in Recipe.model_fields]
    if unknown:
        raise RequestError(
            f"compare has no option '{unknown[0]}', and a recipe has no such key.\n"
            "Parameters belong to a method: methods=['NAME:KEY=VALUE'], or in the recipe."
        )
    stated = dict(recipe) if isinstance(recipe, Mapping) else {}
    given = dict(options)
    named = {"method", "merge_method", "slices", "models"} & {**stated, **given}.keys()
    placeholder = not isinstance(recipe, (str, Path)) and not named
    if placeholder:
        given["method"] = "average"
    checked, _ = recipe_from(recipe, given)
    if checked.script is not None:
        what = "a recipe that says something of single tensors or layers merges them its own way"
        if checked.script.stated is not None:
            what = "a mergekit configuration says a method of its own for every tensor"
        raise RequestError(
            f"{what}, and compare tries many.\n"
            "Measure its merge beside others: --model NAME=FOLDER; or name base and experts."
        )
    values = checked.model_dump(mode="json", exclude_unset=True)
    if placeholder:
        del values["method"]
    return values, checked


def _check_names(candidates: Sequence[Candidate], ways: Sequence[Way]) -> None:
    """Refuse rows that would share a file."""
    files: dict[str, str] = {}
    for candidate in candidates:
        for way in ways:
            name = f"{candidate.name}@{way.name}"
            other = files.setdefault(file_name(name).lower(), name)
            if other != name:
                raise RequestError(
                    f"the names '{other}' and '{name}' are too much alike for files.\n"
                    "Give one of the methods another: {method, parameters, name}."
                )


def _notes(
    results: Results, made: Sequence[Made], tasks: Mapping[str, Task], experts: Mapping[str, Any]
) -> list[str]:
    found: list[Note] = []
    alone = tuple(t.name for t in tasks.values() if t.expert_name not in experts)
    if alone:
        found.append(Note("tasks_without_expert", alone))
    same = tuple(m.name for m in made if _SPLIT_READ.get(m.search or "") == results.split)
    if same:
        found.append(Note("chosen_on_shown_rows", same, {"split": results.split}))
    if len([m for m in made if m.error is None]) > 2:
        found.append(Note("best_of_many", numbers={"count": len(made)}))
    return [*map(str, found), *results.notes]


def _comparison(
    results: Results,
    made: Sequence[Made],
    left_out: Mapping[str, str],
    folder: Path,
    notes: Sequence[str],
) -> Comparison:
    rows, best = ranked(results, made)
    return Comparison(
        rows=tuple(rows),
        best=best,
        level=tuple(r.name for r in rows if not r.distinguishable and r.name != best),
        left_out=left_out,
        references=references_of(results),
        results=results,
        output=folder,
        notes=tuple(notes),
    )


class _Meter:
    """Counts steps of a comparison; parts of the work tell how far they are within theirs."""

    def __init__(self, total: float, progress: Tell | None) -> None:
        self._total, self._progress = total, progress
        self._base = 0.0  # where what runs now began
        self._done = 0.0  # steps told within it

    def within(self, steps: float, name: str) -> Tell:
        """Return what a part of so many steps tells of its own progress."""
        begun = self._base + self._done
        self._done += steps

        def tell(done: float, total: float, what: str) -> None:
            if self._progress is not None:
                part = steps * min(1.0, done / total) if total else 0.0
                text = ", ".join(filter(None, (name, what)))
                self._progress(min(self._total, begun + part), self._total, text)

        return tell

    def finish(self, steps: float) -> None:
        """Note that a part of so many steps is finished, whatever it told."""
        self._base += steps
        self._done = 0.0
