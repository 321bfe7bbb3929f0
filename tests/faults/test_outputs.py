"""What is lost and what is left: outputs, work folders and inputs while a merge runs.

Guards: a run that was killed after its model got its name ends cleanly; nothing that a run has not
made is deleted; inputs that change are noticed before anything is put in place; the work folder is
removed with no file of it open, and one that cannot be removed is told.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import eutectic
from eutectic.errors import (
    CheckpointError,
    EutecticError,
    OutputError,
    RequestError,
    ResumeError,
)
from eutectic.execution import model_folder, output_folder
from eutectic.execution.journal import DELTAS, JOURNAL, Journal
from eutectic.execution.run import sweep
from eutectic.storage.local_disk import LocalDisk
from helpers.folders import digests, make_base, make_expert, save


class Killed(BaseException):
    """The end of a process, at one call."""


@pytest.fixture
def request_(tmp_path: Path) -> dict[str, Any]:
    base = make_base(layers=1, width=8)
    save(tmp_path / "in/base", base)
    for i, name in enumerate("ab"):
        save(tmp_path / "in" / name, make_expert(base, i))
    experts = {name: str(tmp_path / "in" / name) for name in "ab"}
    folder = tmp_path / "out"
    folder.mkdir()
    base_path = str(tmp_path / "in/base")
    return {"base": base_path, "experts": experts, "method": "average", "output": folder / "m"}


def work_of(request_: dict[str, Any]) -> Path:
    return request_["output"].with_name("m.partial")


def _before_removal(_: Journal) -> None:
    raise Killed


def _folder_left(journal: Journal) -> None:
    journal._close_file()
    journal.path.unlink()
    raise Killed


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("kill", [_before_removal, _folder_left])
def test_a_run_killed_after_its_model_got_its_name_ends_cleanly(
    request_: dict[str, Any],
    kill: Callable[[Journal], None],
    restart: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "remove_folder", kill)
        with pytest.raises(Killed):
            eutectic.merge(**request_)
    made = digests(request_["output"])
    assert work_of(request_).is_dir()
    with pytest.raises(RequestError, match="not empty"):
        eutectic.merge(**{**request_, "scale": 0.5}, restart=restart)
    report = eutectic.merge(**request_, restart=restart)
    assert report.resumed
    assert digests(request_["output"]) == made
    assert [p.name for p in request_["output"].parent.iterdir()] == ["m"]
    with pytest.raises(RequestError, match="not empty"):
        eutectic.merge(**request_, restart=restart)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors"])
def test_a_strangers_file_in_the_work_folder_is_not_deleted(
    request_: dict[str, Any], name: str, restart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(output_folder, "_commit", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            eutectic.merge(**request_)
    (work_of(request_) / name).write_text("mine")
    with pytest.raises(ResumeError, match=f"not an unfinished merge.*'{name}'"):
        eutectic.merge(**request_, restart=restart)
    assert (work_of(request_) / name).read_text() == "mine"
    (work_of(request_) / name).unlink()
    assert eutectic.merge(**request_, restart=restart).resumed is not restart


@pytest.mark.parametrize("restart", [False, True])
def test_an_empty_journal_beside_other_files_is_no_merges(
    request_: dict[str, Any], restart: bool
) -> None:
    work = work_of(request_)
    work.mkdir()
    (work / JOURNAL).touch()
    (work / DELTAS).write_text("mine")
    with pytest.raises(ResumeError, match="not the journal of a merge"):
        eutectic.merge(**request_, restart=restart)
    assert (work / DELTAS).read_text() == "mine"
    (work / DELTAS).unlink()  # alone it is what a kill leaves
    eutectic.merge(**request_, restart=restart)
    assert not work.exists()


def test_what_comes_into_the_work_folder_meanwhile_is_left_and_told(
    request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = output_folder._commit

    def with_a_guest(model: Path, output: Path) -> None:
        (model.parent / "notes.txt").write_text("mine")
        commit(model, output)

    monkeypatch.setattr(output_folder, "_commit", with_a_guest)
    report = eutectic.merge(**request_)
    (note,) = [n for n in report.note_records if n.kind == "work_folder_left"]
    assert note.level == "warning" and "notes.txt" in note.text
    assert [p.name for p in work_of(request_).iterdir()] == ["notes.txt"]


def _killed_while(point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a merge end like a killed process: between tensors, or between side files."""
    if point == "tensors":
        add = Journal.add

        def stop(self: Journal, stage: str, tensor: str, finished: Any) -> None:
            add(self, stage, tensor, finished)
            if stage == "merge":
                raise Killed

        monkeypatch.setattr(Journal, "add", stop)
    else:
        monkeypatch.setattr(model_folder, "card", lambda _: (_ for _ in ()).throw(Killed))


