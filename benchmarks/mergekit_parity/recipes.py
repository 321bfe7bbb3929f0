"""Recipes in mergekit's dialect: every method, level of parameters and kind of output.

`M` stands for the folder of `models.py`. A recipe with `dtype: bfloat16` and the like is compared
up to the rounding of that type.
"""

from __future__ import annotations

from collections.abc import Iterator

KINDS = ("llama", "mistral", "qwen2", "gemma2", "phi3", "mixtral")


def recipes() -> Iterator[tuple[str, str]]:
    """Yield (name, document) of every recipe."""
    for kind in KINDS:
        yield from _basic(kind)
    for name, text in {**METHODS, **LEVELS, **SLICES, **OUTPUTS, **TOKENS}.items():
        yield name, text.strip() + "\n"


def _basic(kind: str) -> Iterator[tuple[str, str]]:
    yield (
        f"{kind}/linear",
        f"""\
models:
  - model: M/{kind}/a
    parameters: {{weight: 0.6}}
  - model: M/{kind}/b
    parameters: {{weight: 0.3}}
merge_method: linear
""",
    )
    yield (
        f"{kind}/task_arithmetic",
        f"""\
models:
  - model: M/{kind}/a
    parameters: {{weight: 0.4}}
  - model: M/{kind}/b
    parameters: {{weight: -0.3}}
merge_method: task_arithmetic
base_model: M/{kind}/base
parameters: {{lambda: 0.8}}
""",
    )
    yield (
        f"{kind}/ties",
        f"""\
models:
  - model: M/{kind}/base
  - model: M/{kind}/a
    parameters: {{density: 0.5, weight: 0.5}}
  - model: M/{kind}/b
    parameters: {{density: 0.3, weight: 0.7}}
  - model: M/{kind}/c
    parameters: {{density: 0.9, weight: 0.2}}
merge_method: ties
base_model: M/{kind}/base
parameters: {{normalize: true, int8_mask: true}}
dtype: float32
""",
    )
    yield (
        f"{kind}/slerp",
        f"""\
slices:
  - sources:
      - model: M/{kind}/base
        layer_range: [0, 4]
      - model: M/{kind}/a
        layer_range: [0, 4]
merge_method: slerp
base_model: M/{kind}/base
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float32
""",
    )


THREE = """\
models:
  - model: M/llama/a
    parameters: {weight: 0.5}
  - model: M/llama/b
    parameters: {weight: 0.3}
  - model: M/llama/c
    parameters: {weight: 0.4}
"""
TWO = """\
models:
  - model: M/llama/a
    parameters: {weight: 0.6}
  - model: M/llama/b
    parameters: {weight: 0.2}
"""
PLAIN = "models: [{model: M/llama/a}, {model: M/llama/b}, {model: M/llama/c}]\n"
ONE = "models: [{model: M/llama/base}, {model: M/llama/b}]\n"
BASE = "base_model: M/llama/base\n"

KNOWN = {
    "mixtral/ties": "mergekit ranks and stores a layer's experts as one tensor, as transformers 5",
    "mixtral/slerp": "mergekit turns a layer's experts as one tensor, and calls it mlp.experts",
}

