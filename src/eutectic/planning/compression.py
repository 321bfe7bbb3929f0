"""Which tensors are merged at the rank of an adapter, and what keeps a method from that."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from eutectic.errors import Fault
from eutectic.methods import get_method
from eutectic.planning.adapter_plan import THIN, AdapterPlan
from eutectic.planning.tensor_plan import TensorPlan
from eutectic.words import few


def compressed_before(tensors: Sequence[TensorPlan], adapter: AdapterPlan) -> list[TensorPlan]:
    """Return the tensors, with the rank to which their experts are brought before the merge."""
    if (rank := adapter.options.before) is None:
        return [*tensors]
    how: dict[str, Any] = {"compress": rank, "balance": adapter.options.balance}
    return [replace(t, **how) if _is_thin(t, adapter) else t for t in tensors]


def compression_faults(tensors: Sequence[TensorPlan], adapter: AdapterPlan) -> list[Fault]:
    """Return why methods cannot merge what is compressed before: a fault for each of them."""
    found: dict[tuple[str, str], list[str]] = {}
    for planned in tensors:
        if adapter.options.before is None or not _is_thin(planned, adapter):
            continue
        if (reason := _unable(planned)) is not None:
            found.setdefault((planned.method, reason), []).append(planned.name)
    choose = "Choose compress: after, which cuts what is merged."
    return [
        Fault(
            "compress_before",
            f"{method} {reason}, and experts that are compressed before have none ({few(names)}).",
            "adapter.compress",
            next=choose,
        )
        for (method, reason), names in found.items()
    ]


def _is_thin(planned: TensorPlan, adapter: AdapterPlan) -> bool:
    own = adapter.carried.get(planned.name)
    return own is not None and own.form in THIN


def _unable(planned: TensorPlan) -> str | None:
    """Return what a tensor's method works on that the compressed experts do not have."""
    method, parameters = get_method(planned.method), planned.parameters
    if method.space(parameters) == "weight":
        return "works on weights"
    if not method.elementwise:
        return None
    if method.prepare is not None and method.model_scope(parameters):
        return "looks at the entries of the whole model"
    if needs := method.needs(parameters):
        listed = " and ".join(sorted(need.replace("_", " ") for need in needs))
        return f"needs the {listed} of every entry"
    return None
