"""Tokenizer, configuration and chat template of a merged model, by the output's vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eutectic.checkpoint.index import read_json_object
from eutectic.checkpoint.writer import OutputFile, write_atomically
from eutectic.conventions_vocabulary import is_table_of_tokens
from eutectic.errors import CheckpointError, Note
from eutectic.planning.plan import Plan
from eutectic.vocabulary.agreement import BASE, Vocabulary
from eutectic.vocabulary.chat_templates import FILE, PROCESSOR_FILE
from eutectic.vocabulary.checks import vocabulary_notes
from eutectic.vocabulary.configuration import with_rows, with_size, with_tokens_of
from eutectic.vocabulary.tokenizer_files import write_tokenizer
from eutectic.vocabulary.tokens import CONFIG as TOKENIZER_CONFIG
from eutectic.vocabulary.tokens import read_tokens

GENERATION = "generation_config.json"
_CONFIG = "config.json"


def write_vocabulary(plan: Plan, model: Path, place: str) -> None:
    """Let the folders of a model and of its experts' heads have the output's tokens.

    `place` is the folder of the transformer in a model. May be repeated after a kill.
    """
    vocabulary, folders = plan.output.vocabulary, plan.output.tokenizers
    if vocabulary is not None:
        for folder in (model, *sorted(model.glob("experts/*"))):
            owner = plan.output.side_files if folder == model else folder.name
            target = folder / place
            write_tokenizer(vocabulary, folders, target)
            _fit_configs(vocabulary, folders, target, owner)
    if plan.output.chat_template is not None:
        targets = [model] if vocabulary is None else [model, *model.glob("experts/*")]
        for folder in targets:
            _write_template(folder / place, plan.output.chat_template)


def write_adapter_vocabulary(plan: Plan, folder: Path) -> None:
    """Put the tokenizer of a vocabulary that was asked for beside an adapter.

    An adapter has no configuration of the model. May be repeated after a kill.
    """
    if plan.output.vocabulary is None:
        return
    write_tokenizer(plan.output.vocabulary, plan.output.tokenizers, folder)
    if plan.output.chat_template is not None:
        _write_template(folder, plan.output.chat_template)


def check_vocabulary(model: Path, place: str, files: Sequence[OutputFile]) -> tuple[Note, ...]:
    """Return what of a written model's tables, tokenizer and configuration does not agree."""
    tables = {
        name: shape[0]
        for file in files
        for name, _, shape in file.entries
        if len(shape) == 2 and is_table_of_tokens(name)
    }
    if not tables:
        return ()
    folder = model / place
    stated = [
        read_json_object(p) if p.is_file() else {} for p in (folder / _CONFIG, folder / GENERATION)
    ]
    try:
        tokens = read_tokens(folder)
    except CheckpointError:  # copied as it was found
        tokens = None
    return tuple(vocabulary_notes(tables, stated[0], stated[1], tokens))


def _fit_configs(
    vocabulary: Vocabulary, folders: Mapping[str, Path], target: Path, owner: str
) -> None:
    """State sizes and special tokens of the output in what was copied from `owner`."""
    donor = folders[vocabulary.donor]
    for name in (_CONFIG, GENERATION):
        path = target / name
        if not path.is_file():
            continue
        before = read_json_object(path)
        # An adapter without a configuration got the base's.
        own = owner if (folders.get(owner, donor) / name).is_file() else BASE
        heights = {vocabulary.heights[BASE], vocabulary.heights.get(own, 0)}
        after = dict(before)
        if not _same_rows(vocabulary, own):
            after = with_rows(after, _new_row(vocabulary, own), heights)
        if name == _CONFIG:
            after = with_size(after, heights, vocabulary.size)
        if vocabulary.donor not in (BASE, own) and (donor / name).is_file():
            after = with_tokens_of(after, read_json_object(donor / name))
        if after != before:
            write_atomically(path, _text(after))


def _same_rows(vocabulary: Vocabulary, owner: str) -> bool:
    own, rows = vocabulary.models[owner].rows, vocabulary.rows
    return own is rows or all(rows.get(token) == row for token, row in own.items())


def _new_row(vocabulary: Vocabulary, owner: str) -> Callable[[int], int | None]:
    """Return what finds the output's row of what a model has in a row; None where it is lost."""
    names = vocabulary.models[owner].by_row()
    taken = set(vocabulary.rows.values())

    def new_row(row: int) -> int | None:
        if row in names:
            return vocabulary.rows.get(names[row])
        return row if row not in taken and row < vocabulary.size else None

    return new_row


def _write_template(folder: Path, template: str) -> None:
    """Write a chat template wherever versions of transformers look for it."""
    write_atomically(folder / FILE, template.encode())
    for name in (TOKENIZER_CONFIG, PROCESSOR_FILE):
        path = folder / name
        if path.is_file():
            values = read_json_object(path)
            if values.get("chat_template") != template:
                write_atomically(path, _text({**values, "chat_template": template}))


def _text(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
