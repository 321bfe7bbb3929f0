"""What counts in a plan's bytes: statistics that are read, their copies, the process itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eutectic
from eutectic.errors import RecipeError
from eutectic.methods import get_method
from eutectic.planning.cost import PROCESS_BYTES, check_memory, tensor_cost
from eutectic.planning.inputs import open_inputs
from eutectic.planning.plan import make_plan
from eutectic.recipes.load import check_recipe
from helpers.folders import save

OUT, IN = 24, 40


def cost(
    folder: Path, method: str = "mats", cut: bool = False, **parameters: object
) -> tuple[int, int]:
    """Return bytes read and held for the matrix."""
    experts = {n: {"path": folder / n, "statistics": folder / f"{n}.stats"} for n in "ab"}
    values = {"base": folder / "base", "experts": experts, "method": method}
    recipe = check_recipe({**values, "parameters": parameters})
    with open_inputs(recipe) as inputs:
        plan = make_plan(recipe, inputs)
        matrix = next(t for t in plan.tensors if t.name == "weight")
        found = tensor_cost(replace(matrix, cut_in_inputs=cut), inputs)
    return found.read_bytes, found.peak_bytes


def test_grams_and_their_copies_are_counted(tmp_path: Path) -> None:
    model = torch.nn.Linear(IN, OUT)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    save(tmp_path / "base", base)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model.load_state_dict({k: v + 0.1 * torch.randn_like(v) for k, v in base.items()})
        save(tmp_path / name, model.state_dict())
        eutectic.collect(
            model,
            [torch.randn(3 * IN, IN)],
            tmp_path / f"{name}.stats",
            output_gradients=True,
            objective=lambda outputs, batch: -outputs.square().sum(1),
        )
    plain_read, plain_peak = cost(tmp_path, operator="identity")
    gram_read, gram_peak = cost(tmp_path, operator="gram")
    kfac_read, kfac_peak = cost(tmp_path, operator="kfac")
    assert gram_read - plain_read == 2 * 4 * IN * IN
    assert kfac_read - gram_read == 2 * 4 * OUT * OUT
    assert gram_peak - plain_peak >= 2 * 4 * IN * IN + 8 * IN * IN
    cut_read, cut_peak = cost(tmp_path, "average", cut=True)
    whole_read, whole_peak = cost(tmp_path, "average")
    assert cut_read - whole_read == 2 * 4 * IN * IN
    assert cut_peak - whole_peak >= 2 * 4 * IN * IN + 4 * 8 * IN * IN
    copies = 2 * 8 * (IN * IN + OUT * OUT)
    assert kfac_peak - gram_peak == copies + (kfac_read - gram_read)


def test_the_limit_holds_the_largest_job_and_the_process(tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        save(tmp_path / name, {"weight": torch.randn(OUT, IN), "bias": torch.randn(OUT)})
    experts = {name: {"path": tmp_path / name} for name in "ab"}
    recipe = check_recipe({"base": tmp_path / "base", "experts": experts, "method": "iso_c"})
    with open_inputs(recipe) as inputs:
        plan = make_plan(recipe, inputs)
        peak = max(tensor_cost(tensor, inputs).peak_bytes for tensor in plan.tensors)
        check_memory(plan, inputs, peak + PROCESS_BYTES)
        with pytest.raises(RecipeError, match="weight alone needs"):
            check_memory(plan, inputs, peak + PROCESS_BYTES - 1)


def test_grams_in_few_rows_are_no_squares(tmp_path: Path) -> None:
    """From 2000 inputs on, a square in float64 is 32 MB; four directions are 32 kB."""
    wide = 2000
    model = torch.nn.Linear(wide, 2)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    save(tmp_path / "base", base)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model.load_state_dict({k: v + 0.1 * torch.randn_like(v) for k, v in base.items()})
        save(tmp_path / name, model.state_dict())
        eutectic.collect(model, [torch.randn(600, wide)], tmp_path / f"{name}.stats", rank=4)
    _, plain = cost(tmp_path, operator="identity")
    read, peak = cost(tmp_path, operator="gram")
    assert read > 2 * 4 * 4 * wide
    assert peak - plain < 4 * wide**2
    _, with_inverse = cost(tmp_path, operator="gram", preconditioner="kronecker")
    assert with_inverse - plain < 4 * wide**2


def test_long_matrices_need_fewer_multiples_of_themselves(tmp_path: Path) -> None:
    """What goes by the square of the shorter side is small beside the matrix."""

    def multiples(shape: tuple[int, int], method: str) -> float:
        folder = tmp_path / f"{shape[0]}-{shape[1]}"
        for name in ("base", "a", "b"):
            torch.manual_seed(len(name))
            save(folder / name, {"layer.weight": torch.randn(shape)})
        experts = {n: folder / n for n in "ab"}
        values = {"base": folder / "base", "experts": experts, "method": method}
        recipe = check_recipe(values)
        with open_inputs(recipe) as inputs:
            (planned,) = make_plan(recipe, inputs).tensors
            return tensor_cost(planned, inputs).peak_bytes / (4 * shape[0] * shape[1])

    for method in ("iso_c", "iso_cts", "tsv_m"):
        square, wide, tall = (multiples(s, method) for s in ((64, 64), (64, 224), (224, 64)))
        assert wide == pytest.approx(tall)
        assert 0.4 * square < wide < 0.8 * square
    for shape in ((64, 64), (64, 224)):
        assert multiples(shape, "ties") == multiples((64, 64), "ties")


def test_time_goes_by_the_outputs_where_a_matrix_of_their_side_is_decomposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`esm` decomposes the directions of both experts, 24 each, in 96 outputs."""
    monkeypatch.setattr("eutectic.planning.cost.machine_rates", lambda: (1.0, 1e30))
    for name in ("base", "a", "b"):
        save(tmp_path / name, {"up.weight": torch.ones(96, 24), "down.weight": torch.ones(24, 96)})
    experts = {n: tmp_path / n for n in "ab"}
    recipe = check_recipe({"base": tmp_path / "base", "experts": experts, "method": "tsv_m"})
    with open_inputs(recipe) as inputs:
        for planned in make_plan(recipe, inputs).tensors:
            esm = replace(planned, method="esm", parameters=get_method("esm").parse({}))
            product = 2 * 2 * 96 * 24 * 24  # of two experts
            more = 3.7 * (2**2 - 1) if planned.name == "up.weight" else 0
            assert tensor_cost(esm, inputs).seconds == pytest.approx((19 + more) * product)
            assert tensor_cost(planned, inputs).seconds == pytest.approx(10 * product)
