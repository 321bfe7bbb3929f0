"""Names of checkpoints: local paths as they are, others from the Hugging Face hub."""

import re
from functools import partial
from pathlib import Path

from eutectic.checkpoint.index import WEIGHT_SUFFIXES
from eutectic.errors import CheckpointError, MissingExtraError, first_line

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_PATTERNS = [
    *("*.safetensors", "*.json", "*.txt", "*.model", "*.spm", "*.tiktoken", "*.jinja", "*.py"),
    *("LICENSE*", "NOTICE*", "README.md"),
]
# Copies of the weights in other formats, and states of training.
_IGNORED = [
    *("onnx/*", "openvino/*", "original/*", "coreml/*", "checkpoint-*/*", "runs/*"),
    *("training_args.bin", "optimizer*", "*.onnx"),
]


def resolve(path_or_id: str | Path, *, revision: str | None = None) -> Path:
    """Return a local folder or file for a path, or for the id of a model on the hub.

    An existing path is returned as it is. "name" and "org/name" are downloaded into the hub's own
    cache (its environment variables HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE … apply): configuration,
    tokenizer and safetensors, or `.bin` files where there are none.
    """
    text = str(path_or_id)
    path = Path(text).expanduser()
    if text and path.exists():
        return path
    if not _ID.fullmatch(text) or path.suffix in WEIGHT_SUFFIXES:
        raise CheckpointError(
            f"'{text}': no such file or folder, and not the id of a model on the hub either "
            "('name' or 'org/name')."
        )
    return _download(text, revision)


def _download(model_id: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        purpose = f"'{model_id}' is no local path; downloading it from the hub"
        raise MissingExtraError("huggingface_hub", "hf", purpose) from error

    fetch = partial(snapshot_download, model_id, revision=revision, ignore_patterns=_IGNORED)
    at = f" at revision '{revision}'" if revision else ""
    try:
        folder = Path(fetch(allow_patterns=_PATTERNS))
        if any(folder.glob("*.safetensors")):
            return folder
        return Path(fetch(allow_patterns=[*_PATTERNS, "*.bin"]))
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{model_id}: access on the hub is restricted.\n"
            "Accept its terms on its page, then log in with: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{model_id}: the hub has no revision '{revision}' of it.") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model_id}: neither a local path nor a model on the hub (or a private one).\n"
            "Check the spelling; for a private model log in with: hf auth login"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{model_id}: no such local path; the hub cannot be reached and its cache does not "
            f"hold the model{at}.\nConnect (is HF_HUB_OFFLINE set?) or name a local folder."
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        text = f"{model_id}: could not be downloaded from the hub{at}.\n{first_line(error)}"
        raise CheckpointError(text) from error
