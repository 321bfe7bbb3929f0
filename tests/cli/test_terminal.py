"""What a person sees at 80 columns: names whole, intervals on one line, times with their names."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eutectic.cli import console
from eutectic.cli.console import folded, print_named, progress_bar
from eutectic.cli.main import app
from eutectic.cli.tune import known_scale, show_curve
from eutectic.errors import Note
from helpers.configs import tiny_model
from helpers.folders import make_base, make_expert, save


class Screen:
    """A terminal of 80 columns; what it shows once lines that were written over are gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.streams = {"out": io.StringIO(), "err": io.StringIO()}
        for used, stream in (
            (console.out, "out"),
            (console.err, "err"),
            (console._terminal, "err"),
        ):
            monkeypatch.setattr(used, "_file", self.streams[stream])
            monkeypatch.setattr(used, "_force_terminal", True)
            monkeypatch.setattr(used, "_width", 80)
            monkeypatch.setattr(used, "_color_system", None)
            monkeypatch.setattr(used, "is_interactive", True)
        monkeypatch.setenv("TERM", "xterm")

    @property
    def out(self) -> list[str]:
        return self.streams["out"].getvalue().splitlines()

    @property
    def err(self) -> str:
        return self.streams["err"].getvalue()


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    yield Screen(monkeypatch)
    console.doing("")


def run(*words: object) -> None:
    app([str(word) for word in words], standalone_mode=False)


@given(st.lists(st.text("ab._/-", min_size=1, max_size=12), min_size=1), st.integers(4, 30))
def test_folding_loses_nothing(parts: list[str], room: int):
    name = ".".join(parts)
    first, *others = folded(name, room).split("\n")
    assert all(line.startswith("  ") for line in others)
    assert first + "".join(line[2:] for line in others) == name
    assert all(len(line) <= max(room, 8) for line in (first, *others))


@pytest.mark.parametrize("kind", ["CLIPModel", "T5ForConditionalGeneration"])
def test_rows_of_a_plan_do_not_look_alike(kind: str, screen: Screen, tmp_path: Path):
    for name in ("base", "a", "b"):
        tiny_model(kind).save_pretrained(tmp_path / name)
    experts = [f"{name}={tmp_path / name}" for name in "ab"]
    run("plan", "--base", tmp_path / "base", "-m", "iso_c", *experts)
    assert max(map(len, screen.out)) <= 80 and not any("…" in line for line in screen.out)
    # A row and the lines that go on with its name.
    text = "\n".join(screen.out[1:]).partition("\nshares")[0]
    rows = [re.sub(r"\n  ", "", row) for row in re.split(r"\n(?!  )", text)]
    assert len(rows) == len(set(rows)) >= 19
    towers = ("text_model.", "vision_model.") if kind == "CLIPModel" else ("encoder.", "decoder.")
    assert all(any(row.startswith(tower) for row in rows) for tower in towers)


def test_a_wide_table_becomes_several(screen: Screen):
    names = ["a/long/name/of/a/merged/model", "a/long/name/of/a/merged/other"]
    groups = [[(f"task{i}\nloss ↓", ["0.123 [0.100, 0.200]"] * 2)] for i in range(5)]
    print_named(names, groups)
    assert max(map(len, screen.out)) <= 80
    assert sum(line.count("0.123 [0.100, 0.200]") for line in screen.out) == 10
    assert sum(line.count("↓") for line in screen.out) == 5
    assert sum("other" in line for line in screen.out) == 3  # two tasks a table


def tasks_of_functions(folder: Path) -> Path:
    """Write two tasks whose figures a function makes: one model is 1, the other nearly so."""
    (folder / "scores.py").write_text(
        "def score(folder, rows, end=0):\n"
        "    good = {'base': 2, 'a': 9, 'far': 3}.get(folder.rsplit('/', 1)[1], 8)\n"
        "    return [float((i * 7 + end) % 10 < good) for i in range(40)]\n"
    )
    lines = [
        f"  {name}: {{kind: function, function: scores.py:score, expert: a, options: {{end: {i}}}}}"
        for i, name in enumerate(("first", "second"))
    ]
    (folder / "tasks.yaml").write_text("\n".join(["tasks:", *lines, ""]))
    return folder / "tasks.yaml"


def test_an_evaluation_at_80_columns(screen: Screen, tmp_path: Path):
    base = make_base(layers=1, width=8)
    merged = ["merged_with_iso_c_default", "merged_with_iso_c_searched", "far"]
    for i, name in enumerate(("base", "a", *merged)):
        save(tmp_path / name, base if name == "base" else make_expert(base, i))
    words: list[Any] = ["evaluate", *(f"{n}={tmp_path / n}" for n in merged), "--trust-code"]
    words += ["-t", tasks_of_functions(tmp_path), "--base", tmp_path / "base"]
    run(*words, "-e", f"a={tmp_path / 'a'}")
    assert max(map(len, screen.out)) <= 80
    text = "\n".join(screen.out)
    # Both names are there in full, and intervals on the lines of their numbers.
    for name in merged[:2]:
        assert text.count(name) >= 4
    assert text.count("[") == text.count("]") and not re.search(r"\[[^\]]*\n", text)
    assert "NAI: 0 is the base, 1 the expert; higher is better" in text
    best = next(line for line in screen.out if line.startswith("best"))
    assert "not distinguishable" in best and "far" not in " ".join(screen.out).split("best ")[1]


