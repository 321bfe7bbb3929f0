"""Checkpoints that are none, as people find them: each is named, with the command that helps.

Guards that as a base and as an expert, in plans and merges, what a folder or file is stands in the
message, that nothing is written and that the exit code is 2.
"""

from __future__ import annotations

import io
import json
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from helpers.cli import invoke
from helpers.folders import make_base, make_expert, save

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
)
LFS = ("a Git-LFS pointer", "lfs pull")
LORA = {"r": 4, "lora_alpha": 8, "peft_type": "LORA", "task_type": "CAUSAL_LM"}
ONE = torch.ones(4, 4)
Build = Callable[[Path], object]


def files(**contents: bytes) -> Build:
    """Write files; `__` in a name is a slash and `_dot_` a dot."""

    def build(folder: Path) -> None:
        for name, content in contents.items():
            path = folder / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    return build


def put(*names: str, content: bytes = b"x") -> Build:
    """Write files of one content."""

    def build(folder: Path) -> None:
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    return build


def weights(name: str, *keys: str) -> Build:
    return lambda folder: save_file({key: ONE.clone() for key in keys}, folder / name)


def adapter(settings: object, file: str = "adapter_model.safetensors") -> Build:
    def build(folder: Path) -> None:
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        key = "x.lora_a" if file == "adapters.safetensors" else "x.lora_A.weight"
        save_file({key: ONE}, folder / file)

    return build


def kind(name: str, task: str = "CAUSAL_LM") -> Build:
    return adapter({"peft_type": name, "task_type": task})


def sound(change: Callable[[Path], object]) -> Build:
    """Save a sound checkpoint and change something of it."""

    def build(folder: Path) -> None:
        save(folder, make_expert(make_base(), 7))
        change(folder)

    return build


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def shards(*numbers: int, count: int = 3) -> Build:
    def build(folder: Path) -> None:
        for number in numbers:
            name = f"model-{number:05d}-of-{count:05d}.safetensors"
            save_file({f"t{number}": ONE}, folder / name)

    return build


def sharded_by_a_pointer(folder: Path) -> None:
    shards(1, 2, 3)(folder)
    (folder / "model.safetensors.index.json").write_bytes(POINTER)


def torchscript(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "model.pt")


def zipped(name: str) -> Build:
    def build(folder: Path) -> None:
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("model/model.safetensors", b"x")

    return build


def tarred(name: str, mode: str = "w") -> Build:
    def build(folder: Path) -> None:
        with tarfile.open(folder / name, mode) as archive:  # type: ignore[call-overload]
            archive.addfile(tarfile.TarInfo("model.safetensors"), io.BytesIO())

    return build


def numpy_archive(folder: Path) -> None:
    with (folder / "model.bin").open("wb") as file:
        np.savez(file, a=np.ones(2))


def of_mlx(folder: Path) -> None:
    packed = {
        "m.q.weight": torch.zeros(4, 4, dtype=torch.uint32),
        "m.q.scales": ONE,
        "m.q.biases": ONE.clone(),
    }
    save_file(packed, folder / "model.safetensors")
    (folder / "config.json").write_text('{"quantization": {"group_size": 64, "bits": 4}}')


