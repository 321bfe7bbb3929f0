"""The entry: a recipe and a file of tasks to edit, with what was found in their comments."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eutectic.checkpoint.hub import hub_id
from eutectic.drafting.data import (
    Rows,
    belongs_to,
    beside,
    columns_for,
    holds_corpus,
    is_data,
    look,
    within,
)
from eutectic.drafting.models import (
    Base,
    Found,
    choose_base,
    classes_of,
    config_of,
    embeds_texts,
    expert_names,
    find_models,
    holds_models,
    kind_of,
    takes_pictures,
)
from eutectic.errors import EutecticError, RequestError
from eutectic.evaluation.metrics import METRICS_OF_KIND
from eutectic.models.task_kinds import EMBEDDING, ZERO_SHOT, TaskKind
from eutectic.statistics import load_statistics
from eutectic.storage import is_url, local_path, meant, seen_from, view
from eutectic.words import few, with_urls

HERE_GOES = "PATH-OR-HUB-ID"  # stands for what was not found


@dataclass(frozen=True)
class Draft:
    """What to write.

    Attributes:
        recipe: the text of a recipe.
        tasks: the text of a file of tasks.
        found: what was found, a line each, for people.
        open: what is left to fill in, a line each.
    """

    recipe: str
    tasks: str
    found: tuple[str, ...]
    open: tuple[str, ...]


def draft(
    named: Sequence[str | Path],
    folder: str | Path = ".",
    *,
    base: str | None = None,
    data: Sequence[str | Path] = (),
) -> Draft:
    """Return a recipe and a file of tasks for checkpoints and adapters, to be edited.

    Read are headers, configurations, the first bytes of files of rows, and a few values of each
    checkpoint where nothing else tells which of them is the base.

    Args:
        named: folders and files: checkpoints, adapters, folders that hold several, and data.
        folder: where both files will lie; paths in them start there.
        base: the model that all started from, where it is not to be guessed.
        data: files of rows; others that are called like an expert are looked for beside them.

    Raises:
        RequestError: what is neither a model nor data, no expert.
    """
    texts = [str(view(item)) if is_url(item) else str(item) for item in named]
    places = [Path(t) for t in texts if _is_of_data(Path(t))]
    places += [view(d) for d in data]
    for path in places:
        if not path.exists():
            raise RequestError(f"{path}: no such file or folder of rows.{meant(path)}")
    models = find_models([t for t in texts if Path(t) not in places])
    chosen = choose_base(models, base)
    own = None if chosen.found is None else chosen.found.path.resolve()
    experts = [one for one in models if one.path.resolve() != own]
    if not experts:
        raise RequestError(
            "no expert was found: a recipe merges checkpoints or adapters that were fine-tuned "
            "from a base.\nName their folders: eutectic init ./base ./a ./b"
        )
    names = expert_names(experts, chosen.found)
    rows = [row for path in places for row in within(path, names)]
    empty = [path for path in places if not within(path, names)]
    parents = [(one.path if one.path.is_dir() else one.path.parent).parent for one in experts]
    parents += [p.parent for p in parents if p.parent != p][:1]
    paths = {p.resolve(): p for p in reversed([*rows, *beside(names, parents)])}
    looked = [look(p) for p in reversed(paths.values())]  # links to the same files once
    corpora = [one for one in looked if holds_corpus(one)]
    looked = [one for one in looked if one not in corpora]
    of: dict[str, list[Rows]] = {name: [] for name in names}
    is_named = any(belongs_to(one, names) for one in looked)
    for one in looked:
        owner = names[0] if len(names) == 1 and not is_named else belongs_to(one, names)
        if owner is not None:
            of[owner].append(one)
    place = local_path(folder)
    statistics = {n: s for n, e in zip(names, experts, strict=True) if (s := _statistics(n, e))}
    left: list[str] = []
    if chosen.typed is None:
        left.append("recipe.yaml: base, the model that all experts started from")
    recipe = _recipe(chosen, dict(zip(names, experts, strict=True)), statistics, place)
    parts: list[str] = []
    for name, expert in zip(names, experts, strict=True):
        corpus = _corpus_of(name, names, of[name], corpora)
        text, missing = _task(name, expert, chosen.found, (of[name], corpus), place)
        parts.append(text)
        left += [f"tasks.yaml: {name}: {what}" for what in missing]
    strays = [o.path for o in looked if not any(o in own for own in of.values())]
    if given := [str(path) for path in strays if path in rows]:
        verb = (
            "belongs to no expert by its name" if len(given) == 1 else "belong to no expert by name"
        )
        left.append(f"{few(given)}: {verb}")
    left += [f"{path}: holds no file of rows" for path in empty]
    found = [f"base {chosen.typed} ({chosen.why})"] if chosen.typed else []
    found += [f"{n}: {_described(e)}" for n, e in zip(names, experts, strict=True)]
    found, left = [with_urls(text) for text in found], [with_urls(text) for text in left]
    return Draft(recipe, _TASKS_HEAD + "".join(parts), tuple(found), tuple(left))


def _corpus_of(
    name: str, names: Sequence[str], rows: Sequence[Rows], corpora: Sequence[Rows]
) -> Path | None:
    """Return the documents that are called like an expert, or lie alone beside its rows."""
    beside = {row.path.parent for row in rows}
    of_name = [one.path for one in corpora if belongs_to(one, names) == name]
    near = [one.path for one in corpora if one.path.parent in beside]
    return next((found[0] for found in (of_name, near) if len(found) == 1), None)


def _is_of_data(path: Path) -> bool:
    """Tell whether a path is rows, or a folder that holds rows and no model."""
    return is_data(path) or (path.is_dir() and bool(within(path, ())) and not holds_models(path))


def _described(expert: Found) -> str:
    if expert.ia3:
        return "(IA)³ adapter"
    if expert.adapter is not None:
        kind = str(expert.adapter.get("peft_type", "PEFT"))
        return f"{_WRITTEN.get(kind, kind)} adapter"
    architectures = expert.config.get("architectures") or ["checkpoint"]
    return str(architectures[0])


def _statistics(name: str, expert: Found) -> Path | None:
    """Return the statistics of an expert that lie in its folder or beside it, by their name."""
    folder = expert.path if expert.path.is_dir() else expert.path.parent
    called = (f"{name}.stats.safetensors", f"{folder.name}.stats.safetensors")
    places = [p for f in (folder, folder.parent) for c in called if (p := f / c).is_file()]
    places += sorted(folder.glob("*.stats.safetensors"))
    for path in places:
        try:
            load_statistics(path)
        except (EutecticError, OSError):
            continue
        return path
    return None


def _written(path: str | Path, place: Path) -> str:
    """Return a path as YAML, from the folder of the file; a name on the hub as it is."""
    text = str(path)
    if (there := seen_from(text, place)) is not None:
        text = there
    elif Path(text).exists():
        target, start = Path(text).absolute(), place.absolute()
        relative = Path(os.path.relpath(target, start)).as_posix()
        near = relative.count("..") <= 3
        text = (
            relative
            if near and not relative.startswith("..")
            else relative
            if near
            else str(target)
        )
        text = text if text.startswith((".", "/")) or hub_id(text) is None else f"./{text}"
    return _quoted(text)


def _quoted(text: str) -> str:
    plain = text and all(c.isalnum() or c in "/._-+" for c in text)
    return text if plain and text[0] not in "-+" else json.dumps(text, ensure_ascii=False)


def _recipe(
    base: Base, experts: Mapping[str, Found], statistics: Mapping[str, Path], place: Path
) -> str:
    vectors = all(one.ia3 for one in experts.values())
    method = "task_arithmetic" if vectors else "iso_c"
    lines = ["# What to merge, and how. Every key: docs/guides/recipes.md.", "#"]
    lines += ["#   eutectic plan recipe.yaml                what becomes of every tensor"]
    lines += ["#   eutectic merge recipe.yaml -o merged/", ""]
    if base.typed is None:
        lines += ["# EDIT: the model that all experts started from: a folder, or a name on the hub"]
        lines += [f"base: {HERE_GOES}"]
    else:
        lines += [f"base: {_written(base.typed, place)}  # {base.why}"]
    lines += ["", "experts:"]
    for name, expert in experts.items():
        path = _written(expert.typed, place)
        if name in statistics:
            own = _written(statistics[name], place)
            lines.append(f"  {_quoted(name)}: {{path: {path}, statistics: {own}}}")
        else:
            lines.append(f"  {_quoted(name)}: {path}  # {_described(expert)}")
    lines += [
        "  # With a weight, or statistics for methods that read them (eutectic collect):",
        "  # name: {path: ./folder, weight: 0.5, statistics: ./name.stats.safetensors}",
        "",
        "# eutectic methods lists all. The usual ones are tried on your tasks by",
        "#   eutectic compare recipe.yaml --tasks tasks.yaml -o comparison/",
        f"method: {method}",
    ]
    if vectors:
        lines += ["# (IA)³ adapters are vectors: methods for matrices do nothing for them."]
    else:
        lines += ["# method: ties", "# parameters: {density: 0.2}"]
    lines += [
        "",
        "# α: how much of the merged change is added. Without a line, the method's default.",
        "# scale: 0.8",
        "# scale: {search: divergence, tasks: tasks.yaml}  # unlabelled inputs, split proxy",
        "# scale: {search: validation, tasks: tasks.yaml}  # labelled rows, split validation",
    ]
    if len(statistics) == len(experts):
        lines += ["# scale: auto                                    # from statistics alone"]
    lines += ["", "# dtype: bfloat16     # of the output; default: as the base's tensors are"]
    if not vectors:
        lines += ["# heads: per_expert   # kept in <output>/experts/<name>/; or base, or drop"]
    return "\n".join(lines) + "\n"


# PEFT's names of kinds, where papers write them otherwise
_WRITTEN = {"LORA": "LoRA", "ADALORA": "AdaLoRA", "LOHA": "LoHa", "LOKR": "LoKr", "VERA": "VeRA"}
_TASKS_HEAD = """\
# What the experts are measured by. Every key: docs/guides/evaluation.md.
#
#   eutectic evaluate merged/ --tasks tasks.yaml --base BASE -e NAME=EXPERT …
#   eutectic compare recipe.yaml --tasks tasks.yaml -o comparison/
#
# A task is called like its expert, or names it (expert: NAME). Splits share no row:
#   test        what is reported
#   validation  labelled, for scale: {search: validation}
#   proxy       inputs, for scale: {search: divergence}, statistics and routers; labels play no part

