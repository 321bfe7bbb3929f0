"""Two experts in every proportion.

Guards: the ends are the experts; a sweep goes on where it was left, and takes nothing for its own
that was made of other inputs or by another recipe; no two λ share a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eutectic.errors import RequestError
from eutectic.execution.run import mixture_name, sweep
from helpers.cli import invoke
from helpers.folders import digests, load, make_base, make_expert, save
from helpers.merging import save_inputs

BASE = make_base()
EXPERTS = {"wanted": make_expert(BASE, 1), "helper": make_expert(BASE, 2)}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Any]:
    return {**save_inputs(tmp_path, BASE, EXPERTS), "method": "average"}


def test_the_ends_are_the_experts(tmp_path: Path, inputs: dict[str, Any]) -> None:
    reports = sweep(**inputs, output=tmp_path / "out", mixtures=[0, 0.25, 1])
    assert {value: report.output for value, report in reports.items()} == {
        value: tmp_path / "out" / name for value, name in [(0, "0"), (0.25, "0.25"), (1, "1")]
    }
    merged = {value: load(report.output) for value, report in reports.items()}
    for name, ours in EXPERTS["wanted"].items():
        theirs = EXPERTS["helper"][name]
        torch.testing.assert_close(merged[1][name], ours)
        torch.testing.assert_close(merged[0][name], theirs)
        if ours.is_floating_point():
            torch.testing.assert_close(merged[0.25][name], 0.25 * ours + 0.75 * theirs)


def test_what_is_finished_stays(tmp_path: Path, inputs: dict[str, Any]) -> None:
    assert list(sweep(**inputs, output=tmp_path / "out", mixtures=[0.5])) == [0.5]
    before = digests(tmp_path / "out" / "0.5")
    assert list(sweep(**inputs, output=tmp_path / "out", mixtures=[0.25, 0.5, 0.75])) == [
        0.25,
        0.75,
    ]
    assert digests(tmp_path / "out" / "0.5") == before


def other_expert(tmp_path: Path, inputs: dict[str, Any]) -> None:
    save(tmp_path / "wanted", make_expert(BASE, 3))


def another_path(tmp_path: Path, inputs: dict[str, Any]) -> None:
    path = save(tmp_path / "elsewhere" / "wanted", make_expert(BASE, 3))
    inputs["experts"] = {**inputs["experts"], "wanted": path}


def other_base(tmp_path: Path, inputs: dict[str, Any]) -> None:
    save(tmp_path / "base", make_base(4))


def other_dtype(tmp_path: Path, inputs: dict[str, Any]) -> None:
    inputs["dtype"] = "bfloat16"


def other_rules(tmp_path: Path, inputs: dict[str, Any]) -> None:
    inputs["tensors"] = [{"match": "*norm*", "treatment": "copy"}]


@pytest.mark.parametrize(
    "change", [other_expert, another_path, other_base, other_dtype, other_rules]
)
def test_what_another_request_made_is_refused(
    change: Any, tmp_path: Path, inputs: dict[str, Any]
) -> None:
    sweep(**inputs, output=tmp_path / "out", mixtures=[0.5])
    before = digests(tmp_path / "out")
    change(tmp_path, inputs)
    with pytest.raises(RequestError, match="another request"):
        sweep(**inputs, output=tmp_path / "out", mixtures=[0.5])
    assert digests(tmp_path / "out") == before


def test_close_values_have_folders_of_their_own(tmp_path: Path, inputs: dict[str, Any]) -> None:
    close = [0.5, 0.5001, 0.5002, 0.50020000001]
    assert list(sweep(**inputs, output=tmp_path / "out", mixtures=close)) == close
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "0.5", "0.5001", "0.5002", "0.50020000001",
    ]  # fmt: skip


@pytest.mark.parametrize("value", [0, 1, 0.1, 0.1 + 0.2, 1 / 3, 1e-7, 0.123456])
def test_the_name_of_a_folder_reads_as_its_value(value: float) -> None:
    assert float(mixture_name(value)) == value


def test_a_recipe_beside_its_files_may_start_from_a_checkpoint(
    tmp_path: Path, inputs: dict[str, Any]
) -> None:
    save(tmp_path / "start", make_expert(BASE, 5))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "base: ./base\nexperts: {wanted: ./wanted, helper: ./helper}\nmethod: mats\n"
        "parameters: {operator: task_gram, init: ./start, iterations: 0}\nscale: 1.0\n"
    )
    reports = sweep(recipe, output=tmp_path / "out", mixtures=[0.5])
    start, merged = load(tmp_path / "start"), load(reports[0.5].output)
    for name in (n for n in BASE if n.endswith("proj.weight")):
        torch.testing.assert_close(merged[name], start[name])
    assert sweep(recipe, output=tmp_path / "out", mixtures=[0.5]) == {}


@pytest.mark.parametrize("mixtures", [[], [1.5], [float("nan")]])
def test_values_outside_are_refused(
    mixtures: list[float], tmp_path: Path, inputs: dict[str, Any]
) -> None:
    with pytest.raises(RequestError, match="from 0 to 1"):
        sweep(**inputs, output=tmp_path / "out", mixtures=mixtures)


def test_a_single_expert_cannot_be_mixed(tmp_path: Path, inputs: dict[str, Any]) -> None:
    inputs["experts"] = {"wanted": inputs["experts"]["wanted"]}
    with pytest.raises(RequestError, match="exactly two experts, got 1"):
        sweep(**inputs, output=tmp_path / "out", mixtures=[0.5])


def test_the_command_names_the_folders(tmp_path: Path, inputs: dict[str, Any]) -> None:
    experts = [f"{name}={path}" for name, path in inputs["experts"].items()]
    words = ["merge", "--base", inputs["base"], "-m", "average", "-o", tmp_path / "out", *experts]
    first = invoke(*words, "--sweep", "0.5,0.5001")
    assert first.code == 0, first.err
    for name in ("0.5", "0.5001"):
        assert f"λ = {name}" in first.out
        assert f"{tmp_path / 'out' / name} " in first.out
    again = invoke(*words, "--sweep", "0.5")
    assert "was finished" in again.out
