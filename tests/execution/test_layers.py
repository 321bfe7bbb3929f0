"""Factors between layers (ESM): a fused matrix gives what its parts give when stored apart."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import eutectic
from eutectic.errors import NumericalError
from eutectic.execution import tensor_values
from eutectic.statistics import collect, load_statistics
from eutectic.types import LayerStatistics
from helpers.folders import load
from helpers.merging import save_inputs

PARTS = "qkv"
RISE = torch.tensor([1.0, 3.0, 9.0]).repeat_interleave(8)[:, None]  # q, k and v grow differently


def apart(fused: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.replace("qkv", part): w[8 * i : 8 * i + 8]
        for name, w in fused.items()
        for i, part in enumerate(PARTS)
    }


@pytest.mark.parametrize("preset", ["vit", "roberta"])
@pytest.mark.parametrize("chunk", [1 << 17, 37])
def test_fused_and_separate_matrices_are_scaled_alike(
    preset: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_values, "CHUNK", chunk)
    g = torch.Generator().manual_seed(1)
    names = [f"h.{i}.qkv.weight" for i in range(3)]
    base = {name: torch.randn(24, 8, generator=g) for name in names}
    experts = {
        e: {n: w + 0.1 * RISE**i * torch.randn(24, 8, generator=g)
            for i, (n, w) in enumerate(base.items())}
        for e in "ab"
    }  # fmt: skip

    def seen() -> LayerStatistics:
        x = torch.randn(50, 8, generator=g, dtype=torch.float64)
        return LayerStatistics(gram=x.T @ x, count=50)

    statistics = {e: {name: seen() for name in names} for e in "ab"}
    options = {"method": "esm", "preset": preset, "scale": 1.0}
    fused = eutectic.merge_state_dicts(
        base, experts, statistics=statistics, tensors=[{"match": "*qkv*", "split": 3}], **options
    )
    separate = eutectic.merge_state_dicts(
        apart(base),
        {e: apart(w) for e, w in experts.items()},
        statistics={
            e: {n.replace("qkv", p): s for n, s in own.items() for p in PARTS}
            for e, own in statistics.items()
        },
        **options,
    )
    for name, w in apart(fused).items():
        torch.testing.assert_close(w, separate[name], rtol=1e-6, atol=1e-6)


def test_an_indefinite_gram_names_the_part_it_belongs_to() -> None:
    base = {"qkv.weight": torch.zeros(24, 4)}
    experts = {e: {"qkv.weight": torch.full((24, 4), v)} for e, v in (("a", 1.0), ("b", 2.0))}
    gram = torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0]))
    statistics = {e: {"qkv.weight": LayerStatistics(gram=gram, count=4)} for e in experts}
    rules = [{"match": "*qkv*", "split": 3}]
    with pytest.raises(NumericalError, match=r"^qkv\.weight\[0\], .*negative sums of squares"):
        eutectic.merge_state_dicts(
            base, experts, method="regmean", statistics=statistics, tensors=rules, threads=1
        )


class Blocks(nn.Module):
    """Three residual blocks of a fused q/k/v, an output projection and two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(
            nn.ModuleDict(
                {
                    "qkv": nn.Linear(12, 36),
                    "out": nn.Linear(12, 12, bias=False),
                    "fc": nn.Linear(12, 20),
                    "proj": nn.Linear(20, 12),
                }
            )
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            q, k, v = block["qkv"](x).chunk(3, -1)
            x = x + block["out"](torch.tanh(q * k) + v)
            x = x + block["proj"](block["fc"](x).relu())
        return x


def svd(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(M, full_matrices=False)


def naive_esm(deltas: list[Tensor], X: list[Tensor], powers: dict[str, float]) -> Tensor:
    """Steps 1 to 5, by SVDs of the activation shifts."""
    experts = len(deltas)
    k = max(1, int(deltas[0].shape[0] / experts))
    mean = sum(float(d.norm()) for d in deltas) / experts
    left, right = [], []
    for delta, x in zip(deltas, X, strict=True):
        _, S, Vh = svd(x @ delta.T)
        E, eigenvalues = Vh[:k].T, S[:k] ** 2
        C = (E.T @ delta) * (float(delta.norm()) / mean) ** powers["task"]
        s = (eigenvalues / eigenvalues.mean()) ** powers["eigenvalue"]
        s = s / s.mean()
        left.append(E * s)
        right.append(C * s[:, None])
    E, C = torch.cat(left, 1), torch.cat(right)
    lengths = C.norm(dim=0)
    C = C * (lengths / lengths.mean()) ** powers["column"]
    (Ue, Se, Ve), (Uc, Sc, Vc) = svd(E), svd(C)
    return powers["factor"] * (Se.mean() * Ue @ Ve) @ (Sc.mean() * Uc @ Vc)


def naive_tsv_m(deltas: list[Tensor]) -> Tensor:
    k = min(deltas[0].shape) // len(deltas)
    U, S, V = zip(*((u[:, :k], s[:k], vh[:k].T) for u, s, vh in map(svd, deltas)), strict=True)
    polar = [a @ b for a, _, b in (svd(torch.cat(x, 1)) for x in (U, V))]
    return polar[0] * torch.cat(S) @ polar[1].T


POWERS = {
    "vit": {"task": 2.0, "eigenvalue": 0.15, "column": 2.0, "layer": 2.0, "factor": 2.0},
    "roberta": {"task": 0.0, "eigenvalue": 0.15, "column": 0.0, "layer": 2.0, "factor": 1.0},
}


def naive_merge(
    base: nn.Module, experts: list[nn.Module], data: list[Tensor], preset: str, alpha: float
) -> dict[str, Tensor]:
    """Every weight of the merged model in float64; `h.1.out` has no statistics."""
    seen = [inputs_of(model, x) for model, x in zip(experts, data, strict=True)]
    own = [{n: p.detach().double() for n, p in m.named_parameters()} for m in experts]
    start = {n: p.detach().double() for n, p in base.named_parameters()}
    merged: dict[str, Tensor] = {}
    for name, weight in start.items():
        deltas = [w[name] - weight for w in own]
        if weight.ndim == 1:
            merged[f"{name}[0]"] = sum(deltas) / len(deltas)
        elif name == "h.1.out.weight":
            merged[f"{name}[0]"] = naive_tsv_m(deltas)
        else:
            X = [s[name.removesuffix(".weight")] for s in seen]
            for part, rows in enumerate(range(0, len(weight), 12 if "qkv" in name else 99)):
                cut = [d[rows : rows + 12] if "qkv" in name else d for d in deltas]
                merged[f"{name}[{part}]"] = naive_esm(cut, X, POWERS[preset])
    groups: dict[str, list[str]] = {}
    for name, delta in merged.items():
        if delta.ndim == 2:
            groups.setdefault(name[4:], []).append(name)
    assert [len(members) for members in groups.values()] == [3] * 6
    for members in groups.values():
        norms = {name: float(merged[name].norm()) for name in members}
        mean = sum(norms.values()) / len(norms)
        for name in members:
            merged[name] = merged[name] * (norms[name] / mean) ** POWERS[preset]["layer"]
    return {
        name: weight
        + alpha * torch.cat([d for key, d in merged.items() if key.partition("[")[0] == name])
        for name, weight in start.items()
    }


def inputs_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The rows that reach every matrix, in float64."""
    seen: dict[str, Tensor] = {}
    wide = copy.deepcopy(model).double()
    for path, module in wide.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda module, args, path=path: seen.update({path: args[0].detach()})
            )
    wide(x.double())
    return seen


@pytest.mark.parametrize("preset", ["vit", "roberta"])
@pytest.mark.parametrize("entry", ["memory", "files"])
def test_layers_of_a_model_against_a_naive_transcription(
    preset: str, entry: str, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    base = Blocks()
    experts = [copy.deepcopy(base) for _ in range(3)]
    for t, model in enumerate(experts):
        for name, p in model.named_parameters():
            depth = 1.0 + int(name[2])  # like layers differ, so that the factor between them acts
            p.data.add_(0.02 * (1 + t) * depth * torch.randn_like(p))
    data = [torch.randn(60, 12) @ torch.randn(12, 12) for _ in experts]
    names = [f"e{t}" for t in range(3)]
    files = {n: tmp_path / f"{n}.stats.safetensors" for n in names}
    layers = [n for n, p in base.named_parameters() if p.ndim == 2 and n != "h.1.out.weight"]
    for t, file in enumerate(files.values()):
        collect(experts[t], [data[t]], file, layers=layers, dtype=torch.float64)
    options = {
        "method": "esm",
        "preset": preset,
        "scale": 0.7,
        "tensors": [{"match": "*qkv.weight", "split": 3}],
    }
    weights = {n: model.state_dict() for n, model in zip(names, experts, strict=True)}
    if entry == "memory":
        statistics = {n: load_statistics(file) for n, file in files.items()}
        merged = eutectic.merge_state_dicts(
            base.state_dict(), weights, statistics=statistics, **options
        )
    else:
        inputs = save_inputs(tmp_path, base.state_dict(), weights)
        specs = {n: {"path": p, "statistics": files[n]} for n, p in inputs["experts"].items()}
        report = eutectic.merge(
            base=inputs["base"], experts=specs, output=tmp_path / "merged", **options
        )
        merged = load(tmp_path / "merged")
        assert report.merged_by == {"esm": 11, "tsv_m": 1, "average": 9}
    start = base.state_dict()
    for name, expected in naive_merge(base, experts, data, preset, 0.7).items():
        delta, wanted = merged[name].double() - start[name], expected - start[name]
        assert float((delta - wanted).norm()) < 1e-4 * float(wanted.norm()), name
