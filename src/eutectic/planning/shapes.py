"""Why a tensor of an expert has another shape than the base's: what the two models differ in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from eutectic.checkpoint.experts import Expert
from eutectic.checkpoint.index import TensorEntry
from eutectic.conventions_heads import (
    is_key_or_value,
    is_mlp,
    is_norm,
    is_output_layer,
    is_query,
)
from eutectic.conventions_tensors import is_expert_stack
from eutectic.conventions_vocabulary import may_have_rows_of_tokens
from eutectic.errors import Fault
from eutectic.planning.inputs import MergeRequest

ZERO3 = "saved under ZeRO-3 without gathering the parameters"
_GATHER = (
    "Gather them: run zero_to_fp32.py in the folder of the DeepSpeed checkpoint, or save with "
    "stage3_gather_16bit_weights_on_model_save: true."
)
_OTHERWISE = (
    "Models of another architecture cannot be merged; for single tensors a rule may say treatment "
    "copy (the base's values) or head (each expert's own)."
)

Shape = tuple[int, ...]


def another_base(request: MergeRequest) -> dict[str, Fault]:
    """Return a fault for experts whose tensors mostly differ in shape: they are of another base."""
    faults: dict[str, Fault] = {}
    base = request.inputs.base.entries
    for name, expert in request.inputs.experts.items():
        differ = _differing(expert, base)
        full = [
            k
            for k in differ
            if expert.entries[k].numel and base[k].numel
            # Tables of other vocabularies tell nothing of the body.
            if not (may_have_rows_of_tokens(k) and expert.entries[k].shape[1:] == base[k].shape[1:])
        ]
        shared = sum(k in base for k in expert.entries)
        if 2 * len(full) > shared:
            first = full[0]
            why = Counter(_cause(k, expert, base, _hidden(expert, base)) for k in full)
            cause = next((c for c, _ in why.most_common() if c), "")
            cause = f" It has {cause}." if cause else ""
            what = (
                f"expert '{name}' is not of this base: {len(full)} of {shared} tensors have "
                f"another shape, such as {first} {list(expert.entries[first].shape)} against "
                f"{list(base[first].shape)}.{cause}"
            )
            line = request.document.line("experts", name)
            faults[name] = Fault("another_base", what, line=line)
    return faults


def shape_faults(
    names: Iterable[str], request: MergeRequest, leave_out: Collection[str] = ()
) -> list[Fault]:
    """Return one fault per tensor of another shape and expert; those of one cause say the same."""
    base = request.inputs.base.entries
    names = list(names)
    faults: list[Fault] = []
    for owner, expert in request.inputs.experts.items():
        if owner in leave_out:
            continue
        hidden = _hidden(expert, base)
        line = request.document.line("experts", owner)
        for name in names:
            if name not in expert.entries or expert.entries[name].shape == base[name].shape:
                continue
            own, wanted = expert.entries[name].shape, base[name].shape
            fault = Fault("other_shape", "", name, line, str(list(own)), next=_OTHERWISE)
            if 0 in own or 0 in wanted:
                who = f"expert '{owner}'" if 0 in own else "the base"
                what = f"{who} has no numbers there: {ZERO3}."
                faults.append(replace(fault, what=what, next=_GATHER))
                continue
            cause = _cause(name, expert, base, hidden) or f"another shape than {list(wanted)}"
            faults.append(replace(fault, what=f"expert '{owner}' has {cause}."))
    return faults


def empty_heads(request: MergeRequest) -> list[Fault]:
    """Refuse heads of an expert that hold no numbers."""
    return [
        Fault(
            "other_shape",
            f"expert '{owner}' has no numbers there: {ZERO3}.",
            name,
            request.document.line("experts", owner),
            str(list(entry.shape)),
            next=_GATHER,
        )
        for owner, expert in request.inputs.experts.items()
        for name, entry in expert.extra.items()
        if not entry.numel and is_output_layer(name)
    ]


def _differing(expert: Expert, base: Mapping[str, TensorEntry]) -> list[str]:
    return [k for k, e in expert.entries.items() if k in base and e.shape != base[k].shape]


def _hidden(expert: Expert, base: Mapping[str, TensorEntry]) -> tuple[int, int] | None:
    """Return the hidden sizes of expert and base where they differ, by the length of the norms."""
    pairs = Counter(
        (expert.entries[k].shape[0], base[k].shape[0])
        for k in _differing(expert, base)
        if len(expert.entries[k].shape) == len(base[k].shape) == 1 and is_norm(k)
    )
    return next((pair for pair, _ in pairs.most_common() if 0 not in pair), None)


def _cause(
    name: str,
    expert: Expert,
    base: Mapping[str, TensorEntry],
    hidden: tuple[int, int] | None,
) -> str:
    """Return what the expert has instead, in words that all tensors of one cause share."""
    own, wanted = expert.entries[name].shape, base[name].shape
    if len(own) != len(wanted):
        return _flattened(own, wanted)
    differ = [(a, b) for a, b in zip(own, wanted, strict=True) if a != b]
    sizes = f"({differ[0][0]} against {differ[0][1]})"
    if hidden in differ:
        return f"another hidden size ({hidden[0]} against {hidden[1]})" if hidden else ""
    if len(own) == 2 and own == wanted[::-1]:
        return "the matrix transposed, as Conv1D keeps it against Linear"
    if len(own) > 3:
        return _kernel(own, wanted)
    if len(own) == 3 and is_expert_stack(name) and own[0] != wanted[0]:
        return f"another number of experts in a mixture {sizes}"
    if is_mlp(name) or is_expert_stack(name):
        return f"another MLP width {sizes}"
    rows = own[:1] != wanted[:1] and own[1:] == wanted[1:]
    if rows and is_key_or_value(name):
        return (
            f"another number of heads of keys and values {sizes[:-1]} rows), as grouped-query "
            "attention (GQA) has against multi-head attention (MHA)"
        )
    if rows and is_query(name):
        return f"another number or size of attention heads {sizes[:-1]} rows)"
    return ""


def _flattened(own: Shape, wanted: Shape) -> str:
    """Return what other dimensions tell."""
    if len(own) == 1 or (len(own) == 2 and own[1] == 1 and len(wanted) > 1):
        return "flattened numbers, as in a shard of FSDP or ZeRO, or packed ones of 4 bits"
    return f"{len(own)} dimensions instead of {len(wanted)}"


def _kernel(own: Sequence[int], wanted: Sequence[int]) -> str:
    """Return what two kernels `[out, in, …]` differ in."""
    if own[1] != wanted[1] and own[2:] == wanted[2:]:
        return f"{own[1]} input channels against {wanted[1]}"
    if own[2:] != wanted[2:]:
        left, right = ("×".join(map(str, s[2:])) for s in (own, wanted))
        return f"another size of patches or kernels ({left} against {right})"
    return f"{own[0]} output channels against {wanted[0]}"
