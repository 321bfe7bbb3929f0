"""Where matrices of a mixture lie in the stacks of the model in memory, which PEFT adapts whole.

transformers keeps the experts of a mixture in bare parameters `[E, out, in]` or `[E, in, out]`, and
files keep them so or one by one. PEFT's `target_parameters` adapts such a parameter, from 0.19 on
in both orders of axes, told by the module's `is_transposed`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eutectic.checkpoint.layouts import model_types
from eutectic.checkpoint.names import Alignment
from eutectic.conventions_layouts import ALTERNATING, GATE_UP, packing
from eutectic.models.outline import Outline
from eutectic.planning.inputs import Inputs
from eutectic.planning.tensor_plan import TensorPlan


@dataclass(frozen=True)
class Slot:
    """What a tensor of the file is of a stack in memory."""

    parameter: str  # the stack's full name in memory
    experts: int
    outputs: int  # of one matrix of the stack
    turned: bool  # the stack is [E, in, out]
    expert: int | None = None  # None: the tensor is the whole stack
    rows: slice | None = None  # of the matrix's outputs; None: all


def stack_slots(
    tensors: Sequence[TensorPlan],
    names: Mapping[str, str],
    met: tuple[Outline | None, Alignment | None],
    inputs: Inputs,
) -> dict[str, Slot]:
    """Return the slots of merged tensors that are stacks in memory, or lie in one.

    `names` are those in memory of tensors that have one, `met` the model in memory and how names
    of files were read as its own. Without a model nothing is known of its stacks.
    """
    outline, alignment = met
    if outline is None or alignment is None:
        return {}
    groups: dict[str, dict[str, tuple[str, ...]]] = {}
    for own, shape in outline.shapes.items():
        how = packing(alignment.form_of_name(own).name, len(shape))
        if how is not None and how.stacked and how.kind == "weight":
            groups.setdefault(how.group, {})[own] = how.roles
    alternating = bool(model_types(inputs.config) & ALTERNATING)
    found: dict[str, Slot] = {}
    for planned in tensors:
        own = names.get(planned.name)
        if not planned.merged:
            continue
        if own is not None and len(planned.shape) == 3 and planned.layout.stacked:
            found[planned.name] = _slot(own, outline)
        elif own is None and len(planned.shape) == 2:
            slot = _inside(planned, groups, (outline, alignment), alternating)
            if slot is not None:
                found[planned.name] = slot
    return found


def _slot(own: str, outline: Outline) -> Slot:
    count, rows, columns = outline.shapes[own]
    turned = own in outline.turned
    return Slot(own, count, columns if turned else rows, turned)


def _inside(
    planned: TensorPlan,
    groups: Mapping[str, Mapping[str, tuple[str, ...]]],
    met: tuple[Outline, Alignment],
    alternating: bool,
) -> Slot | None:
    """Return where a single matrix `[out, in]` lies in a stack; None where in none."""
    outline, alignment = met
    how = packing(alignment.form_of_key(planned.name).name, 2)
    if how is None or how.expert is None or planned.layout.transpose:
        return None
    for own, roles in groups.get(how.group, {}).items():
        if not {*how.roles} <= {*roles} or roles not in (how.roles, GATE_UP):
            continue
        whole = _slot(own, outline)
        parts, height = len(roles) // len(how.roles), planned.shape[0]
        if how.expert >= whole.experts or height * parts != whole.outputs:
            continue
        rows = slice(0, height)
        if parts > 1:
            position = roles.index(how.roles[0])
            rows = slice(position * height, (position + 1) * height)
            if alternating:
                rows = slice(position, whole.outputs, parts)
        return Slot(own, whole.experts, whole.outputs, whole.turned, how.expert, rows)
    return None
