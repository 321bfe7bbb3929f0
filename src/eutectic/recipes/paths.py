"""Paths in recipes, which start at the recipe's folder, URLs, and names of models on the hub."""

from pathlib import Path

from eutectic.checkpoint.gguf_file import SUFFIX as GGUF_SUFFIX
from eutectic.checkpoint.hub import hub_id
from eutectic.checkpoint.weight_files import WEIGHT_SUFFIXES
from eutectic.recipes.document import Source, exists, inside
from eutectic.storage import is_url, url_of


def is_local(path: str, source: Source, key: object = "path") -> bool:
    """Tell a path, or a URL, from what may name a model of the hub, which no statistics do."""
    if is_url(path):
        return True
    found = hub_id(path)
    endings = (*WEIGHT_SUFFIXES, GGUF_SUFFIX)
    if found is None or Path(path).suffix in endings:
        looks_like_path = path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path
        return looks_like_path or Path(path).suffix in endings
    if found.folder is None:
        return False
    # `models/sst2/final` beside a folder `models` is a mistyped path, not a model of the hub.
    beside = found.revision is None and exists(inside(path.partition("/")[0], source))
    return beside or key == "statistics"


def resolve(path: str, source: Source, key: object = "path") -> str:
    """Return a path as it is from here, and what names a model of the hub as it stands."""
    place = inside(path, source)
    return named(place) if is_local(path, source, key) or exists(place) else path


def named(place: Path) -> str:
    """Return a path as a text, and as a URL where it shows what lies in an object store."""
    return str(url_of(place) or place)
