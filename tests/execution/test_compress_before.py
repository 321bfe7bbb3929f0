"""Guards merges at a rank: what they equal, that nothing is cut afterwards, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eutectic
from eutectic.errors import RequestError
from eutectic.methods import merge_matrices

SHAPES = {"q_proj": (16, 12), "down_proj": (12, 20)}
RANKS = {"a": 2, "b": 3, "c": 4}


def module(name: str) -> str:
    place = "mlp" if name == "down_proj" else "self_attn"
    return f"model.layers.0.{place}.{name}"


@pytest.fixture
def base(tmp_path: Path) -> str:
    generator = torch.Generator().manual_seed(5)
    tensors = {
        f"{module(n)}.weight": torch.randn(shape, generator=generator)
        for n, shape in SHAPES.items()
    }
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "none"}')
    return str(tmp_path / "base")


@pytest.fixture
def experts(tmp_path: Path, base: str) -> dict[str, str]:
    """Three adapters of unequal rank."""
    paths: dict[str, str] = {}
    for seed, (name, rank) in enumerate(RANKS.items()):
        generator = torch.Generator().manual_seed(seed)
        folder = tmp_path / name
        folder.mkdir()
        tensors: dict[str, Tensor] = {}
        for own, (out, width) in SHAPES.items():
            key = f"base_model.model.{module(own)}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * (
                0.5 ** torch.arange(rank)
            )
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
        config["target_modules"] = list(SHAPES)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        paths[name] = str(folder)
    return paths


def changes(folder: Path) -> dict[str, Tensor]:
    """Return B·A of each layer of an adapter."""
    stored = load_file(folder / "adapter_model.safetensors")
    return {
        key.removesuffix(".lora_A.weight").removeprefix("base_model.model."): (
            stored[key.replace("lora_A", "lora_B")].double() @ stored[key].double()
        )
        for key in stored
        if "lora_A" in key
    }


def merged(output: Path, base: str, experts: dict[str, Any], method: str, **adapter: Any) -> Any:
    report = eutectic.merge(
        base=base, experts=experts, method=method, scale=0.7, adapter=adapter, output=output
    )
    return changes(output), {n: r["adapter"] for n, r in report.records.items()}


def truncated(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


METHODS = ["average", "task_arithmetic", "linear", "iso_c", "iso_cts", "tsv_m", "core_ties"]


@pytest.mark.parametrize("method", METHODS)
def test_at_the_rank_of_all_factors_it_is_the_merge_itself(
    tmp_path: Path, base: str, experts: dict[str, str], method: str
) -> None:
    found, told = merged(tmp_path / "before", base, experts, method, rank=9, compress="before")
    wanted, _ = merged(tmp_path / "after", base, experts, method, rank=9)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)
    assert all(own["lost_before"] == 0 for own in told.values())


@pytest.mark.parametrize("method", METHODS[:-1])
def test_so_it_is_of_full_checkpoints(
    tmp_path: Path, base: str, experts: dict[str, str], method: str
) -> None:
    """Of which nobody tells that their changes have few directions."""
    full: dict[str, str] = {}
    for name, path in experts.items():
        full[name] = str(tmp_path / f"full-{name}")
        eutectic.merge(base=base, experts={name: path}, method="average", output=full[name])
    found, told = merged(tmp_path / "before", base, full, method, rank=9, compress="before")
    wanted, _ = merged(tmp_path / "after", base, full, method, rank=9)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)
    assert all(own["lost_before"] < 1e-9 for own in told.values())


def test_ties_at_the_rank_of_all_factors_is_ties_in_the_core(
    tmp_path: Path, base: str, experts: dict[str, str]
) -> None:
    """Entries are those of the cores, whose axes are the singular vectors of all experts."""
    found, _ = merged(tmp_path / "ties", base, experts, "ties", rank=9, compress="before")
    wanted, _ = merged(tmp_path / "core", base, experts, "core_ties", rank=9)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["average", "task_arithmetic"])
def test_one_expert_is_its_truncated_svd(
    tmp_path: Path, base: str, experts: dict[str, str], method: str
) -> None:
    found, told = merged(
        tmp_path / "out", base, {"c": experts["c"]}, method, rank=2, compress="before"
    )
    for name, own in changes(Path(experts["c"])).items():
        torch.testing.assert_close(found[name], 0.7 * truncated(own, 2), rtol=1e-5, atol=1e-6)
        lost = 1 - truncated(own, 2).square().sum() / own.square().sum()
        assert told[f"{name}.weight"]["lost_before"] == pytest.approx(float(lost), abs=1e-6)


def test_methods_merge_what_the_shared_bases_leave(
    tmp_path: Path, base: str, experts: dict[str, str]
) -> None:
    """Against a naive iteration on the expanded matrices, merged there."""
    own = {n: changes(Path(p)) for n, p in experts.items()}
    for method in ("task_arithmetic", "iso_c", "tsv_m", "ties"):
        found, told = merged(tmp_path / method, base, experts, method, rank=3, compress="before")
        for name, result in found.items():
            deltas = torch.stack([own[n][name] for n in experts])
            Q = torch.linalg.svd(torch.cat(list(deltas)), full_matrices=False)[2][:3].mT
            for _ in range(200):
                P = torch.linalg.svd(torch.cat([d @ Q for d in deltas], 1))[0][:, :3]
                Q = torch.linalg.svd(torch.cat([d.mT @ P for d in deltas], 1))[0][:, :3]
            P = torch.linalg.svd(torch.cat([d @ Q for d in deltas], 1))[0][:, :3]
            cores = P.mT @ deltas @ Q
            wanted = 0.7 * P @ merge_matrices(method, cores) @ Q.mT
            # Steps end where the energy gains no more than 1e-6.
            torch.testing.assert_close(
                result, wanted, rtol=0, atol=1e-3 * float(wanted.abs().max())
            )
            assert torch.linalg.matrix_rank(result.float()) <= 3
            record = told[f"{name}.weight"]
            lost = 1 - cores.square().sum() / deltas.square().sum()
            assert record["lost_before"] == pytest.approx(float(lost), abs=1e-5)
            assert record["lost_energy"] < 1e-6


def test_balanced_bases_are_those_of_changes_of_one_norm(
    tmp_path: Path, base: str, experts: dict[str, str]
) -> None:
    """Against a naive iteration on changes that were scaled; the method merges them as they are."""
    own = {n: changes(Path(p)) for n, p in experts.items()}
    path = Path(experts["c"]) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 5 * RANKS["c"]}))
    own["c"] = {name: 5 * change for name, change in own["c"].items()}
    how: dict[str, Any] = {"rank": 3, "compress": "before"}
    found, told = merged(tmp_path / "all", base, experts, "iso_c", **how, balance=1.0)
    plain, _ = merged(tmp_path / "none", base, experts, "iso_c", **how, balance=0.0)
    for name, result in found.items():
        deltas = torch.stack([own[n][name] for n in experts])
        alike = deltas / deltas.flatten(1).norm(dim=1)[:, None, None]
        Q = torch.linalg.svd(torch.cat(list(alike)), full_matrices=False)[2][:3].mT
        for _ in range(200):
            P = torch.linalg.svd(torch.cat([d @ Q for d in alike], 1))[0][:, :3]
            Q = torch.linalg.svd(torch.cat([d.mT @ P for d in alike], 1))[0][:, :3]
        cores = P.mT @ deltas @ Q
        wanted = 0.7 * P @ merge_matrices("iso_c", cores) @ Q.mT
        torch.testing.assert_close(result, wanted, rtol=0, atol=3e-3 * float(wanted.abs().max()))
        assert not torch.allclose(result, plain[name], atol=1e-2 * float(wanted.abs().max()))
        lost = 1 - cores.square().sum() / deltas.square().sum()
        assert told[f"{name}.weight"]["lost_before"] == pytest.approx(float(lost), abs=1e-3)


def test_other_orders_and_a_search_change_nothing(
    tmp_path: Path, base: str, experts: dict[str, str]
) -> None:
    wanted, _ = merged(tmp_path / "one", base, experts, "iso_c", rank=3, compress="before")
    turned = dict(reversed(experts.items()))
    found, _ = merged(tmp_path / "two", base, turned, "iso_c", rank=3, compress="before")

    def choose(plan: Any, inputs: Any) -> Any:
        from eutectic.errors import Note
        from eutectic.execution.schedule import Choice

        return lambda unscaled: Choice(0.7, Note("earlier_scale", (), {"scale": 0.7}), {})

    (tmp_path / "t.yaml").write_text("tasks: {}")
    eutectic.merge(
        base=base,
        experts=experts,
        method="iso_c",
        scale={"search": "divergence", "tasks": str(tmp_path / "t.yaml")},
        adapter={"rank": 3, "compress": "before"},
        choose=choose,
        output=tmp_path / "late",
    )
    late = changes(tmp_path / "late")
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(late[name], wanted[name], rtol=1e-4, atol=1e-5)
    stated = json.loads((tmp_path / "late" / "eutectic.json").read_text())
    told = next(iter(stated["tensors"].values())) if "tensors" in stated else {}
    assert "lost_before" not in told  # it stands with the adapter's rank


def test_full_checkpoints_and_zero_changes(
    tmp_path: Path, base: str, experts: dict[str, str]
) -> None:
    eutectic.merge(
        base=base,
        experts={"a": experts["a"]},
        method="average",
        output=tmp_path / "full",
    )
    both = {"a": str(tmp_path / "full"), "b": experts["b"]}
    found, _ = merged(tmp_path / "mixed", base, both, "task_arithmetic", rank=5, compress="before")
    wanted, _ = merged(
        tmp_path / "thin",
        base,
        {n: experts[n] for n in "ab"},
        "task_arithmetic",
        rank=5,
        compress="before",
    )
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-4)
    for method in ("ties", "tsv_m"):
        report = eutectic.merge(
            base=base,
            experts={"a": base, "b": base},
            method=method,
            adapter={"rank": 2, "compress": "before"},
            output=tmp_path / f"zero-{method}",
        )
        assert not any(r["adapter"]["changed"] for r in report.records.values())


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"adapter": {"compress": "before"}}, "needs a rank"),
        ({"adapter": {"compress": "after"}}, "needs a rank"),
        ({"adapter": {"compress": "before", "rank": "auto"}}, "rank that is a number"),
        ({"adapter": {"compress": "before", "rank": 2, "energy": 0.9}}, "no energy"),
        ({"adapter": {"compress": "first", "rank": 2}}, "compress"),
        ({"adapter": {"balance": 1, "rank": 2}}, "which compress: before does"),
        ({"adapter": {"balance": 2, "rank": 2, "compress": "before"}}, "balance"),
        ({"output": "model", "adapter": {"compress": "before", "rank": 2}}, "asks for none"),
        ({"method": "slerp", "adapter": {"compress": "before", "rank": 2}}, "works on weights"),
        (
            {
                "method": "ties",
                "parameters": {"scope": "model"},
                "adapter": {"compress": "before", "rank": 2},
            },
            "entries of the whole model",
        ),
    ],
)
def test_what_cannot_be_merged_at_a_rank(
    tmp_path: Path, base: str, experts: dict[str, str], stated: dict[str, Any], message: str
) -> None:
    own = {n: experts[n] for n in "ab"}
    recipe = {"base": base, "experts": own, "method": "average", **stated}
    with pytest.raises(RequestError, match=message):
        eutectic.merge(recipe, output=tmp_path / "out")
