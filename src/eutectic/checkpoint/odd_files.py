"""What is told of files that hold no weights to read: what each is, and the step that helps.

Recognition goes by a file's first bytes, or by the entries of an archive. The commands are those of
the programs that wrote the files. Folders are in `odd_folders`, adapters in `odd_adapters`.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eutectic.errors import CheckpointError
from eutectic.storage import storage_of
from eutectic.storage.small_files import read_start
from eutectic.words import few

HEAD_BYTES = 512  # of a file, enough to tell what it is
_POINTER = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_POINTER_BYTES = 1024  # pointers are shorter


@dataclass(frozen=True)
class Oddity:
    """What a file or folder is in place of a checkpoint, and the step that makes one of it."""

    what: str
    next: str

    def error(self, where: object) -> CheckpointError:
        """Return the error that says so."""
        return CheckpointError(f"{where}: {self.what}.\n{self.next}")


def command(*words: object) -> str:
    """Return a command line to type; words with blanks are quoted."""
    return " ".join(shlex.quote(str(word)) for word in words)


def python(code: str) -> str:
    """Return a command line that runs `code`, whose strings are in single quotes."""
    return f'python -c "{code}"'


def start_of(path: Path) -> bytes:
    """Return the first bytes of a file."""
    return read_start(path, HEAD_BYTES)


# --- By the first bytes ---

CONVERT_GGUF = (
    "Name the checkpoint that it was made from; or, with the precision that is left, convert it "
    "with transformers: AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)"
    ".save_pretrained('out/')"
)
_UNPACK = "Unpack it into a folder and name that: {0}"
_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (b"GGUF", "a GGUF file, as llama.cpp reads it", CONVERT_GGUF),
    (b"tjgg", "a GGML file, as old versions of llama.cpp read it", CONVERT_GGUF),
    (b"lmgg", "a GGML file, as old versions of llama.cpp read it", CONVERT_GGUF),
    (b"\x1f\x8b", "a compressed archive (gzip)", _UNPACK.format("tar -xzf {file}")),
    (b"(\xb5/\xfd", "a compressed archive (zstd)", _UNPACK.format("tar --zstd -xf {file}")),
    (b"7z\xbc\xaf'\x1c", "an archive (7-Zip)", _UNPACK.format("7z x {file}")),
    (
        b"\x89HDF\r\n\x1a\n",
        "an HDF5 file, as Keras and TensorFlow write it",
        "Convert it with transformers 4: "
        "AutoModel.from_pretrained('{folder}', from_tf=True).save_pretrained('out/')",
    ),
)
_WEB_PAGE = re.compile(rb"\s*(<!doctype html|<html|<\?xml|<head|<error)", re.IGNORECASE)


def is_pointer(head: bytes) -> bool:
    """Tell whether a file that begins so is a Git-LFS pointer."""
    return head.startswith(_POINTER)


def pointers_among(folder: Path, names: Sequence[str]) -> list[str]:
    """Return which of these small files are Git-LFS pointers."""
    storage = storage_of(folder)
    found: list[str] = []
    for name in names:
        identity = storage.identity(folder / name)
        if identity is not None and identity[0] < _POINTER_BYTES:
            found += [name] if is_pointer(start_of(folder / name)) else []
    return found


def pointer(folder: Path, names: Sequence[str] = ()) -> Oddity:
    """Return what is said of Git-LFS pointers in a folder."""
    many = f" ({few(names)})" if names else ""
    what = "Git-LFS pointers, not the files themselves" if len(names) > 1 else _A_POINTER
    return Oddity(
        what + many,
        f"Fetch what it stands for: {command('git', '-C', folder, 'lfs', 'pull')}, or download the "
        "model again: hf download ORG/NAME --local-dir FOLDER",
    )


_A_POINTER = "a Git-LFS pointer, not the file itself"


def by_content(path: Path, head: bytes) -> Oddity | None:
    """Return what a file is that begins with `head`, None where that tells nothing."""
    if not head:
        return Oddity("an empty file (0 bytes)", "Download or save it again.")
    if is_pointer(head):
        return pointer(path.parent)
    if _WEB_PAGE.match(head):
        return Oddity(
            "a web page saved in place of the file",
            "Links to files say /resolve/ where pages say /blob/; or download with: hf download "
            "ORG/NAME --local-dir FOLDER",
        )
    for start, what, then in _STARTS:
        if head.startswith(start):
            then = then.replace("{file}", shlex.quote(str(path)))
            return Oddity(what, then.replace("{folder}", str(path.parent)))
    if head[257:262] == b"ustar":
        return Oddity("an archive (tar)", _UNPACK.format(command("tar", "-xf", path)))
    if not head.strip(b"\0"):
        return Oddity(
            "nothing but zeros where the header should be: the download or copy was not finished",
            "Download or copy the file again.",
        )
    text = _as_text(head)
    if text is None:
        return None
    return Oddity(f"a text, not weights: {text[:60]!r}", "Download the file again.")


def _as_text(head: bytes) -> str | None:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return text.strip() if all(c.isprintable() or c.isspace() for c in text) else None


# --- By the entries of a zip archive ---


def by_archive(path: Path, entries: Sequence[str]) -> Oddity | None:
    """Return what a zip archive is, by its entries; None for a checkpoint of torch."""
    # <name>/constants.pkl and <name>/code/… beside <name>/data.pkl: torch.jit.save.
    inside = {entry.partition("/")[2] for entry in entries}
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        call = (
            f"import torch; torch.save(torch.jit.load({str(path)!r}, map_location='cpu')"
            f".state_dict(), {str(path.with_name('pytorch_model.bin'))!r})"
        )
        return Oddity(
            "a TorchScript archive, which holds code besides weights",
            f"Where you trust it, save its weights alone: {python(call)}",
        )
    if "data.pkl" in inside or "data.pkl" in entries:
        return None
    if any(entry.endswith(".npy") for entry in entries):
        return Oddity(
            "an archive of NumPy arrays (.npz)",
            "Save them as safetensors: safetensors.numpy.save_file(dict(numpy.load(file)), "
            "'model.safetensors')",
        )
    return Oddity("an archive (zip)", _UNPACK.format(command("unzip", path, "-d", path.parent)))
