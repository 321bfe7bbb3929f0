"""The guard: tensors that do not meet are refused, heads and buffers stay notes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eutectic
from eutectic.errors import CheckpointError, RecipeError
from eutectic.planning.coverage import patterns
from eutectic.planning.inputs import in_memory_inputs
from eutectic.planning.plan import Plan, make_plan
from eutectic.recipes.load import check_recipe
from eutectic.words import percent
from helpers.cli import invoke
from helpers.folders import load, save

Tensors = dict[str, Tensor]


def model(layers: int = 2, prefix: str = "bert.") -> Tensors:
    """Return a small encoder with a table, attention, norms, a pooler and a head of its own."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"embeddings.word_embeddings.weight": randn(30, 8)}
    for i in range(layers):
        for part in ("query", "key", "value"):
            tensors[f"encoder.layer.{i}.attention.self.{part}.weight"] = randn(8, 8)
        tensors[f"encoder.layer.{i}.output.LayerNorm.weight"] = randn(8)
        tensors[f"encoder.layer.{i}.output.LayerNorm.bias"] = randn(8)
    tensors["pooler.dense.weight"] = randn(8, 8)
    tensors = {prefix + name: w for name, w in tensors.items()}
    return tensors | {"cls.predictions.bias": randn(30)}


def tuned(base: Tensors) -> Tensors:
    return {name: w + 1 if w.is_floating_point() else w for name, w in base.items()}


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new): w for name, w in tensors.items()}


def without(tensors: Tensors, part: str) -> Tensors:
    return {name: w for name, w in tensors.items() if part not in name}


def planned(base: Tensors, *experts: Tensors, **keys: Any) -> Plan:
    named = {f"e{i}": tensors for i, tensors in enumerate(experts)}
    inputs = in_memory_inputs(base, named, {}, keys.pop("config", None))
    values = {"base": "memory", "experts": dict.fromkeys(named, "memory"), "method": "average"}
    return make_plan(check_recipe({**values, **keys}), inputs)


def refused(base: Tensors, *experts: Tensors, **keys: Any) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        planned(base, *experts, **keys)
    return caught.value


BASE = model()
OTHER_NAMES = {
    "a module": ("attention.self", "attention.own"),
    "a parameter": ("LayerNorm.weight", "LayerNorm.g"),
    "one tensor": ("layer.1.attention.self.query", "layer.1.attention.self.q"),
    "an inner prefix": ("bert.encoder", "bert.text.encoder"),
    "a table": ("embeddings.word_embeddings", "embeddings.words"),
    "packed": ("encoder.layer.0", "encoder.blocks.0"),
}


@pytest.mark.parametrize("case", OTHER_NAMES)
@pytest.mark.parametrize("missing", ["error", "base", "available"])
def test_other_names_are_refused_whatever_the_policy(case: str, missing: str) -> None:
    own = renamed(tuned(BASE), *OTHER_NAMES[case])
    error = refused(BASE, own, missing=missing)
    assert [fault.kind for fault in error.faults] == ["unmatched"]
    assert "--set unmatched=leave" in str(error) and "Tried: " in str(error)
    # One of three is as bad as all, and `missing: base` is not advised.
    error = refused(BASE, tuned(BASE), tuned(BASE), own, missing=missing)
    assert [(f.kind, f.where) for f in error.faults] == [("unmatched", "expert 'e2'")]


def test_both_sides_are_shown_by_pattern_with_their_share() -> None:
    text = str(refused(BASE, renamed(tuned(BASE), "bert.encoder", "bert.text.encoder")))
    total = sum(w.numel() for w in BASE.values())
    share = percent(sum(w.numel() for n, w in BASE.items() if ".layer." in n) / total)
    assert f"10 tensors of the expert ({share} of its numbers) meet none of the base" in text
    assert f"10 tensors of the base ({share} of its numbers) none of the expert" in text
    assert "base ↔ expert: bert.* ↔ bert.text.* (10 tensors)" in text
    text = str(refused(BASE, renamed(tuned(BASE), "LayerNorm.weight", "LayerNorm.g")))
    module = "bert.encoder.layer.*.output.LayerNorm"
    assert f"base ↔ expert: {module}.weight ↔ {module}.g" in text
    assert "2 tensors of the expert (2.1 % of its numbers)" in text


def test_prefixes_of_towers_are_told_as_they_differ() -> None:
    names = [f"layers.{i}.q_proj.weight" for i in range(13)]
    left = [f"language_model.model.{n}" for n in names] + ["visual.patch.weight"]
    right = [f"model.language_model.{n}" for n in names] + ["model.visual.patch.weight"]
    assert patterns(left, right) == [
        "base ↔ expert: language_model.model.* ↔ model.language_model.* (13 tensors)",
        "base ↔ expert: * ↔ model.* (1 tensor)",
    ]


