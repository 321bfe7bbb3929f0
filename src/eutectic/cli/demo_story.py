"""What the demo does, without a word of it on the terminal: collect, merge, route, measure."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eutectic.errors import EutecticError, MissingExtraError, RequestError
from eutectic.storage import storage_of

if TYPE_CHECKING:
    from eutectic.evaluation import Results, Task
    from eutectic.models.loading import LoadedModel
    from eutectic.statistics import StatisticsFile

Progress = Callable[[float, float, str], None]

# Scales that suit these adapters; see examples/minilm/README.md.
FIXED = dict(average=1.0, task_arithmetic=0.2, ties=0.4, tsv_m=0.25, iso_c=0.8, iso_cts=0.7)
# Of statistics. RegMean's factor on what is off the diagonal is for whole Grams: here are those of
# what the adapters see.
BY_DATA: dict[str, dict[str, Any]] = {
    "regmean": {"method": "regmean", "scale": 1.0, "parameters": {"off_diagonal": 1.0}},
    "mats": {"method": "mats", "scale": 0.7, "parameters": {"operator": "gram"}},
    "iso_a": {"method": "iso_a", "scale": 0.8},  # as a search by KL on the same texts finds
}
METHOD = "iso_c"  # of which a second row has its α chosen by what experts answer
KEPT = "iso_c_by_kl"
ROUTED = "routed"
RANK = 32  # of the experts beside the routed layers
MAX_TOKENS = 48
TEXTS = 64  # of each task, unlabelled: statistics and router see no others
SEARCHED = 32  # of these, for α
SEARCH = {"search": "divergence", "range": [0.2, 2.0], "points": 6, "tolerance": 0.1}
_SHARES = (10.0, 6.0, 20.0, 12.0, 5.0, 60.0)  # seconds of the stages, about
_HEADER = "# Written by `eutectic demo`, which writes it anew.\n"


@dataclass(frozen=True)
class Experts:
    """The demo's models and texts, and where its results go."""

    base: Path
    examples: Path
    output: Path

    @property
    def names(self) -> list[str]:
        """The experts, each with a task of its name."""
        return sorted(p.name for p in (self.examples / "experts").iterdir() if p.is_dir())

    @property
    def folders(self) -> dict[str, Path]:
        """Expert -> its adapter."""
        return {name: self.examples / "experts" / name for name in self.names}

    def texts(self, name: str, split: str) -> Path:
        """Return the file of a task's texts: `tasks` with labels, `proxy` without."""
        return self.examples / split / f"{name}.jsonl"

    def statistics(self, name: str) -> Path:
        """Return where an expert's statistics go."""
        return self.output / "statistics" / f"{name}.safetensors"

    def recipe(self, statistics: bool = False) -> dict[str, Any]:
        """Return base and experts as a recipe names them."""
        experts = {
            name: {"path": str(folder)}
            | ({"statistics": str(self.statistics(name))} if statistics else {})
            for name, folder in self.folders.items()
        }
        return {"base": str(self.base), "experts": experts}


@dataclass(frozen=True)
class Told:
    """What the demo found."""

    results: Results
    scales: Mapping[str, float]  # of every merge; the routed model has none of its own
    with_texts: frozenset[str]  # models that unlabelled texts went into
    merged: Path
    routed: Path
    page: Path | None  # None without jinja2


