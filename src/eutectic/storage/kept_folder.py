"""A folder that grows over runs, wherever it lies: worked on here, and sent when a run is complete.

For verbs whose folder is their memory, and not written once. In a store it is what was sent last;
while a run works, and after one that was killed, its files are in `<folder>.partial` of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from eutectic.errors import OutputError, RequestError, why_failed
from eutectic.storage.file_systems import file_system, persistently
from eutectic.storage.local_disk import LocalDisk
from eutectic.storage.mirror import MANIFEST, Stored, forget, stored_below
from eutectic.storage.remote_urls import Url, shown_at, url_of
from eutectic.storage.uploads import send_folder

_disk = LocalDisk()


def names_kept(folder: Path) -> list[str]:
    """Return the names in a folder as it was sent last, a manifest aside.

    RequestError where there cannot be such a folder.
    """
    url = url_of(folder)
    if url is None:
        if folder.exists() and not folder.is_dir():
            raise _is_a_file(folder)
        return list(_disk.list(folder))
    _check_store(url)
    return sorted({inner[0] for inner in _held(url) if inner != (MANIFEST,)})


@contextmanager
def kept_folder(folder: Path, locks: str) -> Iterator[Path]:
    """Give the folder to work in, which exists; after the block it is what lies at its name.

    A folder of this machine is itself. That of a store is sent at the end of the block, as it is
    then, but for names that end with `locks`; after an error it stays here, for the next run.
    """
    url = url_of(folder)
    if url is None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    _check_store(url)
    work = shown_at(url).with_name(f"{url.name}.partial")
    try:
        work.mkdir(parents=True, exist_ok=True)
        _fetch_missing(url, work)
    except OSError as error:
        raise _failure(url, error) from error
    yield work
    try:
        names = [name for name in _disk.files_below(work) if not name.endswith(locks)]
        send_folder(work, names, url, lambda: _remove_manifest(url))
        _disk.remove(work)
    except OSError as error:
        raise _failure(url, error) from error
    forget(folder)


def _check_store(url: Url) -> None:
    if url.scheme == "hf":
        raise RequestError(
            f"{url}: the hub keeps models, and this folder grows with every run.\n"
            "Name a folder of this machine, or of an object store."
        )


def _held(url: Url) -> Mapping[tuple[str, ...], Stored]:
    """Return the files of a folder in a store by their names there."""
    try:
        found = stored_below(url)
    except OSError as error:
        raise RequestError(f"{error.filename or url}: {why_failed(error)}.") from None
    held = {stored.url.parts[len(url.parts) :]: stored for stored in found}
    if () in held:
        raise _is_a_file(url)
    return held


def _fetch_missing(url: Url, work: Path) -> None:
    """Bring what was sent last, but for what a killed run has left here: that is newer."""
    source = file_system(url)
    for inner, stored in _held(url).items():
        target = work.joinpath(*inner)
        if target.exists() or inner == (MANIFEST,):
            continue
        place = stored.url.path
        content = persistently(stored.url, lambda place=place: source.cat_file(place))
        target.parent.mkdir(parents=True, exist_ok=True)
        with _disk.replacing(target) as file:
            file.write(content)


def _remove_manifest(url: Url) -> None:
    """Let the folder count as unfinished while its files are replaced one by one."""
    source, manifest = file_system(url, writing=True), url / MANIFEST
    if any(inner == (MANIFEST,) for inner in _held(url)):
        persistently(manifest, lambda: source.rm_file(manifest.path))


def _is_a_file(folder: Path | Url) -> RequestError:
    return RequestError(f"{folder} is a file.\nName a folder, which need not exist.")


def _failure(url: Url, error: OSError) -> OutputError:
    return OutputError(
        f"{error.filename or url}: cannot be written ({why_failed(error)}).\n"
        "What was made is kept for the same command."
    )
