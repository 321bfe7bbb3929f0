"""Guards that LoRA folders give exactly the weights that PEFT's own merge gives, or are refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eutectic.checkpoint.adapters import open_adapter
from eutectic.checkpoint.expert_tensors import Expert
from eutectic.checkpoint.index import open_index
from eutectic.checkpoint.reader import StateDictReader
from eutectic.errors import CheckpointError

F32, F64 = torch.float32, torch.float64


# --- hand-made adapters ----------------------------------------------------------------------

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q"]}
BASE = {"enc.q.weight": torch.randn(4, 6), "enc.v.weight": torch.randn(5, 5), "n": torch.ones(3)}


def factors(module: str, out: int, inner: int, rank: int = 2) -> dict[str, Tensor]:
    prefix = f"base_model.model.{module}.lora_"
    return {
        f"{prefix}A.weight": torch.randn(rank, inner),
        f"{prefix}B.weight": torch.randn(out, rank),
    }


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def read(folder: Path, base: dict[str, Tensor] | None = None) -> Expert:
    return open_adapter(folder, StateDictReader(BASE if base is None else base).entries)


def whole_delta(adapter: Expert, name: str, base: Tensor) -> Tensor:
    flat = base.reshape(-1).double()
    return adapter.delta(name, base=flat, dtype=F64).view(base.shape)


@pytest.mark.parametrize("rslora", [False, True])
def test_delta_is_scaled_product(tmp_path: Path, rslora: bool) -> None:
    tensors = factors("enc.q", 4, 6)
    adapter = read(write(tmp_path, tensors, use_rslora=rslora))
    a, b = (t.double() for t in tensors.values())
    wanted = b @ a * (6 / 2**0.5 if rslora else 3.0)
    assert adapter.is_delta
    assert list(adapter.entries) == ["enc.q.weight"]
    assert adapter.entries["enc.q.weight"].shape == (4, 6)
    assert adapter.entries["enc.q.weight"].nbytes == 4 * (2 * 6 + 4 * 2)
    assert adapter.missing == ()
    torch.testing.assert_close(whole_delta(adapter, "enc.q.weight", BASE["enc.q.weight"]), wanted)
    pair = adapter.factors("enc.q.weight", F64)
    assert pair is not None
    torch.testing.assert_close(pair[0] @ pair[1], wanted)
    base = BASE["enc.q.weight"].reshape(-1).double()
    torch.testing.assert_close(
        adapter.weight("enc.q.weight", base=base, dtype=F64), base + wanted.reshape(-1)
    )
    with pytest.raises(ValueError, match="needs the base"):
        adapter.weight("enc.q.weight", base=None, dtype=F64)


def test_every_range_of_the_flat_tensor(tmp_path: Path) -> None:
    adapter = read(write(tmp_path, factors("enc.q", 4, 6)))
    whole = whole_delta(adapter, "enc.q.weight", BASE["enc.q.weight"]).reshape(-1)
    for start in range(25):
        for stop in range(start, 25):
            part = adapter.delta(
                "enc.q.weight", start, stop, base=torch.zeros(stop - start), dtype=F64
            )
            torch.testing.assert_close(part, whole[start:stop])


def test_zero_where_the_adapter_does_not_act(tmp_path: Path) -> None:
    adapter = read(write(tmp_path, factors("enc.q", 4, 6)))
    base = BASE["n"].double()
    assert adapter.delta("n", base=base, dtype=F64).tolist() == [0, 0, 0]
    assert torch.equal(adapter.weight("n", base=base, dtype=F64), base)
    assert adapter.factors("n") is None
    with pytest.raises(CheckpointError, match="does not store 'n' in full"):
        adapter.read("n")


def test_patterns_follow_the_rule_of_peft(tmp_path: Path) -> None:
    tensors = {**factors("enc.q", 4, 6, rank=3), **factors("enc.v", 5, 5)}
    patterns = {"rank_pattern": {"q": 3}, "alpha_pattern": {r"^enc\.v": 8, "nc.q": 100}}
    adapter = read(write(tmp_path, tensors, **patterns))
    a, b, c, d = (t.double() for t in tensors.values())
    # "nc.q" starts neither at a dot nor at the beginning of the path: alpha stays 6.
    for name, wanted in (("enc.q.weight", b @ a * 2), ("enc.v.weight", d @ c * 4)):
        torch.testing.assert_close(whole_delta(adapter, name, BASE[name]), wanted)


def test_base_with_another_prefix(tmp_path: Path) -> None:
    adapter = read(write(tmp_path, factors("bert.enc.q", 4, 6)))
    assert list(adapter.entries) == ["enc.q.weight"]
    assert "'bert.'" in str(adapter.alignment)


def test_full_tensors_replace_or_are_extra(tmp_path: Path) -> None:
    tensors = {
        **factors("enc.q", 4, 6),
        "base_model.model.n": torch.full((3,), 5.0),
        "base_model.model.classifier.modules_to_save.default.weight": torch.ones(2, 4),
    }
    adapter = read(write(tmp_path, tensors, modules_to_save=["classifier"]))
    assert adapter.delta("n", base=torch.ones(3), dtype=F32).tolist() == [4, 4, 4]
    assert adapter.weight("n", base=None, dtype=F32).tolist() == [5, 5, 5]
    assert adapter.read("n", 1).tolist() == [5, 5]
    assert list(adapter.extra) == ["classifier.weight"]
    assert adapter.read_extra("classifier.weight").sum() == 8
    assert adapter.factors("n") is None


def test_full_tensor_of_another_size(tmp_path: Path) -> None:
    tensors = {**factors("enc.q", 4, 6), "base_model.model.n": torch.ones(7)}
    adapter = read(write(tmp_path, tensors))
    assert adapter.entries["n"].shape == (7,)
    with pytest.raises(CheckpointError, match="'n' has the shape"):
        adapter.delta("n", base=torch.ones(3), dtype=F32)


def test_resized_embedding_stored_beside_its_factors(tmp_path: Path) -> None:
    prefix = "base_model.model.emb"
    a, b, full = torch.randn(2, 7), torch.randn(3, 2), torch.randn(7, 3)
    pair = {f"{prefix}.lora_embedding_A": a, f"{prefix}.lora_embedding_B": b}
    base = {"emb.weight": torch.randn(7, 3)}
    both = read(write(tmp_path / "both", {**pair, f"{prefix}.base_layer.weight": full}), base)
    wanted = full + (b @ a).T * 3 - base["emb.weight"]
    delta = whole_delta(both, "emb.weight", base["emb.weight"])
    torch.testing.assert_close(delta.float(), wanted)
    assert both.factors("emb.weight") is None
    alone = read(write(tmp_path / "alone", pair), base).factors("emb.weight")
    assert alone is not None
    torch.testing.assert_close(alone[0] @ alone[1], (b @ a).T * 3)


def test_square_conv1d_follows_the_others_or_the_flag(tmp_path: Path) -> None:
    base = {"a.weight": torch.zeros(5, 5), "b.weight": torch.zeros(5, 15)}
    square, wide = factors("a", 5, 5), factors("b", 15, 5)
    both = read(write(tmp_path / "both", {**square, **wide}), base)
    flag = read(write(tmp_path / "flag", square, fan_in_fan_out=True), base)
    plain = read(write(tmp_path / "plain", square), base)
    a, b = (t.double() for t in square.values())
    for adapter, wanted in ((both, (b @ a).T), (flag, (b @ a).T), (plain, b @ a)):
        torch.testing.assert_close(whole_delta(adapter, "a.weight", base["a.weight"]), wanted * 3)


def test_weights_as_pickle_and_identity(tmp_path: Path) -> None:
    tensors = factors("enc.q", 4, 6)
    write(tmp_path / "a", tensors)
    write(tmp_path / "b", tensors)
    (tmp_path / "b" / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "b" / "adapter_model.bin")
    first, second = read(tmp_path / "a"), read(tmp_path / "b")
    assert first.fingerprint() == second.fingerprint()
    assert [n for n, _, _ in second.identity()] == ["adapter_config.json", "adapter_model.bin"]
    other = read(write(tmp_path / "c", tensors, lora_alpha=7))
    assert other.fingerprint() != first.fingerprint()


Q = factors("enc.q", 4, 6)
REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "IA3": (Q, {"peft_type": "IA3"}, "with other .IA.³ adapters only"),
    "no kind": (Q, {"peft_type": None}, "names no kind"),
    "DoRA without a magnitude": (Q, {"use_dora": True}, "no magnitude .DoRA."),
    "DoRA, by its tensors": (
        {**Q, "base_model.model.enc.q.lora_magnitude_vector": torch.ones(4)},
        {},
        "a magnitude .DoRA., and use_dora",
    ),
    "layer_replication": (Q, {"layer_replication": [[0, 2]]}, "layer_replication"),
    "no token rows": (Q, {"trainable_token_indices": [1]}, "holds no rows of trained tokens"),
    "token rows, not listed": (
        {**Q, "base_model.model.enc.v.token_adapter.trainable_tokens_delta": torch.ones(1, 5)},
        {},
        "holds rows of trained tokens",
    ),
    "no lora_bias": (Q, {"lora_bias": True}, "holds no biases of the factor B"),
    "pissa by chance": (Q, {"init_lora_weights": "pissa_niter_16"}, "cannot be computed again"),
    "corda": (Q, {"init_lora_weights": "corda"}, "cannot be computed again"),
    "loftq": (Q, {"init_lora_weights": "loftq"}, "cannot be computed again"),
    "half a pair": (dict(list(Q.items())[:1]), {}, "has the factor A but lacks B"),
    "other half": (dict(list(Q.items())[1:]), {}, "has the factor B but lacks A"),
    "rank in config": (Q, {"r": 4}, r"rank 2 \(A\) and 2 \(B\), but .* rank 4"),
    "rank of B": (
        {**Q, "base_model.model.enc.q.lora_B.weight": torch.ones(4, 3)},
        {},
        r"rank 2 \(A\) and 3 \(B\)",
    ),
    "other base": (factors("enc.q", 4, 7), {}, r"make a \[4, 7\] matrix, .* \[4, 6\]"),
    "no such module": ({**Q, **factors("enc.k", 4, 6)}, {}, "acts on 'enc.k.weight'"),
    "1-D factors": (
        {**Q, "base_model.model.enc.q.lora_A.weight": torch.ones(12)},
        {},
        "expected matrices",
    ),
    "unknown key": ({**Q, "base_model.model.enc.q.lora_E": torch.ones(2)}, {}, "not understood"),
    "rank zero": (Q, {"r": 0}, "at least 1"),
    "rank a word": (Q, {"r": "eight"}, "wrong type"),
    "alpha missing": (Q, {"lora_alpha": None}, "wrong type"),
    "broken pattern": (Q, {"rank_pattern": {"(": 2}}, "no pattern over modules"),
    "pattern with flags": (Q, {"rank_pattern": {"q(?i)": 2}}, "sets flags"),
    "alpha without end": (Q, {"lora_alpha": 10**399}, "limit is 300"),
    "many patterns": (Q, {"rank_pattern": {f"a.*{i}": 2 for i in range(1001)}}, "limit is 1,000"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_folder_and_the_reason(tmp_path: Path, case: str) -> None:
    tensors, config, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        read(write(tmp_path, tensors, **config))
    assert str(tmp_path) in str(caught.value)


def test_folder_without_weights_or_with_code(tmp_path: Path) -> None:
    write(tmp_path, Q)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="adapter_model.safetensors is missing"):
        read(tmp_path)
    torch.save({"x": Path("/")}, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="holds code"):
        read(tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    (tmp_path / "adapter_model.safetensors").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="leads out"):
        read(tmp_path)


# --- against PEFT ----------------------------------------------------------------------------


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(
        BertConfig(vocab_size=30, intermediate_size=24, max_position_embeddings=12, **shape)
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=12, **shape))


class Convolutions(nn.Module):
    """A stack that holds plain and 1×1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, kernel_size=(3, 2))
        self.second = nn.Conv2d(6, 6, kernel_size=1)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)).mean((-1, -2)))


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "bert": (bert, {"target_modules": ["query", "value", "dense"], "lora_alpha": 6}),
    "bert, rslora": (bert, {"target_modules": ["query"], "use_rslora": True, "lora_alpha": 5}),
    "bert, patterns": (
        bert,
        {
            "target_modules": ["query", "key", "dense"],
            "rank_pattern": {r"layer\.0\.attention\.self\.query": 3, "^bert.pooler.dense": 5},
            "alpha_pattern": {r"layer\.\d\.output\.dense": 12, "key": 1},
        },
    ),
    "bert, full tensors": (
        bert,
        {"target_modules": ["query"], "modules_to_save": ["classifier", "pooler"]},
    ),
    "bert, biases": (bert, {"target_modules": ["query"], "bias": "all"}),
    "bert, biases of targets": (bert, {"target_modules": ["query"], "bias": "lora_only"}),
    "bert, embedding": (bert, {"target_modules": ["word_embeddings", "value"], "use_rslora": True}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, without the flag": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "gpt2, patterns": (
        gpt2,
        {
            "target_modules": ["c_attn", "c_fc", "wte"],
            "fan_in_fan_out": True,
            "use_rslora": True,
            "rank_pattern": {"c_fc": 2},
            "alpha_pattern": {r"h\.1\.attn\.c_attn": 3},
        },
    ),
    "convolutions": (Convolutions, {"target_modules": ["first", "second", "last"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_same_weights_as_merge_and_unload(tmp_path: Path, case: str) -> None:
    from peft import LoraConfig, get_peft_model

    build, options = CASES[case]
    torch.manual_seed(0)
    model = build()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about the flag and the embeddings
        wrapped = get_peft_model(model, LoraConfig(r=4, **options))  # type: ignore[arg-type]
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        wrapped.save_pretrained(str(tmp_path / "adapter"))
        merged = wrapped.merge_and_unload().state_dict()
    save_file({k: v.clone() for k, v in base.items()}, tmp_path / "model.safetensors")

    index = open_index(tmp_path / "model.safetensors")
    adapter = open_adapter(tmp_path / "adapter", index.entries)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(bool(e.nbytes) for e in adapter.entries.values()) == len(adapter.entries)
    assert len(stored) >= len(adapter.entries) > 0
    changed = {k for k in base if not torch.equal(merged[k], base[k])}
    # A tied head follows its embedding in the model; as a checkpoint it is a tensor of its own.
    changed -= {"lm_head.weight"}
    assert changed <= set(adapter.entries)
    assert adapter.extra == {}
    for name in set(base) - {"lm_head.weight"}:
        flat = base[name].reshape(-1).float()
        ours = adapter.weight(name, base=flat, dtype=F32).view(base[name].shape)
        torch.testing.assert_close(ours, merged[name].float(), rtol=1e-5, atol=1e-6, msg=name)
        half = flat.numel() // 2
        part = adapter.delta(name, half, flat.numel(), base=flat[half:], dtype=F32)
        wanted = (merged[name].float() - base[name].float()).reshape(-1)[half:]
        torch.testing.assert_close(part, wanted, rtol=1e-4, atol=1e-6, msg=name)
        pair = adapter.factors(name)
        if pair is not None:
            product = (pair[0] @ pair[1]).reshape(-1)[half:]
            torch.testing.assert_close(product, wanted, rtol=1e-4, atol=1e-6, msg=name)
