"""Guards what follows a merge: it sees the method's own result, whatever way that is made."""

from __future__ import annotations

import json
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eutectic
from eutectic.errors import EutecticError, RequestError
from eutectic.execution.planned import plan
from eutectic.types import LayerStatistics
from helpers.cli import invoke
from helpers.folders import save

LAYERS = {"layer.0.weight": (12, 20), "layer.1.weight": (20, 12), "layer.0.bias": (12,)}


def randn(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


BASE = {name: randn(*shape, seed=1) for name, shape in LAYERS.items()}
EXPERTS = {
    owner: {n: t + 0.1 * randn(*t.shape, seed=seed) for n, t in BASE.items()}
    for seed, owner in enumerate(["a", "b", "c"], 5)
}


def calibrated(merged: Tensor, deltas: Tensor, grams: list[Tensor] | None = None) -> Tensor:
    """SVC by its formula, direction by direction."""
    merged, deltas = merged.double(), deltas.double()
    grams = grams or [torch.eye(deltas.shape[2], dtype=torch.float64)] * len(deltas)
    result = merged.clone()
    for u in torch.linalg.svd(merged, full_matrices=False)[0].mT:
        parts = [
            float((u @ merged) @ gram @ (u @ d) / ((u @ d) @ gram @ (u @ d)))
            for d, gram in zip(deltas, grams, strict=True)
        ]
        gamma = sum(max(1 / len(deltas), part) for part in parts) / len(deltas)
        result += torch.outer(u, u @ merged) * (1 / gamma - 1)
    return result


def of_all(name: str) -> Tensor:
    return torch.stack([expert[name] - BASE[name] for expert in EXPERTS.values()])


METHODS: list[dict[str, Any]] = [
    {"method": "task_arithmetic"},
    {"method": "ties", "scope": "model"},  # in chunks, and looks at the whole model
    {"method": "dare_linear", "density": 0.5},
    {"method": "average"},  # gives weights
    {"method": "tsv_m"},
    {"method": "regmean", "fallback": "allow"},  # falls back
]


@pytest.mark.parametrize("asked", METHODS, ids=lambda asked: asked["method"])
def test_any_method_is_followed(asked: dict[str, Any]) -> None:
    with pytest.warns() if asked["method"] == "regmean" else nullcontext():
        plain = eutectic.merge_state_dicts(BASE, EXPERTS, scale=1.0, **asked)
        found = eutectic.merge_state_dicts(BASE, EXPERTS, post="svc", **asked)  # scale 1 by default
    for name, before in plain.items():
        if before.ndim == 1:
            assert torch.equal(found[name], before)
            continue
        expected = calibrated(before - BASE[name], of_all(name))
        assert float((found[name] - BASE[name] - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
@pytest.mark.parametrize("split", [None, [5, 7]])
def test_parts_of_fused_matrices_are_followed_one_by_one(method: str, split: Any) -> None:
    rules = [] if split is None else [{"match": "layer.0.weight", "split": split}]
    options: dict[str, Any] = {"method": method, "tensors": rules, "scale": 1.0}
    name = "layer.0.weight"
    before = eutectic.merge_state_dicts(BASE, EXPERTS, **options)[name] - BASE[name]
    found = eutectic.merge_state_dicts(BASE, EXPERTS, post="svc", **options)[name] - BASE[name]
    parts = [calibrated(before, of_all(name))]
    if split:
        deltas = of_all(name)
        parts = [calibrated(before[r], deltas[:, r]) for r in (slice(0, 5), slice(5, 12))]
    expected = torch.cat(parts)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_transposed_layers_and_the_inputs_metric() -> None:
    """GPT-2 keeps [in, out]; outputs are columns there."""
    name = "transformer.h.0.mlp.c_fc.weight"
    base = {name: randn(8, 12, seed=0)}
    experts = {o: {name: base[name] + 0.1 * randn(8, 12, seed=s)} for s, o in enumerate("ab", 3)}
    inputs = [randn(30, 8, seed=s).double() for s in (11, 12)]
    statistics = {
        o: {name: LayerStatistics(gram=x.T @ x, count=30)}
        for o, x in zip(experts, inputs, strict=True)
    }
    options: dict[str, Any] = {
        "method": "tsv_m",
        "scale": 1.0,
        "config": {"model_type": "gpt2"},
        "statistics": statistics,
    }
    post = {"method": "svc", "metric": "inputs"}
    before = eutectic.merge_state_dicts(base, experts, **options)[name] - base[name]
    found = eutectic.merge_state_dicts(base, experts, post=post, **options)[name] - base[name]
    deltas = torch.stack([(e[name] - base[name]).mT for e in experts.values()])
    expected = calibrated(before.mT, deltas, [x.T @ x / 30 for x in inputs]).mT
    assert float((found - expected).norm() / expected.norm()) < 1e-4


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Any]:
    paths = {name: save(tmp_path / name, tensors) for name, tensors in EXPERTS.items()}
    return {"base": save(tmp_path / "base", BASE), "experts": paths}


def test_weights_that_it_cannot_have_are_refused_before_any_work(
    folders: dict[str, Any], tmp_path: Path
) -> None:
    first = next(iter(folders["experts"]))  # a bias comes first, of the same method and weights
    folders["experts"][first] = {"path": folders["experts"][first], "weight": -1.0}
    with pytest.raises(EutecticError, match="layer.0.weight: .*weights of at least 0"):
        plan(**folders, method="task_arithmetic", post="svc")
    with pytest.raises(EutecticError, match="weights of at least 0"):
        eutectic.merge(
            **folders, method="task_arithmetic", post="svc", output=tmp_path / "new" / "out"
        )
    assert not (tmp_path / "new").exists()
    # The same of parameters: those of single tensors are checked beside those of all.
    del folders["experts"][first]["weight"]
    rule = {"match": "layer.1.weight", "parameters": {"filter": "cut", "tau": 2.0}}
    with pytest.raises(EutecticError, match="layer.1.weight: tau is of filter 'flow'"):
        plan(**folders, method="flow", parameters={"gram": "task"}, tensors=[rule])


def test_files_plan_and_what_is_written(folders: dict[str, Any], tmp_path: Path) -> None:
    report = eutectic.merge(**folders, method="ties", post="svc", output=tmp_path / "out")
    assert report.post == "svc" and report.scale == 1.0
    in_memory = eutectic.merge_state_dicts(BASE, EXPERTS, method="ties", post="svc")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], in_memory[name]) for name in LAYERS)
    told = json.loads((tmp_path / "out" / "eutectic.json").read_text())
    assert told["recipe"]["post"] == "svc"
    assert told["tensors"]["layer.0.weight"]["post"] == "svc"
    assert "post" not in told["tensors"]["layer.0.bias"]
    assert 0.3 < told["records"]["layer.0.weight"]["matrix"]["svc"]["mean_factor"] < 3
    assert "followed by `svc`" in (tmp_path / "out" / "README.md").read_text()
    written = invoke("report", tmp_path / "out", "-o", tmp_path / "page.json")
    page = json.loads((tmp_path / "page.json").read_text())
    assert written.code == 0
    shown = {t["name"]: t["method"] for t in page["tensors"]}
    assert shown["layer.0.weight"] == "ties + svc" and shown["layer.0.bias"] == "ties"
    planned = plan(**folders, method="iso_c", post="svc")
    rows = {row["name"]: row["merged_by"] for row in planned.tensors}
    assert rows["layer.0.weight"] == "iso_c + svc" and rows["layer.0.bias"] == "average"
    assert planned.named == "iso_c + svc" and planned.scale == 1.0
    alone = plan(**folders, method="iso_c")
    assert planned.cost["read_bytes"] > alone.cost["read_bytes"]


