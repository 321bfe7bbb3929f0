"""The splits of a task: shares of a file, the check that they share no row, model inputs."""

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eutectic.data.columns import (
    INPUTS,
    Row,
    answer_of,
    check_columns,
    check_forms,
    check_pairs,
    class_index,
    finite_number,
    inputs_of,
    is_spoken,
    names_of_classes,
    required_inputs,
)
from eutectic.data.encoded_rows import longest_target, token_ids
from eutectic.data.fingerprints import row_key
from eutectic.data.images import PixelBatches, locate_images
from eutectic.data.row_files import read_rows
from eutectic.errors import (
    CheckpointError,
    EutecticError,
    Fault,
    RequestError,
    TaskError,
    first_line,
    suggest,
)
from eutectic.evaluation.embeddings import (
    Relevance,
    embedded_texts,
    encoded_texts,
    relevance_of,
    rows_hash,
    settings_for,
)
from eutectic.evaluation.identities import processor_hash
from eutectic.evaluation.task_files import SPLITS, Part, Split, Task
from eutectic.models.loading import load_config, load_processor
from eutectic.models.model_inputs import image_mode, longest_input, positions_of
from eutectic.models.task_kinds import EMBEDDING, PICTURES, ZERO_SHOT
from eutectic.words import counted

BATCH_SIZE = 64


def split_rows(task: Task, split: Split, limit: int | None = None) -> list[Row]:
    """Return the rows of one split in the order of the file, the first `limit` of them.

    Of a folder of images, which holds one class after the other, the first of every class in turn.
    """
    part = task.data.get(split)
    if part is None:
        raise RequestError(
            f"task '{task.name}' has no split '{split}'; it has {', '.join(task.data) or 'none'}."
        )
    rows = _part_rows(task, split, part)
    if not rows:
        raise RequestError(f"task '{task.name}': the split '{split}' ({part.path}) has no rows.")
    if limit is not None and task.kind in PICTURES and Path(part.path).is_dir():
        rows = _in_turn(rows, task.columns.label)
    return rows if limit is None else rows[:limit]


def _in_turn(rows: Sequence[Row], column: str) -> list[Row]:
    """Return the first row of every class, then the second, and so on."""
    seen: Counter[str] = Counter()
    places: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        label = str(row.get(column))
        places.append((seen[label], number))
        seen[label] += 1
    return [rows[number] for _, number in sorted(places)]


def check_disjoint(
    task: Task, further_proxy: Sequence[str] = (), *, trust_code: bool = False
) -> dict[Split, frozenset[bytes]]:
    """Return split -> identities of its rows, of splits that have any; they share no row."""
    if further_proxy and task.kind == "lm-eval":
        raise RequestError(
            f"task '{task.name}' takes its rows from lm-evaluation-harness; they cannot be "
            f"compared with {further_proxy[0]}."
        )
    found: dict[Split, dict[bytes, Row]] = {}
    for split in SPLITS:
        rows = split_rows(task, split) if split in task.data else []
        found[split] = {row_key(task, row): row for row in rows}
    for path in further_proxy:
        rows = _read(task, path, trust_code=trust_code)
        found["proxy"].update({row_key(task, row): row for row in rows})
    faults: list[Fault] = []
    every = [row for rows in found.values() for row in rows.values()]
    if task.chat_template is not None and not any(is_spoken(task, row) for row in every):
        faults.append(Fault("no_messages", "chat_template: its rows hold no messages."))
    for first, second in combinations(SPLITS, 2):
        if shared := found[first].keys() & found[second].keys():
            example = _shown(task, found[second][min(shared)])
            what = (
                f"{first} and {second} share {len(shared)} of {len(found[second])} different "
                f"{second} rows, such as {example}."
            )
            faults.append(Fault("shared_rows", what))
    if faults:
        raise TaskError(faults, f"task '{task.name}'")
    return {split: frozenset(rows) for split, rows in found.items() if rows}


def _part_rows(task: Task, split: Split, part: Part) -> list[Row]:
    rows = _read(task, part.path, part.subset)
    if part.share is None:
        return rows
    start = 0.0
    for earlier in SPLITS[: SPLITS.index(split)]:
        other = task.data.get(earlier)
        if other is not None and (other.path, other.subset) == (part.path, part.subset):
            start += other.share or 0.0
    stop = start + part.share
    # By content, so that equal rows fall on the same side and added rows move no other.
    positions = (int.from_bytes(row_key(task, row)[:6], "big") / 2**48 for row in rows)
    return [row for row, at in zip(rows, positions, strict=True) if start <= at < stop]


def _read(
    task: Task, path: str, subset: str | None = None, *, trust_code: bool = False
) -> list[Row]:
    """Return the rows of a file or folder, all with the columns that the task needs."""
    rows = read_rows(path, split=subset, trust_code=trust_code)
    if task.kind in PICTURES:
        rows = locate_images(rows, task.columns.image, path)
    listed = list(rows)
    where = f"task '{task.name}': {path}, "
    check_forms(listed, task, where)
    example: Row = listed[0] if listed else {}
    wanted = required_inputs(task, example)
    splits = {split for split, part in task.data.items() if part.path == path} or {"proxy"}
    answer = answer_of(task, example)
    if answer is not None and "proxy" not in splits:
        wanted.append(answer)
    check_pairs(listed, task, where)
    advice = "Name the right one in the task: columns: {{{}: NAME}}.".format
    check_columns(listed, task.columns, wanted, where=where, advice=advice)
    return listed


