"""A checkpoint as a running model with its tokenizer or image processor, from local files only."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eutectic.checkpoint.experts import is_adapter, open_expert
from eutectic.checkpoint.ia3 import is_ia3, open_ia3
from eutectic.checkpoint.index import open_index
from eutectic.checkpoint.memory import StateDictReader
from eutectic.checkpoint.reader import CheckpointReader
from eutectic.conventions import canonical_name
from eutectic.errors import CheckpointError, MissingExtraError, RequestError
from eutectic.statistics.encode import TASKS, Task
from eutectic.statistics.heads import Head

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_BY_ARCHITECTURE: Mapping[str, Task] = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "seq2seq",
}
_CLASSES: Mapping[Task, str] = {
    "text-classification": "AutoModelForSequenceClassification",
    "feature-extraction": "AutoModel",
    "image-classification": "AutoModelForImageClassification",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, what it is for, what feeds it, and which checkpoint it is.

    Attributes:
        model: in float32, on its device.
        task: decides the model class.
        processor: tokenizer or image processor.
        label_ids: class name -> index, from the configuration.
        fingerprint: of the checkpoint.
        made_up: parameters that no file holds, so that transformers drew them at random.
    """

    model: nn.Module
    task: Task
    processor: Any
    label_ids: dict[str, int]
    fingerprint: str
    made_up: tuple[str, ...] = ()

    def check_head(self, head: Head | None = None) -> None:
        """Refuse a model whose predictions, and so whose gradients, mean nothing.

        Args:
            head: of its own file; a pooler that it does not use may be missing.

        Raises:
            RequestError: some of its parameters were drawn at random, or it predicts nothing.
        """
        unused = head is not None and head.pooling != "pooler"
        needed = [n for n in self.made_up if not (unused and "pooler" in n.split("."))]
        if head is None and self.task == "feature-extraction":
            raise RequestError(
                "a bare model predicts nothing, so there are no gradients to collect.\n"
                "Name its linear head with --head, another --task, or collect without gradients."
            )
        if needed:
            first, *others = needed
            more = f" and {len(others)} more" if others else ""
            raise RequestError(
                f"the checkpoint does not hold {first}{more}, which a model for "
                f"{self.task} needs: gradients of random numbers mean nothing.\n"
                "Name another --task, or collect without gradients."
            )


def load_model(
    checkpoint: Path, base: Path | None = None, task: Task | None = None, device: str = "cpu"
) -> LoadedModel:
    """Load a checkpoint, or a PEFT adapter on its base, in float32.

    Parameters of a LoRA model keep the base's names. The fingerprint is that of the checkpoint's
    (the adapter's) files.

    Args:
        checkpoint: folder of a checkpoint or of an adapter.
        base: the base's folder; for adapters only.
        task: decides the model class; default by the architecture that the configuration names.
        device: where to run it.

    Raises:
        CheckpointError: the folder is unusable, or its model needs code of its own.
        RequestError: an adapter without a base, an unknown task, or a device that is not there.
        MissingExtraError: transformers or peft is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", "running a checkpoint") from error
    if task is not None and task not in TASKS:
        raise RequestError(f"unknown task '{task}'; known are {', '.join(TASKS)}.")
    _check_device(device)
    for folder in (checkpoint, base):
        if folder is not None and not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder.")
    adapter = is_adapter(checkpoint)
    if adapter and base is None:
        raise RequestError(f"{checkpoint}: is an adapter; name the base it belongs to with --base.")
    if base is not None and not adapter:
        raise RequestError(f"{checkpoint}: is a full checkpoint; --base is for adapters.")
    folder = base if adapter and base is not None else checkpoint
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
        chosen = task or _task(config, folder)
        kind = getattr(transformers, _CLASSES[chosen])
        with _quiet(transformers.utils.logging):
            model, loading = kind.from_pretrained(folder, output_loading_info=True, **_LOCAL)
        model = model.to(torch.float32)
        shown: Task = "image-classification" if takes_images(model) else chosen
        processor = load_processor(transformers, shown, checkpoint, folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder}: transformers cannot load it: {reason}") from error
    tell_padding(model, processor)
    if adapter:
        model = _with_adapter(model, checkpoint)
    labels = {str(k): int(v) for k, v in (getattr(config, "label2id", None) or {}).items()}
    fingerprint = _fingerprint(checkpoint, base, model)
    brought = {canonical_name(n) for n, _ in model.named_parameters() if ".modules_to_save." in n}
    made_up = tuple(sorted({*loading["missing_keys"]} - brought))
    return LoadedModel(model.to(device), chosen, processor, labels, fingerprint, made_up)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(
            f"--device {device} cannot be used here: {str(error).splitlines()[0]}."
        ) from error


@contextmanager
def _quiet(log: Any) -> Iterator[None]:
    """Silence transformers' reports on loading; what matters of them is checked here."""
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _task(config: Any, folder: Path) -> Task:
    architectures: list[str] = getattr(config, "architectures", None) or []
    for name in architectures:
        for ending, task in _BY_ARCHITECTURE.items():
            if name.endswith(ending):
                return task
    if any(name.endswith("Model") for name in architectures):
        return "feature-extraction"
    raise RequestError(
        f"{folder}: its configuration does not tell the task (architectures: {architectures}).\n"
        f"Name one with --task: {', '.join(TASKS)}."
    )