def test_the_command(folders: dict[str, Any], tmp_path: Path) -> None:
    asked = ["--base", str(folders["base"]), "-m", "iso_c", *map(str, folders["experts"].values())]
    shown = invoke("plan", *asked, "--post", "svc:directions=sum")
    assert "iso_c + svc" in shown.out and "scale 1:" in shown.out
    done = invoke("merge", *asked, "--post", "svc:directions=sum", "-o", str(tmp_path / "out"))
    assert done.code == 0 and "iso_c + svc" in done.out
    tuned = invoke("tune", *asked, "--post", "svc", "--search", "norm", "--json")
    assert json.loads(tuned.out)["scale"] > 0
    wrong = invoke("merge", *asked, "--post", "svk", "-o", str(tmp_path / "other"))
    assert wrong.code == 2 and "--post: unknown post-processor 'svk'" in wrong.err
    page = invoke("methods", "svc")
    assert "directions" in page.out and "2602.05536" in page.out
    assert "--post" in invoke("methods").out


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"post": "svg"}, "did you mean 'svc'|Did you mean"),
        ({"post": {"method": "svc", "metrik": "inputs"}}, "unknown parameter 'metrik'"),
        ({"post": "svc:metric=outputs"}, "post.metric: .*'outputs'"),
        ({"post": "svc:metric"}, "must have the form"),
        ({"post": {"metric": "inputs"}}, "names no post-processor"),
        ({"post": 3}, "a name, or"),
        ({"post": "svc:metric=inputs"}, "statistics of every expert .gram., and a, b, c have"),
        ({"method": "svc"}, "it follows one"),
        ({"post": "svc", "weights": {"a": -1.0}}, "weights of at least 0"),
        ({"base": None, "method": "linear", "post": "svc"}, "works on changes of a base"),
    ],
)
def test_refusals(folders: dict[str, Any], said: dict[str, Any], message: str) -> None:
    weights = said.pop("weights", {})
    experts = {
        n: {"path": str(p), "weight": weights.get(n, 1.0)} for n, p in folders["experts"].items()
    }
    with pytest.raises(RequestError, match=message):
        plan(**{"base": folders["base"], "experts": experts, "method": "iso_c", **said})


