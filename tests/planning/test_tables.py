"""Tables and convolutions under methods that weigh entry by entry: by their diagonal Fisher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eutectic
from helpers.folders import load, save
from helpers.models import perturb

IDS = torch.tensor([[1, 2, 3, 4], [3, 5, 1, 1], [2, 2, 4, 5]])  # rows 0 and 6 are never seen
TABLE, KERNEL = "embed.weight", "conv.weight"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv, self.head = nn.Embedding(7, 4), nn.Conv1d(4, 5, 2), nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.conv(self.embed(ids).mT).mean(2))


def world(**settings: Any) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    models = {"a": perturb(Net(), 1, 0.1), "b": perturb(Net(), 2, 0.1)}
    asked = {"fisher": True, "objective": lambda outputs, _: -outputs.square().sum(1)} | settings
    statistics = {
        n: eutectic.collect(m, [IDS + (n == "b")], unmatched="all", **asked)
        for n, m in models.items()
    }
    return Net().state_dict(), {n: m.state_dict() for n, m in models.items()}, statistics


def oracle(name: str, base: Any, experts: Any, statistics: Any) -> Tensor:
    deltas = torch.stack([e[name] - base[name] for e in experts.values()]).double()
    fishers = torch.stack([s[name].fisher_diagonal / 3 for s in statistics.values()]).double()
    fishers = fishers.clamp_min(1e-8)
    return base[name] + ((fishers * deltas).sum(0) / fishers.sum(0)).float()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fisher", {}),
        ("mats", {"operator": "diagonal_fisher", "solver": "direct"}),
        ("mats", {"operator": "diagonal_fisher", "preconditioner": "jacobi", "init": "iso_c"}),
    ],
)
def test_a_table_and_a_kernel_are_weighted_by_their_fisher(method: str, options: Any) -> None:
    base, experts, statistics = world()
    merged = eutectic.merge_state_dicts(
        base, experts, method=method, statistics=statistics, scale=1.0, **options
    )
    for name in (TABLE, KERNEL):
        wanted = oracle(name, base, experts, statistics)
        mean = torch.stack([e[name] for e in experts.values()]).mean(0)
        assert (wanted - mean).norm() > 0.01
        torch.testing.assert_close(merged[name], wanted, rtol=1e-5, atol=1e-6)
    # Row 0 was seen by nobody: both experts have the floor, which weighs them alike. Row 1 was
    # seen by one, whose Fisher outweighs the other's floor.
    mean = torch.stack([e[TABLE] for e in experts.values()]).mean(0)
    torch.testing.assert_close(merged[TABLE][0], mean[0])
    torch.testing.assert_close(merged[TABLE][1], experts["a"][TABLE][1], rtol=1e-3, atol=1e-4)


def test_a_row_without_curvature_keeps_the_guess_of_conjugate_gradients() -> None:
    base, experts, statistics = world()
    merged = eutectic.merge_state_dicts(
        base, experts, method="mats", statistics=statistics, scale=1.0, operator="diagonal_fisher",
    )  # fmt: skip
    guess = base[TABLE] + 0.3 * sum(e[TABLE] - base[TABLE] for e in experts.values())
    torch.testing.assert_close(merged[TABLE][0], guess[0], rtol=1e-4, atol=1e-5)


def test_the_plan_tells_which_tables_are_averaged(tmp_path: Path) -> None:
    base, experts, statistics = world()
    bare = world(fisher=False, output_gradients=True)[2]["b"]
    paths = {n: save(tmp_path / n, tensors) for n, tensors in {"base": base, **experts}.items()}
    given = {"a": statistics["a"], "b": bare}
    for name, found in given.items():
        found.save(tmp_path / f"{name}.stats")
    named = {n: {"path": paths[n], "statistics": tmp_path / f"{n}.stats"} for n in "ab"}
    recipe = {"base": paths["base"], "experts": named, "method": "fisher"}
    recipe["fallback"] = "allow"
    report = eutectic.merge(recipe, output=tmp_path / "merged")
    assert report.records[TABLE]["matrix"]["rest"] == "average"
    assert any(TABLE in note and "without statistics" in note for note in report.notes)
    mean = torch.stack([e[TABLE] for e in experts.values()]).mean(0)
    torch.testing.assert_close(load(tmp_path / "merged")[TABLE], mean)


def test_other_methods_average_tables_as_before_and_tied_ones_stay_equal() -> None:
    base, experts, statistics = world()
    options: Any = {"statistics": statistics, "scale": 1.0}
    mean = torch.stack([e[TABLE] for e in experts.values()]).mean(0)
    for method in ("regmean", "mats"):
        merged = eutectic.merge_state_dicts(base, experts, method=method, **options)
        torch.testing.assert_close(merged[TABLE], mean)
    tied = [
        {**tensors, "lm_head.weight": tensors[TABLE].clone()}
        for tensors in (base, *experts.values())
    ]
    merged = eutectic.merge_state_dicts(
        tied[0], dict(zip("ab", tied[1:], strict=True)), method="fisher", **options
    )
    torch.testing.assert_close(merged["lm_head.weight"], mean)
    assert torch.equal(merged["lm_head.weight"], merged[TABLE])


def test_a_stack_of_matrices_takes_the_rest_rule_and_the_plan_says_so(tmp_path: Path) -> None:
    name = "mlp.experts.up_proj"
    tensors = {n: {name: torch.full((2, 3, 4), float(i))} for i, n in enumerate(("base", "a", "b"))}
    entry = eutectic.LayerStatistics(count=5, fisher_diagonal=torch.ones(2, 3, 4))
    report = eutectic.merge(
        base=save(tmp_path / "base", tensors["base"]),
        experts={n: save(tmp_path / n, tensors[n]) for n in "ab"},
        method="fisher",
        fallback="allow",
        output=tmp_path / "merged",
    )
    assert any("without statistics" in note and name in note for note in report.notes)
    assert float(load(tmp_path / "merged")[name].mean()) == 1.5
    merged = eutectic.merge_state_dicts(
        tensors["base"],
        {n: tensors[n] for n in "ab"},
        method="fisher",
        fallback="allow",
        statistics={n: {name: entry} for n in "ab"},
    )
    assert float(merged[name].mean()) == 1.5
