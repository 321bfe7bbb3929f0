"""Configuration and tokenizer of a merge whose base is a GGUF file, which states both itself."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from eutectic.checkpoint.index import CheckpointIndex
from eutectic.checkpoint.writer import write_atomically
from eutectic.errors import Note
from eutectic.models.named_classes import check_named_classes
from eutectic.vocabulary.tokens import CONFIG, TOKENIZER, as_text, files_identity


def _of_the_file(path: Path, known: set[str]) -> bytes:
    """Return a converted file without the tokens that the converter's class adds by default."""
    content = path.read_bytes()
    if path.name not in (TOKENIZER, CONFIG):
        return content
    value: dict[str, Any] = json.loads(content)
    if path.name == TOKENIZER:
        listed = value.get("added_tokens") or []
        value["added_tokens"] = [entry for entry in listed if entry["content"] in known]
    else:
        strange = [k for k, v in value.items() if k.endswith("_token") and as_text(v) not in known]
        value = {k: v for k, v in value.items() if k not in strange or as_text(v) is None}
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_from_gguf(index: CheckpointIndex, model: Path) -> tuple[Note, ...]:
    """Write what lies beside no GGUF file: `config.json`, and the tokenizer by transformers.

    Nothing where files of the kind are there. A tokenizer that cannot be converted is told.
    """
    if index.gguf is None:
        return ()
    if not (model / "config.json").exists():
        text = json.dumps(dict(index.config), indent=2, ensure_ascii=False)
        write_atomically(model / "config.json", (text + "\n").encode())
    if files_identity(model) or not index.gguf.tokenizer:
        return ()
    known = set(map(str, index.gguf.tokenizer["tokens"]))
    try:
        import transformers

        check_named_classes(index.folder, transformers)
        with TemporaryDirectory() as aside:
            # Without the last word, transformers asks whether code beside the file may run.
            loaded: Any = transformers.AutoTokenizer.from_pretrained(
                str(index.folder),
                gguf_file=index.files[0],
                local_files_only=True,
                trust_remote_code=False,
            )
            loaded.save_pretrained(aside)
            for path in sorted(Path(aside).iterdir()):
                write_atomically(model / path.name, _of_the_file(path, known))
    except Exception as error:  # of transformers, of any kind: the weights are what was asked for
        why = (str(error).splitlines() or [type(error).__name__])[0]
        return (Note("gguf_tokenizer", (TOKENIZER,), {"reason": why[:200]}, "warning"),)
    return ()
