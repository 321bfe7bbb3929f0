"""The journal beside results: what is somebody else's is not cut."""

from pathlib import Path

import pytest

from eutectic.errors import RequestError, ResumeError
from eutectic.evaluation.measured_pairs import open_journal


@pytest.mark.parametrize(
    "held", ["one line that ends here", '{"text": "a row"}', '{"text": "a row"}\n', "\0\0\0"]
)
def test_a_file_of_somebody_else_is_refused_as_it_is(held: str, tmp_path: Path) -> None:
    file = tmp_path / "r.json.outcomes.jsonl"
    file.write_text(held)
    with pytest.raises(ResumeError, match="not a journal"), open_journal(tmp_path / "r.json"):
        pass
    assert file.read_text() == held


@pytest.mark.parametrize("torn", ["", "{", '{"pair": "', '{"pair": "ab", "checkp'])
def test_the_beginning_of_a_line_is_what_a_kill_leaves(torn: str, tmp_path: Path) -> None:
    file = tmp_path / "r.json.outcomes.jsonl"
    file.write_text(torn)
    with open_journal(tmp_path / "r.json") as journal:
        assert not journal.found
    assert file.read_text() == ""


def test_one_evaluation_at_a_time(tmp_path: Path) -> None:
    with (
        open_journal(tmp_path / "r.json"),
        pytest.raises(RequestError, match="another process is evaluating"),
        open_journal(tmp_path / "r.json"),
    ):
        pass
