"""A method without the statistics that it needs is refused; single tensors fall back, counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import eutectic
from eutectic.errors import MethodError, RecipeError
from eutectic.statistics.statistics_file import StatisticsFile
from eutectic.types import LayerStatistics
from helpers.cli import invoke
from helpers.folders import load, save

NAMES = ("a.weight", "b.weight", "c.weight")


def world(tmp_path: Path) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """Return a recipe's base and experts in files, and their tensors."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        owner: {n: torch.randn(6, 5, generator=g) for n in NAMES} for owner in ("base", "x", "y")
    }
    paths = {owner: str(save(tmp_path / owner, own)) for owner, own in tensors.items()}
    return {"base": paths["base"], "experts": {n: {"path": paths[n]} for n in "xy"}}, tensors


def grams(names: tuple[str, ...], seed: int = 1) -> dict[str, LayerStatistics]:
    g = torch.Generator().manual_seed(seed)
    rows = {n: torch.randn(40, 5, generator=g) for n in names}
    return {n: LayerStatistics(gram=x.T @ x, count=40) for n, x in rows.items()}


def with_statistics(recipe: dict[str, Any], tmp_path: Path, **held: tuple[str, ...]) -> None:
    for seed, (owner, names) in enumerate(held.items()):
        own = grams(names, seed)
        layer = {"count": 40, "sample_count": 40, "shape": [1, 5], "parameter": [6, 5]}
        record = {
            "format": 1,
            "data": {"rows": 40},
            "checkpoint": {"fingerprint": "unknown"},
            "settings": {},
            "layers": {n: {**layer, "inputs": n, "same_as": n} for n in own},
        }
        tensors = {f"{n}/gram": entry.gram for n, entry in own.items() if entry.gram is not None}
        StatisticsFile(record, tensors).save(tmp_path / f"{owner}.stats")
        recipe["experts"][owner]["statistics"] = str(tmp_path / f"{owner}.stats")