def _shown(task: Task, row: Row) -> str:
    known = task.kind in INPUTS
    names = [getattr(task.columns, c) for c in inputs_of(task, row)] if known else list(row)
    text = " / ".join(str(row[name]) for name in names if row.get(name) is not None)
    return repr(text if len(text) <= 80 else f"{text[:79]}…")


References = tuple[int, ...] | tuple[float, ...] | tuple[str, ...] | tuple[Relevance, ...]


@dataclass(frozen=True, eq=False)
class Prepared:
    """The rows of one split as model inputs.

    Attributes:
        batches: model inputs, rows of like length together, without labels (language models and
            sequence to sequence: with `labels`, −100 where padded).
        order: `[n]`, the row that each row of the concatenated batches is; of vectors of texts, the
            text that it is, in the order of `embeddings.embedded_texts`.
        references: what is true, row by row: class indices, numbers, normalised target texts, or
            the grades of relevant documents.
        data_hash: identity of the rows and their answers.
        processor: the tokenizer or image processor.
        generate_tokens: at most; one more than the longest target, or what the model can take.
        classes: of zero-shot tasks, the names of the classes in the order of the references.
        texts: of zero-shot tasks, tokens of the texts of all classes, those of one together.
    """

    task: Task
    split: Split
    batches: Sequence[dict[str, Tensor]]
    order: Tensor
    references: References
    data_hash: str
    processor: Any = field(repr=False)
    generate_tokens: int = 0
    classes: tuple[str, ...] = ()
    texts: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)
    rows: int | None = None  # None: as many as inputs

    def __len__(self) -> int:
        return len(self.order) if self.rows is None else self.rows


def prepare(
    task: Task,
    split: Split,
    folder: str | Path,
    *,
    batch_size: int = BATCH_SIZE,
    limit: int | None = None,
    label_ids: Mapping[str, int] | None = None,
    answers: bool = True,
    base: Path | None = None,
) -> Prepared:
    """Read and encode a split for models with the tokenizer (or image processor) of `folder`.

    Texts are cut to `task.max_length` tokens, sorted by their number of tokens and padded on the
    right to the longest of their batch. Time: one tokenization. Memory: the token ids; of pictures
    the first 256 MB of pixels in float32, further batches are read again whenever they are run.

    Args:
        task: not of the kinds `function` and `lm-eval`.
        split: `proxy`, `validation` or `test`.
        folder: a checkpoint's folder: configuration, and tokenizer or image processor.
        batch_size: rows per batch; changes results by rounding only.
        limit: take the first rows only.
        label_ids: class name -> index, where the task names none; None: of the configuration.
        answers: labels are read; without them, there is nothing to score.
        base: whose configuration counts where `folder` is an adapter with a tokenizer only.
    """
    rows = split_rows(task, split, limit)
    if task.kind in ("function", "lm-eval"):
        raise RequestError(f"task '{task.name}' ({task.kind}) reads its rows itself.")
    processor, config = open_processor(task, Path(folder), base)
    if task.kind == "sequence-to-sequence":
        # Proxy data of other kinds need no answers.
        where = f"task '{task.name}', split '{split}': "
        advice = (
            "Outputs of such models are compared and scored along their targets; name the column "
            "(columns: {target: NAME}) or add it."
        )
        target = answer_of(task, rows[0]) or "target"
        check_columns(rows, task.columns, [target], where=where, advice=lambda _: advice)
    classes, texts = _class_texts(task, Path(folder), base) if task.kind == ZERO_SHOT else ((), {})
    named = {name: i for i, name in enumerate(classes)} or label_ids
    references = references_of(task, rows, named or config.label2id or {}) if answers else ()
    generate, order = 0, list(range(len(rows)))
    if task.kind in PICTURES:
        values = [row[task.columns.image] for row in rows]
        where = f"task '{task.name}': "
        batches = PixelBatches(values, processor, batch_size, image_mode(config), where)
    else:
        max_length = task.max_length or longest_input(processor, config)
        if task.kind in EMBEDDING:
            sentences = settings_for(task, Path(folder), base)
            max_length = task.max_length or min(max_length, sentences.max_length or max_length)
            texts_of_rows = embedded_texts(task, rows, sentences)
            encoded = encoded_texts(texts_of_rows, processor, max_length)
            order = list(range(len(texts_of_rows)))
        else:
            encoded = token_ids(task, rows, processor, max_length)
        lengths = [len(ids) for ids in encoded.inputs["input_ids"]]
        if task.kind == "language-model":
            _check_predicted(task, split, encoded.predicted)
        # The longest first: if memory is short, that shows at once.
        order.sort(key=lambda i: -lengths[i])
        chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        batches = tuple(encoded.batch(chunk) for chunk in chunks)
        longest = longest_target(task, rows, processor) + 1
        generate = min(longest, positions_of(config) or sys.maxsize)
    places, identity = torch.tensor(order), rows_hash(task, rows)
    read = (places, references, identity, processor, generate)
    return Prepared(task, split, batches, *read, classes, texts, rows=len(rows))


