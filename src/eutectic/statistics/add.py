"""Adding statistics files over disjoint data."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from eutectic.errors import RequestError, StatisticsError
from eutectic.statistics.gram import leading_rows, triangular_factor
from eutectic.statistics.least_tokens import check_least_tokens
from eutectic.statistics.likelihood import objective_name
from eutectic.statistics.recorder import stored_form
from eutectic.statistics.statistics_file import (
    EXAMPLES,
    INPUT_STATISTICS,
    STATISTICS,
    StatisticsFile,
    beside_directions,
    expand,
    load_statistics,
    lock_output,
)
from eutectic.storage import local_path
from eutectic.types import gram_names

# What must agree for a sum to mean anything.
_SETTINGS = (
    *("grams", "output_gradients", "fisher", "block_fisher", "labels", "objective", "head"),
    *("rank", "core", "unmatched", "token_mask", "dtype"),
)


def add_statistics(
    files: Sequence[str | Path | StatisticsFile],
    output: str | Path | None = None,
    min_tokens: int | None = None,
) -> StatisticsFile:
    """Return the statistics of the union of disjoint data: all sums and counts added.

    Equal to collecting over all data at once, up to rounding (and up to truncation where the files
    keep `rank` directions only). Added in float64. Memory: the result.

    Args:
        files: statistics files, or paths of such, of one checkpoint.
        output: file to write; without it the result stays in memory.
        min_tokens: refuse sums over fewer tokens, as `collect` does.

    Raises:
        RequestError: no files; sums over too few tokens.
        StatisticsError: a file is unusable; the files come from different checkpoints, mask
            policies, labels or other settings, have different layers, or share examples.
        OutputError: the output cannot be written.
    """
    if output is not None:
        lock = lock_output(local_path(output))
        try:
            return add_statistics(files, min_tokens=min_tokens).save(output)
        finally:
            lock.release()
    opened = [f if isinstance(f, StatisticsFile) else load_statistics(f) for f in files]
    if not opened:
        raise RequestError("there are no statistics files to add.")
    _check(opened)
    names = opened[0].names
    record = dict(opened[0].provenance)
    tables = [f.provenance["layers"] for f in opened]
    # Whose input statistics each layer shares: as stored, if all files agree on it.
    shared = [{n: layer["inputs"] for n, layer in table.items()} for table in tables]
    agreed = all(table == shared[0] for table in shared)
    owners = shared[0] if agreed else {n: layer["same_as"] or n for n, layer in tables[0].items()}
    record["layers"] = {
        name: {
            **tables[0][name],
            **{key: sum(table[name][key] for table in tables) for key in ("count", "sample_count")},
            "inputs": owners[name],
        }
        for name in names
    }
    tensors: dict[str, Tensor] = {}
    dtype = torch.float64 if record["settings"]["dtype"] == "float64" else torch.float32
    for name in names:
        for statistic in STATISTICS:
            own = name == owners[name] if statistic in INPUT_STATISTICS else True
            if own and tables[0][name]["same_as"] == name:
                for stored, value in _add(opened, name, statistic).items():
                    key = f"{name}/{stored}"
                    tensors[key] = stored_form(key, value, dtype)
    tensors[EXAMPLES] = hashes = torch.cat([f.tensors[EXAMPLES] for f in opened]).sort().values
    record["data"] = {
        "examples": len(hashes),
        "fingerprint": sha256(hashes.numpy().tobytes()).hexdigest(),
    }
    record["unseen"] = sorted(set.intersection(*(set(f.provenance["unseen"]) for f in opened)))
    record["skipped"] = {k: v for f in opened for k, v in f.provenance["skipped"].items()}
    versions = [item for f in opened for item in f.provenance["versions"].items()]
    record["versions"] = {
        package: ", ".join(sorted({number for other, number in versions if other == package}))
        for package, _ in versions
    }
    if record["settings"].get("rank") is not None:
        record["beside_directions"] = beside_directions(tensors, names)
    check_least_tokens(record, min_tokens)
    return StatisticsFile(record, tensors)


def _check(files: Sequence[StatisticsFile]) -> None:
    first = files[0]
    for other in files[1:]:
        faults: list[str] = []
        for what in ("checkpoint", "mask_policy"):
            if first.provenance[what] != other.provenance[what]:
                faults.append(f"{what}: {first.provenance[what]} and {other.provenance[what]}")
        for what in _SETTINGS:
            ours, theirs = (f.provenance["settings"].get(what) for f in (first, other))
            if what == "objective" and ours and theirs:
                ours, theirs = objective_name(ours), objective_name(theirs)
            if ours != theirs:
                faults.append(f"{what}: {ours} and {theirs}")
        faults += _layer_faults(first, other)
        if faults:
            raise StatisticsError(
                f"{_name(first)} and {_name(other)} cannot be added:\n  - " + "\n  - ".join(faults)
            )
    seen: set[int] = set()
    for file in files:
        hashes = set(file.tensors[EXAMPLES].tolist())
        if common := len(seen & hashes):
            raise StatisticsError(
                f"{_name(file)} shares {common} of its {len(hashes)} examples with the others.\n"
                "They would count twice: add statistics of disjoint data only."
            )
        seen |= hashes


def _layer_faults(first: StatisticsFile, other: StatisticsFile) -> list[str]:
    if missing := sorted(set(first.names) ^ set(other.names)):
        return [f"layers: only one of them has '{missing[0]}' ({len(missing)} such layers)"]
    ours, theirs = first.provenance["layers"], other.provenance["layers"]
    skipped = (first.provenance["skipped"], other.provenance["skipped"])
    if left_out := sorted(skipped[0].keys() ^ skipped[1].keys()):
        reason = {**skipped[0], **skipped[1]}[left_out[0]]
        return [f"only one of them left out '{left_out[0]}': {reason}"]
    keys = ("kind", "shape", "parameter", "same_as")
    different = [n for n in first if any(ours[n][k] != theirs[n][k] for k in keys)]
    return [f"'{n}': {ours[n]['shape']} and {theirs[n]['shape']}" for n in different[:3]]


def _add(files: Sequence[StatisticsFile], name: str, statistic: str) -> dict[str, Tensor]:
    """Return one statistic of one parameter, added over the files, in the form for storing."""
    names = gram_names(statistic)
    dense, factors, diagonals = (
        [f.tensors[k].double() for f in files if (k := f.key(name, statistic, stored)) in f.tensors]
        for stored in names
    )
    if not dense and not factors:
        return {}
    diagonal = torch.stack(diagonals).sum(0) if diagonals else None
    rank = files[0].provenance["settings"]["rank"]
    if not dense:
        factor = torch.cat(factors)
        width = factor.shape[1]
        if rank is not None and statistic != "block_fisher" and (rank == "auto" or rank < width):
            whole = None if diagonal is None else diagonal + factor.square().sum(0)
            kept = leading_rows(factor, rank, whole)
            if "diagonal" in kept:
                return {names[1]: kept["factor"], names[2]: kept["diagonal"]}
        if len(factor) < width:
            result = {names[1]: triangular_factor(factor)}
            return result if diagonal is None else {**result, names[2]: diagonal}
    total = torch.stack([*dense, *(expand(f, None) for f in factors)]).sum(0)
    if diagonal is not None:
        total.diagonal().add_(diagonal)
    return {statistic: total}


def _name(file: StatisticsFile) -> str:
    return "statistics in memory" if file.path is None else str(file.path)