@pytest.mark.parametrize(
    ("tolerance", "shown"), [(0.05, "0.33"), (0.01, "0.33"), (0.001, "0.332"), (None, "0.33")]
)
def test_a_scale_is_shown_to_the_digits_that_are_known(tolerance: float | None, shown: str):
    search = {"search": "divergence"} | ({} if tolerance is None else {"tolerance": tolerance})
    assert known_scale(0.331554, search) == shown
    assert known_scale(0.331554, None) == "0.331554"


def test_a_curve_of_many_tasks_fits(screen: Screen):
    parts = {f"task_{i}": 0.9 for i in range(12)}
    points = [{"scale": s, "value": s, "parts": parts} for s in (0.1, 0.5, 1.0)]
    show_curve({"scale": 0.5, "points": points, "maximise": True})
    assert max(map(len, screen.out)) <= 80
    text = "\n".join(screen.out)
    assert all(name in text for name in parts) and "objective ↑" in text and "0.5 ◀" in text


def test_one_bad_value_leaves_the_bars_apart(screen: Screen):
    values = {0.1: 0.62, 0.2: 0.55, 0.4: 0.48, 0.8: 0.45, 1.0: 0.453, 1.5: 0.5, 2.0: None, 3.0: 40}
    points = [{"scale": s, "value": v, "parts": {}} for s, v in values.items()]
    show_curve({"scale": 0.8, "points": points})
    rows = {line.split()[0]: line for line in screen.out[1:-1]}
    filled = {name: row.count("█") for name, row in rows.items()}
    assert filled["0.8"] == 1 < filled["1"] + 1 <= filled["0.4"] < filled["1.5"] < filled["0.2"]
    assert rows["3"].endswith("»") and filled["2"] == 0
    assert screen.out[-1].startswith("bars from 0.45 to 0.") and "outside" in screen.out[-1]


def test_times_have_names(screen: Screen):
    with progress_bar("merging") as tell:
        tell(1, 4, "text_model.encoder.layers.11.self_attn.q_proj.weight")
        time.sleep(0.3)
        tell(2, 4, "text_model.encoder.layers.11.self_attn.q_proj.weight")
        time.sleep(0.2)
    assert "elapsed" in screen.err and "left" in screen.err and "…" in screen.err
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.err)
    assert max(map(len, re.split(r"[\r\n]", plain))) <= 80


def test_silence_says_what_is_being_done(screen: Screen, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("eutectic.cli.waiting._SILENCE", 0.05)
    console.doing("reading headers")
    time.sleep(0.3)
    assert "reading headers …" in screen.err
    console.out.print("found")
    assert screen.out == ["found"]
    console.doing("")
    before = screen.err
    time.sleep(0.2)
    assert screen.err == before
    with progress_bar("merging", "reading"):
        console.doing("planning")
        time.sleep(0.2)
    assert "planning …" not in screen.err


def test_warnings_and_errors_wrap_between_words(screen: Screen, tmp_path: Path) -> None:
    note = Note("scale_far_out", (), {"scale": 9.0, "method": "iso_c", "usual": 1.3}, "warning")
    console.tell_notes([note])
    console.print_sentence("a-word-of-some-length " * 20, "error:", "bold red")
    lines = [line for line in screen.err.split("\n") if line.strip()]
    assert lines[0].startswith("warning: scale 9 is far")
    assert len(lines) > 6 and all(len(line.rstrip()) <= 80 for line in lines)
    words = " ".join(lines).split()
    assert words.count("a-word-of-some-length") == 20  # none is broken at the edge


def test_elsewhere_a_warning_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_sentence("word " * 40, "warning:")
    assert capsys.readouterr().err.count("\n") == 1


def test_checks_and_calibrations_keep_names_whole(screen: Screen, tmp_path: Path) -> None:
    name = "a_name_of_an_expert_that_is_long_enough_to_be_cut_by_tables"
    save(tmp_path / name, make_base())
    save(tmp_path / f"{name}_2", make_base())
    run("check", tmp_path / name, tmp_path / f"{name}_2")
    assert all(len(line.rstrip()) <= 80 for line in screen.out)
    assert "…" not in "".join(screen.out)
    whole = "".join("".join(screen.out).split())
    assert f"{name}_2" in whole
