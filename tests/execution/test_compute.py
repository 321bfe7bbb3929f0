"""What becomes of each kind of tensor, against the formula written out.

Guards the way from files to methods: layouts (fused, stacked, transposed, kernels), types (bf16,
float64, integers), shapes (0-dim, empty), scales, ties, chunks.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eutectic
from eutectic.errors import EutecticError, RecipeError
from eutectic.execution import tensor_values
from helpers.folders import Tensors, make_base, make_expert
from helpers.merging import merge_files

ISO: dict[str, Any] = {"method": "iso_c", "scale": 0.7}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def family(base: Tensors, count: int = 3) -> dict[str, Tensors]:
    return {f"e{i}": make_expert(base, 10 + i) for i in range(count)}


def deltas(base: Tensors, experts: dict[str, Tensors], name: str) -> Tensor:
    return torch.stack([e[name].double() - base[name].double() for e in experts.values()])


def iso(base: Tensors, experts: dict[str, Tensors], name: str, stack: Tensor) -> Tensor:
    """Return what Iso-C gives for a stack of task matrices of float32 checkpoints."""
    return eutectic.merge_matrices("iso_c", stack.float(), precision="exact")


def test_a_matrix_takes_the_method_and_all_else_the_mean(tmp_path: Path) -> None:
    base = make_base()
    experts = family(base)
    merged, report = merge_files(tmp_path, base, experts, **ISO)
    for name, w in base.items():
        if not w.is_floating_point():
            assert torch.equal(merged[name], w)
            continue
        stack = deltas(base, experts, name)
        delta = iso(base, experts, name, stack) if name.endswith("proj.weight") else stack.mean(0)
        torch.testing.assert_close(merged[name], (w + 0.7 * delta).float(), rtol=1e-5, atol=1e-5)
    assert report.merged_by == {"average": 6, "copy": 1, "iso_c": 2}


@pytest.mark.parametrize(("split", "heights"), [(2, (12, 12)), ([16, 4, 4], (16, 4, 4))])
def test_a_fused_matrix_is_merged_part_by_part(
    split: Any, heights: tuple[int, ...], tmp_path: Path
) -> None:
    base = {"qkv.weight": randn(24, 10)}
    experts = family(base)
    rules = [{"match": "qkv.weight", "split": split}]
    merged, _ = merge_files(tmp_path, base, experts, **ISO, tensors=rules)
    stack = deltas(base, experts, "qkv.weight")
    parts = [iso(base, experts, "", part) for part in stack.split(heights, dim=1)]
    expected = base["qkv.weight"] + 0.7 * torch.cat(parts)
    torch.testing.assert_close(merged["qkv.weight"], expected, rtol=1e-5, atol=1e-5)


def test_conv1d_is_merged_as_out_by_in_and_split_along_its_outputs(tmp_path: Path) -> None:
    name = "h.0.attn.c_attn.weight"
    base = {name: randn(8, 24), "ln.weight": randn(8)}
    experts = family(base)
    rules = [{"match": "*c_attn.weight", "split": 3}]
    merged, _ = merge_files(
        tmp_path, base, experts, **ISO, tensors=rules, config={"model_type": "gpt2"}
    )
    stack = deltas(base, experts, name).mT
    parts = [iso(base, experts, "", part) for part in stack.split(8, dim=1)]
    expected = base[name] + 0.7 * torch.cat(parts).mT
    torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-5)


def test_stacked_experts_are_merged_matrix_by_matrix_and_split_along_rows(tmp_path: Path) -> None:
    base = {"mlp.experts.gate_up_proj": randn(3, 12, 5), "mlp.experts.down_proj": randn(3, 5, 6)}
    experts = family(base)
    rules = [{"match": "*gate_up_proj", "split": 2}]
    merged, _ = merge_files(tmp_path, base, experts, **ISO, tensors=rules)
    for name, height in (("mlp.experts.gate_up_proj", 6), ("mlp.experts.down_proj", 5)):
        stack = deltas(base, experts, name)
        for i in range(3):
            parts = [iso(base, experts, "", p) for p in stack[:, i].split(height, dim=1)]
            expected = base[name][i] + 0.7 * torch.cat(parts)
            torch.testing.assert_close(merged[name][i], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 3, 4, 4), (8, 6, 3)])
@pytest.mark.parametrize("split", [None, 2])
def test_a_kernel_is_a_matrix_where_a_rule_says_so(
    shape: tuple[int, ...], split: int | None, tmp_path: Path
) -> None:
    base = {"conv.weight": randn(*shape), "w": randn(4, 4)}
    experts = family(base)
    rule: dict[str, Any] = {"match": "conv.*", "treatment": "matrix"}
    if split:
        rule["split"] = split
    merged, report = merge_files(tmp_path, base, experts, **ISO, tensors=[rule])
    stack = deltas(base, experts, "conv.weight").flatten(2)
    parts = [iso(base, experts, "", p) for p in stack.split(shape[0] // (split or 1), dim=1)]
    expected = base["conv.weight"] + 0.7 * torch.cat(parts).view(shape)
    torch.testing.assert_close(merged["conv.weight"], expected, rtol=1e-5, atol=1e-5)
    assert report.tensors == {"matrix": 2}


def test_float64_inputs_are_computed_and_kept_in_float64(tmp_path: Path) -> None:
    base = {"w": randn(6, 5).double(), "v": randn(7).double()}
    experts = family(base)
    for tensors in experts.values():
        tensors["v"] += 1e-12  # below the resolution of float32
    merged, _ = merge_files(tmp_path, base, experts, method="task_arithmetic", scale=0.5)
    for name, w in base.items():
        expected = w + 0.5 * deltas(base, experts, name).sum(0)
        assert merged[name].dtype == torch.float64
        torch.testing.assert_close(merged[name], expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    base = {"w": randn(6, 5).to(dtype), "v": randn(7).to(dtype)}
    experts = family(base)
    merged, _ = merge_files(tmp_path, base, experts, method="task_arithmetic", scale=0.3)
    for name, w in base.items():
        # Differences and sums of few half-precision numbers of like size are exact in float64, so
        # the float32 result may differ from the true one by its own rounding alone.
        exact = w.double() + 0.3 * deltas(base, experts, name).sum(0)
        assert merged[name].dtype == dtype
        assert ((merged[name].double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs()).all()


def test_an_expert_in_another_float_type_is_welcome(tmp_path: Path) -> None:
    base = {"w": randn(6, 5).bfloat16()}
    experts = {"half": {"w": randn(6, 5, seed=1).half()}, "full": {"w": randn(6, 5, seed=2)}}
    merged, _ = merge_files(tmp_path, base, experts, method="average")
    expected = torch.stack([e["w"].float() for e in experts.values()]).mean(0)
    assert torch.equal(merged["w"], expected.bfloat16())


@pytest.mark.parametrize("method", [m for m in eutectic.methods() if m not in ("esm",)])
def test_scalars_and_empty_tensors_pass_through_every_method(method: str, tmp_path: Path) -> None:
    base = {"w": randn(6, 5), "scale": randn(1)[0], "empty": torch.zeros(0, 4), "one": randn(1)}
    experts = family(base, min(2, eutectic.methods()[method]["experts"][1] or 2))
    merged, _ = merge_files(tmp_path, base, experts, method=method, scale=1.0, fallback="allow")
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in base.items()}
    assert all(torch.isfinite(t).all() for t in merged.values())


def test_buffers_are_copied_and_must_agree(tmp_path: Path) -> None:
    base = {"w": randn(4, 4), "ids": torch.arange(5), "mask": torch.tensor([True, False])}
    experts = family(base, 2)
    merged, _ = merge_files(tmp_path / "same", base, experts, method="average")
    assert torch.equal(merged["ids"], base["ids"])
    assert torch.equal(merged["mask"], base["mask"])
    experts["e1"]["mask"] = torch.tensor([True, True])
    with pytest.raises(EutecticError, match=r"mask: .*'e1'.*\n.*treatment head"):
        merge_files(tmp_path / "other", base, experts, method="average")


@pytest.mark.parametrize("method", ["dare_ties", "dare_linear", "ties", "average"])
def test_tables_stored_twice_stay_equal(method: str, tmp_path: Path) -> None:
    base = make_base()
    base["lm_head.weight"] = base["embed_tokens.weight"].clone()
    experts = family(base)
    for tensors in experts.values():
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"].clone()
    merged, _ = merge_files(tmp_path, base, experts, method=method)
    assert torch.equal(merged["lm_head.weight"], merged["embed_tokens.weight"])
    assert not torch.equal(merged["lm_head.weight"], base["lm_head.weight"])


@pytest.mark.parametrize("missing", ["base", "available"])
@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "iso_c", "linear"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_tensor_that_an_expert_lacks(
    missing: str, method: str, scale: float, tmp_path: Path
) -> None:
    base = {"w": randn(6, 5), "v": randn(9)}
    experts = family(base)
    whole = {n: {k: v.clone() for k, v in e.items()} for n, e in experts.items()}
    del experts["e1"]["w"], experts["e2"]["v"]
    if missing == "base":
        whole["e1"]["w"], whole["e2"]["v"] = base["w"].clone(), base["v"].clone()
    expected = {}
    for name in base:
        own = {n: e for n, e in whole.items() if missing == "base" or name in experts[n]}
        expected[name] = eutectic.merge_state_dicts(
            {name: base[name]},
            {n: {name: e[name]} for n, e in own.items()},
            method=method,
            scale=scale,
        )[name]
    merged, report = merge_files(
        tmp_path, base, experts, method=method, scale=scale, missing=missing
    )
    for name in base:
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-6, atol=1e-6)
    assert any("lacks" in note for note in report.notes)


def test_a_threshold_over_the_model_counts_a_missing_tensor_as_unchanged(tmp_path: Path) -> None:
    base = {"w": randn(6, 5), "v": randn(9)}
    experts = family(base)
    del experts["e1"]["w"]
    options: dict[str, Any] = {"method": "ties", "scope": "model", "density": 1.0}
    merged, _ = merge_files(tmp_path / "base", base, experts, **options, missing="base")
    stack = deltas(base, experts, "v")
    elected = stack.sum(0).sign()
    agree = (stack.sign() == elected).double()
    expected = base["v"] + ((stack * agree).sum(0) / agree.sum(0)).float()
    torch.testing.assert_close(merged["v"], expected)
    with pytest.raises(RecipeError, match="the whole model at once.*lacks w.*missing: base"):
        merge_files(tmp_path / "available", base, experts, **options, missing="available")


def test_a_missing_tensor_is_an_error_unless_told_otherwise(tmp_path: Path) -> None:
    base = {"w": randn(6, 5), "v": randn(9)}
    experts = family(base)
    del experts["e1"]["w"]
    with pytest.raises(RecipeError, match=r"w: missing from e1.*missing: base"):
        merge_files(tmp_path, base, experts, method="average")


def test_a_tensor_that_no_expert_has_is_copied_and_told(tmp_path: Path) -> None:
    base = {"w": randn(6, 5), "v": randn(9)}
    experts = family(base)
    for tensors in experts.values():
        del tensors["v"]
    merged, report = merge_files(tmp_path, base, experts, method="average")
    assert torch.equal(merged["v"], base["v"])
    assert any("no expert has them: v" in note for note in report.notes)


def test_scale_rules_and_scale_for_matrices_alone(tmp_path: Path) -> None:
    base = {"a.weight": randn(6, 5), "b.weight": randn(6, 5), "v": randn(9), "u": randn(9)}
    experts = family(base)
    rules = [{"match": "a.*", "scale": 0.25}, {"match": "u", "scale": 2.0}]
    merged, _ = merge_files(
        tmp_path,
        base,
        experts,
        method="task_arithmetic",
        scale=0.5,
        scale_tensors="matrix",
        tensors=rules,
    )
    for name, alpha in {"a.weight": 0.25, "b.weight": 0.5, "v": 1.0, "u": 2.0}.items():
        expected = base[name] + alpha * deltas(base, experts, name).sum(0)
        torch.testing.assert_close(merged[name], expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["average", "linear", "slerp"])
def test_methods_over_weights_interpolate_from_the_base(method: str, tmp_path: Path) -> None:
    base = {"w": randn(6, 5), "v": randn(9)}
    experts = family(base, 2)
    full, _ = merge_files(tmp_path / "full", base, experts, method=method)
    half, _ = merge_files(tmp_path / "half", base, experts, method=method, scale=0.5)
    for name, w in base.items():
        torch.testing.assert_close(half[name], (w + full[name]) / 2, rtol=1e-6, atol=1e-6)


def test_an_overflow_of_the_output_type_is_not_written_silently(tmp_path: Path) -> None:
    base = {"w": torch.full((4, 4), 60000.0)}
    experts = {"a": {"w": torch.full((4, 4), 64000.0)}, "b": {"w": torch.full((4, 4), 64000.0)}}
    with pytest.raises(EutecticError, match=r"w: .*float16"):
        merge_files(tmp_path, base, experts, method="task_arithmetic", scale=1.0, dtype="float16")


@pytest.mark.parametrize("method", ["average", "linear", "task_arithmetic", "iso_c"])
def test_nan_in_the_base_is_named_where_it_would_spread(method: str, tmp_path: Path) -> None:
    base = {"w": randn(4, 4)}
    experts = family(base, 2)
    base["w"][1, 2] = math.nan
    with pytest.raises(EutecticError, match=r"w: NaN or Inf in the base"):
        merge_files(tmp_path, base, experts, method=method, scale=0.5)


ELEMENTWISE = [
    ("average", {}),
    ("linear", {"normalize": False}),
    ("task_arithmetic", {}),
    ("ties", {"scope": "tensor"}),
    ("ties", {"scope": "model"}),
    ("ties", {"scope": "model", "density": 0.5, "aggregate": "sum"}),
    ("dare_linear", {"density": 0.3}),
    ("dare_ties", {"density": 0.3}),
    ("dare_ties", {"density": 0.3, "rescale": "l1", "consensus": "weighted"}),
    ("ties", {"rescale": "l1", "consensus": "weighted", "keep_at_least": 1}),
    ("breadcrumbs", {"density": 0.4, "gamma": 0.1, "rescale": "l1"}),
    ("della_linear", {}),
    ("della", {"rescale": "l1"}),
    ("model_stock", {"filter_wise": True}),
    ("ram", {"epsilon": 0.05}),
    ("ramplus_tl", {"epsilon": 0.05}),
    ("sce", {"select_topk": 0.4}),
]


@pytest.mark.parametrize(("method", "parameters"), ELEMENTWISE)
@pytest.mark.parametrize("experts", [2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_do_not_change_a_byte(
    method: str,
    parameters: dict[str, Any],
    experts: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = {name: w.to(dtype) for name, w in make_base(width=24).items() if w.is_floating_point()}
    others = family(base, experts)
    weights = {name: 0.3 + 0.1 * i for i, name in enumerate(others)}
    options: dict[str, Any] = {"method": method, "scale": 0.9, "weights": weights, **parameters}
    whole = eutectic.merge_state_dicts(base, others, **options)
    for size in (37, 256):
        monkeypatch.setattr(tensor_values, "CHUNK", size)
        chunked = eutectic.merge_state_dicts(base, others, **options)
        assert all(torch.equal(chunked[name], whole[name]) for name in base)


SUMMED = [
    ("slerp", {}),
    ("nuslerp", {}),
    ("nuslerp", {"vectors": "rows"}),
    ("nuslerp", {"vectors": "columns"}),
    ("multislerp", {}),
    ("karcher", {}),
    ("model_stock", {}),
    ("arcee_fusion", {}),
    ("nearswap", {"t": 0.05}),
    ("passthrough", {"scale": 0.7}),
]


@pytest.mark.parametrize(("method", "parameters"), SUMMED)
def test_chunks_change_sums_by_rounding_alone(
    method: str, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base()
    others = family(base, eutectic.methods()[method]["experts"][1] or 3)
    options: dict[str, Any] = {"method": method, "scale": 1.0, **parameters}
    whole = eutectic.merge_state_dicts(base, others, **options)
    for size in (41, 10**6):
        monkeypatch.setattr(tensor_values, "CHUNK", size)
        chunked = eutectic.merge_state_dicts(base, others, **options)
        for name in base:
            torch.testing.assert_close(chunked[name], whole[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("arcee_fusion", {}),
        ("della_linear", {"epsilon": 0.1}),
        ("nuslerp", {"vectors": "columns"}),
        ("model_stock", {"filter_wise": True}),
        ("karcher", {}),
        ("sce", {"select_topk": 0.5}),
    ],
)
def test_the_engine_and_the_entry_in_memory_agree(
    method: str, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_values, "CHUNK", 60)
    base = {"w": randn(9, 14), "v": randn(30)}
    others = family(base, eutectic.methods()[method]["experts"][1] or 3)
    merged = eutectic.merge_state_dicts(base, others, method=method, scale=1.0, **parameters)
    for name, w in base.items():
        stack = torch.stack([e[name] - w for e in others.values()])
        delta = eutectic.merge_matrices(
            method, stack, base=w, tensor=name, experts=list(others), **parameters
        )
        torch.testing.assert_close(merged[name], w + delta, rtol=1e-5, atol=1e-6)
