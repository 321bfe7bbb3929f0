"""Every kind of damage is found, by its kind and its names, and what is sound is called sound.

Guards that a check never raises for what lies in a folder, that what it calls wrong is wrong, and
that nothing is said of a sound checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eutectic
from eutectic.checking import Checked
from eutectic.errors import CheckpointError, RequestError
from helpers.folders import digests, make_base, make_expert, save, save_sharded

CONFIG: dict[str, Any] = {
    "model_type": "toy",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "dtype": "float32",
}
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
)
VOCABULARY = {f"t{i}": i for i in range(30)}
TOKENIZER: dict[str, Any] = {
    "model": {"type": "BPE", "vocab": VOCABULARY},
    "added_tokens": [{"id": 30, "content": "<s>"}, {"id": 31, "content": "</s>"}],
}
Change = Callable[[Path], object]


def sound(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Write a checkpoint with a tokenizer, of which there is nothing to be said."""
    save(folder, make_base(seed), {**CONFIG, **config})
    write(folder / "tokenizer.json", TOKENIZER)
    write(folder / "tokenizer_config.json", {"eos_token": "</s>"})
    return folder


def write(path: Path, content: object) -> None:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(raw)


def with_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_config(folder: Path, **changes: Any) -> None:
    stated = json.loads((folder / "config.json").read_text()) | changes
    write(folder / "config.json", {k: v for k, v in stated.items() if v is not None})


def only(folder: Path, **options: Any) -> Checked:
    (found,) = eutectic.check(folder, **options)
    return found


def found(checked: Checked) -> dict[str, str]:
    """Return kind -> level of everything that was found."""
    return {f.kind: "wrong" for f in checked.faults} | {n.kind: n.level for n in checked.notes}


def test_a_sound_checkpoint(tmp_path: Path) -> None:
    before = digests(sound(tmp_path / "a"))
    checked = only(tmp_path / "a", values=True)
    assert found(checked) == {}
    assert (checked.kind, checked.model, checked.tensors) == ("checkpoint", "toy", 9)
    numbers = 32 * 16 + 2 * (32 * 16 + 32 + 16) + 1 + 16
    assert checked.numbers == numbers
    assert checked.bytes == 4 * (numbers - 16) + 8 * 16
    assert checked.dtypes == {"float32": numbers - 16, "int64": 16}
    assert digests(tmp_path / "a") == before


def copy_as_shard(folder: Path) -> None:
    other = make_base(5)
    save_file(other, folder / "model-00001-of-00002.safetensors")


def stale_index(folder: Path) -> None:
    lost = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    write(folder / "pytorch_model.bin.index.json", {"weight_map": lost})