tasks:
"""


def _task(
    name: str,
    expert: Found,
    base: Found | None,
    data: tuple[Sequence[Rows], Path | None],
    place: Path,
) -> tuple[str, list[str]]:
    """Return the lines of a task, and what is left open in it; data are rows and a corpus."""
    rows, corpus = data
    missing: list[str] = []
    kind = kind_of(expert, base)
    order = ("test", "validation", None, "proxy")  # proxies need no labels
    present = next((r.columns for o in order for r in rows if r.split == o and r.columns), ())
    bare = kind in (None, "feature-extraction")
    folder = expert.path if expert.path.is_dir() else expert.path.parent
    head = folder / "head.safetensors"
    if bare and not head.is_file() and embeds_texts(expert, base):
        # Rows of single texts with labels are classes, whatever the model was made for.
        fitting: list[TaskKind] = [k for k in EMBEDDING if not columns_for(k, present)[1]]
        if fitting or not present:
            kind = fitting[-1] if fitting else EMBEDDING[0]
        bare = kind not in EMBEDDING
    told = "by its configuration"
    shown: TaskKind = "text-classification"
    if kind is not None and not bare:
        shown = kind
    elif takes_pictures(config_of(expert, base)):
        shown = "image-classification"
    if kind in EMBEDDING:
        told = "by its modules.json, which names a pooling" + (", and its data" if present else "")
    if kind == ZERO_SHOT:
        told = "by its architecture: the texts of the classes are its head"
    if shown == "text-classification" and not columns_for("pair-classification", present)[1]:
        shown, told = "pair-classification", "by the columns of its data"
    if bare:
        told = "EDIT: its configuration does not tell"
        if shown == "image-classification":
            told = "EDIT: it takes pictures, and its configuration names no head"
        missing.append("kind")
    lines = [f"  {_quoted(name)}:", f"    kind: {shown}  # {told}"]
    if bare and head.is_file():
        lines.append(f"    head: {_written(head, place)}")
        if (folder / "base_head.safetensors").is_file():
            lines.append(f"    base_head: {_written(folder / 'base_head.safetensors', place)}")
    elif bare:
        lines.append(
            "    # head: ./head.safetensors  # weight and bias for pooled features, if it has none"
        )
    if classes := classes_of(expert):
        listed = ", ".join(classes[:6]) + (", …" if len(classes) > 6 else "")
        lines.append(f"    # its classes: {' '.join(listed.split())}")
    if kind == ZERO_SHOT:
        lines.append("    # prompts: [a photo of a {}.]  # texts with {} for the name of a class")
    if kind == "retrieval" and corpus is not None:
        lines.append(f"    corpus: {_written(corpus, place)}")
    elif kind == "retrieval":
        lines.append(f"    corpus: {name}/corpus.jsonl  # EDIT: the documents, `id` and `text`")
        missing.append("corpus")
    metrics = METRICS_OF_KIND[shown]
    lines.append(f"    # metric: {metrics[0]}  # {' | '.join(metrics)}")
    given, lacking = _data_lines(name, rows, place)
    lines += given
    missing += lacking
    if present:
        renamed, without = columns_for(shown, present)
        if renamed:
            inner = ", ".join(f"{field}: {_quoted(c)}" for field, c in renamed.items())
            lines.append(f"    columns: {{{inner}}}")
        if without:
            have = ", ".join(present[:8])
            lines.append(f"    # EDIT columns: no {' and no '.join(without)} among {have}")
            missing.append(f"columns for {', '.join(without)}")
    return "\n".join(lines) + "\n", missing


def _data_lines(name: str, rows: Sequence[Rows], place: Path) -> tuple[list[str], list[str]]:
    """Return the lines of a task's data, and what is left open in them."""
    lines = ["    data:"]
    if not rows:
        lines += [
            f"      test: {name}/test.jsonl  # EDIT: jsonl, csv, tsv, parquet, a folder of images",
            f"      # validation: {name}/validation.jsonl",
            f"      # proxy: {name}/proxy.jsonl",
            f"      # proxy: {{path: {name}/train.jsonl, share: 0.1}}  # a share of a file",
        ]
        return lines, ["data"]
    found: dict[str, str] = {}
    whole = [one for one in rows if one.split is None]
    for one in rows:
        if one.inside:
            for inner in one.inside:
                split = look(Path(f"{inner}.jsonl")).split or "test"
                path = _written(one.path, place)
                found.setdefault(split, f"{{path: {path}, subset: {_quoted(inner)}}}")
        elif one.split is not None:
            found.setdefault(one.split, _written(one.path, place))
    if whole and not whole[0].inside and "test" not in found:
        path = _written(whole[0].path, place)
        if found:
            found["test"] = path
        else:
            shares = {"proxy": 0.1, "validation": 0.3, "test": 0.6}
            lines.append("      # one file, cut by a hash of the rows' inputs")
            found = {s: f"{{path: {path}, share: {part}}}" for s, part in shares.items()}
    order = [split for split in ("proxy", "validation", "test") if split in found]
    lines += [f"      {split}: {found[split]}" for split in order]
    if "proxy" in found and "train" in found["proxy"]:
        lines.append("      # proxy: training rows; fresh ones are better, labels play no part")
    return lines, ([] if "test" in found else ["the split test"])