METHODS = {
    "linear without normalising": THREE + "merge_method: linear\nparameters: {normalize: false}",
    "linear with the base among the models": TWO
    + "  - {model: M/llama/base, parameters: {weight: 1}}\nmerge_method: linear\n"
    + BASE,
    "task_arithmetic normalised": THREE
    + "merge_method: task_arithmetic\nparameters: {normalize: true}\n"
    + BASE,
    "ties without normalising": THREE
    + "merge_method: ties\nparameters: {normalize: false, density: 0.4, lambda: 0.7}\n"
    + BASE,
    "ties rescaled": THREE
    + "merge_method: ties\nparameters: {rescale: true, density: 0.2}\n"
    + BASE,
    "dare_ties of everything": THREE + "merge_method: dare_ties\nparameters: {density: 1}\n" + BASE,
    "dare_linear of everything": THREE
    + "merge_method: dare_linear\nparameters: {density: 1, normalize: true}\n"
    + BASE,
    "della of everything": THREE + "merge_method: della\n" + BASE,
    "della_linear of everything": THREE + "merge_method: della_linear\n" + BASE,
    "nuslerp of task vectors": TWO + "merge_method: nuslerp\n" + BASE,
    "nuslerp of weights": TWO + "merge_method: nuslerp\n",
    "nuslerp by rows": TWO + "merge_method: nuslerp\nparameters: {nuslerp_flatten: false}\n" + BASE,
    "nuslerp by columns": TWO
    + "merge_method: nuslerp\nparameters: {nuslerp_flatten: false, nuslerp_row_wise: true}\n"
    + BASE,
    "multislerp of task vectors": THREE + "merge_method: multislerp\n" + BASE,
    "multislerp of weights": THREE
    + "merge_method: multislerp\nparameters: {normalize_weights: false}\n",
    "karcher": PLAIN + "merge_method: karcher\n",
    "karcher, many steps": PLAIN + "merge_method: karcher\nparameters: {max_iter: 40, tol: 1e-6}\n",
    "karcher with a base": PLAIN + "merge_method: karcher\n" + BASE,
    "breadcrumbs": THREE
    + "merge_method: breadcrumbs\nparameters: {density: 0.6, gamma: 0.03}\n"
    + BASE,
    "breadcrumbs rescaled": THREE
    + "merge_method: breadcrumbs\nparameters: {density: 0.6, rescale: true, lambda: 0.5}\n"
    + BASE,
    "breadcrumbs_ties": THREE
    + "merge_method: breadcrumbs_ties\nparameters: {density: 0.7, normalize: true}\n"
    + BASE,
    "sce": PLAIN + "merge_method: sce\n" + BASE,
    "sce of a part": PLAIN + "merge_method: sce\nparameters: {select_topk: 0.3}\n" + BASE,
    "model_stock": PLAIN + "merge_method: model_stock\n" + BASE,
    "model_stock by rows": PLAIN
    + "merge_method: model_stock\nparameters: {filter_wise: true}\n"
    + BASE,
    "nearswap": ONE + "merge_method: nearswap\nparameters: {t: 0.01}\n" + BASE,
    "arcee_fusion": ONE + "merge_method: arcee_fusion\n" + BASE,
    "ram": PLAIN + "merge_method: ram\nparameters: {epsilon: 0.01}\n" + BASE,
    "ramplus_tl": PLAIN + "merge_method: ramplus_tl\nparameters: {epsilon: 0.02, r: 0.5}\n" + BASE,
    "passthrough": "models: [{model: M/llama/b}]\nmerge_method: passthrough\n",
    "ram of experts": PLAIN.replace("llama", "mixtral")
    + "merge_method: ram\nparameters: {epsilon: 0.02}\nbase_model: M/mixtral/base\n",
    "nearswap of experts": ONE.replace("llama", "mixtral")
    + "merge_method: nearswap\nparameters: {t: 0.02}\nbase_model: M/mixtral/base\n",
    "sce of tied tables": PLAIN.replace("llama", "gemma2")
    + "merge_method: sce\nparameters: {select_topk: 0.5}\nbase_model: M/gemma2/base\n",
    "model_stock of fused matrices": PLAIN.replace("llama", "phi3")
    + "merge_method: model_stock\nparameters: {filter_wise: true}\nbase_model: M/phi3/base\n",
    "breadcrumbs of fused matrices": THREE.replace("llama", "phi3")
    + "merge_method: breadcrumbs\nparameters: {density: 0.5}\nbase_model: M/phi3/base\n",
    "karcher of biases": PLAIN.replace("llama", "qwen2") + "merge_method: karcher\n",
    "nuslerp of tied tables": TWO.replace("llama", "gemma2")
    + "merge_method: nuslerp\nbase_model: M/gemma2/base\n",
    "multislerp of biases": THREE.replace("llama", "qwen2")
    + "merge_method: multislerp\nbase_model: M/qwen2/base\n",
}

