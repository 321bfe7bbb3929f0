"""Inspections of small folders: the layers that methods see, and the numbers of the matrices."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import eutectic
from eutectic.errors import MissingExtraError, NumericalError, RequestError
from eutectic.reporting import Inspection, subspace_alignment_ratio
from eutectic.reporting.layers import LayerMatrices, measure_layer
from eutectic.reporting.matrix_measures import output_energy
from eutectic.reporting.schema import schema_text
from eutectic.types import LayerStatistics
from helpers.cli import invoke
from helpers.folders import load, make_base, make_expert, save
from helpers.merging import save_inputs

SCHEMA = Path(__file__).parents[2] / "docs" / "schemas" / "inspection-1.json"


@pytest.fixture
def world(tmp_path):
    """A base, two experts, and their merge by iso_c; the options of an inspection."""
    base = make_base()
    experts = {"a": make_expert(base, 1), "b": make_expert(base, 2)}
    inputs = save_inputs(tmp_path, base, experts)
    eutectic.merge(**inputs, method="iso_c", output=tmp_path / "merged")
    return {**inputs, "merged": {"iso_c": tmp_path / "merged"}}


def test_layers_have_the_numbers_of_their_matrices(world):
    found = eutectic.inspect(**world)
    base, merged = load(world["base"]), load(world["merged"]["iso_c"])
    experts = {name: load(path) for name, path in world["experts"].items()}
    assert [layer.name for layer in found.layers] == [f"layers.{i}.proj.weight" for i in (0, 1)]
    for layer in found.layers:
        deltas = {n: e[layer.name] - base[layer.name] for n, e in experts.items()}
        delta = merged[layer.name] - base[layer.name]
        ratio = subspace_alignment_ratio(delta, deltas.values())
        assert list(layer.alignment["iso_c"].ratio.values()) == pytest.approx(ratio.tolist(), 1e-5)
        assert layer.experts["b"].norm == pytest.approx(float(deltas["b"].norm()), 1e-5)
        singular = torch.linalg.svdvals(deltas["a"] + deltas["b"])
        assert layer.sum.values[0] == pytest.approx(float(singular[0]), 1e-5)
        assert layer.merged["iso_c"].effective_rank == pytest.approx(16, 1e-4)  # flat
        assert layer.leading == 8
    mean = sum(layer.alignment["iso_c"].ratio["a"] or 0 for layer in found.layers) / 2
    assert found.summary.merged["iso_c"].task_sar["a"] == pytest.approx(mean, 1e-5)
    flat = [
        torch.cat([(e[k] - base[k]).flatten() for k in _names(found)]) for e in experts.values()
    ]
    expected = float(torch.nn.functional.cosine_similarity(*flat, dim=0))
    assert found.summary.interference.cosine[0][1] == pytest.approx(expected, 1e-3)
    assert found.summary.tasks["a"].norm == pytest.approx(float(flat[0].norm()), 1e-5)


def _names(found: Inspection) -> list[str]:
    return [layer.name for layer in found.layers]


def test_transposed_and_fused_matrices_are_seen_as_methods_see_them(tmp_path):
    generator = torch.Generator().manual_seed(0)
    name = "h.0.attn.c_attn.weight"
    base = {name: torch.randn(6, 12, generator=generator)}  # Conv1D: [in, out], out = q, k, v
    expert = make_expert(base, 1)
    inputs = save_inputs(tmp_path, base, {"a": expert}, {"model_type": "gpt2"})
    rules = [{"match": "*.c_attn.weight", "split": 3}]
    found = eutectic.inspect({"tensors": rules}, **inputs, merged={"same": inputs["experts"]["a"]})
    assert [(layer.name, layer.shape) for layer in found.layers] == [
        (f"{name}[{part}]", (4, 6)) for part in range(3)
    ]
    delta = (expert[name] - base[name]).T[4:8]
    top = float(torch.linalg.svdvals(delta)[0])
    assert found.layers[1].experts["a"].values[0] == pytest.approx(top, 1e-5)
    assert (found.layers[1].alignment["same"].ratio["a"] or 0) > 0.99


def test_stacks_are_seen_block_by_block(tmp_path):
    name = "mlp.experts.gate_up_proj"
    base = {name: torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))}
    expert = make_expert(base, 1)
    found = eutectic.inspect(**save_inputs(tmp_path, base, {"a": expert}))
    assert [layer.shape for layer in found.layers] == [(8, 6)] * 3
    norms = (expert[name] - base[name]).flatten(1).norm(dim=1)
    assert [layer.experts["a"].norm for layer in found.layers] == pytest.approx(
        norms.tolist(), 1e-5
    )


def test_adapters_take_the_route_of_their_factors(tmp_path):
    base = {"proj.weight": torch.randn(16, 12, generator=torch.Generator().manual_seed(0))}
    save(tmp_path / "base", base)
    experts, full = {}, {}
    for seed, name in enumerate("ab"):
        experts[name] = folder = tmp_path / name
        folder.mkdir()
        generator = torch.Generator().manual_seed(seed)
        A, B = torch.randn(2, 12, generator=generator), torch.randn(16, 2, generator=generator)
        keys = ("base_model.model.proj.lora_A.weight", "base_model.model.proj.lora_B.weight")
        save_file(dict(zip(keys, (A, B), strict=True)), folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        full[name] = save(tmp_path / f"{name}_full", {"proj.weight": base["proj.weight"] + B @ A})
    thin = eutectic.inspect(base=tmp_path / "base", experts=experts, rank=2).layers[0]
    dense = eutectic.inspect(base=tmp_path / "base", experts=full, rank=2).layers[0]
    assert (thin.experts["a"].rank, thin.sum.rank) == (2, 4)
    assert thin.experts["a"].norm == pytest.approx(dense.experts["a"].norm, 1e-4)
    for part in ("overlap_left", "overlap_right", "cosine", "singular"):
        pairs = getattr(thin.interference, part)[0][1], getattr(dense.interference, part)[0][1]
        assert pairs[0] == pytest.approx(pairs[1], rel=1e-3, abs=1e-6)


def test_statistics_measure_outputs():
    deltas = {
        n: torch.randn(5, 4, generator=torch.Generator().manual_seed(s))
        for s, n in enumerate("abc")
    }
    gram = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    record = LayerStatistics(gram=gram, count=9)
    zero = {**deltas, "c": torch.zeros(5, 4)}
    layer = measure_layer(
        LayerMatrices("w", 1.0, zero, {}, {}, {"b": record, "c": record}), error=0.05
    )
    table = layer.interference.activation
    assert table is not None
    expected = output_energy(deltas["a"], record) / output_energy(deltas["b"], record)
    assert table[0][1] == pytest.approx(expected, 1e-5)
    assert table[1][1] == 1
    assert [row[0] for row in table] == [None] * 3  # no statistics of a
    assert [row[2] for row in table] == [None] * 3  # c moves nothing on its own data


def test_statistics_files_reach_the_table(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    base = {k: v.detach().clone() for k, v in model.state_dict().items()}
    inputs = save_inputs(tmp_path, base, {n: make_expert(base, s) for s, n in enumerate("ab")})
    model.load_state_dict(load(inputs["experts"]["a"]))
    batches = [torch.randn(20, 6)]
    eutectic.collect(model, batches, output=tmp_path / "a.stats.safetensors")
    statistics = tmp_path / "a.stats.safetensors"
    experts = {
        "a": {"path": inputs["experts"]["a"], "statistics": statistics},
        "b": inputs["experts"]["b"],
    }
    found = eutectic.inspect(base=inputs["base"], experts=experts)
    own, other = (load(inputs["experts"][n])["0.weight"] - base["0.weight"] for n in "ab")
    expected = float((batches[0] @ other.T).square().sum() / (batches[0] @ own.T).square().sum())
    table = found.layers[0].interference.activation
    assert table is not None
    assert table[1][0] == pytest.approx(expected, 1e-4)
    assert found.summary.tasks["a"].by == "activation"
    assert found.summary.tasks["b"].by == "singular"
    assert "no activation interference on the data of b" in found.notes


def test_an_unchanged_expert_has_no_direction(world):
    world["experts"]["b"] = world["base"]
    found = eutectic.inspect(**world)
    layer = found.layers[0]
    assert layer.alignment["iso_c"].ratio["b"] is None
    assert layer.experts["b"].rank == 0
    assert layer.interference.cosine[0] == [1.0, None]
    assert found.summary.merged["iso_c"].task_sar["b"] is None
    assert found.summary.merged["iso_c"].sar == found.summary.merged["iso_c"].task_sar["a"]
    assert "expert 'b' leaves 2 of 2 matrices unchanged" in found.notes


def test_wrong_requests_are_refused_before_work(world, tmp_path):
    with pytest.raises(RequestError, match="inspect has no option 'layer'. Did you mean 'layers'?"):
        eutectic.inspect(**world, layer="*")
    with pytest.raises(RequestError, match="the rank of subspaces must be at least 1, got 0"):
        eutectic.inspect(**world, rank=0)
    with pytest.raises(RequestError, match="'nothing' matches none of 2 matrices, such as layers"):
        eutectic.inspect(**world, layers="nothing")
    with pytest.raises(RequestError, match="merged model 'iso_c'.*"):
        eutectic.inspect(**{**world, "merged": {"iso_c": tmp_path / "absent"}})
    partial = load(world["base"])
    del partial["layers.1.proj.weight"]
    other = save(tmp_path / "partial", partial)
    with pytest.raises(RequestError, match="lacks 1 of 2 matrices.* such as layers.1.proj.weight"):
        eutectic.inspect(**{**world, "merged": {"iso_c": other}})
    with pytest.raises(RequestError, match="a file in a folder that exists"):
        eutectic.inspect(**world, output=tmp_path / "no" / "inspection.json")
    with pytest.raises(RequestError, match="the inspection would be written there"):
        eutectic.inspect(**world, output=tmp_path / "base" / "config.json")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/norms.png").write_bytes(b"a picture of mine")
    with pytest.raises(RequestError, match=r"norms\.png: a plot would be drawn there"):
        eutectic.inspect(**world, plots=tmp_path / "mine")
    with pytest.raises(RequestError, match="is a file; plots are written to a folder"):
        eutectic.inspect(**world, plots=tmp_path / "base" / "config.json")


def test_damaged_models_are_named(world, tmp_path):
    damaged = load(world["merged"]["iso_c"])
    damaged["layers.0.proj.weight"][0, 0] = float("nan")
    world["merged"]["iso_c"] = save(tmp_path / "damaged", damaged)
    with pytest.raises(NumericalError, match="layers.0.proj.weight: NaN or Inf in 'iso_c'"):
        eutectic.inspect(**world, output=tmp_path / "inspection.json")
    assert not (tmp_path / "inspection.json").exists()


@pytest.mark.parametrize("frozen", [("0",), ("0", "1")], ids=["first", "all"])
def test_layers_that_no_expert_changed_can_be_drawn(frozen, world, tmp_path):
    base = load(world["base"])
    for name, folder in [*world["experts"].items(), ("m", world["merged"]["iso_c"])]:
        tensors = load(folder)
        same = {f"layers.{i}.proj.weight": base[f"layers.{i}.proj.weight"] for i in frozen}
        save(tmp_path / f"frozen-{name}", tensors | same)
    experts = {name: tmp_path / f"frozen-{name}" for name in world["experts"]}
    merged = {"m": tmp_path / "frozen-m"}
    found = eutectic.inspect(
        base=world["base"], experts=experts, merged=merged, plots=tmp_path / "plots"
    )
    assert found.layers[0].experts["a"].norm == 0
    assert (tmp_path / "plots" / "spectra.png").is_file()


def test_plots_without_matplotlib_name_the_extra(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'eutectic\[plots\]'"):
        eutectic.inspect(**world, plots=tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_the_schema_is_published():
    assert SCHEMA.read_text() == schema_text()


RESULTS = {
    "schema_version": 1,
    "split": "test",
    "tasks": [{"name": "a", "expert": "a"}, {"name": "b1", "expert": "b"}],
    "results": [
        {"checkpoint": "base", "task": "a", "nai": 0.0},
        {"checkpoint": "iso_c", "task": "a", "nai": 0.9},
        {"checkpoint": "iso_c", "task": "b1", "nai": 0.5},
        {"checkpoint": "ta", "task": "a", "nai": 0.4},
        {"checkpoint": "ta", "task": "b1", "nai": None},
    ],
}


def test_the_command(world, tmp_path):
    results = tmp_path / "results.json"
    results.write_text(json.dumps(RESULTS))
    eutectic.merge(
        base=world["base"],
        experts=world["experts"],
        method="task_arithmetic",
        output=tmp_path / "ta",
    )
    words = [
        "inspect", "--base", world["base"], "-m", f"iso_c={tmp_path / 'merged'}",
        "-m", f"ta={tmp_path / 'ta'}", "--results", results,
        *(f"{n}={p}" for n, p in world["experts"].items()),
    ]  # fmt: skip
    saved, plots = tmp_path / "inspection.json", tmp_path / "plots"
    answer = invoke(*words, "-o", saved, "--plot", plots)
    assert answer.code == 0, answer.err
    assert "SAR iso_c NAI SAR ta NAI" in answer.out
    assert "over 3 points" in answer.out
    found = Inspection.model_validate_json(saved.read_text())
    assert found.summary.merged["iso_c"].nai == {"a": 0.9, "b": 0.5}
    assert found.summary.merged["ta"].mean_nai == 0.4
    assert "NAI on the split 'test'" in found.notes
    assert {p.name for p in plots.iterdir()} == {
        "alignment.png", "interference.png", "norms.png", "sar_nai.png", "spectra.png"
    }  # fmt: skip
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in plots.iterdir())
    machine = invoke(*words, "--json")
    assert json.loads(machine.out) == json.loads(saved.read_text())


def test_results_are_read_under_the_names_that_evaluations_write():
    from eutectic.evaluation.results import Result, Results, TaskRecord

    written = {"top": Results, "tasks": TaskRecord, "results": Result}
    read = {"top": RESULTS, "tasks": RESULTS["tasks"][0], "results": RESULTS["results"][0]}
    for part, model in written.items():
        assert set(read[part]) <= set(model.model_fields), part


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "holds no results .the file: Invalid JSON"),
        ("{}", "holds no results .schema_version: Field required"),
        (
            json.dumps({**RESULTS, "results": [{"checkpoint": "iso", "task": "a", "nai": 1}]}),
            "has results of iso, .* Did you mean 'iso'?",
        ),
        (
            json.dumps({**RESULTS, "results": [{"checkpoint": "iso_c", "task": "a", "nai": "x"}]}),
            "results.0.nai: Input should be a valid number",
        ),
    ],
)
def test_results_of_another_form_are_refused(world, tmp_path, document, message):
    results = tmp_path / "results.json"
    results.write_text(document)
    with pytest.raises(RequestError, match=message):
        eutectic.inspect(**world, results=results)


def test_the_command_refuses(world):
    assert invoke("inspect").code == 2
    answer = invoke("inspect", "a=x")
    assert answer.code == 2
    assert "--base must be given" in answer.err
    answer = invoke("inspect", "--base", world["base"], "a=x", "-s", "b=y")
    assert (answer.code, "names 'b'" in answer.err) == (2, True)


def test_what_needs_more_memory_than_allowed_is_refused_before_it_is_read(world):
    least = 450_000_000  # of the process
    with pytest.raises(RequestError, match=r"proj.weight alone needs .*2 of 2 matrices"):
        eutectic.inspect(**world, memory=least)
    assert eutectic.inspect(**world, memory=least + 100_000).layers
    named = [f"{name}={path}" for name, path in world["experts"].items()]
    answer = invoke("inspect", "--base", world["base"], *named, "--memory", "100MB")
    assert answer.code == 2 and "--layers" in answer.err and "450" in answer.err


def test_the_estimate_grows_with_what_is_held(world, tmp_path):
    from eutectic.planning.inputs import open_inputs
    from eutectic.planning.plan import make_plan
    from eutectic.recipes.load import check_recipe
    from eutectic.reporting.memory import inspection_bytes

    experts = {name: str(path) for name, path in world["experts"].items()}
    recipe = check_recipe({"base": str(world["base"]), "experts": experts, "method": "average"})
    with open_inputs(recipe) as inputs:
        plan = make_plan(recipe, inputs)
        planned = next(t for t in plan.tensors if t.name == "layers.0.proj.weight")  # [32, 16]
        alone = inspection_bytes(planned, inputs, {})
        merged = inspection_bytes(planned, inputs, {"m": inputs.experts["a"]})
    # Base, two experts, their sum, a copy in float32; triplets, squares, leading ones in float64.
    assert alone == 512 * 4 * 5 + 8 * (512 * 3 + 16 * 16 * 4 + 2 * 8 * 48)
    assert merged - alone == 512 * 4
