"""Where the rows of a table come from, model by model, by the vocabulary of the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eutectic.vocabulary.agreement import BASE, Vocabulary, row_of
from eutectic.vocabulary.policy import TokenRow

Rows = NDArray[np.int64]
Run = tuple[int, int, int]  # first row in the output, first row in the model, number of rows


@dataclass(frozen=True)
class MeanRows:
    """Rows of the output that are the mean of rows of some models, or zero without any."""

    first: int  # in the output
    count: int
    donors: tuple[tuple[str, int], ...]  # (model, its first row)


@dataclass(frozen=True)
class Places:
    """Where one model's rows stand in the output, and what stands in place of those it lacks."""

    runs: tuple[Run, ...]
    filled: tuple[MeanRows, ...] = ()
    # (first, count) of rows without a token that are the mean of this model's rows before them
    padding: tuple[int, int] | None = None

    def is_whole(self, size: int, height: int) -> bool:
        """Tell whether the rows stand as they are in the model."""
        plain = not self.filled and self.padding is None
        return plain and size == height and self.runs == ((0, 0, size),)


def places(
    vocabulary: Vocabulary,
    heights: Mapping[str, int],
    donors: Sequence[str],
    *,
    based: bool = True,
) -> dict[str, Places]:
    """Return the places of every model that holds a tensor; `heights` are its rows there.

    A row that the base lacks is the mean over the `donors` that have it. A row that an expert lacks
    is left out: it counts as unchanged from the base. Where models are not merged as differences
    from a base (`based` is false) it is the base's, or else that mean. Rules
    about single tokens come first. Rows without a token are matched by their number, as far as the
    model of the tokenizer has such rows and they are kept; else they are the mean of each model's
    rows before them, whose logit is nobody's highest. Cost: linear in the rows.
    """
    own = {name: _positions(vocabulary, name, height) for name, height in heights.items()}
    having = {name: rows.copy() for name, rows in own.items()}
    ruled = _ruled(vocabulary, heights)
    for row, (_, force) in ruled.items():
        if force:
            for rows in own.values():
                rows[row] = -1
    filled: dict[str, list[MeanRows]] = {name: [] for name in own}
    lacking = {name: rows < 0 for name, rows in own.items()}
    wanting = [BASE] if based else list(own)
    anywhere = np.zeros(vocabulary.size, dtype=bool)
    for name in wanting:
        anywhere |= lacking[name]
    first = max(vocabulary.count, _kept(vocabulary))
    anywhere[first:] = False
    padding = (first, vocabulary.size - first) if first < vocabulary.size else None
    for row in ruled:
        anywhere[row] = True
    for row in map(int, np.flatnonzero(anywhere)):
        chosen = ruled.get(row, (None, False))[0]
        if chosen is None:
            held = [(n, int(having[n][row])) for n in donors if having[n][row] >= 0]
            lends = [pair for pair in held if pair[0] == BASE]
            chosen = tuple(held if based or not lends or row in ruled else lends)
        fills = wanting
        if based and row in ruled and not lacking[BASE][row]:
            fills = [name for name in own if name != BASE]
        for name in fills:
            if lacking[name][row]:
                _append(filled[name], row, chosen)
    return {
        name: Places(tuple(_runs(rows)), tuple(filled[name]), padding) for name, rows in own.items()
    }


def _positions(vocabulary: Vocabulary, name: str, height: int) -> Rows:
    """Return the model's row for every row of the output, -1 where it has none."""
    tokens, size = vocabulary.models[name], vocabulary.size
    rows = np.full(size, -1, dtype=np.int64)
    known = tokens.rows
    # Of two tokens in one row the added one counts, which comes last.
    if known is vocabulary.rows or known == vocabulary.rows:
        taken = np.fromiter(known.values(), dtype=np.int64, count=len(known))
        rows[taken] = taken
    else:
        added = [t for t in vocabulary.rows if t in vocabulary.models[vocabulary.donor].added]
        for token in (*vocabulary.rows, *added):
            row = known.get(token)
            if row is not None:
                rows[vocabulary.rows[token]] = row
    rows[rows >= height] = -1
    shared = min(size, height, _kept(vocabulary))
    free = np.ones(shared, dtype=bool)  # rows without a token on either side
    for table in (known, vocabulary.rows):
        taken = np.fromiter(table.values(), dtype=np.int64, count=len(table))
        free[taken[taken < shared]] = False
    rows[:shared][free] = np.flatnonzero(free)
    return rows


def _kept(vocabulary: Vocabulary) -> int:
    """Return how many rows are matched by their number where no token has them."""
    return vocabulary.heights[vocabulary.donor] if vocabulary.policy.padding == "keep" else 0


Ruled = dict[int, tuple[tuple[tuple[str, int], ...] | None, bool]]


def _ruled(vocabulary: Vocabulary, heights: Mapping[str, int]) -> Ruled:
    """Return row of the output -> where a rule takes it from (None: the mean), and by force."""
    found: Ruled = {}
    for token, rule in vocabulary.policy.tokens.items():
        source = rule.source
        donors: tuple[tuple[str, int], ...] | None = None
        if isinstance(source, TokenRow):
            row = row_of(vocabulary, token, source)
            held = row is not None and row < heights.get(source.model, 0)
            donors = ((source.model, row),) if row is not None and held else None
        elif source == "zero":
            donors = ()
        found[vocabulary.rows[token]] = donors, rule.force
    return found


def _append(filled: list[MeanRows], row: int, donors: tuple[tuple[str, int], ...]) -> None:
    """Add one row, to the last rows where it follows them in every model."""
    if filled:
        last = filled[-1]
        follows = last.first + last.count == row and len(donors) == len(last.donors)
        if follows and all(
            a == b and own + last.count == other
            for (a, own), (b, other) in zip(last.donors, donors, strict=True)
        ):
            filled[-1] = MeanRows(last.first, last.count + 1, last.donors)
            return
    filled.append(MeanRows(row, 1, donors))


def _runs(rows: Rows) -> Iterator[Run]:
    """Yield the runs of rows that follow each other on both sides."""
    if not len(rows):
        return
    # Row 0 is one more than the mark of a row that is lacking, and follows none.
    breaks = np.flatnonzero((np.diff(rows) != 1) | (rows[1:] < 0) | (rows[:-1] < 0)) + 1
    for first, last in zip([0, *breaks], [*breaks, len(rows)], strict=True):
        if rows[first] >= 0:
            yield int(first), int(rows[first]), int(last - first)
