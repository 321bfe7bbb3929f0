"""A folder that is written aside: whole or absent, by one run at a time, nobody else's lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eutectic.errors import OutputError, RequestError, ResumeError
from eutectic.storage import FolderAside, announce, folder_aside
from eutectic.storage.local_disk import LocalDisk

ASKED = {"experts": ["a", "b"]}


class Killed(BaseException):
    """The end of a process."""


def opened(tmp_path: Path, asked: dict[str, Any] = ASKED) -> FolderAside:
    return folder_aside(tmp_path / "out", asked, "last.json")


def put(file: Path) -> None:
    announce(file)
    file.write_text("1")


def write(tmp_path: Path, kill: str = "") -> None:
    with opened(tmp_path) as aside:
        if not aside.finished:
            with aside.writing() as folder:
                assert not list(folder.iterdir())
                put(folder / "first.json")
                if kill == "while writing":
                    raise Killed
                put(folder / "last.json")
                if kill == "before the name":
                    raise Killed
            aside.commit()
        if kill == "after it":
            raise Killed
        aside.clear()


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("kill", ["while writing", "before the name", "after it"])
@pytest.mark.parametrize("there", [False, True])
def test_a_killed_run_is_finished_by_the_same_request(
    kill: str, there: bool, tmp_path: Path
) -> None:
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises(Killed):
        write(tmp_path, kill)
    assert (tmp_path / "out/last.json").exists() is (kill == "after it")
    assert (tmp_path / "out/first.json").exists() is (kill == "after it")
    write(tmp_path)
    assert names(tmp_path) == ["out/first.json", "out/last.json"]
    with pytest.raises(RequestError, match="not empty"):
        write(tmp_path)


def test_the_finished_folder_of_another_request_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        write(tmp_path, "after it")
    with pytest.raises(RequestError, match="not empty"):
        opened(tmp_path, {"experts": ["a"]})


def test_a_kill_while_the_mark_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: LocalDisk, folder: Path, names: Any) -> Any:
        if (folder / names[-1]).exists():
            for name in names:
                (folder / name).unlink()
            raise Killed
        return discard(self, folder, names)

    discard = LocalDisk.discard
    with monkeypatch.context() as patched:
        patched.setattr(LocalDisk, "discard", killed)
        with pytest.raises(Killed):
            write(tmp_path)
    assert (tmp_path / "out.partial").is_dir()
    write(tmp_path)
    assert names(tmp_path) == ["out/first.json", "out/last.json"]
    assert not (tmp_path / "out.partial").exists()


def write_both(tmp_path: Path, kill: Path | None = None) -> None:
    """Write two folders; a kill comes before the last work folder, then empty, is removed."""
    one, two = tmp_path / "one", tmp_path / "two"
    with (
        folder_aside(one, ASKED, "last.json", two) as first,
        folder_aside(two, ASKED, "last.json", one) as second,
    ):
        both = [aside for aside in (first, second) if not aside.finished]
        for aside in both:
            with aside.writing() as folder:
                put(folder / "last.json")
        for aside in both:
            aside.commit()
        for aside in (first, second):
            aside.clear()
        if kill is not None:
            kill.mkdir()
            raise Killed


@pytest.mark.parametrize("left", ["one.partial", "two.partial"])
def test_of_two_folders_an_empty_work_folder_is_left(left: str, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        write_both(tmp_path, tmp_path / left)
    write_both(tmp_path)
    assert names(tmp_path) == ["one/last.json", "two/last.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    with pytest.raises(RequestError, match="not empty"):
        write_both(tmp_path)


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError), opened(tmp_path) as aside, aside.writing() as folder:
        put(folder / "first.json")
        raise OutputError("full")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failures", [1, 2])
def test_a_work_folder_that_cannot_be_removed(
    failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    discard, calls = LocalDisk.discard, []

    def failing(self: LocalDisk, folder: Path, names: Any) -> Any:
        calls.append(folder)
        if 2 <= len(calls) <= failures + 1:  # the first makes room for a new run
            raise OSError(5, "broken")
        return discard(self, folder, names)

    with monkeypatch.context() as patched:
        patched.setattr(LocalDisk, "discard", failing)
        if failures == 1:
            write(tmp_path)
        else:
            with pytest.raises(OutputError, match="complete, but"):
                write(tmp_path)
    if failures == 2:
        write(tmp_path)
    assert names(tmp_path) == ["out/first.json", "out/last.json"]
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("held", ["folder/x", "notes.txt", "unfinished.json"])
def test_what_no_run_has_made_is_not_deleted(held: str, tmp_path: Path) -> None:
    file = tmp_path / "out.partial" / held
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with pytest.raises(ResumeError, match="Move it away"):
        write(tmp_path)
    assert file.read_text() == "{}"


def test_a_strangers_file_beside_what_a_killed_run_left(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        write(tmp_path, "while writing")
    (tmp_path / "out.partial/notes.txt").write_text("mine")
    with pytest.raises(ResumeError, match=r"notes\.txt"):
        write(tmp_path)
    assert (tmp_path / "out.partial/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kill", ["while writing", "before the name"])
@pytest.mark.parametrize("held", ["notes.txt", "below/notes.txt", "first.json.old"])
def test_a_strangers_file_in_the_unfinished_folder_is_neither_deleted_nor_published(
    kill: str, held: str, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        write(tmp_path, kill)
    file = tmp_path / "out.partial/folder" / held
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(ResumeError, match=f"holds {held}, which no run wrote"):
        write(tmp_path)
    assert file.read_text() == "mine"
    file.rename(tmp_path / "moved")
    write(tmp_path)
    assert names(tmp_path) == ["moved", "out/first.json", "out/last.json"]


def test_a_strangers_file_that_comes_while_the_folder_is_written(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="mine.txt"), opened(tmp_path) as aside:
        with aside.writing() as folder:
            put(folder / "last.json")
            (folder / "mine.txt").write_text("mine")
        aside.commit()
    assert names(tmp_path) == [
        "out.partial/folder/mine.txt", "out.partial/unfinished.json", "out.partial/written.jsonl",
    ]  # fmt: skip


def test_a_strangers_file_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="last.json"), opened(tmp_path) as aside:
        with aside.writing() as folder:
            (folder / "last.json").write_text("mine")
            put(folder / "last.json")
    assert (tmp_path / "out.partial/folder/last.json").read_text() == "mine"


def test_a_list_leads_nowhere_else(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        write(tmp_path, "while writing")
    (tmp_path / "mine").write_text("mine")
    with (tmp_path / "out.partial/written.jsonl").open("a") as listed:
        listed.write('"../../mine"\n"/etc/hosts"\n"."\n""\n[1]\n{\n')
    write(tmp_path)
    assert names(tmp_path) == ["mine", "out/first.json", "out/last.json"]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(RequestError, match="another process is writing"):
        opened(tmp_path)
    write(tmp_path)


@pytest.mark.parametrize("output", [".", "..", "file", "full"])
def test_outputs_that_cannot_be(output: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine")
    chosen = Path(output) if output.startswith(".") else tmp_path / output
    with pytest.raises(RequestError):
        folder_aside(chosen, ASKED, "last.json")
    assert names(tmp_path) == ["file", "full/x"]


def test_missing_folders_above_are_made(tmp_path: Path) -> None:
    write(tmp_path / "a/b")
    assert names(tmp_path) == ["a/b/out/first.json", "a/b/out/last.json"]