def second_format(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")


def missing_layer(folder: Path) -> None:
    layer = {"weight": torch.ones(2, 2)}
    more = {f"layers.{n}.proj.{k}": v.clone() for n in (4, 5) for k, v in layer.items()}
    with_tensors(folder, lambda tensors: tensors.update(more))


def set_nan(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["layers.1.proj.weight"][3, 3] = float("nan")
        tensors["layers.1.proj.weight"][4, 3] = float("-inf")
        tensors["layers.0.norm.weight"][:] = float("inf")

    with_tensors(folder, change)


def set_zero(folder: Path) -> None:
    with_tensors(folder, lambda tensors: tensors["layers.1.proj.weight"].zero_())


def rename(old: str, new: str) -> Change:
    return lambda folder: with_tensors(folder, lambda t: t.update({new: t.pop(old)}))


def put(name: str, content: object) -> Change:
    return lambda folder: write(folder / name, content)


def stated(**changes: Any) -> Change:
    return lambda folder: with_config(folder, **changes)


def tensors(**more: Tensor) -> Change:
    named = {name.replace("__", "."): value for name, value in more.items()}
    return lambda folder: with_tensors(folder, lambda held: held.update(named))


def head_copied(folder: Path) -> None:
    with_tensors(folder, lambda t: t.update({"lm_head.weight": t["embed_tokens.weight"].clone()}))


def half(folder: Path) -> None:
    name = "layers.0.proj.weight"
    with_tensors(folder, lambda t: t.update({name: t[name].half()}))


def two_tokens(folder: Path) -> None:
    more = [{"id": 32, "content": "[PAD]"}, {"id": 33, "content": "[SEP]"}]
    added = TOKENIZER["added_tokens"] + more
    write(folder / "tokenizer.json", {**TOKENIZER, "added_tokens": added})


def lone_pickle(folder: Path) -> None:
    second_format(folder)
    (folder / "model.safetensors").unlink()


def a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "merges.txt")


def outside(folder: Path) -> None:
    (folder.parent / "elsewhere.json").write_text("{}")
    (folder / "preprocessor_config.json").symlink_to(folder.parent / "elsewhere.json")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


# What is done to a sound checkpoint: the kind that is found, its level, and what its text says.
CASES: Mapping[str, tuple[Change, str, str, str]] = {
    "a pointer for weights": (
        put("model.safetensors", POINTER), "lfs_pointer", "wrong", "lfs pull"
    ),
    "a pointer for a tokenizer": (
        put("tokenizer.json", POINTER), "lfs_pointer", "wrong", "tokenizer.json"
    ),
    "weights cut off": (cut, "unreadable", "wrong", "truncated"),
    "weights of no bytes": (put("model.safetensors", b""), "empty_file", "wrong", "0 bytes"),
    "a side file of no bytes": (put("merges.txt", b""), "empty_file", "warning", "merges.txt"),
    "a shard without tensors": (
        lambda f: save_file({}, f / "model-00002-of-00002.safetensors"),
        "empty_shard", "warning", "model-00002-of-00002.safetensors holds no numbers",
    ),
    "a stale shard": (copy_as_shard, "stale_weights", "warning", "model-00001-of-00002"),
    "a stale index": (stale_index, "stale_index", "warning", "pytorch_model-00001-of-00002.bin"),
    "the same in another format": (second_format, "second_copy", "note", "pytorch_model.bin"),
    "a download beside": (
        put("model.safetensors.incomplete", b"x"), "unfinished_download", "warning", "incomplete"
    ),
    "a configuration that is none": (
        put("config.json", b"{"), "side_file", "wrong", "config.json"
    ),
    "a link that leads out": (outside, "side_file", "wrong", "leads out"),
    "a pipe": (a_pipe, "no_file", "wrong", "merges.txt"),
    "no configuration": (
        lambda f: (f / "config.json").unlink(), "no_config", "warning", "config.json"
    ),
    "a tokenizer that is none": (put("tokenizer.json", b"[]"), "tokenizer", "wrong", "tokenizer"),
    "no tokenizer": (
        lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        "no_tokenizer", "warning", "no tokenizer",
    ),
    "torch's own format": (lone_pickle, "pickled", "note", "pytorch_model.bin"),
    "code": (
        stated(auto_map={"AutoModel": "evil.Model"}), "names_code", "note", "evil.Model"
    ),
    "a kernel of the hub": (
        stated(attn_implementation="someone/kernel"), "hub_kernel", "warning", "someone/kernel"
    ),
    "architectures of another type": (
        stated(architectures=7), "wrong_type", "wrong", "architectures"
    ),
    "another dtype": (
        stated(dtype="bfloat16"), "other_dtype", "note", "says bfloat16, most numbers are float32"
    ),
    "fewer layers": (
        stated(num_hidden_layers=3), "other_depth", "warning", "says 3 layers, layers has 2"
    ),
    "more layers": (stated(num_hidden_layers=1), "other_depth", "note", "1 layer,"),
    "layers between": (missing_layer, "layers_missing", "wrong", "layers.2, layers.3"),
    "other labels": (
        lambda f: (with_config(f, id2label={"0": "a", "1": "b"}),
                   tensors(classifier__weight=torch.ones(3, 16))(f)),
        "other_labels", "warning", "'classifier.weight' has 3 rows, the configuration has 2",
    ),
    "another width": (stated(hidden_size=24), "other_width", "warning", "16 wide"),
    "no output layer": (
        stated(architectures=["ToyForCausalLM"], tie_word_embeddings=False),
        "no_output_layer", "wrong", "a model would get a random one",
    ),
    "no output layer of an untied type": (
        stated(architectures=["LlamaForCausalLM"], model_type="llama"),
        "no_output_layer", "warning", "random one",
    ),
    "another vocab_size": (
        stated(vocab_size=40), "vocab_size", "wrong", "32 rows, the configuration's vocab_size"
    ),
    "an output layer of other rows": (
        tensors(lm_head__weight=torch.ones(30, 16)), "output_rows", "warning", "30 rows"
    ),
    "tokens without rows": (
        two_tokens, "ids_without_rows", "wrong", "'[PAD]' (32), '[SEP]' (33)"
    ),
    "rows without tokens": (
        put("tokenizer.json", {**TOKENIZER, "added_tokens": []}),
        "rows_without_token", "note", "1 of 32 rows",
    ),
    "one token, two ids": (
        put("added_tokens.json", {"t3": 4}), "two_ids", "wrong", "'t3'"
    ),
    "a special id without a row": (
        stated(pad_token_id=32), "special_id", "warning", "pad_token_id is 32"
    ),
    "a special id of the text part, beside a size": (
        stated(text_config={"pad_token_id": 40}), "special_id", "warning", "pad_token_id is 40"
    ),
    "a special id for generation": (
        put("generation_config.json", {"eos_token_id": [2, 99]}),
        "special_id", "warning", "generation_config.json: eos_token_id is 99",
    ),
    "another end of text": (
        stated(eos_token_id=2), "other_special_id", "warning", "'</s>' with the id 31"
    ),
    "mixed dtypes": (half, "dtype_mixture", "warning", "1,121 float32, 512 float16"),
    "an empty tensor": (
        tensors(extra=torch.empty(0, 4)), "empty_tensors", "warning", "extra"
    ),
    "integers": (
        tensors(steps=torch.tensor([3])), "integers_held", "note", "steps"
    ),
    "a copy of the table": (
        head_copied, "held_twice", "note", "embed_tokens.weight, lm_head.weight"
    ),
    "untied against its word": (
        lambda f: (with_config(f, tie_word_embeddings=True),
                   tensors(lm_head__weight=torch.ones(32, 16))(f)),
        "untied_copies", "warning", "before 5 use 'embed_tokens.weight' for both",
    ),
    "stale quantisation": (
        stated(quantization_config={"quant_method": "gptq"}), "stale_quantisation", "note", "gptq"
    ),
    "codes without scales": (
        tensors(layers__0__proj__weight=torch.ones(32, 16, dtype=torch.int8)),
        "unreadable", "wrong", "quantised",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_found(case: str, tmp_path: Path) -> None:
    change, kind, level, text = CASES[case]
    folder = sound(tmp_path / "a")
    change(folder)
    checked = only(folder)
    assert found(checked).get(kind) == level
    told = {"wrong": checked.wrong, "warning": checked.unusual, "note": checked.remarks}[level]
    assert any(text in one for one in told), told
    assert bool(checked.faults) == (level == "wrong")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            set_nan,
            "layers.0.norm.weight 16 Inf of 16, first at 0, layers.1.proj.weight 1 NaN and 1 Inf "
            "of 512, first at 51: numbers that are not finite.",
        ),
        (set_zero, "nothing but zeros: layers.1.proj.weight"),
    ],
)
def test_values_are_read_only_where_asked_for(
    change: Change, expected: str, tmp_path: Path
) -> None:
    folder = sound(tmp_path / "a")
    change(folder)
    assert found(only(folder)) == {}
    told: list[str] = []
    checked = only(folder, values=True, progress=lambda done, total, name: told.append(name))
    assert [*checked.wrong, *checked.unusual] == [expected]
    assert "layers.1.proj.weight" in told


