"""The README's table: on every suite the best of each kind of method, from the committed results.

    python benchmarks/claims.py            # prints the table
    python benchmarks/claims.py --write    # puts it into the README, between its two marks

Ours are three rows fixed beforehand, Iso-A, Iso-RegMean at its default spectrum, and Iso-A routed
by discriminants at rank 32; the published ones are whichever row is best on the test itself, which
favours them. On emoji all methods on matrices take convolutions as matrices. A difference has the
standard error over paired test examples, where the answers of both rows were kept; else, with a
star, that of the same two rows on a like suite, scaled by the numbers of examples. Static rows are
held against the best published static row, routed Iso-A against the best published row of all.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- benchmarks/claims.py --write -->\n", "<!-- end -->\n"

AVERAGES = ("average", "task_arithmetic", "ties", "dare", "fisher", "consensus", "pcb")
PUBLISHED = re.compile(
    r"(regmean|regmean_core|regmean_whole|tsv_m|iso_c|iso_cts|esm_\w+|mats_\w+|knots_\w+|core_\w+"
    r"|wudi|lot|dc_merge)(_convolutions)?$"
)
CUT = re.compile(r".*_(after|before|inputs)_\d+$")  # to a rank: not the method at its best
PUBLISHED_ROUTED = re.compile(r"routed-esm_\w+-\d+-prototype$")
ISO_A = ("iso_a", "iso_a_core", "iso_a_convolutions")
ISO_REGMEAN = ("iso_regmean", "iso_regmean_core", "iso_regmean_convolutions")
ROUTED = "routed-iso_a-32-discriminant"
NAMES = {
    "average": "average",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "dare": "DARE",
    "fisher": "Fisher",
    "regmean": "RegMean",
    "tsv_m": "TSV-M",
    "iso_c": "Iso-C",
    "iso_cts": "Iso-CTS",
    "esm": "ESM",
    "mats": "MaTS",
    "lot": "LOT",
    "wudi": "WUDI",
    "dc_merge": "DC-Merge",
    "consensus": "Consensus",
    "pcb": "PCB",
    "routed-esm": "ESM++",
}


@dataclass(frozen=True)
class Claim:
    """One line of the table.

    Attributes:
        label: what was merged.
        results: name of the file of results.
        examples: how many test examples it has, where the file does not say.
        like: the suite whose paired errors stand for those that were not kept.
    """

    label: str
    results: str
    examples: int = 0
    like: str = "text-hard-14"


CLAIMS = (
    Claim("8 texts, hard", "text-hard-8-label-free", 8 * 500),
    Claim("the same, trained in bfloat16", "text-hard-8", 8 * 1000),
    Claim("8 texts, hard, trained once more", "text-hard-8-iso-regmean"),
    Claim("14 texts, hard", "text-hard-14"),
    Claim("20 texts, hard", "text-hard-20", 20 * 500),
    Claim("8 texts, hard, second seed", "text-hard-seed-1-8"),
    Claim("4 new texts, hard (confirmation)", "text-hard-confirmation"),
    Claim("8 texts, kind", "text-kind-8", 8 * 500),
    Claim("14 texts, kind", "text-kind-14", 14 * 500),
    Claim("8 texts, LoRA", "text-lora-8-core"),
    Claim("8 texts, LoRA of ranks 4 to 64", "text-lora-unequal-8"),
    Claim("8 glyph sets", "glyphs-hard-8-label-free", like="glyphs-hard-13"),
    Claim("13 glyph sets", "glyphs-hard-13"),
    Claim("8 emoji sets, EfficientNet-lite0", "emoji-hard-8"),
    Claim("8 texts, MPNet, hard", "mpnet-hard-8"),
    Claim("14 texts, MPNet, hard", "mpnet-hard-14"),
    Claim("8 texts, Gemma 3 270M, hard", "gemma-hard-8"),
    Claim("8 texts, Gemma 3 270M, LoRA", "gemma-lora-8"),
    Claim("4 texts, Gemma 3 270M, kind", "gemma-kind-4"),
)


def read(name: str) -> dict[str, Any]:
    """Return a file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def examples(document: dict[str, Any], claim: Claim | None = None) -> int:
    """Return how many test examples a suite has."""
    settings = document.get("settings")
    return sum(settings["test_examples"].values()) if settings else claim.examples if claim else 0


def differences(name: str, document: dict[str, Any]) -> dict[str, Any]:
    """Return row -> other row -> [difference, standard error], of what was kept."""
    beside = RESULTS / f"{name}-differences.json"
    if beside.is_file():
        return json.loads(beside.read_text("utf-8"))
    return document.get("differences", {})


def error_of(one: str, other: str, claim: Claim, document: dict[str, Any]) -> tuple[float, bool]:
    """Return the standard error of a difference, and whether it is of these very answers."""
    own = differences(claim.results, document)
    if other in own.get(one, {}):
        return own[one][other][1], True
    like = read(claim.like)
    error = differences(claim.like, like)[one][other][1]
    return error * (examples(like) / examples(document, claim)) ** 0.5, False


def name_of(row: str) -> str:
    """Return what a row is called."""
    stem = row
    while stem and stem not in NAMES:
        stem = stem[: max(stem.rfind("_"), stem.rfind("-"), 0)]
    return NAMES.get(stem, row)


def line(claim: Claim) -> list[str]:
    """Return the cells of one line; empty ones where nothing of a kind was measured."""
    document = read(claim.results)
    shares = {entry["row"]: entry["normalised"] for entry in document["entries"]}
    kinds = (
        [row for row in shares if row in AVERAGES],
        [row for row in shares if PUBLISHED.match(row) and not CUT.match(row)],
        [row for row in shares if PUBLISHED_ROUTED.match(row)],
    )
    average, static, routed = (max(rows, key=shares.__getitem__, default="") for rows in kinds)

    def published(row: str) -> str:
        return f"{shares[row]:.1f} {name_of(row)}" if row else ""

    def ours(row: str, other: str) -> str:
        if row not in shares:
            return ""
        share = f"{shares[row]:.1f}"
        if not other:
            return share
        error, kept = error_of(row, other, claim, document)
        gap = f"{shares[row] - shares[other]:+.1f}".replace("-", "−").replace("+0.0", "0.0")
        return f"{share} ({gap} ± {error:.1f}{'' if kept else '*'})"

    return [
        claim.label,
        published(average),
        published(static),
        *(ours(next(filter(shares.__contains__, own), ""), static) for own in (ISO_A, ISO_REGMEAN)),
        published(routed),
        ours(ROUTED, max(filter(None, (static, routed)), key=shares.__getitem__, default="")),
    ]


def table() -> str:
    """Return the table of all suites whose results are there."""
    head = (
        "experts",
        "best average",
        "best published static",
        "Iso-A (ours)",
        "Iso-RegMean (ours)",
        "best published routed",
        "routed Iso-A (ours)",
    )
    lines = [head, ("---",) * len(head)]
    lines += [line(claim) for claim in CLAIMS if (RESULTS / f"{claim.results}.json").is_file()]
    return "".join(f"| {' | '.join(cell or ' ' for cell in cells)} |\n" for cells in lines)


def main() -> None:
    """Print the table, or put it into the README."""
    parser = argparse.ArgumentParser(description="Make the README's table of results.")
    parser.add_argument("--write", action="store_true", help="into the README, between its marks")
    if not parser.parse_args().write:
        print(table(), end="")
        return
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text("utf-8").partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(before + START + "\n" + table() + "\n" + END + after, "utf-8")


if __name__ == "__main__":
    main()
