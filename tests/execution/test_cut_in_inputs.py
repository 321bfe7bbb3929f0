"""Guards adapters that are cut in the metric of the inputs: what they hold, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eutectic
from eutectic.errors import RecipeError, RequestError
from eutectic.execution.input_moments import RIDGE
from eutectic.statistics.statistics_file import StatisticsFile
from helpers.cli import invoke

from .test_compress_before import base, changes, experts, module

__all__ = ["base", "experts"]
SHAPES = {"q_proj": (16, 12), "down_proj": (12, 20)}
KINDS = ["dense", "factor", "factor and diagonal"]


def write_statistics(path: Path, seed: int, kind: str, names: list[str]) -> dict[str, Tensor]:
    """Write statistics of inputs of falling variance, and return second moments by module."""
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name in names:
        out, width = SHAPES[name]
        count = 40 if kind == "dense" else 5
        x = torch.randn(count, width, generator=generator) * 0.7 ** torch.arange(width)
        x = x.roll(3 * seed, 1)
        own, gram = f"{module(name)}.weight", x.mT @ x
        layers[own] = {"count": count, "sample_count": count, "shape": [1, width]}
        layers[own] |= {"parameter": [out, width], "inputs": own, "same_as": own}
        if kind == "dense":
            tensors[f"{own}/gram"] = gram
        else:
            tensors[f"{own}/gram_factor"] = x
        if kind == "factor and diagonal":
            diagonal = torch.rand(width, generator=generator)
            tensors[f"{own}/gram_diagonal"] = diagonal
            gram = gram + diagonal.diag()
        moments[module(name)] = gram.double() / count
    record = {"format": 1, "data": {"rows": 40}, "checkpoint": {"fingerprint": "unknown"}}
    StatisticsFile({**record, "settings": {}, "layers": layers}, tensors).save(path)
    return moments


def with_statistics(
    folder: Path,
    paths: dict[str, str],
    kind: str = "dense",
    names: list[str] | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return experts with statistics, and C of each module."""
    told: dict[str, Any] = {}
    parts: list[dict[str, Tensor]] = []
    for number, (name, path) in enumerate(paths.items(), seed):
        file = folder / f"{name}.stats"
        parts.append(write_statistics(file, number, kind, names or list(SHAPES)))
        told[name] = {"path": path, "statistics": str(file)}
    C = {own: torch.stack([p[own] for p in parts]).mean(0) for own in parts[0]}
    return told, {n: c + RIDGE * c.trace() / len(c) * torch.eye(len(c)) for n, c in C.items()}


def nearest(matrix: Tensor, C: Tensor, rank: int) -> tuple[Tensor, float, float]:
    """Return the nearest product, and the shares of ‖Δ‖² and of ‖Δx‖² that it loses."""
    root = torch.linalg.cholesky(C)
    U, S, _ = torch.linalg.svd(matrix.double() @ root)
    product = U[:, :rank] @ U[:, :rank].mT @ matrix.double()
    lost = 1 - float(product.square().sum() / matrix.double().square().sum())
    return product, lost, 1 - float(S[:rank].square().sum() / S.square().sum())


def merge(output: Path, base: str, told: dict[str, Any], method: str, **adapter: Any) -> Any:
    report = eutectic.merge(
        base=base, experts=told, method=method, scale=0.7, adapter=adapter, output=output
    )
    return changes(output), {n: r["adapter"] for n, r in report.records.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["task_arithmetic", "iso_c", "regmean", "ties"])
