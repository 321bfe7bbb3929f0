"""What a merge warns of, in memory as in files: strangers, a wrong base, fall-backs, explosions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import eutectic
from eutectic.errors import MergeWarning, RequestError
from eutectic.execution.norms import norm_notes
from eutectic.types import LayerStatistics
from helpers.cli import invoke
from helpers.folders import Tensors, make_base, make_expert
from helpers.merging import merge_files, save_inputs

BASE = make_base(width=32)
KIN = {name: make_expert(BASE, seed) for seed, name in enumerate("abc", 1)}
OTHER = make_base(9, width=32)
STRANGER = {n: w if "norm" in n else OTHER[n] for n, w in BASE.items()}


def warned(base: Tensors, experts: dict[str, Tensors], **options: Any) -> dict[str, Any]:
    """Return kind -> note of the warnings of a merge in memory."""
    with pytest.warns(MergeWarning) as caught:
        eutectic.merge_state_dicts(base, experts, **{"method": "task_arithmetic", **options})
    return {w.message.note.kind: w.message.note for w in caught if hasattr(w.message, "note")}


@pytest.mark.parametrize("size", [1.0, 0.3])
def test_a_stranger_is_told_by_the_cosine_of_its_weights(size: float, tmp_path: Path) -> None:
    """Of whatever norm: a small one is not far from the base, and no kin all the same."""
    stranger = {n: size * w if w.is_floating_point() else w for n, w in STRANGER.items()}
    experts = {**KIN, "x": stranger}
    found = warned(BASE, experts)
    note = found["no_kin"]
    ours = torch.cat([w.flatten() for n, w in BASE.items() if n.endswith("proj.weight")])
    own = torch.cat([w.flatten() for n, w in stranger.items() if n.endswith("proj.weight")])
    expected = torch.nn.functional.cosine_similarity(ours, own, dim=0)
    assert note.subject == ("x",) and note.level == "warning"
    assert note.numbers["cosine"] == pytest.approx(float(expected), abs=0.1)
    assert note.numbers["kin"] > 0.98
    assert "unrelated" not in found  # told once
    _, report = merge_files(tmp_path, BASE, experts, method="task_arithmetic")
    told = [n for n in report.note_records if n.kind == "no_kin"]
    assert len(told) == 1 and "no kin of the base" in told[0].text
    # Hard training from little does the same to weights, so that no cause is claimed.
    assert "Either it was fine-tuned from another model" in told[0].text
    assert not [n for n in report.note_records if n.kind == "unrelated"]


def test_kin_are_not_warned_of(tmp_path: Path) -> None:
    _, report = merge_files(tmp_path, BASE, KIN, method="average")
    assert not [n for n in report.note_records if n.level == "warning"]
    # Nor after as much training as doubles the weights.
    strong = {name: make_expert(BASE, seed, 1.0) for seed, name in enumerate("abc", 1)}
    with pytest.warns(MergeWarning) as caught:
        eutectic.merge_state_dicts(BASE, strong, method="average")
        eutectic.merge_state_dicts(BASE, {"x": STRANGER}, method="average")
    kinds = [(w.message.note.kind, w.message.note.subject) for w in caught]
    assert [subject for kind, subject in kinds if kind == "no_kin"] == [("x",)]


def test_experts_of_another_base_are_told_by_their_common_change(tmp_path: Path) -> None:
    other = make_expert(BASE, 7, 0.5)
    experts = {name: make_expert(other, seed, 0.05) for seed, name in enumerate("abc", 1)}
    found = warned(BASE, experts)
    assert found["changes_alike"].subject == ("a", "b", "c")
    assert found["changes_alike"].numbers["cosine"] == pytest.approx(0.99, abs=0.01)
    assert "changes_alike" not in warned(other, {**experts, "x": STRANGER})
    inputs = save_inputs(tmp_path, BASE, experts)
    words = [f"{name}={path}" for name, path in inputs["experts"].items()]
    planned = invoke("plan", "--base", inputs["base"], "-m", "iso_c", *words)
    assert "fine-tuned from another model than this base" in planned.out + planned.err


def test_the_same_expert_twice_is_no_other_base() -> None:
    found = warned(BASE, {"a": KIN["a"], "b": dict(KIN["a"])})
    assert "same_expert" in found and "changes_alike" not in found


def test_a_merge_that_explodes(tmp_path: Path) -> None:
    found = warned(BASE, KIN, scale=9.0)
    assert {"exploded", "scale_far_out"} <= found.keys()
    _, report = merge_files(tmp_path, BASE, KIN, method="task_arithmetic", scale=9.0)
    told = next(n for n in report.note_records if n.kind == "exploded")
    assert found["exploded"].numbers == told.numbers


def grams(names: list[str]) -> dict[str, LayerStatistics]:
    return {n: LayerStatistics(gram=torch.eye(BASE[n].shape[1]), count=4) for n in names}


MATRICES = [n for n in BASE if n.endswith("proj.weight")]


@pytest.mark.parametrize("method", ["iso_a", "esm", "regmean", "mats"])
def test_one_rule_for_statistics_in_all_three_entries(method: str, tmp_path: Path) -> None:
    """None at all, or not of every expert: refused. Single layers without are counted and told."""
    deltas = torch.stack([KIN[n][MATRICES[0]] - BASE[MATRICES[0]] for n in "ab"])
    two = {n: KIN[n] for n in "ab"}
    inputs = save_inputs(tmp_path, BASE, two)
    for given in ({}, {"a": grams(MATRICES)}):
        layer = [given[n][MATRICES[0]] if n in given else None for n in "ab"]
        with pytest.raises(RequestError, match="needs statistics"):
            eutectic.merge_matrices(method, deltas, base=BASE[MATRICES[0]], statistics=layer)
        with pytest.raises(RequestError, match="needs statistics"):
            eutectic.merge_state_dicts(BASE, two, method=method, statistics=given)
    with pytest.raises(RequestError, match="needs statistics"):
        eutectic.merge(**inputs, method=method, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    allowed = eutectic.merge_matrices(
        method, deltas, base=BASE[MATRICES[0]], fallback="allow", full_output=True
    )
    assert "rest" in allowed.record
    found = warned(BASE, two, method=method, fallback="allow")
    kind = "own_fallback" if method in ("regmean", "mats") else "fallback"
    assert found[kind].level == "warning" and found[kind].numbers["share"] == 1
    # One layer of two: the rule for single layers, counted, and no warning of the whole.
    some = {n: grams(MATRICES[:1]) for n in "ab"}
    found = warned(BASE, two, method=method, statistics=some)
    assert MATRICES[1] in found[kind].subject and MATRICES[0] not in found[kind].subject
    if kind == "fallback":  # the others have a rule of their own for vectors, counted too
        assert found[kind].subject == (MATRICES[1],)
        assert (found[kind].numbers["tensors"], found[kind].numbers["of"]) == (1, 2)
        assert found[kind].numbers["share"] == pytest.approx(0.5)


def test_a_far_expert_is_told_by_what_is_unusual_alone() -> None:
    """A norm that is like the others' is no sign of a stranger, and is not named as one."""
    norms = {"base": 1.0, "experts": {"a": 2.0, "b": 2.5, "c": 0.1}, "above": 0, "ratio": None}
    told = {n.subject[0]: n for n in norm_notes(norms) if n.kind == "unrelated"}
    assert set(told) == {"a", "b"}
    assert told["a"].numbers == {"share": 2.0, "kin": None}
    assert "by 2 times the base's own norm: was" in told["a"].text
