"""Checkpoints and adapters ready to run on data, with tokenizer or image processor, and labels.

One set of rules for every call of transformers' loaders:

| rule | |
|---|---|
| files | local ones only; nothing is downloaded |
| code | that of transformers; a checkpoint's own code is never run, and nobody is asked |
| class | by the kind of task, by config.json (models only; see `named_classes`), or the caller's |
| dtype | float32 to run a model on data; as stored to build another model from it |
| noise | transformers' reports and progress bars are off while it loads, and then as before |
| missing tensors | reported; the caller decides what they mean |
"""

import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eutectic.checkpoint.adapter_config import named_modules
from eutectic.checkpoint.adapters import check_adapter
from eutectic.checkpoint.experts import fingerprint_of, is_adapter
from eutectic.checkpoint.index import open_index, read_json_object
from eutectic.checkpoint.locating import locate, resolve
from eutectic.checkpoint.opening import is_stated_quantised, open_reader
from eutectic.checkpoint.reader import StateDictReader
from eutectic.checkpoint.weight_files import names_in
from eutectic.cluster.devices import device_of_models
from eutectic.conventions import canonical_name
from eutectic.errors import (
    CheckpointError,
    EutecticError,
    MissingExtraError,
    RequestError,
    first_line,
)
from eutectic.models.arguments import signature_of
from eutectic.models.linear_head import Head
from eutectic.models.model_inputs import takes_images, tell_padding
from eutectic.models.named_classes import check_named_classes, model_class
from eutectic.models.task_kinds import (
    COLLECTED,
    MODEL_CLASSES,
    PICTURES,
    ZERO_SHOT,
    TaskKind,
    kind_of_architectures,
    task_kind,
)
from eutectic.on_first_use import quick_imports
from eutectic.storage import make_all_whole, url_of
from eutectic.words import shown

LOCAL: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, what it is for, what feeds it, and which checkpoint it is."""

    model: nn.Module  # in float32, on its device
    task: TaskKind  # decides the model class
    processor: Any  # tokenizer or image processor
    label_ids: dict[str, int]  # class name -> index, from the configuration
    fingerprint: str  # of the checkpoint
    randomly_initialised: tuple[str, ...] = ()  # parameters that no file holds

    def check_head(self, head: Head | None = None) -> None:
        """Raise RequestError for a model whose predictions, and so whose gradients, mean nothing.

        It is a bare one, or has parameters drawn at random; with a `head` in a file of its own that
        uses no pooler, the model's may be missing.
        """
        if head is None and self.task == "feature-extraction":
            raise RequestError(
                "a bare model predicts nothing, so there are no gradients to collect.\n"
                "Name its linear head with --head, another --task, or collect without gradients."
            )
        unused = {"pooler"} if head is not None and head.pooling != "pooler" else set[str]()
        needed = [n for n in self.randomly_initialised if unused.isdisjoint(n.split("."))]
        if needed:
            first, *others = needed
            more = f" and {len(others)} more" if others else ""
            raise RequestError(
                f"the checkpoint does not hold {first}{more}, which a model for "
                f"{self.task} needs: gradients of random numbers mean nothing.\n"
                "Name another --task, or collect without gradients."
            )


def load_model(
    checkpoint: Path,
    base: Path | None = None,
    task: str | None = None,
    device: str = "cpu",
    *,
    feeds: bool = True,
    named_class: bool = False,
) -> LoadedModel:
    """Load a checkpoint, or a PEFT adapter on its base, in float32 with what feeds it.

    Adapters stay beside the layers that they adapt; parameters keep the base's names. The
    fingerprint is that of the checkpoint's (the adapter's) files. `task`, a kind of task, decides
    the class; default by the architecture that the configuration names. Without `feeds` there need
    be neither tokenizer nor image processor: the caller has batches. With `named_class` the class
    is the one that the configuration names, whatever it is for, unless there is a `task`.
    """
    transformers = transformers_for("running a checkpoint")
    kind = None if task is None else task_kind(task, COLLECTED)
    device = device_of_models(device)
    for given in (checkpoint, base):
        if given is not None and not given.is_dir():
            raise CheckpointError(f"{given}: no such folder.")
    checkpoint = resolve(checkpoint)
    base = None if base is None else locate(base, full=True).path
    folder = base_folder(checkpoint, base)
    if base is not None and folder == checkpoint:
        raise RequestError(f"{checkpoint}: is a full checkpoint; --base is for adapters.")
    try:
        config = load_config(folder)
        architectures: list[str] = getattr(config, "architectures", None) or []
        named = getattr(transformers, architectures[0], None) if architectures else None
        model_class = named if named_class and kind is None else None
        kind = kind or kind_of_architectures(architectures)
        if kind is None and model_class is not None:
            kind = "feature-extraction"  # as far as its data are concerned
        if kind is None:
            raise RequestError(
                f"{folder}: its configuration does not tell the task (architectures: "
                f"{architectures}).\nName one with --task: {', '.join(COLLECTED)}."
            )
        model_class = model_class or getattr(transformers, MODEL_CLASSES[kind])
        model, report = pretrained(model_class, folder)
        model = model.to(torch.float32)
        if kind == ZERO_SHOT:
            from eutectic.models.zero_shot import embed_pictures

            model = embed_pictures(model)
        images = takes_images(model) or kind in PICTURES
        processor = load_processor(checkpoint, folder, images=images) if feeds else None
    except (EutecticError, ImportError):
        raise
    except Exception as error:  # transformers raises anything at values that it does not expect
        raise CheckpointError(
            f"{folder}: transformers cannot load it: {first_line(error)}"
        ) from error
    if feeds:
        tell_padding(model, processor)
        if not images:
            tokenizer: Any = processor
            takes = signature_of(model).taken
            tokenizer.model_input_names = takes(tokenizer.model_input_names)
    if folder != checkpoint:
        model = _with_adapter(model, checkpoint)
    labels = _label_ids(config, folder)
    brought = {canonical_name(n) for n, _ in model.named_parameters() if ".modules_to_save." in n}
    drawn = tuple(sorted({*report["missing_keys"]} - brought))
    try:
        fingerprint = fingerprint_of(checkpoint, base)
    except CheckpointError:
        if base is None:
            raise
        # Adapters that are run but not merged as checkpoints.
        fingerprint = StateDictReader(model.state_dict()).fingerprint()
    return LoadedModel(model.to(device), kind, processor, labels, fingerprint, drawn)


def _label_ids(config: Any, folder: Path) -> dict[str, int]:
    """Return class name -> output of a configuration; nothing where it has none."""
    stated: object = getattr(config, "label2id", None) or {}
    items = stated.items() if isinstance(stated, Mapping) else [(None, None)]
    whole = re.compile(r"\d{1,9}")
    if wrong := [name for name, number in items if not whole.fullmatch(str(number))]:
        raise CheckpointError(
            f"{folder / 'config.json'}: 'label2id' must map class names to outputs, got "
            f"{shown(stated if wrong == [None] else wrong[0])}."
        )
    return {str(name): int(str(number)) for name, number in items}


def base_folder(folder: Path, base: str | Path | None) -> Path:
    """Return the folder that holds the full weights: an adapter's base, or the folder itself."""
    if not is_adapter(folder):
        return folder
    if base is None:
        raise RequestError(f"{folder}: is an adapter; name the base it belongs to with --base.")
    return Path(base)