LEVELS = {
    "gradients of weights": """
models:
  - model: M/llama/a
    parameters: {weight: [0, 0.3, 0.7, 1]}
  - model: M/llama/b
    parameters: {weight: [1, 0.2]}
merge_method: linear
""",
    "gradients of densities": """
models:
  - model: M/llama/a
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: M/llama/b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: M/llama/c
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: M/llama/base
parameters: {normalize: true, int8_mask: true}
""",
    "filters with gradients": """
models:
  - model: M/llama/a
    parameters:
      weight:
        - filter: q_proj
          value: [0.1, 0.9]
        - filter: down_proj
          value: 0.25
        - value: 1
  - model: M/llama/b
    parameters: {weight: 0.5}
merge_method: task_arithmetic
base_model: M/llama/base
""",
    "a filter that stands for all": """
models:
  - model: M/llama/a
    parameters:
      weight:
        - filter: "*"
          value: 0.5
  - model: M/llama/b
    parameters: {weight: 0.5}
merge_method: task_arithmetic
base_model: M/llama/base
""",
    "parameters for all models": """
models:
  - model: M/llama/a
  - model: M/llama/b
    parameters: {weight: 0.2}
merge_method: task_arithmetic
base_model: M/llama/base
parameters: {weight: 0.7}
""",
    "nested levels of slices": """
slices:
  - sources:
      - {model: M/llama/a, layer_range: [0, 2], parameters: {weight: 0.9}}
      - {model: M/llama/b, layer_range: [0, 2]}
      - {model: M/llama/base, layer_range: [0, 2]}
    parameters: {weight: 0.4}
  - sources:
      - {model: M/llama/a, layer_range: [2, 4]}
      - {model: M/llama/b, layer_range: [2, 4], parameters: {weight: [0.1, 0.6]}}
      - {model: M/llama/base, layer_range: [2, 4]}
merge_method: task_arithmetic
base_model: M/llama/base
parameters: {weight: 0.25, lambda: 0.9}
""",
    "modules": """
modules:
  default:
    parameters: {weight: 0.6}
    slices:
      - sources:
          - {model: M/llama/a, layer_range: [0, 4]}
          - {model: M/llama/b, layer_range: [0, 4], parameters: {weight: 0.1}}
merge_method: linear
""",
    "modules of models": """
modules:
  default:
    models:
      - {model: M/llama/a, parameters: {weight: 0.6}}
      - {model: M/llama/b, parameters: {weight: 0.1}}
merge_method: linear
""",
    "truth values over depth": """
models:
  - {model: M/llama/a, parameters: {weight: 0.6}}
  - {model: M/llama/b, parameters: {weight: 0.1}}
merge_method: task_arithmetic
base_model: M/llama/base
parameters: {normalize: [true, false]}
""",
    "numbers as texts": """
models:
  - {model: M/llama/base}
  - {model: M/llama/b}
merge_method: nearswap
base_model: M/llama/base
parameters: {t: 1e-2}
""",
    "weights that balance out": """
models:
  - {model: M/llama/a, parameters: {weight: 1.0}}
  - {model: M/llama/b, parameters: {weight: -1.0}}
merge_method: task_arithmetic
base_model: M/llama/base
parameters: {normalize: true}
""",
}

SLICES = {
    "frankenmerge with a scaled layer": """
slices:
  - sources: [{model: M/llama/a, layer_range: [0, 2]}]
  - sources:
      - model: M/llama/a
        layer_range: [1, 3]
        parameters:
          scale:
            - {filter: o_proj, value: 0.0}
            - {filter: down_proj, value: 0.0}
            - {value: 1.0}
  - sources: [{model: M/llama/a, layer_range: [2, 4]}]
merge_method: passthrough
""",
    "frankenmerge of three": """
slices:
  - sources: [{model: M/phi3/a, layer_range: [0, 3]}]
  - sources: [{model: M/phi3/b, layer_range: [1, 4]}]
  - sources: [{model: M/phi3/c, layer_range: [3, 4]}]
merge_method: passthrough
""",
    "frankenmerge": """
slices:
  - sources: [{model: M/llama/a, layer_range: [0, 3]}]
  - sources: [{model: M/llama/b, layer_range: [1, 4]}]
merge_method: passthrough
dtype: float32
""",
    "frankenmerge of one model with itself": """
slices:
  - sources: [{model: M/qwen2/a, layer_range: [0, 2]}]
  - sources:
      - model: M/qwen2/a
        layer_range: [1, 3]
        parameters:
          scale:
            - {filter: o_proj, value: 0.0}
            - {filter: down_proj, value: 0.0}
            - {value: 1.0}
  - sources: [{model: M/qwen2/a, layer_range: [2, 4]}]
merge_method: passthrough
""",
    "frankenmerge of tied tables": """
slices:
  - sources: [{model: M/gemma2/a, layer_range: [0, 3]}]
  - sources: [{model: M/gemma2/b, layer_range: [2, 4]}]
merge_method: passthrough
""",
    "frankenmerge of experts": """
slices:
  - sources: [{model: M/mixtral/a, layer_range: [0, 2]}]
  - sources: [{model: M/mixtral/b, layer_range: [1, 3]}]
merge_method: passthrough
""",
    "fewer layers": """
slices:
  - sources: [{model: M/phi3/a, layer_range: [0, 2]}]
merge_method: passthrough
""",
    "slices of linear": """
slices:
  - sources:
      - {model: M/mistral/a, layer_range: [0, 2], parameters: {weight: 0.8}}
      - {model: M/mistral/b, layer_range: [1, 3], parameters: {weight: 0.2}}
  - sources:
      - {model: M/mistral/a, layer_range: [2, 4], parameters: {weight: 0.1}}
      - {model: M/mistral/b, layer_range: [2, 4], parameters: {weight: [0.5, 0.9]}}
merge_method: linear
""",
    "slices of slerp": """
slices:
  - sources:
      - {model: M/llama/a, layer_range: [0, 4]}
      - {model: M/llama/b, layer_range: [0, 4]}
    base_model: M/llama/a
merge_method: slerp
base_model: M/llama/a
parameters: {t: [0.1, 0.9]}
""",
    "a base of its own for a slice": """
slices:
  - sources:
      - {model: M/llama/base, layer_range: [0, 2]}
      - {model: M/llama/b, layer_range: [0, 2]}
  - sources:
      - {model: M/llama/a, layer_range: [2, 4]}
      - {model: M/llama/b, layer_range: [2, 4]}
    base_model: M/llama/a
merge_method: slerp
base_model: M/llama/base
parameters: {t: 0.3}
""",
    "slices of ties": """
slices:
  - sources:
      - {model: M/llama/base, layer_range: [0, 4]}
      - {model: M/llama/a, layer_range: [0, 4], parameters: {weight: 0.4, density: [0.2, 0.8]}}
      - {model: M/llama/b, layer_range: [0, 4], parameters: {weight: 0.6, density: 0.5}}
merge_method: ties
base_model: M/llama/base
""",
}

