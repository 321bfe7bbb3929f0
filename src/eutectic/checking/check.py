"""The entry: checkpoints and adapters, each by itself and against the base."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eutectic.checking.adapters import (
    adapter_findings,
    idle_factors,
    open_adapter,
    place_faults,
)
from eutectic.checking.against import Base, findings_against
from eutectic.checking.configuration import config_of, configuration_findings, plain_dtype
from eutectic.checking.files import file_findings, held_bytes, tensors_of_pickles
from eutectic.checking.report import Checked, CheckReport, Findings, counted
from eutectic.checking.tensors import tensor_findings, value_findings
from eutectic.checking.tokens import no_tokenizer, token_findings, tokens_in
from eutectic.checkpoint.experts import is_adapter
from eutectic.checkpoint.index import CheckpointIndex, open_index, read_json_object
from eutectic.checkpoint.locating import locate
from eutectic.checkpoint.opening import open_reader
from eutectic.checkpoint.reader import CheckpointReader, TensorSource
from eutectic.checkpoint.weight_files import ADAPTER_CONFIG
from eutectic.errors import CheckpointError, EutecticError, RequestError
from eutectic.notebook import with_bar
from eutectic.vocabulary.tokens import Tokens

Progress = Callable[[float, float, str], None]


@with_bar("reading")
def check(
    *checkpoints: str | Path,
    base: str | Path | None = None,
    values: bool = False,
    progress: Progress | None = None,
) -> CheckReport:
    """Say what is wrong or unusual in checkpoints and adapters, before anyone merges them.

    It reads headers, indices, configurations, tokenizers and adapters; of tensors only tables that
    may be copies of each other, and with `values` everything once, piece by piece. It writes
    nothing and runs no code of a checkpoint; what cannot be read is a finding, not an error. Cost:
    milliseconds a thousand tensors; with `values` the time of reading, in the memory of a few
    pieces of 4 million numbers.

    Args:
        checkpoints: folders, weight files or names on the hub.
        base: the model that the others are fine-tunes of; by default the first full checkpoint
            among them, and then what does not fit it is unusual, not wrong.
        values: also look for NaN, Inf and matrices of zeros.
        progress: called with numbers read so far, all numbers, and the tensor.

    Returns:
        For each what is wrong, what is unusual, and what is worth knowing.

    Raises:
        RequestError: nothing was named.
        CheckpointError: the base cannot be read.
    """
    if not checkpoints:
        raise RequestError(
            "nothing to check.\nName folders, files or models of the hub: eutectic check ./base ./a"
        )
    looked = [_look(str(named), values, progress) for named in checkpoints]
    full = [Base(one.named, one.index, one.tokens) for one in looked if one.index is not None]
    reference = full[0] if full else None
    if base is not None:
        place = locate(base, full=True).path
        with open_reader(place) as reader:
            reference = Base(str(base), reader.index, tokens_in(_folder_of(place))[0])
    for one in looked:
        if reference is not None and one.readable and one.named != reference.path:
            others = [b for b in full if b.path not in (one.named, reference.path)]
            for finding in findings_against(
                one.path, one.tokens, reference, others, stated=base is not None
            ):
                one.findings.add(finding)
    return CheckReport(tuple(one.checked() for one in looked))


@dataclass
class _Looked:
    """One checkpoint, and what was found so far."""

    named: str
    path: Path
    findings: Findings
    counts: dict[str, Any]
    index: CheckpointIndex | None = None  # of a full checkpoint's logical tensors
    tokens: Tokens | None = None
    readable: bool = False

    def checked(self) -> Checked:
        faults, notes = self.findings.all()
        return Checked(self.named, faults=faults, notes=notes, **self.counts)


def _look(named: str, values: bool, progress: Progress | None) -> _Looked:
    """Look at one checkpoint or adapter by itself."""
    one = _Looked(named, Path(named), Findings(), {})
    try:
        found = locate(named)
        one.path = found.path
        one.findings.add(*found.notes(named))
        if is_adapter(one.path):
            _look_at_adapter(one, values, progress)
        else:
            _look_at_checkpoint(one, values, progress)
    except (EutecticError, OSError) as error:
        one.findings.add_error(error)
    return one


def _look_at_adapter(one: _Looked, values: bool, progress: Progress | None) -> None:
    one.counts["kind"] = "adapter"
    try:
        one.counts["model"] = str(
            read_json_object(one.path / ADAPTER_CONFIG).get("peft_type") or ""
        )
        index = open_adapter(one.path)
    except CheckpointError as error:
        one.findings.add(*file_findings(one.path, None))
        one.findings.add_error(error)
        return
    one.readable = True
    one.findings.add(*file_findings(one.path, None), *adapter_findings(one.path, index))
    one.tokens, wrong = tokens_in(one.path)
    one.findings.add(*wrong)
    with closing(CheckpointReader(index)) as source:
        one.counts |= _counts(source, index)
        misplaced = [*place_faults(one.path, index, source)]
        one.readable = not misplaced  # else the base would have the same to say
        one.findings.add(*misplaced, *tensor_findings(source, {}))
        if values:
            one.findings.add(*value_findings(source, source.entries, progress))
            one.findings.add(*idle_factors(one.path, index, source))


def _look_at_checkpoint(one: _Looked, values: bool, progress: Progress | None) -> None:
    folder = _folder_of(one.path)
    one.tokens, wrong = tokens_in(folder)
    one.findings.add(*wrong)
    whole = one.path.is_dir()
    try:
        stored = open_index(one.path)
    except CheckpointError as error:
        if whole:
            one.findings.add(*file_findings(folder, None))
        one.findings.add_error(error)
        return
    if whole:
        one.findings.add(*file_findings(folder, stored))
    one.findings.add(*tensors_of_pickles(stored))
    one.counts |= {"kind": "checkpoint", "model": str(stored.config.get("model_type") or "")}
    with closing(open_reader(stored)) as source:
        one.index, one.readable = source.index, True
        entries, config = source.entries, source.index.config
        one.counts |= _counts(source, stored)
        one.findings.add(*(replace(note, subject=(one.named,)) for note in source.notes))
        one.findings.add(*tensor_findings(source, config))
        one.findings.add(*config_of(folder, config), *configuration_findings(config, entries))
        generation = folder / "generation_config.json"
        stated = read_json_object(generation) if generation.is_file() else {}
        if stored.gguf is None or not stored.gguf.tokenizer:  # which has its own
            one.findings.add(*no_tokenizer(folder, entries))
        one.findings.add(*token_findings(config, stated, entries, one.tokens))
        if values:
            one.findings.add(*value_findings(source, entries, progress))


def _counts(source: TensorSource, stored: CheckpointIndex) -> dict[str, Any]:
    entries = source.entries.values()
    return {
        "tensors": len(source.entries),
        "numbers": sum(entry.numel for entry in entries),
        "bytes": held_bytes(stored.entries),
        "dtypes": counted((plain_dtype(entry.dtype), entry.numel) for entry in entries),
    }


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent
