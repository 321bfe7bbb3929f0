"""An inspection as pictures. Figures have no window; matplotlib is loaded in `new_figure` alone."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eutectic.checkpoint.writer import write_atomically
from eutectic.errors import MissingExtraError, RequestError
from eutectic.reporting.schema import Inspection, Layer, Pairs, Spectrum
from eutectic.storage import can_hold, url_of, view
from eutectic.storage.small_files import read_bytes

PANELS = 6
NUMBERED = 10  # pair tables of up to so many experts carry their numbers
ROW_INCHES = 0.2
WIDEST, TALLEST = 14.0, 18.0  # inches: what a printed page can show
MOST_TICKS = 80
_NAMES = ("spectra", "norms", "interference", "alignment", "sar_nai")
_MAKER = "eutectic, with matplotlib"  # in the file, by which it is known again
_MOST_BYTES = 64 << 20  # of a picture
_LEGEND = {"loc": "outside right upper", "fontsize": 8, "frameon": False}


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of that many inches, or raise MissingExtraError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plots", "Drawing a plot") from None
    figure: Any = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a figure in the format that the file's ending names."""
    check_picture(path)
    buffer, form = io.BytesIO(), path.suffix.removeprefix(".")
    said = {"Software" if form == "png" else "Creator": _MAKER}
    figure.savefig(buffer, format=form, dpi=dpi, metadata=said)
    write_atomically(path, buffer.getvalue())


def check_picture(path: Path) -> None:
    """Find out whether a picture can be drawn there: over one that was drawn here, if any."""
    view(path)
    if not path.exists():
        return
    try:
        ours = _MAKER.encode() in read_bytes(path, _MOST_BYTES)
    except OSError:
        ours = False
    if not ours:
        raise RequestError(
            f"{path}: a plot would be drawn there, and it holds something else.\n"
            "Choose another name."
        )


def check_plots(folder: Path) -> None:
    """Find out before any work whether pictures can be drawn there."""
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder}: is a file; plots are written to a folder.")
    if not can_hold(folder.absolute().parent):
        raise RequestError(f"{folder}: there is no folder {folder.parent}.")
    for name in _NAMES:
        check_picture(folder / f"{name}.png")
    new_figure(1, 1)


def draw(found: Inspection, folder: Path) -> None:
    """Write PNGs of spectra, norms, interference and, with merged models, of SAR (and NAI)."""
    folder.mkdir(parents=url_of(folder) is not None, exist_ok=True)
    figures: dict[str, Any] = {"spectra": _spectra(found), "norms": _norms(found)}
    if len(found.experts) > 1:
        figures["interference"] = _interference(found)
    if found.merged:
        figures["alignment"] = _alignment(found)
    if found.summary.correlation is not None and found.summary.correlation.overall.count:
        figures["sar_nai"] = _scatter(found)
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png", dpi=130)


def _spectra(found: Inspection) -> Any:
    """Singular values of a few layers that an expert changed, spread over the model's depth."""
    changed = [layer for layer in found.layers if any(s.rank for s in layer.experts.values())]
    shown = changed or found.layers
    if len(shown) > PANELS:
        shown = [shown[round(i * (len(shown) - 1) / (PANELS - 1))] for i in range(PANELS)]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = new_figure(3.4 * columns + 1.8, 2.7 * rows + 0.5)
    for place, layer in enumerate(shown):
        axes = figure.add_subplot(rows, columns, place + 1)
        for index, (name, spectrum) in enumerate(layer.experts.items()):
            _curve(axes, spectrum, color=f"C{index % 10}", linewidth=0.9, label=name)
        _curve(axes, layer.sum, color="black", linewidth=1.6, label="sum ΣΔ")
        for index, (name, spectrum) in enumerate(layer.merged.items()):
            style = ("--", "-.", ":")[index % 3]
            _curve(axes, spectrum, color=_dark(index), linestyle=style, linewidth=2, label=name)
        axes.set_xscale("log")
        _log_where_positive(axes)
        axes.set_title(f"{_short(layer.name)}  [{layer.shape[0]}×{layer.shape[1]}]", fontsize=8)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=7)
    figure.suptitle(_spectra_finding(found), fontsize=11)
    figure.supxlabel("index i of the singular value", fontsize=9)
    figure.supylabel("singular value σᵢ (units of the weights)", fontsize=9)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), **_LEGEND)
    return figure


