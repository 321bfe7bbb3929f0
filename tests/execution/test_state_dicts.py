"""Merges in memory.

Guards that state dicts give what files give, for every method, with tensors as they come from a
live model: tied, strided, on any floating type.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import eutectic
from eutectic.errors import EutecticError, NumericalError, RecipeError, RequestError
from helpers.folders import Tensors, make_base, make_expert
from helpers.merging import merge_files

REQUESTS: list[dict[str, Any]] = [
    *({"method": name, "fallback": "allow"} for name in eutectic.methods()),
    {"method": "ties", "scope": "model"},
    {"method": "linear", "normalize": False, "scale": 0.5},
    {"method": "iso_c", "scale_tensors": "matrix", "scale": 1.3, "precision": "exact"},
    {"method": "task_arithmetic", "dtype": "bfloat16", "scale": 0.3},
]


def family(base: Tensors, method: str = "average") -> dict[str, Tensors]:
    """Two experts, or one for a method that takes no more."""
    experts = {"a": make_expert(base, 1), "b": make_expert(base, 2)}
    return dict(list(experts.items())[: eutectic.methods()[method]["experts"][1]])


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: "-".join(map(str, r.values())))
def test_state_dicts_and_files_agree(request_: dict[str, Any], tmp_path: Path) -> None:
    base = make_base()
    experts = family(base, request_["method"])
    in_memory = eutectic.merge_state_dicts(base, experts, **request_)
    in_files, _ = merge_files(tmp_path, base, experts, **request_)
    assert list(in_memory) == list(base)
    for name, tensor in in_files.items():
        assert torch.equal(in_memory[name], tensor), name
        assert in_memory[name].dtype == tensor.dtype


def test_a_configuration_as_a_live_model_has_it() -> None:
    base = make_base()
    config = {"model_type": "bert", "id2label": {0: "no", 1: "yes"}, "dtype": torch.float32}
    merged = eutectic.merge_state_dicts(base, family(base), method="average", config=config)
    expected = eutectic.merge_state_dicts(base, family(base), method="average")
    assert all(torch.equal(merged[name], expected[name]) for name in base)


def test_weights_count(tmp_path: Path) -> None:
    base = make_base()
    experts = family(base)
    merged = eutectic.merge_state_dicts(base, experts, method="average", weights={"a": 3.0})
    expected = (3 * experts["a"]["logit_scale"] + experts["b"]["logit_scale"]) / 4
    torch.testing.assert_close(merged["logit_scale"], expected)


def test_inputs_are_not_changed() -> None:
    base = make_base()
    experts = family(base)
    before = [{n: t.clone() for n, t in d.items()} for d in (base, *experts.values())]
    for method in eutectic.methods():
        some = {name: experts[name] for name in family(base, method)}
        merged = eutectic.merge_state_dicts(base, some, method=method, fallback="allow")
        for tensor in merged.values():
            if tensor.is_floating_point():
                tensor.fill_(7)
    for then, now in zip(before, (base, *experts.values()), strict=True):
        assert all(torch.equal(then[n], now[n]) for n in then)


def test_a_live_model_with_ties_and_parameters() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
    model[1].weight = model[0].weight
    base = model.state_dict()
    experts = {n: {k: v + i for k, v in base.items()} for i, n in enumerate("abc")}
    merged = eutectic.merge_state_dicts(base, experts, method="average")
    assert torch.equal(merged["0.weight"], merged["1.weight"])
    torch.testing.assert_close(merged["0.weight"], base["0.weight"] + 1)
    model.load_state_dict(merged)


def test_strided_tensors() -> None:
    base = {"w": torch.arange(12.0).view(3, 4).T}
    experts = {"a": {"w": base["w"] + 1}, "b": {"w": (base["w"] + 2).contiguous()}}
    merged = eutectic.merge_state_dicts(base, experts, method="average")
    torch.testing.assert_close(merged["w"], base["w"] + 1.5)


@pytest.mark.parametrize("name", ["v1.bin", "model.safetensors", "a"])
def test_an_expert_may_be_named_like_a_file(name: str) -> None:
    base = make_base()
    merged = eutectic.merge_state_dicts(base, {name: make_expert(base, 1)}, method="average")
    assert set(merged) == set(base)


def test_requests_that_make_no_sense() -> None:
    base = make_base()
    experts = family(base)
    with pytest.raises(RequestError, match="not given.*'c'"):
        eutectic.merge_state_dicts(base, experts, method="average", weights={"c": 1.0})
    with pytest.raises(RecipeError, match="'densty'.*Did you mean 'density'"):
        eutectic.merge_state_dicts(base, experts, method="ties", densty=0.2)
    with pytest.raises(EutecticError, match="holds no tensors"):
        eutectic.merge_state_dicts({}, experts, method="average")
    with pytest.raises(RecipeError, match="experts"):
        eutectic.merge_state_dicts(base, {}, method="average")
    experts["a"]["layers.0.proj.weight"][0, 0] = torch.inf
    with pytest.raises(NumericalError, match=r"layers\.0\.proj\.weight: NaN or Inf in expert 'a'"):
        eutectic.merge_state_dicts(base, experts, method="iso_c")


def _polar_mean(deltas: torch.Tensor) -> torch.Tensor:
    """Iso-C of `[T, out, in]`: the mean of the singular values of the sum in place of each."""
    left, values, right = torch.linalg.svd(deltas.double().sum(0), full_matrices=False)
    return (left * values.mean()) @ right


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.0.block_sparse_moe.input_linear.weight", (3, 12, 8)),
        ("layers.0.self_attention.experts.output_linear.weight", (3, 8, 12)),
        ("layers.0.rg_lru.input_gate_weight", (3, 8, 8)),
    ],
)
def test_stacks_are_merged_matrix_by_matrix(name: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    base, *experts = (torch.randn(shape, generator=generator) for _ in range(3))
    given = {str(i): {name: tensor} for i, tensor in enumerate(experts)}
    merged = eutectic.merge_state_dicts({name: base}, given, method="iso_c", scale=1.0)
    deltas = torch.stack(experts) - base
    wanted = torch.stack([_polar_mean(deltas[:, i]) for i in range(len(base))])
    torch.testing.assert_close(merged[name] - base, wanted.float(), rtol=1e-4, atol=1e-4)


def test_a_map_with_an_axis_of_heads_is_merged_as_one() -> None:
    generator, name = torch.Generator().manual_seed(0), "layer.0.rel_attn.q"
    base, *experts = (torch.randn(8, 3, 4, generator=generator) for _ in range(3))
    given = {str(i): {name: tensor} for i, tensor in enumerate(experts)}
    merged = eutectic.merge_state_dicts({name: base}, given, method="iso_c", scale=1.0)
    wanted = _polar_mean((torch.stack(experts) - base).flatten(2)).view(8, 3, 4)
    torch.testing.assert_close(merged[name] - base, wanted.float(), rtol=1e-4, atol=1e-4)
