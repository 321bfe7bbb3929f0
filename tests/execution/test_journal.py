"""The journal of a run.

Guards: what is finished survives a kill at any byte; a folder of somebody else is left alone; one
writer at a time.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from eutectic.errors import OutputError, RequestError, ResumeError
from eutectic.execution.journal import JOURNAL, Journal
from eutectic.execution.tasks import Finished

DONE = Finished("ab" * 32, {"rank": 3}, {"w": 1.5})


def test_what_is_finished_is_found_again(tmp_path: Path) -> None:
    with Journal(tmp_path / "work", "x") as journal:
        assert not journal.resumed
        journal.add("merge", "w", DONE)
    with Journal(tmp_path / "work", "x") as journal:
        assert journal.resumed
        assert journal.finished == {("merge", "w"): DONE}


def test_a_kill_at_any_byte_costs_the_last_line_at_most(tmp_path: Path) -> None:
    with Journal(tmp_path / "whole", "x") as journal:
        for name in "abc":
            journal.add("merge", name, DONE)
    content = (tmp_path / "whole" / JOURNAL).read_bytes()
    for length in range(len(content)):
        work = tmp_path / "torn"
        work.mkdir(exist_ok=True)
        (work / JOURNAL).write_bytes(content[:length])
        with Journal(work, "x") as journal:
            assert len(journal.finished) == max(0, content[:length].count(b"\n") - 1)
            journal.add("merge", "d", DONE)
        with Journal(work, "x") as journal:
            assert ("merge", "d") in journal.finished


def test_another_request_is_refused_until_restarted(tmp_path: Path) -> None:
    with Journal(tmp_path, "x") as journal:
        journal.add("merge", "w", DONE)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/file").write_text("old")
    before = (tmp_path / JOURNAL).read_bytes()
    with pytest.raises(ResumeError, match="another request"):
        Journal(tmp_path, "y")
    assert (tmp_path / JOURNAL).read_bytes() == before
    with Journal(tmp_path, "y", restart=True) as journal:
        assert not journal.resumed
        assert journal.finished == {}
    assert [p.name for p in tmp_path.iterdir()] == [JOURNAL]


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_of_somebody_else_is_left_alone(restart: bool, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ResumeError, match="is not an unfinished merge"):
        Journal(tmp_path, "x", restart=restart)
    (tmp_path / JOURNAL).write_text("mine too")
    with pytest.raises(ResumeError):
        Journal(tmp_path, "x", restart=restart)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "mine": "mine",
        JOURNAL: "mine too",
    }


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path, "x"):
        for restart in (False, True):
            with pytest.raises(RequestError, match="another process"):
                Journal(tmp_path, "x", restart=restart)
    Journal(tmp_path, "x").close()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("mine")
    with pytest.raises(OutputError, match="work"):
        Journal(tmp_path / "work", "x")
