"""What a configuration says of a model, against the tensors that its files hold."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from eutectic import conventions_ties as habits
from eutectic.checking.report import Finding, counted
from eutectic.checkpoint.header import TensorEntry
from eutectic.conventions import CLASSIFIERS
from eutectic.errors import Fault, Note
from eutectic.words import few

Config = Mapping[str, Any]
Entries = Mapping[str, TensorEntry]

_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_MOST_LABELS = 1_000_000


def configuration_findings(config: Config, entries: Entries) -> Iterator[Finding]:
    """Yield where a configuration names code, or says what the tensors do not."""
    parts = [config, *habits.language_parts(config)]
    code = config.get("auto_map")
    if isinstance(code, Mapping) and code:
        yield Note("names_code", tuple(sorted({str(v) for v in code.values()})))
    for part in parts:
        for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
            if "/" in str(part.get(key)):
                yield Note("hub_kernel", (str(part[key]),), {"key": key}, "warning")
    if not isinstance(config.get("architectures", []), (list, type(None))):
        yield Fault("wrong_type", "must be a list of class names.", "config.json: 'architectures'")
    yield from _dtypes(parts, entries)
    yield from _layers(parts, entries)
    yield from _labels(config, entries)
    yield from _width(parts, entries)
    yield from _output(config, entries)


def floats_of(entries: Entries) -> dict[torch.dtype, int]:
    """Return how many numbers of each floating dtype there are, the most frequent first."""
    floats = [e for e in entries.values() if e.dtype.is_floating_point and e.numel]
    by_name = counted((str(e.dtype), e.numel) for e in floats)
    dtypes = {str(e.dtype): e.dtype for e in floats}
    return {dtypes[name]: count for name, count in by_name.items()}


def plain_dtype(dtype: torch.dtype) -> str:
    """Return the name of a dtype as configurations write it."""
    return str(dtype).removeprefix("torch.")


def _dtypes(parts: list[Config], entries: Entries) -> Iterator[Finding]:
    """Yield a stated dtype that few numbers have."""
    stated = next((p[k] for p in parts for k in ("dtype", "torch_dtype") if p.get(k)), None)
    held = next(iter(floats_of(entries)), None)
    if not isinstance(stated, str) or held is None:
        return
    name = stated.removeprefix("torch.")
    if name != plain_dtype(held) and isinstance(getattr(torch, name, None), torch.dtype):
        yield Note("other_dtype", (name, plain_dtype(held)))


def _layers(parts: list[Config], entries: Entries) -> Iterator[Finding]:
    """Yield stacks with gaps, and one of another depth than is stated."""
    stacks: dict[str, set[int]] = {}
    outer: set[str] = set()
    for name in entries:
        places = habits.places_in_stacks(name)
        outer.update(stack for stack, _ in places[:1])
        for stack, number in places:
            stacks.setdefault(stack, set()).add(number)
    for stack, numbers in stacks.items():
        lacking = [n for n in range(min(numbers), max(numbers)) if n not in numbers][:20]
        if lacking:
            names = few([f"{stack}.{number}" for number in lacking])
            yield Fault("layers_missing", f"layers are missing between others: {names}.")
    stated = next((p[k] for p in reversed(parts) for k in _LAYER_KEYS if _is_count(p.get(k))), None)
    if stated is not None and len(outer) == 1:
        (stack,) = outer
        held = max(stacks[stack]) + 1
        if held != stated:
            level = "warning" if held < stated else "note"
            numbers = {"stated": stated, "held": held}
            yield Note("other_depth", (stack,), numbers, level)


def _labels(config: Config, entries: Entries) -> Iterator[Finding]:
    """Yield a classifier of another size than the labels of the configuration."""
    names = config.get("id2label")
    stated = len(names) if isinstance(names, Mapping) else config.get("num_labels")
    if not _is_count(stated):
        return
    for name in entries:
        if any(name == own or name.endswith(f".{own}") for own in CLASSIFIERS):
            shape = entries[name].shape
            if len(shape) == 2 and shape[0] != stated:
                yield Note("other_labels", (name,), {"rows": shape[0], "stated": stated}, "warning")


def _width(parts: list[Config], entries: Entries) -> Iterator[Finding]:
    """Yield a table of tokens whose width is no number of the configuration."""
    numbers = {v for part in parts for v in part.values() if _is_count(v)}
    stated = next((p["hidden_size"] for p in reversed(parts) if _is_count(p.get("hidden_size"))), 0)
    for name, entry in entries.items():
        if habits.is_token_table(name) and len(entry.shape) == 2 and stated:
            if entry.shape[1] not in numbers:
                yield Note(
                    "other_width", (name,), {"held": entry.shape[1], "stated": stated}, "warning"
                )
            return


def _output(config: Config, entries: Entries) -> Iterator[Finding]:
    """Yield an output layer that neither stands in the file nor is tied to a table."""
    tables = [n for n, e in entries.items() if habits.is_token_table(n) and len(e.shape) == 2]
    written = any(habits.is_output_table(n) and len(e.shape) == 2 for n, e in entries.items())
    classes = config.get("architectures")
    writes = isinstance(classes, list) and classes and habits.has_output_layer(config)
    if not tables or written or not writes or habits.is_tied(config) is not False:
        return
    stated = any(p.get(habits.TIE) is False for p in (config, *habits.language_parts(config)))
    named = few([str(name) for name in cast("list[Any]", classes)])
    if stated:
        yield Fault(
            "no_output_layer",
            f"its configuration unties the output layer of {named} from '{tables[0]}', and its "
            "files hold none: a model would get a random one.",
            next=f"Say {habits.TIE}: true, or save the model again with its output layer.",
        )
    else:
        yield Note("no_output_layer", (tables[0],), {"classes": named}, "warning")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value <= _MOST_LABELS


def config_of(folder: Path, config: Config) -> Iterator[Finding]:
    """Yield that a folder has no configuration."""
    if not config and not (folder / "config.json").exists():
        yield Note("no_config", level="warning")
