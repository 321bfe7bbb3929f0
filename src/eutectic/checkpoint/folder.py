"""The files beside the weights: configuration, tokenizer, processors, custom code, licences."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from eutectic.checkpoint.index import open_index
from eutectic.checkpoint.module_folders import MODULES_NAME, ROUTER_CONFIGS, module_folders
from eutectic.checkpoint.names import check_inside
from eutectic.checkpoint.odd_files import pointer, pointers_among
from eutectic.checkpoint.writer import write_atomically
from eutectic.errors import CheckpointError, OutputError, why_failed
from eutectic.storage import MANIFEST, storage_of
from eutectic.storage.small_files import read_json, read_start

# What makes inputs of texts, images and sounds: tokenizers, chat templates, processors.
_FEEDING = (
    *("*processor_config.json", "feature_extractor*.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "*vocab*", "merges.txt"),
    *("dict.txt", "spiece.model", "spm*.model", "sentencepiece*.model", "*.spm", "tekken.json"),
    *("prophetnet.tokenizer", "emoji.json", "byte_maps.json", "*.tiktoken", "bpe.codes"),
    *("word_shape.json", "word_pronunciation.json", "normalizer.json", "chat_template*"),
)
# What names the modules of sentence-transformers, lengths and prompts.
_OF_VECTORS = (MODULES_NAME, "*config_sentence_transformers.json", "sentence_*_config.json")
# What a model needs to be loaded and used, and what its licence asks to be kept: copied whatever
# its size, and from folders that are no model's too, such as that of a lone file or of an adapter.
_PATTERNS = (
    *("config.json", "configuration.json", "generation_config.json", "router_config.json"),
    "open_clip_config.json",
    *_OF_VECTORS,
    *_FEEDING,
    *("LICEN[CS]E*", "NOTICE*", "COPYING*", "USE_POLICY*"),
)
# Never copied, whatever their name: weights in any format, archives, pickles and unfinished files.
_NEVER = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npz"),
    *(".npy", ".h5", ".hdf5", ".keras", ".msgpack", ".onnx", ".onnx_data", ".onnx.data", ".gguf"),
    *(".ggml", ".index.json", ".ot", ".tflite", ".pb", ".mlmodel", ".engine", ".plan", ".nemo"),
    *(".mar", ".pt2", ".pte", ".ptl", ".pdparams", ".llamafile", ".zip", ".tar", ".tgz"),
    *(
        ".tar.gz",
        ".7z",
        ".xz",
        ".zst",
        ".incomplete",
        ".part",
        ".tmp",
        ".lock",
        ".pyc",
        ".swp",
        ".bak",
        "~",
    ),
)
# What training leaves beside a model.
_LEFTOVERS = (
    *("optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*", "training_args*"),
    *("trainer_state.json", "trainer_log*", "*_results.json", "*.log", "events.out.*", "nohup.out"),
    *("zero_to_fp32.py", "latest", "latest_checkpointed_iteration.txt", "adapter_config.json"),
    *("training_loss*.png", "training_eval_*.png", "Thumbs.db"),
)
# Folders of the weights in other formats, of training, and of an earlier merge's experts.
_LEFT_FOLDERS = (
    *("onnx*", "openvino*", "coreml*", "original", "gguf", "ggml", "flax", "tf", "tensorrt*"),
    *("executorch*", "checkpoint-*", "checkpoints", "global_step*", "runs", "logs", "wandb"),
    *("mlruns", "lightning_logs", "tensorboard", "eval", "__pycache__", "*.partial", "experts"),
)
_OWN = ("README.md", "eutectic.json", MANIFEST)  # the output gets its own
_OPEN_CLIP = {
    "open_clip_model.safetensors",
    *(f"open_clip_pytorch_model{end}" for end in (".safetensors", ".bin", ".pth")),
}
_MODEL_CONFIGS = ("config.json", "open_clip_config.json", MODULES_NAME)
# Files of the checkpoint, not of its first module, where both lie in one folder.
_OF_THE_WHOLE = (
    *(MODULES_NAME, "*config_sentence_transformers.json", "LICEN[CS]E*", "NOTICE*", "COPYING*"),
    *("USE_POLICY*", "*/*"),
)
_CHAT_TEMPLATES = "additional_chat_templates"
# Modules of sentence-transformers ("1_Pooling").
_NUMBERED = re.compile(r"\d+_[A-Za-z]\w*")
_MAX_BYTES = 32 << 20  # of a file that is copied without being known
_MAX_FILES = 2000
_MAX_DEPTH = 4


@dataclass(frozen=True)
class SideFiles:
    """What lies beside a model's weights; names relative to its folder, sorted."""

    taken: tuple[str, ...]
    left: tuple[str, ...] = ()  # files, and folders as "onnx/"


