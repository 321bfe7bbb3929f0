"""Pairs of checkpoint and task measured by the workers of a cluster, and noted here."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eutectic.checkpoint.experts import is_adapter
from eutectic.cluster.connection import Cluster, import_ray
from eutectic.cluster.gpus import given_gpu, own_share, share_of
from eutectic.cluster.spread import Bounds, Call, spread
from eutectic.cluster.workers import kept, working_in
from eutectic.errors import RequestError
from eutectic.evaluation.checkpoints import Checkpoint
from eutectic.evaluation.measured_pairs import Journal
from eutectic.evaluation.metrics import Outcomes
from eutectic.evaluation.pairs import Pairs

_PROCESS_BYTES = 1_000_000_000  # interpreter, torch, transformers, a batch on its way
_BATCH_BYTES = (
    500_000_000  # of a GPU: activations, and what decoding keeps; more is asked for again
)
_COPIES = 2.5  # of the files: the model, in float32 where they are halves, and one tensor more


@dataclass(frozen=True)
class _Asked:
    """One pair, for a worker."""

    pairs: Any  # reference of all pairs, without what is open here
    key: str  # under which a worker keeps them, with the model that it loaded last
    checkpoint: str
    task: str
    identity: str  # of the pair, as this process knows it
    folder: str  # where relative paths begin


def spread_pairs(pairs: Pairs, journal: Journal, cluster: Cluster) -> None:
    """Measure what the journal lacks on the workers of a cluster, and note it there.

    A worker has one core, or the share of a GPU that holds the model, and one model in memory at a
    time. A pair whose worker is lost is measured again; so is one that ran out of its GPU's memory,
    with a larger share.
    """
    progress = pairs.progress or (lambda *_: None)
    pairs.progress = None
    done, total = 0, max(1, sum(pairs.count(task) for _, task in pairs))
    missing: list[tuple[Checkpoint, Any, str]] = []
    for checkpoint, task in pairs:
        progress(done, total, f"{checkpoint.name}, {task.name}")
        identity = pairs.identified(checkpoint, task)
        if (found := journal.found.get(identity)) is None:
            missing.append((checkpoint, task, identity))
        else:
            done += len(found.predictions)
    if not missing:
        return
    reference, key = import_ray().put(pairs.elsewhere()), uuid.uuid4().hex
    calls = {}
    for number, (checkpoint, task, identity) in enumerate(missing):
        asked = _Asked(reference, key, checkpoint.name, task.name, identity, str(Path.cwd()))
        model = _bytes_of_model(checkpoint, pairs.checkpoints.base)
        on_gpu = bool(pairs.device.model) and task.kind != "function"
        gpus = share_of(pairs.device, _BATCH_BYTES + model) if on_gpu else 0.0
        largest = cluster.largest_with_gpu if on_gpu else cluster.largest
        memory = min(_PROCESS_BYTES + model, largest)
        name = f"{checkpoint.name}, {task.name}"
        # In their order: a worker that goes on with the same checkpoint need not load it again.
        calls[asked] = Call(name, measured, asked, memory, len(missing) - number, gpus)
    for call, answer in spread(list(calls.values()), Bounds(cluster.cpus, cluster.memory)):
        asked, found = call.payload, answer.value
        journal.add(asked.identity, asked.checkpoint, asked.task, found)
        done += len(found.predictions)
        progress(done, max(total, done), call.name)


def measured(asked: _Asked) -> Outcomes:
    """Measure one pair, on a worker."""

    def opened() -> tuple[Pairs, Callable[[], None]]:
        return import_ray().get(asked.pairs), lambda: None

    pairs: Pairs = kept(asked.key, opened)
    with working_in(asked.folder):
        checkpoint, task = next(
            (c, t) for c, t in pairs if (c.name, t.name) == (asked.checkpoint, asked.task)
        )
        if pairs.identified(checkpoint, task) != asked.identity:
            raise RequestError(
                f"{checkpoint.folder}: has another content here than where the evaluation began.\n"
                "Every machine that takes part must see checkpoints and data under the same paths."
            )
        if not pairs.device.model or task.kind == "function":
            return pairs.computed(checkpoint, task)
        name = given_gpu()
        with own_share(name, pairs.device), pairs.running_on(name):
            return pairs.computed(checkpoint, task)


def _bytes_of_model(checkpoint: Checkpoint, base: Path | None) -> int:
    """Return about how much memory a model needs, by the size of its files."""
    folders = [checkpoint.folder]
    if base is not None and is_adapter(checkpoint.folder):
        folders.append(base)
    held = sum(
        file.stat().st_size
        for folder in folders
        for file in ([folder] if folder.is_file() else folder.glob("*"))
        if file.is_file()
    )
    return int(_COPIES * held)
