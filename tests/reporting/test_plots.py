"""Pictures: what is named, in which order, and that their titles say what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from eutectic import evaluate, inspect
from eutectic.errors import RequestError
from eutectic.evaluation import load_tasks
from eutectic.reporting import plots, result_plots
from helpers.folders import make_base, make_expert, save


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    drawn: dict[str, Any] = {}
    for module in (plots, result_plots):
        monkeypatch.setattr(
            module, "save_figure", lambda figure, path, dpi: drawn.update({path.stem: figure})
        )
    return drawn


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    base = make_base(layers=2, width=8)
    found = {name: tmp_path / name for name in ("base", "a", "b", "merged")}
    for seed, (name, folder) in enumerate(found.items()):
        save(folder, base if name == "base" else make_expert(base, seed))
    return found


def test_layers_stand_from_input_to_output_and_titles_say_what_was_found(
    folders: dict[str, Path], figures: dict[str, Any], tmp_path: Path
):
    found = inspect(
        base=folders["base"],
        experts={n: folders[n] for n in "ab"},
        merged={"mine": folders["merged"]},
        plots=tmp_path / "plots",
    )
    names = [layer.name for layer in found.layers]
    blocks = [int(n.split("layers.")[1].split(".")[0]) for n in names if "layers." in n]
    assert blocks == sorted(blocks) and len(set(blocks)) == 2
    outputs = [i for i, n in enumerate(names) if "lm_head" in n]
    assert not outputs or outputs == [len(names) - 1]

    norms = {n: t.relative_norm for n, t in found.summary.tasks.items()}
    largest = max(norms, key=lambda n: norms[n] or 0)
    title = figures["norms"].axes[0].get_title()
    assert title.startswith(f"{largest}'s change is the largest: ")
    assert f"{100 * (norms[largest] or 0):.2g} %" in title
    assert "a and b interfere most" in figures["interference"].get_suptitle()
    held = found.summary.merged["mine"].sar or 0
    assert f"mine holds {100 * held:.0f} %" in figures["alignment"].get_suptitle()
    ticks = [t.get_text() for t in figures["alignment"].axes[0].get_yticklabels()]
    assert ticks == [n.replace(".weight", "") for n in names]
    for figure in figures.values():
        width, height = figure.get_size_inches()
        assert width <= 20 and height <= plots.TALLEST


def tasks_of_functions(folder: Path) -> Path:
    (folder / "scores.py").write_text(
        "def score(folder, rows, end=0):\n"
        "    good = {'base': 2, 'a': 9, 'b': 9, 'merged': 7}.get(folder.rsplit('/', 1)[1], 1)\n"
        "    return [float((i * 7 + end) % 10 < good) for i in range(40)]\n"
    )
    (folder / "tasks.yaml").write_text(
        "tasks:\n"
        "  first: {kind: function, function: scores.py:score, expert: a}\n"
        "  second: {kind: function, function: scores.py:score, expert: b, options: {end: 1}}\n"
    )
    return folder / "tasks.yaml"


def test_results_as_bars_and_marks(
    folders: dict[str, Path], figures: dict[str, Any], tmp_path: Path
):
    results = evaluate(
        load_tasks(tasks_of_functions(tmp_path)),
        base=folders["base"],
        experts={n: folders[n] for n in "ab"},
        models={"good": folders["merged"], "bad": save_another(folders, tmp_path)},
        trust_code=True,
    )
    result_plots.draw_results(results, tmp_path / "results.svg")
    means, tasks = figures["results"].axes
    shares = {m.checkpoint: 100 * (m.normalized or 0) for m in results.means}
    widths = [bar.get_width() for bar in means.patches]
    assert widths == pytest.approx(list(shares.values()))
    assert [t.get_text() for t in means.get_yticklabels()] == list(shares)
    assert shares["good"] == pytest.approx(100 * 7 / 9)
    assert [t.get_text() for t in tasks.get_yticklabels()] == ["first", "second"]
    assert [line.get_label() for line in tasks.lines] == ["base", "good", "bad"]
    assert "good keeps 77.8 % of the experts" in figures["results"].get_suptitle()
    assert "distinguishably more" in figures["results"].get_suptitle()
    with pytest.raises(RequestError, match=r"ends with \.png"):
        result_plots.draw_results(results, tmp_path / "results.txt")


def save_another(folders: dict[str, Path], folder: Path) -> Path:
    save(folder / "other", make_expert(make_base(layers=2, width=8), 9))
    return folder / "other"