def _norms(found: Inspection) -> Any:
    """Norm of each expert's update per layer, in units of the base's norm."""
    figure = new_figure(min(max(7.0, 0.17 * len(found.layers) + 2.5), WIDEST), 5.0)
    axes = figure.add_subplot()
    positions = range(len(found.layers))

    def curve(spectra: Sequence[Spectrum], **style: Any) -> None:
        values = [s.relative_norm or math.nan for s in spectra]  # zero has no logarithm
        axes.plot(positions, values, markersize=3, **style)

    for index, name in enumerate(found.experts):
        own = [layer.experts[name] for layer in found.layers]
        curve(own, marker="o", color=f"C{index % 10}", linewidth=0.9, label=name)
    for index, name in enumerate(found.merged):
        own = [layer.merged[name] for layer in found.layers]
        curve(own, marker="s", color=_dark(index), linewidth=1.8, linestyle="--", label=name)
    _log_where_positive(axes)
    axes.set_ylabel("‖Δ‖_F / ‖W₀‖_F (share of the base's norm)")
    axes.set_xlabel("matrices, from the model's input to its output", fontsize=9)
    _layer_ticks(axes, found.layers, axis="x")
    axes.grid(alpha=0.25)
    axes.set_title(_norms_finding(found), fontsize=11)
    figure.legend(**_LEGEND)
    return figure


def _interference(found: Inspection) -> Any:
    """Pair tables over the whole model."""
    pairs = found.summary.interference
    tables: list[tuple[str, Pairs, str, float, float]] = [
        ("cosine of task vectors", pairs.cosine, "RdBu_r", -1, 1),
        ("overlap of leading left\nsingular vectors", pairs.overlap_left, "viridis", 0, 1),
        ("overlap of leading right\nsingular vectors", pairs.overlap_right, "viridis", 0, 1),
        ("share of sign conflicts", pairs.sign_conflicts, "RdBu_r", 0, 1),
        ("singular task interference\nover Σσ", pairs.singular, "viridis", 0, _top(pairs.singular)),
    ]
    if pairs.activation is not None:
        title = "output of the row's update on the\ncolumn's data, over its own"
        tables.append((title, pairs.activation, "viridis", 0, _top(pairs.activation, 1.0)))
    names = list(found.experts)
    side = max(2.6, 0.42 * len(names) + 1.0)
    figure = new_figure(3 * (side + 0.9), 2 * (side + 0.6) + 0.4)
    for place, (title, table, colours, low, high) in enumerate(tables):
        axes = figure.add_subplot(2, 3, place + 1)
        image = _heat(axes, table, names, colours, low, high)
        axes.set_title(title, fontsize=9)
        figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)
    figure.suptitle(_interference_finding(found), fontsize=11)
    return figure


