"""What the table of the benchmarks is made of: parts of splits, and results that are not mixed."""

from __future__ import annotations

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
