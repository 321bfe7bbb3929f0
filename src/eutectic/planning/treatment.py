"""Which treatment a tensor takes: by its name, shape and dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eutectic import conventions
from eutectic.checkpoint.index import TensorEntry
from eutectic.conventions_layouts import INPUTS_FIRST
from eutectic.conventions_patterns import fits
from eutectic.conventions_tensors import experts_in_rows
from eutectic.errors import Fault, Note
from eutectic.planning.kinds import kind_of
from eutectic.planning.tensor_plan import Layout
from eutectic.recipes.schema import TensorRule
from eutectic.types import Treatment


@dataclass(frozen=True)
class Decision:
    """A treatment and why."""

    treatment: Treatment
    reason: tuple[Note, ...]  # why it is this treatment and method
    layout: Layout = Layout()
    scale: float | None = None  # α of this tensor alone, or None
    ruled: bool = False  # a rule of the recipe names the treatment

    def because(self, *reason: Note, treatment: Treatment | None = None) -> Decision:
        """Return the decision with another reason, and another treatment if one is given."""
        return replace(self, reason=reason, treatment=treatment or self.treatment)


def decide(
    entry: TensorEntry,
    rules: Sequence[TensorRule],
    config: Mapping[str, Any],
    held: Mapping[str, TensorEntry] | None = None,
) -> Decision | Fault:
    """Return the decision for one tensor of the base, or its fault.

    The recipe's rules come first, in order; the first that matches and says something of the
    treatment decides it. Likewise for `split` and `scale`. Without a rule:

    1. integers and booleans, and empty tensors: copy;
    2. fewer than two dimensions, (IA)³ vectors, biases, scales and norms of any shape: vector;
    3. weights of four and more dimensions, and three unless they stack linear maps: conv;
    4. lookup tables of tokens and positions, learned tokens and queries: embedding; matrices of one
       row or column, and `text_projection`: vector;
    5. every other matrix, and stacks of matrices: matrix.

    `held` are all tensors of the base; the bias beside a weight helps to tell what it is.
    """
    matching = [rule for rule in rules if fits(entry.name, rule.match)]
    ruled = next((r for r in matching if r.treatment is not None), None)
    scale = next((r.scale for r in matching if r.scale is not None), None)
    split = next((r.split for r in matching if r.split is not None), None)
    default, reason = kind_of(entry, config, held or {})
    treatment, kind = default, reason.kind
    if ruled is not None and ruled.treatment is not None:
        treatment, reason = ruled.treatment, Note("rule", (ruled.match,))
        if treatment is Treatment.MATRIX and len(entry.shape) < 2:
            what = "treatment 'matrix' needs 2 dimensions"
            return Fault("dimensions", what, entry.name, got=str(list(entry.shape)))
        mergeable = entry.dtype.is_floating_point or treatment in (Treatment.COPY, Treatment.HEAD)
        if not mergeable:
            what = f"{entry.dtype} cannot be merged; use treatment copy or head."
            return Fault("dtype", what, entry.name)
    # Whatever it is merged as: an adapter holds its change as one of a linear map.
    layout = Layout(_is_transposed(entry, config))
    if treatment is Treatment.MATRIX:
        stacked = len(entry.shape) == 3 and kind not in ("convolution", "several_axes")
        transpose = layout.transpose or (
            # Only where rows are cut: a stack merges alike either way, but for rounding.
            stacked and split is not None and bool(_model_types(config) & INPUTS_FIRST)
        )
        split = split or experts_in_rows(entry.name, entry.shape[0], config)
        parts = _parts(entry, split, transpose, stacked) if split != 1 else ()
        if isinstance(parts, Fault):
            return parts
        layout = Layout(transpose, parts, stacked)
    return Decision(treatment, (reason,), layout, scale, ruled is not None)


def _is_transposed(entry: TensorEntry, config: Mapping[str, Any]) -> bool:
    if len(entry.shape) != 2:
        return False
    conv1d = bool(_model_types(config) & conventions.CONV1D_MODELS)
    own = conv1d and conventions.is_conv1d(entry.name)
    return own or conventions.is_openclip_projection(entry.name)


def _model_types(config: Mapping[str, Any]) -> set[str]:
    """Return the type of a model, and of its parts (such as of a vision-encoder-decoder)."""
    parts = (config, *(v for v in config.values() if isinstance(v, Mapping)))
    return {str(part.get("model_type")) for part in parts}


def _parts(
    entry: TensorEntry, split: int | list[int], transpose: bool, stacked: bool
) -> tuple[int, ...] | Fault:
    rows = entry.shape[-1 if transpose else 1 if stacked else 0]
    if isinstance(split, int):
        what = f"{rows} rows cannot be split into {split} equal parts."
        heights = (rows // split,) * split
    else:
        what = f"split {split} adds up to {sum(split)}, the tensor has {rows} rows."
        heights = tuple(split)
    return heights if sum(heights) == rows else Fault("split", what, entry.name)
