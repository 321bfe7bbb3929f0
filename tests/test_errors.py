"""What the system refuses is said in words: a full disk, a used-up quota, a limit on file sizes."""

from __future__ import annotations

import errno
import os
import resource

import pytest
from safetensors import SafetensorError

from eutectic.errors import why_failed


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full: No space left"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "the disk quota is used up: "),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "Read-only file system"),
        (OSError("told by a library"), "told by a library"),
        (
            SafetensorError("Error: I/O error: No space left on device (os error 28)"),
            "the disk is full: Error: I/O error",
        ),
    ],
)
def test_why_a_file_was_not_written(error: Exception, words: str) -> None:
    assert why_failed(error).startswith(words)


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (50_000, "this process may write files of 50,000 bytes at most (ulimit -f)"),
        (resource.RLIM_INFINITY, "the file system does not take files so large"),
    ],
)
def test_a_file_that_is_too_large(limit: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    text = why_failed(OSError(errno.EFBIG, os.strerror(errno.EFBIG)))
    assert text == f"File too large: {words}; it is not that the disk is full"
