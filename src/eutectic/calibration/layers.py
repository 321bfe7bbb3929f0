"""One layer: the passes that stand in front of it, its sums, its new tensors, what they improve."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eutectic.calibration.formulas import (
    InputMoments,
    MapEquations,
    ScalingMoments,
    calibrated_scaling,
    map_equations,
)
from eutectic.calibration.forward_passes import ForwardPass
from eutectic.calibration.places import Place, first_input, scaling_parts
from eutectic.calibration.settings import Settings
from eutectic.models.batches import same_memory
from eutectic.models.sites import Site, as_matrix
from eutectic.statistics.gram import check_finite


@dataclass(frozen=True, eq=False)
class Pair:
    """The passes of the student and of the task's expert over one batch."""

    task: str
    student: ForwardPass
    expert: ForwardPass
    held_out: bool = False


@dataclass(frozen=True)
class Tensors:
    """A layer's matrix `[out, in]` or scale `[d]`, and its bias, float32."""

    weight: Tensor
    bias: Tensor | None


class Layer:
    """A place with the passes that stand there and the tensors of every model as they are."""

    def __init__(
        self,
        place: Place,
        pairs: Sequence[Pair],
        student: nn.Module,
        experts: Mapping[str, nn.Module],
    ) -> None:
        self.place = place
        self.pairs = [p for p in pairs if p.student.stands_at == p.expert.stands_at == place.path]
        self.modules = {"": student.get_submodule(place.path)}
        self.modules |= {task: model.get_submodule(place.path) for task, model in experts.items()}
        self.merged = tensors_of(place, self.modules[""])
        self.experts = {t: tensors_of(place, self.modules[t]) for t in experts}

    @property
    def tasks(self) -> list[str]:
        """The tasks of which some fitted batch came here, in their order."""
        return list(dict.fromkeys(p.task for p in self.pairs if not p.held_out))

    def inputs(self) -> list[Tensor]:
        """Return what all passes are about to give to the layer, by which shared inputs show."""
        return [first_input(*end.arguments) for p in self.pairs for end in (p.student, p.expert)]

    def differing(self) -> bool:
        """Tell whether a student and its expert show the layer other numbers of rows."""
        ends = [
            (first_input(*p.student.arguments), first_input(*p.expert.arguments))
            for p in self.pairs
        ]
        return any(x.shape != z.shape for x, z in ends)

    def rows(self, end: ForwardPass, values: Tensor) -> Tensor:
        """Return the rows `[n, features]` that count of what is laid out like the inputs."""
        tokens = end.layout.tokens(self.place.site, values)
        if tokens is None:
            return values.new_zeros(0, values.shape[-1])
        arranged = tokens.arrange(values)
        return arranged.flatten(0, 1) if tokens.mask is None else arranged[tokens.mask]

    def input_rows(self, end: ForwardPass) -> Tensor:
        """Return the inputs of a linear map, float32 at least."""
        values = as_matrix(self.place.site, first_input(*end.arguments))
        rows = self.rows(end, values)
        check_finite(rows, self.place.weight, 0, "inputs")
        return rows

    def scaling_rows(self, end: ForwardPass, task: str) -> tuple[Tensor, Tensor]:
        """Return v and u of a norm; `task` is "" for the student."""
        v, u = scaling_parts(self.place, self.modules[task], *end.arguments)
        check_finite(v, self.place.weight, 0, "inputs")
        return self.rows(end, v), self.rows(end, u)

    def fitted(self, task: str) -> Iterator[Pair]:
        """Yield the pairs of a task that the layer is fitted to."""
        return (p for p in self.pairs if p.task == task and not p.held_out)


def tensors_of(place: Place, module: nn.Module) -> Tensors:
    """Return a module's tensors in the layout of the map."""
    own = dict(module.named_parameters(recurse=False))
    weight = own[place.weight.rpartition(".")[2]].detach()
    bias = None if place.bias is None else own["bias"].detach()
    return Tensors(as_map(place.site, weight), bias)


def as_map(site: Site, stored: Tensor) -> Tensor:
    """Return a parameter as the map `[out, in]`, kernels flattened; a norm's as it is."""
    return stored.flatten(1) if site.kind == "convolution" else site.matrix(stored)


