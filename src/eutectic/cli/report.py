"""`eutectic report`."""

from __future__ import annotations

import json as encoding
from pathlib import Path
from typing import Any

from eutectic.cli.console import doing, err, out, print_json, tell_done, verb
from eutectic.cli.options import Json, argument, option
from eutectic.errors import RequestError


@verb
def report(
    *,
    sources: list[str] | None = argument(
        None,
        "Folders of merged or routed models or of a comparison, results.json, files of `inspect "
        "-o`, `plan --json` and `tune --json`, a recipe, statistics.",
        metavar="[NAME=]SOURCE…",
    ),
    output: Path | None = option(
        None, "File to write (default: report.html, .md or .json).", "--output", "-o"
    ),
    format: str | None = option(
        None, "Default: by the ending of the file.", "--format", "-f", metavar="html | md | json"
    ),
    title: str | None = option(None, "Title of the page (default: the sources' names)."),
    open: bool = option(False, "Open the page in the browser.", "--open"),
    json: Json = False,
) -> None:
    """Tell what merges did on one page: verdict, figures, layers, tensors, provenance.

    The page is one file that needs no network. Of several merges it says which is
    best, and which cannot be told from it. A folder that is none of the sources is
    looked through for them.

    Examples:

      eutectic report merged/ results.json -o report.html --open

      eutectic report comparison/ inspection.json iso=merged/ routed/

      eutectic report recipe.yaml -o plan.md
    """
    from eutectic.reporting.page.build import report as run

    if not sources:
        from eutectic.reporting.page.page_sources import KNOWN

        raise RequestError(
            f"nothing to report on.\nName {KNOWN}.\n"
            "Example: eutectic report merged/ results.json -o report.html"
        )
    output = output or Path(f"report.{format or 'html'}")
    doing("reading sources")
    found = run(*sources, output=output, format=format, title=title)
    doing("")
    if json:
        print_json(encoding.loads(found.json_text()))
    else:
        for finding in found.verdict:
            style = {"headline": "bold", "bad": "yellow", "good": "green"}.get(finding.level)
            out.print(finding.text, style=style, markup=False, highlight=False)
        tell_done("written", output)
    if open:
        _open(output)


def _open(page: Path) -> None:
    import webbrowser  # imports much

    if not webbrowser.open(page.absolute().as_uri()):
        err.print(f"no browser could be started; open {page} yourself.", markup=False)


def page_beside(output: Path) -> Path:
    """Return the page beside a model's folder; refuse, before any work, where it cannot be."""
    from eutectic.reporting.page.build import check_target
    from eutectic.reporting.page.html_page import check_templates
    from eutectic.storage import url_of

    page = output.with_name(output.name + ".html")
    check_templates()
    if url_of(output) is not None or page.parent.is_dir():  # else the work makes the folder
        check_target(page, "html")
    return page


def write_page(page: Path | None, source: Any, *, quiet: bool = False) -> None:
    """Write the page of a merge's report, or of a folder of several, if one was asked for."""
    if page is None:
        return
    from eutectic.reporting.page.build import report as run

    run(source, output=page)
    if not quiet:
        tell_done("page", page)
