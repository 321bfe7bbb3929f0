"""Guards the shapes of configurations that model cards have: each plans, merges and loads again.

They were written for this test, after the habits of such cards. Models are tiny stand-ins.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import eutectic
from helpers.folders import load, save
from helpers.vocabularies import tokenizer_json

LAYERS = 8
WORDS = [f"w{n}" for n in range(20)]
CHAT = ("<|im_start|>", "<|im_end|>")


def write(folder: Path, seed: int, added: tuple[str, ...] = ()) -> None:
    """Write a model in the manner of a Llama with a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(WORDS) + len(added)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    tensors = {"model.embed_tokens.weight": randn(rows, 4)}
    for n in range(LAYERS):
        for kind in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"model.layers.{n}.self_attn.{kind}.weight"] = randn(4, 4)
        tensors[f"model.layers.{n}.mlp.up_proj.weight"] = randn(6, 4)
        tensors[f"model.layers.{n}.mlp.down_proj.weight"] = randn(4, 6)
        tensors[f"model.layers.{n}.input_layernorm.weight"] = randn(4)
    tensors |= {"model.norm.weight": randn(4), "lm_head.weight": randn(rows, 4)}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": LAYERS,
        "vocab_size": rows,
        "tie_word_embeddings": False,
    }
    save(folder, tensors, config)
    tokenizer = tokenizer_json(WORDS, added)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("cards")
    for seed, name in enumerate(("base", "chat", "code", "math", "story", "wild")):
        write(place / "lab" / name, seed)
    write(place / "lab" / "talk", 10, CHAT)
    write(place / "lab" / "call", 11, (*CHAT, "<|tool|>"))
    adapter = place / "lab" / "lora"
    adapter.mkdir()
    name = "base_model.model.model.layers.2.self_attn.q_proj"
    factors = {
        f"{name}.lora_A.weight": torch.randn(2, 4),
        f"{name}.lora_B.weight": torch.ones(4, 2),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return place


SLERP_T = """
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
"""

SHAPES = {
    "slerp-slices": """
slices:
  - sources:
      - model: lab/chat
        layer_range: [0, 8]
      - model: lab/code
        layer_range: [0, 8]
merge_method: slerp
base_model: lab/chat
"""
    + SLERP_T,
    "slerp-models": "models:\n  - model: lab/chat\n  - model: lab/code\nmerge_method: slerp\n"
    "base_model: lab/code" + SLERP_T,
    "slerp-one-number": """
models: [{model: lab/chat}, {model: lab/code}]
merge_method: slerp
base_model: lab/chat
parameters: {t: 0.35}
dtype: float16
""",
    "slerp-a-list-alone": """
models: [{model: lab/chat}, {model: lab/code}]
merge_method: slerp
base_model: lab/chat
dtype: bfloat16
parameters:
  t: [0, 0.5, 1, 0.5, 0]
""",
    "slerp-value-alone": """
models: [{model: lab/chat}, {model: lab/code}]
merge_method: slerp
base_model: lab/chat
parameters:
  t:
    - value: [0.1, 0.9]
  embed_slerp: true
""".replace("  embed_slerp: true\n", ""),
    "slerp-in-parts": """
slices:
  - sources: [{model: lab/chat, layer_range: [0, 4]}, {model: lab/code, layer_range: [0, 4]}]
    parameters: {t: [0, 1]}
  - sources: [{model: lab/chat, layer_range: [4, 8]}, {model: lab/code, layer_range: [4, 8]}]
merge_method: slerp
base_model: lab/chat
parameters: {t: 0.5}
""",
    "linear": """
models:
  - model: lab/chat
    parameters:
      weight: 1.0
  - model: lab/code
    parameters:
      weight: 0.3
merge_method: linear
dtype: float16
""",
    "linear-sum": """
models:
  - {model: lab/chat, parameters: {weight: 0.6}}
  - {model: lab/code, parameters: {weight: 0.4}}
merge_method: linear
parameters: {normalize: false}
int8_mask: true
""".replace("int8_mask: true\n", ""),
    "linear-weight-for-all": """
models: [{model: lab/chat}, {model: lab/code}, {model: lab/math}]
merge_method: linear
parameters: {weight: 1}
dtype: float32
out_dtype: bfloat16
""",
    "linear-base-listed": """
models:
  - {model: lab/base, parameters: {weight: 0.5}}
  - {model: lab/chat, parameters: {weight: 0.5}}
base_model: lab/base
merge_method: linear
""",
    "ties": """
models:
  - model: lab/base
    # the base needs no parameters
  - model: lab/chat
    parameters:
      density: 0.5
      weight: 0.5
  - model: lab/code
    parameters:
      density: 0.5
      weight: 0.3
merge_method: ties
base_model: lab/base
parameters:
  normalize: true
dtype: float16
""",
    "ties-masks": """
models:
  - {model: lab/chat, parameters: {density: 1, weight: 1}}
  - {model: lab/code, parameters: {density: 0.2, weight: 0.1}}
merge_method: ties
base_model: lab/base
parameters: {normalize: false, int8_mask: true, lambda: 0.9}
dtype: bfloat16
tokenizer_source: base
""",
    "ties-filters": """
models:
  - model: lab/chat
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: lab/math
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: lab/base
parameters: {normalize: true, int8_mask: true}
dtype: float16
""",
    "ties-layers-apart": """
slices:
  - sources:
      - {model: lab/base, layer_range: [0, 8]}
      - {model: lab/chat, layer_range: [0, 8], parameters: {weight: [0.1, 0.9], density: 0.6}}
      - {model: lab/story, layer_range: [0, 8], parameters: {weight: [0.9, 0.1], density: 0.6}}
merge_method: ties
base_model: lab/base
parameters: {int8_mask: true}
""",
    "dare-ties": """
models:
  - model: lab/base
  - {model: lab/chat, parameters: {density: 0.53, weight: 0.4}}
  - {model: lab/code, parameters: {density: 0.53, weight: 0.3}}
  - {model: lab/wild, parameters: {density: 0.53, weight: 0.3}}
merge_method: dare_ties
base_model: lab/base
parameters: {int8_mask: true}
dtype: bfloat16
""",
    "dare-ties-rescaled": """
base_model: lab/base
merge_method: dare_ties
dtype: bfloat16
parameters: {normalize: true, rescale: false}
models:
  - {model: lab/chat, parameters: {weight: [0.3, 0.6], density: 0.8}}
  - {model: lab/code, parameters: {weight: [0.7, 0.4], density: 0.8}}
""",
    "dare-linear": """
models:
  - {model: lab/chat, parameters: {density: 0.5, weight: 0.5}}
  - {model: lab/code, parameters: {density: 0.66, weight: 0.5}}
merge_method: dare_linear
base_model: lab/base
parameters: {int8_mask: true}
""",
    "task-arithmetic-away-from": """
models:
  - {model: lab/chat, parameters: {weight: 1.0}}
  - {model: lab/wild, parameters: {weight: -0.5}}
merge_method: task_arithmetic
base_model: lab/base
dtype: bfloat16
""",
    "task-arithmetic-normalised": """
models:
  - {model: lab/chat, parameters: {weight: 1e-1}}
  - {model: lab/code, parameters: {weight: "0.35"}}
merge_method: task_arithmetic
base_model: lab/base
parameters: {normalize: true, lambda: 1.1}
""",
    "task-arithmetic-adapter": """
models:
  - {model: lab/chat, parameters: {weight: 0.7}}
  - {model: lab/base+lab/lora, parameters: {weight: 1}}
merge_method: task_arithmetic
base_model: lab/base
""",
    "passthrough-deeper": """
slices:
  - sources:
      - model: lab/chat
        layer_range: [0, 6]
  - sources:
      - model: lab/story
        layer_range: [2, 8]
merge_method: passthrough
dtype: float16
""",
    "passthrough-interleaved": """
slices:
  - sources: [{model: lab/chat, layer_range: [0, 3]}]
  - sources: [{model: lab/story, layer_range: [1, 4]}]
  - sources: [{model: lab/chat, layer_range: [3, 5]}]
  - sources: [{model: lab/story, layer_range: [4, 6]}]
  - sources: [{model: lab/chat, layer_range: [5, 7]}]
  - sources: [{model: lab/story, layer_range: [6, 8]}]
merge_method: passthrough
dtype: bfloat16
""",
    "passthrough-of-itself": """
dtype: bfloat16
merge_method: passthrough
slices:
- sources:
  - {model: lab/chat, layer_range: [0, 4]}
- sources:
  - {model: lab/chat, layer_range: [2, 6]}
- sources:
  - {model: lab/chat, layer_range: [4, 8]}
""",
    "passthrough-scaled-copies": """
merge_method: passthrough
slices:
- sources:
  - {model: lab/chat, layer_range: [0, 6]}
- sources:
  - model: lab/chat
    layer_range: [4, 6]
    parameters:
      scale:
        - {filter: o_proj, value: 0.0}
        - {filter: down_proj, value: 0.0}
        - value: 1.0
- sources:
  - {model: lab/chat, layer_range: [6, 8]}
""",
    "passthrough-pruned": """
slices:
  - sources: [{model: lab/chat, layer_range: [0, 3]}]
  - sources: [{model: lab/chat, layer_range: [5, 8]}]
merge_method: passthrough
dtype: bfloat16
""",
    "passthrough-adapter": """
models: [{model: lab/chat+lab/lora}]
merge_method: passthrough
dtype: bfloat16
""",
    "linear-then-deeper": """
slices:
  - sources:
      - {model: lab/chat, layer_range: [0, 4], parameters: {weight: 0.5}}
      - {model: lab/code, layer_range: [0, 4], parameters: {weight: 0.5}}
  - sources:
      - {model: lab/story, layer_range: [2, 8], parameters: {weight: 1}}
merge_method: linear
""",
    "model-stock": """
models: [{model: lab/chat}, {model: lab/code}, {model: lab/math}]
merge_method: model_stock
base_model: lab/base
dtype: bfloat16
""",
    "model-stock-listed-base": """
base_model: lab/base
models: [{model: lab/base}, {model: lab/chat}, {model: lab/code}]
merge_method: model_stock
parameters: {filter_wise: false}
tokenizer_source: base
""",
    "breadcrumbs": """
models:
  - {model: lab/chat, parameters: {weight: 0.8, density: 0.9, gamma: 0.01}}
  - {model: lab/code, parameters: {weight: 0.4, density: 0.9, gamma: 0.01}}
merge_method: breadcrumbs
base_model: lab/base
""",
    "breadcrumbs-ties": """
models:
  - {model: lab/chat, parameters: {weight: 0.25, density: 0.92, gamma: 0.01}}
  - {model: lab/wild, parameters: {weight: 0.55, density: 0.92, gamma: 0.01}}
merge_method: breadcrumbs_ties
base_model: lab/base
dtype: bfloat16
""",
    "della": """
models:
  - {model: lab/chat, parameters: {weight: 0.4, density: 0.5, epsilon: 0.1}}
  - {model: lab/code, parameters: {weight: 0.6, density: 0.7, epsilon: 0.2}}
merge_method: della
base_model: lab/base
parameters: {normalize: true, int8_mask: true, lambda: 1.05}
dtype: bfloat16
""",
    "della-linear": """
models:
  - model: lab/chat
    parameters: {weight: [0.2, 0.6], density: 0.6, epsilon: 0.15}
  - model: lab/code
    parameters: {weight: [0.6, 0.2], density: 0.6, epsilon: 0.15}
merge_method: della_linear
base_model: lab/base
parameters: {epsilon: 0.1, lambda: 1, rescale: true}
""",
    "sce": """
models: [{model: lab/chat}, {model: lab/code}, {model: lab/math}]
merge_method: sce
base_model: lab/base
parameters: {select_topk: 0.25}
dtype: bfloat16
""",
    "nuslerp": """
models:
  - {model: lab/chat, parameters: {weight: 0.4}}
  - {model: lab/code, parameters: {weight: [0.2, 0.8]}}
merge_method: nuslerp
dtype: bfloat16
""",
    "nuslerp-from-base": """
models:
  - {model: lab/chat, parameters: {weight: 1}}
  - {model: lab/code, parameters: {weight: 1}}
merge_method: nuslerp
base_model: lab/base
parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
""",
    "multislerp": """
models:
  - {model: lab/chat, parameters: {weight: 0.5}}
  - {model: lab/code, parameters: {weight: 0.2}}
  - {model: lab/math, parameters: {weight: 0.3}}
merge_method: multislerp
""",
    "karcher": """
models: [{model: lab/chat}, {model: lab/code}, {model: lab/story}]
merge_method: karcher
parameters: {max_iter: 20, tol: 1e-6}
dtype: bfloat16
""",
    "arcee-fusion": """
models: [{model: lab/base}, {model: lab/chat}]
merge_method: arcee_fusion
base_model: lab/base
dtype: bfloat16
""",
    "nearswap": """
models: [{model: lab/base}, {model: lab/chat}]
merge_method: nearswap
base_model: lab/base
parameters: {t: 0.001}
""",
    "ram": """
models: [{model: lab/chat}, {model: lab/code}]
merge_method: ram
base_model: lab/base
""",
    "ramplus": """
models: [{model: lab/chat}, {model: lab/code}]
merge_method: ramplus_tl
base_model: lab/base
parameters: {r: 0.2, alpha: 0.1}
""",
    "union": """
models:
  - {model: lab/talk, parameters: {weight: 0.5, density: 0.5}}
  - {model: lab/call, parameters: {weight: 0.5, density: 0.5}}
merge_method: dare_ties
base_model: lab/base
tokenizer_source: union
""",
    "tokenizer-of-a-model": """
models: [{model: lab/talk, parameters: {weight: 1}}, {model: lab/chat, parameters: {weight: 1}}]
merge_method: linear
tokenizer: {source: lab/talk}
chat_template: chatml
""",
    "tokens": """
models: [{model: lab/talk}, {model: lab/call}]
merge_method: karcher
tokenizer:
  source: union
  tokens:
    <|im_start|>: {source: lab/talk, force: true}
    <|tool|>: {source: {kind: model_token, model: lab/talk, token: <|im_end|>}}
  pad_to_multiple_of: 8
chat_template: auto
""",
    "long-names": """
models:
  - model: {model: {path: lab/chat}, lora: {path: lab/lora}}
    parameters: {weight: 0.6}
  - model: {model: {path: lab/code}}
    parameters: {weight: 0.4}
base_model: {model: {path: lab/base}}
merge_method: task_arithmetic
dtype: torch.bfloat16
""",
    "filters-of-tables": """
models:
  - model: lab/chat
    parameters:
      weight:
        - {filter: embed_tokens, value: 1}
        - {filter: lm_head, value: 1}
        - {filter: "*", value: [0.2, 0.8]}
  - model: lab/code
    parameters:
      weight: [{filter: embed_tokens, value: 0}, {filter: lm_head, value: 0}, {value: 0.5}]
merge_method: task_arithmetic
base_model: lab/base
""",
    "modules": """
modules:
  default:
    models:
      - {model: lab/chat, parameters: {weight: 1}}
      - {model: lab/code, parameters: {weight: 1}}
    parameters: {normalize: false}
merge_method: linear
""",
    "ours-iso": """
models: [{model: lab/chat}, {model: lab/code, parameters: {weight: 0.5}}]
merge_method: iso_c
base_model: lab/base
parameters: {scale: 1.2}
dtype: bfloat16
""",
    "ours-tsv-by-layers": """
slices:
  - sources:
      - {model: lab/base, layer_range: [0, 4]}
      - {model: lab/chat, layer_range: [0, 4]}
      - {model: lab/code, layer_range: [2, 6]}
merge_method: tsv_m
base_model: lab/base
""",
    "stages": """
name: talkers
models: [{model: lab/chat, parameters: {weight: 1}}, {model: lab/story, parameters: {weight: 1}}]
merge_method: linear
---
name: solvers
models: [{model: lab/code, parameters: {weight: 1}}, {model: lab/math, parameters: {weight: 1}}]
merge_method: ties
base_model: lab/base
---
models: [{model: talkers}, {model: solvers}]
base_model: talkers
merge_method: slerp
parameters: {t: 0.5}
dtype: bfloat16
""",
}


def test_there_are_enough_of_them():
    assert len(SHAPES) >= 48


@pytest.mark.parametrize("shape", SHAPES)
def test_it_merges(folder, tmp_path, shape):
    recipe = folder / f"{shape}.yml"
    recipe.write_text(SHAPES[shape])
    eutectic.merge(recipe, output=tmp_path / "out", threads=1)
    merged = load(tmp_path / "out")
    assert all(bool(torch.isfinite(t.float()).all()) for t in merged.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    depth = {int(n.split(".")[2]) for n in merged if n.startswith("model.layers.")}
    assert depth == set(range(config["num_hidden_layers"]))
    rows = {merged[n].shape[0] for n in ("model.embed_tokens.weight", "lm_head.weight")}
    assert rows == {config["vocab_size"]}
    asked = "dtype: float16" in SHAPES[shape]
    assert {t.dtype for t in merged.values()} == {torch.float16 if asked else torch.bfloat16}
    assert (tmp_path / "out" / "tokenizer.json").exists()
