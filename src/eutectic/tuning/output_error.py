"""α in closed form: least squares on layer outputs, from statistics alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eutectic.errors import Note, NumericalError, RequestError
from eutectic.execution.schedule import Choice, Choose, Unscaled
from eutectic.execution.tensor_values import as_map, read_delta
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan
from eutectic.planning.tensor_plan import Source, TensorPlan
from eutectic.tuning.search import Measured, ScaleCurve, grid, rounded
from eutectic.types import LayerStatistics, Treatment


@dataclass(frozen=True)
class OutputTerms:
    """Inner products of output shifts at one layer, one entry per expert, float64.

    With ⟨X, Y⟩_t = tr(X A_t Yᵀ)/n_t, the mean over expert t's tokens of the product of the shifts
    that X and Y make in the layer's output:

    Attributes:
        cross: ⟨Δ_t, Δ_M⟩_t `[T]`.
        merged: ⟨Δ_M, Δ_M⟩_t `[T]`.
        expert: ⟨Δ_t, Δ_t⟩_t `[T]`.
    """

    cross: Tensor
    merged: Tensor
    expert: Tensor


@dataclass(frozen=True)
class ClosedForm:
    """The least-squares α and the parabola whose minimum it is.

    Attributes:
        scale: α*.
        cross: Σ_l Σ_t ⟨Δ_t, Δ_M⟩_t.
        merged: Σ_l Σ_t ⟨Δ_M, Δ_M⟩_t.
        expert: Σ_l Σ_t ⟨Δ_t, Δ_t⟩_t.
        layers: number of layers.
    """

    scale: float
    cross: float
    merged: float
    expert: float
    layers: int

    def error(self, scale: float) -> float:
        """Return Σ‖(αΔ_M − Δ_t)x‖² / Σ‖Δ_t x‖² at α: 1 for the base, 0 for perfect agreement."""
        return (scale * scale * self.merged - 2 * scale * self.cross + self.expert) / self.expert


def output_terms(
    deltas: Iterable[Tensor],
    merged: Tensor,
    statistics: Sequence[LayerStatistics],
    weights: Sequence[float] | None = None,
) -> OutputTerms:
    """Return the inner products of one layer.

    Args:
        deltas: Δ_t `[out, in]` of each expert; consumed one at a time.
        merged: Δ_M `[out, in]`, before α.
        statistics: Gram A_t `[in, in]`, or its factor, and count of each expert.
        weights: w_t of each expert (default 1); the inner products are multiplied by them.

    Cost: two products of `[out, in]` with `[in, in]` (or `[in, k]`) per expert, in float64.
    """
    wide = merged.double()
    rows: list[Tensor] = []
    for t, (delta, record) in enumerate(zip(deltas, statistics, strict=True)):
        forms = _forms(delta.double(), wide, record)
        weight = 1.0 if weights is None else weights[t]
        rows.append(torch.tensor(forms, dtype=torch.float64) * (weight / record.count))
    cross, both, expert = torch.stack(rows).T
    return OutputTerms(cross, both, expert)


def closed_form_scale(layers: Iterable[OutputTerms]) -> ClosedForm:
    """Return α* = Σ_l Σ_t ⟨Δ_t, Δ_M⟩_t / Σ_l Σ_t ⟨Δ_M, Δ_M⟩_t.

    It minimises Σ_l Σ_t E‖(αΔ_M − Δ_t)x‖² over each expert's own inputs x. Every A_t is divided by
    its number of tokens, so that an expert does not count more for having seen more of them. No
    model is run. The minimum is that of layer outputs, one layer at a time; it knows nothing of
    heads and labels.

    Args:
        layers: of `output_terms`.

    Raises:
        RequestError: no layer.
        NumericalError: a merged delta of zero, NaN, or one that points away from the experts'.

    At T = 1 with Δ_M = Δ₁, α* = 1. Reference: the normal equation of RegMean (arXiv 2212.09849)
    restricted to the line W₀ + αΔ_M.
    """
    cross = merged = expert = 0.0
    count = 0
    for terms in layers:
        cross += float(terms.cross.sum())
        merged += float(terms.merged.sum())
        expert += float(terms.expert.sum())
        count += 1
    if not count:
        raise RequestError("the closed form of α needs at least one layer with Grams.")
    if not (merged > 0 and cross > 0):
        raise NumericalError(
            f"the closed form of α has no positive solution: Σ⟨Δ_t, Δ_M⟩ = {cross:.3g}, "
            f"Σ⟨Δ_M, Δ_M⟩ = {merged:.3g}.\nSearch by divergence or validation, or name a scale."
        )
    return ClosedForm(cross / merged, cross, merged, expert, count)


def prepare_closed_form(plan: Plan, inputs: Inputs) -> Choose:
    """Return the choice of α from Grams; that there are any is checked now."""
    lacking = [name for name in inputs.experts if name not in inputs.statistics]
    if lacking:
        raise RequestError(
            f"scale: auto needs statistics of every expert, and {', '.join(lacking)} "
            f"{'has' if len(lacking) == 1 else 'have'} none.\n"
            "Collect them (eutectic collect) and name them as the experts' statistics, or search "
            "with data:\n"
            "scale: {search: divergence, tasks: tasks.yaml}, or search: validation with labels."
        )
    if not _usable_layers(plan, inputs):
        raise RequestError(
            "scale: auto needs Grams of matrices, and the statistics have none of a matrix whose "
            "scale is open.\nCollect Grams (eutectic collect), or search with data."
        )
    return _by_grams


def _by_grams(unscaled: Unscaled) -> Choice:
    """Return α, with the closed form's error at the usual grid and at its minimum."""
    form = closed_form_scale(_measured_layers(unscaled))
    best = rounded(form.scale)
    scales = sorted({*grid(0.02, 3.0, 11), best})
    curve = ScaleCurve({s: Measured(form.error(s)) for s in scales}, best, False)
    plan, inputs = unscaled.plan, unscaled.inputs
    open_matrices = sum(t.tunable and t.treatment.value == "matrix" for t in plan.tensors)
    record = {
        **curve.described("gram"),
        "layers": form.layers,
        "statistics": {
            name: statistics.provenance.get("data")
            for name, statistics in inputs.statistics.items()
            if statistics.provenance
        },
    }
    numbers = {
        "scale": curve.scale,
        "layers": form.layers,
        "matrices": open_matrices,
        "lost_percent": 100 * form.error(curve.scale),
    }
    return Choice(curve.scale, Note("closed_form_scale", numbers=numbers), record)


