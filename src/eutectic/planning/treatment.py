"""Which treatment a tensor takes, from its name, shape and dtype alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from eutectic import conventions
from eutectic.checkpoint.index import TensorEntry
from eutectic.errors import Fault, Note
from eutectic.recipes.schema import TensorRule
from eutectic.types import Treatment


@dataclass(frozen=True)
class Decision:
    """A treatment and why.

    Attributes:
        treatment: what becomes of the tensor.
        reason: why it is this treatment and method.
        transpose: the file holds [in, out].
        split: heights of the fused matrices, or empty.
        stacked: a stack [E, out, in], merged matrix by matrix.
        scale: α of this tensor alone, or None.
        ruled: a rule of the recipe names the treatment.
    """

    treatment: Treatment
    reason: tuple[Note, ...]
    transpose: bool = False
    split: tuple[int, ...] = ()
    stacked: bool = False
    scale: float | None = None
    ruled: bool = False

    def because(self, *reason: Note, treatment: Treatment | None = None) -> Decision:
        """Return the decision with another reason, and another treatment if one is given."""
        return replace(self, reason=reason, treatment=treatment or self.treatment)


def decide(
    entry: TensorEntry, rules: Sequence[TensorRule], config: Mapping[str, Any]
) -> Decision | Fault:
    """Return the decision for one tensor of the base, or its fault.

    The recipe's rules come first, in order; the first that matches and says something of the
    treatment decides it. Likewise for `split` and `scale`. Without a rule:

    1. integers and booleans, and empty tensors: copy;
    2. fewer than two dimensions, and (IA)³ vectors: vector;
    3. four and more dimensions, and three unless the name says stacked experts or a table: conv;
    4. lookup tables (`*embed*`, `wte`, `shared`, relative attention bias, class tokens): embedding;
       matrices of one row or column, and `text_projection`: vector;
    5. every other matrix, and stacks of experts' matrices: matrix.
    """
    matching = [rule for rule in rules if fnmatchcase(entry.name, rule.match)]
    ruled = next((r for r in matching if r.treatment is not None), None)
    scale = next((r.scale for r in matching if r.scale is not None), None)
    split = next((r.split for r in matching if r.split is not None), None)
    default, reason = _default(entry)
    treatment = default
    if ruled is not None and ruled.treatment is not None:
        treatment, reason = ruled.treatment, Note("rule", (ruled.match,))
        if treatment is Treatment.MATRIX and len(entry.shape) < 2:
            what = "treatment 'matrix' needs 2 dimensions"
            return Fault("dimensions", what, entry.name, got=str(list(entry.shape)))
        mergeable = entry.dtype.is_floating_point or treatment in (Treatment.COPY, Treatment.HEAD)
        if not mergeable:
            what = f"{entry.dtype} cannot be merged; use treatment copy or head."
            return Fault("dtype", what, entry.name)
    transpose = treatment is Treatment.MATRIX and _is_transposed(entry, config)
    stacked = treatment is Treatment.MATRIX and len(entry.shape) == 3 and default is not _CONV
    parts = (
        _parts(entry, split, transpose, stacked) if treatment is Treatment.MATRIX and split else ()
    )
    if isinstance(parts, Fault):
        return parts
    return Decision(treatment, (reason,), transpose, parts, stacked, scale, ruled is not None)


_CONV = Treatment.CONV


def _default(entry: TensorEntry) -> tuple[Treatment, Note]:
    shape = entry.shape
    if not entry.dtype.is_floating_point:
        return Treatment.COPY, Note("integers")
    if 0 in shape:
        return Treatment.COPY, Note("empty")
    if len(shape) < 2:
        return Treatment.VECTOR, Note("small")
    if entry.name.endswith(conventions.IA3_SUFFIX):
        return Treatment.VECTOR, Note("ia3_vector")
    table = conventions.is_table(entry.name)
    stack = table or conventions.is_expert_stack(entry.name)
    if len(shape) > 3 or (len(shape) == 3 and not stack):
        return Treatment.CONV, Note("convolution")
    if table:
        return Treatment.EMBEDDING, Note("table")
    if min(shape[-2:]) == 1:
        return Treatment.VECTOR, Note("single_row")
    if conventions.is_text_projection(entry.name):
        return Treatment.VECTOR, Note("text_projection")
    return Treatment.MATRIX, Note("stack") if len(shape) == 3 else Note("matrix")


def _is_transposed(entry: TensorEntry, config: Mapping[str, Any]) -> bool:
    if len(entry.shape) != 2:
        return False
    if conventions.is_conv1d(entry.name):
        # A model of several parts (vision-encoder-decoder) states each part's type.
        parts = (config, *(v for v in config.values() if isinstance(v, Mapping)))
        if any(str(part.get("model_type")) in conventions.CONV1D_MODELS for part in parts):
            return True
    return conventions.is_openclip_projection(entry.name)


def _parts(
    entry: TensorEntry, split: int | list[int], transpose: bool, stacked: bool
) -> tuple[int, ...] | Fault:
    rows = entry.shape[1 if transpose or stacked else 0]
    if isinstance(split, int):
        if rows % split:
            what = f"{rows} rows cannot be split into {split} equal parts."
            return Fault("split", what, entry.name)
        return (rows // split,) * split
    if sum(split) != rows:
        what = f"split {split} adds up to {sum(split)}, the tensor has {rows} rows."
        return Fault("split", what, entry.name)
    return tuple(split)
