"""Merges of quantised checkpoints: the output is plain, and every number is a dequantised one."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import eutectic
from eutectic.checkpoint.opening import open_reader
from eutectic.errors import RecipeError
from eutectic.planning.inputs import open_inputs, reopen
from eutectic.recipes.load import check_recipe
from helpers.folders import load, save

FIXTURES = Path(__file__).parents[1] / "fixtures/quantised"
Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def config(settings=None, **more):
    own = {} if settings is None else {"quantization_config": settings}
    return {"model_type": "llama", "dtype": "bfloat16", **own, **more}


def fp8(seed: int, scale: float) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    codes = (torch.randn(16, 16, generator=made) * 100).to(torch.float8_e4m3fn)
    return {Q: codes, f"{Q}_scale_inv": torch.full((1, 1), scale), NORM: torch.full((16,), 1.5)}


def meant(held: dict[str, Tensor]) -> Tensor:
    return (held[Q].float() * held[f"{Q}_scale_inv"]).to(torch.bfloat16)


def plain(folder: Path) -> dict[str, Tensor]:
    """Return all logical tensors of a checkpoint."""
    with open_reader(folder) as reader:
        return {n: reader.read(n).view(e.shape) for n, e in reader.entries.items()}


def test_fp8_base_and_expert(tmp_path):
    one, two = fp8(0, 2e-4), fp8(1, 8e-4)
    base = save(tmp_path / "base", one, config(FP8, text_config={"quantization_config": FP8}))
    for name in ("quantize_config.json", "hf_quant_config.json"):
        (base / name).write_text("{}")
    expert = save(tmp_path / "a", two, config(FP8))
    report = eutectic.merge(
        base=base, experts={"a": expert}, method="average", output=tmp_path / "out"
    )
    found = load(tmp_path / "out")
    assert set(found) == {NORM, Q}
    assert torch.equal(found[Q], meant(two)) and found[Q].dtype is torch.bfloat16
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == {"model_type": "llama", "dtype": "bfloat16", "text_config": {}}
    assert not list((tmp_path / "out").glob("*quant*"))
    (note,) = [n for n in report.note_records if n.kind == "dequantised"]
    assert str(note) == "dequantised: fp8 blocks (1 tensor) of the base, expert 'a'"


def test_a_rule_on_a_weight_copies_its_value(tmp_path):
    one, two = fp8(0, 2e-4), fp8(1, 8e-4)
    base, expert = save(tmp_path / "base", one, config(FP8)), save(tmp_path / "a", two, config(FP8))
    rules = [{"match": Q, "treatment": "copy"}]
    recipe = {"base": str(base), "experts": {"a": str(expert)}, "method": "average"}
    recipe["tensors"] = rules
    eutectic.merge(recipe, output=tmp_path / "out")
    found = load(tmp_path / "out")
    assert torch.equal(found[Q], meant(one)) and set(found) == {Q, NORM}
    assert torch.equal(found[NORM], two[NORM])


def test_dtype_is_chosen(tmp_path):
    two = fp8(1, 8e-4)
    base = save(tmp_path / "base", fp8(0, 2e-4), config(FP8))
    expert = save(tmp_path / "a", two, config(FP8, dtype="float32"))
    recipe = {"base": str(base), "experts": {"a": str(expert)}, "method": "average"}
    eutectic.merge({**recipe, "dtype": "float32"}, output=tmp_path / "out")
    exact = two[Q].float() * two[f"{Q}_scale_inv"]
    assert torch.equal(load(tmp_path / "out")[Q], exact)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("base_kind", ["plain", "bnb-nf4-double", "bnb-int8"])
def test_experts_of_several_kinds(tmp_path, base_kind):
    """Every expert counts as the numbers that its library decodes, whatever the base is."""
    kinds = ["bnb-int8", "bnb-nf4-double", "bnb-nf4-wide"]
    tensors = {kind: plain(FIXTURES / kind) for kind in kinds}
    tensors["plain"] = {n: w + 0.01 for n, w in tensors["bnb-int8"].items()}
    folders = {kind: FIXTURES / kind for kind in kinds}
    folders["plain"] = save(tmp_path / "plain", tensors["plain"], config())
    experts = {kind: str(folder) for kind, folder in folders.items() if kind != base_kind}
    recipe = {"base": str(folders[base_kind]), "experts": experts, "method": "average"}
    eutectic.merge(recipe, output=tmp_path / "out")
    found = load(tmp_path / "out")
    assert set(found) == set(tensors[base_kind])
    for name, value in found.items():
        base = tensors[base_kind][name].float()
        stack = torch.stack([tensors[kind][name].float() for kind in experts])
        wanted = base + (stack - base).mean(dim=0)
        assert torch.allclose(value.float(), wanted, atol=1e-6, rtol=2**-8)


def test_output_loads_without_the_formats_library(tmp_path):
    from transformers import AutoModelForCausalLM

    recipe = {
        "base": str(FIXTURES / "bnb-nf4-double"),
        "experts": {"a": str(FIXTURES / "bnb-int8")},
        "method": "average",
    }
    eutectic.merge(recipe, output=tmp_path / "out")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype is torch.bfloat16
    wanted = plain(FIXTURES / "bnb-int8")
    assert torch.equal(model.state_dict()[Q], wanted[Q])


def test_a_lora_on_an_int8_base(tmp_path):
    made = torch.Generator().manual_seed(3)
    a, b = torch.randn(4, 16, generator=made), torch.randn(16, 4, generator=made)
    prefix = f"base_model.model.{Q.removesuffix('.weight')}"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(
        {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b},
        adapter / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    recipe = {
        "base": str(FIXTURES / "bnb-int8"),
        "experts": {"a": str(adapter)},
        "method": "average",
    }
    report = eutectic.merge(recipe, output=tmp_path / "out")
    base = plain(FIXTURES / "bnb-int8")
    found = load(tmp_path / "out")
    assert torch.equal(found[Q], (base[Q].float() + 2 * b @ a).to(torch.bfloat16))
    assert all(torch.equal(found[n], base[n]) for n in base if n != Q)
    kinds = {note.kind for note in report.note_records}
    assert {"dequantised", "adapter_on_quantised"} <= kinds


def _read_elsewhere(paths):
    torch.set_num_threads(1)
    with reopen(paths) as inputs:
        return inputs.experts["a"].read(Q).float().tolist(), inputs.base.read(Q).float().tolist()


def test_inputs_open_again_in_another_process(tmp_path):
    base, expert = FIXTURES / "bnb-nf4-double", FIXTURES / "bnb-int8"
    recipe = check_recipe({"base": str(base), "experts": {"a": str(expert)}, "method": "average"})
    with open_inputs(recipe) as inputs:
        paths = inputs.paths
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        own, first = pool.submit(_read_elsewhere, paths).result()
    assert own == plain(expert)[Q].flatten().float().tolist()
    assert first == plain(base)[Q].flatten().float().tolist()


def test_any_number_of_threads(tmp_path):
    experts = {"a": str(FIXTURES / "bnb-int8"), "b": str(FIXTURES / "bnb-nf4-wide")}
    recipe = {"base": str(FIXTURES / "bnb-nf4-double"), "experts": experts, "method": "iso_c"}
    found = []
    for threads in (1, 4):
        eutectic.merge(recipe, output=tmp_path / str(threads), threads=threads)
        found.append((tmp_path / str(threads) / "model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_what_cannot_be_read_is_one_fault(tmp_path):
    base = save(tmp_path / "base", {Q: torch.ones(4, 4), NORM: torch.ones(4)}, config())
    codes = {f"{Q}._data": torch.ones(4, 4, dtype=torch.int8), NORM: torch.ones(4)}
    expert = save(tmp_path / "a", codes, config({"quant_method": "quanto"}))
    with pytest.raises(RecipeError, match="Quanto") as error:
        eutectic.merge(base=base, experts={"a": expert}, method="average", output=tmp_path / "out")
    assert len(error.value.faults) == 1 and not (tmp_path / "out").exists()


def test_models_run_on_dequantised_weights():
    from eutectic.models.loading import load_config, load_stored

    folder = FIXTURES / "bnb-nf4-double"
    assert not hasattr(load_config(folder), "quantization_config")
    model = load_stored(folder)
    wanted = plain(folder)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in wanted.items())