def _usable_layers(plan: Plan, inputs: Inputs) -> list[TensorPlan]:
    """Return the matrices whose α is to be chosen and that have Grams of all their experts."""
    return [
        t
        for t in plan.tensors
        if t.tunable
        and t.treatment is Treatment.MATRIX
        and not t.layout.stacked
        and t.layout.groups == 1
        and all(_has_gram(source, inputs) for source in t.experts)
    ]


def _measured_layers(unscaled: Unscaled) -> Iterable[OutputTerms]:
    """Yield the inner products of every usable layer, read one expert at a time."""
    inputs, progress = unscaled.inputs, unscaled.limits.progress
    layers = _usable_layers(unscaled.plan, inputs)
    for done, planned in enumerate(layers):
        if progress is not None:
            progress(done, len(layers), planned.name)
        base = unscaled.base(planned).flatten()
        statistics = [
            inputs.statistics[s.owner].read(s.statistics[""], {"gram"}) for s in planned.experts
        ]
        # A negative weight asks for less of an expert; no error says how much less.
        weights = [max(source.weight, 0.0) for source in planned.experts]

        def read(source: Source, planned: TensorPlan = planned, base: Tensor = base) -> Tensor:
            return as_map(read_delta(inputs.owner(source), source, 0, base, inputs), planned)

        merged = as_map(unscaled.delta(planned).flatten(), planned)
        yield output_terms(map(read, planned.experts), merged, statistics, weights)


def _has_gram(source: Source, inputs: Inputs) -> bool:
    inside = source.statistics.get("")
    if inside is None:
        return False
    statistics = inputs.statistics[source.owner]
    return statistics.has(inside, "gram") and statistics.read(inside, only=()).count > 0


def _forms(expert: Tensor, merged: Tensor, record: LayerStatistics) -> tuple[float, float, float]:
    """Return tr(Δ_t A Δ_Mᵀ), tr(Δ_M A Δ_Mᵀ) and tr(Δ_t A Δ_tᵀ), float64."""
    stored = record.gram if record.gram is not None else record.gram_factor
    width = 0 if stored is None else stored.shape[-1]
    if width != merged.shape[1]:
        raise RequestError(
            f"a Gram of {width} inputs does not belong to a matrix {list(merged.shape)}.\n"
            "Collect the statistics on this architecture."
        )
    factor = record.gram_factor
    if record.gram is None and factor is not None and 2 * len(factor) < factor.shape[1]:
        thin = factor.double().T
        own, both = expert @ thin, merged @ thin
        forms = [float((a * b).sum()) for a, b in ((own, both), (both, both), (own, own))]
        if record.gram_diagonal is not None:
            rest = record.gram_diagonal.double()
            pairs = ((expert, merged), (merged, merged), (expert, expert))
            forms = [
                f + float((a * b).sum(0) @ rest) for f, (a, b) in zip(forms, pairs, strict=True)
            ]
        return forms[0], forms[1], forms[2]
    gram = record.dense_gram()
    assert gram is not None
    own, both = expert @ gram, merged @ gram
    return (float((own * merged).sum()), float((both * merged).sum()), float((own * expert).sum()))
