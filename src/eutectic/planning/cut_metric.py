"""Which layers of an adapter are cut in the metric of their inputs, and what keeps them from it."""

from collections.abc import Sequence
from dataclasses import replace

from eutectic.errors import Fault, Note
from eutectic.methods import get_method
from eutectic.planning.adapter_plan import THIN, AdapterPlan
from eutectic.planning.inputs import Inputs
from eutectic.planning.statistics_match import lacks
from eutectic.planning.tensor_plan import TensorPlan
from eutectic.words import few

_COLLECT = (
    "Collect them (eutectic collect EXPERT --data FILE -o FILE) and name them with --statistics "
    "NAME=FILE or in the recipe; or choose cut: plain."
)


def cut_in_inputs(
    tensors: Sequence[TensorPlan], adapter: AdapterPlan, inputs: Inputs
) -> list[TensorPlan]:
    """Return the tensors, those marked that are cut in the metric of their inputs."""
    if adapter.options.cut != "inputs":
        return list(tensors)
    return [
        replace(t, cut_in_inputs=True) if _has_inputs(t, adapter, inputs) else t for t in tensors
    ]


def cut_faults(tensors: Sequence[TensorPlan], adapter: AdapterPlan, inputs: Inputs) -> list[Fault]:
    """Return why nothing can be cut in the metric of the inputs.

    Statistics that were kept for adapters see their rows alone; a method that expands them has
    changes beyond these.
    """
    if adapter.options.cut != "inputs":
        return []
    where = "adapter.cut"
    taking = (s.owner for t in tensors if _is_thin(t, adapter) for s in t.experts if s.weight)
    without = [name for name in dict.fromkeys(taking) if name not in inputs.statistics]
    if without:
        what = f"inputs needs statistics of every expert, and {few(without)} "
        what += "has none." if len(without) == 1 else "have none."
        return [Fault("cut_without_statistics", what, where, next=_COLLECT)]
    cut = [t for t in tensors if _has_inputs(t, adapter, inputs)]
    if not cut:
        what = "inputs needs the input Grams of layers, and the statistics hold none of them."
        return [Fault("cut_without_statistics", what, where, next=_COLLECT)]
    core = [name for name, own in inputs.statistics.items() if _is_core(own)]
    beyond = [t for t in cut if core and not get_method(t.method).factors]
    if not beyond:
        return []
    what = (
        f"the statistics of {few(core)} were collected for adapters, and {beyond[0].method} "
        f"expands these: its changes reach beyond their rows ({few([t.name for t in beyond])})."
    )
    choose = "Collect statistics without --for, or choose cut: plain."
    return [Fault("cut_beyond_rows", what, where, next=choose)]


def cut_notes(tensors: Sequence[TensorPlan], adapter: AdapterPlan) -> list[Note]:
    """Return which layers are cut without a metric, where it was asked for."""
    if adapter.options.cut != "inputs":
        return []
    plain = [t.name for t in tensors if _is_thin(t, adapter) and not t.cut_in_inputs]
    return [Note("cut_plainly", tuple(plain))] if plain else []


def _has_inputs(planned: TensorPlan, adapter: AdapterPlan, inputs: Inputs) -> bool:
    """Tell whether every expert that has a say knows the inputs of a layer."""
    if not _is_thin(planned, adapter) or planned.layout.stacked or planned.layout.groups > 1:
        return False
    taking = [s for s in planned.experts if s.weight]
    return bool(taking) and not any(
        lacks(inputs.statistics.get(s.owner), s.statistics.get(""), {"gram"}) for s in taking
    )


def _is_thin(planned: TensorPlan, adapter: AdapterPlan) -> bool:
    own = adapter.carried.get(planned.name)
    return own is not None and own.form in THIN


def _is_core(statistics: object) -> bool:
    provenance = getattr(statistics, "provenance", {})
    return bool(provenance.get("settings", {}).get("core"))