def test_values_of_codes_are_the_numbers_they_mean(tmp_path: Path) -> None:
    folder = sound(tmp_path / "a", quantization_config={"quant_method": "fp8"})
    codes = torch.ones(32, 16).to(torch.float8_e4m3fn)

    def change(held: dict[str, Tensor]) -> None:
        held["layers.0.proj.weight"] = codes
        held["layers.0.proj.weight_scale"] = torch.tensor(float("nan"))

    with_tensors(folder, change)
    checked = only(folder, values=True)
    assert checked.wrong[0].startswith("layers.0.proj.weight: numbers that are not finite")
    assert "512 NaN of 512" in checked.wrong[0]
    assert checked.tensors == 9
    assert any("dequantised" in text for text in checked.remarks)


def test_all_faults_of_a_broken_set_of_shards(tmp_path: Path) -> None:
    base = make_base()
    names = [*base]
    shards = {
        f"model-0000{i + 1}-of-00003.safetensors": {n: base[n] for n in names[i::3]}
        for i in range(3)
    }
    folder = save_sharded(tmp_path / "a", shards)
    cut_off, gone, page = sorted(shards)
    (folder / cut_off).write_bytes((folder / cut_off).read_bytes()[:-8])
    (folder / gone).unlink()
    (folder / page).write_bytes(b"<!doctype html><html>404</html>")
    text = "\n".join(only(folder).wrong)
    assert gone in text and "missing" in text
    assert f"{cut_off}: truncated" in text
    assert f"{page}: a web page" in text


