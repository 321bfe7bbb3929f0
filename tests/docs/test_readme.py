"""The README is short, links every guide, and its figures are those of the results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
SUITES = ("text-hard-8-label-free", "text-hard-14", "text-hard-20", "text-kind-8")
ROWS = {
    "base": "base",
    "average": "average",
    "task arithmetic": "task_arithmetic",
    "TIES": "ties",
    "RegMean †": "regmean",
    "TSV-M": "tsv_m",
    "Iso-C": "iso_c",
    "Iso-CTS": "iso_cts",
    "Iso-A †": "iso_a",
    "routed Iso-A, rank 32 †": "routed-iso_a-32-discriminant",
}


def test_its_length_and_links() -> None:
    assert README.count("\n") <= 150
    linked = set(re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", README))
    assert not [path for path in linked if not (ROOT / path).exists()]
    guides = {f"docs/guides/{p.name}" for p in (ROOT / "docs" / "guides").glob("*.md")}
    assert guides <= linked


def test_its_table_is_that_of_the_results() -> None:
    text = README.partition("## How good")[2].partition("\n## ")[0]
    lines = [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if "|" in line]
    rows = {cells[0]: cells[1:] for cells in lines[1:] if not cells[0].startswith("-")}
    assert rows.keys() == ROWS.keys() and len(rows) <= 10
    for place, suite in enumerate(SUITES):
        found = json.loads((ROOT / "benchmarks" / "results" / f"{suite}.json").read_text("utf-8"))
        entries = {entry["row"]: entry for entry in found["entries"]}
        for name, row in ROWS.items():
            entry = entries[row]
            value, _, error = rows[name][place].partition(" ± ")
            assert value == f"{entry['normalised']:.1f}", (suite, name)
            if error:
                assert error == f"{entry['deviation']:.1f}", (suite, name)
            else:
                assert (entry.get("samples") or 1) == 1, (suite, name)


def test_the_citation() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert cited["cff-version"] == "1.2.0" and cited["license"] == "Apache-2.0"
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    assert version is not None and cited["version"] == version[1]


def test_the_picture_is_that_of_the_results() -> None:
    picture = (ROOT / "docs" / "images" / "result.svg").read_text("utf-8")
    text = (ROOT / "benchmarks" / "results" / "text-hard-14.json").read_text("utf-8")
    entries = {entry["row"]: entry for entry in json.loads(text)["entries"]}
    for name, row in (("Iso-A", "iso_a"), ("Iso-CTS", "iso_cts"), ("average", "average")):
        assert f"{name} {entries[row]['normalised']:.1f}" in picture