@pytest.mark.parametrize(
    "method", ["iso_a", "esm", "regmean", "fisher", "mats", "started by iso_a"]
)
@pytest.mark.parametrize("held", [{}, {"x": NAMES}])
def test_none_or_not_of_every_expert_is_refused_by_all_three(
    method: str, held: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    recipe, tensors = world(tmp_path)
    recipe["method"] = method
    if method == "started by iso_a":  # what an initial guess needs counts as needed
        recipe |= {"method": "mats", "parameters": {"operator": "identity", "init": "iso_a"}}
    with_statistics(recipe, tmp_path, **held)
    culprit = "y has none" if held and method != "fisher" else "no expert has any"
    with pytest.raises(RecipeError, match=culprit) as refused:
        eutectic.merge(recipe, output=tmp_path / "out")
    assert [fault.kind for fault in refused.value.faults] == ["statistics_needed"]
    assert "fallback: allow" in str(refused.value) and "eutectic collect" in str(refused.value)
    assert not (tmp_path / "out").exists()

    experts = {n: tensors[n] for n in "xy"}
    given = {n: grams(names) for n, names in held.items()}
    options: dict[str, Any] = dict(recipe.get("parameters", {}))
    with pytest.raises(RecipeError, match=culprit):
        eutectic.merge_state_dicts(
            tensors["base"], experts, method=recipe["method"], statistics=given, **options
        )
    deltas = torch.stack([e["a.weight"] - tensors["base"]["a.weight"] for e in experts.values()])
    single = [given.get(n, {}).get("a.weight") for n in "xy"] if held else None
    with pytest.raises(MethodError, match="fallback='allow'"):
        eutectic.merge_matrices(recipe["method"], deltas, statistics=single, **options)


def test_allowed_fall_backs_are_named_where_the_merge_is_told(tmp_path: Path) -> None:
    recipe, tensors = world(tmp_path)
    words = ["merge", "--base", recipe["base"], "-m", "iso_a", "--fallback", "allow"]
    words += [f"{n}={recipe['experts'][n]['path']}" for n in "xy"]
    shown = invoke(*words, "-o", tmp_path / "out")
    assert shown.code == 0 and "iso_c (iso_a merges 0 % of what it is for)" in shown.out
    assert "warning: without statistics, merged by iso_c" in shown.err
    told = json.loads(invoke(*words, "-o", tmp_path / "json", "--json").out)
    whole = {"asked": "iso_a", "method": "iso_c", "tensors": 3, "of": 3, "share": 1.0}
    assert told["fallback"] == whole and told["mostly_by"] == "iso_c"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "by `iso_c` (asked for: `iso_a`, which merges 0 % of what it is for)" in card
    plain = eutectic.merge_state_dicts(
        tensors["base"], {n: tensors[n] for n in "xy"}, method="iso_c", scale=1.3
    )
    for name in NAMES:
        assert torch.equal(load(tmp_path / "out")[name], plain[name])


def test_single_tensors_without_fall_back_and_are_counted(tmp_path: Path) -> None:
    recipe, _ = world(tmp_path)
    with_statistics(recipe, tmp_path, x=NAMES, y=NAMES[:2])
    report = eutectic.merge({**recipe, "method": "iso_a"}, output=tmp_path / "out")
    assert report.merged_by == {"iso_a": 2, "iso_c": 1} and report.mostly_by == "iso_a"
    assert report.fallback["tensors"] == 1 and report.fallback["share"] == pytest.approx(1 / 3)
    (note,) = (n for n in report.note_records if n.kind == "fallback")
    assert note.level == "note"
    assert "c.weight (1 of 3 tensors that iso_a is for, 33 % of their numbers)" in note.text
    card = (tmp_path / "out" / "README.md").read_text()
    assert "experts by `iso_a` with scale" in card and "1 of 3 tensors" in card


def test_most_numbers_name_the_merge_and_warn(tmp_path: Path) -> None:
    recipe, _ = world(tmp_path)
    with_statistics(recipe, tmp_path, x=NAMES[:1], y=NAMES)
    report = eutectic.merge({**recipe, "method": "esm"}, output=tmp_path / "out")
    assert report.mostly_by == "tsv_m"
    (note,) = (n for n in report.note_records if n.kind == "fallback")
    assert note.level == "warning" and "67 % of their numbers" in note.text
    card = (tmp_path / "out" / "README.md").read_text()
    assert "by `tsv_m` (asked for: `esm`, which merges 33 % of what it is for)" in card


def test_experts_whose_statistics_never_meet_are_refused(tmp_path: Path) -> None:
    recipe, _ = world(tmp_path)
    with_statistics(recipe, tmp_path, x=NAMES[:1], y=NAMES[1:])
    with pytest.raises(RecipeError, match="no tensor has them of all experts"):
        eutectic.merge({**recipe, "method": "iso_a"}, output=tmp_path / "out")


def test_an_expert_of_weight_zero_needs_none_where_it_does_not_count(tmp_path: Path) -> None:
    recipe, tensors = world(tmp_path)
    with_statistics(recipe, tmp_path, x=NAMES)
    recipe["experts"]["y"]["weight"] = 0.0
    eutectic.merge({**recipe, "method": "regmean"}, output=tmp_path / "out")
    torch.testing.assert_close(load(tmp_path / "out")["b.weight"], tensors["x"]["b.weight"])
    with pytest.raises(RecipeError, match="y has none"):  # its C_t = I would enter the mean
        eutectic.merge({**recipe, "method": "iso_a"}, output=tmp_path / "other")


def test_statistics_without_the_sums_say_what_to_collect(tmp_path: Path) -> None:
    recipe, _ = world(tmp_path)
    with_statistics(recipe, tmp_path, x=NAMES, y=NAMES)
    recipe |= {"method": "mats", "parameters": {"operator": "kfac"}}
    with pytest.raises(RecipeError, match="hold no output_gradient_gram: collect .*--output-grad"):
        eutectic.merge(recipe, output=tmp_path / "out")


def test_a_matrix_falls_back_on_the_method_that_the_record_names() -> None:
    deltas = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    merged = eutectic.merge_matrices("iso_a", deltas, fallback="allow", full_output=True)
    assert torch.equal(merged.delta, eutectic.merge_matrices("iso_c", deltas))
    assert merged.record["rest"] == "iso_c"
    with pytest.raises(MethodError, match="fallback must be"):
        eutectic.merge_matrices("iso_a", deltas, fallback="maybe")
