"""The page: the record laid out by templates, with styles and scripts in one file.

The charts are SVG that Python draws, and a few lines of script sort, filter and choose. A charting
library would be a megabyte or more a page, would need styles that the content policy forbids, and
would leave readers of paper and of screen readers with a canvas.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from eutectic.errors import MissingExtraError
from eutectic.reporting.page.page_record import Report
from eutectic.words import plain

ASSETS = Path(__file__).with_name("assets")


def check_templates() -> None:
    """Raise MissingExtraError where jinja2, which makes the page, is not installed."""
    if find_spec("jinja2") is None:
        raise MissingExtraError("jinja2", "report", "Writing a report as HTML")


def html_page(report: Report) -> str:
    """Return the page of a report.

    Nothing of a source runs in it: every text is escaped, and the content policy allows this
    package's own script and style alone, by their hashes, and no network.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    check_templates()
    from markupsafe import Markup

    from eutectic.reporting.page.page_sections import sections

    style, early, script = (_asset(name) for name in ("page.css", "early.js", "page.js"))
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(early)} {_hash(script)}",
            f"style-src {_hash(style)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    found = sections(report)
    return _template().render(
        report=report,
        policy=policy,
        style=Markup(style),
        early=Markup(early),
        script=Markup(script),
        data=Markup(json_in_script(found.data)),
        sections=found.sections,
    )


@cache
def _template() -> Any:
    """Return the page's template; compiling it takes longer than laying a page out."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template("page.html.jinja")


def _shown(value: Any) -> Any:
    """Write control characters and marks of direction out, wherever a text comes from."""
    from markupsafe import Markup

    if isinstance(value, str) and not isinstance(value, Markup):
        return plain(value, kept="\n\t")
    return value


_BREAKS = re.compile(r"(?<=[._/\-])(?=[^._/\-])")


def _breakable(text: str) -> Any:
    """Return a name that may be broken after dots and the like, escaped."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in _BREAKS.split(_shown(str(text))))


@cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


_ESCAPES = {
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}


def json_in_script(value: Mapping[str, Any] | Sequence[Any]) -> str:
    r"""Return JSON that cannot end the script element that it stands in.

    >>> json_in_script(["</script>"])
    '["\\u003c/script\\u003e"]'
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return text