def test_leave_merges_what_meets_and_keeps_the_rest(tmp_path: Path) -> None:
    own = renamed(tuned(BASE), "LayerNorm.weight", "LayerNorm.g")
    paths = {"base": save(tmp_path / "base", BASE), "experts": {"a": save(tmp_path / "a", own)}}
    options: dict[str, Any] = {**paths, "method": "average", "unmatched": "leave"}
    eutectic.merge(**options, output=tmp_path / "out")
    merged = load(tmp_path / "out")
    for name, w in BASE.items():
        torch.testing.assert_close(merged[name], w if "LayerNorm.w" in name else w + 1)
    words = ("--base", paths["base"], "-m", "average", f"a={tmp_path / 'a'}")
    for verb in (["plan"], ["merge", "-o", tmp_path / "new"]):
        answer = invoke(*verb, *words)
        assert answer.code == 2 and "LayerNorm.weight ↔" in answer.err
        assert not (tmp_path / "new").exists()
    assert invoke("plan", *words, "--set", "unmatched=leave").code == 0


HEADS = {
    "a classifier in place of another head": (
        without(tuned(BASE), "cls."),
        {"classifier.weight": (3, 8), "classifier.bias": (3,)},
    ),
    "a language model's head on an encoder": (tuned(BASE), {"lm_head.weight": (30, 8)}),
    "no pooler": (without(tuned(BASE), "pooler"), {"score.weight": (2, 8)}),
    "another pooler": (without(tuned(BASE), "pooler"), {"head.pooler.dense.weight": (6, 8)}),
    "a head of two layers in the body's module": (
        without(tuned(BASE), "pooler"),
        {"bert.classifier.dense.weight": (8, 8), "bert.classifier.out_proj.weight": (2, 8)},
    ),
    "a small module of an unusual name at the root": (tuned(BASE), {"verdict.weight": (1, 8)}),
}


@pytest.mark.parametrize("case", HEADS)
def test_heads_stay_notes(case: str) -> None:
    own, extra = HEADS[case]
    expert = own | {name: torch.ones(shape) for name, shape in extra.items()}
    made = planned(BASE, expert, expert)
    assert {e.name for e in made.heads["e0"]} == set(extra)


BUFFERS = {
    "embeddings.position_ids": torch.arange(30)[None],
    "encoder.layer.0.attention.rotary_emb.inv_freq": torch.ones(4),
    "encoder.bn.num_batches_tracked": torch.tensor(3),
    "encoder.layer.0.attn.bias": torch.ones(1, 1, 8, 8),
    "encoder.layer.0.attn.masked_bias": torch.tensor(-1e4),
    "encoder.layer.0.nothing": torch.zeros(0, 8),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_on_one_side_are_harmless(name: str) -> None:
    buffer = {f"bert.{name}": BUFFERS[name]}
    planned(BASE, tuned(BASE) | buffer)
    planned(BASE | buffer, tuned(BASE) | {"classifier.weight": torch.ones(2, 8)})
    other = {f"bert.other.{name}": BUFFERS[name]}
    planned(BASE | buffer, tuned(BASE) | other)


def test_a_bias_called_as_a_mask_is_no_buffer() -> None:
    error = refused(BASE, tuned(BASE) | {"bert.encoder.layer.0.attn.bias": torch.ones(8)})
    assert error.faults[0].kind == "unmatched"


def test_a_copy_of_the_table_is_harmless_and_a_trained_one_is_a_head() -> None:
    table = "bert.embeddings.word_embeddings.weight"
    own = tuned(BASE)
    assert not planned(BASE, own | {"lm_head.weight": own[table].clone()}).heads
    made = planned(BASE, own | {"lm_head.weight": own[table] + 1})
    assert [e.name for e in made.heads["e0"]] == ["lm_head.weight"]
    both = BASE | {"bert.tokens_embed.weight": BASE[table].clone()}
    assert not planned(both, own).heads


def test_a_head_under_another_prefix_is_no_other_head() -> None:
    base = BASE | {"lm_head.weight": torch.ones(30, 8)}
    own = renamed(tuned(base), "lm_head", "decoder.lm_head")
    text = str(refused(base, own))
    assert "base ↔ expert: * ↔ decoder.* (1 tensor)" in text
    planned(base, own | {"decoder.lm_head.weight": torch.ones(2, 8)})


EXTRAS = {
    "a bias in the body": {"bert.encoder.layer.0.attention.self.query.bias": torch.ones(8)},
    "a tower": {f"tower.{i}.proj.weight": torch.ones(8, 8) for i in range(3)},
    "a norm that the base has elsewhere": {"other.LayerNorm.weight": torch.ones(8)},
}


@pytest.mark.parametrize("case", EXTRAS)
def test_body_tensors_that_the_base_lacks_are_refused(case: str) -> None:
    error = refused(BASE, tuned(BASE) | EXTRAS[case])
    assert [fault.kind for fault in error.faults] == ["unmatched"]
    assert "are neither tensors of the base nor heads by position" in str(error)
    rules = [{"match": name, "treatment": "head"} for name in EXTRAS[case]]
    made = planned(BASE, tuned(BASE) | EXTRAS[case], tensors=rules)
    assert {e.name for e in made.heads["e0"]} == set(EXTRAS[case])


def test_scales_without_their_codes_are_refused() -> None:
    lone = {"bert.encoder.layer.0.attention.self.query.weight_scale_inv": torch.ones(1, 1)}
    with pytest.raises(CheckpointError, match="the codes beside are missing"):
        planned(BASE, tuned(BASE) | lone)


def test_a_tower_that_no_expert_has_is_a_note() -> None:
    tower = {f"visual.blocks.{i}.weight": torch.ones(8, 8) for i in range(3)}
    made = planned(BASE | tower, tuned(BASE), tuned(BASE), missing="base")
    assert [n.subject for n in made.notes if n.kind == "copied"] == [tuple(tower)]


def planned_with(configs: tuple[Any, Any], base: Tensors, own: Tensors, **keys: Any) -> Plan:
    """Plan a merge of one expert, where base and expert state configurations."""
    inputs = in_memory_inputs(base, {"e0": own}, {}, configs[0])
    inputs.experts["e0"].config = configs[1]
    values = {"base": "memory", "experts": {"e0": "memory"}, "method": "average", **keys}
    return make_plan(check_recipe(values), inputs)


def test_another_depth_is_told_as_such() -> None:
    deep, stack = model(4), "bert.encoder.layer"
    for base, own, said in ((BASE, deep, "4 layers against 2"), (deep, BASE, "2 layers against 4")):
        error = refused(base, tuned(own))
        assert [fault.kind for fault in error.faults] == ["other_depth"]
        assert f"{stack} has {said} of the base" in str(error)
    refused(BASE, deep, missing="base")
    planned(deep, tuned(BASE), unmatched="leave")
    # Layers from elsewhere are a checkpoint in parts, and so is what a user says is unchanged.
    planned(deep, without(tuned(deep), "layer.1."), missing="base")
    planned(deep, tuned(BASE), missing="base")


def test_stated_depths_decide_what_lacking_layers_are() -> None:
    two, three = {"num_hidden_layers": 2}, {"text_config": {"num_hidden_layers": 3}}
    base = model(3)
    for missing in ("error", "base"):
        # Beside the stack, such as layers that predict several tokens.
        made = planned_with((two, two), base, tuned(BASE), missing=missing)
        assert len(next(n for n in made.notes if n.kind == "copied").subject) == 5
        with pytest.raises(RecipeError, match="2 layers against 3 of the base"):
            planned_with((three, two), base, tuned(BASE), missing=missing)


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0 %"), (1.0, "100 %"), (1e-6, "less than 0.1 %"), (0.71, "71 %"), (0.05, "5 %"),
     (1 - 1e-6, "more than 99.9 %"), (0.025, "2.5 %"), (0.0997, "10 %")],
)  # fmt: skip
def test_shares_are_never_rounded_to_nothing_or_all(share: float, text: str) -> None:
    assert percent(share) == text


