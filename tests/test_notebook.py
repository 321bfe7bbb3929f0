"""In notebooks: tables of what is returned, and bars while work is done."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import eutectic
from eutectic.notebook import Bar, in_notebook, with_bar
from eutectic.routed import RouterQuality
from eutectic.statistics import collect
from eutectic.tables import facts, table
from helpers.folders import make_base, make_expert, save


class Shown:
    """What a notebook has shown: the states of every bar."""

    def __init__(self) -> None:
        self.bars: list[list[str]] = []

    def display(self, markup: str, display_id: bool) -> Any:
        assert display_id
        states = [markup]
        self.bars.append(states)
        return SimpleNamespace(update=states.append)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Shown:
    shown = Shown()
    shell, pictures = ModuleType("IPython"), ModuleType("IPython.display")
    shell.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    pictures.HTML = str  # type: ignore[attr-defined]
    pictures.display = shown.display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", pictures)
    return shown


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("notebook")
    base = make_base(layers=2, width=8)
    experts = {name: save(folder / name, make_expert(base, i)) for i, name in enumerate("ab")}
    return {"base": save(folder / "base", base), "experts": experts, "method": "iso_c"}


class Balanced(HTMLParser):
    """Whether every element is closed, and which texts there are."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(markup)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_only_kernels_are_notebooks(monkeypatch: pytest.MonkeyPatch, notebook: Shown) -> None:
    assert in_notebook()
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: SimpleNamespace())
    assert not in_notebook()
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: None)
    assert not in_notebook()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not in_notebook()


def test_a_merge_shows_a_bar_and_ends_it(
    notebook: Shown, inputs: dict[str, Any], tmp_path: Path
) -> None:
    eutectic.merge(**inputs, output=tmp_path / "out")
    (states,) = notebook.bars
    assert "merging" in states[0] and "done" in states[-1] and 'value="1"' in states[-1]
    with pytest.raises(eutectic.EutecticError):
        eutectic.merge(**{**inputs, "base": tmp_path / "none"}, output=tmp_path / "never")
    assert "stopped" in notebook.bars[1][-1]


def test_collections_and_adapters_show_theirs(
    notebook: Shown, inputs: dict[str, Any], tmp_path: Path
) -> None:
    collect(torch.nn.Linear(4, 3), [torch.randn(5, 4)] * 3)
    eutectic.extract(inputs["experts"]["a"], base=inputs["base"], output=tmp_path / "adapter",
                     rank=2, others="drop")  # fmt: skip
    eutectic.check(inputs["base"])
    eutectic.inspect(base=inputs["base"], experts=inputs["experts"])
    assert [states[0].split()[0] for states in notebook.bars] == [
        "<div>collecting", "<div>extracting", "<div>reading", "<div>inspecting",
    ]  # fmt: skip
    assert all("done" in states[-1] for states in notebook.bars)


def test_ones_own_progress_wins_and_nothing_is_shown_elsewhere(
    notebook: Shown, inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    eutectic.merge(**inputs, output=tmp_path / "a", progress=lambda done, *_: told.append(done))
    assert told and not notebook.bars
    monkeypatch.delitem(sys.modules, "IPython")
    eutectic.merge(**inputs, output=tmp_path / "b")
    assert not notebook.bars


def test_a_bar_tells_shares_and_times(notebook: Shown) -> None:
    now = [0.0]
    bar = Bar("<merging>", clock=lambda: now[0])
    now[0] = 10.0
    bar(1, 4, "layer <0>")
    bar(2, 4, "too soon to be shown")
    now[0] = 90.0
    bar(3, 4, "last")
    bar.close("done")
    shown = notebook.bars[0]
    assert "&lt;merging&gt;" in shown[0] and "<merging>" not in shown[0]
    assert "25%, 0:10 elapsed, 0:30 left, layer &lt;0&gt;" in shown[1]
    assert "75%, 1:30 elapsed, 0:30 left, last" in shown[2]
    assert len(shown) == 4 and "1:30 elapsed, done" in shown[3]
    unknown = Bar("collecting", clock=lambda: now[0])
    now[0] = 91.0
    unknown(5, None)
    assert "<progress></progress>" in notebook.bars[1][-1]


def test_the_decorated_function_is_as_before(notebook: Shown) -> None:
    @with_bar("adding")
    def add(first: int, second: int = 2, *, progress: Any = None) -> int:
        """Add."""
        progress(1, 2, "x")
        return first + second

    assert add(1) == 3 and add.__doc__ == "Add." and add.__name__ == "add"
    assert len(notebook.bars) == 1


def test_reports_are_tables(inputs: dict[str, Any], tmp_path: Path) -> None:
    quality = RouterQuality(True, 0.5, {"a": 3}, {"h.0.q": {"a": 0.5}}, {"a": 0.25})
    found = [
        eutectic.plan(**inputs), eutectic.merge(**inputs, output=tmp_path / "out"),
        collect(torch.nn.Linear(4, 3), [torch.randn(5, 4)], tmp_path / "s"),
        eutectic.check(inputs["base"]), eutectic.methods(), quality,
        eutectic.inspect(base=inputs["base"], experts=inputs["experts"]),
    ]  # fmt: skip
    for one in found:
        html = Balanced(one._repr_html_())
        assert "table" in html.tags and html.tags <= {
            "div", "p", "b", "table", "thead", "tbody", "tr", "th", "td", "br"
        }  # fmt: skip
        words = " ".join(" ".join(html.texts).split())
        first = repr(one).split()[0].rstrip(":")
        assert first in words or "iso_c" in words
    assert "25.0%" in quality._repr_html_()


def test_texts_in_tables_do_nothing() -> None:
    bad = "<script>alert(1)</script>\x1b[2J"
    for shown in (facts(bad, {bad: f"a\n{bad}"}), table([bad, "n"], [[bad, "1"]] * 50, most=3)):
        assert "<script" not in shown.html and "\x1b" not in shown.html
        Balanced(shown.html)
    assert "47 more rows" in table(["a"], [["1"]] * 50, most=3).html