def test_a_sharded_checkpoint_and_its_total(tmp_path: Path) -> None:
    base = make_base()
    names = [*base]
    folder = save_sharded(
        tmp_path / "a",
        {
            "model-00001-of-00002.safetensors": {n: base[n] for n in names[:4]},
            "model-00002-of-00002.safetensors": {n: base[n] for n in names[4:]},
        },
    )
    assert set(found(only(folder))) == {"no_tokenizer"}
    index = folder / "model.safetensors.index.json"
    stated_size = json.loads(index.read_text())
    stated_size["metadata"]["total_size"] = 5
    write(index, stated_size)
    held = sum(t.numel() * t.itemsize for t in base.values())
    assert f"states 5 bytes of tensors, its files hold {held:,}" in only(folder).remarks[0]


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "model.gguf").write_bytes(b"GGUF")
    report = eutectic.check(tmp_path / "empty", gguf, tmp_path / "nowhere")
    assert not report.sound
    assert [one.kind for one in report] == ["nothing to read"] * 3
    texts = [one.wrong[0] for one in report]
    assert "empty" in texts[0]
    assert "GGUF" in texts[1]
    with pytest.raises(RequestError, match="nothing to check"):
        eutectic.check()


# --- Against a base ---


def adapter(folder: Path, base: str = "./base", *, b: float = 0.0, **config: Any) -> Path:
    folder.mkdir()
    stated_fields = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["proj"],
        "base_model_name_or_path": base,
        **config,
    }
    write(folder / "adapter_config.json", stated_fields)
    root = "base_model.model.layers.0.proj"
    factors = {f"{root}.lora_A.weight": torch.ones(2, 16)}
    factors[f"{root}.lora_B.weight"] = torch.full((32, 2), b)
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


def test_fine_tunes_of_a_base(tmp_path: Path) -> None:
    base = sound(tmp_path / "base")
    expert = sound(tmp_path / "a")
    save(expert, make_expert(make_base(), 1), CONFIG)
    for report in (eutectic.check(base, expert), eutectic.check(expert, base=base)):
        assert report.sound
        assert all(found(one) == {} for one in report)


def test_what_a_fine_tune_lacks_or_has_besides(tmp_path: Path) -> None:
    base = sound(tmp_path / "base")
    changed = make_expert(make_base(), 1)
    del changed["layers.0.norm.weight"], changed["position_ids"]
    changed["layers.0.gate.weight"] = torch.ones(4, 16)
    changed["classifier.weight"] = torch.ones(3, 16)
    changed["layers.1.proj.bias"] = torch.ones(16)
    expert = save(tmp_path / "a", changed, CONFIG)
    write(expert / "tokenizer.json", {"model": {"vocab": {**VOCABULARY, "t1": 2, "t2": 1}}})
    (checked,) = eutectic.check(expert, base=base)
    notes = {note.kind: note for note in checked.notes}
    assert notes["lacks_of_base"].subject == ("layers.0.norm.weight",)
    assert notes["lacked_by_base"].subject == ("layers.0.gate.weight",)
    assert notes["further_heads"].subject == ("classifier.weight",)
    assert notes["other_shapes"].subject == ("layers.1.proj.bias [16] for [32]",)
    assert notes["other_ids"].numbers["count"] == 2
    assert not checked.faults


