"""What the table of the benchmarks is made of: parts of splits, results, errors of differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from table import run

    return run


def batches(table: Any, count: int) -> Any:
    """Rows numbered by their only input, in batches of three, the last rows first."""
    order = torch.arange(count).flip(0)
    inputs = [{"x": part} for part in order.split(3)]
    return table.Batches(inputs, order, torch.arange(count) % 5)


@pytest.mark.parametrize(("start", "count"), [(0, 4), (4, 3), (6, 9), (0, 8), (8, 2)])
def test_a_part_keeps_its_own_order(table: Any, start: int, count: int) -> None:
    part = table.part_of(batches(table, 8), start, count)
    rows = list(range(8))[start : start + count]
    assert part.labels.tolist() == [row % 5 for row in rows]
    given = torch.cat([batch["x"] for batch in part.inputs]) if part.inputs else torch.empty(0)
    restored = torch.empty(len(rows), dtype=torch.int64)
    restored[part.order] = given.long()
    assert restored.tolist() == rows


def test_results_of_other_examples_or_experts_are_not_mixed(table: Any, tmp_path: Path) -> None:
    expert = tmp_path / "expert"
    expert.mkdir()
    save_file({"w": torch.zeros(2)}, expert / "model.safetensors")

    def suite(tested: int) -> Any:
        split = {"validation": batches(table, 6), "test": batches(table, tested)}
        return table.Suite(
            name="s", base=expert, experts={"a": expert}, model=torch.nn.Identity(),
            pool=lambda outputs, inputs: outputs, heads={}, splits={"a": split}, layers=(),
            proxies=lambda task, seed, count: split["validation"],
        )  # fmt: skip

    results = tmp_path / "results"
    table.check_settings(suite(8), results)
    table.check_settings(suite(8), results)
    with pytest.raises(SystemExit, match="results of other test examples than are asked for"):
        table.check_settings(suite(9), results)
    save_file({"w": torch.ones(2)}, expert / "model.safetensors")
    with pytest.raises(SystemExit, match="results of other experts"):
        table.check_settings(suite(8), results)


def test_a_record_is_completed_where_a_part_is_missing(table: Any, tmp_path: Path) -> None:
    made: list[int] = []

    def compute() -> dict[str, int]:
        made.append(1)
        return {"test": 1} if len(made) == 1 else {"test": 1, "grams": 2}

    file = tmp_path / "row-0.json"
    assert table.cached(file, compute) == {"test": 1}
    assert table.cached(file, compute, ["test"]) == {"test": 1}
    assert table.cached(file, compute, ["grams"]) == {"test": 1, "grams": 2}
    assert len(made) == 2


def drawn(count: int, share: float, seed: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < share


def test_the_error_of_a_difference_is_that_of_drawing_examples_again(table: Any) -> None:
    from table.outcomes import difference

    experts = {"a": drawn(300, 0.9, 0), "b": drawn(200, 0.6, 1)}
    one = {task: own ^ drawn(len(own), 0.2, 2) for task, own in experts.items()}
    other = {task: own ^ drawn(len(own), 0.1, 3) for task, own in one.items()}
    draw = torch.Generator().manual_seed(4)
    again = []
    for _ in range(1000):
        values = []
        for task, own in experts.items():
            rows = torch.randint(len(own), (len(own),), generator=draw)
            a, b, e = (right[task][rows].double().mean() for right in (one, other, experts))
            values.append(100 * (a - b) / e)
        again.append(sum(values) / 2)
    value, error = difference(one, other, experts)
    shares = [100 * r[t].double().mean() / e.double().mean() for t, e in experts.items()
              for r in (one, other)]  # fmt: skip
    assert value == pytest.approx((shares[0] - shares[1] + shares[2] - shares[3]).item() / 2)
    assert error == pytest.approx(torch.stack(again).std().item(), rel=0.1)
    assert difference(experts, experts, experts) == (0, 0)
    zeros = {task: torch.zeros(len(own)) for task, own in experts.items()}
    # The expert by itself is at 100 % whichever examples are drawn.
    assert difference(experts, zeros, experts) == pytest.approx((100, 0))


def test_outcomes_of_proxy_samples_are_averaged_and_compared(table: Any, tmp_path: Path) -> None:
    from table.outcomes import keep, load_outcomes, write_differences

    assert write_differences(tmp_path) == {}
    right = torch.tensor([True, True, False, True])
    assert keep({"a": right}, tmp_path, "base") == {"a": 75}
    assert write_differences(tmp_path) == {}
    keep({"a": torch.ones(4, dtype=torch.bool)}, tmp_path, "experts")
    keep({"a": right}, tmp_path, "iso_a-0")
    keep({"a": ~right}, tmp_path, "iso_a-1")
    keep({"a": ~right}, tmp_path, "iso_a-0@grams")
    found = load_outcomes(tmp_path)
    assert found["iso_a"]["a"].tolist() == [0.5] * 4
    assert found["iso_a@grams"]["a"].tolist() == [0, 0, 1, 0]
    errors = write_differences(tmp_path)
    assert errors.keys() == {"base", "iso_a", "iso_a@grams"}
    assert errors["base"] == pytest.approx(25, rel=1e-4) and errors["iso_a"] == 0
    pairs = json.loads((tmp_path / "differences.json").read_text())
    assert pairs["base"]["iso_a"] == [25, 25]
    assert pairs["iso_a"]["base"] == [-25, 25]
    assert pairs["iso_a@grams"]["base"] == [-50, 50]
