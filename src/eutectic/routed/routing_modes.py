"""How a routed model chooses its experts, in a `with` block, and how well it did."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from eutectic.errors import RequestError, suggest
from eutectic.routed.forward_pass import MODES, Decisions, Mode, Routing, Settings, applying
from eutectic.routed.routed_modules import Experts


@contextmanager
def routing(
    routed: nn.Module,
    *,
    mode: Mode = "route",
    expert: str | Sequence[str] | None = None,
    temperature: float = 1.0,
    layer: str | None = None,
    record: bool = False,
) -> Iterator[Decisions]:
    """Choose how experts are chosen, in this thread (or task) and this block.

    Args:
        routed: from `build_routed` or `load_routed`.
        mode: "route": each layer decides per sample. "oracle": the caller names the expert.
            "base": experts off. "soft": all experts, weighted by softmax(scores / temperature).
            "vote": one decision per sample for the whole network, or for each of its towers (texts
            and images of CLIP), from a first pass with the experts off (every batch is run twice;
            a prompt's decision is kept while decoding).
            Where one layer decides for the whole network (routers "mad" and "sim"), its scores
            count in all of these modes, and "vote" is "route".
        expert: for "oracle", one name, or one per sample of each batch.
        temperature: for "soft", above 0.
        layer: for "vote", the parameter name of the layer that decides for its tower; otherwise
            the model's own deciding layer, or where it has none the majority of all layers, the
            first expert where votes are equal.
        record: fill the yielded table (in "base" mode too, where routers decide without effect).

    Yields:
        Layer -> index of the expert per sample, batches in order, positions as in
        `routed.routing.experts`; for "soft" the heaviest expert. Decoding steps that hold a
        prompt's decision add nothing. Empty without `record` and in "oracle" mode.

    Raises:
        RequestError: not a routed model, an unknown mode, expert or layer, a temperature that is
            not positive, an oracle without an expert, an argument of another mode.
    """
    handle = routing_of(routed)
    if mode not in MODES:
        raise RequestError(f"unknown mode '{mode}'.{suggest(mode, MODES)}\nModes: {MODES}.")
    if not temperature > 0:
        raise RequestError(f"temperature must be above 0, got {temperature}.")
    if (mode == "oracle") != (expert is not None):
        raise RequestError(
            "oracle mode needs expert=, one name or one per sample."
            if expert is None
            else f"expert= belongs to oracle mode, got mode='{mode}'."
        )
    if temperature != 1 and mode != "soft":
        raise RequestError(f"temperature= belongs to soft mode, got mode='{mode}'.")
    if layer is not None and mode != "vote":
        raise RequestError(f"layer= belongs to vote mode, got mode='{mode}'.")
    layers = [m.name for m in routed.modules() if isinstance(m, Experts)]
    if layer is not None and layer not in layers:
        raise RequestError(f"no routed layer '{layer}'.{suggest(layer, layers)}")
    decisions, named = Decisions(), [expert] if isinstance(expert, str) else expert or ()
    indices = tuple(handle.index(name) for name in named)
    settings = Settings(mode, indices, temperature, layer, decisions if record else None)
    with applying(handle, settings):
        yield decisions


def routing_of(routed: nn.Module) -> Routing:
    """Return the handle of a routed model, compiled or not."""
    handle = getattr(routed, "routing", None)
    if not isinstance(handle, Routing):
        raise RequestError(
            f"{type(routed).__name__} is not a routed model; make one with eutectic.build_routed."
        )
    return handle


def elect(votes: Sequence[Tensor], handle: Routing) -> Tensor:
    """Return one expert per sample: the last layer's where evidence adds up, else the majority's.

    Of layers that saw as many samples as the last.
    """
    cast = [choice for choice in votes if len(choice) == len(votes[-1])]
    if handle.accumulate:
        return cast[-1]
    return nn.functional.one_hot(torch.stack(cast), len(handle.experts)).sum(0).argmax(-1)


def routing_accuracy(
    decisions: dict[str, Tensor], labels: Sequence[int] | Tensor
) -> dict[str, float]:
    """Return, per layer, the share of samples sent to their own expert.

    Args:
        decisions: what `routing(…, record=True)` yielded.
        labels: the right expert's index per sample, in the same order.

    Raises:
        RequestError: a layer decided for another number of samples.
    """
    return {name: float(hits.double().mean()) for name, hits in _hits(decisions, labels).items()}


def routing_accuracy_by_task(
    decisions: dict[str, Tensor], labels: Sequence[int] | Tensor, experts: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return, per layer and task, the share of the task's samples sent to its own expert.

    Args:
        decisions: what `routing(…, record=True)` yielded.
        labels: the right expert's index per sample, in the same order.
        experts: `routed.routing.experts`, which name the tasks.

    Returns:
        Layer -> expert -> share, layers in the order in which they were passed, experts in their
        own. Tasks without samples are left out.

    Raises:
        RequestError: a layer decided for another number of samples, or a label is no expert.
    """
    right = torch.as_tensor(labels)
    present = [int(t) for t in right.unique()]
    if unknown := [t for t in present if not 0 <= t < len(experts)]:
        raise RequestError(f"labels {unknown} are no experts; there are {len(experts)}, from 0 on.")
    return {
        name: {experts[t]: float(hits[right == t].double().mean()) for t in present}
        for name, hits in _hits(decisions, labels).items()
    }


def _hits(decisions: dict[str, Tensor], labels: Sequence[int] | Tensor) -> dict[str, Tensor]:
    """Return, per layer, which samples were sent to their own expert."""
    right = torch.as_tensor(labels)
    for name, chosen in decisions.items():
        if chosen.shape != right.shape:
            raise RequestError(
                f"'{name}' decided for {len(chosen)} samples, but there are {len(right)} labels.\n"
                "Give the labels of its own samples, and each tower's layers apart where towers "
                "saw batches of unequal size."
            )
    return {name: chosen == right for name, chosen in decisions.items()}
