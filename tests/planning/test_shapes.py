"""Another shape is a head at output layers only; elsewhere it is refused with what differs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eutectic.errors import Fault, RecipeError
from eutectic.planning.inputs import in_memory_inputs
from eutectic.planning.plan import Plan, make_plan
from eutectic.recipes.load import check_recipe

Tensors = dict[str, Tensor]


def model(
    hidden: int = 16, kv: int = 16, mlp: int = 32, layers: int = 2, channels: int = 3
) -> Tensors:
    """Return ones in the shapes of a small model with an image encoder, experts and heads."""
    tensors = {
        "model.embed_tokens.weight": (40, hidden),
        "model.visual.patch_embed.proj.weight": (8, channels, 2, 2),
        "model.mixture.experts.down_proj": (4, 6, 5),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (40, hidden),
        "score.weight": (2, hidden),
    }
    for i in range(layers):
        at = f"model.layers.{i}"
        tensors[f"{at}.self_attn.q_proj.weight"] = (hidden, hidden)
        tensors[f"{at}.self_attn.k_proj.weight"] = (kv, hidden)
        tensors[f"{at}.self_attn.v_proj.weight"] = (kv, hidden)
        tensors[f"{at}.self_attn.o_proj.weight"] = (hidden, hidden)
        tensors[f"{at}.mlp.up_proj.weight"] = (mlp, hidden)
        tensors[f"{at}.mlp.down_proj.weight"] = (hidden, mlp)
        tensors[f"{at}.input_layernorm.weight"] = (hidden,)
    return {name: torch.ones(shape) for name, shape in tensors.items()}


def planned(base: Tensors, *experts: Tensors, **keys: Any) -> Plan:
    named = {f"e{i}": tensors for i, tensors in enumerate(experts)}
    inputs = in_memory_inputs(base, named, {})
    values = {"base": "memory", "experts": dict.fromkeys(named, "memory"), "method": "average"}
    return make_plan(check_recipe({**values, **keys}), inputs)


def refused(base: Tensors, *experts: Tensors, **keys: Any) -> tuple[list[Fault], list[str]]:
    """Return the faults, and the lines of the message below its title."""
    with pytest.raises(RecipeError) as caught:
        planned(base, *experts, **keys)
    return caught.value.faults, str(caught.value).split("\n  - ")[1:]


BASE = model()
Q, K = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "qk")
CAUSES: dict[str, tuple[Tensors, str, int]] = {
    "MHA against GQA": (model(kv=8), "heads of keys and values (8 against 16 rows)", 4),
    "MLP width": (model(mlp=48), "another MLP width (48 against 32)", 4),
    "input channels": (model(channels=9), "9 input channels against 3", 1),
    "patch size": (
        BASE | {"model.visual.patch_embed.proj.weight": torch.ones(8, 3, 4, 4)},
        "another size of patches or kernels (4×4 against 2×2)",
        1,
    ),
    "mixture": (
        BASE | {"model.mixture.experts.down_proj": torch.ones(8, 6, 5)},
        "another number of experts in a mixture (8 against 4)",
        1,
    ),
    "transposed": (
        BASE | {"model.layers.0.mlp.up_proj.weight": torch.ones(16, 32)},
        "the matrix transposed",
        1,
    ),
    "flattened": (BASE | {Q: torch.ones(256)}, "flattened numbers", 1),
    "packed": (BASE | {Q: torch.ones(128, 1)}, "has another shape than [16, 16]", 1),
    "queries": (BASE | {Q: torch.ones(8, 16)}, "attention heads (8 against 16 rows)", 1),
    "dimensions": (BASE | {Q: torch.ones(16, 4, 4)}, "3 dimensions instead of 2", 1),
    "anything": (
        BASE | {"model.layers.0.self_attn.o_proj.weight": torch.ones(16, 20)},
        "another shape than [16, 16]",
        1,
    ),
}


@pytest.mark.parametrize("case", CAUSES)
def test_a_body_of_another_shape_is_refused_with_the_cause_in_one_line(case: str) -> None:
    expert, said, count = CAUSES[case]
    faults, lines = refused(BASE, expert)
    assert [fault.kind for fault in faults] == ["other_shape"] * count
    assert {f.got for f in faults} <= {str(list(w.shape)) for w in expert.values()}
    assert len(lines) == 1 and "expert 'e0' has" in lines[0] and said in lines[0]
    assert faults[0].where in lines[0]


def test_zero3_leftovers_are_told_as_such_whatever_the_tensor() -> None:
    names = [K, "model.embed_tokens.weight", "lm_head.weight", "score.weight", "model.norm.weight"]
    faults, lines = refused(BASE, BASE | dict.fromkeys(names, torch.zeros(0)))
    assert {f.where for f in faults} == set(names) and {f.got for f in faults} == {"[0]"}
    assert len(lines) == 1 and "saved under ZeRO-3 without gathering the parameters" in lines[0]
    assert "and 1 more: expert 'e0' has no numbers" in lines[0] and "got [0]" in lines[0]
    assert "treatment" not in lines[0] and "zero_to_fp32.py" in lines[0]
    # All of a model, which is no other base; and a head that the base lacks.
    every = {name: torch.zeros(0) for name in BASE} | {"model.norm.weight": torch.ones(16)}
    faults, lines = refused(BASE, every)
    assert len(lines) == 1 and len(faults) == len(BASE) - 1
    faults, _ = refused(BASE, BASE | {"classifier.weight": torch.zeros(0)})
    assert [f.where for f in faults] == ["classifier.weight"]


def test_an_empty_base_is_no_reason_to_leave_what_an_expert_has() -> None:
    base = BASE | {K: torch.zeros(0)}
    (fault,), lines = refused(base, BASE)
    assert fault.where == K and "the base has no numbers there: saved under ZeRO-3" in lines[0]
    planned(base, base)


def test_another_hidden_size_is_another_base() -> None:
    faults, lines = refused(BASE, model(hidden=24, kv=24))
    assert [f.kind for f in faults] == ["another_base"] and len(lines) == 1
    assert "expert 'e0' is not of this base: 18 of 20" in lines[0]
    assert "It has another hidden size (24 against 16)." in lines[0]


def test_one_expert_of_three_and_two_causes_are_two_lines() -> None:
    faults, lines = refused(BASE, BASE, model(kv=8, mlp=48), BASE)
    assert len(faults) == 8 and len(lines) == 2
    assert all("expert 'e1' has" in line and "e0" not in line for line in lines)


@pytest.mark.parametrize("name", ["score.weight", "classifier.dense.weight", "head.fc.weight"])
def test_output_layers_of_another_shape_are_heads(name: str) -> None:
    base = BASE | {name: torch.ones(3, 16)}
    made = planned(base, base, base | {name: torch.ones(5, 16)})
    assert [e.name for e in made.heads["e1"]] == [name]


@pytest.mark.parametrize("treatment", ["copy", "head"])
def test_a_rule_keeps_a_tensor_apart(treatment: str) -> None:
    rules = [{"match": Q, "treatment": treatment}]
    made = planned(BASE, BASE | {Q: torch.ones(8, 16)}, tensors=rules)
    assert next(t for t in made.tensors if t.name == Q).treatment.value == treatment


def test_a_table_of_another_size_is_one_line_and_of_another_width_no_table() -> None:
    wide = {n: torch.ones(48, 16) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    faults, lines = refused(BASE, BASE | wide)
    assert [f.kind for f in faults] == ["table_size"] * 2 and len(lines) == 1
    narrow = {"model.embed_tokens.weight": torch.ones(40, 12)}
    assert [f.kind for f in refused(BASE, BASE | narrow)[0]] == ["other_shape"]


def test_equal_faults_are_one_line_with_a_count() -> None:
    faults = [Fault("dtype", "holds int8.", f"layers.{i}.weight", 3) for i in range(30)]
    other = Fault("dtype", "holds int4.", "x", 3)
    error = RecipeError([*faults, other, Fault("more", "a"), Fault("more", "a")], "the recipe")
    assert len(error.faults) == 33
    assert str(error).splitlines() == [
        "the recipe cannot be carried out (33 faults):",
        f"  - line 3: {', '.join(f.where for f in faults[:4])} and 26 more: holds int8.",
        "  - line 3: x: holds int4.",
        "  - a",
        "  - a",
    ]
    many = [Fault("dtype", f"holds {i}.", "x") for i in range(40)]
    assert str(RecipeError(many)).splitlines()[-1] == "  - and 10 more."
