"""One pass over the data: forward, backward where asked, add up."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from eutectic.data.fingerprints import example_hashes
from eutectic.errors import NumericalError, RequestError, ResumeError, StatisticsError
from eutectic.models.batches import LABEL_KEYS, Batch, call, examples, sample_count, transform
from eutectic.models.hooks import evaluating, observing, requiring_gradients
from eutectic.models.sites import is_encoder_decoder
from eutectic.statistics.collection_plan import Plan, device_of, make_layout
from eutectic.statistics.likelihood import evaluate, label_seeds
from eutectic.statistics.recorder import PassSums, Recorder
from eutectic.statistics.settings import Settings
from eutectic.statistics.unfinished_collection import DataLog


@dataclass
class Pass:
    """What one pass works with.

    `sums` hold the first `start` batches already, which a killed run had done; `log` says which
    examples were seen, in this pass or an earlier one; `after_batch` is told the batches done.
    """

    model: nn.Module
    batches: Iterable[Batch]
    plan: Plan
    settings: Settings
    sums: PassSums
    log: DataLog
    start: int
    after_batch: Callable[[int], None]


def run_pass(job: Pass) -> None:
    """Add up the whole data."""
    with adding(job) as add:
        for index, batch, hashes in numbered_batches(job):
            if index >= job.start:
                add(index, batch, hashes)
            job.after_batch(index + 1)


def numbered_batches(job: Pass) -> Iterator[tuple[int, Batch, list[int]]]:
    """Yield number, batch and its examples' hashes, to the limit; each is noted, or checked."""
    done = seen = 0
    for batch in job.batches:
        count = sample_count(batch)
        if job.settings.limit is not None and seen + count > job.settings.limit:
            count = job.settings.limit - seen
            batch = examples(batch, 0, count)
        if count == 0:
            continue
        hashes = _log(job, batch, done)
        seen += count
        yield done, batch, hashes
        done += 1
        if seen == job.settings.limit:
            break
    if done < len(job.log.batches):
        raise _changed(job, done)


AddBatch = Callable[[int, Batch, list[int]], None]


@contextmanager
def adding(job: Pass) -> Iterator[AddBatch]:
    """Let the block add batches to the sums, each with its number and its examples' hashes."""
    recorder = Recorder(job.plan.leaders, job.sums)
    weights = [site.weight for site in job.plan.gradient_sites]

    def add(index: int, batch: Batch, hashes: list[int]) -> None:
        step = 1 if job.plan.parameters else len(hashes)
        for first in range(0, len(hashes), step):
            part = batch if step == len(hashes) else examples(batch, first, first + step)
            _add(job, recorder, part, index, hashes[first : first + step])

    with (
        evaluating(job.model),
        requiring_gradients([*weights, *job.plan.parameters]),
        observing(job.model, job.plan.leaders, recorder),
    ):
        yield add


def _log(job: Pass, batch: Batch, index: int) -> list[int]:
    """Note a batch's examples, or check them against an earlier pass; return their hashes."""
    inputs, everything = example_hashes(batch, is_encoder_decoder(job.model))
    link = job.log.chain(index, everything)
    if index == len(job.log.batches):
        job.log.batches.append(link)
        job.log.inputs.extend(inputs)
    elif job.log.batches[index] != link:
        raise _changed(job, index)
    return inputs


def _changed(job: Pass, index: int) -> StatisticsError | ResumeError:
    if index < job.start:
        return ResumeError(
            f"batch {index} is not what the unfinished collection saw: the data changed.\n"
            "Restore the data and their order, or remove the .partial folder to start anew."
        )
    return StatisticsError(
        f"batch {index} is not what the first pass over the data gave.\n"
        "Several passes need batches that come in the same order every time: do not shuffle."
    )


def _add(job: Pass, recorder: Recorder, batch: Batch, index: int, hashes: list[int]) -> None:
    device = device_of(job.model)
    batch = transform(batch, lambda t: t.to(device))
    recorder.begin(make_layout(job.model, batch, job.settings), index)
    backward = bool(job.plan.gradient_sites or job.plan.parameters)
    inputs = batch
    if job.settings.head is not None and isinstance(batch, Mapping):
        # A bare model takes no labels; its head's logits are compared with them.
        inputs = {name: value for name, value in batch.items() if name not in LABEL_KEYS}
    with torch.set_grad_enabled(backward):
        outputs = call(job.model, inputs)
        recorder.end()
        if backward:
            _differentiate(job, recorder, outputs, batch, index, hashes)


def _differentiate(
    job: Pass, recorder: Recorder, outputs: object, batch: Batch, index: int, hashes: list[int]
) -> None:
    settings = job.settings
    if settings.head is not None:
        outputs = settings.head.logits(outputs, batch)
    seeds = label_seeds(settings.seed, hashes)
    sampled = settings.labels == "sample"
    values = evaluate(job.model, outputs, batch, settings.objective, sampled, seeds)
    if values.shape != (len(hashes),):
        raise RequestError(
            f"the objective must return one log-likelihood per example, [{len(hashes)}]; "
            f"got {[*values.shape]}."
        )
    if not bool(torch.isfinite(values).all()):
        raise NumericalError(
            f"the log-likelihood of batch {index} is not finite.\n"
            "Check its labels, and whether the model overflows in its dtype."
        )
    named = {**job.plan.diagonal, **job.plan.block}
    edges = [output.edge for output in recorder.outputs]
    gradients: list[Tensor | None] = [None] * (len(edges) + len(named))
    if values.requires_grad and gradients:
        targets = [*edges, *(get_gradient_edge(p) for p in named.values())]
        # Examples do not see one another, so the sum's gradients are each example's own.
        gradients = list(torch.autograd.grad(values.sum(), targets, allow_unused=True))
    recorder.add_gradients(gradients[: len(edges)])
    for name, gradient in zip(named, gradients[len(edges) :], strict=True):
        if gradient is not None:
            job.sums.add_parameter_gradient(name, gradient, index)
