"""Guards that a merge does not change by a bit however an expert is spelt, packed and sharded.

A model is renamed, re-prefixed, re-packed and re-sharded at random within the known equivalences; a
name outside them is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import eutectic
from eutectic.errors import RecipeError

Tensors = dict[str, Tensor]
EXPERTS = 3
# A whole merge per example: what fails is small enough without minutes of shrinking.
QUICK: dict[str, Any] = {"deadline": None, "derandomize": True, "phases": [Phase.generate]}

# --- one model, in the spelling that the others are made from ---------------------------------


def model(seed: int, moved: float = 0.0) -> Tensors:
    """A vision-language model with a mixture, layer norms and a convolution under weight norm."""
    g = torch.Generator().manual_seed(0)
    shapes = {"embed_tokens.weight": (20, 6), "norm.weight": (6,)}
    for layer in range(2):
        at = f"layers.{layer}."
        shapes |= {f"{at}self_attn.{n}_proj.weight": (6, 6) for n in "qkvo"}
        shapes |= {f"{at}input_layernorm.{n}": (6,) for n in ("weight", "bias")}
        shapes[f"{at}mlp.gate.weight"] = (EXPERTS, 6)
        for e in range(EXPERTS):
            own = f"{at}mlp.experts.{e}."
            shapes |= {f"{own}{n}_proj.weight": (4, 6) for n in ("gate", "up")}
            shapes[f"{own}down_proj.weight"] = (6, 4)
    shapes = {f"model.{name}": shape for name, shape in shapes.items()}
    shapes |= {
        "visual.blocks.0.attn.qkv.weight": (18, 6),
        "visual.blocks.0.norm1.weight": (6,),
        "visual.blocks.0.norm1.bias": (6,),
        "visual.pos.conv.weight_g": (1, 1, 3),
        "visual.pos.conv.weight_v": (6, 6, 3),
        "lm_head.weight": (20, 6),
    }
    tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    g = torch.Generator().manual_seed(seed)
    return {n: t + moved * torch.randn(t.shape, generator=g) for n, t in tensors.items()}


# --- spellings --------------------------------------------------------------------------------

# (language model, output layer, vision) in place of ("model.", "lm_head.", "visual.").
PREFIXES = (
    ("model.", "lm_head.", "visual."),
    ("model.language_model.", "lm_head.", "model.visual."),
    ("language_model.model.", "language_model.lm_head.", "visual."),
    ("thinker.model.", "thinker.lm_head.", "thinker.visual."),
    ("base_model.model.model.", "base_model.model.lm_head.", "base_model.model.visual."),
)
OUTER = ("", "module.", "_orig_mod.", "_fsdp_wrapped_module.", "policy.", "a.b.")
INNER = ("_orig_mod", "_fsdp_wrapped_module", "module", "base_layer")
PACKED = ("single", "mixtral", "packed", "turned", "stacked", "vllm", "granite")

spelling = st.fixed_dictionaries(
    {
        "prefix": st.sampled_from(PREFIXES),
        "outer": st.sampled_from(OUTER),
        "inner": st.lists(st.tuples(st.sampled_from(INNER), st.integers(0, 60)), max_size=3),
        "norms": st.booleans(),
        "weight_norm": st.booleans(),
        "packed": st.sampled_from(PACKED),
        "shards": st.integers(1, 3),
    }
)


def repacked(tensors: Tensors, how: str) -> Tensors:
    """Keep the mixtures in another layout."""
    if how == "single":
        return tensors
    if how == "mixtral":
        words = {"mlp.experts": "block_sparse_moe.experts", "mlp.gate.": "block_sparse_moe.gate."}
        words |= {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        return {n: t for n, t in spelt(tensors, words).items()}
    out = {name: t for name, t in tensors.items() if ".experts." not in name}
    for layer in range(2):
        at = f"model.layers.{layer}.mlp"
        gate, up, down = (
            torch.stack([tensors[f"{at}.experts.{e}.{n}_proj.weight"] for e in range(EXPERTS)])
            for n in ("gate", "up", "down")
        )
        both = torch.cat([gate, up], dim=1)
        if how == "stacked":
            for n, t in {"gate": gate, "up": up, "down": down}.items():
                out[f"{at}.experts.{n}_proj"] = t
        elif how == "vllm":
            out |= {f"{at}.experts.w13_weight": both, f"{at}.experts.w2_weight": down}
        elif how == "granite":
            out |= {f"{at}.input_linear.weight": both, f"{at}.output_linear.weight": down}
        else:
            turned = how == "turned"
            out[f"{at}.experts.gate_up_proj"] = both.mT if turned else both
            out[f"{at}.experts.down_proj"] = down.mT if turned else down
    return out


def spelt(tensors: Tensors, words: Mapping[str, str]) -> Tensors:
    pattern = re.compile("|".join(map(re.escape, words))) if words else None
    if pattern is None:
        return tensors
    return {pattern.sub(lambda m: words[m[0]], name): t for name, t in tensors.items()}


def rewritten(tensors: Tensors, how: Mapping[str, object]) -> Tensors:
    """Return the same model as another writer would have saved it."""
    tensors = repacked(tensors, str(how["packed"]))
    if how["norms"]:
        norm = re.compile(r"(norm\d?)\.(weight|bias)$")
        word = {"weight": "gamma", "bias": "beta"}
        tensors = {norm.sub(lambda m: f"{m[1]}.{word[m[2]]}", n): t for n, t in tensors.items()}
    if how["weight_norm"]:
        words = {f"weight_{c}": f"parametrizations.weight.original{i}" for i, c in enumerate("gv")}
        tensors = spelt(tensors, words)
    roots = dict(zip(PREFIXES[0], how["prefix"], strict=True))
    out: Tensors = {}
    for position, (name, t) in enumerate(tensors.items()):
        root = next(r for r in roots if name.startswith(r))
        components = (roots[root] + name.removeprefix(root)).split(".")
        for word, place in how["inner"]:
            if place % len(tensors) == position:
                components.insert(place % len(components), word)
        out[str(how["outer"]) + ".".join(components)] = t.contiguous()
    return out


# --- folders ----------------------------------------------------------------------------------


def put(folder: Path, tensors: Tensors, shards: int = 1) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "some_moe"}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        own = {n: t for n, t in tensors.items() if where[n] == file}
        save_file(own, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def merged(base: Tensors, experts: Mapping[str, tuple[Tensors, int]], method: str) -> Tensors:
    with TemporaryDirectory() as place:
        root = Path(place)
        eutectic.merge(
            base=str(put(root / "base", base)),
            experts={n: str(put(root / n, t, shards)) for n, (t, shards) in experts.items()},
            method=method,
            scale=0.7,
            output=str(root / "out"),
        )
        return load_file(root / "out" / "model.safetensors")


BASE, A, B = model(1), model(2, 0.1), model(3, 0.1)


@settings(max_examples=10, **QUICK)
@given(base=spelling, own=spelling, method=st.sampled_from(["average", "ties", "iso_c"]))
def test_the_merge_does_not_change_by_a_bit(
    base: dict[str, object], own: dict[str, object], method: str
) -> None:
    held = rewritten(BASE, base)
    plain = {"a": (rewritten(A, base), 1), "b": (rewritten(B, base), 1)}
    other = {**plain, "a": (rewritten(A, own), int(str(own["shards"])))}
    wanted, found = (merged(held, experts, method) for experts in (plain, other))
    assert wanted.keys() == held.keys() == found.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, found[name]), name
        if method == "average":  # others may keep nothing of a tensor of three numbers
            assert not torch.equal(tensor, held[name]), name


OUTSIDE = {
    "a module": {"self_attn": "selfattention"},
    "a stack": {"layers.": "blocks."},
    "a projection": {"q_proj": "query_of_this"},
    "a norm": {"input_layernorm.weight": "input_layernorm.scale"},
    "a tower": {"visual.": "eyes."},
    "the experts": {"mlp.experts": "mlp.specialists"},
    "a role": {".gate_proj": ".gating"},
    "layers in another order": {"layers.0": "layers.7"},
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_name_outside_is_refused(case: str) -> None:
    renamed = spelt(A, OUTSIDE[case])
    assert renamed.keys() != A.keys()
    with pytest.raises(RecipeError, match="expert 'a'"):
        merged(BASE, {"a": (renamed, 1), "b": (B, 1)}, "average")


@settings(max_examples=40, **QUICK)
@given(base=spelling, own=spelling)
def test_state_dicts_in_memory(base: dict[str, object], own: dict[str, object]) -> None:
    held = rewritten(BASE, base)
    wanted = eutectic.merge_state_dicts(held, {"a": rewritten(A, base)}, method="average")
    found = eutectic.merge_state_dicts(held, {"a": rewritten(A, own)}, method="average")
    for name, tensor in wanted.items():
        assert torch.equal(tensor, found[name]), name


# --- adapters ---------------------------------------------------------------------------------

_ADAPTED = [f"layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qv"]


@settings(max_examples=8, **QUICK)
@given(
    base=spelling,
    prefix=st.sampled_from(PREFIXES),
    wrapper=st.sampled_from(["", "module.", "_orig_mod.", "_fsdp_wrapped_module."]),
    named=st.sampled_from(["", ".default", ".mine"]),
)
def test_adapters(
    base: dict[str, object], prefix: tuple[str, str, str], wrapper: str, named: str
) -> None:
    g = torch.Generator().manual_seed(0)
    held = rewritten(BASE, {**base, "inner": []})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    root = f"{base['outer']}{base['prefix'][0]}"
    tensors: Tensors = {}
    wanted = dict(held)
    for module in _ADAPTED:
        a, b = torch.randn(2, 6, generator=g), torch.randn(6, 2, generator=g)
        at = f"{wrapper}base_model.model.{prefix[0]}{module}"
        tensors |= {f"{at}.lora_A{named}.weight": a, f"{at}.lora_B{named}.weight": b}
        wanted[f"{root}{module}.weight"] = held[f"{root}{module}.weight"] + 2 * (b @ a)
    with TemporaryDirectory() as place:
        folder = Path(place) / "a"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        eutectic.merge(
            base=str(put(Path(place) / "base", held)),
            experts={"a": str(folder)},
            method="average",
            output=str(Path(place) / "out"),
        )
        found = load_file(Path(place) / "out" / "model.safetensors")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, msg=name)
