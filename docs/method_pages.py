"""mkdocs hook: the methods' pages in the navigation, and the overview's table, from the registry.

So a new method needs no line in `mkdocs.yml` or `docs/methods/index.md`.
"""

from __future__ import annotations

from typing import Any

from eutectic.methods import all_methods, all_posts

OVERVIEW = "methods/index.md"
MARK = "<!-- methods -->"


def on_config(config: Any) -> Any:
    """Put the page of every method, and of what follows one, under "Methods"."""
    pages = [{name: f"methods/{name}.md"} for name in [*all_methods(), *all_posts()]]
    for section in config["nav"]:
        if "Methods" in section:
            section["Methods"] = [{"Overview": OVERVIEW}, *pages]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the table of methods into their overview."""
    return markdown.replace(MARK, table()) if page.file.src_uri == OVERVIEW else markdown


def table() -> str:
    """Return one row per method, those of one family together."""
    rows = ["| method | family | needs | default scale (8 experts) | |", "|---|---|---|---|---|"]
    for method in sorted(all_methods().values(), key=lambda m: (m.family, m.name)):
        needs = ", ".join(sorted(method.needs(method.parse({})))).replace("_", " ")
        scale = f"{method.default_scale(8):g}"
        page = f"[{method.name}]({method.name}.md)"
        rows.append(f"| {page} | {method.family} | {needs} | {scale} | {method.summary} |")
    rows += ["", "What can follow any of them (`post:`, `--post`):", ""]
    rows += ["| post-processor | needs | default scale | |", "|---|---|---|---|"]
    for entry in all_posts().values():
        page, needs = f"[{entry.name}]({entry.name}.md)", sorted(entry.needs(entry.parse({})))
        listed = ", ".join(needs).replace("_", " ")
        rows.append(f"| {page} | {listed} | {entry.default_scale:g} | {entry.summary} |")
    return "\n".join(rows)
