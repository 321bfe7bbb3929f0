"""Guards statistics that are kept for adapters alone, from the collection to the merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_collect_command import OLD_NAMES, data, expert, run
from tiny_models import bert

import eutectic
from eutectic.checkpoint.expert_tensors import Expert
from eutectic.checkpoint.experts import open_expert
from eutectic.checkpoint.index import open_index
from eutectic.errors import RecipeError
from eutectic.statistics import load_statistics
from helpers.folders import load

__all__ = ["data", "expert"]
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
RANKS = {"one": 2, "two": 3}


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, Path]:
    """Two adapters of unequal rank; the second acts on more layers."""
    paths: dict[str, Path] = {}
    for i, (name, rank) in enumerate(RANKS.items()):
        base = bert()
        torch.manual_seed(i)
        targets = ["query", "value", "dense"][: 2 + i]
        config = peft.LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
        paths[name] = tmp_path / name
        peft.get_peft_model(base, config).save_pretrained(paths[name])
    return paths


def collected(
    expert: Path, data: Path, adapters: dict[str, Path], folder: Path, *more: str
) -> dict[str, Path]:
    """Return the statistics of every adapter, kept for all of them."""
    chosen = [word for path in adapters.values() for word in ("--for", path)]
    found: dict[str, Path] = {}
    for name, path in adapters.items():
        found[name] = folder / f"{name}.core.safetensors"
        run(path, "--base", expert, "--data", data, *chosen, "-o", found[name], *more)
    return found


@OLD_NAMES
def test_what_is_kept_is_what_the_adapters_rows_see(
    expert: Path, data: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    whole = tmp_path / "whole.safetensors"
    run(adapters["one"], "--base", expert, "--data", data, "--dtype", "float64", "-o", whole)
    kept = collected(expert, data, adapters, tmp_path, "--dtype", "float64")["one"]
    full, found = load_statistics(whole), load_statistics(kept)
    index = open_index(expert)
    opened = [open_expert(path, index) for path in adapters.values()]
    assert 0 < len(found) < len(full)
    for name in found:
        rows = torch.cat([e.input_rows(name).double() for e in opened if name in e.factored])
        gram = full[name].dense_gram()
        assert gram is not None
        entry = found[name]
        assert entry.core_gram is not None and entry.gram is None and entry.input_sum is None
        torch.testing.assert_close(entry.core_gram, rows @ gram @ rows.mT, rtol=1e-5, atol=1e-7)
        assert entry.count == full[name].count
    for e in opened:
        e.close()
    assert kept.stat().st_size < whole.stat().st_size / 2


@OLD_NAMES
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("iso_a", {}),
        ("iso_regmean", {"directions": 4}),
        ("esm", {"preset": "none"}),
        ("mats", {}),
        ("regmean", {"off_diagonal": 1.0}),
    ],
)
def test_a_merge_is_that_of_the_dense_gram_between_the_rows(
    method: str,
    parameters: dict[str, Any],
    expert: Path,
    data: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
) -> None:
    """P·C·P as a dense Gram, and dense experts, give the same; ESM also with C itself."""
    files = collected(expert, data, adapters, tmp_path, "--dtype", "float64")
    experts = {n: {"path": str(p), "statistics": str(files[n])} for n, p in adapters.items()}
    recipe = {"base": str(expert), "experts": experts, "method": method, "parameters": parameters}
    (tmp_path / "recipe.yaml").write_text(json.dumps({**recipe, "fallback": "allow"}))
    output = tmp_path / "out"
    eutectic.merge(tmp_path / "recipe.yaml", output=output)
    base, merged = load(expert), load(output)
    index = open_index(expert)
    opened = {name: open_expert(path, index) for name, path in adapters.items()}
    deltas, statistics = [], []
    for name, e in opened.items():
        entry = load_statistics(files[name])[QUERY]
        rows = torch.cat([o.input_rows(QUERY).double() for o in opened.values()])
        inner = torch.linalg.pinv(rows @ rows.mT)
        gram = rows.mT @ inner @ entry.core_gram.double() @ inner @ rows
        statistics.append(eutectic.LayerStatistics(gram=gram, count=entry.count))
        left, right = e.factors(QUERY, torch.float64)
        deltas.append(left @ right)
    expected = eutectic.merge_matrices(
        method, torch.stack(deltas), statistics=statistics, **parameters
    )
    scale = eutectic.methods()[method]["default_scale"]
    change = (merged[QUERY].double() - base[QUERY].double()) / scale
    error = (change - expected).norm() / expected.norm()
    assert error < 1e-5 * max(1.0, float(base[QUERY].norm() / expected.norm()))
    for e in opened.values():
        e.close()


@OLD_NAMES
@pytest.mark.parametrize("method", ["iso_a", "iso_regmean", "esm", "mats", "regmean"])
def test_merges_at_a_rank_take_them(
    method: str, expert: Path, data: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """At the rank of all factors the merge itself; below it, nothing is cut afterwards."""
    files = collected(expert, data, adapters, tmp_path)
    experts = {n: {"path": str(p), "statistics": str(files[n])} for n, p in adapters.items()}
    common: dict[str, Any] = {
        **{"base": str(expert), "experts": experts, "method": method, "fallback": "allow"},
        **{"unmatched": "leave", "heads": "base"},
    }

    def product(name: str, rank: int, place: str) -> tuple[torch.Tensor, dict[str, Any]]:
        out = tmp_path / name
        stated = {"rank": rank, "compress": place, "others": "drop"}
        report = eutectic.merge(**common, adapter=stated, output=out)
        key = "base_model.model." + QUERY.removesuffix("weight") + "lora_{}.weight"
        held = load_file(out / "adapter_model.safetensors")
        return held[key.format("B")] @ held[key.format("A")], report.records[QUERY]["adapter"]

    before, told = product("before", 5, "before")
    after, _ = product("after", 5, "after")
    assert told["lost_before"] == 0
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)
    cut, told = product("cut", 2, "before")
    assert torch.linalg.matrix_rank(cut, rtol=1e-4) <= 2
    assert 0 < told["lost_before"] < 1
    assert told["lost_energy"] < 1e-6


@OLD_NAMES
def test_adapters_are_cut_by_them(
    expert: Path, data: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """As by the dense P·C·P; what an expanding method makes lies beyond the rows."""
    files = collected(expert, data, adapters, tmp_path, "--dtype", "float64")
    experts = {n: {"path": str(p), "statistics": str(files[n])} for n, p in adapters.items()}
    common: dict[str, Any] = {"base": str(expert), "unmatched": "leave", "heads": "base"}

    def product(name: str, **stated: Any) -> torch.Tensor:
        held = {"others": "drop", **stated}
        recipe = {**common, "experts": experts, "method": "task_arithmetic", "scale": 1.0}
        eutectic.merge(recipe | {"adapter": held}, output=tmp_path / name)
        key = "base_model.model." + QUERY.removesuffix("weight") + "lora_{}.weight"
        stored = load_file(tmp_path / name / "adapter_model.safetensors")
        return stored[key.format("B")].double() @ stored[key.format("A")].double()

    whole, found = product("whole"), product("cut", rank=2, cut="inputs")
    index = open_index(expert)
    opened = [open_expert(path, index) for path in adapters.values()]
    rows = torch.cat([e.input_rows(QUERY).double() for e in opened])
    inner = torch.linalg.pinv(rows @ rows.mT)
    C = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for file in files.values():
        entry = load_statistics(file)[QUERY]
        C += rows.mT @ inner @ entry.core_gram.double() @ inner @ rows / entry.count / len(files)
    C += 0.1 * C.trace() / len(C) * torch.eye(len(C))
    U = torch.linalg.svd(whole @ torch.linalg.cholesky(C))[0][:, :2]
    torch.testing.assert_close(found, U @ U.mT @ whole, rtol=1e-4, atol=1e-6)
    for e in opened:
        e.close()
    with pytest.raises(RecipeError, match="ties expands these: its changes reach beyond"):
        eutectic.merge(
            **common, experts=experts, method="ties", output=tmp_path / "ties",
            adapter={"rank": 2, "cut": "inputs", "others": "drop"},
        )  # fmt: skip


@OLD_NAMES
def test_sums_of_disjoint_data_add_up(
    expert: Path, data: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": text}) for text in ("j j i", "h g")))
    first = collected(expert, data, adapters, tmp_path)["one"]
    (tmp_path / "b").mkdir()
    second = collected(expert, other, adapters, tmp_path / "b")["one"]
    both = tmp_path / "both.safetensors"
    run("--add", first, "--add", second, "-o", both)
    total = load_statistics(both)[QUERY]
    parts = [load_statistics(path)[QUERY] for path in (first, second)]
    torch.testing.assert_close(total.core_gram, parts[0].core_gram + parts[1].core_gram)
    assert total.count == parts[0].count + parts[1].count


@OLD_NAMES
def test_refusals(expert: Path, data: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    one = {"one": adapters["one"]}
    file = collected(expert, data, one, tmp_path)["one"]
    experts = {n: {"path": str(p), "statistics": str(file)} for n, p in adapters.items()}
    recipe = {"base": str(expert), "experts": experts, "method": "iso_a"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match="adapters one alone, and two is none of them"):
        eutectic.merge(tmp_path / "recipe.yaml", output=tmp_path / "out")
    words = [adapters["one"], "--base", expert, "--data", data, "-o", tmp_path / "x.safetensors"]
    assert "is none" in run(*words, "--for", expert, code=2).stderr
    assert (
        "rank does not go with core"
        in run(*words, "--for", adapters["one"], "--rank", "2", code=2).stderr
    )
    assert (
        "--for 'one' is given twice"
        in run(*words, "--for", adapters["one"], "--for", f"one={adapters['two']}", code=2).stderr
    )


@OLD_NAMES
def test_the_rows_of_a_layer_are_read_once_for_all_experts(
    expert: Path,
    data: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = collected(expert, data, adapters, tmp_path)
    experts = {n: {"path": str(p), "statistics": str(files[n])} for n, p in adapters.items()}
    asked: list[tuple[int, str]] = []
    read = Expert.input_rows

    def counted(self: Expert, name: str) -> torch.Tensor | None:
        asked.append((id(self), name))
        return read(self, name)

    monkeypatch.setattr(Expert, "input_rows", counted)
    common: dict[str, Any] = {"base": str(expert), "experts": experts, "method": "iso_a"}
    common |= {"fallback": "allow", "unmatched": "leave", "heads": "base"}
    eutectic.merge(**common, adapter={"others": "drop"}, output=tmp_path / "out", threads=1)
    assert QUERY in {name for _, name in asked}
    assert len(asked) == len(set(asked))