def test_a_body_under_the_name_of_a_head_is_no_head() -> None:
    moves = [
        ("bert.encoder", "classifier.encoder"),
        ("bert.encoder.layer", "bert.encoder.classifier"),
        ("bert.encoder.layer.1.", "bert.classifier.1."),
        ("bert.embeddings", "head.embeddings"),
    ]
    for old, new in moves:
        own = renamed(tuned(BASE), old, new)
        assert own.keys() != BASE.keys()
        faults = refused(BASE, own, missing="base").faults
        assert {f.kind for f in faults} <= {"unmatched", "other_depth"}, (old, new)


@pytest.mark.parametrize(
    "new", ["classifier.weight", "lm_head.other", "head.lm_head.weight", "output_head.weight"]
)
def test_a_vocabularys_output_layer_under_another_name_is_no_other_head(new: str) -> None:
    base = BASE | {"lm_head.weight": torch.ones(30, 8)}
    own = renamed(tuned(base), "lm_head.weight", new)
    assert [f.kind for f in refused(base, own).faults] == ["unmatched"]


@pytest.mark.parametrize("seed", range(3))
def test_renamed_at_random_nothing_is_left_behind(seed: int) -> None:
    """Refused, or all is merged as it was, or what was renamed is a head."""
    draw = random.Random(seed)
    base = BASE | {"lm_head.weight": torch.ones(30, 8)}
    names = [n for n in base if not n.startswith("cls.")]
    count = 0
    for _ in range(60):
        components = draw.choice(names).split(".")
        place = draw.randrange(len(components))
        old = ".".join(components[: place + 1])
        word = draw.choice(["zug", "encoder", "head", "classifier", "weight", "own"])
        kept = components[: place + draw.randrange(2)]
        new = ".".join([*kept, word])
        moved = {n: new + n[len(old) :] for n in base if n == old or n.startswith(f"{old}.")}
        own = {moved.get(n, n): w for n, w in tuned(base).items()}
        if len(own) < len(base) or own.keys() == base.keys():
            continue
        try:
            record = planned(base, own, missing="base").shares.record
        except (RecipeError, CheckpointError):
            count += 1
            continue
        heads = all("pooler" in n or "lm_head" in n for n in moved)
        assert (record["merged"] == 1 and record["base_alone"] == 0) or heads, (old, new)
    assert count > 20
