"""Sending a folder to the Hugging Face hub: one commit, so that all of it is seen at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from eutectic.errors import MissingExtraError, RequestError
from eutectic.storage.file_systems import in_words, is_of_a_store
from eutectic.storage.mirror import MANIFEST
from eutectic.storage.remote_urls import Url
from eutectic.storage.uploads import manifest_of, sent_as

_OTHERS = ("datasets", "spaces", "buckets", "models", "kernels")


def send_to_hub(folder: Path, names: Sequence[str], url: Url, begin: Callable[[], None]) -> None:
    """Upload a folder's files to `hf://org/model[@branch][/folder]` in one commit.

    `begin` is called when it is about to be seen. A model that is not there yet is made, as a
    private one. OSError in words where it fails.
    """
    try:
        hub: Any = import_module("huggingface_hub")
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "remote", f"writing {url}") from error
    if url.parts[0] in _OTHERS:
        raise RequestError(f"{url}: models are written to the hub as hf://org/model alone.")
    name, _, branch = url.parts[1].partition("@")
    repository, inner = f"{url.parts[0]}/{name}", "".join(f"{p}/" for p in url.parts[2:])
    operations = [
        hub.CommitOperationAdd(path_in_repo=inner + name, path_or_fileobj=str(folder / name))
        for name in names
    ]
    listed = manifest_of([sent_as(folder / name, name) for name in names])
    operations.append(hub.CommitOperationAdd(path_in_repo=inner + MANIFEST, path_or_fileobj=listed))
    try:
        api = hub.HfApi(library_name="eutectic")
        api.create_repo(repository, private=True, exist_ok=True)
        if branch:
            api.create_branch(repository, branch=branch, exist_ok=True)
        begin()
        api.create_commit(
            repository,
            operations,
            commit_message="A merged model, by eutectic",
            revision=branch or None,
        )
    except Exception as error:
        # Of a large file it raises an error of its own, from the store's.
        known = error if error.__cause__ is None or is_of_a_store(error) else error.__cause__
        if not is_of_a_store(known):
            raise
        raise in_words(url, known) from None
