"""The public entry: sources in, one report out, written as HTML, Markdown or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from eutectic.checkpoint.writer import check_replaced, write_atomically
from eutectic.errors import RequestError, suggest
from eutectic.reporting.page import layer_maps, origins
from eutectic.reporting.page.html_page import check_templates
from eutectic.reporting.page.markdown_page import MARK as MARK_MD
from eutectic.reporting.page.page_record import Report, Source
from eutectic.reporting.page.page_sources import Document, documents
from eutectic.reporting.page.scored_models import scores_of
from eutectic.reporting.page.source_views import ClosedFormView, CurveView
from eutectic.reporting.page.verdict import verdict
from eutectic.storage import can_hold, local_path, url_of, view
from eutectic.storage.small_files import read_start
from eutectic.versions import version

Format = Literal["html", "md", "json"]
MARK = b'<meta name="generator" content="eutectic report">'
_ENDINGS = {".html": "html", ".htm": "html", ".md": "md", ".json": "json"}
_STARTS = {"html": MARK, "md": MARK_MD.encode()}
_START_BYTES = 2_000  # within them the mark stands


def report(
    *sources: Any,
    output: str | Path | None = None,
    format: str | None = None,
    title: str | None = None,
) -> Report:
    """Tell what merges did, on one page: verdict, figures, layers, tensors, provenance.

    Args:
        *sources: what to report on, as many as wanted: folders of merged or routed models or of a
            comparison; `results.json`; files of `inspect -o`, `plan --json` and `tune --json`; a
            recipe, which is planned; statistics; or what `evaluate`, `inspect`, `plan`, `merge`,
            `tune` or `compare` returned. `"NAME=PATH"` gives a source a name. From any
            other folder, every known file in it and below it is taken.
        output: file to write; None writes nothing. It may replace an earlier report only.
        format: `html` (one page that needs nothing else), `md` (tables alone) or `json` (the
            record; its schema is in docs/schemas). None: by the ending of `output`.
        title: of the page (default: made of the sources' names).

    Returns:
        The record; `.html()`, `.markdown()` and `.json_text()` are its forms, and a notebook shows
        the page itself.

    Raises:
        RequestError: no source, or one of an unknown kind; an output that holds something else.
        MissingExtraError: HTML without jinja2.
        EutecticError: a file is damaged or cannot be written.

    No weights of a model are read. Cost: that of reading headers and JSON, well under a second for
    twelve models.

    Example:
        >>> eutectic.report("results.json", "iso_c=merged/", output="report.html")
        ... # doctest: +SKIP
    """
    target = None if output is None else local_path(output)
    form = _form(target, format)
    if target is not None:
        check_target(target, form)
        if form == "html":
            check_templates()
    found = made_of(documents(sources), title)
    if target is not None:
        text = {"html": found.html, "md": found.markdown, "json": found.json_text}[form]()
        write_atomically(target, text.encode())
    return found


def _form(output: Path | None, format: str | None) -> Format:
    by_ending = None if output is None else _ENDINGS.get(output.suffix.lower())
    form = format or by_ending or "html"
    if form not in get_args(Format):
        near = suggest(form, get_args(Format))
        raise RequestError(f"the format of a report is html, md or json; got '{form}'.{near}")
    if by_ending not in (None, form):
        raise RequestError(
            f"{output}: ends like {by_ending}, and the format asked for is {form}.\n"
            "Leave out the format, or give the file another ending."
        )
    return form  # type: ignore[return-value]


def check_target(path: Path, form: Format) -> None:
    """Refuse, before any work, a file in whose place a report must not be written."""
    view(path)
    if path.is_dir() or not can_hold(path.parent):
        raise RequestError(
            f"{path}: the report is written to a file in a folder that exists, such as report.html."
        )
    if form == "json":
        check_replaced(path, {"schema_version", "verdict", "sources"}, "the report")
    elif path.exists() and path.stat().st_size:
        try:
            ours = _STARTS[form] in read_start(path, _START_BYTES)
        except OSError:
            ours = False
        if not ours:
            raise RequestError(
                f"{path}: the report would be written there, and it holds something else.\n"
                "Choose another name."
            )


def made_of(found: Sequence[Document], title: str | None = None) -> Report:
    """Return the report of documents that were read."""
    by_kind: dict[str, list[Document]] = {}
    for document in found:
        by_kind.setdefault(document.kind, []).append(document)

    def of(kind: str) -> list[Document]:
        return by_kind.get(kind, [])

    compared = {d.name: d.content for d in of("comparison")}
    merged, plans, routed = of("merged model"), of("plan"), of("routed model")
    scores = [scores_of(d.content, d.name, compared.get(d.name)) for d in of("results")]
    curves = [
        origins.curve_of(d.name, d.content)
        for d in of("search for α")
        if isinstance(d.content, CurveView)
    ]
    curves += [
        origins.curve_of(d.name, d.content.search)
        for d in merged
        if isinstance(d.content.search, CurveView)
    ]
    merges = [origins.merge_of(d.name, d.content) for d in merged]
    merges += [origins.planned_merge(d.name, d.content) for d in plans]
    routing = [origins.routing_of(d.name, d.content) for d in routed]
    residuals = [r for d in merged for r in origins.residuals_of(d.name, d.content)]
    inspected = of("inspection")
    maps = [layer_maps.inspected_map(d.name, d.content) for d in inspected]
    maps += [layer_maps.merged_map(d.name, d.content) for d in merged]
    maps += [layer_maps.routed_map(d.name, d.content) for d in routed]
    shown = [own for own in maps if own is not None]
    data = [row for d in of("results") for row in origins.data_of_results(d.content)]
    data += [origins.data_of_statistics(d.name, d.content) for d in of("statistics")]
    data += [row for d in merged for row in origins.data_of_merge(d.content)]
    rest = {
        "routing": routing,
        "residuals": residuals,
        "maps": shown,
        "statistics": any(row.use.startswith("statistics") for row in data),
        "closed": [
            (name, own)
            for name, own in (
                *((d.name, d.content) for d in of("search for α")),
                *((d.name, d.content.search) for d in merged),
            )
            if isinstance(own, ClosedFormView)
        ],
    }
    return Report(
        eutectic=version("eutectic"),
        title=title or _title(found),
        sources=[Source(name=d.name, kind=d.kind, path=d.path) for d in found],
        verdict=verdict(scores, curves, merges, rest),
        scores=scores,
        curves=curves,
        maps=shown,
        spectra=[s for d in inspected for s in layer_maps.spectra_of(d.content)],
        pairs=[p for d in inspected for p in layer_maps.pair_tables(d.content)],
        residuals=residuals,
        routing=routing,
        tensors=[row for d in (*merged, *plans) for row in origins.tensor_rows(d.name, d.content)],
        merges=merges,
        data=list(dict.fromkeys(data)),
        grams=[
            row for d in of("statistics") for row in origins.grams_of_statistics(d.name, d.content)
        ],
        costs=_costs(found),
    )


def _title(found: Sequence[Document]) -> str:
    kinds = ("merged model", "routed model", "comparison", "plan")
    named = list(dict.fromkeys(d.name for d in found if d.kind in kinds))
    if 1 <= len(named) <= 3:
        return f"Report on {', '.join(named)}"
    if named:
        return f"Report on {len(named)} models"
    return f"Report on {found[0].kind}: {found[0].name}"


def _costs(found: Sequence[Document]) -> list[Any]:
    costs: list[Any] = []
    for d in found:
        if d.run is not None:
            costs += origins.run_costs(d.name, d.run)
        if d.kind == "plan":
            costs += origins.plan_costs(d.name, d.content)
        elif d.folder is None or url_of(d.folder) is not None:
            continue  # of a store only small files are here
        elif d.kind in ("merged model", "routed model"):
            costs += origins.folder_costs(d.name, d.folder, f"{d.kind} on disk")
        elif d.kind == "statistics":
            costs += origins.folder_costs(d.name, d.folder, "statistics on disk")
    return costs
