"""fsspec's file systems: opened once, asked again where a call fails for a while, errors in words.

No text of a store's own errors is passed on, since it may hold what nobody should see: only the
kind of error and its code.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from eutectic.errors import MissingExtraError, RequestError
from eutectic.storage.remote_urls import Url, usual_places

TIMEOUT = "EUTECTIC_REMOTE_TIMEOUT"  # seconds in which a store must say something
TRIES = "EUTECTIC_REMOTE_TRIES"
_SECONDS, _TRIES = 60.0, 6
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 20.0

# What pip installs for each; the extra `remote` has the first.
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "hf": "huggingface_hub"}
_FOR_A_WHILE = {
    *(errno.EBUSY, errno.EIO, errno.EPIPE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EAGAIN),
    getattr(errno, "EREMOTEIO", errno.EIO),
    None,
}
_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "httpx", "httpcore", "requests", "urllib3")
# Their libraries repeat calls by themselves, with waits of half a minute and more in all.
_REPEATING = ("gs", "az")
_STORES = (*_LIBRARIES, "gcsfs", "google", "azure", "huggingface_hub", "fsspec")

_T = TypeVar("_T")
_opened: dict[tuple[int, str, bool], Any] = {}
_opening = threading.Lock()


def file_system(url: Url, *, writing: bool = False) -> Any:
    """Return fsspec's file system of a store, for this process.

    One that writes repeats its own calls, since parts of a file cannot be sent again from outside;
    one that reads leaves that to `persistently`.
    """
    key = (os.getpid(), url.scheme, writing)
    with _opening:
        if key not in _opened:
            _opened[key] = _open(url, writing)
        return _opened[key]


def _open(url: Url, writing: bool) -> Any:
    package = _PACKAGES.get(url.scheme, "fsspec")
    try:
        fsspec = import_module("fsspec")
        if url.scheme in _PACKAGES:
            import_module(package)
    except ImportError as error:
        raise MissingExtraError(package, "remote", f"{url}: an object store") from error
    # The hub's forgets its listings when it is told to, as every other does.
    cached = url.scheme in ("memory", "hf")
    options: dict[str, Any] = {} if cached else {"use_listings_cache": False}
    if url.scheme == "s3":
        attempts = _number(TRIES, _TRIES) if writing else 1
        options["config_kwargs"] = {
            "connect_timeout": min(10.0, seconds_of_silence()),
            "read_timeout": seconds_of_silence(),
            "retries": {"mode": "standard", "total_max_attempts": int(attempts)},
        }
    found = fsspec.filesystem(url.scheme, skip_instance_cache=True, **options)
    if url.scheme == "s3":
        found.retries = 1  # they would be multiplied by those above
    return found


def seconds_of_silence() -> float:
    """Return after how many seconds without a byte a call counts as failed."""
    return _number(TIMEOUT, _SECONDS)


def _number(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise RequestError(f"{name} must be a number above 0, got {text!r}.")
    return value


def persistently(url: Url, call: Callable[[], _T]) -> _T:
    """Return what a call gives, which is repeated with growing waits while a store is unwell.

    Raises:
        OSError: it still fails, or for a reason that waiting does not mend; in words.
    """
    tries = max(1, int(_number(TRIES, _TRIES)))
    if url.scheme in _REPEATING:
        tries = min(tries, 2)
    wait = _FIRST_WAIT
    for left in range(tries - 1, -1, -1):
        try:
            return call()
        except Exception as error:
            if not is_of_a_store(error):
                raise
            if left == 0 or not _passes(error):
                raise in_words(url, error, tries - left) from None
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT)
    raise AssertionError


def _timed_out(error: BaseException) -> bool:
    """Tell it by the name: asyncio has a class of its own in Python 3.10, and is slow to import."""
    return isinstance(error, TimeoutError) or type(error).__name__ == "TimeoutError"


def is_of_a_store(error: BaseException) -> bool:
    """Tell an error of a store or the network from one of ours."""
    found = _inner(error)
    of = type(found).__module__.partition(".")[0]
    return isinstance(found, OSError) or _timed_out(found) or of in _STORES


def _inner(error: BaseException) -> BaseException:
    """Return what a library has put into a plain RuntimeError, as adlfs does when it sends."""
    inner = error.__cause__ or error.__context__
    return inner if type(error) is RuntimeError and inner is not None else error


def _passes(error: BaseException) -> bool:
    """Tell whether an error may be gone after a while."""
    error = _inner(error)
    if isinstance(error, ConnectionError) or _timed_out(error):
        return True
    name, of = type(error).__name__, type(error).__module__.partition(".")[0]
    if "Credentials" in name or "Param" in name or "Validation" in name or "Offline" in name:
        return False
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    if isinstance(error, (FileNotFoundError, PermissionError, FileExistsError, NotADirectoryError)):
        return False
    if of in _LIBRARIES:
        return True
    return isinstance(error, OSError) and error.errno in _FOR_A_WHILE


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error came with."""
    for one in (error, error.__cause__):
        response: Any = getattr(one, "response", None)
        if isinstance(response, dict):  # botocore's
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            found = getattr(response, "status_code", getattr(one, "status", None))
        if type(one).__module__.startswith("gcsfs"):
            found = getattr(one, "code", None)
        if isinstance(found, int):
            return found
        if isinstance(one, OSError) and str(one).startswith("Forbidden: "):  # gcsfs's too
            return 403
    return None