OUTPUTS = {
    "computed in float32, stored in bfloat16": """
models:
  - {model: M/half/a, parameters: {weight: 0.6}}
  - {model: M/half/b, parameters: {weight: 0.4}}
merge_method: task_arithmetic
base_model: M/half/base
dtype: float32
out_dtype: bfloat16
""",
    "halves stored in float32": """
models:
  - {model: M/half/a, parameters: {weight: 0.6}}
  - {model: M/half/b, parameters: {weight: 0.4}}
merge_method: linear
dtype: float32
""",
    "linear of halves": """
models:
  - {model: M/half/a, parameters: {weight: 0.6}}
  - {model: M/half/b, parameters: {weight: 0.4}}
merge_method: linear
dtype: bfloat16
""",
    "stored in float16": TWO + "merge_method: linear\nout_dtype: float16\n",
    "an adapter among the models": """
models:
  - {model: M/llama/a+M/lora, parameters: {weight: 0.6}}
  - {model: M/llama/b, parameters: {weight: 0.4}}
merge_method: task_arithmetic
base_model: M/llama/base
dtype: float32
""",
    "an adapter in a frankenmerge": """
slices:
  - sources: [{model: M/llama/a+M/lora, layer_range: [0, 3]}]
  - sources: [{model: M/llama/b, layer_range: [2, 4]}]
merge_method: passthrough
dtype: float32
""",
}

TOKENS_OF = """
models:
  - {model: M/tokens/tok_a, parameters: {weight: 0.6}}
  - {model: M/tokens/tok_b, parameters: {weight: 0.4}}
"""
TOKENS = {
    "union of tokens, linear": TOKENS_OF + "merge_method: linear\ntokenizer_source: union\n",
    "union of tokens, task_arithmetic": TOKENS_OF
    + "merge_method: task_arithmetic\nbase_model: M/tokens/base\ntokenizer_source: union\n",
    "tokens of the base": TOKENS_OF
    + "merge_method: task_arithmetic\nbase_model: M/tokens/base\ntokenizer: {source: base}\n",
    "tokens of one model": TOKENS_OF + "merge_method: linear\ntokenizer_source: M/tokens/tok_b\n",
    "tokens one by one": TOKENS_OF
    + """merge_method: ties
base_model: M/tokens/base
parameters: {density: 0.6}
tokenizer:
  source: union
  tokens:
    <|a_start|>: {source: M/tokens/tok_a}
    <|b_end|>: {source: M/tokens/tok_b, force: true}
    <|a_end|>: {source: {kind: zero}}
""",
    "padded tables": TOKENS_OF
    + """merge_method: linear
tokenizer:
  source: union
  pad_to_multiple_of: 16
""",
    "a chat template": TWO
    + """merge_method: linear
tokenizer: {source: M/llama/a}
chat_template: chatml
""",
}
