"""Files that eutectic writes and reads again, damaged: accepted or refused, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tests.helpers.fuzzing import damaged, documents, outcome

from eutectic.errors import EutecticError
from eutectic.evaluation.measured_pairs import open_journal
from eutectic.execution.journal import Journal
from eutectic.execution.merging import Finished
from eutectic.execution.model_folder import read_provenance
from eutectic.reporting.inspection import _read_nai
from eutectic.routed.routed_folder import _read_description
from eutectic.statistics import load_statistics
from eutectic.statistics.unfinished_collection import DataLog, Snapshot, open_partial

CASES = settings(max_examples=500)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own")


RECORD: dict[str, Any] = {
    "format": 1,
    "checkpoint": {"fingerprint": "abc"},
    "data": {"examples": 6, "fingerprint": "d"},
    "settings": {"gram": True, "rank": None},
    "layers": {
        "a.weight": {
            "count": 5,
            "sample_count": 2,
            "inputs": "a.weight",
            "same_as": "a.weight",
            "shape": [3, 2],
            "parameter": [3, 2],
            "kind": "linear",
        }
    },
    "unseen": [],
    "skipped": {},
    "versions": {},
}
SUMS = {"a.weight/input_sum": torch.ones(2), "a.weight/gram": torch.eye(2)}


def statistics(path: Path, record: bytes) -> None:
    text = record.decode("utf-8", "replace")
    path.write_bytes(save(SUMS, {"eutectic_statistics": text}))
    file = load_statistics(path)
    for name in file:
        file.read(name)
    assert isinstance(file.fingerprint, str)


def test_the_valid_record_is_accepted(place: Path) -> None:
    statistics(place / "valid.safetensors", json.dumps(RECORD).encode())


@CASES
@given(documents(RECORD))
def test_records_of_statistics(place: Path, record: bytes) -> None:
    outcome(lambda: statistics(place / "x.safetensors", record))


LINES = [
    {"eutectic_journal": 2, "identity": "me"},
    {"stage": "merge", "tensor": "a", "sha256": "x", "record": {"n": 1}, "norms": {"a": 1.0}},
    {"stage": "merge", "tensor": "b", "sha256": "y", "record": {}, "norms": {}},
    {"stage": "merge", "tensor": "c", "sha256": "z", "record": {}, "norms": {}},
]
JOURNAL = b"".join(json.dumps(line).encode() + b"\n" for line in LINES)


def read_journal(folder: Path, raw: bytes) -> dict[tuple[str, str], Finished]:
    folder.mkdir(exist_ok=True)
    (folder / "journal.jsonl").write_bytes(raw)
    with Journal(folder, "me") as journal:
        return dict(journal.finished)


@CASES
@given(damaged(JOURNAL))
def test_journals_of_merges(place: Path, raw: bytes) -> None:
    outcome(lambda: read_journal(place / "out.partial", raw))


def test_a_line_of_zeros_costs_one_tensor(place: Path) -> None:
    lines = JOURNAL.splitlines(keepends=True)
    lines[2] = b"\0" * (len(lines[2]) - 1) + b"\n"
    found = read_journal(place / "cut.partial", b"".join(lines))
    assert [tensor for _, tensor in found] == ["a", "c"]
    # The next run appends behind it, and finds that again too.
    assert read_journal(place / "cut.partial", (place / "cut.partial/journal.jsonl").read_bytes())


OUTCOMES = b"".join(
    json.dumps(
        {"pair": p, "checkpoint": "m", "task": "t", "predictions": [1, 0], "references": r}
    ).encode()
    + b"\n"
    for p, r in (("p", [1.0, 0.0]), ("q", [[1.0], [0.5]]))
)


@CASES
@given(damaged(OUTCOMES))
def test_journals_of_evaluations(place: Path, raw: bytes) -> None:
    (place / "results.json.outcomes.jsonl").write_bytes(raw)

    def read() -> None:
        with open_journal(place / "results.json") as journal:
            assert all(outcomes.predictions.dtype == float for outcomes in journal.found.values())

    outcome(read)


ROUTED: dict[str, Any] = {
    "format": 1,
    "architecture": "BertModel",
    "experts": ["a", "b"],
    "router": "energy",
    "accumulate": False,
    "batch_first": True,
    "short": {},
    "left_out": [],
    "layers": [{"name": "a.weight", "path": "a"}],
}


@CASES
@given(documents(ROUTED))
def test_descriptions_of_routed_models(place: Path, text: bytes) -> None:
    (place / "routed.json").write_bytes(text)
    outcome(lambda: _read_description(place))


RESULTS: dict[str, Any] = {
    "schema_version": 1,
    "split": "test",
    "tasks": [{"name": "t", "expert": "e"}],
    "results": [{"checkpoint": "m", "task": "t", "nai": 0.5}],
}


@CASES
@given(documents(RESULTS))
def test_results(place: Path, text: bytes) -> None:
    (place / "results.json").write_bytes(text)
    outcome(lambda: _read_nai(place / "results.json", ["m"]))


@CASES
@given(documents({"recipe": {"method": "ties"}, "scale": 1.0, "search": {"points": [[1, 2]]}}))
def test_provenance(place: Path, text: bytes) -> None:
    (place / "eutectic.json").write_bytes(text)
    outcome(lambda: read_provenance(place))


@CASES
@given(st.data())
def test_unfinished_collections(place: Path, data: st.DataObject) -> None:
    output = place / "stats.safetensors"
    partial = open_partial_fresh(output)
    partial.save(Snapshot(0, 1, {"a/gram": torch.eye(2)}, DataLog([1, 2], ["h"])))
    path = partial.folder / "snapshot.safetensors"
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    outcome(lambda: open_partial(output, "me"))


def open_partial_fresh(output: Path) -> Any:
    folder = output.with_name(f"{output.name}.partial")
    if folder.exists():
        for path in folder.iterdir():
            path.unlink()
    try:
        return open_partial(output, "me")
    except EutecticError as error:  # pragma: no cover - would hide what is tested
        raise AssertionError(error) from error
