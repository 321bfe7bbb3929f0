"""URLs of object stores, and where on this machine what lies there is shown.

`s3://bucket/folder` is shown as `<cache>/eutectic-remote/s3/bucket/folder`: rooms above see paths.
What is being written lies there too, under names that end as `STAGING` says, until it is complete.
"""

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from eutectic.errors import RequestError
from eutectic.words import show_below

MARK = "eutectic-remote"
CACHE = "EUTECTIC_CACHE"
STAGING = (".partial", ".stages", ".lock", ".outcomes.jsonl")
# How a scheme may be written -> its name here. "memory" is fsspec's store inside the process.
_SCHEMES = {
    **{"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az"},
    **{"hf": "hf", "memory": "memory"},
}
_FILE = "file"
# pathlib makes one slash of two. A scheme of one letter is a drive of Windows.
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):(?P<slashes>/+)(?P<rest>.*)", re.DOTALL)
_KNOWN = "s3://, gs://, az://, hf://, file://"


@dataclass(frozen=True)
class Url:
    """A place in an object store."""

    scheme: str
    parts: tuple[str, ...]  # bucket (or organisation), then the names of folders and a file

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    @property
    def path(self) -> str:
        """The place as fsspec names it, without the scheme."""
        return "/".join(self.parts)

    @property
    def bucket(self) -> str:
        """The first part."""
        return self.parts[0]

    @property
    def name(self) -> str:
        """The last part."""
        return self.parts[len(self.parts) - 1]

    def __truediv__(self, name: str) -> "Url":
        return Url(self.scheme, (*self.parts, *name.split("/")))

    @property
    def parent(self) -> "Url":
        """The folder that it lies in."""
        return Url(self.scheme, self.parts[:-1])


@cache
def _root_of(cache: str) -> Path:
    place = Path(cache).expanduser() if cache else None
    if place is None:
        home = os.environ.get("XDG_CACHE_HOME")
        place = (Path(home) if home else Path.home() / ".cache") / "eutectic"
    root = place.absolute() / MARK
    show_below(str(root))
    return root


def root() -> Path:
    """Return the folder below which object stores are shown."""
    return _root_of(os.environ.get(CACHE, ""))


def is_url(text: str | Path) -> bool:
    """Tell whether a text is a URL, of a store that is known or not."""
    match = _URL.fullmatch(str(text))
    if match is None:
        return False
    return match["scheme"].lower() in {*_SCHEMES, _FILE} or len(match["slashes"]) == 2


def local_path(location: str | Path) -> Path:
    """Return the path under which a location is worked on; nothing is asked of any store.

    A path is itself, `file://` the path in it, a URL of a store its place below `root()`.
    RequestError for stores that are not known, and for URLs with credentials in them.
    """
    text = str(location)
    match = _URL.fullmatch(text)
    if match is not None and match["scheme"].lower() == _FILE:
        rest = match["rest"].removeprefix("localhost/")
        return Path("/" + rest)
    url = _parsed(text)
    return Path(location) if url is None else shown_at(url)


def url_of(location: str | Path) -> Url | None:
    """Return the place in a store that a URL or a path below `root()` means, None for others.

    A path below the root of another machine counts too; a worker there finds its own.
    """
    if isinstance(location, str):
        url = _parsed(location)
        if url is not None:
            return url
    text = str(location)
    if MARK not in text:
        return _parsed(text) if isinstance(location, Path) else None
    parts = Path(text).parts
    if MARK not in parts:
        return None
    inner = parts[parts.index(MARK) + 1 :]
    if len(inner) < 2 or inner[0] not in _SCHEMES.values():
        return None
    return Url(inner[0], inner[1:])


def is_staging(path: Path) -> bool:
    """Tell whether a path below `root()` is a file of this machine, of a run that writes."""
    parts = path.parts
    inner = parts[parts.index(MARK) + 1 :] if MARK in parts else parts
    return any(part.endswith(STAGING) for part in inner)


def seen_from(location: str | Path, folder: Path) -> str | None:
    """Return how a recipe in a folder names a place of a store; None for a place on a disk.

    From a folder of the store downwards a relative path, else the URL: '..' leads nowhere there.
    """
    url, there = url_of(location), url_of(folder)
    if url is None:
        return None
    above = () if there is None else there.parts
    if there is not None and there.scheme == url.scheme and url.parts[: len(above)] == above:
        return "./" + "/".join(url.parts[len(above) :])
    return str(url)


def shown_at(url: Url) -> Path:
    """Return the path that shows a place of a store."""
    return root().joinpath(url.scheme, *url.parts)


def _parsed(text: str) -> Url | None:
    """Return a URL of a known store, None for what is no URL; RequestError for any other."""
    match = _URL.fullmatch(text)
    if match is None:
        return None
    stated = match["scheme"].lower()
    scheme = _SCHEMES.get(stated)
    if scheme is None:
        if stated == _FILE or len(match["slashes"]) != 2:
            return None
        raise RequestError(
            f"'{stated}://…': no store of that kind is known.\nKnown are {_KNOWN}; or download the "
            "files and name their folder."
        )
    parts = tuple(part for part in match["rest"].split("/") if part)
    first = parts[0] if parts else ""
    # The text is not repeated: it holds what must not be shown.
    if "@" in first and (scheme != "hf" or ":" in first):
        raise RequestError(
            f"a URL of {scheme}:// has a name or password before '@'.\nCredentials are taken from "
            f"{usual_places(scheme)} only: leave them out of the URL."
        )
    if "?" in text or "#" in text:
        raise RequestError(
            f"a URL of {scheme}:// has a '?' or '#', such as signed addresses have.\nName bucket "
            f"and folder alone: {scheme}://bucket/folder. Credentials are taken from "
            f"{usual_places(scheme)}."
        )
    if len(parts) < 2:
        what = "organisation and model" if scheme == "hf" else "bucket and folder"
        raise RequestError(f"'{scheme}://{first}': name {what}, such as {scheme}://a/b.")
    if {".", ".."} & {*parts} or any(ord(c) < 32 or c == "\\" for c in text):
        raise RequestError(f"{text!r}: '.', '..', backslashes and control characters are refused.")
    return Url(scheme, parts)


def usual_places(scheme: str) -> str:
    """Return in words where a store's own library looks for credentials."""
    return {
        "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws/, or the machine's role",
        "gs": "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, or the "
        "machine's role",
        "az": "AZURE_STORAGE_ACCOUNT_NAME with a key, a connection string or `az login`",
        "hf": "`hf auth login` or HF_TOKEN",
        "memory": "nowhere",
    }[scheme]