def takes_images(model: nn.Module) -> bool:
    """Tell whether the model's inputs are pictures; a bare vision encoder's are."""
    return getattr(model, "main_input_name", None) == "pixel_values"


def load_processor(transformers: Any, task: Task, checkpoint: Path, folder: Path) -> Any:
    """Return the image processor, or the tokenizer with right padding, of a checkpoint."""
    if task == "image-classification":
        return transformers.AutoImageProcessor.from_pretrained(folder, **_LOCAL)
    # Adapters may bring a tokenizer of their own.
    own = (checkpoint / "tokenizer_config.json").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint if own else folder, **_LOCAL)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        # Padding is masked, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def tell_padding(model: nn.Module, tokenizer: Any) -> None:
    """Let a classifier know which token pads its inputs, in its configuration.

    Decoders classify by the last token that is no padding. Their configurations often name none, or
    another tokenizer's, and then read padding: figures would depend on the size of batches.
    """
    if type(model).__name__.endswith("ForSequenceClassification"):
        model.config.get_text_config().pad_token_id = padding_id(tokenizer)  # pyright: ignore


def padding_id(tokenizer: Any) -> int:
    """Return the token that texts are padded with."""
    return getattr(tokenizer, "pad_token_id", None) or 0


def _with_adapter(model: nn.Module, adapter: Path) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError(
            "peft", "adapters", f"running the adapter {adapter.name}"
        ) from error
    try:
        with warnings.catch_warnings():
            # peft asks transformers by names that are going away.
            warnings.simplefilter("ignore", FutureWarning)
            return peft.PeftModel.from_pretrained(model, str(adapter), local_files_only=True)  # pyright: ignore[reportArgumentType]
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{adapter}: does not fit the base: {str(error).splitlines()[0]}"
        ) from error


def _fingerprint(checkpoint: Path, base: Path | None, model: nn.Module) -> str:
    if base is None:
        with CheckpointReader(open_index(checkpoint)) as reader:
            return reader.fingerprint()
    if is_ia3(checkpoint):
        with CheckpointReader(open_ia3(checkpoint)) as reader:
            return reader.fingerprint()
    try:
        expert = open_expert(checkpoint, open_index(base))
    except CheckpointError:
        # Adapters that are run but not merged as checkpoints.
        return StateDictReader(model.state_dict()).fingerprint()
    try:
        return expert.fingerprint()
    finally:
        expert.close()