def _code(error: BaseException) -> str:
    """Return the store's code of an error, or its class: one word that holds no secret."""
    for one in (error, error.__cause__):
        response: Any = getattr(one, "response", None)
        if isinstance(response, dict):
            code = str(response.get("Error", {}).get("Code", ""))
            if code.isalnum():
                return code
    status = _status(error)
    name = type(error.__cause__ or error).__name__
    return name if status is None else f"{name}, status {status}"


def no_bucket(url: Url) -> FileNotFoundError:
    """Return the error of a bucket that is not there; Azure's are called containers."""
    kind = "container" if url.scheme == "az" else "bucket"
    what = f"there is no {kind} '{url.bucket}', or these credentials may not see it"
    return FileNotFoundError(errno.ENOENT, what, str(url))


def check_bucket(url: Url) -> None:
    """Raise FileNotFoundError in words where a place's bucket is not there.

    S3 says so when a folder is listed. Google's and Azure's libraries show an empty folder instead.
    Where the credentials may not ask, nothing is raised: the listing has answered.
    """
    if url.scheme not in _REPEATING:
        return
    source = file_system(url)
    try:
        source.info(url.bucket)
    except FileNotFoundError:
        raise no_bucket(url) from None
    except Exception as error:
        if not is_of_a_store(error):
            raise


def in_words(url: Url, error: BaseException, tries: int = 1) -> OSError:
    """Return an error of a store as one that says in words what is wrong, and what helps."""
    error = _inner(error)
    code, places = _code(error), usual_places(url.scheme)
    name, status = type(error).__name__, _status(error)
    if code in ("NoSuchBucket", "ContainerNotFound") or (
        url.scheme != "s3" and "bucket" in str(error)[:200].lower()
    ):
        return no_bucket(url)
    if "NoCredentials" in name or "Credentials" in name:
        what = f"no credentials were found; they are taken from {places}"
        return PermissionError(errno.EACCES, what, str(url))
    if isinstance(error, PermissionError) or status in (401, 403):
        what = f"the store refuses the credentials ({code}); they are taken from {places}"
        return PermissionError(errno.EACCES, what, str(url))
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError(errno.ENOENT, "no such object", str(url))
    times = "" if tries < 2 else f" after {tries} tries"
    number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
    return OSError(number, f"the store does not answer as it should{times} ({code})", str(url))
