"""Models of every common architecture, saved by transformers, merged from files to files.

Guards: what transformers saved it must load again (no missing, no unexpected key, finite outputs);
averages are exact to the rounding of the stored type; names, order, shapes, types, shards and side
files are those of the base; and each kind of tensor takes a treatment that fits it.
"""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import eutectic
from helpers.folders import load
from helpers.models import ZOO, forward, make_model, save_family

LAYOUTS = {"float32": (torch.float32, None), "bfloat16, sharded": (torch.bfloat16, "8KB")}

# name pattern -> treatment; every pattern must match some tensor of the saved model.
TREATMENTS = {
    "bert": {
        "*word_embeddings.weight": "embedding",
        "*position_embeddings.weight": "embedding",
        "*token_type_embeddings.weight": "embedding",
        "*embeddings.LayerNorm.weight": "vector",
        "*self.query.weight": "matrix",
        "*self.query.bias": "vector",
        "cls.predictions.transform.dense.weight": "matrix",
    },
    "roberta": {
        "*word_embeddings.weight": "embedding",
        "*position_embeddings.weight": "embedding",
        "lm_head.dense.weight": "matrix",
        "lm_head.layer_norm.weight": "vector",
    },
    "distilbert": {
        "*word_embeddings.weight": "embedding",
        "*q_lin.weight": "matrix",
        "vocab_transform.weight": "matrix",
    },
    "t5-relu": {
        "shared.weight": "embedding",
        "*relative_attention_bias.weight": "embedding",
        "*DenseReluDense.wi.weight": "matrix",
        "*layer_norm.weight": "vector",
    },
    "t5-gated": {
        "shared.weight": "embedding",
        "*relative_attention_bias.weight": "embedding",
        "*DenseReluDense.wi_1.weight": "matrix",
    },
    "gpt2": {
        "*wte.weight": "embedding",
        "*wpe.weight": "embedding",
        "*c_attn.weight": "matrix",
        "*c_fc.weight": "matrix",
        "*ln_1.weight": "vector",
    },
    "llama": {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "matrix",
        "*k_proj.weight": "matrix",
        "*input_layernorm.weight": "vector",
    },
    "qwen2-moe": {
        "*mlp.gate.weight": "matrix",
        "*experts.*.down_proj.weight": "matrix",
        "*shared_expert.up_proj.weight": "matrix",
        "*shared_expert_gate.weight": "vector",
        "*q_proj.bias": "vector",
    },
    "mixtral": {"*block_sparse_moe.gate.weight": "matrix", "*experts.*.w2.weight": "matrix"},
    "deepseek-v3": {
        "*kv_a_proj_with_mqa.weight": "matrix",
        "*kv_b_proj.weight": "matrix",
        "*kv_a_layernorm.weight": "vector",
        "*layers.0.mlp.gate_proj.weight": "matrix",
        "*layers.1.mlp.gate.weight": "matrix",
        "*e_score_correction_bias": "vector",
        "*layers.1.mlp.experts.*.down_proj.weight": "matrix",
        "*shared_experts.down_proj.weight": "matrix",
    },
    "clip": {
        "logit_scale": "vector",
        "*token_embedding.weight": "embedding",
        "*position_embedding.weight": "embedding",
        "*patch_embedding.weight": "conv",
        "*class_embedding": "vector",
        "text_projection.weight": "vector",
        "visual_projection.weight": "matrix",
        "*mlp.fc1.weight": "matrix",
    },
    "vit": {
        "*cls_token": "embedding",
        "*position_embeddings": "embedding",
        "*patch_embeddings.projection.weight": "conv",
        "*attention.query.weight": "matrix",
        "pooler.dense.weight": "matrix",
    },
    "dinov2": {
        "*cls_token": "embedding",
        "*mask_token": "embedding",
        "*position_embeddings": "embedding",
        "*patch_embeddings.projection.weight": "conv",
        "*lambda1": "vector",
        "*fc1.weight": "matrix",
    },
    "whisper": {
        "*encoder.conv1.weight": "conv",
        "*embed_positions.weight": "embedding",
        "*embed_tokens.weight": "embedding",
        "*encoder_attn.k_proj.weight": "matrix",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ZOO)
def test_a_merged_model_is_the_base_with_other_numbers(
    kind: str, layout: str, tmp_path: Path
) -> None:
    dtype, shard = LAYOUTS[layout]
    base, experts = save_family(kind, tmp_path, 3, dtype=dtype, shard=shard)
    sharded = (base / "model.safetensors.index.json").exists()
    assert sharded == (shard is not None)
    for method in ("average", "iso_c"):
        output = tmp_path / method
        eutectic.merge(base=str(base), experts=experts, method=method, output=output)
        _assert_same_layout(base, output)
        _assert_loads(kind, output, dtype)
    _assert_treatments(kind, tmp_path / "iso_c")
    own = [load(path) for path in experts.values()]
    for name, merged in load(tmp_path / "average").items():
        mean = torch.stack([e[name].double() for e in own]).mean(0)
        step = torch.finfo(dtype).eps * mean.abs() + torch.finfo(torch.float32).eps
        assert ((merged.double() - mean).abs() <= step).all(), name


def _assert_treatments(kind: str, output: Path) -> None:
    tensors = json.loads((output / "eutectic.json").read_text())["tensors"]
    for pattern, treatment in TREATMENTS[kind].items():
        names = [name for name in tensors if fnmatchcase(name, pattern)]
        assert names, pattern
        for name in names:
            assert tensors[name]["treatment"] == treatment, name
            assert tensors[name]["method"] == ("iso_c" if treatment == "matrix" else "average")


def _assert_same_layout(base: Path, output: Path) -> None:
    ours = {"README.md", "eutectic.json"}
    assert {p.name for p in output.iterdir()} == {p.name for p in base.iterdir()} | ours
    for path in base.iterdir():
        if path.suffix == ".safetensors":
            _assert_same_header(path, output / path.name)
        elif path.name.endswith(".index.json"):
            ours_map = json.loads((output / path.name).read_text())
            theirs = json.loads(path.read_text())
            assert ours_map["weight_map"] == theirs["weight_map"]
            assert ours_map["metadata"]["total_size"] == theirs["metadata"]["total_size"]
        else:
            assert (output / path.name).read_bytes() == path.read_bytes()


def _assert_same_header(theirs: Path, ours: Path) -> None:
    with safe_open(theirs, "pt") as a, safe_open(ours, "pt") as b:
        assert list(a.offset_keys()) == list(b.offset_keys())
        for key in a.offset_keys():
            x, y = a.get_slice(key), b.get_slice(key)
            assert (x.get_shape(), x.get_dtype()) == (y.get_shape(), y.get_dtype())
        assert b.metadata()["format"] == "pt"


def _assert_loads(kind: str, folder: Path, dtype: torch.dtype) -> None:
    model, info = type(make_model(kind)).from_pretrained(
        folder, output_loading_info=True, dtype="auto"
    )
    problems = {key: found for key, found in info.items() if found}
    assert not problems
    assert model.dtype == dtype
    outputs = forward(kind, model.eval())
    assert outputs
    assert all(torch.isfinite(t).all() for t in outputs)
