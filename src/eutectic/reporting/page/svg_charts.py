"""Charts as SVG: pure functions from numbers to markup, without a library and without styles.

Colours and strokes are classes, which the page's style sheet gives for light, dark and paper.
Every text and attribute is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from eutectic.reporting.page.page_record import Curve, Figure
from eutectic.words import plain

WIDTH, HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 14, 24, 44
SERIES = 5  # colours that stay apart; beyond, lines are dashed too


@dataclass(frozen=True)
class Legend:
    """Which line is whose."""

    name: str
    kind: str
    note: str = ""


def tag(name: str, *inside: object, **attributes: object) -> Markup:
    """Return an element; `class_` and `font_size` are written `class` and `font-size`.

    >>> tag("text", "a < b", x=1, class_="tick")
    Markup('<text x="1" class="tick">a &lt; b</text>')
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), plain(_short(value)))
        for key, value in attributes.items()
        if value is not None
    )
    content = Markup("").join(
        part if isinstance(part, Markup) else escape(plain(str(part))) for part in inside
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, content)


def _short(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def style_of(index: int) -> str:
    """Return the classes of a line: a colour, and beyond five lines a dash as well."""
    return f"line s{index % SERIES} dash{index // SERIES % 4}"


@dataclass(frozen=True)
class Axis:
    """A scale from numbers to pixels, with its ticks."""

    low: float
    high: float
    start: float  # pixel of `low`
    stop: float  # pixel of `high`
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Return the pixel of a value, at an end where it lies outside."""
        low, high = self._of(self.low), self._of(self.high)
        share = (self._of(value) - low) / ((high - low) or 1.0)
        return self.start + min(1.0, max(0.0, share)) * (self.stop - self.start)

    def beyond(self, value: float) -> float:
        """Return the pixel of a value, outside the axis where the value is."""
        low, high = self._of(self.low), self._of(self.high)
        return self.start + (self._of(value) - low) / ((high - low) or 1.0) * (
            self.stop - self.start
        )

    def _of(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.logarithmic else value

    def ticks(self) -> list[float]:
        """Return round numbers within the axis."""
        return _log_ticks(self.low, self.high) if self.logarithmic else _ticks(self.low, self.high)


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    if not high > low:
        return [low]
    raw = (high - low) / about
    size = 10 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 6))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    found = [m * 10.0**e for e in range(first, last + 1, every) for m in steps]
    return [t for t in found if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]


def number(value: float) -> str:
    """Return a number for a tick."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e-0", "e−").replace("e+0", "e").replace("e-", "e−")
    return f"{value:.4g}".replace("-", "−")


def frame(x: Axis, y: Axis, labels: tuple[str, str], show: Callable[[float], str]) -> Markup:
    """Return both axes with grid, ticks and labels."""
    parts: list[Markup] = []
    for value in y.ticks():
        height = y.at(value)
        parts.append(tag("line", x1=x.start, x2=x.stop, y1=height, y2=height, class_="grid"))
        parts.append(tag("text", show(value), x=x.start - 9, y=height + 4, class_="tick end"))
    for value in x.ticks():
        place = x.at(value)
        parts.append(tag("line", x1=place, x2=place, y1=y.start, y2=y.start + 4, class_="axis"))
        parts.append(tag("text", number(value), x=place, y=y.start + 17, class_="tick middle"))
    parts.append(tag("line", x1=x.start, x2=x.stop, y1=y.start, y2=y.start, class_="axis"))
    middle = (x.start + x.stop) / 2
    parts.append(tag("text", labels[0], x=middle, y=y.start + 36, class_="label middle"))
    across = (y.start + y.stop) / 2
    turned = f"translate(12 {across:.1f}) rotate(-90)"
    parts.append(tag("text", labels[1], transform=turned, class_="label middle"))
    return Markup("").join(parts)


def picture(title: str, *inside: Markup, key: str, height: int = HEIGHT) -> Markup:
    """Return a whole chart with its title, which screen readers say."""
    head = tag("title", title, id=f"{key}-title")
    return tag(
        "svg", head, *inside, viewBox=f"0 0 {WIDTH} {height}", role="img", class_="chart",
        aria_labelledby=f"{key}-title",
    )  # fmt: skip


def box(height: int = HEIGHT) -> tuple[float, float, float, float]:
    """Return (left, right, bottom, top) of the area of a chart."""
    return float(_LEFT), float(WIDTH - _RIGHT), float(height - _BOTTOM), float(_TOP)