def _with_adapter(model: nn.Module, adapter: Path) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError(
            "peft", "adapters", f"running the adapter {adapter.name}"
        ) from error
    options: dict[str, Any] = {"local_files_only": True}
    check_adapter(adapter)
    make_all_whole(adapter, [n for n in names_in(adapter) if n.startswith("adapter_model.")])
    try:
        with warnings.catch_warnings():
            # peft asks transformers by names that are going away.
            warnings.simplefilter("ignore", FutureWarning)
            config = peft.PeftConfig.from_pretrained(str(adapter), **options)
            paths = [name for name, _ in model.named_modules() if name]
            for field, value in named_modules(vars(config), paths, adapter).items():
                setattr(config, field, value)
            options["config"] = config
            return peft.PeftModel.from_pretrained(model, str(adapter), **options)  # pyright: ignore[reportArgumentType]
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{adapter}: does not fit the base: {first_line(error)}") from error


def transformers_for(purpose: str) -> Any:
    """Return the package transformers, which `purpose` needs."""
    try:
        with quick_imports():
            import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", purpose) from error
    return transformers


def pretrained(
    chosen: Any,
    folder: Path | None,
    *,
    config: Any = None,
    state: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
) -> tuple[Any, dict[str, Any]]:
    """Return a model and what loading found out: `missing_keys`, `mismatched_keys`, ….

    Instead of a folder there may be a `state`, tensors by the keys of files, with its `config`;
    tensors of another shape than the model's are left out and reported.
    """
    transformers = transformers_for("Loading models")
    with quick_imports():  # it is imported in parts, and this is the largest
        _ = transformers.PreTrainedModel
    old = int(transformers.__version__.split(".")[0]) < 5
    options = {**LOCAL, "output_loading_info": True, "torch_dtype" if old else "dtype": dtype}
    if folder is not None and state is None and is_stated_quantised(folder):
        # The formats' own libraries may be missing, or want a GPU; the numbers are what counts.
        check_named_classes(folder, transformers)
        config, state = load_config(folder), _dequantised(folder)
        if not hasattr(chosen, "config_class"):  # an auto class reads folders only
            with torch.device("meta"):
                chosen = type(chosen.from_config(config, trust_remote_code=False))
        folder = None
    if state is not None:
        options |= {"config": config, "state_dict": dict(state), "ignore_mismatched_sizes": True}
    if folder is not None:
        check_named_classes(folder, transformers)
        _fetch_weights(folder)
    with quietly(transformers):
        loaded = chosen.from_pretrained(folder, **options)
    return loaded if isinstance(loaded, tuple) else (loaded, {})  # classes of others may not report