def side_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the files of a folder to take along, sorted; see `survey`."""
    return survey(folder).taken


def deciding_files(folder: Path) -> tuple[str, ...]:
    """Return the side files that decide how a model is read and fed: configuration, tokenizer."""
    return tuple(n for n in side_files(folder) if _matches(n.rpartition("/")[2], _PATTERNS))


def feeding_files(folder: Path) -> tuple[str, ...]:
    """Return the side files that make a model's inputs: tokenizer, chat template, processors."""
    names = side_files(folder)
    return tuple(n for n in names if _matches(n, (*_FEEDING, f"{_CHAT_TEMPLATES}/*")))


def module_files(folder: Path) -> tuple[str, ...]:
    """Return the files that make vectors of a sentence-transformers model's states, sorted.

    Those of the modules behind the first, weights too, and what names them; none of other models.
    """
    modules = {module.folder for module in module_folders(folder) if module.prefix}
    if not modules:
        return ()
    named = (*side_files(folder), *open_index(folder).weight_files)
    return tuple(
        sorted(n for n in named if n.rpartition("/")[0] in modules or _matches(n, _OF_VECTORS))
    )


def check_side_files(folder: Path | None) -> None:
    """Refuse a folder whose side files an output could not get, before any tensor is written.

    They cannot be read, or are Git-LFS pointers, or a configuration is no JSON object.
    """
    if folder is None:
        return
    names = side_files(folder)
    if found := pointers_among(folder, names):
        raise pointer(folder, found).error(folder)
    for name in names:
        path = check_inside(folder, name)
        try:
            read_start(path, 1)
        except OSError as error:
            why = why_failed(error)
            raise CheckpointError(f"{folder / name}: cannot be read ({why}).") from error
    for place in {"", *(module.folder for module in module_folders(folder))}:
        name = f"{place}/config.json" if place else "config.json"
        if name in names:
            read_json(folder / name, CheckpointError)


def survey(folder: Path, weights: Iterable[str] = ()) -> SideFiles:
    """Return which files of a folder go with its model, and which are left out.

    Of a model's folder everything but weights, optimizer and training states, pickles, what lies in
    folders of other formats or of training, files beyond a size, and the README (the output gets a
    card of its own). Python files only where a configuration names code (`auto_map`, or
    sentence-transformers' modules). Of a folder without a model's configuration, and of an
    adapter's, only files of known names: a lone checkpoint may lie among anything.

    Hidden files are neither taken nor listed, nor are `weights`, the files that are merged and
    their indices. A link that leads out of the folder is refused where the model needs it, left out
    elsewhere.
    """
    modules = {module.folder for module in module_folders(folder)} - {""}
    configs = [path for path in folder.glob("*config.json") if path.is_file()]
    names_code = (folder / MODULES_NAME).is_file() or any(
        b'"auto_map"' in config.read_bytes() for config in configs
    )
    a_model = any((folder / name).is_file() for name in _MODEL_CONFIGS)
    everything = a_model and not (folder / "adapter_config.json").is_file()
    taken: list[str] = []
    left: list[str] = []
    merged = {*weights, *_OWN}
    # A folder may hold a model for transformers and the same for open_clip; one of them is merged.
    others = [name for name in _OPEN_CLIP if (folder / name).exists()]
    stray = () if not others or merged & _OPEN_CLIP else ("open_clip_config.json",)
    for name, place in _walk(folder, modules, everything, left):
        file = name.rpartition("/")[2]
        if name in merged:
            continue
        own_module = place in modules or _NUMBERED.fullmatch(place) or place == _CHAT_TEMPLATES
        known = any(fnmatchcase(file, pattern) for pattern in _PATTERNS) or (
            own_module and file.endswith((".json", ".txt", ".jinja", ".model"))
        )
        code = file.endswith(".py")
        never = file.lower().endswith(_NEVER) or _matches(file, _LEFTOVERS) or file in stray
        allowed = known or (code and names_code) or (everything and not code)
        if never or not allowed or (not known and not _fits(folder, name, len(taken))):
            left.append(name)
            continue
        check_inside(folder, name)
        taken.append(name)
    return SideFiles(tuple(sorted(taken)), tuple(sorted(left)) if everything else ())