def optimizer(folder: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    torch.save(torch.optim.Adam(layer.parameters()).state_dict(), folder / "state.pt")


PAGE = b"<!DOCTYPE html>\n<html><head><title>model at main</title>"
KOHYA = ("lora_unet_mid.lora_down.weight", "lora_unet_mid.lora_up.weight", "lora_unet_mid.alpha")

ODD: dict[str, tuple[Build, tuple[str, ...]]] = {
    # Git-LFS
    "lfs-safetensors": (put("model.safetensors", content=POINTER), LFS),
    "lfs-bin": (put("pytorch_model.bin", content=POINTER), LFS),
    "lfs-index": (sharded_by_a_pointer, LFS),
    "lfs-config": (sound(put("config.json", content=POINTER)), ("config.json", *LFS)),
    "lfs-adapter": (
        files(adapter_config_dot_json=json.dumps(LORA).encode(), **{"adapter_model.bin": POINTER}),
        ("adapter",),
    ),
    "lfs-shard": (
        lambda f: (shards(1, 3)(f), put("model-00002-of-00003.safetensors", content=POINTER)(f)),
        ("model-00002-of-00003", *LFS),
    ),
    # downloads
    "empty": (put(), ("the folder is empty",)),
    "incomplete": (
        put("config.json.x", "model.safetensors.incomplete"),
        ("a download that was not finished", "model.safetensors.incomplete", "hf download"),
    ),
    "incomplete-in-cache": (
        put("README.md", ".cache/huggingface/download/abc.incomplete"),
        ("a download that was not finished", "hf download"),
    ),
    "aria2": (
        sound(put("model.safetensors.aria2")),
        ("not finished (model.safetensors.aria2)", "hf download"),
    ),
    "cut-off": (sound(cut), ("truncated: the file ends after", "Complete the download")),
    "zeros": (put("model.safetensors", content=bytes(900)), ("nothing but zeros", "again")),
    "zero-bytes": (put("model.safetensors", content=b""), ("an empty file (0 bytes)",)),
    "web-page": (put("model.safetensors", content=PAGE), ("a web page", "/resolve/")),
    "web-page-bin": (put("pytorch_model.bin", content=PAGE), ("a web page", "/resolve/")),
    "text": (put("model.safetensors", content=b"Entry not found"), ("'Entry not found'",)),
    "json": (put("model.safetensors", content=b'{"error":"no"}'), ("a text, not weights",)),
    "shards-missing": (
        shards(1, 3),
        ("2 of 3 shards", "number 2 is missing", "Complete the download"),
    ),
    "one-shard": (shards(1), ("1 of 3 shards", "numbers 2, 3 are missing")),
    # trainings
    "fsdp": (
        put("pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata", "optimizer_0/x"),
        ("shards of FSDP", "accelerate merge-weights"),
    ),
    "fsdp-inside": (
        put("__0_0.distcp", "__1_0.distcp", ".metadata"),
        (".distcp", "dcp_to_torch"),
    ),
    "fsdp-below": (
        put("checkpoint-5/pytorch_model_fsdp_0/__0_0.distcp", "checkpoint-5/trainer_state.json"),
        ("checkpoint-5: shards of FSDP", "accelerate merge-weights"),
    ),
    "fsdp-ranks": (
        put("pytorch_model_fsdp_rank0.bin", "pytorch_model_fsdp_rank1.bin"),
        ("local shards of FSDP", "FULL_STATE_DICT"),
    ),
    "verl": (
        put("model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt", "fsdp_config.json"),
        ("verl", "python -m verl.model_merger merge --backend fsdp"),
    ),
    "deepspeed": (
        put("latest", "zero_to_fp32.py", "global_step5/mp_rank_00_model_states.pt"),
        ("DeepSpeed", "python zero_to_fp32.py . out/"),
    ),
    "deepspeed-inside": (
        put("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ("DeepSpeed", "python -m deepspeed.utils.zero_to_fp32 . out/"),
    ),
    "optimizer": (
        put("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"),
        ("the state of a training without its weights", "optimizer.pt"),
    ),
    "optimizer-state": (optimizer, ("the state of an optimizer",)),
    "lightning": (put("last.ckpt"), ("a checkpoint of a training", "weights_only=True")),
    "eutectic": (
        sound(put("journal.jsonl")),
        ("an unfinished merge of eutectic", "Run the command that began it again"),
    ),
    # other programs
    "megatron": (
        put("latest_checkpointed_iteration.txt", "iter_0000010/mp_rank_00/model_optim_rng.pt"),
        ("Megatron-LM", "tools/checkpoint/convert.py"),
    ),
    "nemo": (put("model.nemo"), ("NVIDIA NeMo", "export_ckpt")),
    "llama": (
        put("consolidated.00.pth", "params.json", "tokenizer.model"),
        ("Meta's original format", "convert_llama_weights_to_hf --input_dir"),
    ),
    "pipeline": (
        put("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        ("a pipeline of diffusers", "/unet"),
    ),
    "kohya": (weights("lora.safetensors", *KOHYA), ("Kohya", "networks/merge_lora.py")),
    "kohya-lycoris": (
        weights("x.safetensors", "lora_unet_a.hada_w1_a", "lora_te1_b.lokr_w1", "lora_te1_b.alpha"),
        ("Kohya",),
    ),
    "diffusers-adapter": (
        weights(
            "pytorch_lora_weights.safetensors",
            *("unet.down.0.to_q.lora_A.weight", "unet.down.0.to_q.lora_B.weight"),
        ),
        ("a LoRA of diffusers", "load_lora_weights", "fuse_lora"),
    ),
    "mlx-adapter": (
        adapter({"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}, "adapters.safetensors"),
        ("MLX", "mlx_lm.fuse"),
    ),
    "mlx-factors": (
        weights("adapters.safetensors", "model.layers.0.q_proj.lora_a", "model.layers.0.q.lora_b"),
        ("a LoRA of MLX", "mlx_lm.fuse"),
    ),
    "mlx-quantised": (of_mlx, ("MLX", "mlx_lm.convert")),
    "factors-alone": (
        weights("model.safetensors", "base_model.model.q.lora_A.weight"),
        ("factors of a LoRA, not a full checkpoint", "adapter_config.json"),
    ),
    "adapter-without-config": (
        weights("adapter_model.safetensors", "base_model.model.q.lora_A.weight"),
        ("without the adapter_config.json", "Copy adapter_config.json"),
    ),
    "adapter-without-weights": (
        put("adapter_config.json", content=json.dumps(LORA).encode()),
        ("adapter_model.safetensors is missing", "Complete the download"),
    ),
    # formats
    "gguf": (
        put("model-Q4.gguf", content=b"GGUF"),
        ("no readable GGUF file", "that it was made from"),
    ),
    "gguf-renamed": (put("model.bin", content=b"GGUF\3\0\0\0\xff"), ("a GGUF file",)),
    "onnx": (put("model.onnx"), ("ONNX", "the checkpoint that it was exported from")),
    "tensorflow": (put("tf_model.h5"), ("TensorFlow", "from_tf=True")),
    "flax": (put("flax_model.msgpack"), ("Flax", "from_flax=True")),
    "hdf5": (put("model.bin", content=b"\x89HDF\r\n\x1a\n\0\0"), ("HDF5", "from_tf=True")),
    "torchscript": (torchscript, ("TorchScript", "torch.jit.load")),
    "zip": (zipped("model.zip"), ("an archive", "unzip")),
    "zip-renamed": (zipped("model.bin"), ("an archive (zip)", "unzip")),
    "zip-as-safetensors": (zipped("model.safetensors"), ("an archive (zip)", "unzip")),
    "tar": (tarred("model.tar"), ("an archive", "tar -xf")),
    "tar-renamed": (tarred("model.bin"), ("an archive (tar)", "tar -xf")),
    "gzip-renamed": (tarred("model.bin", "w:gz"), ("gzip", "tar -xzf")),
    "numpy": (numpy_archive, ("NumPy", "safetensors.numpy")),
    "other-files": (put("README.md", "notes.txt"), ("it holds: README.md, notes.txt",)),
}
AS_EXPERT: dict[str, tuple[Build, tuple[str, ...]]] = {
    "prompt-tuning": (kind("PROMPT_TUNING"), ("changes no weight", "load it with peft")),
    "prefix-tuning": (kind("PREFIX_TUNING"), ("changes no weight",)),
    "p-tuning": (kind("P_TUNING"), ("changes no weight",)),
    "adaption-prompt": (kind("ADAPTION_PROMPT"), ("changes no weight",)),
    "xlora": (kind("XLORA"), ("no merged weight",)),
    **{
        name.lower(): (kind(name), (f"'{name}'", "AutoPeftModelForCausalLM", "merge_and_unload"))
        for name in ("FROD", "GLORA", "OSF", "RANDLORA", "WAVEFT", "SOMETHING_NEW")
    },
    "classifier": (kind("GLORA", "SEQ_CLS"), ("AutoPeftModelForSequenceClassification",)),
    "kind-unknown": (kind(None), ("names no kind", "save_pretrained")),  # type: ignore[arg-type]
    "adapter-hub": (
        adapter({"config": {"architecture": "lora"}, "model_class": "BertModel"}),
        ("AdapterHub", "merge_adapter"),
    ),
    "adapter-pointer": (
        lambda f: (
            put("adapter_config.json", content=json.dumps(LORA).encode())(f),
            put("adapter_model.safetensors", content=POINTER)(f),
        ),
        ("adapter_model.safetensors", *LFS),
    ),
    "config-pointer": (
        lambda f: (adapter(LORA)(f), put("adapter_config.json", content=POINTER)(f)),
        ("adapter_config.json", *LFS),
    ),
    "mistral-names": (
        weights(
            "consolidated.safetensors", "tok_embeddings.weight", "layers.0.attention.wq.weight"
        ),
        ("original format", "format of transformers"),
    ),
}


def refused(folder: Path, base: Path, expert: Path, *parts: str) -> None:
    experts = [f"a={expert}", f"b={folder / 'sound'}"]
    before = sorted(folder.rglob("*"))
    for words in (["plan"], ["merge", "-o", folder / "out"]):
        answer = invoke(*words, "--base", base, "-m", "average", *experts)
        assert answer.code == 2, answer
        for part in parts:
            assert part in answer.err, (part, answer.err)
    assert sorted(folder.rglob("*")) == before


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a sound base and a sound expert; `odd` is to be filled."""
    save(tmp_path / "base", make_base())
    save(tmp_path / "sound", make_expert(make_base(), 1))
    (tmp_path / "odd").mkdir()
    return tmp_path


@pytest.mark.parametrize("case", ODD)
def test_as_base_and_as_expert(place: Path, case: str) -> None:
    build, parts = ODD[case]
    build(place / "odd")
    refused(place, place / "odd", place / "sound", "base: ", *parts)
    refused(place, place / "base", place / "odd", "expert 'a': ", *parts)


@pytest.mark.parametrize("case", AS_EXPERT)
def test_as_expert(place: Path, case: str) -> None:
    build, parts = AS_EXPERT[case]
    build(place / "odd")
    refused(place, place / "base", place / "odd", "expert 'a': ", *parts)


def test_an_adapter_as_base_names_its_own_base(place: Path) -> None:
    adapter({**LORA, "base_model_name_or_path": "org/first"})(place / "odd")
    refused(place, place / "odd", place / "sound", "a PEFT adapter", "trained on (org/first)")


def test_a_shard_by_its_own_name(place: Path) -> None:
    shards(1, 2, 3)(place / "odd")
    file = place / "odd/model-00001-of-00003.safetensors"
    refused(
        place, place / "base", file, "one of 3 shards", f"Name the folder instead: {file.parent}"
    )


def test_files_of_other_formats_by_their_own_name(place: Path) -> None:
    (place / "odd/model.gguf").write_bytes(b"GGUF")
    refused(place, place / "base", place / "odd/model.gguf", "no readable GGUF file", "ends early")


def test_the_folder_of_an_unfinished_merge(place: Path) -> None:
    save(place / "odd/model", make_expert(make_base(), 3))
    (place / "odd/journal.jsonl").write_text("")
    refused(place, place / "base", place / "odd", "an unfinished merge")
    refused(place, place / "base", place / "odd/model", "an unfinished merge")


@pytest.mark.parametrize("donor", ["base", "a"])
def test_tokenizers_that_are_pointers(place: Path, donor: str) -> None:
    odd = save(place / "odd", make_base() if donor == "base" else make_expert(make_base(), 4))
    (odd / "tokenizer.json").write_bytes(POINTER)
    (odd / "tokenizer.model").write_bytes(POINTER)
    base, expert = (odd, place / "sound") if donor == "base" else (place / "base", odd)
    names = [f"a={expert}", f"b={place / 'sound'}"]
    asked = ["--base", base, "-m", "average", "--set", f"side_files={donor}", *names]
    for words in (["plan"], ["merge", "-o", place / "out"]):
        answer = invoke(*words, *asked)
        assert answer.code == 2, answer
        for part in ("Git-LFS pointers", "tokenizer.json, tokenizer.model", "lfs pull"):
            assert part in answer.err, answer.err
    assert not (place / "out").exists()


def test_shards_of_fsdp_by_the_name_of_their_folder(place: Path) -> None:
    put("__0_0.distcp")(place / "odd/pytorch_model_fsdp_0")
    folder = place / "odd/pytorch_model_fsdp_0"
    command = f"accelerate merge-weights {folder} {place / 'odd/merged'}"
    refused(place, place / "base", folder, command)
