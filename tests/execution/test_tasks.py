"""A task is data: any process that opens the inputs by their description writes the same bytes."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import eutectic
from eutectic.execution import schedule
from eutectic.execution.executors import Limits
from eutectic.execution.merging import copy_tensor, merge_tensor, merge_unscaled, scale_tensor
from eutectic.execution.tasks import Finished, Task, Workplace, carry_out, open_site
from eutectic.methods import all_methods, get_method
from eutectic.planning.inputs import Inputs, in_memory_inputs
from eutectic.planning.plan import make_plan
from eutectic.planning.tensor_plan import RowMap, Source, TensorPlan
from eutectic.recipes.load import check_recipe
from eutectic.statistics.statistics_file import StatisticsFile
from eutectic.types import Treatment
from helpers.folders import Tensors, digests, make_base, make_expert, save, save_sharded

SPLIT = [{"match": "layers.0.proj.weight", "split": 2}, {"match": "layers.1.*", "scale": 0.3}]
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "mats": [{"operator": name} for name in ("gram", "kfac", "diagonal_fisher", "task_gram")]
    + [{"init": "START"}],
    "esm": [{"preset": "vit"}],
    "ties": [{"scope": "model"}],
}


def _elsewhere(data: bytes) -> Finished:
    """Carry out a pickled task in a process that opens everything by itself."""
    task, site = pickle.loads(data)
    torch.set_num_threads(1)
    with open_site(site) as place:
        return carry_out(task, place)


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        yield pool


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world")
    base = make_base(width=8)
    experts = {name: make_expert(base, seed) for seed, name in enumerate("abc", start=1)}
    shards = {"one.safetensors": dict(list(base.items())[:4])}
    shards["two.safetensors"] = dict(list(base.items())[4:])
    paths = {
        name: {
            "path": save(folder / name, tensors),
            "statistics": _save_statistics(folder / f"{name}.stats.safetensors", tensors, seed),
        }
        for seed, (name, tensors) in enumerate(experts.items())
    }
    start = save(folder / "start", make_expert(base, 9))
    return {"base": save_sharded(folder / "base", shards), "experts": paths, "start": start}


def _save_statistics(path: Path, tensors: Tensors, seed: int) -> Path:
    """Write statistics of every kind for every parameter."""
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, Any] = {}
    held: Tensors = {}
    for name, weight in tensors.items():
        if not weight.is_floating_point():
            continue
        held[f"{name}/fisher_diagonal"] = torch.rand(weight.shape, generator=generator)
        shape = list(weight.shape)
        layers[name] = {"parameter": shape, "shape": shape, "examples": 9, "inputs": name}
        layers[name] |= {"count": 0, "sample_count": 9, "same_as": name}
        if weight.ndim == 2 and "proj" in name:
            x = torch.randn(40, weight.shape[1], generator=generator)
            y = torch.randn(40, weight.shape[0], generator=generator)
            held |= {f"{name}/gram": x.T @ x, f"{name}/output_gradient_gram": y.T @ y}
            layers[name] |= {"count": 40, "sample_count": 40}
    record = {
        "format": 1,
        "data": {"rows": 40},
        "checkpoint": {"fingerprint": "of nobody"},
        "settings": {},
        "layers": layers,
    }
    StatisticsFile(record, held).save(path)
    return path


def _cases() -> list[tuple[str, dict[str, Any]]]:
    return [(name, case) for name in all_methods() for case in [{}, *VARIANTS.get(name, [])]]


@pytest.mark.parametrize(("method", "parameters"), _cases(), ids=str)
def test_another_process_writes_the_same_bytes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pool: ProcessPoolExecutor,
    world: dict[str, Any],
    method: str,
    parameters: dict[str, Any],
) -> None:
    stages: set[str] = set()

    def in_another_process(
        tasks: list[Task], place: Workplace, limits: Limits
    ) -> Iterator[tuple[Task, Finished]]:
        assert place.site is not None
        for task in reversed(tasks):
            stages.add(task.stage)
            yield task, pool.submit(_elsewhere, pickle.dumps((task, place.site))).result()

    low, high = get_method(method).experts
    names = list(world["experts"])[: high or max(low, 3)]
    parameters = {k: world["start"] if v == "START" else v for k, v in parameters.items()}
    request = {
        "base": world["base"],
        "experts": {name: world["experts"][name] for name in names},
        "method": method,
        "parameters": parameters,
        "tensors": SPLIT,
    }
    eutectic.merge(request, output=tmp_path / "threads")
    monkeypatch.setattr(schedule, "EXECUTORS", {"threads": in_another_process})
    eutectic.merge(request, output=tmp_path / "elsewhere")
    assert digests(tmp_path / "elsewhere") == digests(tmp_path / "threads")
    assert stages == ({"merge", "delta", "scale"} if method == "esm" else {"merge"})


VOCABULARY, WIDTH = 10, 6


def _rows_world() -> tuple[Inputs, Tensors, dict[str, Tensors]]:
    """A base of ten rows, an expert with the same, and one with rows moved, lost and added."""
    base = {"table": torch.randn(VOCABULARY, WIDTH), "other": torch.randn(3)}
    moved = torch.cat([base["table"][5:], torch.randn(2, WIDTH)])
    experts = {
        "same": {"table": base["table"] + 0.1, "other": base["other"]},
        "moved": {"table": moved + 0.3, "other": base["other"]},
    }
    return in_memory_inputs(base, experts, {}), base, experts


def _rows_plan(**changes: Any) -> TensorPlan:
    """The output: the base's ten rows, then the two that only `moved` has."""
    planned = TensorPlan(
        name="renamed.table",
        shape=(VOCABULARY + 2, WIDTH),
        dtype=torch.float32,
        compute=torch.float32,
        treatment=Treatment.EMBEDDING,
        reason=(),
        base=Source("base", "table", RowMap(WIDTH, ((0, 0, VOCABULARY),))),
        experts=(
            Source("same", "table", RowMap(WIDTH, ((0, 0, VOCABULARY),))),
            Source("moved", "table", RowMap(WIDTH, ((5, 0, 5), (10, 5, 2)))),
        ),
        method="average",
        parameters=get_method("average").parameters(),
        seed_name="table",
    )
    return replace(planned, **changes)