def as_stored(site: Site, values: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the inverse of `as_map`."""
    return site.matrix(values).contiguous().view(*shape)


class SharedInputs:
    """The equations of the last layer, for the next ones if they get the very same tensors."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, int]] = []
        self._equations: MapEquations | None = None
        self._kind: Any = None

    def equations(self, layer: Layer, settings: Settings) -> MapEquations:
        """Return the equations of a layer."""
        inputs = layer.inputs()
        site = layer.place.site
        kind = (site.role, site.path if site.kind == "convolution" else "")
        if self._equations is not None and kind == self._kind and self._same(inputs):
            return self._equations
        # Let go of first: two sets of Grams need not be in memory.
        self._equations = None
        moments = (_input_moments(layer, task) for task in layer.tasks)
        self._equations = map_equations(moments, settings.ridge, settings.expert_share)
        # Kept alive, so that no later tensor can lie at the same address.
        self._seen, self._kind = [(x, x._version) for x in inputs], kind
        return self._equations

    def _same(self, inputs: Sequence[Tensor]) -> bool:
        return len(inputs) == len(self._seen) and all(
            same_memory(x, seen) and version == x._version
            for x, (seen, version) in zip(inputs, self._seen, strict=True)
        )


def _input_moments(layer: Layer, task: str) -> InputMoments:
    found: InputMoments | None = None
    for pair in layer.fitted(task):
        student, expert = layer.input_rows(pair.student), layer.input_rows(pair.expert)
        found = found or InputMoments.zeros(student.shape[1])
        found.add(student, expert)
    assert found is not None
    return found


def calibrated(layer: Layer, anchor: Tensors, settings: Settings, shared: SharedInputs) -> Tensors:
    """Return the layer's new tensors, float64 where they are new; λ holds them at the anchor."""
    place, tasks = layer.place, layer.tasks
    own = [layer.experts[task] for task in tasks]
    biases = [e.bias for e in own if e.bias is not None]
    if place.scaling:
        moments = [_scaling_moments(layer, task, settings.expert_share) for task in tasks]
        weight, bias = calibrated_scaling(
            moments,
            [e.weight for e in own],
            biases or None,
            (anchor.weight, anchor.bias),
            settings.ridge,
        )
        return Tensors(weight, bias)
    equations = shared.equations(layer, settings)
    weights = [e.weight for e in own]
    weight = layer.merged.weight
    if place.changes_weight:
        weight = equations.matrix(weights, anchor.weight)
    bias = layer.merged.bias
    if place.changes_bias:
        assert anchor.bias is not None
        bias = equations.bias(weight, weights, biases, anchor.bias)
    return Tensors(weight, bias)


def _scaling_moments(layer: Layer, task: str, share: float) -> ScalingMoments:
    found = ScalingMoments.zeros(layer.place.site.shape[1])
    for pair in layer.fitted(task):
        student = layer.scaling_rows(pair.student, "")
        found.add(student, layer.scaling_rows(pair.expert, task), share)
    return found


def output_errors(layer: Layer, candidates: Sequence[Tensors]) -> list[float]:
    """Return, for every candidate, how far the layer's outputs are from the experts' own.

    ‖y − y_t‖/‖y_t‖ in the root of its mean square over the tasks, y_t the outputs of expert t in
    its own pass; over the held-out batches where there are any, else over those that were fitted.
    """
    held_out = any(p.held_out for p in layer.pairs)
    missed = {t: [0.0] * len(candidates) for t in layer.tasks}
    sizes = dict.fromkeys(layer.tasks, 0.0)
    for pair in layer.pairs:
        if pair.held_out != held_out or pair.task not in missed:
            continue
        truth = _outputs(layer, pair.expert, pair.task, layer.experts[pair.task])
        sizes[pair.task] += _square(truth)
        for index, candidate in enumerate(candidates):
            own = _outputs(layer, pair.student, "", candidate)
            missed[pair.task][index] += _square(own - truth)
    shares = [[m / sizes[t] for m in missed[t]] for t in missed if sizes[t] > 0]
    count = max(len(shares), 1)
    return [(sum(task[i] for task in shares) / count) ** 0.5 for i in range(len(candidates))]


def _outputs(layer: Layer, end: ForwardPass, task: str, tensors: Tensors) -> Tensor:
    weight, bias = tensors.weight.float(), tensors.bias
    if layer.place.scaling:
        v, u = layer.scaling_rows(end, task)
        found = weight * v + u
    else:
        found = layer.input_rows(end) @ weight.T
    return found if bias is None else found + bias.float()


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