def _alignment(found: Inspection) -> Any:
    """SAR per layer and task, one panel per merged model."""
    names, models = list(found.experts), list(found.merged)
    height = min(TALLEST, max(3.6, ROW_INCHES * len(found.layers) + 1.6))
    figure = new_figure(2.6 + len(models) * max(1.8, 0.34 * len(names) + 0.5), height)
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    tables = {
        model: [[layer.alignment[model].ratio[n] for n in names] for layer in found.layers]
        for model in models
    }
    known = [v for table in tables.values() for row in table for v in row if v is not None]
    low = min(0.9, math.floor(10 * min(known, default=0)) / 10)
    for axes, model in zip(panels, models, strict=True):
        _image(axes, tables[model], "viridis", low, 1)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        mean = found.summary.merged[model].sar
        axes.set_title(model if mean is None else f"{model}\nmean {mean:.3f}", fontsize=9)
    _layer_ticks(panels[0], found.layers, axis="y")
    bar = figure.colorbar(panels[-1].images[0], ax=list(panels), shrink=min(1.0, 4 / height))
    bar.set_label(f"SAR at relative error {found.error:g}", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(_alignment_finding(found), fontsize=11)
    return figure


def _scatter(found: Inspection) -> Any:
    """Mean SAR against NAI: a colour per method, a marker per task."""
    assert found.summary.correlation is not None
    figure = new_figure(7.5, 4.8)
    axes = figure.add_subplot()
    markers = "osD^v<>pPX*hH8d"
    for index, (model, own) in enumerate(found.summary.merged.items()):
        for place, task in enumerate(found.experts):
            x, y = own.task_sar[task], own.nai.get(task)
            if x is not None and y is not None:
                marker = markers[place % len(markers)]
                axes.plot(x, y, marker, color=_dark(index), markersize=7, alpha=0.75)
        axes.plot([], [], "s", color=_dark(index), label=model)
    for place, task in enumerate(found.experts):
        axes.plot([], [], markers[place % len(markers)], color="grey", label=task)
    for nai in (1, 0):
        axes.axhline(nai, color="grey", linewidth=0.8, linestyle=":")
    overall = found.summary.correlation.overall
    axes.set_title(
        f"{_relation(overall.spearman)}\nPearson {_text(overall.pearson)}, Spearman "
        f"{_text(overall.spearman)}, {overall.count} points",
        fontsize=10,
    )
    axes.set_xlabel("SAR, mean over layers (share of the expert's update, 0 to 1)")
    axes.set_ylabel("NAI (0: the base, 1: the expert)")
    axes.grid(alpha=0.25)
    figure.legend(**_LEGEND)
    return figure


def _spectra_finding(found: Inspection) -> str:
    """Say how many directions the experts change, and their sum."""
    tasks = [t.effective_rank for t in found.summary.tasks.values() if t.effective_rank is not None]
    what = "Singular values of task matrices and merged deltas (scale included)"
    if not tasks:
        return what
    low, high = min(tasks), max(tasks)
    of = f"{low:.0f}" if round(low) == round(high) else f"{low:.0f} to {high:.0f}"
    return f"An expert changes about {of} directions of a matrix (effective rank)\n{what}"


def _norms_finding(found: Inspection) -> str:
    """Say whose change is largest over the whole model, and by how much the smallest is less."""
    what = "Size of updates per layer, relative to the base's weights"
    known = {n: t.relative_norm for n, t in found.summary.tasks.items() if t.relative_norm}
    if len(known) < 2:
        return what
    largest, smallest = max(known, key=known.__getitem__), min(known, key=known.__getitem__)
    times = known[largest] / known[smallest]
    said = f"{largest}'s change is the largest: {100 * known[largest]:.2g} % of the base's norm"
    return f"{said}, {times:.1f} times {smallest}'s\n{what}"


def _interference_finding(found: Inspection) -> str:
    """Name the pair that interferes most."""
    what = "Interference between experts, over the inspected layers"
    names, pairs = list(found.experts), found.summary.interference.singular
    known = {
        (names[s], names[t]): value
        for s, row in enumerate(pairs)
        for t, value in enumerate(row)
        if s < t and value is not None
    }
    if not known:
        return what
    first, second = max(known, key=known.__getitem__)
    value = known[first, second]
    return f"{first} and {second} interfere most (singular interference {value:.3f})\n{what}"


def _alignment_finding(found: Inspection) -> str:
    """Name the merged model whose subspace holds most of the experts' updates, and its worst."""
    what = "Subspace alignment (SAR) per matrix and task, from input to output"
    means = {name: own.sar for name, own in found.summary.merged.items() if own.sar is not None}
    if not means:
        return what
    best = max(means, key=means.__getitem__)
    tasks = {n: v for n, v in found.summary.merged[best].task_sar.items() if v is not None}
    worst = min(tasks, key=tasks.__getitem__)
    said = f"{best} holds {100 * means[best]:.0f} % of the experts' updates"
    return f"{said}; least of {worst}: {100 * tasks[worst]:.0f} %\n{what}"


def _relation(spearman: float | None) -> str:
    """Say in words whether alignment and accuracy rise together."""
    if spearman is None:
        return "Alignment and accuracy"
    if abs(spearman) < 0.3:
        return "Alignment says little of accuracy here"
    return "Better aligned models are " + ("more accurate" if spearman > 0 else "less accurate")


def _curve(axes: Any, spectrum: Spectrum, **style: Any) -> None:
    axes.plot(spectrum.positions, spectrum.values, **style)


def _log_where_positive(axes: Any) -> None:
    """A logarithmic axis, unless no curve has a positive value: that is an error of matplotlib."""
    if any(value > 0 for line in axes.get_lines() for value in line.get_ydata()):
        axes.set_yscale("log")


def _heat(
    axes: Any, table: Pairs, names: Sequence[str], colours: str, low: float, high: float
) -> Any:
    image = _image(axes, table, colours, low, high)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    if len(names) <= NUMBERED:
        for s, row in enumerate(table):
            for t, value in enumerate(row):
                if value is not None:
                    shade = (value - low) / (high - low)
                    dark = 0.25 < shade < 0.75 if colours == "RdBu_r" else shade > 0.6
                    colour = "black" if dark else "white"
                    axes.text(t, s, _text(value), ha="center", va="center", fontsize=6, c=colour)
    return image


def _image(axes: Any, table: Sequence[Sequence[float | None]], colours: str, *limits: float) -> Any:
    values = [[math.nan if v is None else v for v in row] for row in table]
    axes.set_facecolor("lightgrey")  # what is not defined
    return axes.imshow(
        values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="none"
    )


def _layer_ticks(axes: Any, layers: Sequence[Layer], axis: str) -> None:
    step = math.ceil(len(layers) / MOST_TICKS)
    places = list(range(0, len(layers), step))
    names = [_short(layers[i].name) for i in places]
    if axis == "x":
        axes.set_xticks(places, names, rotation=90, fontsize=6)
    else:
        axes.set_yticks(places, names, fontsize=7)


def _short(name: str) -> str:
    name = name.replace(".weight", "")
    return name if len(name) <= 40 else "…" + name[-39:]


def _top(table: Pairs, least: float = 0.0) -> float:
    return max([least, *(v for row in table for v in row if v is not None)]) or 1.0


def _text(value: float | None) -> str:
    return "–" if value is None else f"{round(value, 2) + 0.0:.2f}"  # no minus before zero


def _dark(index: int) -> str:
    return ("#b30000", "#00429d", "#006d2c", "#6a3d9a", "#8c510a", "#333333")[index % 6]
