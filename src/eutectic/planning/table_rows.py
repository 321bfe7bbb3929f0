"""Tables with a row per token: which there are, and where each row of one comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from eutectic.checkpoint.expert_tensors import Expert
from eutectic.checkpoint.index import CheckpointIndex, TensorEntry
from eutectic.checkpoint.reader import TensorSource
from eutectic.conventions import is_token_embedding
from eutectic.conventions_vocabulary import (
    is_input_table,
    is_table_of_tokens,
    may_have_rows_of_tokens,
)
from eutectic.errors import CheckpointError, Fault
from eutectic.planning.inputs import Inputs
from eutectic.planning.tensor_plan import Donor, FilledRows, RowMap, Source, TensorPlan
from eutectic.types import Treatment
from eutectic.vocabulary.agreement import BASE, Vocabulary
from eutectic.vocabulary.row_places import places

Shape = tuple[int, ...]


@dataclass(frozen=True)
class PlannedVocabulary:
    """The vocabulary of an output, and the tensors that have a row for each of its tokens."""

    agreed: Vocabulary
    tensors: frozenset[str]  # of the base
    height: int  # rows of the base's
    based: bool  # whether the recipe names a base, or takes one of its models for its form alone
    folders: Mapping[str, Path]  # model -> folder of its tokenizer

    def meets(self, name: str) -> bool:
        """Tell whether a tensor of the base has a row per token."""
        return name in self.tensors


def tables_of(
    entries: Mapping[str, TensorEntry], index: CheckpointIndex | None
) -> tuple[int, frozenset[str]]:
    """Return how many rows a model's table of tokens has, and which tensors have a row for each.

    The table is known by its name, or by the configuration's `vocab_size`; output layers and
    biases by names and the same number of rows.
    """
    matrices = {n: e.shape for n, e in entries.items() if len(e.shape) == 2}
    exact = [shape[0] for n, shape in matrices.items() if is_token_embedding(n)]
    if not exact:
        stated = index.config.get("vocab_size") if index is not None else None
        wide = [s[0] for n, s in matrices.items() if is_input_table(n) and s[0] == stated]
        exact = wide or [s[0] for n, s in matrices.items() if is_table_of_tokens(n)]
    if not exact:
        return 0, frozenset()
    height = Counter(exact).most_common(1)[0][0]
    return height, frozenset(
        name
        for name, entry in entries.items()
        if may_have_rows_of_tokens(name) and rows_in(entry.shape) == height
    )


def rows_in(shape: Shape) -> int:
    """Return how many tokens a shape has room for: its rows, or the columns of a single one."""
    return (shape[1] if len(shape) == 2 and shape[0] == 1 else shape[0]) if shape else 0


def _with_rows(shape: Shape, rows: int) -> Shape:
    return (1, rows) if len(shape) == 2 and shape[0] == 1 else (rows, *shape[1:])


def _width(shape: Shape) -> int:
    if len(shape) == 2 and shape[0] == 1:
        return 1
    width = 1
    for length in shape[1:]:
        width *= length
    return width


def _entry(expert: Expert, name: str) -> TensorEntry | None:
    return expert.entries.get(name) or expert.extra.get(name)


def height_of(expert: Expert, tensors: frozenset[str], base: int) -> int:
    """Return the rows of an expert's table of tokens; of an adapter without one, the base's."""
    held = [(n, e) for n in sorted(tensors) if (e := expert.entries.get(n)) is not None]
    tables = [e for n, e in held if is_input_table(n)] or [e for _, e in held]
    return rows_in(tables[0].shape) if tables else base


class _Bounded:
    """Tensors of an expert whose tables look larger or smaller than they are."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.is_delta = source.is_delta
        self.notes = source.notes
        self.entries = source.entries

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return a range; CheckpointError beyond the end, for those that compare values."""
        held = self.entries.get(name)
        if held is not None and max(start, stop or 0) > held.numel:
            raise CheckpointError(f"'{name}' has no such rows; they are matched by their tokens.")
        return self._source.read(name, start, stop)

    def fingerprint(self) -> str:
        """Return the identity of the content."""
        return self._source.fingerprint()

    def identity(self) -> list[tuple[str, int, int]]:
        """Return the files."""
        return self._source.identity()

    def close(self) -> None:
        """Release files."""
        self._source.close()


def as_one_size(inputs: Inputs, planned: PlannedVocabulary) -> Inputs:
    """Return inputs whose experts have tables as large as the base's, for whoever asks for shapes.

    Their rows are placed by `with_vocabulary`; nothing reads them by these shapes.
    """
    heights = planned.agreed.heights

    def fitted(expert: Expert, height: int) -> Expert:
        def rows_of(name: str) -> int:
            own = inputs.base.entries.get(name)
            return planned.height if own is None else rows_in(own.shape)

        def like_base(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
            return {
                name: replace(entry, shape=_with_rows(entry.shape, rows_of(name)))
                if entry.shape
                and (planned.meets(name) or may_have_rows_of_tokens(name))
                and (planned.meets(name) or rows_in(entry.shape) == height)
                else entry
                for name, entry in entries.items()
            }

        return replace(
            expert,
            source=_Bounded(expert.source),
            entries=like_base(expert.entries),
            extra=like_base(expert.extra),
        )

    experts = {name: fitted(e, heights[name]) for name, e in inputs.experts.items()}
    initial = inputs.initial
    if initial is not None:
        initial = fitted(initial, heights["initial"])
    return replace(inputs, experts=experts, initial=initial)


def with_vocabulary(
    plan: TensorPlan, planned: PlannedVocabulary, inputs: Inputs
) -> TensorPlan | Fault:
    """Return the plan of a tensor with its rows placed by the output's vocabulary.

    `inputs` are those that are read. Unchanged for tensors without a row per token.
    """
    own = plan.like if plan.base is None else plan.base.tensor
    if own is None or not planned.meets(own):
        return plan
    if plan.treatment is Treatment.HEAD:
        what = "has a row per token, so that it cannot be each expert's own beside one vocabulary."
        return Fault("head_of_vocabulary", what, plan.name, next="Leave the rule out.")
    shape = inputs.base.entries[own].shape
    width = _width(shape)
    # The base lends the rows that models lack, also where it is not subtracted.
    lent_by = inputs.rows[own].like[0] if own in inputs.rows else BASE
    lends = (planned.based and lent_by == BASE) or plan.base is not None
    sources: list[Source] = [*([Source(BASE, own)] if lends else []), *plan.experts]
    if plan.initial is not None:
        sources.append(plan.initial)
    heights: dict[str, int] = {}
    tensors: dict[str, str] = {}
    donors: list[str] = []
    for source in sources:
        if source.tensor is None:
            continue
        full = True
        if source.owner == BASE:
            held = inputs.base.entries[source.tensor].shape
        else:
            expert = inputs.owner(source)
            entry = _entry(expert, source.tensor)
            if entry is None:  # an adapter that does not act on it: unchanged as a whole
                continue
            held = entry.shape
            full = source.tensor in expert.stored and source.tensor not in expert.factored
            if _width(held) != width:
                what = f"'{source.owner}' has rows of {_width(held)} numbers, the base of {width}."
                return Fault("table_width", what, plan.name, got=str(list(held)))
        heights[source.owner], tensors[source.owner] = rows_in(held), source.tensor
        if full and source.owner != "initial" and source.owner not in donors:
            donors.append(source.owner)
    size = planned.agreed.size
    placed = places(planned.agreed, heights, donors, based=plan.base is not None)

    def mapped(source: Source, behind: Source | None = None) -> Source:
        found = placed.get(source.owner) if source.tensor is not None else None
        if found is None or found.is_whole(size, heights[source.owner]):
            return source
        filled = tuple(
            FilledRows(
                rows.first,
                rows.count,
                tuple(Donor(owner, tensors[owner], row) for owner, row in rows.donors),
            )
            for rows in found.filled
        )
        if found.padding is not None:
            filled += (FilledRows(*found.padding, (), average=True, behind=behind),)
        return replace(source, rows=RowMap(width, found.runs, filled))

    base = None if plan.base is None else mapped(plan.base)
    initial = None if plan.initial is None else mapped(plan.initial, base)
    return replace(
        plan,
        shape=_with_rows(shape, size),
        base=base,
        experts=tuple(mapped(s, None if s.owner == BASE else base) for s in plan.experts),
        initial=initial,
    )


def head_faults(
    heads: Mapping[str, Sequence[TensorEntry]], planned: PlannedVocabulary
) -> list[Fault]:
    """Refuse heads over the tokens of one expert, beside a table of the output's tokens."""
    agreed = planned.agreed
    what = "has a row for each of the expert's own tokens, which are not those of the output."
    choose = "Choose heads: base or drop, or that expert's vocabulary."
    return [
        Fault("head_of_vocabulary", f"expert '{name}': {what}", entry.name, next=choose)
        for name, own in heads.items()
        for entry in own
        if may_have_rows_of_tokens(entry.name)
        and rows_in(entry.shape) == agreed.heights[name]
        and (agreed.models[name].rows != agreed.rows or agreed.size != agreed.heights[name])
    ]
