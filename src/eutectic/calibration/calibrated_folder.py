"""The output: the merged model's folder with new values for the tensors that were calibrated."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.folder import copy_side_files, survey
from eutectic.checkpoint.index import CheckpointIndex, open_index, read_json_object
from eutectic.checkpoint.names import align, check_inside
from eutectic.checkpoint.output_format import LaidOutLikeBase, OutputTensor
from eutectic.checkpoint.quantised.side_files import forget_quantisation
from eutectic.checkpoint.reader import CheckpointReader
from eutectic.checkpoint.writer import OutputFile, write_atomically
from eutectic.storage import storage_of

PROVENANCE = "eutectic.json"
CARD = "README.md"
EXPERTS = "experts"  # folders that hold the body once more, with an expert's head
_CHUNK = 1 << 24  # elements
Values = Callable[[str], Tensor | None]  # key -> its new values; None where it keeps the old ones


def write_calibrated(
    merged: CheckpointReader, model: Path, values: Values, record: Mapping[str, Any]
) -> None:
    """Write the folder of the calibrated model; `record` goes into its provenance and card."""
    folder = merged.index.folder
    layout, hashes = _write_weights(merged, model, values)
    copy_side_files(folder, model, survey(folder, merged.index.weight_files).taken)
    forget_quantisation(model)
    for expert in sorted(p for p in (folder / EXPERTS).glob("*") if p.is_dir()):
        _write_expert(merged, expert, model, layout, values)
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    write_atomically(model / CARD, (card.rstrip() + _card(record)).lstrip().encode())
    before = read_json_object(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
    tensors = {name: dict(row) for name, row in before.get("tensors", {}).items()}
    for name, digest in hashes.items():
        tensors.setdefault(name, {}).update(sha256=digest, calibrated=True)
    provenance = {**before, "tensors": tensors, "calibration": dict(record)}
    text = json.dumps(provenance, indent=1, ensure_ascii=False)
    write_atomically(model / PROVENANCE, (text + "\n").encode())


def _write_weights(
    merged: CheckpointReader, model: Path, values: Values
) -> tuple[list[OutputFile], dict[str, str]]:
    """Write the weights like the merged model's; return the files, and hashes of new tensors."""
    layout = LaidOutLikeBase(merged.index)
    rows = [OutputTensor(e.name, e.dtype, e.shape, e.file) for e in merged.entries.values()]
    files = layout.lay_out(rows, {})
    hashes: dict[str, str] = {}
    with layout.open(model, files, resume=False) as sink:
        for name in merged.entries:
            digest = hashlib.sha256()
            new = values(name)
            for start, part in _parts(merged, name, new):
                stored = sink.write(name, start, part)
                digest.update(stored.view(torch.uint8).numpy().data)
            if new is not None:
                hashes[name] = digest.hexdigest()
        sink.sync()
    layout.finish(model, files)
    return files, hashes


def _parts(reader: CheckpointReader, name: str, new: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Yield (start, values) of a tensor, new or as it is."""
    count = reader.entries[name].numel
    if new is not None:
        yield 0, new.reshape(-1)
        return
    for start in range(0, count, _CHUNK):
        yield start, reader.read(name, start, min(start + _CHUNK, count))


def _write_expert(
    merged: CheckpointReader,
    folder: Path,
    model: Path,
    layout: list[OutputFile],
    values: Values,
) -> None:
    """Write an expert's folder: its head as it is, the body's tensors as they are now.

    A file that holds what one of the model's holds is linked, where the storage allows it.
    """
    storage, target = storage_of(model), model / EXPERTS / folder.name
    index = open_index(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in index.files and not path.name.startswith("."):
            storage.copy(check_inside(folder, name), target / name)
    with closing(CheckpointReader(index)) as reader:
        same = _same_tensors(merged, reader)
        for file in index.files:
            entries = [e for e in index.entries.values() if e.file == file]
            like = _equal_file(layout, index, file, same)
            if like is not None and file.endswith(".safetensors"):
                storage.copy(model / like, target / file, share=True)
                continue
            rows = [OutputTensor(e.name, e.dtype, e.shape, e.file) for e in entries]
            form = LaidOutLikeBase(index)
            with form.open(target, form.lay_out(rows, {}), resume=False) as sink:
                for entry in entries:
                    key = same.get(entry.name)
                    for start, part in _parts(
                        reader, entry.name, None if key is None else values(key)
                    ):
                        sink.write(entry.name, start, part)
                sink.sync()


def _same_tensors(merged: CheckpointReader, expert: CheckpointReader) -> dict[str, str]:
    """Return key of an expert's folder -> the merged model's key of the very same tensor."""
    called, _ = align(merged.entries, expert.entries)
    found: dict[str, str] = {}
    for own, key in called.items():
        here, there = expert.entries[own], merged.entries[key]
        if (here.dtype, here.shape) != (there.dtype, there.shape):
            continue
        ranges = range(0, here.numel, _CHUNK)
        ends = [(s, min(s + _CHUNK, here.numel)) for s in ranges]
        if all(_equal(expert.read(own, *e), merged.read(key, *e)) for e in ends):
            found[own] = key
    return found


def _equal(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def _equal_file(
    layout: list[OutputFile], index: CheckpointIndex, file: str, same: Mapping[str, str]
) -> str | None:
    """Return the model's file that holds the same tensors under the same names, if there is one."""
    entries = [(e.name, e.dtype, e.shape) for e in index.entries.values() if e.file == file]
    if any(same.get(name) != name for name, _, _ in entries):
        return None
    wanted = index.metadata.get(file, {})
    for written in layout:
        if list(written.entries) == entries and dict(written.metadata) == dict(wanted):
            return written.name
    return None


def _card(record: Mapping[str, Any]) -> str:
    settings, data = record["settings"], record["data"]
    rows = "".join(
        f"| {task} | {own['examples']} | {own['held_out']} |\n" for task, own in data.items()
    )
    counts = ", ".join(f"{n} {kind}" for kind, n in record["calibrated"].items() if n)
    return (
        "\n\n## Calibration\n\n"
        f"Calibrated layer by layer in closed form towards its experts by eutectic "
        f"{record['versions']['eutectic']} (torch {record['versions']['torch']}): {counts}. "
        f"λ {settings['ridge']:g}, ρ {settings['anchor_scale']:g}, a "
        f"{settings['expert_share']:g}. Settings and what became of every layer are under "
        f"`calibration` in `{PROVENANCE}`.\n\n"
        f"| task | unlabelled inputs | held out |\n|---|---|---|\n{rows}"
    )
