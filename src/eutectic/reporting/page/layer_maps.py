"""Measures over the model: one number per layer and kind of matrix, and spectra and pairs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from eutectic.conventions import block_of, is_token_embedding, layer_group
from eutectic.reporting.page.page_record import (
    LayerMap,
    Line,
    Measure,
    PairTable,
    Spectra,
)
from eutectic.reporting.page.public_texts import without_private_paths
from eutectic.reporting.page.source_views import ProvenanceView, RoutedView
from eutectic.reporting.schema import Inspection, Layer, Pairs, Spectrum

OTHER = "outside layers"
_MOST_COLUMNS = 24  # beyond, parts of stacks share a column
_MOST_EACH = 48  # measures per expert and model; beyond, only means over experts
_MOST_ROWS = 400
_MOST_SPECTRA = 600  # layers with spectra
_POINTS = 150_000  # of all spectra together
_DIGITS = re.compile(r"(\d+)")
Values = Mapping[str, float | None]  # tensor -> its number
_Scale = Literal["sequential", "diverging", "state"]


def in_order(names: Iterable[str]) -> list[str]:
    """Return names as a model has them: embeddings, layer 2 before layer 10, then what follows.

    >>> in_order(["lm_head.weight", "model.embed_tokens.weight", "h.10.b", "h.2.a", "h.10.a"])
    ['model.embed_tokens.weight', 'h.2.a', 'h.10.a', 'h.10.b', 'lm_head.weight']
    """
    held = list(names)
    outside = [name for name in held if block_of(name) == name]
    inside = {block_of(name) for name in held} - set(outside)
    tables = [name for name in outside if is_token_embedding(name)]
    # What stands beside the table of tokens, unless the layers do as well.
    beside = {name.rpartition(".")[0].rpartition(".")[0] + "." for name in tables}
    first = tuple(
        own for own in beside if own != "." and not any(b.startswith(own) for b in inside)
    )
    early = {n for n in outside if n in tables or (first and n.startswith(first))}

    def key(name: str) -> tuple[int, list[tuple[int, int, str]]]:
        parts = _DIGITS.split(name)
        place = 0 if name in early else 1 if block_of(name) in inside or name in inside else 2
        return place, [(0, int(p), "") if i % 2 else (1, 0, p) for i, p in enumerate(parts)]

    return sorted(held, key=key)


def place_of(name: str, *, whole: bool = True) -> tuple[str, str]:
    """Return (layer, kind of matrix) of a tensor; what is in no layer has a row of its own.

    Without `whole`, parts of stacks and fused matrices are of one kind.

    >>> place_of("encoder.layer.3.attention.self.query.weight")
    ('encoder.layer.3', 'attention.self.query')
    >>> place_of("lm_head.weight")
    ('lm_head', 'outside layers')
    """
    block = block_of(name)
    if block == name:
        return name.removesuffix(".weight"), OTHER
    kind = layer_group(name).removeprefix(layer_group(block + ".")[:-1]).lstrip(".")
    tensor, bracket, part = kind.partition("[")
    return block, tensor.removesuffix(".weight") + (bracket + part if whole else "")


class Grid:
    """Rows and columns for the tensors of one source, and measures laid out over them."""

    def __init__(self, name: str, tensors: Sequence[str]) -> None:
        self.name = name
        places = {t: place_of(t) for t in tensors}
        if len({kind for _, kind in places.values()}) > _MOST_COLUMNS:
            places = {t: place_of(t, whole=False) for t in tensors}
        self.rows = list(dict.fromkeys(places[t][0] for t in in_order(places)))[:_MOST_ROWS]
        kinds = list(dict.fromkeys(kind for _, kind in places.values()))
        self.columns = sorted(kinds, key=lambda kind: kind == OTHER)[:_MOST_COLUMNS]
        self._places = {
            t: (self.rows.index(row), self.columns.index(kind))
            for t, (row, kind) in places.items()
            if row in set(self.rows) and kind in set(self.columns)
        }
        self.measures: list[Measure] = []

    def add(
        self,
        key: str,
        label: str,
        values: Values,
        *,
        unit: str = "",
        meaning: str = "",
        ends: tuple[float, float] | None = None,
        states: Sequence[str] = (),
    ) -> None:
        """Lay a measure out; several tensors of one place have their mean, or most frequent state.

        A measure without a single value is left out.
        """
        held: dict[tuple[int, int], list[float]] = {}
        for tensor, value in values.items():
            if value is not None and math.isfinite(value) and tensor in self._places:
                held.setdefault(self._places[tensor], []).append(value)
        if not held:
            return
        table: list[list[float | None]] = [[None] * len(self.columns) for _ in self.rows]
        for (row, column), own in held.items():
            number = max(set(own), key=own.count) if states else sum(own) / len(own)
            table[row][column] = _digits(number)
        flat = [v for line in table for v in line if v is not None]
        low, high = ends or (min(0.0, *flat), max(flat))
        if max(flat) < 0:
            high = max(flat)
        scale: _Scale = "state" if states else "diverging" if low < 0 < high else "sequential"
        if scale == "diverging":
            high = max(abs(v) for v in flat)
            low = -high
        elif ends is not None:
            low, high = _round_ends(flat, ends)
        self.measures.append(
            Measure(
                key=key, label=label, unit=unit, meaning=meaning, scale=scale, low=low,
                high=high if high > low else low + 1, values=table, states=list(states),
            )
        )  # fmt: skip

    def as_map(self, notes: Sequence[str] = ()) -> LayerMap | None:
        """Return the map, None where nothing was measured."""
        if not self.measures:
            return None
        return LayerMap(
            name=self.name,
            rows=self.rows,
            columns=self.columns,
            measures=self.measures,
            notes=[without_private_paths(note) for note in notes],
        )


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _round_ends(values: Sequence[float], ends: tuple[float, float]) -> tuple[float, float]:
    """Return the tenths of a range between which all values lie, so that differences show."""
    step = (ends[1] - ends[0]) / 10
    first = math.floor((min(values) - ends[0]) / step + 1e-9)
    last = math.ceil((max(values) - ends[0]) / step - 1e-9)
    first = min(first, last - 1) if last > 0 else 0
    return _digits(ends[0] + step * first), _digits(ends[0] + step * max(last, first + 1))


def _mean(values: Iterable[float | None]) -> float | None:
    kept = [v for v in values if v is not None]
    return sum(kept) / len(kept) if kept else None


def _off_diagonal(table: Pairs | None) -> float | None:
    if table is None:
        return None
    return _mean(v for s, row in enumerate(table) for t, v in enumerate(row) if s != t)


def inspected_map(name: str, found: Inspection) -> LayerMap | None:
    """Return the maps of an inspection: alignment, size of updates, interference, energy."""
    layers = found.layers
    grid = Grid(name, [layer.name for layer in layers])
    experts, models = list(found.experts), list(found.merged)

    def over(of: Any) -> dict[str, float | None]:
        return {layer.name: of(layer) for layer in layers}

    each = len(experts) * max(len(models), 1) <= _MOST_EACH
    for m in models:
        grid.add(
            f"sar {m}", f"SAR of {m}, mean over experts",
            over(lambda own, m=m: _mean(own.alignment[m].ratio.values())), ends=(0, 1),
            meaning="Subspace alignment ratio: the share of an expert's update that lies in the "
            "merged model's subspace. 1: all of it.",
        )  # fmt: skip
        for t in experts if each else ():
            grid.add(
                f"sar {m} {t}", f"SAR of {m}, expert {t}",
                over(lambda own, m=m, t=t: own.alignment[m].ratio.get(t)), ends=(0, 1),
                meaning="The share of this expert's update that lies in the merged model's "
                "subspace.",
            )  # fmt: skip
    for m in models:
        grid.add(
            f"growth {m}", f"Size of the update, {m}", over(lambda own, m=m: _growth(own, m)),
            unit="× the experts' mean", meaning="‖αΔ‖ of the merged model over the mean of the "
            "experts' norms; far above 1, the change has exploded there.",
        )  # fmt: skip
    for t in experts:
        grid.add(
            f"update {t}", f"Size of the update, expert {t}",
            over(lambda own, t=t: _percent(own.experts[t].relative_norm)),
            unit="% of ‖W₀‖", meaning="How far this expert moved from the base.",
        )  # fmt: skip
    grid.add(
        "interference", "Interference of the experts' subspaces",
        over(lambda own: _off_diagonal(own.interference.singular)),
        meaning="Singular task interference of pairs over Σσ of both, mean over pairs; 0: their "
        "directions have nothing in common.",
    )  # fmt: skip
    grid.add(
        "activation", "Interference measured on activations",
        over(lambda own: _off_diagonal(own.interference.activation)),
        unit="× the task's own effect", meaning="How much one expert moves outputs on another "
        "task's data, in units of what that task's expert does itself; mean over pairs.",
    )  # fmt: skip
    grid.add(
        "cosine", "Cosine of the experts' updates", over(lambda own: _cosine(own)), ends=(-1, 1),
        meaning="Mean over pairs: 1 the same direction, 0 unrelated, −1 opposite.",
    )  # fmt: skip
    grid.add(
        "energy", "Energy in the leading directions",
        over(lambda own: _percent(_mean(s.energy for s in own.experts.values()))), ends=(0, 100),
        unit="%", meaning="Share of Σσ² of an expert's update that its leading k directions hold, "
        "mean over experts.",
    )  # fmt: skip
    for m in models:
        grid.add(
            f"rank {m}", f"Effective rank, {m}",
            over(lambda own, m=m: own.merged[m].effective_rank),
            unit="directions", meaning="exp of the entropy of σ/Σσ of the merged update.",
        )  # fmt: skip
    return grid.as_map(found.notes)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _growth(layer: Layer, model: str) -> float | None:
    own = [s.norm for s in layer.experts.values() if s.norm > 0]
    return layer.merged[model].norm / (sum(own) / len(own)) if own else None


def _cosine(layer: Layer) -> float | None:
    return _off_diagonal(layer.interference.cosine)


def merged_map(name: str, made: ProvenanceView) -> LayerMap | None:
    """Return the maps of a merge: which method took which matrix, residuals, energy kept."""
    matrices = {n: t for n, t in made.tensors.items() if t.treatment == "matrix"}
    grid = Grid(name, list(matrices))
    methods = list(dict.fromkeys(t.method for t in matrices.values()))
    if len(methods) > 1:
        grid.add(
            "method", "Method that merged it",
            {n: float(methods.index(t.method)) for n, t in matrices.items()}, states=methods,
            meaning="Where another method stands than the one that was asked for, it fell back or "
            "a rule says so; the table of tensors has the reason.",
        )  # fmt: skip
    last = {n: _last_residual(made.records.get(n)) for n in matrices}
    grid.add(
        "residual", "Residual of the linear system", last, unit="log₁₀, relative",
        meaning="Of the last step of conjugate gradients; −5 means solved to 10⁻⁵.",
    )  # fmt: skip
    grid.add(
        "kept", "Energy kept in the adapter", {n: _kept(made.records.get(n)) for n in matrices},
        unit="%", ends=(0, 100), meaning="Share of the change that the adapter's rank holds.",
    )  # fmt: skip
    if made.calibration is not None:
        ratios = made.calibration.get("layers")
        if isinstance(ratios, Mapping):
            grid.add(
                "calibrated", "Error left by calibration",
                {str(n): _error_left(row) for n, row in ratios.items()}, unit="× before",
                meaning="Distance of the layer's outputs from the experts' own, after calibration "
                "over before; below 1 it helped.",
            )  # fmt: skip
    return grid.as_map()


def _error_left(row: Any) -> float | None:
    if not isinstance(row, Mapping):
        return None
    before, after = row.get("before"), row.get("after")
    if not isinstance(before, (int, float)) or not isinstance(after, (int, float)):
        return None
    return after / before if before > 0 else None


def _parts(record: Any) -> list[Mapping[str, Any]]:
    if not isinstance(record, Mapping):
        return []
    return [part for part in record.values() if isinstance(part, Mapping)]


def _last_residual(record: Any) -> float | None:
    ends = [p["residuals"][-1] for p in _parts(record) if p.get("residuals")]
    worst = [e for e in ends if isinstance(e, (int, float)) and e > 0]
    return math.log10(max(worst)) if worst else None


def _kept(record: Any) -> float | None:
    told = record.get("adapter") if isinstance(record, Mapping) else None
    lost = told.get("lost_energy") if isinstance(told, Mapping) else None
    return 100 * (1 - lost) if isinstance(lost, (int, float)) else None


def routed_map(name: str, routed: RoutedView) -> LayerMap | None:
    """Return the share of samples that each routed layer sends to the right expert."""
    if routed.quality is None or not routed.quality.layers:
        return None
    layers, chance = routed.quality.layers, routed.quality.chance
    grid = Grid(name, list(layers))
    low = 0.0 if chance is None else 100 * chance
    meaning = f"Share of a task's samples that the layer's router sends to its own expert; by " \
        f"chance {low:.0f} %."  # fmt: skip
    tasks = list(dict.fromkeys(task for row in layers.values() for task in row))
    means = {n: _percent(_mean(row.values())) for n, row in layers.items()}
    how = "measured" if routed.quality.measured else "estimated"
    grid.add("routing", f"Routed right ({how}), mean over tasks", means, unit="%",
             ends=(0, 100), meaning=meaning)  # fmt: skip
    for task in tasks if len(tasks) <= _MOST_EACH else ():
        own = {n: _percent(row.get(task)) for n, row in layers.items()}
        grid.add(f"routing {task}", f"Routed right, {task}", own, unit="%", ends=(0, 100),
                 meaning=meaning)  # fmt: skip
    return grid.as_map()


def spectra_of(found: Inspection) -> list[Spectra]:
    """Return the spectra of every layer, thinned so that a page stays small."""
    layers = {layer.name: layer for layer in found.layers}
    names = in_order(layers)
    names = names[:: math.ceil(len(names) / _MOST_SPECTRA)] if names else []
    lines = max(1, len(names) * (len(found.experts) + 1 + len(found.merged)))
    points = max(8, min(24, _POINTS // lines))
    every = [_spectra(layers[name], points) for name in names]
    return [own for own in every if own.lines]  # a layer that nobody changes has none


def _spectra(layer: Layer, points: int) -> Spectra:
    lines = [_line(n, "expert", s, points) for n, s in layer.experts.items()]
    lines.append(_line("sum of the experts", "sum", layer.sum, points))
    lines += [_line(n, "merged", s, points) for n, s in layer.merged.items()]
    return Spectra(layer=layer.name, lines=[line for line in lines if line.values])


def _line(name: str, role: Literal["expert", "sum", "merged"], own: Spectrum, points: int) -> Line:
    """Return a spectrum at about so many positions at equal ratios, down to its numerical rank."""
    held = [(p, v) for p, v in zip(own.positions, own.values, strict=True) if v > 0]
    held = [pair for pair in held if pair[0] <= max(own.rank, 1)]
    wanted = {round(i * (len(held) - 1) / (points - 1)) for i in range(points)} if held else set()
    kept = [pair for i, pair in enumerate(held) if i in wanted]
    return Line(
        name=name, role=role, positions=[p for p, _ in kept], values=[_digits(v) for _, v in kept]
    )


def pair_tables(found: Inspection) -> list[PairTable]:
    """Return how the experts' pairs interfere over the whole model."""
    own, names = found.summary.interference, list(found.experts)
    known: list[tuple[str, str, Pairs | None, str, tuple[float, float] | None]] = [
        ("cosine", "Cosine of whole updates", own.cosine,
         "1 the same direction, 0 unrelated, −1 opposite.", (-1, 1)),
        ("singular", "Singular task interference", own.singular,
         "Of the pair, over Σσ of both, mean over layers; 0: nothing in common.", None),
        ("activation", "Interference on activations", own.activation,
         "How much the row's expert moves outputs on the column's data, in units of what the "
         "column's expert does itself; median over layers.", None),
        ("overlap right", "Overlap of input subspaces", own.overlap_right,
         "‖VₛᵀVₜ‖²/k of the leading right singular vectors, mean over layers.", (0, 1)),
        ("overlap left", "Overlap of output subspaces", own.overlap_left,
         "‖UₛᵀUₜ‖²/k of the leading left singular vectors, mean over layers.", (0, 1)),
        ("signs", "Entries with opposite signs", own.sign_conflicts,
         "Share of the entries that both change; unrelated updates have 0.5.", (0, 1)),
    ]  # fmt: skip
    tables: list[PairTable] = []
    for key, label, values, meaning, ends in known:
        if values is None or len(names) < 2:
            continue
        # The diagonal compares an expert with itself, which says nothing and sets the scale.
        shown = [[None if s == t or v is None else _digits(v) for t, v in enumerate(row)]
                 for s, row in enumerate(values)]  # fmt: skip
        flat = [v for row in shown for v in row if v is not None]
        if not flat:
            continue
        low, high = ends or (0.0, max(flat) or 1.0)
        scale: Literal["sequential", "diverging"] = "diverging" if low < 0 else "sequential"
        tables.append(
            PairTable(key=key, label=label, meaning=meaning, scale=scale, low=low, high=high,
                      names=names, values=shown)
        )  # fmt: skip
    return tables
