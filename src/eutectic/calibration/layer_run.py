"""One run through the layers of a model: what they share, and how each is fitted and kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from eutectic.calibration.forward_passes import ForwardPass, advance
from eutectic.calibration.layers import (
    Layer,
    Pair,
    SharedInputs,
    Tensors,
    as_map,
    as_stored,
    calibrated,
    output_errors,
)
from eutectic.calibration.opened_models import OpenedModels, loaded_expert
from eutectic.calibration.places import Place, Survey, make_layout
from eutectic.calibration.proxies import Proxies
from eutectic.calibration.settings import Settings
from eutectic.calibration.streams import Stream, twin
from eutectic.calibration.unfinished_calibration import Unfinished
from eutectic.models.batches import call
from eutectic.models.hooks import evaluating

Progress = Callable[[float, float, str], None]


@dataclass(frozen=True, eq=False)
class Run:
    """What all layers of a calibration share; the model is the merged one, loaded."""

    models: OpenedModels
    model: nn.Module
    keys: Mapping[str, str]  # name in the model's state -> key in the files
    whole: bool  # every tensor of the files has such a name
    survey: Survey
    unfinished: Unfinished
    settings: Settings

    @property
    def new(self) -> dict[str, Mapping[str, Tensor]]:
        """Key -> the file of a finished layer that holds it."""
        return {key: held for held, _ in self.unfinished.layers.values() for key in held}

    def student(self) -> Stream:
        """Return the merged model with the layers that are finished."""
        before = self.new

        def read(name: str) -> Tensor:
            key = self.keys[name]
            return before[key][key].float() if key in before else self.models.of_merged(key)

        return Stream(self.model, read, self.keys, self.survey.blocks)

    def expert(self, task: str) -> Stream:
        """Return an expert in a copy of the model."""
        model = twin(self.model, self.keys)
        if not self.whole:
            model = loaded_expert(self.models, task, self.model)
        read = partial(self.models.of_expert, task)
        return Stream(model, lambda name: read(self.keys[name]), self.keys, self.survey.blocks)

    def anchor(self, place: Place, merged: Tensors) -> Tensors:
        """Return what λ holds a layer at."""
        rho = self.settings.anchor_scale
        if rho == 1:
            return merged
        base = as_map(place.site, self.models.of_base(self.keys[place.weight]).double())
        weight = base + rho * (merged.weight.double() - base)
        if place.bias is None or merged.bias is None:
            return Tensors(weight, None)
        below = self.models.of_base(self.keys[place.bias]).double()
        return Tensors(weight, below + rho * (merged.bias.double() - below))


def calibrate_layers(run: Run, proxies: Mapping[str, Proxies], progress: Progress | None) -> None:
    """Go through all layers that no earlier run has finished."""
    total = len(run.survey.places)
    todo = [place for place in run.survey.places if place.path not in run.unfinished.layers]
    tell = progress or (lambda done, total, current: None)
    if not todo:
        return
    stops = {place.path for place in todo}
    experts = {task: run.expert(task) for task in run.models.experts}
    student = run.student()
    for stream in (student, *experts.values()):
        stream.stop_in_front_of([place.path for place in todo])
    pairs: list[Pair] = []
    slots = threading.Semaphore(run.settings.threads or torch.get_num_threads())
    for task, own in proxies.items():
        for held_out, batches in ((False, own.fitted), (True, own.held_out)):
            for batch in batches:
                ends = [
                    ForwardPass(
                        partial(call, stream.model, batch),
                        make_layout(stream.model, batch),
                        stops,
                        slots,
                    )
                    for stream in (student, experts[task])
                ]
                pairs.append(Pair(task, *ends, held_out=held_out))
    passes = [end for pair in pairs for end in (pair.student, pair.expert)]
    threads = torch.get_num_threads()
    shared = SharedInputs()
    torch.set_num_threads(1)  # the sums' bytes depend on it
    try:
        with ExitStack() as stack:
            for stream in (student, *experts.values()):
                stack.enter_context(evaluating(stream.model))
            advance(passes)
            for place in todo:
                tell(total - len(stops), total, place.weight)
                _calibrate_layer(run, place, pairs, student, experts, shared)
                stops.discard(place.path)
                advance([each for each in passes if each.stands_at == place.path])
            tell(total, total, "")
    finally:
        for each in passes:
            each.end()
        torch.set_num_threads(threads)


def _calibrate_layer(
    run: Run,
    place: Place,
    pairs: Sequence[Pair],
    student: Stream,
    experts: Mapping[str, Stream],
    shared: SharedInputs,
) -> None:
    """Fit one layer, put it into the student, and keep it."""
    layer = Layer(place, pairs, student.model, {t: s.model for t, s in experts.items()})
    if not layer.tasks:
        run.unfinished.add(place.path, {}, {"left": "no fitted input comes to it"})
        return
    if layer.differing():
        why = "the experts' passes show it other tokens than the merged model's"
        run.unfinished.add(place.path, {}, {"left": why})
        return
    found = calibrated(layer, run.anchor(place, layer.merged), run.settings, shared)
    stored: dict[str, Tensor] = {}
    rounded: dict[str, Tensor] = {}
    for name, values in ((place.weight, found.weight), (place.bias, found.bias)):
        if name is None or name not in place.parameters or values is None:
            continue
        entry = run.models.merged.entries[run.keys[name]]
        shaped = values if name == place.bias else as_stored(place.site, values, entry.shape)
        stored[entry.name] = shaped.to(entry.dtype).contiguous()
        rounded[name] = stored[entry.name].float()
    weight = rounded.get(place.weight)
    new = Tensors(
        layer.merged.weight if weight is None else as_map(place.site, weight),
        layer.merged.bias if place.bias not in rounded else rounded[place.bias],
    )
    before, after = output_errors(layer, [layer.merged, new])
    record = {"before": before, "after": after, "kind": place.kind, "name": place.weight}
    run.unfinished.add(place.path, stored, record)
    for name, values in rounded.items():
        student.put(name, values)
