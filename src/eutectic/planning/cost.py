"""What a plan will cost: bytes, peak memory, seconds."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from eutectic.errors import Fault, RecipeError
from eutectic.linalg.rows_and_diagonal import few_rows
from eutectic.methods import get_method
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan
from eutectic.planning.tensor_plan import TensorPlan, chunk_entries
from eutectic.recipes.units import format_bytes
from eutectic.types import Treatment

PROCESS_BYTES = 450_000_000  # interpreter, torch and its allocator's slack
SUMS = 4  # square matrices in float64 beside each other: a sum, its factor, their workspace


@dataclass(frozen=True)
class Cost:
    """The cost of one tensor, or of a whole plan."""

    read_bytes: int
    write_bytes: int
    peak_bytes: int  # held at once by the job; for a plan, by all jobs that run side by side
    seconds: float


def tensor_cost(planned: TensorPlan, inputs: Inputs) -> Cost:
    """Estimate one task from shapes and dtypes alone."""
    base = None if planned.base is None else inputs.base.entries.get(planned.base.tensor or "")
    base_bytes = 0 if base is None else base.nbytes
    write_bytes = planned.elements * planned.dtype.itemsize
    flops, bytes_per_second = machine_rates()
    chunk = min(planned.elements, chunk_entries(planned))
    if not planned.merged:
        held = planned.dtype.itemsize if base is None else base.dtype.itemsize
        peak = chunk * (held + planned.dtype.itemsize)
        seconds = (base_bytes + write_bytes) / bytes_per_second
        return Cost(base_bytes, write_bytes, peak, seconds)
    method = get_method(planned.method)
    experts = [inputs.owner(s).entries.get(s.tensor or "") for s in planned.experts]
    expert_bytes = sum(e.nbytes for e in experts if e is not None)
    count, width = len(planned.experts), planned.compute.itemsize
    prepares = method.prepare is not None and method.prepares(planned.parameters)
    passes = 4 if prepares else 1
    if planned.in_chunks:
        held = chunk
        passes = passes if planned.elements > chunk else 1
        work = planned.elements * count * width * 4 * passes / bytes_per_second
    else:
        blocks, held = planned.blocks
        rows = planned.shape[0 if blocks == 1 else 1] if planned.shape else 1
        small = min(rows, held // max(rows, 1))
        products = method.products
        if method.tall:
            out, inner = max(planned.matrix_shapes, default=(1, 1))
            side = min(out / max(inner, 1), count)  # of all experts' directions side by side
            products += method.tall * max(side**2 - 1, 0.0)
        work = products * count * 2 * planned.elements * small / flops
    stack, workspace = held * count * width, method.workspace(count)
    if method.squares:
        aspect = max((min(s) / max(*s, 1) for s in planned.matrix_shapes), default=1.0)
        workspace *= 1 - method.squares * (1 - aspect)
    if planned.post is not None:
        small = min((min(s) for s in planned.matrix_shapes), default=1)
        work += planned.post.entry.products * count * 2 * planned.elements * small / flops
        workspace = max(workspace, planned.post.entry.workspace)
        passes += 1
    peak = int(stack * (1 + workspace) + held * (4 * width + planned.dtype.itemsize))
    collected, scratch = _statistics_bytes(planned, inputs)
    peak += collected + scratch
    peak += sum(inputs.owner(s).held_bytes(s.tensor) for s in planned.experts)
    read = (base_bytes + expert_bytes) * passes + collected
    moved = (read + write_bytes) / bytes_per_second
    return Cost(read, write_bytes, peak, moved + work)


def _statistics_bytes(planned: TensorPlan, inputs: Inputs) -> tuple[int, int]:
    """Return bytes of the statistics that a task reads, and of the squares made of them."""
    method, parameters = get_method(planned.method), planned.parameters
    only = planned.needs | ({"gram"} if planned.cut_in_inputs else set())
    shape = planned.shape
    if not (only and inputs.statistics) or planned.layout.stacked or not shape:
        return 0, 0
    collected = 0
    for source in planned.experts:
        held = inputs.statistics.get(source.owner)
        if held is not None:
            collected += sum(held.read_bytes(name, only) for name in source.statistics.values())
    sides = (shape[0], planned.elements // max(shape[0], 1))
    if planned.treatment is not Treatment.MATRIX:
        sides = (0, planned.elements) if "block_fisher" in only else (0, 0)
    copies = method.statistics_copies(parameters) * len(planned.experts)
    if planned.post is not None and planned.post.needs:
        copies = max(copies, 1.0)  # one after the other
    rows = _bytes_in_rows(planned, inputs) if method.keeps_rows(parameters) else 0
    if rows:  # in float64 they are twice as long
        sides = (sides[0], 0)
    square = sum(side * side for side in sides) * torch.float64.itemsize + 2 * rows
    return collected, int(
        square * copies + SUMS * (max(sides) ** 2 * torch.float64.itemsize + 2 * rows)
    )


def _bytes_in_rows(planned: TensorPlan, inputs: Inputs) -> int:
    """Return the bytes of input Grams that are few rows together; 0 where a square is formed."""
    width = planned.elements // max(planned.shape[0], 1)
    held = sum(
        inputs.statistics[source.owner].read_bytes(name, {"gram"})
        for source in planned.experts
        if source.owner in inputs.statistics
        for name in source.statistics.values()
    )
    rows = held / max(width * torch.float32.itemsize, 1)
    return held if few_rows(rows, width) else 0


def plan_cost(plan: Plan, inputs: Inputs, threads: int) -> Cost:
    """Add up the jobs; the peak is that of the largest ones side by side, and the process."""
    costs = [tensor_cost(t, inputs) for t in plan.tensors]
    largest = sorted((c.peak_bytes for c in costs), reverse=True)[:threads]
    return Cost(
        sum(c.read_bytes for c in costs),
        sum(c.write_bytes for c in costs),
        sum(largest) + PROCESS_BYTES,
        sum(c.seconds for c in costs) / threads,
    )


def check_memory(plan: Plan, inputs: Inputs, memory: int) -> None:
    """Refuse a plan one of whose jobs alone is over the limit."""
    largest = max(plan.tensors, key=lambda t: tensor_cost(t, inputs).peak_bytes)
    peak = tensor_cost(largest, inputs).peak_bytes
    if peak + PROCESS_BYTES > memory:
        needed = f"{largest.name} alone needs {format_bytes(peak + PROCESS_BYTES)}"
        what = f"{needed} with {largest.method}, the limit is {format_bytes(memory)}."
        choose = "Raise --memory, or choose an element-wise method, which works in chunks."
        raise RecipeError([Fault("memory", what, next=choose)])


@cache
def machine_rates() -> tuple[float, float]:
    """Measure (flops, bytes/s) of one core, once per process, in about 30 ms.

    Each rate is the best of some short tries: a machine that does other work just then interrupts
    one or the other, and would look many times slower than it is.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a = torch.full((384, 384), 0.5)
        x = torch.zeros(1 << 21, dtype=torch.bfloat16)
        flops = 2 * 384**3 / _shortest(lambda: torch.mm(a, a), 8)
        moved = x.numel() * 6 / _shortest(x.float, 4)
    finally:
        torch.set_num_threads(threads)
    return flops, moved


def _shortest(work: Callable[[], object], tries: int) -> float:
    """Return the seconds of the shortest of some tries, after one that counts for nothing."""
    took: list[float] = []
    for _ in range(tries + 1):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return min(took[1:])


def treatments(plan: Plan) -> dict[str, int]:
    """Return how many tensors take each treatment."""
    counts = Counter(t.treatment for t in plan.tensors)
    return {t.value: counts[t] for t in Treatment if t in counts}


def merged_by(plan: Plan) -> dict[str, int]:
    """Return how many tensors each method merges ("copy" for copies)."""
    return dict(sorted(Counter(t.method for t in plan.tensors).items()))
