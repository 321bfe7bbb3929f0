"""Paths in recipes, which start at the recipe's folder, and names of models on the hub."""

from pathlib import Path

from eutectic.checkpoint.gguf_file import SUFFIX as GGUF_SUFFIX
from eutectic.checkpoint.hub import hub_id
from eutectic.checkpoint.weight_files import WEIGHT_SUFFIXES
from eutectic.recipes.document import Source, exists, inside


def is_local(path: str, source: Source, key: object = "path") -> bool:
    """Tell a path from what may name a model of the hub, which no file of statistics is."""
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
    return str(place) if is_local(path, source, key) or exists(place) else path