def test_what_is_kept_shifts_the_outputs_most(
    tmp_path: Path, base: str, experts: dict[str, str], method: str, kind: str
) -> None:
    """Of thin merges, of dense ones, and with every form of a Gram."""
    told, C = with_statistics(tmp_path, experts, kind)
    whole, _ = merge(tmp_path / "whole", base, told, method, rank=12)
    cut, records = merge(tmp_path / "cut", base, told, method, rank=3, cut="inputs")
    plain, _ = merge(tmp_path / "plain", base, told, method, rank=3, cut="plain")
    assert len(cut) == len(SHAPES)
    for name, found in cut.items():
        wanted, lost, shift = nearest(whole[name], C[name], 3)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        record = records[f"{name}.weight"]
        assert record["rank"] == 3
        assert record["lost_energy"] == pytest.approx(lost, abs=1e-5)
        assert record["lost_shift"] == pytest.approx(shift, abs=1e-5)
        assert not torch.allclose(found, plain[name], rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("full", [False, True])
def test_of_iso_a_those_directions_are_kept_that_the_experts_use(
    tmp_path: Path, base: str, experts: dict[str, str], kind: str, full: bool
) -> None:
    """All of its directions shift the outputs alike, so that these do not tell them apart."""
    paths = dict(experts)
    for name, path in experts.items() if full else ():
        paths[name] = str(tmp_path / f"full-{name}")
        eutectic.merge(base=base, experts={name: path}, method="average", output=paths[name])
    told, _ = with_statistics(tmp_path, paths, kind)
    told["b"]["weight"] = 0.5
    whole, _ = merge(tmp_path / "whole", base, told, "iso_a", rank=12)
    cut, records = merge(tmp_path / "cut", base, told, "iso_a", rank=3, cut="inputs")
    alone = {
        n: with_statistics(tmp_path, {n: p}, kind, seed=i) for i, (n, p) in enumerate(paths.items())
    }
    own = {n: changes(Path(p)) for n, p in experts.items()}
    for name, found in cut.items():
        deltas = [own[n][name] * (0.5 if n == "b" else 1) for n in own]
        parts = [d @ alone[n][1][name] @ d.mT for n, d in zip(own, deltas, strict=True)]
        energies = torch.stack(parts).sum(0)
        basis = torch.linalg.svd(whole[name].double())[0][:, :9]
        U = basis @ torch.linalg.eigh(basis.mT @ energies @ basis).eigenvectors[:, -3:]
        torch.testing.assert_close(found, U @ U.mT @ whole[name].double(), rtol=1e-3, atol=1e-4)
        assert records[f"{name}.weight"]["lost_shift"] == pytest.approx(1 - 3 / 9, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_at_the_rank_of_all_factors(
    tmp_path: Path, base: str, experts: dict[str, str], kind: str
) -> None:
    told, _ = with_statistics(tmp_path, experts, kind)
    whole, _ = merge(tmp_path / "whole", base, experts, "task_arithmetic")
    cut, records = merge(tmp_path / "cut", base, told, "task_arithmetic", rank=9, cut="inputs")
    for name, found in cut.items():
        torch.testing.assert_close(found, whole[name], rtol=1e-5, atol=1e-6)
        assert records[f"{name}.weight"]["lost_shift"] == 0


def test_energy_is_the_outputs_own(tmp_path: Path, base: str, experts: dict[str, str]) -> None:
    told, C = with_statistics(tmp_path, experts)
    whole, _ = merge(tmp_path / "whole", base, experts, "task_arithmetic")
    _, records = merge(tmp_path / "cut", base, told, "task_arithmetic", energy=0.9, cut="inputs")
    for name, matrix in whole.items():
        record = records[f"{name}.weight"]
        _, _, fewer = nearest(matrix, C[name], record["rank"] - 1)
        assert record["lost_shift"] <= 0.1 < fewer


def test_full_checkpoints_too(tmp_path: Path, base: str, experts: dict[str, str]) -> None:
    full: dict[str, str] = {}
    for name, path in experts.items():
        full[name] = str(tmp_path / f"full-{name}")
        eutectic.merge(base=base, experts={name: path}, method="average", output=full[name])
    told, C = with_statistics(tmp_path, full)
    whole, _ = merge(tmp_path / "whole", base, told, "iso_c", rank=12)
    cut, _ = merge(tmp_path / "cut", base, told, "iso_c", rank=2, cut="inputs")
    for name, found in cut.items():
        torch.testing.assert_close(found, nearest(whole[name], C[name], 2)[0], rtol=1e-4, atol=1e-4)


def test_an_expert_of_weight_0_has_no_say(
    tmp_path: Path, base: str, experts: dict[str, str]
) -> None:
    two = {n: experts[n] for n in "ab"}
    told, _ = with_statistics(tmp_path, two)
    wanted, _ = merge(tmp_path / "two", base, told, "task_arithmetic", rank=2, cut="inputs")
    told["c"] = {"path": experts["c"], "weight": 0}
    found, _ = merge(tmp_path / "three", base, told, "task_arithmetic", rank=2, cut="inputs")
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)


def test_layers_without_statistics_are_cut_plainly_and_named(
    tmp_path: Path, base: str, experts: dict[str, str]
) -> None:
    told, _ = with_statistics(tmp_path, experts, names=["q_proj"])
    report = eutectic.merge(
        base=base, experts=told, method="task_arithmetic", output=tmp_path / "out",
        adapter={"rank": 2, "cut": "inputs"},
    )  # fmt: skip
    records = {n: r["adapter"] for n, r in report.records.items()}
    assert "lost_shift" in records[f"{module('q_proj')}.weight"]
    assert "lost_shift" not in records[f"{module('down_proj')}.weight"]
    note = next(n for n in report.note_records if n.kind == "cut_plainly")
    assert note.subject == (f"{module('down_proj')}.weight",)


def test_unseen_inputs_leave_the_plain_cut(
    tmp_path: Path, base: str, experts: dict[str, str]
) -> None:
    told, _ = with_statistics(tmp_path, {"a": experts["a"]})
    file = eutectic.load_statistics(tmp_path / "a.stats")
    layers = {n: {**own, "count": 0} for n, own in file.provenance["layers"].items()}
    nothing = {k: torch.zeros_like(file.tensors[k]) for k in file.tensors}
    StatisticsFile({**file.provenance, "layers": layers}, nothing).save(tmp_path / "none.stats")
    told["a"]["statistics"] = str(tmp_path / "none.stats")
    found, _ = merge(tmp_path / "cut", base, told, "average", rank=1, cut="inputs")
    wanted, _ = merge(tmp_path / "plain", base, told, "average", rank=1)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


def test_a_damaged_gram_is_refused(tmp_path: Path, base: str, experts: dict[str, str]) -> None:
    told, _ = with_statistics(tmp_path, experts)
    file = eutectic.load_statistics(tmp_path / "b.stats")
    tensors = {k: file.tensors[k].clone() for k in file.tensors}
    tensors[f"{module('q_proj')}.weight/gram"][0, 0] = -1
    StatisticsFile(file.provenance, tensors).save(tmp_path / "b.stats")
    with pytest.raises(eutectic.errors.EutecticError, match="expert 'b': the diagonal of gram"):
        merge(tmp_path / "out", base, told, "average", rank=1, cut="inputs")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"cut": "inputs"}, "cut: inputs needs a rank"),
        ({"cut": "plain"}, "cut: plain needs a rank"),
        ({"cut": "inputs", "rank": 2, "compress": "before"}, "leaves no cut"),
        ({"cut": "outputs", "rank": 2}, "cut"),
        (
            {"cut": "inputs", "rank": 2},
            "needs statistics of every expert, and a, b, c have",
        ),
    ],
)
def test_what_is_refused(
    tmp_path: Path, base: str, experts: dict[str, str], adapter: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        merge(tmp_path / "out", base, experts, "average", **adapter)
    assert not (tmp_path / "out").exists()


def test_statistics_without_grams_are_refused(
    tmp_path: Path, base: str, experts: dict[str, str]
) -> None:
    told, _ = with_statistics(tmp_path, experts)
    for name in experts:
        file = eutectic.load_statistics(tmp_path / f"{name}.stats")
        width = {own: file.tensors[f"{own}/gram"].shape[0] for own in file}
        sums = {f"{own}/input_sum": torch.zeros(size) for own, size in width.items()}
        StatisticsFile(file.provenance, sums).save(tmp_path / f"{name}.stats")
    with pytest.raises(RecipeError, match="hold none of them"):
        merge(tmp_path / "out", base, told, "average", rank=2, cut="inputs")


def test_the_command_says_what_was_lost(tmp_path: Path, base: str, experts: dict[str, str]) -> None:
    told, _ = with_statistics(tmp_path, experts)
    words = ["merge", "--base", base, "-m", "task_arithmetic", "--rank", "3", "--cut", "inputs"]
    named = [f"{name}={path}" for name, path in experts.items()]
    refused = invoke(*words, "-o", str(tmp_path / "out"), *named)
    assert refused.code == 2 and "--cut: inputs needs statistics" in refused.err
    given = [w for n, own in told.items() for w in ("--statistics", f"{n}={own['statistics']}")]
    done = invoke(*words, "-o", str(tmp_path / "out"), *given, *named)
    assert done.code == 0 and "lost outputs" in done.out
    stated = json.loads((tmp_path / "out" / "eutectic.json").read_text())
    assert stated["recipe"]["adapter"] == {"rank": 3, "cut": "inputs"}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_plain_cuts_of_flat_merges_keep_what_the_experts_use(
    tmp_path: Path, base: str, experts: dict[str, str], method: str, full: bool
) -> None:
    """Of equal directions those with the most of Σ_t ‖Δ_t‖², which no rounding decides."""
    paths = dict(experts)
    for name, path in experts.items() if full else ():
        paths[name] = str(tmp_path / f"full-{name}")
        eutectic.merge(base=base, experts={name: path}, method="average", output=paths[name])
    whole, _ = merge(tmp_path / "whole", base, paths, method, rank=12)
    cut, records = merge(tmp_path / "cut", base, paths, method, rank=3)
    own = {n: changes(Path(p)) for n, p in experts.items()}
    for name, found in cut.items():
        basis = torch.linalg.svd(whole[name].double())[0][:, :9]
        energies = torch.stack([own[n][name] @ own[n][name].mT for n in own]).sum(0)
        U = basis @ torch.linalg.eigh(basis.mT @ energies @ basis).eigenvectors[:, -3:]
        torch.testing.assert_close(found, U @ U.mT @ whole[name].double(), rtol=1e-3, atol=1e-4)
        record = records[f"{name}.weight"]
        assert record["lost_energy"] == pytest.approx(1 - 3 / 9, abs=1e-4)
        assert "lost_shift" not in record


def test_extraction_takes_statistics(tmp_path: Path, base: str, experts: dict[str, str]) -> None:
    """As a merge of one expert that is cut so; its name is that of its folder."""
    full = tmp_path / "tuned"
    eutectic.merge(base=base, experts={"a": experts["c"]}, method="average", output=full)
    told, _ = with_statistics(tmp_path, {"tuned": str(full)})
    words = ["extract", "--base", base, str(full), "--rank", "2", "-o", str(tmp_path / "out")]
    done = invoke(*words, "--statistics", told["tuned"]["statistics"])
    assert done.code == 0 and "lost outputs" in done.out
    common = {"base": base, "experts": told, "method": "task_arithmetic", "scale": 1.0}
    eutectic.merge(**common, adapter={"rank": 2, "cut": "inputs"}, output=tmp_path / "merged")
    eutectic.extract(full, base=base, output=tmp_path / "plain", rank=2)
    wanted, found, plain = (changes(tmp_path / n) for n in ("merged", "out", "plain"))
    for name, own in wanted.items():
        torch.testing.assert_close(found[name], own)
        assert not torch.allclose(plain[name], own, rtol=1e-2)
    refused = invoke("extract", "--base", base, str(tmp_path / "no"), "-o", str(tmp_path / "x"))
    assert refused.code == 2 and "experts.no.path" in refused.err


def test_a_method_that_could_merge_at_the_rank_is_told_it(
    tmp_path: Path, base: str, experts: dict[str, str]
) -> None:
    told, _ = with_statistics(tmp_path, experts)
    asked: dict[str, Any] = {"base": base, "experts": told, "method": "iso_regmean"}
    for rank, parameters, count in ((3, {}, 1), (3, {"directions": 3}, 0), (None, {}, 0)):
        adapter = {} if rank is None else {"adapter": {"rank": rank}}
        notes = eutectic.plan(**asked, **adapter, parameters=parameters).note_records
        found = [str(note) for note in notes if note.kind == "rank_untold"]
        assert len(found) == count
        assert all("--param directions=3" in text for text in found)
