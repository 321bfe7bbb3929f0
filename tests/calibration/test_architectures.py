"""Every architecture by its own code: encoders, decoders, both, images, mixtures.

Guards: with one expert, no ridge and the expert's inputs, the whole model becomes the expert as far
as its layers go; all else about the folder stays; what cannot be calibrated is told.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eutectic
from calibration.world import inputs, load, make, outputs, save_world

KINDS = ["bert", "llama", "gpt2", "vit", "dinov2", "t5", "bart", "clip_vision", "clip"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_expert_is_reproduced(kind: str, tmp_path: Path) -> None:
    world, batches = save_world(kind, tmp_path), inputs(kind)
    report = eutectic.calibrate(
        world / "merged",
        {"a": world / "a"},
        {"a": batches},
        world / "out",
        ridge=0,
        expert_share=1,
    )
    before, found = load(kind, world / "merged"), load(kind, world / "out")
    expert = load(kind, world / "a")
    others = inputs(kind, seed=9, count=1)[0]
    for x, y, z in zip(*(outputs(kind, m, others) for m in (found, expert, before)), strict=True):
        assert torch.allclose(x, y, atol=2e-4 * float(y.abs().max()))
        assert not torch.allclose(z, y, atol=1e-2 * float(y.abs().max()))
    assert max(own["after"] for own in report.layers.values()) < 1e-5
    old, new = (load_file(world / n / "model.safetensors") for n in ("merged", "out"))
    assert list(old) == list(new)
    assert {n: t.shape for n, t in old.items()} == {n: t.shape for n, t in new.items()}


@pytest.mark.parametrize("kind", ["bert", "vit", "t5", "llama"])
def test_two_experts_come_nearer(kind: str, tmp_path: Path) -> None:
    """From the base, on inputs that no layer was fitted to."""
    world = save_world(kind, tmp_path)
    names = {"a": world / "a", "b": world / "b"}
    data = {name: inputs(kind, seed) for seed, name in enumerate(names)}
    report = eutectic.calibrate(world / "base", names, data, world / "out", holdout=0.3)
    assert report.held_out and report.data["a"] == {"examples": 34, "held_out": 14}
    layers = list(report.layers.values())
    assert sum(own["after"] < own["before"] for own in layers) > 0.8 * len(layers)
    base, found = load(kind, world / "base"), load(kind, world / "out")
    missed = {"base": 0.0, "out": 0.0}
    for seed, name in enumerate(names):
        batch = inputs(kind, 20 + seed, count=1)[0]
        wanted = outputs(kind, load(kind, world / name), batch)[0]
        for called, model in (("base", base), ("out", found)):
            own = outputs(kind, model, batch)[0]
            missed[called] += float((own - wanted).square().sum() / wanted.square().sum())
    assert missed["out"] < 0.9 * missed["base"]


def test_what_keeps_the_merged_values_is_told(tmp_path: Path) -> None:
    world, batches = save_world("mixtral", tmp_path), inputs("mixtral")
    report = eutectic.calibrate(
        world / "merged", {"a": world / "a"}, {"a": batches}, world / "out", ridge=0.01
    )
    assert report.calibrated == {"matrices": 8, "norms": 5}
    assert report.left["an output vocabulary"] == ["lm_head.weight"]
    old, new = (load_file(world / n / "model.safetensors") for n in ("merged", "out"))
    changed = {n for n in old if not torch.equal(old[n], new[n])}
    assert len(changed) == 13 and not any("experts" in n or "lm_head" in n for n in changed)


def test_a_layer_that_is_called_again_is_left(tmp_path: Path) -> None:
    """ALBERT calls one block for every layer: what it gives comes back to it."""
    from helpers.configs import hf

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = hf.AlbertConfig(vocab_size=40, embedding_size=8, num_hidden_layers=2, **sizes)
    torch.manual_seed(0)
    hf.AlbertModel(config).save_pretrained(tmp_path / "merged")
    hf.AlbertModel(config).save_pretrained(tmp_path / "a")
    report = eutectic.calibrate(
        tmp_path / "merged", {"a": tmp_path / "a"}, {"a": inputs("bert")}, tmp_path / "out"
    )
    assert len(report.left["it is called several times in a forward pass"]) == 8
    assert report.calibrated == {"biases": 2, "matrices": 2, "norms": 2}


def test_a_body_beside_heads(tmp_path: Path) -> None:
    """Heads stay the merged model's; an expert's may be of another shape."""
    world = save_world("bert_classifier", tmp_path)
    other = make("bert_classifier", 1)
    other.classifier = torch.nn.Linear(16, 5)
    other.config.num_labels = 5
    other.save_pretrained(world / "a")
    report = eutectic.calibrate(
        world / "merged",
        {"a": world / "a"},
        {"a": inputs("bert")},
        world / "out",
        ridge=0,
        expert_share=1,
    )
    assert report.left == {"a head": ["classifier.weight"]}
    found, expert = (load_file(world / n / "model.safetensors") for n in ("out", "a"))
    merged = load_file(world / "merged" / "model.safetensors")
    assert torch.equal(found["classifier.weight"], merged["classifier.weight"])
    name = "bert.encoder.layer.1.output.dense.weight"
    assert torch.allclose(found[name], expert[name], atol=1e-3)
