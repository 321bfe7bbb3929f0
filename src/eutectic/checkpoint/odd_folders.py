"""What is told of folders that hold no weights to read: what each is, and the step that helps.

Recognition goes by the names in the folder. The commands are those of the programs that wrote it.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from eutectic.checkpoint.odd_adapters import ADAPTER_HUB
from eutectic.checkpoint.odd_files import CONVERT_GGUF, Oddity, command
from eutectic.words import few

JOURNAL = (
    "journal.jsonl"  # of an unfinished merge, whose files have their final size from the start
)
# Pieces of weights that no one of them holds whole; a lone one may not pass for a checkpoint.
_PIECE = re.compile(
    r"(bf16_|fp16_)?(zero_pp_rank|mp_rank)_\d+.*"
    r"|layer_\d+-model_\d+-model_states\.pt"
    r"|pytorch_model_fsdp(_\d+)?_rank_?\d+\.(bin|pt)"
    r"|(model|optim|extra_state)_world_size_\d+_rank_\d+\.pt"
    r"|consolidated\.\d+\.pth"
    r"|openvino_\w+\.bin"
)
_UNFINISHED = (".incomplete", ".aria2", ".part", ".partial", ".crdownload", ".download", ".tmp")
_STATES = re.compile(
    r"(optimizer|scheduler|lr_scheduler|scaler|rng_state|random_states|training_args|trainer_state"
    r"|optim_|global_step|latest|sampler|dl_state)"
)

_FSDP = re.compile(r"pytorch_model_fsdp_\d+")
_DISTCP = re.compile(r"__\d+_\d+\.distcp")
_DEEPSPEED = re.compile(r"zero_to_fp32\.py|(bf16_|fp16_)?(zero_pp_rank|mp_rank)_\d+.*_states\.pt")
_STEP = re.compile(r"global_step\d+")
_MEGATRON = re.compile(r"latest_checkpointed_iteration\.txt|mp_rank_\d+(_\d+)?|model_optim_rng\.pt")
_VERL = re.compile(r"model_world_size_\d+_rank_\d+\.pt")
_FSDP_RANKS = re.compile(r"pytorch_model_fsdp(_\d+)?_rank_?\d+\.(bin|pt)")
_LLAMA = re.compile(r"consolidated\.\d+\.pth")


def is_piece(name: str) -> bool:
    """Tell whether a file holds a piece of the weights, which is no checkpoint alone."""
    return _PIECE.fullmatch(name) is not None


def by_names(folder: Path, names: Sequence[str]) -> Oddity | None:
    """Return what a folder is that holds no weights to read, by the names in it."""
    if not names:
        return Oddity("the folder is empty", "Download or save the model into it.")
    for recognise in (_unfinished, _of_a_training, _of_a_program, _of_a_format, _leftovers):
        if (found := recognise(folder, names)) is not None:
            return found
    return None


def unfinished(folder: Path, names: Sequence[str]) -> Oddity | None:
    """Return what is said of weights that look finished and are not."""
    above = folder.resolve().parent
    if JOURNAL in names or (folder.name == "model" and (above / JOURNAL).is_file()):
        return Oddity(
            "an unfinished merge of eutectic, whose files look complete and are not",
            "Run the command that began it again; it goes on where it was stopped.",
        )
    # aria2 gives files their final size first, and removes its own when all is there.
    if lacking := [n for n in names if n.endswith(".aria2")]:
        return _download(folder, lacking)
    return None


def _unfinished(folder: Path, names: Sequence[str]) -> Oddity | None:
    if (found := unfinished(folder, names)) is not None:
        return found
    lacking = unfinished_among(folder, names)
    return _download(folder, lacking) if lacking else None


def unfinished_among(folder: Path, names: Sequence[str]) -> list[str]:
    """Return the names of files that a download has not finished."""
    lacking = [n for n in names if n.endswith(_UNFINISHED)]
    lacking += [p.name for p in (folder / ".cache/huggingface/download").glob("*.incomplete")]
    if folder.parent.name == "snapshots":
        lacking += [p.name for p in (folder.parents[1] / "blobs").glob("*.incomplete")]
    return lacking


def _download(folder: Path, names: Sequence[str]) -> Oddity:
    again = command("hf", "download", "ORG/NAME", "--local-dir", folder)
    return Oddity(
        f"a download that was not finished ({few(names)})",
        f"Run it again; from the hub: {again}",
    )


def _of_a_training(folder: Path, names: Sequence[str]) -> Oddity | None:
    """Recognise the shards of FSDP, DeepSpeed and the like, which are not yet weights by name."""
    out = folder / "merged"
    if shards := _first(_FSDP, names):
        return Oddity(
            f"shards of FSDP, one per process ({shards}/)",
            f"Merge them: {command('accelerate', 'merge-weights', folder / shards, out)}",
        )
    if _first(_DISTCP, names):
        if _FSDP.fullmatch(folder.name):
            join = command("accelerate", "merge-weights", folder, folder.parent / "merged")
        else:
            module = "torch.distributed.checkpoint.format_utils"
            file = folder / "pytorch_model.bin"
            join = command("python", "-m", module, "dcp_to_torch", folder, file)
        return Oddity("shards of a distributed checkpoint (FSDP, .distcp)", f"Merge them: {join}")
    if _first(_DEEPSPEED, names) or _first(_STEP, names):
        inner = _STEP.fullmatch(folder.name) is not None
        root = folder.parent if inner else folder
        tag = f" -t {folder.name}" if inner else ""
        own = (root / "zero_to_fp32.py").is_file()
        script = "zero_to_fp32.py" if own else "-m deepspeed.utils.zero_to_fp32"
        return Oddity(
            "a checkpoint of DeepSpeed, whose weights lie in shards among the optimizer's states",
            f"Merge them: {command('cd', root)} && python {script} . out/{tag}",
        )
    if _first(_VERL, names):
        words = ("--backend", "fsdp", "--local_dir", folder, "--target_dir", out)
        join = command("python", "-m", "verl.model_merger", "merge", *words)
        return Oddity("shards of FSDP as verl writes them, one per process", f"Merge them: {join}")
    if _first(_FSDP_RANKS, names):
        return Oddity(
            "local shards of FSDP, one per process, which only the training can join",
            "Resume it with the same number of processes and save with "
            "fsdp_state_dict_type: FULL_STATE_DICT.",
        )
    return None


def _of_a_program(folder: Path, names: Sequence[str]) -> Oddity | None:
    """Recognise the layouts of other programs."""
    if "model_index.json" in names:
        parts = [n for n in names if (folder / n / "config.json").is_file()]
        listed = ", ".join(str(folder / part) for part in parts) or "its components"
        return Oddity(
            "a pipeline of diffusers, several models in folders of their own",
            f"Name one of them, for base and experts alike: {listed}.",
        )
    if _first(_LLAMA, names):
        words = ("--input_dir", folder, "--output_dir", folder / "hf", "--model_size", "SIZE")
        script = "transformers.models.llama.convert_llama_weights_to_hf"
        return Oddity(
            "Meta's original format of Llama (consolidated.*.pth and params.json)",
            f"Convert it: {command('python', '-m', script, *words)} (such as 8B).",
        )
    if any(n.endswith(".nemo") for n in names) or {"weights", "context"} <= {*names}:
        return Oddity(
            "a model of NVIDIA NeMo",
            "Export it with NeMo: nemo.collections.llm.export_ckpt(path, target='hf', "
            "output_path='out/'), or its scripts convert_*_nemo_to_hf.py",
        )
    if _first(_MEGATRON, names) or any(re.fullmatch(r"iter_\d{7}", n) for n in names):
        words = ("--model-type", "GPT", "--loader", "core", "--saver", "llama_mistral_hf")
        places = ("--load-dir", folder, "--save-dir", folder / "hf")
        convert = command("python", "tools/checkpoint/convert.py", *words, *places)
        return Oddity(
            "a checkpoint of Megatron-LM, split over its processes",
            f"Convert it with Megatron-LM's own script, such as: {convert}",
        )
    if "pytorch_adapter.bin" in names or "adapter.safetensors" in names:
        return ADAPTER_HUB
    return None


_FORMATS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    ((".gguf", ".ggml"), "weights for llama.cpp (GGUF)", CONVERT_GGUF),
    (
        (".h5", ".keras", ".pb", ".tflite"),
        "weights of TensorFlow or Keras",
        "Convert them with transformers 4: "
        "AutoModel.from_pretrained('{folder}', from_tf=True).save_pretrained('out/')",
    ),
    (
        (".msgpack",),
        "weights of Flax",
        "Convert them with transformers 4: "
        "AutoModel.from_pretrained('{folder}', from_flax=True).save_pretrained('out/')",
    ),
    (
        (".onnx", ".onnx_data", ".mlmodel", ".mlpackage", ".engine", ".pte", ".xml", ".pt2"),
        "a model exported for running (ONNX and the like), not for training",
        "Name the checkpoint that it was exported from.",
    ),
    (
        (".ckpt",),
        "a checkpoint of a training (.ckpt, as Lightning writes it)",
        "Save its weights alone, without running code in it: "
        "torch.save(torch.load(file, map_location='cpu', weights_only=True)['state_dict'], "
        "'pytorch_model.bin')",
    ),
    ((".zip",), "an archive", "Unpack it and name the folder: unzip FILE -d FOLDER"),
    (
        (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2"),
        "an archive",
        "Unpack it and name the folder: tar -xf FILE -C FOLDER",
    ),
    ((".pdparams",), "weights of PaddlePaddle", "Name the same model in the format of torch."),
    (
        (".npz", ".npy"),
        "weights in NumPy's format",
        "Save them as safetensors: safetensors.numpy.save_file(dict(numpy.load(file)), "
        "'model.safetensors')",
    ),
)


def _of_a_format(folder: Path, names: Sequence[str]) -> Oddity | None:
    for endings, what, then in _FORMATS:
        if found := [n for n in names if n.lower().endswith(endings)]:
            return Oddity(f"{what}: {few(found)}", then.replace("{folder}", str(folder)))
    if "openvino_model.bin" in names:
        return Oddity("a model exported to OpenVINO", "Name the checkpoint that it was made from.")
    return None


def _leftovers(folder: Path, names: Sequence[str]) -> Oddity | None:
    """Recognise what a training leaves beside the weights, and adapters without configuration."""
    if adapters := [n for n in names if n.startswith("adapter_model.")]:
        return without_config(adapters[0])
    if "adapter_config.json" in names:
        return _NO_ADAPTER
    if states := [n for n in names if _STATES.match(n)]:
        return Oddity(
            f"the state of a training without its weights ({few(states)})",
            "Name the folder where the training saved its model (model.safetensors).",
        )
    return None


_NO_ADAPTER = Oddity(
    "a PEFT adapter (adapter_config.json) whose adapter_model.safetensors is missing",
    "Complete the download, or save the adapter again with save_pretrained.",
)


def without_weights(folder: Path, names: Sequence[str]) -> Oddity:
    """Return what is said of an adapter's folder that lacks its weights."""
    return _unfinished(folder, names) or _of_a_training(folder, names) or _NO_ADAPTER


def without_config(name: str) -> Oddity:
    """Return what is said of an adapter's weights, file `name`, that lie alone."""
    return Oddity(
        f"weights of an adapter ({name}) without the adapter_config.json that says how strongly "
        "they act",
        "Copy adapter_config.json from where the adapter was saved into the same folder.",
    )


def _first(pattern: re.Pattern[str], names: Sequence[str]) -> str:
    return next((name for name in names if pattern.fullmatch(name)), "")
