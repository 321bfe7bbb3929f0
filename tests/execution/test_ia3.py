"""(IA)³ adapters made by peft, merged as vectors: collection, recipe, command line, a new adapter.

The oracle is a dense solve of Σ B_t w = Σ B_t w_t per vector, in float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import eutectic
from eutectic.errors import RecipeError
from helpers.cli import invoke
from helpers.folders import load
from helpers.models import make_model

peft: Any = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")

NAMES = ("a", "b", "c")
PREFIX = "base_model.model."


class World:
    """A tiny T5, three (IA)³ adapters of it, and statistics of each."""

    def __init__(self, folder: Path) -> None:
        self.base = folder / "base"
        make_model("t5-relu").save_pretrained(self.base)
        self.adapters = {name: folder / name for name in NAMES}
        self.statistics = {name: folder / f"{name}.stats.safetensors" for name in NAMES}
        self.batches: dict[str, list[dict[str, Tensor]]] = {}
        for seed, name in enumerate(NAMES):
            model = adapted(seed)
            model.save_pretrained(str(self.adapters[name]))
            generator = torch.Generator().manual_seed(90 + seed)

            def ids(generator: torch.Generator = generator) -> Tensor:
                return torch.randint(3, 39, (4, 6), generator=generator)

            self.batches[name] = [{"input_ids": ids(), "labels": ids()} for _ in range(8)]
            eutectic.collect(
                model,
                self.batches[name],
                self.statistics[name],
                grams=False,
                fisher=True,
                block_fisher=True,
                layers=["*.ia3_l"],
            )

    def recipe(self, **options: Any) -> dict[str, Any]:
        experts = {
            name: {"path": str(self.adapters[name]), "statistics": str(self.statistics[name])}
            for name in NAMES
        }
        return {"base": str(self.base), "experts": experts, **options}

    def vectors(self, name: str) -> dict[str, Tensor]:
        return load(self.adapters[name])


def adapted(seed: int, **options: Any) -> Any:
    """Return the T5 with vectors near one on keys, values and the feed-forward inputs."""
    settings: dict[str, Any] = {
        "task_type": "SEQ_2_SEQ_LM",
        "target_modules": ["k", "v", "wo"],
        "feedforward_modules": ["wo"],
    }
    model = peft.get_peft_model(make_model("t5-relu"), peft.IA3Config(**settings | options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("ia3"))


def system(world: World, key: str) -> tuple[Tensor, Tensor]:
    """Return Σ B_t and Σ B_t w_t of one vector, in float64."""
    size = world.vectors("a")[key].numel()
    total = torch.zeros(size, size, dtype=torch.float64)
    right = torch.zeros(size, dtype=torch.float64)
    for name in NAMES:
        entry = eutectic.load_statistics(world.statistics[name])[key.removeprefix(PREFIX)]
        assert entry.block_fisher is not None
        block = entry.block_fisher.double() / entry.sample_count
        total += block
        right += block @ world.vectors(name)[key].double().flatten()
    return total, right


MATS = {"method": "mats", "parameters": {"operator": "block", "init": "average"}}


def test_block_fisher_matching_solves_the_system_of_every_vector(
    world: World, tmp_path: Path
) -> None:
    many = {**MATS["parameters"], "iterations": 400, "tolerance": 1e-7}  # type: ignore[dict-item]
    report = eutectic.merge(
        world.recipe(method="mats", parameters=many, precision="exact"), output=tmp_path / "m"
    )
    merged = load(tmp_path / "m")
    assert set(merged) == set(world.vectors("a"))
    assert report.merged_by == {"mats": len(merged)}
    for key, vector in merged.items():
        total, right = system(world, key)
        values, basis = torch.linalg.eigh(total)
        excited = basis[:, values > 1e-4 * values[-1]]
        wanted = torch.linalg.lstsq(total, right, driver="gelsd").solution
        # Directions that gradients hardly excite are settled last, by any iterative method.
        ours, theirs = excited.T @ vector.double().flatten(), excited.T @ wanted
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3, msg=key)
        residual = total @ vector.double().flatten() - right
        assert float(residual.norm()) <= 1e-6 * float(right.norm()), key


def test_ten_steps_as_published_and_the_curve_is_kept(world: World, tmp_path: Path) -> None:
    report = eutectic.merge(world.recipe(**MATS), output=tmp_path / "m")
    records = json.loads((tmp_path / "m" / "eutectic.json").read_text())["records"]
    assert set(records) == set(load(tmp_path / "m")) == set(report.records)
    for key in records:
        record = records[key]["matrix"]
        assert record["iterations"] <= 10
        assert record["residuals"][-1] < record["residuals"][0]


def test_fisher_and_average_of_vectors(world: World, tmp_path: Path) -> None:
    eutectic.merge(world.recipe(method="average"), output=tmp_path / "average")
    eutectic.merge(world.recipe(method="fisher"), output=tmp_path / "fisher")
    average, fisher = load(tmp_path / "average"), load(tmp_path / "fisher")
    for key in average:
        own = torch.stack([world.vectors(name)[key].double() for name in NAMES])
        weights = torch.stack(
            [
                entry.fisher_diagonal.double() / entry.sample_count  # type: ignore[union-attr]
                for name in NAMES
                for entry in [
                    eutectic.load_statistics(world.statistics[name])[key.removeprefix(PREFIX)]
                ]
            ]
        ).clamp_min(1e-8)
        torch.testing.assert_close(average[key], own.mean(0).float())
        torch.testing.assert_close(
            fisher[key], ((weights * own).sum(0) / weights.sum(0)).float(), rtol=1e-5, atol=1e-6
        )


def test_vectors_are_relative_to_ones(world: World, tmp_path: Path) -> None:
    eutectic.merge(world.recipe(method="task_arithmetic", scale=0.5), output=tmp_path / "m")
    for key, vector in load(tmp_path / "m").items():
        deltas = sum(world.vectors(name)[key].double() - 1 for name in NAMES)
        torch.testing.assert_close(vector, (1 + 0.5 * deltas).float())


def test_the_command_line_gives_an_adapter_that_peft_loads(world: World, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(world.recipe(**MATS)))
    answer = invoke("merge", recipe, "-o", tmp_path / "merged")
    assert answer.code == 0, answer.err
    vectors = load(tmp_path / "merged")
    model = peft.PeftModel.from_pretrained(make_model("t5-relu"), str(tmp_path / "merged"))
    held = {n.replace(".default", ""): p for n, p in model.named_parameters() if "ia3_l" in n}
    assert set(held) == set(vectors)
    assert all(torch.equal(held[n], vectors[n]) for n in vectors)
    again = invoke("plan", recipe)
    assert again.code == 0
    assert "vector mats" in again.out


def test_an_adapter_stays_in_one_file(world: World, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="shard_size: .* PEFT reads from one file"):
        eutectic.merge(world.recipe(method="average", shard_size="1GB"), output=tmp_path / "m")


def test_adapters_that_cannot_meet_are_refused(world: World, tmp_path: Path) -> None:
    others = {
        "train different vectors": adapted(7, target_modules=["k", "wo"]),
        "belongs to no layer": None,
        "merges with other": None,
    }
    others["train different vectors"].save_pretrained(str(tmp_path / "narrow"))
    small = make_model("bert")
    small.save_pretrained(tmp_path / "bert")
    lora = peft.get_peft_model(
        make_model("t5-relu"), peft.LoraConfig(target_modules=["k"], task_type="SEQ_2_SEQ_LM")
    )
    lora.save_pretrained(str(tmp_path / "lora"))
    cases: dict[str, dict[str, Any]] = {
        "train different vectors": {
            "experts": {"a": world.adapters["a"], "n": tmp_path / "narrow"}
        },
        "belongs to no layer": {"base": tmp_path / "bert", "experts": world.adapters},
        "merges with other": {"experts": {"a": world.adapters["a"], "l": tmp_path / "lora"}},
    }
    for words, options in cases.items():
        with pytest.raises(RecipeError, match=words):
            eutectic.merge(
                {"base": world.base, "method": "average", **options}, output=tmp_path / "out"
            )
        assert not (tmp_path / "out").exists()