def _check_predicted(task: Task, split: Split, predicted: Sequence[int]) -> None:
    """Refuse a split of a language model without a predicted token; single rows may have none."""
    if not any(predicted):
        raise RequestError(
            f"task '{task.name}', split '{split}': none of the {counted(len(predicted), 'text')} "
            "has a token that is predicted from others, so there is nothing to measure.\n"
            "Is it the right file, and the right column? Of prompts and chats the answers count, "
            "as far as max_length leaves them."
        )


def class_names(task: Task) -> tuple[str, ...]:
    """Return the names of a task's classes: those that it says, or the sorted labels of its data.

    Of all its splits, so that every split has the same. RequestError where labels only count.
    """
    if task.labels is not None:
        return task.labels
    rows = (row for split in task.data for row in split_rows(task, split))
    names = names_of_classes(rows, task.columns.label)
    if names is None:
        raise RequestError(
            f"task '{task.name}': its column '{task.columns.label}' holds no class names that a "
            "text could hold.\nName the classes in their order: labels: [cat, dog, …]."
        )
    return names


def _class_texts(
    task: Task, folder: Path, base: Path | None
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Return a zero-shot task's classes, and their texts by the first tokenizer that there is."""
    from eutectic.models.zero_shot import PROMPTS, class_texts, tokenized

    names = class_names(task)
    given = [folder, *(Path(f) for f in (task.text_model, base) if f is not None)]
    place = next((f for f in given if (f / "tokenizer_config.json").is_file()), None)
    if place is None:
        raise CheckpointError(
            f"{folder}: task '{task.name}' needs a tokenizer for the texts of its classes.\n"
            "Copy the base's tokenizer files there, or name the whole model with text_model."
        )
    try:
        tokenizer = load_processor(place, place, images=False)
        config = load_config(place)
    except (EutecticError, ImportError):
        raise
    except Exception as error:  # transformers raises anything at values that it does not expect
        raise CheckpointError(f"{place}: no tokenizer: {first_line(error)}") from None
    texts = class_texts(names, task.prompts or PROMPTS)
    longest = positions_of(getattr(config, "text_config", config))
    return names, tokenized(texts, tokenizer, longest)


def references_of(task: Task, rows: Sequence[Row], label_ids: Mapping[str, int]) -> References:
    """Return the answers: class indices, numbers, texts, relevant documents.

    None (`()`) for language models.
    """
    if task.kind == "retrieval":
        return relevance_of(task, rows)
    if task.kind in ("language-model", "function"):
        return ()
    if task.kind == "sequence-to-sequence":
        column: str = getattr(task.columns, answer_of(task, rows[0]) or "target")
        return tuple(normal_text(str(row[column])) for row in rows)
    values: list[Any] = [row.get(task.columns.label) for row in rows]
    if all(value is None for value in values):
        return ()  # a proxy split needs no labels
    if task.labels is not None:
        label_ids = {name: i for i, name in enumerate(task.labels)}
    known = {str(name): int(i) for name, i in label_ids.items()}
    # Without names in the task, only the model's outputs tell how many classes there are.
    classes = math.inf if task.labels is None else len(task.labels)
    numbers = task.kind in ("regression", "sentence-similarity")
    wanted = "no finite number" if numbers else f"none of {', '.join(list(known)[:20])}"
    found: list[Any] = []
    faults: list[Fault] = []
    for number, value in enumerate(values, 1):
        try:
            found.append(finite_number(value) if numbers else class_index(value, known, classes))
        except (TypeError, ValueError):
            near = "" if numbers else suggest(str(value), list(known))
            what = f"the label {value!r} is {wanted}."
            faults.append(Fault("label", what, f"row {number}", next=near))
    if faults:
        raise TaskError(faults[:10], f"task '{task.name}'")
    return tuple(found)


def normal_text(text: str) -> str:
    """Return a text with runs of white space made one blank: what exact match compares."""
    return " ".join(text.split())


def open_processor(task: Task, folder: Path, base: Path | None = None) -> tuple[Any, Any]:
    """Return the tokenizer or image processor of a folder, and the configuration with it."""
    images = task.kind in PICTURES
    try:
        configured = folder if base is None or (folder / "config.json").exists() else base
        config = load_config(configured)
        found = load_processor(folder, folder, images=images)
    except (EutecticError, ImportError):
        raise
    except Exception as error:  # transformers raises anything at values that it does not expect
        raise CheckpointError(
            f"{folder}: no configuration and tokenizer for task '{task.name}': {first_line(error)}"
        ) from None
    # Without its files transformers makes a tokenizer of special tokens that knows no word.
    empty = not images and len(found) < len({*found.all_special_tokens}) + 2
    if empty or not processor_hash(folder):
        raise CheckpointError(
            f"{folder}: no tokenizer or image processor for task '{task.name}'.\n"
            "Copy its files there from the model that this one was made from."
        )
    return found, config