def tell_story(demo: Experts, scratch: Path, progress: Progress) -> Told:
    """Carry out the demo; `scratch` holds the merges that are not kept."""
    from eutectic.checkpoint.index import read_json_object
    from eutectic.evaluation import evaluate
    from eutectic.reporting import inspect
    from eutectic.tuning import merge

    merged, routed = demo.output / "merged", demo.output / ROUTED
    earlier = _earlier(demo, merged, routed)
    stage = _Stages(progress, _SHARES)
    tasks_file = write_tasks(demo)
    of_routing = _collect(demo, stage.next())
    scales: dict[str, float] = dict(FIXED)
    models: dict[str, Path] = {}
    tell = stage.next()
    wanted: dict[str, dict[str, Any]] = {
        **{method: {"method": method, "scale": scale} for method, scale in FIXED.items()},
        **BY_DATA,
    }
    for step, (name, asked) in enumerate(wanted.items()):
        tell(step, len(wanted), f"merging by {name}")
        models[name] = scratch / name
        known = demo.recipe(statistics=name in BY_DATA)
        scales[name] = merge({**known, **asked}, output=models[name]).scale
    tell = stage.next()
    asked = {**demo.recipe(), "method": METHOD}
    asked["scale"] = {**SEARCH, "tasks": str(tasks_file)}
    if earlier and not _is_same(merged, asked):
        raise _not_ours(merged)
    if not earlier:
        merge(asked, output=merged, progress=tell)
    scales[KEPT] = float(read_json_object(merged / "eutectic.json")["scale"])
    models[KEPT] = merged
    _route(demo, merged, routed, of_routing, stage.next())
    models[ROUTED] = routed
    inspect(
        base=demo.base,
        experts={name: str(folder) for name, folder in demo.folders.items()},
        merged={name: models[name] for name in ("average", "iso_a", KEPT)},
        output=demo.output / "inspection.json",
        progress=stage.next(),
    )
    results = evaluate(
        tasks(demo),
        base=demo.base,
        experts=demo.folders,
        models=models,
        output=demo.output / "results.json",
        progress=stage.next(),
    )
    page = _write_page(demo)
    return Told(results, scales, frozenset({*BY_DATA, KEPT, ROUTED}), merged, routed, page)


def _write_page(demo: Experts) -> Path | None:
    """Write the page of all that was found, if jinja2 is there."""
    from eutectic import report

    folder = demo.output
    sources = [
        folder / "results.json",
        f"{KEPT}={folder / 'merged'}",
        f"{ROUTED}={folder / ROUTED}",
        folder / "inspection.json",
    ]
    page = folder / "report.html"
    try:
        report(*sources, output=page, title="The demo: six experts of all-MiniLM-L6-v2")
    except MissingExtraError:
        return None
    return page


class _Stages:
    """One bar for several stages, each with a share of it."""

    def __init__(self, progress: Progress, shares: Sequence[float]) -> None:
        self._progress, self._shares, self._begun = progress, list(shares), -1

    def next(self) -> Progress:
        """Return the progress of the next stage."""
        self._begun += 1
        before, own = sum(self._shares[: self._begun]), self._shares[self._begun]

        def tell(done: float, total: float, what: str) -> None:
            part = done / total if total else 0.0
            self._progress(before + own * min(part, 1.0), sum(self._shares), what)

        return tell


def tasks(demo: Experts) -> dict[str, Task]:
    """Return task -> its texts, measured through the expert's head, the base through its own."""
    from eutectic.evaluation import Task
    from eutectic.evaluation.task_files import Part

    return {
        name: Task(
            name=name,
            kind="text-classification",
            data={"test": Part(path=str(demo.texts(name, "tasks")))},
            head=str(folder / "head.safetensors"),
            base_head=str(folder / "base_head.safetensors"),
            max_length=MAX_TOKENS,
        )
        for name, folder in demo.folders.items()
    }


