"""GGUF files against the package's own dequantisation and transformers' reading of them."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import eutectic
from eutectic.checkpoint.gguf_file import read_gguf
from eutectic.checkpoint.opening import open_reader
from eutectic.errors import CheckpointError

gguf = pytest.importorskip("gguf")

HIDDEN, HEADS, GROUPS, WIDE, WORDS = 256, 4, 2, 512, 32
WORDS_LISTED = [f"w{number}" for number in range(WORDS)]
NAMES = {
    "token_embd.weight": ("model.embed_tokens.weight", (WORDS, HIDDEN)),
    "output_norm.weight": ("model.norm.weight", (HIDDEN,)),
    "output.weight": ("lm_head.weight", (WORDS, HIDDEN)),
    "blk.0.attn_norm.weight": ("model.layers.0.input_layernorm.weight", (HIDDEN,)),
    "blk.0.attn_q.weight": ("model.layers.0.self_attn.q_proj.weight", (HIDDEN, HIDDEN)),
    "blk.0.attn_k.weight": (
        "model.layers.0.self_attn.k_proj.weight",
        (HIDDEN * GROUPS // HEADS, HIDDEN),
    ),
    "blk.0.attn_v.weight": (
        "model.layers.0.self_attn.v_proj.weight",
        (HIDDEN * GROUPS // HEADS, HIDDEN),
    ),
    "blk.0.attn_output.weight": ("model.layers.0.self_attn.o_proj.weight", (HIDDEN, HIDDEN)),
    "blk.0.ffn_norm.weight": ("model.layers.0.post_attention_layernorm.weight", (HIDDEN,)),
    "blk.0.ffn_gate.weight": ("model.layers.0.mlp.gate_proj.weight", (WIDE, HIDDEN)),
    "blk.0.ffn_up.weight": ("model.layers.0.mlp.up_proj.weight", (WIDE, HIDDEN)),
    "blk.0.ffn_down.weight": ("model.layers.0.mlp.down_proj.weight", (HIDDEN, WIDE)),
}


def write(path, arch="llama", kind="Q8_0", names=NAMES, seed=0, extra=()):
    """Write a GGUF file; return what every tensor of it means, as stored there."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    for name, value in extra:
        writer.add_uint32(f"{arch}.{name}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS_LISTED)
    random = np.random.default_rng(seed)
    means = {}
    for name, (_, shape) in names.items():
        values = (random.standard_normal(shape) / 8).astype(np.float32)
        wanted = kind if len(shape) > 1 else "F32"
        held, number = stored(values, wanted, random)
        writer.add_tensor(name, held, raw_dtype=number)
        means[name] = gguf.quants.dequantize(held, number).reshape(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: torch.from_numpy(np.array(value)) for name, value in means.items()}


def stored(values, kind, random):
    """Return the bytes of a tensor in a type; random codes where the package cannot write it."""
    number = gguf.GGMLQuantizationType[kind]
    try:
        return gguf.quants.quantize(values, number), number
    except NotImplementedError:
        count, size = gguf.GGML_QUANT_SIZES[number]
        raw = random.integers(0, 256, (values.size // count, size), dtype=np.uint8)
        half = np.frombuffer(np.float16(0.01).tobytes(), dtype=np.uint8)
        for place in SCALES.get(kind, (0,)):
            raw[:, place : place + 2] = half
        return raw.reshape(*values.shape[:-1], -1), number


SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def expected(means, names=NAMES):
    """Return the tensors as transformers has them: rows of queries and keys in their order."""
    found = {}
    for name, (own, _) in names.items():
        value = means[name]
        for part, heads in (("attn_q.", HEADS), ("attn_k.", GROUPS)):
            if part in name:
                rows = value.reshape(heads, -1, 2, *value.shape[1:])
                value = rows.swapaxes(1, 2).reshape(value.shape)
        found[own] = value
    return found


@pytest.mark.parametrize(
    "kind",
    ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K"]
    + ["Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"],
)
def test_every_kind_is_dequantised_as_the_package_does(tmp_path, kind):
    means = expected(write(tmp_path / "m.gguf", kind=kind))
    with open_reader(tmp_path / "m.gguf") as reader:
        assert set(reader.entries) == set(means)
        for name, value in means.items():
            flat = value.flatten()
            held = reader.read(name)
            assert torch.equal(held.float(), flat.float()), name
            assert reader.entries[name].shape == tuple(value.shape)
            for start, stop in (
                (0, 1),
                (7, min(300, len(flat))),
                (len(flat) - 5, len(flat)),
                (3, 3),
            ):
                part = reader.read(name, start, stop)
                assert torch.equal(part.float(), flat[start:stop].float())
        quantised = kind not in ("F32", "F16", "BF16")
        assert bool(reader.notes) is quantised
        config = reader.index.config
    assert config["model_type"] == "llama" and config["vocab_size"] == WORDS
    assert config["num_key_value_heads"] == GROUPS and config["tie_word_embeddings"] is False


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_transformers_reads_the_same(tmp_path, arch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    names = dict(NAMES)
    if arch == "qwen2":
        for part, width in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2)):
            names[f"blk.0.attn_{part}.bias"] = (
                f"model.layers.0.self_attn.{part}_proj.bias",
                (width,),
            )
    write(tmp_path / "m.gguf", arch=arch, names=names)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    theirs = model.state_dict()
    with open_reader(tmp_path / "m.gguf") as reader:
        assert set(reader.entries) == set(theirs)
        for name, entry in reader.entries.items():
            assert torch.equal(reader.read(name).view(entry.shape).float(), theirs[name].float())


def test_a_gguf_base_merges_as_its_dequantised_folder(tmp_path):
    base = expected(write(tmp_path / "base.gguf", kind="Q4_0"))
    other = expected(write(tmp_path / "a.gguf", kind="Q8_0", seed=1))
    generator = torch.Generator().manual_seed(2)
    tuned = {n: v + 0.01 * torch.randn(v.shape, generator=generator) for n, v in base.items()}
    with open_reader(tmp_path / "base.gguf") as reader:
        config = dict(reader.index.config)
    for name, tensors in {"plain": base, "plain_a": other, "b": tuned}.items():
        (tmp_path / name).mkdir()
        save_file(
            {n: v.contiguous() for n, v in tensors.items()}, tmp_path / name / "model.safetensors"
        )
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    merged = {}
    for out, base_path, expert in (
        ("one", "base.gguf", "a.gguf"),
        ("two", "plain", "plain_a"),
        ("three", "plain", "a.gguf"),
    ):
        report = eutectic.merge(
            base=str(tmp_path / base_path),
            experts={"a": str(tmp_path / expert), "b": str(tmp_path / "b")},
            method="ties",
            output=tmp_path / out,
        )
        merged[out] = load_file(tmp_path / out / "model.safetensors")
        told = [n.subject for n in report.note_records if n.kind == "dequantised"]
        assert bool(told) is (out != "two")
    for out in ("one", "three"):
        assert merged[out].keys() == merged["two"].keys()
        assert all(torch.equal(merged[out][n], merged["two"][n]) for n in base)
    written = json.loads((tmp_path / "one" / "config.json").read_text())
    assert written["model_type"] == "llama" and written["hidden_size"] == HIDDEN
    transformers = pytest.importorskip("transformers")
    _, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "one", output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]


def test_mixtures_norms_and_conv1d(tmp_path):
    mixture = {
        "blk.0.ffn_gate_inp.weight": ("", (3, HIDDEN)),
        "blk.0.ffn_gate_exps.weight": ("", (3, WIDE, HIDDEN)),
        "token_embd.weight": ("", (WORDS, HIDDEN)),
    }
    means = write(tmp_path / "x.gguf", names=mixture, extra=[("expert_count", 3)])
    with open_reader(tmp_path / "x.gguf") as reader:
        assert reader.index.config["model_type"] == "mixtral"
        assert reader.index.config["num_local_experts"] == 3
        for expert in range(3):
            name = f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight"
            part = means["blk.0.ffn_gate_exps.weight"][expert]
            assert torch.equal(reader.read(name).view(WIDE, HIDDEN), part)
    norms = {"output_norm.weight": ("", (HIDDEN,)), "token_embd.weight": ("", (WORDS, HIDDEN))}
    means = write(tmp_path / "g.gguf", arch="gemma2", names=norms)
    with open_reader(tmp_path / "g.gguf") as reader:
        assert torch.equal(reader.read("model.norm.weight"), means["output_norm.weight"] - 1)
        assert reader.index.config["tie_word_embeddings"] is True
    conv = {"blk.0.attn_qkv.weight": ("", (96, HIDDEN)), "blk.0.attn_qkv.bias": ("", (96,))}
    means = write(tmp_path / "c.gguf", arch="gpt2", names=conv)
    with open_reader(tmp_path / "c.gguf") as reader:
        turned = means["blk.0.attn_qkv.weight"].T
        assert reader.entries["transformer.h.0.attn.c_attn.weight"].shape == (HIDDEN, 96)
        assert torch.equal(
            reader.read("transformer.h.0.attn.c_attn.weight", 10, 900),
            turned.flatten()[10:900],
        )


def test_its_own_tokenizer_goes_along(tmp_path):
    transformers = pytest.importorskip("transformers")
    letters = [chr(place) for place in range(ord("a"), ord("z") + 1)]
    words = ["<s>", "</s>", *letters, "ab", "Ġ"]
    merges = ["a b"]
    small = {"token_embd.weight": ("", (len(words), 64)), "output_norm.weight": ("", (64,))}

    def put(name, tokens, seed):
        writer = gguf.GGUFWriter(str(tmp_path / name), "llama")
        for number, value in (("block_count", 0), ("embedding_length", 64)):
            writer.add_uint32(f"llama.{number}", value)
        writer.add_head_count(2)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3, *[1] * (len(words) - 2), *[3] * (len(tokens) - len(words))])
        writer.add_token_merges(merges)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        random = np.random.default_rng(seed)
        for kind, (_, shape) in small.items():
            rows = (len(tokens), 64) if len(shape) == 2 else shape
            writer.add_tensor(kind, random.standard_normal(rows).astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    put("base.gguf", words, 0)
    put("a.gguf", [*words, "<a>"], 1)
    base, own = tmp_path / "base.gguf", tmp_path / "a.gguf"
    eutectic.merge(
        base=str(base),
        experts={"a": str(own)},
        method="task_arithmetic",
        vocabulary="union",
        output=tmp_path / "out",
    )
    merged = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    with open_reader(own) as reader:
        table = reader.read("model.embed_tokens.weight").view(-1, 64)
    assert torch.equal(merged[-1], table[-1]) and len(merged) == len(words) + 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("<a>") == len(words) == len(tokenizer) - 1
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab").input_ids)[-1] == "ab"
    found = eutectic.check(base)
    assert not any("tokenizer" in str(one) for checked in found for one in checked.remarks)


def test_what_is_not_known_is_refused(tmp_path):
    write(tmp_path / "m.gguf", arch="falcon", names={})
    with pytest.raises(CheckpointError, match="architecture 'falcon'"):
        open_reader(tmp_path / "m.gguf")
    write(tmp_path / "n.gguf", names={"blk.0.new_thing.weight": ("", (32, 32))})
    with pytest.raises(CheckpointError, match="new_thing"):
        open_reader(tmp_path / "n.gguf")
    (tmp_path / "several").mkdir()
    for name in ("q4.gguf", "q8.gguf"):
        write(tmp_path / "several" / name)
    with pytest.raises(CheckpointError, match="Name the file"):
        open_reader(tmp_path / "several")


def test_damaged_headers_are_refused(tmp_path):
    write(tmp_path / "m.gguf", names={"token_embd.weight": ("", (WORDS, HIDDEN))})
    content = (tmp_path / "m.gguf").read_bytes()
    end = len(content) - WORDS * HIDDEN
    cut = tmp_path / "cut.gguf"
    for length in (*range(0, 64), *range(64, end, 97), len(content) - 1):
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="GGUF"):
            read_gguf(cut)
    random = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(content)
        for place in random.integers(0, 700, 3):
            changed[place] = random.integers(0, 256)
        cut.write_bytes(bytes(changed))
        try:
            read_gguf(cut)
        except CheckpointError:
            pass
    cut.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1))
    with pytest.raises(CheckpointError, match="announces"):
        read_gguf(cut)
