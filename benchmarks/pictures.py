"""Draw the picture of the front page, `docs/images/result.svg`, from results that are kept here.

    python benchmarks/pictures.py

The bars are shares of the experts' accuracy, mean over the fourteen hard text tasks; the lines are
plus and minus one standard error, from the choice of test texts (0.5, see results/README.md).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "text-hard-14.json"
PICTURE = ROOT / "docs" / "images" / "result.svg"
ERROR = 0.5
NOTHING, TEXTS, ROUTED = "needs no data", "reads unlabelled texts", "keeps thin experts beside"
COLOURS = {NOTHING: "#0072b2", TEXTS: "#e69f00", ROUTED: "#009e73"}
ROWS = {
    "average": ("average", NOTHING),
    "task_arithmetic": ("task arithmetic", NOTHING),
    "ties": ("TIES", NOTHING),
    "regmean": ("RegMean", TEXTS),
    "tsv_m": ("TSV-M", NOTHING),
    "iso_c": ("Iso-C", NOTHING),
    "iso_cts": ("Iso-CTS", NOTHING),
    "iso_a": ("Iso-A", TEXTS),
    "routed-iso_a-32-discriminant": ("routed Iso-A", ROUTED),
}
LEFT, WIDTH, ROW, TOP = 130, 470, 26, 66
LOW, HIGH = 91.0, 100.5


def main() -> None:
    """Write the picture."""
    entries = {e["row"]: e for e in json.loads(RESULTS.read_text("utf-8"))["entries"]}
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(drawn({row: entries[row]["normalised"] for row in ("base", *ROWS)}), "utf-8")
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1e3:.1f} kB")


def drawn(shares: dict[str, float]) -> str:
    """Return the picture: a bar per method, the base and the experts as lines."""
    bottom = TOP + ROW * len(ROWS)
    parts = [
        _text(
            10, 22, "One model for fourteen tasks: what is kept of the experts", size=15, bold=True
        ),
        _text(
            10,
            40,
            "% of the experts' accuracy, mean over tasks ± one standard error; bars from 91",
        ),
    ]
    for name, value, anchor in (("base", shares["base"], "end"), ("experts", 100.0, "middle")):
        x = _x(value)
        parts.append(f'<path d="M{x:.1f} {TOP - 6}V{bottom}" class="line"/>')
        parts.append(
            _text(x - 3 * (anchor == "end"), TOP - 9, f"{name} {value:.1f}", anchor=anchor)
        )
    for place, (row, (name, kind)) in enumerate(ROWS.items()):
        value, y = shares[row], TOP + ROW * place
        middle = y + ROW / 2
        parts += [
            _text(LEFT - 8, middle + 4, name, anchor="end"),
            f'<rect x="{LEFT}" y="{y + 4}" width="{_x(value) - LEFT:.1f}" height="{ROW - 8}"'
            f' fill="{COLOURS[kind]}"/>',
            f'<path d="M{_x(value - ERROR):.1f} {middle}H{_x(value + ERROR):.1f}" class="error"/>',
            _text(_x(value + ERROR) + 6, middle + 4, f"{value:.1f}"),
        ]
    for place, (kind, colour) in enumerate(COLOURS.items()):
        x = LEFT + 165 * place
        parts.append(f'<rect x="{x}" y="{bottom + 12}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(x + 17, bottom + 22, kind))
    width, height = LEFT + WIDTH + 40, bottom + 34
    style = (
        "text{font-family:system-ui,sans-serif;fill:#222}.line{stroke:#666;stroke-dasharray:4 3}"
        ".error{stroke:#222;stroke-width:1.5}svg{background:#fff}"
    )
    said = "; ".join(f"{name} {shares[row]:.1f}" for row, (name, _) in ROWS.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' height="{height}" role="img"><title>Share of the experts in percent: {said}</title>'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _x(value: float) -> float:
    return LEFT + WIDTH * (value - LOW) / (HIGH - LOW)


def _text(x: float, y: float, said: str, **how: Any) -> str:
    size, anchor = how.get("size", 12), how.get("anchor", "start")
    weight = ' font-weight="bold"' if how.get("bold") else ""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}"{weight}>{said}</text>'


if __name__ == "__main__":
    main()