def write_tasks(demo: Experts) -> Path:
    """Write tasks.yaml and recipe.yaml, with which the other verbs go on, and return the former."""
    import yaml

    folder = demo.output
    folder.mkdir(parents=True, exist_ok=True)

    def seen(path: Path) -> str:
        try:
            return os.path.relpath(path, folder)
        except ValueError:  # another drive
            return str(path)

    described: dict[str, Any] = {}
    for name, own in demo.folders.items():
        proxy = demo.texts(name, "proxy")
        described[name] = {
            "kind": "text-classification",
            "data": {"test": seen(demo.texts(name, "tasks")), "proxy": seen(proxy)},
            "head": seen(own / "head.safetensors"),
            "base_head": seen(own / "base_head.safetensors"),
            "max_length": MAX_TOKENS,
        }
        share = min(1.0, SEARCHED / max(1, len(proxy.read_text("utf-8").splitlines())))
        described[name]["data"]["proxy"] = {"path": seen(proxy), "share": round(share, 3)}
    experts = {
        name: {"path": seen(own), "statistics": seen(demo.statistics(name))}
        for name, own in demo.folders.items()
    }
    recipe = {"base": seen(demo.base), "experts": experts, "method": METHOD}
    _write(folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    return _write(folder / "tasks.yaml", yaml.safe_dump({"tasks": described}, sort_keys=False))


def _write(path: Path, text: str) -> Path:
    """Write a file anew if it is an earlier demo's, and refuse to write over another."""
    from eutectic.checkpoint.writer import write_atomically
    from eutectic.storage.small_files import read_text

    if path.exists() and not read_text(path).startswith(_HEADER):
        raise _not_ours(path)
    write_atomically(path, (_HEADER + text).encode())
    return path


def _collect(demo: Experts, progress: Progress) -> dict[str, StatisticsFile]:
    """Collect what adapters see of the inputs, for merges, and return what routing needs."""
    from eutectic.statistics import collect, core_rows
    from eutectic.statistics.statistics_file import check_target

    (demo.output / "statistics").mkdir(exist_ok=True)
    found: dict[str, StatisticsFile] = {}
    rows = None
    for step, (name, folder) in enumerate(demo.folders.items()):
        progress(step, len(demo.names), f"statistics of {name}")
        loaded = _load(folder, demo.base)
        rows = rows or core_rows(loaded.model, dict(demo.folders), demo.base)
        target = demo.statistics(name)
        check_target(target)
        known: dict[str, Any] = {"fingerprint": loaded.fingerprint}
        batches = _batches(demo, name, loaded)
        collect(loaded.model, batches, target, core=rows, **known)
        found[name] = collect(loaded.model, batches, layers=_routed_names(loaded), **known)
    return found


def _route(
    demo: Experts,
    merged: Path,
    routed: Path,
    statistics: Mapping[str, StatisticsFile],
    progress: Progress,
) -> None:
    """Write the routed model, unless it is there: the merge, and thin experts beside its layers."""
    from eutectic.checkpoint.folder import copy_side_files, side_files
    from eutectic.models.loading import quietly, transformers_for
    from eutectic.routed import build_routed
    from eutectic.statistics import collect

    if _holds(routed):
        return
    loaded = _load(merged, None)
    names = _routed_names(loaded)
    of_router: dict[str, StatisticsFile] = {}
    for step, name in enumerate(demo.names):
        progress(step, len(demo.names) + 2, f"router's statistics of {name}")
        batches = _batches(demo, name, loaded)
        of_router[name] = collect(
            loaded.model, batches, layers=names, fingerprint=loaded.fingerprint
        )
    progress(len(demo.names), len(demo.names) + 2, "building thin experts")
    model: Any = build_routed(
        loaded.model, demo.folders, statistics, of_router, rank=RANK, base=demo.base
    )
    with quietly(transformers_for("writing a routed model")):
        model.save_pretrained(routed)
    own = {path.name for path in routed.iterdir()}
    copy_side_files(merged, routed, [name for name in side_files(merged) if name not in own])


def _load(folder: Path, base: Path | None) -> LoadedModel:
    from eutectic.models.loading import load_model

    return load_model(folder, base)


def _batches(demo: Experts, name: str, loaded: LoadedModel) -> Any:
    from eutectic.data.encoded_rows import BatchOptions, open_batches

    how = BatchOptions(batch_size=32, max_length=MAX_TOKENS, max_examples=TEXTS)
    return open_batches(str(demo.texts(name, "proxy")), loaded, how)


def _routed_names(loaded: LoadedModel) -> list[str]:
    from eutectic.routed.routed_layers import choose_layers

    return [layer.name for layer in choose_layers(loaded.model, None)]


def _earlier(demo: Experts, merged: Path, routed: Path) -> bool:
    """Tell whether an earlier demo has written its models there; refuse anything else at once."""
    from eutectic.checkpoint.index import read_json_object

    made = [folder for folder in (merged, routed) if folder.is_file() or _holds(folder)]
    for folder, mark in ((merged, "eutectic.json"), (routed, "routed.json")):
        if folder not in made:
            continue
        try:
            described = read_json_object(folder / mark)
            experts = described["recipe"]["experts"] if folder == merged else described["experts"]
            ours = sorted(experts) == demo.names and merged in made
        except (EutecticError, OSError, KeyError, TypeError):
            ours = False
        if not ours:
            raise _not_ours(folder)
    return merged in made


def _holds(folder: Path) -> bool:
    return bool(storage_of(folder).list(folder))


def _is_same(folder: Path, recipe: Mapping[str, Any]) -> bool:
    """Tell whether a merge is the one that is asked for."""
    from eutectic.execution.run import check_same

    try:
        check_same(folder, recipe)
    except EutecticError:
        return False
    return True


def _not_ours(path: Path) -> RequestError:
    return RequestError(
        f"{path} is there already and is not an earlier demo's.\nName another folder with --output."
    )
