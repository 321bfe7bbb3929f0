"""The README is short, links every guide, and its figures are those of the results."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
CLAIMS = ROOT / "benchmarks" / "claims.py"


def test_its_length_and_links() -> None:
    assert README.count("\n") <= 150
    linked = set(re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", README))
    assert not [path for path in linked if not (ROOT / path).exists()]
    guides = {f"docs/guides/{p.name}" for p in (ROOT / "docs" / "guides").glob("*.md")}
    assert guides <= linked


@pytest.fixture(scope="module")
def claims() -> Any:
    spec = importlib.util.spec_from_file_location("claims", CLAIMS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["claims"] = module
    spec.loader.exec_module(module)
    return module


def test_its_table_is_that_of_the_results(claims: Any) -> None:
    assert claims.START in README
    assert (
        README.partition(claims.START)[2].partition(claims.END)[0].strip() == claims.table().strip()
    )


def test_a_line_takes_the_best_published_row_and_its_paired_error(claims: Any) -> None:
    entries = {e["row"]: e["normalised"] for e in claims.read("text-hard-14")["entries"]}
    paired = claims.differences("text-hard-14", {})["iso_a"]["iso_cts"]
    cells = claims.line(claims.Claim("x", "text-hard-14"))
    published = [entries[r] for r in ("regmean", "tsv_m", "iso_c", "iso_cts", "esm_vit")]
    assert cells[2] == f"{max(published):.1f} Iso-CTS"
    assert cells[3] == f"{entries['iso_a']:.1f} ({paired[0]:+.1f} ± {paired[1]:.1f})"
    # Answers that were not kept: the same pair's error on fourteen tasks of 500 texts, scaled.
    starred = claims.line(claims.Claim("x", "text-hard-20", 20 * 500))[3]
    assert starred.endswith(f"± {paired[1] * (14 / 20) ** 0.5:.1f}*)")


def test_rows_have_names_and_convolutions_are_a_row_of_their_method(claims: Any) -> None:
    names = {row: claims.name_of(row) for row in ("lot_convolutions", "esm_vit", "knots_ties")}
    assert names == {"lot_convolutions": "LOT", "esm_vit": "ESM", "knots_ties": "knots_ties"}
    found = {e["row"]: e["normalised"] for e in claims.read("emoji-hard-8")["entries"]}
    cells = claims.line(claims.Claim("x", "emoji-hard-8"))
    best = max(v for row, v in found.items() if row.endswith("_convolutions") and "iso_a" not in row
               and "iso_regmean" not in row)  # fmt: skip
    assert cells[2] == f"{best:.1f} LOT"
    for cell, row in ((cells[3], "iso_a_convolutions"), (cells[4], "iso_regmean_convolutions")):
        assert cell.startswith(f"{found[row]:.1f} (+")
    assert cells[5:] == ["", ""]


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