def test_lines_of_a_recipe(folders: dict[str, Any], tmp_path: Path) -> None:
    listed = "".join(f"  {name}: {path}\n" for name, path in folders["experts"].items())
    text = f"base: {folders['base']}\nmethod: iso_c\nexperts:\n{listed}"
    (tmp_path / "recipe.yaml").write_text(text + "post:\n  method: svc\n  metric: none\n")
    with pytest.raises(RequestError, match=r"recipe.yaml:9|line 9"):
        plan(tmp_path / "recipe.yaml")


def test_a_plan_can_be_pickled(folders: dict[str, Any]) -> None:
    from eutectic.methods import as_post

    post = as_post({"method": "svc", "metric": "inputs"})
    assert pickle.loads(pickle.dumps(post)) == post


# Adapters


SIDES = {"q_proj": (40, 30), "o_proj": (30, 40)}


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, Any]:
    base = {f"model.layers.0.self_attn.{n}.weight": randn(*s, seed=2) for n, s in SIDES.items()}
    experts: dict[str, str] = {}
    for seed, (name, rank) in enumerate({"a": 2, "b": 3, "c": 4}.items(), 20):
        folder = tmp_path / name
        folder.mkdir()
        tensors: dict[str, Tensor] = {}
        for own, (out, width) in SIDES.items():
            key = f"base_model.model.model.layers.0.self_attn.{own}"
            tensors[f"{key}.lora_A.weight"] = randn(rank, width, seed=seed)
            tensors[f"{key}.lora_B.weight"] = randn(out, rank, seed=seed + 50)
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
        config["target_modules"] = [*SIDES]
        (folder / "adapter_config.json").write_text(json.dumps(config))
        experts[name] = str(folder)
    return {"base": save(tmp_path / "base", base, {"model_type": "none"}), "experts": experts}


@pytest.mark.parametrize("method", ["core_ties", "tsv_m", "task_arithmetic", "knots_ties"])
@pytest.mark.parametrize("adapter", [{}, {"rank": 4, "compress": "before"}], ids=["whole", "at 4"])
def test_adapters_of_thin_factors(
    adapters: dict[str, Any], tmp_path: Path, method: str, adapter: dict[str, Any]
) -> None:
    """The adapter holds what the model would, at no more directions than the merge has."""
    report = eutectic.merge(
        **adapters, method=method, post="svc", adapter=adapter, output=tmp_path / "adapter"
    )
    plain = eutectic.merge(
        **adapters, method=method, adapter=adapter, scale=1.0, output=tmp_path / "plain"
    )
    deltas = {n: load_file(Path(p) / "adapter_model.safetensors") for n, p in
              adapters["experts"].items()}  # fmt: skip
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    before = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    for key in (k for k in found if "lora_A" in k):
        own = found[key.replace("lora_A", "lora_B")].double() @ found[key].double()
        merged = before[key.replace("lora_A", "lora_B")].double() @ before[key].double()
        stack = torch.stack([d[key.replace("lora_A", "lora_B")].double() @ d[key].double()
                             for d in deltas.values()])  # fmt: skip
        U, S, Vh = torch.linalg.svd(merged, full_matrices=False)
        kept = int((S > 1e-5 * S[0]).sum())
        result = merged.clone()
        for u in U[:, :kept].mT:
            ratios = [max(1 / 3, float((u @ merged) @ (u @ d) / (u @ d).square().sum()))
                      for d in stack if (u @ d).norm() > 1e-6 * d.norm()]  # fmt: skip
            result += torch.outer(u, u @ merged) * (len(ratios) / sum(ratios) - 1)
        assert float((own - result).norm() / result.norm()) < 1e-3
        assert found[key].shape[0] <= before[key].shape[0]
    told = report.records["model.layers.0.self_attn.q_proj.weight"]
    assert told["adapter"]["rank"] <= 9 and "svc" in told["matrix"]
    assert plain.post is None
