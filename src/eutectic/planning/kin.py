"""Whether experts are kin: of the base by their weights, of each other by their changes.

A fine-tune's matrices still point where the base's do; those of another model point anywhere, so
that the cosine of both is near 0. Changes of different tasks have little in common; where all of
them point the same way, they share one that the base lacks. Both are told by windows of a few
matrices, before anything is merged.
"""

import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from eutectic.checkpoint.reader import expect
from eutectic.errors import EutecticError, Note
from eutectic.planning.inputs import MergeRequest
from eutectic.planning.tensor_plan import TensorPlan
from eutectic.types import Treatment

MATRICES = 24  # that are looked at, about
WINDOWS, WIDTH = 4, 256  # parts of each, and entries of one
LEAST = 2048  # entries below which a cosine is left to chance
KIN = 0.5  # cosine of an expert's weights to the base's; 0.7 where they were changed by their norm
ALIKE = 0.9  # cosine of two experts' changes


def kinship(tensors: Sequence[TensorPlan], request: MergeRequest) -> list[Note]:
    """Return warnings of experts that are no kin of the base, and of changes that are all alike.

    Cost: a few thousand values of the base and of every expert are read.
    """
    if request.script is not None or len(request.inputs.experts) == 0:
        return []  # recipes of other kinds stack what they like
    names = list(request.inputs.experts)
    gram = torch.zeros(1 + len(names), 1 + len(names), dtype=torch.float64)
    count = 0
    for values in _samples(tensors, names, request):
        wide = values.double()
        gram += wide @ wide.mT
        count += values.shape[1]
    if count < LEAST or not bool(torch.isfinite(gram).all()):
        return []
    # An adapter is a change of whatever base it is put on: its size tells nothing of kinship.
    full = [name for name in names if not request.inputs.experts[name].is_delta]
    return [*_strangers(gram, names, full), *_alike(gram, names)]


def _samples(
    tensors: Sequence[TensorPlan], names: Sequence[str], request: MergeRequest
) -> Iterator[Tensor]:
    """Yield `[1 + T, n]`: values of the base, and the experts' changes of them."""
    known = [t for t in tensors if _is_plain(t)]
    chosen = known[:: max(1, len(known) // MATRICES)]
    _expect(chosen, request)
    for planned in chosen:
        assert planned.base is not None and planned.base.tensor is not None
        for start, stop in _windows(planned):
            try:
                base = request.inputs.base.read(planned.base.tensor, start, stop).float()
                rows = {"": base}
                for source in planned.experts:
                    if source.tensor is not None:
                        expert = request.inputs.experts[source.owner]
                        rows[source.owner] = expert.delta(
                            source.tensor, start, stop, base=base, dtype=base.dtype
                        )
            except EutecticError:
                break  # told where the tensor is read in full
            absent = torch.zeros_like(base)
            yield torch.stack([rows.get(name, absent) for name in ("", *names)])


def _windows(planned: TensorPlan) -> list[tuple[int, int]]:
    step = max(planned.elements // WINDOWS, WIDTH)
    starts = range(0, planned.elements, step)
    return [(start, min(planned.elements, start + WIDTH)) for start in starts]


def _expect(chosen: Sequence[TensorPlan], request: MergeRequest) -> None:
    """Tell all inputs which windows are about to be read; an object store is asked at once."""
    wanted: dict[str, list[tuple[str, int, int]]] = {}
    for planned in chosen:
        for source in (planned.base, *planned.experts):
            if source is not None and source.tensor is not None:
                own = [(source.tensor, *window) for window in _windows(planned)]
                wanted.setdefault(source.owner, []).extend(own)
    expect(request.inputs.base, wanted.pop("base", []))
    for name, ranges in wanted.items():
        if name in request.inputs.experts:
            request.inputs.experts[name].expect(ranges)


def _is_plain(planned: TensorPlan) -> bool:
    """Tell whether a matrix is merged from tensors as they are stored."""
    if planned.treatment is not Treatment.MATRIX or planned.base is None:
        return False
    sources = (planned.base, *planned.experts)
    return planned.base.tensor is not None and all(
        s.rows is None and s.owner not in ("initial",) for s in sources
    )


def _strangers(gram: Tensor, names: Sequence[str], full: Sequence[str]) -> list[Note]:
    """Return a warning of every full expert whose weights have nothing of the base's."""
    base = float(gram[0, 0])
    cosines: dict[str, float] = {}
    for place, name in enumerate(names, 1):
        product = base + float(gram[0, place])  # of W₀ and W_t
        square = base + 2 * float(gram[0, place]) + float(gram[place, place])
        if base > 0 and square > 0:
            cosines[name] = product / (base * square) ** 0.5
    found: list[Note] = []
    for name, cosine in cosines.items():
        if cosine < KIN and name in full:
            others = [own for other, own in cosines.items() if other != name]
            kin = statistics.median(others) if others else None
            found.append(Note("no_kin", (name,), {"cosine": cosine, "kin": kin}, "warning"))
    return found


def _alike(gram: Tensor, names: Sequence[str]) -> list[Note]:
    """Return a warning where all experts change the base in nearly the same direction."""
    norms = gram.diagonal()[1:].sqrt()
    changing = [place for place in range(len(names)) if norms[place] > 0]
    if len(changing) < 2 or len(changing) < len(names):
        return []
    cosines = gram[1:, 1:] / (norms[:, None] * norms[None, :])
    off = cosines[~torch.eye(len(names), dtype=torch.bool)]
    # Equal checkpoints are told as such.
    if float(off.min()) < ALIKE or float(off.max()) > 1 - 1e-6:
        return []
    return [Note("changes_alike", tuple(names), {"cosine": float(off.min())}, "warning")]