def _walk(
    folder: Path, modules: set[str], everything: bool, left: list[str]
) -> Iterator[tuple[str, str]]:
    """Yield (name, folder) of the files that may be taken; folders that are left go to `left`."""
    waiting = [""]
    while waiting:
        place = waiting.pop()
        for path in sorted((folder / place).iterdir()):
            name = f"{place}/{path.name}" if place else path.name
            if path.name.startswith("."):
                continue
            if not path.is_dir():
                yield name, place
                continue
            needed = any(m == name or m.startswith(f"{name}/") for m in modules)
            needed = needed or (not place and _NUMBERED.fullmatch(path.name) is not None)
            if needed or (not place and path.name == _CHAT_TEMPLATES):
                waiting.append(name)
            elif (
                not everything
                or path.is_symlink()
                or name.count("/") >= _MAX_DEPTH
                or _matches(path.name, _LEFT_FOLDERS)
            ):
                left.append(f"{name}/")
            else:
                waiting.append(name)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _fits(folder: Path, name: str, count: int) -> bool:
    """Tell whether a file that nobody is known to need may come along."""
    try:
        size, _ = storage_of(folder).identity(check_inside(folder, name)) or (0, 0)
        return size <= _MAX_BYTES and count < _MAX_FILES
    except (CheckpointError, OSError):
        return False


def copy_side_files(
    folder: Path,
    destination: Path,
    names: Iterable[str] | None = None,
    *,
    like: Path | None = None,
) -> tuple[str, ...]:
    """Copy side files (all of `side_files`, or `names`) and return their names.

    Links are followed, so that the copy stands alone; one that leads out of the folder is refused.
    With `like`, the copy gets the layout of that folder, whose modules may lie elsewhere.
    """
    chosen = side_files(folder) if names is None else tuple(names)
    moved = {} if like is None else _moved(folder, like)
    for name in chosen:
        target = _moved_to(name, moved)
        if target is None:
            continue
        source = check_inside(folder, name)
        try:
            if name == MODULES_NAME and moved:
                text = _respelt(source.read_text(encoding="utf-8"), moved)
                write_atomically(destination / target, text.encode())
            else:
                storage_of(destination).copy(source, destination / target)
        except OSError as error:
            raise OutputError(
                f"{destination / target}: cannot be written ({why_failed(error)})."
            ) from error
    return chosen


def layout_files(folder: Path) -> tuple[str, ...]:
    """Return the side files that say in which folders a checkpoint's modules lie."""
    modules = module_folders(folder)
    names = {MODULES_NAME: None} if modules else {}
    for above in sorted({module.folder.rpartition("/")[0] for module in modules}):
        # In the folder itself, config.json is that of the first module.
        for name in ROUTER_CONFIGS if above else ROUTER_CONFIGS[:1]:
            names[f"{above}/{name}" if above else name] = None
    return tuple(name for name in names if (folder / name).is_file())


def _moved(folder: Path, like: Path) -> Mapping[str, str | None]:
    """Return what becomes of files and folders that lie elsewhere in another folder's layout.

    Folder of a module -> its folder there; None for files that would contradict those there.
    """
    own = {module.prefix: module.folder for module in module_folders(folder)} or {"": ""}
    theirs = {module.prefix: module.folder for module in module_folders(like)} or {"": ""}
    moved: dict[str, str | None] = {
        place: theirs[prefix] for prefix, place in own.items() if theirs.get(prefix, place) != place
    }
    for above in {place.rpartition("/")[0] for place in moved if place}:
        # A Router's configuration, which names the folders of its modules.
        moved |= dict.fromkeys(f"{above}/{n}" if above else n for n in ROUTER_CONFIGS)
    return moved


def _moved_to(name: str, moved: Mapping[str, str | None]) -> str | None:
    """Return the name of a file in another layout; None where it has no place there."""
    if name in moved:
        return moved[name]
    places = [place for place in moved if not place or name.startswith(f"{place}/")]
    place = max(places, key=len, default=None)
    if place is None or (not place and _matches(name, _OF_THE_WHOLE)):
        return name
    inner = name.removeprefix(f"{place}/") if place else name
    return f"{moved[place]}/{inner}" if moved[place] else inner


def _respelt(text: str, moved: Mapping[str, str | None]) -> str:
    """Return a `modules.json` with the folders of another layout."""
    stated: list[dict[str, Any]] = json.loads(text)
    for module in stated:
        module["path"] = moved.get(module["path"], module["path"]) or ""
    return json.dumps(stated, indent=2, ensure_ascii=False) + "\n"
