"""Models of the Hugging Face hub: how they are named, and their files in the hub's own cache."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from eutectic.checkpoint.module_folders import module_folders
from eutectic.errors import CheckpointError, MissingExtraError, first_line
from eutectic.storage import meant
from eutectic.words import few

_PART = r"[A-Za-z0-9][\w.-]{0,95}"
# A revision is a commit, a tag or a branch without slashes, or one of the hub's own references.
_ID = re.compile(
    rf"(?P<model>{_PART}(/{_PART})?)"
    r"(@(?P<revision>refs/(pr|convert|heads|tags)/[\w.-]+|\w[\w.+-]*))?"
    r"(/(?P<folder>\w[\w.-]*(/\w[\w.-]*)*))?"
)
_PATTERNS = (
    *("*.safetensors", "*.json", "*.txt", "*.model", "*.spm", "*.tiktoken", "*.jinja", "*.py"),
    *("*.csv", "*.vocab", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*", "*.md"),
)
# Copies of the weights in other formats, and states of training.
_IGNORED = (
    *("onnx/*", "openvino/*", "original/*", "coreml/*", "checkpoint-*/*", "runs/*"),
    *("training_args.bin", "optimizer*", "*.onnx"),
)


@dataclass(frozen=True)
class HubId:
    """A model of the hub, or a folder in its repository."""

    model: str  # "name" or "org/name"
    revision: str | None = None
    folder: str | None = None  # in the repository, with slashes

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        folder = f"/{self.folder}" if self.folder else ""
        return f"{self.model}{revision}{folder}"

    def below(self, name: str) -> "HubId":
        """Return a folder in this one."""
        return replace(self, folder=f"{self.folder}/{name}" if self.folder else name)


def hub_id(text: str, revision: str | None = None) -> HubId | None:
    """Return what `name`, `org/name`, `org/name@revision` or `org/name/folder` mean, else None.

    >>> hub_id("org/name@v1.0/adapters/sst2")
    HubId(model='org/name', revision='v1.0', folder='adapters/sst2')
    """
    match = _ID.fullmatch(text)
    if match is None:
        return None
    return HubId(match["model"], match["revision"] or revision, match["folder"])


def is_offline() -> bool:
    """Tell whether the hub may not be asked, by its own environment variable."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def download(wanted: HubId) -> Path:
    """Return a model's folder in the hub's cache, downloaded where it is not there yet.

    The path does not exist where a folder has nothing to fetch in it. The hub's environment
    variables HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE … apply. Fetched are configuration, tokenizer
    and safetensors, or `.bin` files where there are none.
    """
    hub = _hub(wanted)
    inner = f"{wanted.folder}/" if wanted.folder else ""
    patterns, ignored = ([inner + p for p in given] for given in (_PATTERNS, _IGNORED))
    fetch = partial(
        hub.snapshot_download, wanted.model, revision=wanted.revision, ignore_patterns=ignored
    )
    with _explained(wanted, hub.errors):
        folder = Path(fetch(allow_patterns=patterns)) / inner
        if lacking := _without_safetensors(folder):
            pickles = [f"{inner}{place}*.bin" for place in lacking]
            folder = Path(fetch(allow_patterns=[*patterns, *pickles])) / inner
    return folder


def no_folder(wanted: HubId) -> CheckpointError:
    """Return the error of a folder that a model on the hub does not have."""
    there = [name for name in sorted(listed_on_hub(replace(wanted, folder=None))) if name]
    known = f"Folders with files there: {few(there, 10)}." if there else "Check the spelling."
    return CheckpointError(f"{wanted}: the model has no folder '{wanted.folder}'.\n{known}")


def _without_safetensors(folder: Path) -> list[str]:
    """Return "" where a folder has no safetensors, and folders of its modules that have none."""
    modules = [f"{m.folder}/" for m in module_folders(folder) if m.folder]
    return [place for place in ("", *modules) if not any((folder / place).glob("*.safetensors"))]


def listed_on_hub(wanted: HubId) -> Mapping[str, list[str]]:
    """Return the names in each folder one level below a model's, under "" those beside them.

    Empty where the hub cannot be asked.
    """
    hub = _hub(wanted)
    try:
        files: list[str] = hub.HfApi().list_repo_files(wanted.model, revision=wanted.revision)
    except (hub.errors.HfHubHTTPError, hub.errors.OfflineModeIsEnabled, OSError):
        return {}
    inner = f"{wanted.folder}/" if wanted.folder else ""
    found: dict[str, list[str]] = {}
    for file in files:
        *folders, name = file.removeprefix(inner).split("/")
        if file.startswith(inner) and len(folders) < 2:
            found.setdefault("/".join(folders), []).append(name)
    return found


def _hub(wanted: HubId) -> Any:
    try:
        import_module("huggingface_hub.errors")
        return import_module("huggingface_hub")
    except ImportError as error:
        purpose = f"'{wanted}' is no local path; downloading it from the hub"
        raise MissingExtraError("huggingface_hub", "hf", purpose) from error


@contextmanager
def _explained(wanted: HubId, errors: Any) -> Iterator[None]:
    """Say in words what keeps a model from being downloaded."""
    at = f" at revision '{wanted.revision}'" if wanted.revision else ""
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{wanted.model}: access on the hub is restricted.\n"
            "Accept its terms on its page, then log in with: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{wanted.model}: the hub has no revision '{wanted.revision}' of it."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{wanted.model}: neither a local path nor a model on the hub (or a private one)."
            f"{meant(str(wanted))}\n"
            "Check the spelling; for a private model log in with: hf auth login"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{wanted}: no such local path; the hub cannot be reached and its cache does not "
            f"hold the model{at}.{meant(str(wanted))}\n"
            "Connect (is HF_HUB_OFFLINE set?) or name a local folder."
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        text = f"{wanted}: could not be downloaded from the hub{at}.\n{first_line(error)}"
        raise CheckpointError(text) from error
