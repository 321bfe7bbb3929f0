"""One pass of a collection: run, or taken up where a killed run left it, and kept meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from eutectic.models.batches import Batch
from eutectic.statistics.data_pass import Pass, run_pass
from eutectic.statistics.sharded_pass import Saved, ShardedPass, Sharing, load_joined
from eutectic.statistics.unfinished_collection import Partial, Snapshot

Counts = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Running:
    """How one pass is run and kept."""

    index: int
    partial: Partial | None
    keep: bool  # what it gave goes to a file: others follow
    first: Batch
    sharing: Sharing | None

    def saved(self) -> Saved | None:
        """Return what is kept of this pass, unfinished."""
        snapshot = None if self.partial is None else self.partial.load()
        if snapshot is None or snapshot.part != self.index:
            return None
        return snapshot.batches, snapshot.sums


def one_pass(job: Pass, run: Running) -> tuple[Mapping[str, Tensor], Counts]:
    """Run one pass, or take up what a killed run left of it."""
    partial, index = run.partial, run.index
    if partial is None:
        _run(job, run)
        return job.sums.tensors(job.settings), job.sums.counts()
    snapshot = partial.load()
    if snapshot is not None:
        job.log = snapshot.log
    if (finished := partial.load_pass(index)) is not None:
        return finished
    if snapshot is not None and snapshot.part == index:
        job.start = snapshot.batches
    _run(job, run)
    if not run.keep:
        return job.sums.tensors(job.settings), job.sums.counts()
    # The whole log first: later passes check the data against it.
    partial.save(Snapshot(index, len(job.log.batches), job.sums.state(), job.log))
    partial.save_pass(index, job.sums.tensors(job.settings), job.sums.counts())
    finished = partial.load_pass(index)
    assert finished is not None
    return finished


def _run(job: Pass, run: Running) -> None:
    """Add up the data from where the pass stands, and save that now and then."""
    saved, sharing = run.saved(), run.sharing
    if sharing is None:
        if saved is not None:
            load_joined(job.sums, saved[1])
        _save_now_and_then(job, run, job.sums.state)
        run_pass(job)
        return
    shared = ShardedPass(job, run.index, run.first, sharing, run.saved)
    _save_now_and_then(job, run, shared.state)
    shared.run()


def _save_now_and_then(job: Pass, run: Running, state: Callable[[], Mapping[str, Tensor]]) -> None:
    partial = run.partial
    if partial is None:
        return
    report, saved, pause = job.after_batch, time.monotonic(), job.settings.snapshot_seconds

    def after_batch(done: int) -> None:
        nonlocal saved, pause
        if done > job.start and (now := time.monotonic()) - saved >= pause:
            partial.save(Snapshot(run.index, done, state(), job.log))
            saved = time.monotonic()
            if job.settings.snapshot_seconds:
                # Large sums take long to write: no more than a tenth of the time goes there.
                pause = max(job.settings.snapshot_seconds, 10 * (saved - now))
        report(done)

    job.after_batch = after_batch