@pytest.mark.parametrize("point", ["tensors", "side files"])
@pytest.mark.parametrize("name", ["notes.txt", "README.md", "experts/a/mine.json", "own/x.bin"])
def test_a_file_of_somebody_else_in_the_unfinished_model(
    request_: dict[str, Any], point: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = {**request_, "output": request_["output"].with_name("calm")}
    eutectic.merge(**calm)
    with monkeypatch.context() as patched:
        _killed_while(point, patched)
        with pytest.raises(Killed):
            eutectic.merge(**request_)
    mine = work_of(request_) / "model" / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    for restart in (False, True):
        with pytest.raises(ResumeError, match=f"holds {name}, which no merge wrote"):
            eutectic.merge(**request_, restart=restart)
        assert mine.read_text() == "mine"
        assert not request_["output"].exists()
    mine.unlink()
    report = eutectic.merge(**request_)
    assert report.resumed or point == "tensors"
    made = digests(request_["output"])
    assert made == digests(calm["output"])
    assert {p.name for p in request_["output"].parent.iterdir()} == {"calm", "m"}


def test_a_file_put_into_the_model_while_it_is_written_is_not_published(
    request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = output_folder.run_schedule
    mine = work_of(request_) / "model/notes.txt"

    def meanwhile(*given: Any) -> Any:
        done = schedule(*given)
        mine.write_text("mine")
        return done

    with monkeypatch.context() as patched:
        patched.setattr(output_folder, "run_schedule", meanwhile)
        with pytest.raises(ResumeError, match="holds notes.txt, which no merge wrote"):
            eutectic.merge(**request_)
    assert mine.read_text() == "mine"
    mine.rename(request_["output"].with_name("notes.txt"))
    assert eutectic.merge(**request_).resumed
    assert not (request_["output"] / "notes.txt").exists()


def test_restart_after_a_kill_among_the_side_files_leaves_nothing_behind(
    request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        _killed_while("side files", patched)
        with pytest.raises(Killed):
            eutectic.merge(**request_)
    assert not eutectic.merge(**{**request_, "method": "ties"}, restart=True).resumed
    assert [p.name for p in request_["output"].parent.iterdir()] == ["m"]


def _cut(file: Path) -> None:
    os.truncate(file, 100)


def _removed(file: Path) -> None:
    file.unlink()


def _removed_with_its_folder(file: Path) -> None:
    shutil.rmtree(file.parent)


def _all_removed(file: Path) -> None:
    shutil.rmtree(file.parents[1])


def _replaced_by_another(file: Path) -> None:
    file.unlink()
    file.write_bytes(b"x" * 5000)


@pytest.mark.parametrize("when", ["first", "middle", "last", "side files"])
@pytest.mark.parametrize(
    "damage", [_cut, _removed, _removed_with_its_folder, _all_removed, _replaced_by_another]
)
def test_weights_that_somebody_damages_while_they_are_written(
    request_: dict[str, Any],
    damage: Callable[[Path], None],
    when: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calm = {**request_, "output": request_["output"].with_name("calm")}
    eutectic.merge(**calm)
    file, add, card = work_of(request_) / "model/model.safetensors", Journal.add, model_folder.card
    tensors = len(load_file(calm["output"] / "model.safetensors"))
    at = {"first": 1, "middle": tensors // 2, "last": tensors, "side files": -1}[when]
    seen: list[str] = []

    def watched(self: Journal, stage: str, tensor: str, finished: Any) -> None:
        add(self, stage, tensor, finished)
        if stage == "merge":
            seen.append(tensor)
            if len(seen) == at:
                damage(file)

    def meanwhile(provenance: Any) -> str:
        damage(file)
        return card(provenance)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "add", watched)
        if when == "side files":
            patched.setattr(model_folder, "card", meanwhile)
        with pytest.raises((OutputError, ResumeError), match="model"):
            eutectic.merge(**request_, threads=1)
    assert not request_["output"].exists()
    try:
        eutectic.merge(**request_)
    except ResumeError as error:  # another header: it says what to do
        assert f"remove {file.parent}" in str(error) or "Move it away" in str(error)  # noqa: PT017
        shutil.rmtree(file.parent)
        eutectic.merge(**request_)
    assert digests(request_["output"]) == digests(calm["output"])


def _rewritten(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-4] + bytes(4))


def _sampled(path: Path) -> None:
    """Change values in place, and say that nothing has been changed."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = bytes(len(content) - start)
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replaced(path: Path) -> None:
    aside = path.with_name("aside")
    shutil.copyfile(path, aside)
    _rewritten(aside)
    aside.replace(path)


@pytest.mark.parametrize("change", [_rewritten, _sampled, _replaced])
@pytest.mark.parametrize(("folder", "called"), [("base", "the base"), ("b", "expert 'b'")])
def test_an_input_that_changes_is_noticed_before_the_model_gets_its_name(
    request_: dict[str, Any],
    folder: str,
    called: str,
    change: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schedule = output_folder.run_schedule
    file = Path(request_["base"]).parent / folder / "model.safetensors"
    content = file.read_bytes()

    def changing(*given: Any) -> Any:
        done = schedule(*given)
        change(file)
        return done

    with monkeypatch.context() as patched:
        patched.setattr(output_folder, "run_schedule", changing)
        with pytest.raises(CheckpointError, match=f"^{called}: changed while"):
            eutectic.merge(**request_)
    assert not request_["output"].exists()
    file.write_bytes(content)
    assert not eutectic.merge(**request_, restart=True).resumed


def test_a_pickle_that_is_cut_off_while_it_is_read(
    request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read by positions, never mapped: a cut ends the merge, not the process."""
    folder = Path(request_["base"]).parent / "b"
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    add = Journal.add

    def meanwhile(self: Journal, stage: str, tensor: str, finished: Any) -> None:
        add(self, stage, tensor, finished)
        os.truncate(folder / "pytorch_model.bin", 300)

    monkeypatch.setattr(Journal, "add", meanwhile)
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        eutectic.merge(**request_, threads=1)
    assert not request_["output"].exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "vocab.txt"])
@pytest.mark.parametrize(("folder", "called"), [("base", "the base"), ("b", "expert 'b'")])
def test_a_side_file_that_changes_is_noticed_before_the_model_gets_its_name(
    request_: dict[str, Any],
    name: str,
    folder: str,
    called: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schedule = output_folder.run_schedule
    file = Path(request_["base"]).parent / folder / name
    if name != "config.json":
        file.write_text('{"a": 1}')

    def changing(*given: Any) -> Any:
        done = schedule(*given)
        file.write_text('{"model_type": "another"}')
        return done

    with monkeypatch.context() as patched:
        patched.setattr(output_folder, "run_schedule", changing)
        with pytest.raises(CheckpointError, match=f"{called}: changed while"):
            eutectic.merge(**request_, side_files=folder)
    assert not request_["output"].exists()
    assert not eutectic.merge(**request_, side_files=folder, restart=True).resumed


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks /proc what is open")
def test_nothing_of_the_work_folder_is_open_when_it_is_removed(
    request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    discard, seen = LocalDisk.discard, []

    def watched(self: LocalDisk, folder: Path, names: Any) -> Any:
        for descriptor in Path("/proc/self/fd").iterdir():
            try:
                opened = descriptor.readlink()
            except OSError:
                continue
            assert not opened.is_relative_to(folder), opened
        seen.append(folder)
        return discard(self, folder, names)

    monkeypatch.setattr(LocalDisk, "discard", watched)
    eutectic.merge(**request_)
    assert seen == [work_of(request_)]


@pytest.mark.parametrize("failures", [1, 2])
def test_a_work_folder_that_cannot_be_removed_does_not_undo_the_merge(
    request_: dict[str, Any], failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    discard, calls = LocalDisk.discard, []

    def failing(self: LocalDisk, folder: Path, names: Any) -> Any:
        calls.append(folder)
        if len(calls) <= failures:
            raise OSError(39, "Directory not empty")
        return discard(self, folder, names)

    monkeypatch.setattr(LocalDisk, "discard", failing)
    report = eutectic.merge(**request_)
    assert request_["output"].is_dir()
    told = [n for n in report.note_records if n.kind == "work_folder_left"]
    assert bool(told) is work_of(request_).exists() is (failures == 2)
    if told:
        assert "Directory not empty" in told[0].text and str(work_of(request_)) in told[0].text


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def _leading_out(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def _unreadable(path: Path) -> None:
    path.write_text("x")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root reads everything")


def _list(path: Path) -> None:
    path.write_text("[1]")


def _no_json(path: Path) -> None:
    path.write_text("{")


BAD = {
    "tokenizer.json": (_pipe, _dangling, _leading_out, _unreadable),
    "LICENSE": (_pipe, _dangling),
    "config.json": (_list, _no_json),
}


@pytest.mark.parametrize(
    ("name", "make"), [(name, make) for name, makes in BAD.items() for make in makes]
)
@pytest.mark.parametrize("whose", ["base", "an expert with a head", "side_files"])
def test_side_files_that_cannot_be_copied_are_found_before_any_tensor(
    request_: dict[str, Any],
    name: str,
    make: Callable[[Path], None],
    whose: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(request_["base"]).parent / ("base" if whose == "base" else "b")
    if whose == "an expert with a head":
        content = make_expert(make_base(layers=1, width=8), 1)
        save(folder, {**content, "classifier.weight": torch.ones(3, 8)})
    elif whose == "side_files":
        request_["side_files"] = "b"
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    monkeypatch.setattr(output_folder, "run_schedule", lambda *_: pytest.fail("begun"))
    with pytest.raises(EutecticError, match=name):
        eutectic.merge(**request_)
    assert not list(request_["output"].parent.iterdir())


def test_side_files_that_are_not_copied_do_not_matter(request_: dict[str, Any]) -> None:
    folder = Path(request_["base"]).parent
    (folder / "b/config.json").write_text("{}")
    (folder / "a/tokenizer.json").symlink_to("nowhere")
    eutectic.merge(**request_, side_files="b")
    assert not (request_["output"] / "tokenizer.json").exists()


def test_two_sweeps_into_one_folder(request_: dict[str, Any]) -> None:
    output = request_.pop("output")
    lock = LocalDisk().lock(output)
    with pytest.raises(RequestError, match="another process is sweeping into"):
        sweep(request_, output=output, mixtures=[0.5])
    lock.release()
    assert list(sweep(request_, output=output, mixtures=[0.5])) == [0.5]
    assert [p.name for p in output.parent.iterdir()] == [output.name]


def test_a_sweep_whose_merge_was_killed_at_the_very_end(
    request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = request_.pop("output")
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "remove_folder", _before_removal)
        with pytest.raises(Killed):
            sweep(request_, output=output, mixtures=[0.5])
    sweep(request_, output=output, mixtures=[0.5])
    assert [p.name for p in output.iterdir()] == ["0.5"]


def test_missing_folders_above_are_made(request_: dict[str, Any]) -> None:
    eutectic.merge(**{**request_, "output": request_["output"] / "a/b"})
    assert [p.name for p in (request_["output"] / "a").iterdir()] == ["b"]


def _calls() -> list[tuple[Any, str]]:
    names = ["fsync", "replace", "rename", "link", "mkdir", "ftruncate", "unlink", "rmdir"]
    return [(os, name) for name in (*names, "pwrite", "posix_fallocate") if hasattr(os, name)]


@pytest.mark.parametrize("end", [Killed, OSError], ids=["killed", "failed"])
def test_a_run_that_ends_at_any_call_is_finished_by_the_same_command(
    request_: dict[str, Any], end: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """System calls that change something end the run, or fail in it once."""
    for i, name in enumerate("ab"):  # with heads, so that folders of experts are written
        content = make_expert(make_base(layers=1, width=8), i)
        folder = Path(request_["base"]).parent / name
        save(folder, {**content, "classifier.weight": torch.ones(i + 2, 8)})
    counted = {"calls": 0, "last": -1}

    def ending(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **more: Any) -> Any:
            if not str(given[0]).endswith(".lock"):
                counted["calls"] += 1
                if counted["calls"] == counted["last"]:
                    raise end(*((28, "No space left on device") if end is OSError else ()))
            return original(*given, **more)

        return call

    def attempt(last: int) -> bool:
        counted.update(calls=0, last=last)
        with monkeypatch.context() as patched:
            for owner, name in _calls():
                patched.setattr(owner, name, ending(getattr(owner, name)))
            try:
                eutectic.merge(**request_, threads=1)
            except (Killed, EutecticError, OSError):
                return False
        return True

    output = request_["output"]
    assert attempt(-1)
    expected, calls = digests(output), counted["calls"]
    assert calls > 30
    # All of them take most of a minute; the last ones are where there is most to go wrong.
    chance = random.Random(os.environ.get("EUTECTIC_KILLS", "0"))
    for last in [*chance.sample(range(1, calls - 7), 8), *range(calls - 7, calls + 1)]:
        shutil.rmtree(output)
        if not attempt(last):
            eutectic.merge(**request_, threads=1)
        assert digests(output) == expected, last
        assert [p.name for p in output.parent.iterdir()] == ["m"], last