def path_of(points: Iterable[tuple[float, float]]) -> str:
    """Return the commands of a line through points."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def whisker(
    figure: Figure, ends: tuple[float, float], marks: Sequence[tuple[float, str]]
) -> Markup:
    """Return a dot with its interval on a scale of 0 to 100 units, and marks of references.

    It has no text: the numbers stand beside it.
    """
    low, high = ends
    axis = Axis(low, high, 1.5, 98.5)
    parts = [
        tag("line", x1=axis.at(v), x2=axis.at(v), y1=0, y2=20, class_=f"mark {kind}")
        for v, kind in marks
    ]
    if figure.interval is not None:
        start, stop = map(axis.at, figure.interval)
        parts.append(tag("line", x1=start, x2=stop, y1=10, y2=10, class_="whisker"))
        parts += [tag("line", x1=v, x2=v, y1=6, y2=14, class_="whisker") for v in (start, stop)]
    if figure.value is not None:
        place = axis.at(figure.value)
        # A path, since circles would be stretched with the picture.
        parts.append(tag("line", x1=place, x2=place, y1=10, y2=10, class_="dot"))
    return tag(
        "svg", *parts, viewBox="0 0 100 20", preserveAspectRatio="none", class_="whiskers",
        aria_hidden="true", focusable="false",
    )  # fmt: skip


def curve_chart(curve: Curve, key: str) -> Markup:
    """Return the objective against α on a scale on which the optimum can be seen.

    One bad α at the edge would flatten the curve: the axis spans the better part of the values. The
    line leaves the chart where it goes beyond, and triangles at the edge say which way.
    """
    left, right, bottom, top = box()
    known = [(p.scale, p.value) for p in curve.points if p.value is not None and p.scale > 0]
    if not known:
        return Markup("")
    x = scale_axis([p.scale for p in curve.points if p.scale > 0])
    low, high = visible_range([v for _, v in known], curve.maximise)
    y = Axis(low, high, bottom, top)
    name = "scale α" if curve.symbol == "α" else curve.symbol
    lines = [frame(x, y, (name, _label(curve)), number)]
    place = x.at(curve.chosen)
    lines.append(tag("line", x1=place, x2=place, y1=bottom, y2=top, class_="chosen"))
    points = [(x.at(s), y.beyond(v)) for s, v in known]
    lines.append(tag("path", d=clipped_path(points, top, bottom), class_="line main"))
    for scale, value in known:
        if low <= value <= high:
            lines.append(tag("circle", cx=x.at(scale), cy=y.at(value), r=3, class_="point"))
        else:
            tip, foot = (bottom, bottom - 8) if value < low else (top, top + 8)
            at = x.at(scale)
            corners = [(at, tip), (at - 5, foot), (at + 5, foot)]
            title = tag("title", f"{curve.symbol} = {scale:.4g}: {value:.4g}, beyond the axis")
            lines.append(tag("path", title, d=path_of(corners) + "Z", class_="outside"))
    anchor = "end" if place > right - 50 else "start" if place < left + 50 else "middle"
    lines.append(
        tag(
            "text",
            f"{curve.symbol} = {curve.chosen:.3g}",
            x=place,
            y=top - 8,
            class_=f"label strong {anchor}",
        )  # fmt: skip
    )
    return picture(f"{curve.name}: {curve.objective} against {curve.symbol}", *lines, key=key)


def scale_axis(scales: Sequence[float]) -> Axis:
    """Return the axis of α: logarithmic where values differ by more than a factor of five."""
    left, right, _, _ = box()
    low, high = min(scales), max(scales)
    if low == high:
        low, high = low / 2, high * 2
    return Axis(low, high, left, right, logarithmic=high / low > 5)


def clipped_path(points: Sequence[tuple[float, float]], top: float, bottom: float) -> str:
    """Return the commands of a line, without what lies above `top` or below `bottom`."""
    parts: list[str] = []
    for (x1, y1), (x2, y2) in pairwise(points):
        ends = [0.0, 1.0]
        if y1 != y2:
            cuts = sorted(((top - y1) / (y2 - y1), (bottom - y1) / (y2 - y1)))
            ends = [max(0.0, cuts[0]), min(1.0, cuts[1])]
        elif not top <= y1 <= bottom:
            continue
        if ends[0] < ends[1]:
            parts.append(path_of((x1 + f * (x2 - x1), y1 + f * (y2 - y1)) for f in ends))
    return "".join(parts) or "M0 0"


def _label(curve: Curve) -> str:
    return f"objective ({'higher' if curve.maximise else 'lower'} is better)"


def visible_range(values: Sequence[float], maximise: bool) -> tuple[float, float]:
    """Return the ends of an axis that shows where the optimum is.

    From the best value to twice as far as the median is from it, if the worst lies beyond; with a
    twentieth of room.
    """
    ordered = sorted(values, reverse=maximise)  # the best first
    best, worst, median = ordered[0], ordered[-1], ordered[len(ordered) // 2]
    reach = min(abs(worst - best), 2 * abs(median - best)) or abs(worst - best)
    reach = reach or abs(best) * 0.1 or 1.0
    room = reach / 20
    if maximise:
        return best - reach - room, best + room
    return best - room, best + reach + room


def line_chart(
    title: str,
    series: Sequence[tuple[str, Sequence[tuple[float, float]], str]],
    axes: tuple[Axis, Axis],
    labels: tuple[str, str],
    key: str,
) -> Markup:
    """Return lines over common axes; a series is (name, points, classes)."""
    x, y = axes
    parts = [frame(x, y, labels, number)]
    for name, points, kind in series:
        line = [(x.at(a), y.beyond(b)) for a, b in points]
        if len(line) != 1:
            drawn = clipped_path(line, y.stop, y.start)
            parts.append(tag("path", tag("title", name), d=drawn, class_=kind))
        else:
            parts.append(
                tag("circle", tag("title", name), cx=line[0][0], cy=line[0][1], r=3,
                    class_=f"single {kind}")
            )  # fmt: skip
    return picture(title, *parts, key=key)


def axes_of(
    points: Sequence[tuple[float, float]], log_x: bool = False, log_y: bool = False
) -> tuple[Axis, Axis]:
    """Return axes that hold all points."""
    left, right, bottom, top = box()
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = min(ys), max(ys)
    if not log_y:
        room = (high - low or abs(high) or 1) / 20
        low, high = low - room, high + room
    elif low == high:
        low, high = low / 2, high * 2
    first, last = min(xs), max(xs)
    if first == last:
        last = first + 1
    return Axis(first, last, left, right, log_x), Axis(low, high, bottom, top, log_y)


def radar(names: Sequence[str], series: Sequence[tuple[str, Sequence[float]]], key: str) -> Markup:
    """Return shares of the experts over tasks as a star; 1 is the outer ring."""
    middle, radius, height = WIDTH / 2, 105.0, 300
    lowest = min((v for _, values in series for v in values), default=0.0)
    inner = max(0.0, math.floor((lowest - 0.05) * 10) / 10)
    turn = 2 * math.pi / max(1, len(names))

    def at(i: int, share: float) -> tuple[float, float]:
        long = radius * max(0.0, (share - inner) / (1 - inner))
        return middle + long * math.sin(i * turn), height / 2 - long * math.cos(i * turn)

    parts: list[Markup] = []
    for ring in (inner + (1 - inner) * f for f in (0.5, 1.0)):
        ends = [at(i, ring) for i in range(len(names))]
        parts.append(tag("path", d=path_of([*ends, ends[0]]), class_="grid ring"))
        parts.append(tag("text", f"{100 * ring:.0f} %", x=middle + 4, y=at(0, ring)[1] + 12,
                         class_="tick"))  # fmt: skip
    for i, name in enumerate(names):
        x, y = at(i, 1.0)
        parts.append(tag("line", x1=middle, y1=height / 2, x2=x, y2=y, class_="grid"))
        x, y = at(i, 1.0 + 0.1 * (1 - inner))
        side = "middle" if abs(x - middle) < 20 else "start" if x > middle else "end"
        parts.append(tag("text", _cut(name), x=x, y=y + 4, class_=f"tick {side}"))
    for i, (name, values) in enumerate(series):
        ends = [at(j, v) for j, v in enumerate(values)]
        parts.append(tag("path", tag("title", name), d=path_of([*ends, ends[0]]),
                         class_=style_of(i)))  # fmt: skip
    title = f"Share of the expert per task; the centre is {100 * inner:.0f} %, the ring 100 %"
    return picture(title, *parts, key=key, height=height)


def _cut(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"