def _merged(planned: TensorPlan, inputs: Inputs) -> torch.Tensor:
    result = torch.full((planned.elements,), torch.nan)

    def emit(start: int, values: torch.Tensor) -> None:
        result[start : start + values.numel()] = values

    merge_tensor(planned, inputs, emit)
    deltas = torch.empty(planned.elements)
    late = torch.empty(planned.elements)
    merge_unscaled(planned, inputs, lambda at, v: deltas[at : at + v.numel()].copy_(v))
    scale_tensor(
        planned,
        inputs,
        lambda at, v: late[at : at + v.numel()].copy_(v),
        lambda start, stop: deltas[start:stop],
        {},
    )
    assert torch.equal(late, result)
    return result.view(planned.shape)


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "linear", "ties", "slerp"])
@pytest.mark.parametrize("chunk", [7, 1 << 17])
def test_rows_of_another_order_and_number_are_merged_where_they_belong(
    monkeypatch: pytest.MonkeyPatch, method: str, chunk: int
) -> None:
    monkeypatch.setattr("eutectic.execution.tensor_values.CHUNK", chunk)
    inputs, base, experts = _rows_world()
    parameters = get_method(method).parse({"density": 1.0} if method == "ties" else {})
    found = _merged(_rows_plan(method=method, parameters=parameters), inputs)
    # By hand: what an expert lacks is the base's row, what the base lacks is zero.
    wide = torch.cat([base["table"], torch.zeros(2, WIDTH)])
    same = torch.cat([experts["same"]["table"], torch.zeros(2, WIDTH)])
    moved = torch.cat([base["table"][:5], experts["moved"]["table"]])
    expected = eutectic.merge_state_dicts(
        {"table": wide}, {"same": {"table": same}, "moved": {"table": moved}},
        method=method, tensors=[{"match": "table", "treatment": "embedding"}],
        **({"density": 1.0} if method == "ties" else {}),
    )  # fmt: skip
    torch.testing.assert_close(found, expected["table"], rtol=1e-6, atol=1e-6)


def test_a_tensor_without_a_base_counts_it_as_zero() -> None:
    inputs, _, experts = _rows_world()
    planned = _rows_plan(shape=(VOCABULARY, WIDTH), base=None, experts=(Source("same", "table"),))
    torch.testing.assert_close(_merged(planned, inputs), experts["same"]["table"])


def test_every_row_that_a_map_covers_is_covered_once() -> None:
    rows = RowMap(3, ((0, 4, 2), (5, 0, 1)))
    for width in (18, 4, 1):  # in one go, in pieces, entry by entry
        found = torch.full((18,), -1)
        for start in range(0, 18, width):
            for place, first, last in rows.ranges(start, min(18, start + width)):
                found[start:][place] = torch.arange(first, last)
        assert found.tolist() == [*range(12, 18), *[-1] * 9, *range(3)]


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_vocabulary_of_another_size_is_refused_at_either_end(name: str) -> None:
    base = {name: torch.randn(8, 4), "w": torch.randn(4, 4)}
    other = {name: torch.randn(9, 4), "w": torch.randn(4, 4)}
    recipe = check_recipe({"base": "m", "experts": {"a": "m"}, "method": "average"})
    with pytest.raises(eutectic.EutecticError, match="add a rule: treatment head"):
        make_plan(recipe, in_memory_inputs(base, {"a": other}, {}))


def test_rows_of_a_copied_table_are_moved_too() -> None:
    table = torch.arange(12).view(6, 2)
    base, expert = {"ids": table, "w": torch.ones(2)}, {"ids": table[3:], "w": torch.ones(2)}
    inputs = in_memory_inputs(base, {"a": expert}, {})
    planned = TensorPlan(
        name="ids",
        shape=(4, 2),
        dtype=torch.int64,
        compute=torch.float32,
        treatment=Treatment.COPY,
        reason=(),
        base=Source("base", "ids", RowMap(2, ((0, 2, 4),))),
        experts=(Source("a", "ids", RowMap(2, ((1, 0, 3),))),),
        must_agree=True,
    )
    result = torch.zeros(8, dtype=torch.int64)
    copy_tensor(planned, inputs, lambda at, v: result[at : at + v.numel()].copy_(v))
    assert torch.equal(result.view(4, 2), table[2:])
    elsewhere = replace(planned, experts=(Source("a", "ids", RowMap(2, ((0, 0, 3),))),))
    with pytest.raises(eutectic.EutecticError, match="buffer of expert 'a' differs"):
        copy_tensor(elsewhere, inputs, lambda at, v: None)
