"""The site finds every method's page by itself."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from eutectic.methods import all_methods, all_posts

DOCS = Path(__file__).parents[1] / "docs"


def test_methods_come_from_the_registry() -> None:
    hook: dict[str, Any] = runpy.run_path(str(DOCS / "method_pages.py"))
    config = hook["on_config"]({"nav": [{"Start": "index.md"}, {"Methods": []}]})
    pages = {name: page for entry in config["nav"][1]["Methods"] for name, page in entry.items()}
    assert set(pages) == {"Overview", *all_methods(), *all_posts()}
    assert all((DOCS / page).is_file() for page in pages.values())

    page = SimpleNamespace(file=SimpleNamespace(src_uri="methods/index.md"))
    text = (DOCS / "methods" / "index.md").read_text(encoding="utf-8")
    overview: str = hook["on_page_markdown"](text, page)
    assert overview.count(".md) |") == len(all_methods()) + len(all_posts())
    assert "| [esm](esm.md) | essential | gram | 1 | Fuse" in overview
