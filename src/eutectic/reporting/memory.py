"""What an inspection holds at once, and the refusal of one that would not fit."""

from collections.abc import Mapping, Sequence

from eutectic.checkpoint.experts import Expert
from eutectic.errors import RequestError
from eutectic.planning.cost import PROCESS_BYTES
from eutectic.planning.inputs import Inputs
from eutectic.planning.tensor_plan import TensorPlan
from eutectic.recipes.units import format_bytes

_GRAM = ("gram",)
_DOUBLE = 8  # bytes of a number in float64
_TRIPLETS = 3  # copies of a matrix beside each other where its singular triplets are computed
_SQUARES = 4  # the same of its shorter side: a Gram, its eigenvectors, their workspace


def inspection_bytes(
    planned: TensorPlan, inputs: Inputs, merged: Mapping[str, Expert], rank: int | None = None
) -> int:
    """Estimate what `measure_layer` and what it is given hold of one tensor at once, in bytes.

    A block of the base, of every expert and merged model, their sum and one more; in float64 the
    triplets of one of them, squares of its shorter side, k leading triplets of every expert; and
    the experts' Grams, one of them in float64 too.
    """
    _, held = planned.blocks
    rows, columns = planned.matrix_shape
    short, count = min(rows, columns), len(planned.experts)
    leading = min(rank or max(1, short // max(count, 1)), short)
    matrices = held * planned.compute.itemsize * (3 + count + len(merged))
    triplets = held * _TRIPLETS + short * short * _SQUARES + count * leading * (rows + columns)
    grams = 0
    if not planned.layout.stacked:
        for source in planned.experts:
            statistics = inputs.statistics.get(source.owner)
            inside = source.statistics.get("")
            if statistics is not None and inside is not None:
                grams += statistics.read_bytes(inside, _GRAM)
    squares = 2 * max(rows, columns) ** 2 if grams else 0
    return matrices + _DOUBLE * (triplets + squares) + grams


def check_inspection_memory(
    chosen: Sequence[TensorPlan],
    inputs: Inputs,
    merged: Mapping[str, Expert],
    rank: int | None,
    memory: int,
) -> None:
    """Refuse, before anything is read, an inspection one of whose tensors is over the limit."""
    needed = {t.name: inspection_bytes(t, inputs, merged, rank) + PROCESS_BYTES for t in chosen}
    over = [name for name, size in needed.items() if size > memory]
    if not over:
        return
    largest = max(over, key=needed.__getitem__)
    raise RequestError(
        f"{largest} alone needs {format_bytes(needed[largest])} to be inspected, the limit is "
        f"{format_bytes(memory)} ({len(over)} of {len(chosen)} matrices are over it).\n"
        "Raise --memory, inspect fewer experts at once, or leave such layers out (--layers)."
    )
