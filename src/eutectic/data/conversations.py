"""Prompts with completions and chats as tokens, with a mask of those that are answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eutectic.data.columns import Row, RowsOfTask, inputs_of, messages_of
from eutectic.errors import RequestError, first_line
from eutectic.vocabulary.chat_templates import BUILT_IN, template_of

Message = Mapping[str, Any]
Span = tuple[int, int]  # of characters of a text
_TEXTS = (str, int, float)  # of prompts and completions; an answer is often a number
_MARKED = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True)
class Answered:
    """Token ids of rows, and which of them are answers: both `[n][tokens]`."""

    ids: list[list[int]]
    answers: list[list[bool]]


@dataclass(frozen=True)
class _Text:
    """A text whose answers stand at `spans` of it."""

    text: str
    spans: tuple[Span, ...]
    special: bool  # the tokenizer adds its special tokens; a chat template writes its own
    marked: tuple[bool, ...] = field(default=())  # of its tokens, where a template marks answers


def answered_ids(
    task: RowsOfTask, rows: Sequence[Row], tokenizer: Any, max_length: int, first: int = 1
) -> Answered:
    """Return the tokens of prompts with completions, or of chats, and which are answers.

    - `prompt` and `completion` as texts: one text, in which the tokens that hold a letter of the
      completion are the answer, and the special tokens that the tokenizer itself adds behind it.
    - `messages`, or both as messages: what the chat template makes of them. Answers are what the
      template marks ({% generation %}), else all that an assistant's turn adds to what the template
      makes of the turns before it with the beginning of an answer: its words and its end of turn.

    Cut to `max_length` tokens, on the tokenizer's side.

    Args:
        task: a language model's, with the columns of its rows.
        rows: whose columns were checked; all of one form.
        tokenizer: the checkpoint's.
        max_length: most tokens of a row.
        first: number of the first row, for messages.

    Raises:
        RequestError: chats and no chat template, or one that refuses them or that writes earlier
            turns otherwise in a longer chat.
    """
    found = Answered([], [])
    template = chat_template(task, tokenizer)
    for number, row in enumerate(rows, first):
        one = _text_of(task, row, tokenizer, template, f"row {number}")
        ids, answers = _tokens(one, tokenizer, max_length)
        found.ids.append(ids)
        found.answers.append(answers)
    return found


def chat_template(task: RowsOfTask, tokenizer: Any) -> str | None:
    """Return the template that a task names (a known one, Jinja, a model's folder), or the own."""
    named = getattr(task, "chat_template", None)
    if named is None:
        try:
            return tokenizer.get_chat_template()
        except (AttributeError, ValueError):
            return None
    if named in BUILT_IN:
        return BUILT_IN[named]
    if "{" in named:
        return named
    found = template_of(Path(named)) if Path(named).is_dir() else None
    if found is None:
        raise RequestError(
            f"chat_template '{named}' is no known template, no Jinja text and no model's folder "
            f"that has one.\nKnown: {', '.join(BUILT_IN)}."
        )
    return found


def _text_of(task: RowsOfTask, row: Row, tokenizer: Any, template: str | None, where: str) -> _Text:
    """Return a row as one text with the places of its answers."""
    fields = inputs_of(task, row)
    values = [row[getattr(task.columns, name)] for name in fields]
    chats = [messages_of(value, where) for value in values if not isinstance(value, _TEXTS)]
    if not chats:
        prompt, completion = (str(value) for value in values)
        whole = prompt + completion
        return _Text(whole, ((len(prompt), len(whole)),), special=True)
    if len(chats) < len(values):
        raise RequestError(
            f"{where}: of prompt and completion, one is a text and the other messages.\n"
            "Write both as texts or both as messages."
        )
    if template is None:
        raise RequestError(
            f"{where} holds messages, and the checkpoint has no chat template to write them with.\n"
            f"Name one ({', '.join(BUILT_IN)}, or the folder of a model that has one): "
            "--chat-template, or chat_template in a task."
        )
    turns = [turn for chat in chats for turn in chat]
    given = len(turns) - len(chats[-1]) if len(chats) > 1 else 0  # turns that are no answers
    tools = row.get("tools")
    more = {"tools": tools} if isinstance(tools, list) and tools else {}
    options = {"chat_template": template, **more}

    def written(count: int, **further: Any) -> str:
        return _written(tokenizer, turns[:count], where, **options, **further)

    def opening() -> str:
        """Return what stands before an answer that begins a chat: as it does after a question."""
        asked = [{"role": "user", "content": "?"}]
        before = _written(tokenizer, asked, where, **options)
        begun = _written(tokenizer, asked, where, add_generation_prompt=True, **options)
        added = begun[len(before) :]
        return whole[: whole.find(added) + len(added)] if added in whole else ""

    whole = written(len(turns))
    if _MARKED.search(template) and getattr(tokenizer, "is_fast", False):
        start = len(written(given, add_generation_prompt=True)) if given else 0
        marked = _marked(tokenizer, turns, where, options)
        return _Text(whole, ((start, len(whole)),), special=False, marked=marked)
    spans: list[Span] = []
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant" or number < given:
            continue
        before = written(number, add_generation_prompt=True) if number else opening()
        after = written(number + 1)
        if not whole.startswith(after) or not after.startswith(before):
            raise RequestError(
                f"{where}: the chat template writes turn {number + 1} otherwise in the whole chat "
                "than alone, so that its answer cannot be found.\n"
                "Write a chat for each answer, which ends with it, or mark answers in the "
                "template: {% generation %}…{% endgeneration %}."
            )
        spans.append((len(before), len(after)))
    return _Text(whole, tuple(spans), special=False)


def _written(tokenizer: Any, turns: Sequence[Message], where: str, **options: Any) -> str:
    try:
        return tokenizer.apply_chat_template([*turns], tokenize=False, **options)
    except Exception as error:  # templates raise what they like, such as of roles in their order
        raise RequestError(f"{where}: the chat template refuses it: {first_line(error)}.") from None


def _marked(
    tokenizer: Any, turns: Sequence[Message], where: str, options: Mapping[str, Any]
) -> tuple[bool, ...]:
    """Return which tokens of a chat stand between a template's marks of answers."""
    try:
        encoded = tokenizer.apply_chat_template(
            [*turns], tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
        )
    except Exception as error:
        raise RequestError(f"{where}: the chat template refuses it: {first_line(error)}.") from None
    return tuple(bool(mark) for mark in encoded["assistant_masks"])


def _tokens(one: _Text, tokenizer: Any, max_length: int) -> tuple[list[int], list[bool]]:
    """Return the tokens of a text and which of them are answers."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    options: dict[str, Any] = {"add_special_tokens": one.special, "verbose": False}
    if fast:
        options["return_offsets_mapping"] = True
    encoded = tokenizer(one.text, **options)
    is_cut, left = len(encoded["input_ids"]) > max_length, tokenizer.truncation_side == "left"
    if is_cut and fast and one.special:  # its special tokens stay
        encoded = tokenizer(one.text, truncation=True, max_length=max_length, **options)
    ids = list(encoded["input_ids"])
    if fast:
        answers = _by_offsets(encoded["offset_mapping"], one, whole_end=left or not is_cut)
    else:
        answers = _by_prefixes(one, tokenizer, ids)
    if one.marked:
        if len(one.marked) != len(ids):
            raise RequestError("the tokenizer splits what its chat template writes in two ways.")
        answers = [own and mark for own, mark in zip(answers, one.marked, strict=True)]
    kept = slice(-max_length, None) if left else slice(max_length)
    return ids[kept], answers[kept]


def _by_offsets(offsets: Sequence[Span], one: _Text, whole_end: bool) -> list[bool]:
    """Return which tokens hold a letter of an answer, or are added behind the last one.

    Without the `whole_end` of the text, what is added behind it is not the end of an answer.
    """
    last = max((i for i, (start, stop) in enumerate(offsets) if stop > start), default=-1)
    ends = whole_end and bool(one.spans) and one.spans[-1][1] == len(one.text)
    return [
        any(start < to and stop > at for at, to in one.spans)
        if stop > start
        else (ends and number > last >= 0)
        for number, (start, stop) in enumerate(offsets)
    ]


def _by_prefixes(one: _Text, tokenizer: Any, ids: Sequence[int]) -> list[bool]:
    """Return the same where a tokenizer tells no offsets: by what texts have in common."""

    def common(text: str) -> int:
        own = tokenizer(text, add_special_tokens=one.special, verbose=False)["input_ids"]
        pairs = enumerate(zip(own, ids, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(own), len(ids)))

    answers = [False] * len(ids)
    for start, stop in one.spans:
        begin = common(one.text[:start])
        end = len(ids) if stop == len(one.text) else common(one.text[:stop])
        answers[begin:end] = [True] * (end - begin)
    return answers