def _fetch_weights(folder: Path) -> None:
    """Fetch the files that transformers is about to open by itself from an object store."""
    if url_of(folder) is not None:
        make_all_whole(folder, open_index(folder).files)


def _dequantised(folder: Path) -> dict[str, Tensor]:
    with open_reader(folder) as reader:
        return {n: reader.read(n).view(e.shape) for n, e in reader.entries.items()}


@contextmanager
def quietly(transformers: Any) -> Iterator[None]:
    """Silence transformers' reports and progress bars; both are put back as they were."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def writing_quietly() -> AbstractContextManager[None]:
    """Silence transformers while a model saves itself; where none is loaded, it is none of its."""
    transformers = sys.modules.get("transformers")
    return nullcontext() if transformers is None else quietly(transformers)


@contextmanager
def in_words(folder: Path) -> Iterator[None]:
    """Turn what transformers raises into an error with the folder's name.

    It raises anything at values that it does not expect.
    """
    try:
        yield
    except (EutecticError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder}: transformers cannot load it: {first_line(error)}"
        ) from error


def load_config(folder: Path) -> Any:
    """Return a folder's configuration as transformers reads it, of a model that is not quantised.

    What is quantised is read as the numbers that it means; see `checkpoint.opening`. What
    transformers raises is the caller's to put into words, such as by `in_words`.
    """
    transformers = transformers_for("Reading configurations")
    check_named_classes(folder, transformers)
    config = transformers.AutoConfig.from_pretrained(folder, **LOCAL)
    if is_stated_quantised(folder):
        for part in (config, *vars(config).values()):
            if hasattr(part, "quantization_config"):
                delattr(part, "quantization_config")
    return config


def load_stored(folder: Path, chosen: Any = None) -> Any:
    """Return a transformers model as stored: its dtype, and the class that config.json names.

    `chosen`, anything with `from_pretrained`, is taken in place of the latter. No parameter is one
    that no file holds: poolers and heads without their tensors are left out.
    """
    if chosen is not None:
        return _of_files(*pretrained(chosen, folder, dtype="auto"), folder)
    transformers = transformers_for(f"loading {folder}")
    check_named_classes(folder, transformers)
    names = read_json_object(folder / "config.json").get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    with in_words(folder):
        chosen = model_class(first, folder, transformers)
        return _of_files(*pretrained(chosen, folder, dtype="auto"), folder)


def _of_files(model: Any, report: Mapping[str, Any], folder: Path) -> Any:
    """Return a loaded model without what transformers invented for it: poolers, and a head."""
    missing = {str(name) for name in report.get("missing_keys", ())}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    body = getattr(model, prefix[:-1] or "_", None)
    if isinstance(body, nn.Module) and any(not name.startswith(prefix) for name in missing):
        # A head that is nowhere; the model is the bare one.
        model, body.config.architectures = body, [type(body).__name__]  # pyright: ignore
        missing = {n.removeprefix(prefix) for n in missing if n.startswith(prefix)}
    for path, module in list(model.named_modules()) if missing else ():
        names = {f"{path}.{n}" for n, _ in module.named_parameters()}
        parent, _, name = path.rpartition(".")
        if name == "pooler" and names and names <= missing:
            setattr(model.get_submodule(parent), name, None)
            missing -= names
    if missing:
        first, *others = sorted(missing)
        more = f" and {len(others)} more" if others else ""
        raise CheckpointError(
            f"{folder}: no file holds {first}{more}, which a {type(model).__name__} needs; it "
            "would have random values there.\nAdd the tensors, or name in its config.json "
            "(`architectures`) the class that it was saved from."
        )
    return model


def load_processor(own: Path, folder: Path, *, images: bool) -> Any:
    """Return the image processor, or the tokenizer with right padding, of a checkpoint's folder.

    `own` is where a tokenizer is looked for first: adapters may bring one.
    """
    transformers = transformers_for("Reading tokenizers")
    for place in {own, folder}:
        check_named_classes(place, transformers)
    if images:
        return transformers.AutoImageProcessor.from_pretrained(folder, **LOCAL)
    brings = (own / "tokenizer_config.json").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(own if brings else folder, **LOCAL)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        # Padding is masked, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer
