"""Every block of code in README and guides does what it says, on tiny models of the same names."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch

import eutectic
from docs.before import BEFORE, Before
from docs.blocks import ROOT, Block, blocks_of, commands, run_block
from docs.world import build
from eutectic.methods import registry

PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "index.md",
    *sorted((ROOT / "docs" / "guides").glob("*.md")),
    ROOT / "docs" / "routing.md",
    ROOT / "docs" / "calibration.md",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guides") / "world"
    folder.mkdir()
    build(folder)
    return folder


def names() -> dict[str, Any]:
    """Return what a reader's program has at hand: the package, state dicts, matrices."""
    generator = torch.Generator().manual_seed(0)
    state = {"layer.weight": torch.randn(6, 4, generator=generator)}
    others = [{k: v + 0.1 * i for k, v in state.items()} for i in (1, 2)]
    return {
        "eutectic": eutectic,
        "base_sd": state,
        "sd_a": others[0],
        "sd_b": others[1],
        "base": state,
        "sd1": others[0],
        "sd2": others[1],
        "deltas": torch.randn(3, 6, 4, generator=generator),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks(page: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of(page)
    if not blocks:
        pytest.skip("no code")
    folder = tmp_path / "here"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr("webbrowser.open", lambda url: True)
    module = ModuleType("guide")  # where dataclasses look for their names
    module.__dict__.update(names())
    monkeypatch.setitem(sys.modules, "guide", module)
    known = vars(module)
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    before = BEFORE.get(page.stem, Before())
    for name, held in before.copies.items():
        copy = shutil.copytree if (folder / held).is_dir() else shutil.copy
        (folder / name).parent.mkdir(exist_ok=True)
        copy(folder / held, folder / name)
    for name in before.without:
        (folder / name).unlink()
    for language in ("bash", "python"):
        text = getattr(before, language)
        run_block(Block(f"before {page.stem}", 0, language, text, None), folder, known)
    for block in blocks:
        if block.why_not is None:
            run_block(block, folder, known)


def test_a_block_that_is_not_run_says_why() -> None:
    left_out = [b for page in PAGES for b in blocks_of(page) if b.why_not is not None]
    assert all(len(block.why_not or "") > 8 for block in left_out)


def test_commands_are_read_as_a_shell_reads_them() -> None:
    text = "eutectic a \\\n  b  # why\n\ngit clone x && cd x\neutectic c --json | jq ."
    assert commands(text) == [
        ["eutectic", "a", "b"],
        ["git", "clone", "x"],
        ["cd", "x"],
        ["eutectic", "c", "--json"],
    ]


def test_blocks_are_found_with_their_marks(tmp_path: Path) -> None:
    page = ROOT / "docs" / "guides" / "remote.md"
    (first, *_) = blocks_of(page)
    assert first.language == "bash" and (first.why_not or "").startswith("buckets")
    assert not [b for b in blocks_of(ROOT / "docs" / "guides" / "compare.md") if b.why_not]


def test_every_page_stands_once_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    named = re.findall(r": ([\w/-]+\.md)", text)
    there = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    methods = {name for name in there if name.startswith("methods/")} - {"methods/index.md"}
    assert sorted(named) == sorted(there - methods)
