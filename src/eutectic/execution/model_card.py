"""The card of a merged model, and what is read of those of others."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from eutectic.checkpoint.hub import hub_id
from eutectic.planning.tensor_plan import COPY
from eutectic.recipes.plain_yaml import UNREADABLE, YAML_BYTES, load_plain
from eutectic.sentences import shares
from eutectic.storage.small_files import read_text
from eutectic.words import as_markdown as written
from eutectic.words import counted, is_plain, percent

PROVENANCE = "eutectic.json"
UNKNOWN = "unknown"  # a licence that no card states
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
_LONGEST_LICENCE = 100
_FENCE = re.compile("`+")


def card(provenance: Mapping[str, Any]) -> str:
    """Return the model card: front matter that hubs read, parents, recipe."""
    parents = provenance["parents"]
    sources = dict(parents)
    if "initial" in provenance:
        sources["initial"] = provenance["initial"]
    licences = {p["licence"] for p in sources.values()}
    front: dict[str, Any] = {"tags": ["merge", "eutectic"]}
    known = hub_id(parents["base"]["name"]) if parents["base"].get("hub") else None
    if known is not None:  # cards name the model alone, without revision and folder
        front["base_model"] = [known.model]
    if len(licences) == 1 and UNKNOWN not in licences:
        front["license"] = licences.pop()
    rows = "\n".join(
        f"| {written(role)} | {written(p['name'])} | {written(p['licence'])} | "
        f"`{p['fingerprint'][:16]}` |"
        for role, p in sources.items()
    )
    counts = ", ".join(f"{n} {name}" for name, n in provenance["treatments"].items())
    notes = "".join(f"- {written(note)}\n" for note in provenance["notes"]) or "- none\n"
    by = _merged_by(provenance)
    recipe = yaml.safe_dump(provenance["recipe"], sort_keys=False, allow_unicode=True)
    fence = "`" * max(3, 1 + max(map(len, _FENCE.findall(recipe)), default=0))
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"
        f"# Merged model\n\nMerged from {counted(len(parents) - 1, 'expert')} by {by} with scale "
        f"{provenance['scale']:g}, using eutectic {provenance['eutectic']} "
        f"(torch {provenance['torch']}). Tensors: {counts}; {shares(provenance['shares'])}.\n\n"
        f"| role | model | licence | fingerprint |\n|---|---|---|---|\n{rows}\n\n"
        "The fingerprint identifies a checkpoint's content by samples of every tensor. Hashes of "
        f"every merged tensor are in `{PROVENANCE}`.\n\n"
        f"## Recipe\n\n{fence}yaml\n{recipe}{fence}\n\n## Notes\n\n{notes}"
    )


def _merged_by(provenance: Mapping[str, Any]) -> str:
    """Say which method merged most of the numbers, and which was asked for if it is another."""
    method = provenance.get("method") or provenance["recipe"]["method"]
    after = sorted({t["post"] for t in provenance["tensors"].values() if "post" in t})
    followed = f", followed by `{after[0]}`" if after else ""
    taken = provenance["merged_by"]
    mostly, fallen = provenance["mostly_by"], provenance["fallback"]
    if mostly != method and fallen:
        share = percent(1 - fallen["share"])
        asked = f"asked for: `{method}`, which merges {share} of what it is for"
        return f"`{mostly}`{followed} ({asked})"
    if method not in taken:
        others = ", ".join(f"`{name}`" for name in taken if name != COPY)
        return f"{others} (asked for: `{method}`, which no tensor takes)"
    return f"`{method}`{followed}"


def licence_of(folder: Path | None) -> str:
    """Return the licence that a model's card states, or an unknown one."""
    if folder is None:
        return UNKNOWN
    try:
        match = _FRONT_MATTER.match(read_text(folder / "README.md", YAML_BYTES))
        front = load_plain(match[1]) if match else None
    except (OSError, *UNREADABLE):
        return UNKNOWN  # somebody's card is no reason for a merge to fail
    licence = front.get("license") if isinstance(front, dict) else None
    if not isinstance(licence, str) or len(licence) > _LONGEST_LICENCE or not is_plain(licence):
        return UNKNOWN
    return licence