def test_names_that_fit_another_base(tmp_path: Path) -> None:
    base, other = sound(tmp_path / "base"), tmp_path / "other"
    save(other, {f"blocks.{n}.w": torch.randn(16, 16) for n in range(4)}, {"model_type": "x"})
    stray = shutil.copytree(other, tmp_path / "stray")
    checked = [*eutectic.check(base, other, stray)]
    assert found(checked[2])["fits_other_base"] == "warning"
    assert str(other) in checked[2].unusual[0]
    (told,) = eutectic.check(stray, base=base)
    assert found(told)["other_base"] == "wrong"
    lone = save(tmp_path / "lone", {"w": torch.ones(3, 3)})
    assert found([*eutectic.check(base, lone)][1])["unrelated_names"] == "warning"


def test_a_wider_model_is_no_fine_tune(tmp_path: Path) -> None:
    base = sound(tmp_path / "base")
    wide = save(tmp_path / "wide", make_base(width=32), {**CONFIG, "hidden_size": 32})
    (checked,) = eutectic.check(wide, base=base)
    assert found(checked)["other_base"] == "wrong"


def test_adapters(tmp_path: Path) -> None:
    base = sound(tmp_path / "base")
    idle = adapter(tmp_path / "idle")
    trained = adapter(tmp_path / "trained", b=0.5, target_modules=["proj", "gate"])
    _, first, second = eutectic.check(base, idle, trained, values=True)
    assert (first.kind, first.model, first.tensors) == ("adapter", "LORA", 2)
    assert found(first)["idle_adapter"] == "warning"
    assert found(first)["adapter_fits"] == "note"
    assert "idle_adapter" not in found(second)
    assert f"changes 1 tensor of {base}" in first.remarks
    assert {n.kind: n.subject for n in second.notes}["idle_targets"] == ("gate",)
    assert not first.faults and not second.faults


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda f: write(f / "adapter_config.json", {"peft_type": "PREFIX_TUNING"}), "unreadable"),
        (lambda f: write(f / "adapter_config.json", {"peft_type": "LORA", "r": "x"}), "unreadable"),
        (lambda f: write(f / "adapter_model.safetensors", POINTER), "lfs_pointer"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "unreadable"),
        (
            lambda f: save_file(
                {"base_model.model.layers.0.proj.lora_A.weight": torch.ones(2, 16)},
                f / "adapter_model.safetensors",
            ),
            "lonely_factor",
        ),
    ],
)
def test_broken_adapters(change: Change, kind: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", b=1.0)
    change(folder)
    checked = only(folder)
    assert found(checked)[kind] == "wrong"
    assert checked.kind == "adapter"


def test_an_adapter_of_another_base(tmp_path: Path) -> None:
    base = sound(tmp_path / "base")
    folder = adapter(tmp_path / "a", b=1.0)
    named = load_file(folder / "adapter_model.safetensors")
    foreign = {key.replace("layers.0", "h.0.attn"): value for key, value in named.items()}
    save_file(foreign, folder / "adapter_model.safetensors")
    (checked,) = eutectic.check(folder, base=base)
    assert found(checked)["other_base"] == "wrong"
    other = adapter(tmp_path / "b", b=1.0, base_model_name_or_path=None)
    save_file(named, other / "model.safetensors")
    assert found(only(other)).items() >= {
        ("adapter_of_nothing", "warning"),
        ("weights_beside_adapter", "warning"),
    }


def test_a_base_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    expert = sound(tmp_path / "a")
    with pytest.raises(CheckpointError):
        eutectic.check(expert, base=tmp_path / "nowhere")
