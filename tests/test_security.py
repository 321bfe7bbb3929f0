"""SECURITY.md states the bounds that the code has."""

from __future__ import annotations

import re
from pathlib import Path

from eutectic.checkpoint import adapter_config, header, module_folders
from eutectic.cli import merge
from eutectic.data import images, row_files
from eutectic.evaluation import task_files
from eutectic.execution import executors
from eutectic.models import named_classes
from eutectic.recipes import plain_yaml, schema
from eutectic.storage import small_files
from eutectic.vocabulary import tokens

TEXT = (Path(__file__).parents[1] / "SECURITY.md").read_text(encoding="utf-8")
BOUNDS = {
    "a configuration": [small_files.CONFIG_BYTES],
    "a header of safetensors": [small_files.INDEX_BYTES],
    "a file of a tokenizer": [tokens.LARGEST],
    "a recipe": [
        plain_yaml.YAML_BYTES,
        plain_yaml.MOST_VALUES,
        plain_yaml.MOST_LEVELS,
        schema.MOST_RULES,
    ],
    "JSON": [small_files.MOST_LEVELS, small_files.MOST_DIGITS],
    "axes of a tensor": [header.MOST_AXES],
    "modules of a checkpoint": [module_folders._MAX_MODULES],
    "patterns of an adapter": [
        adapter_config.MOST_PATTERNS,
        adapter_config.MOST_NAMES,
        adapter_config.LONGEST_PATTERN,
        int(adapter_config.MOST_SECONDS),
    ],
    "labels of a task": [task_files.MOST_LABELS],
    "layers, labels": [named_classes.MOST_COUNTED],
    "a picture": [images.MOST_PIXELS],
    "a file of rows": [row_files.DATA_BYTES],
    "threads": [executors.MOST_THREADS],
    "merges of a sweep": [merge.MOST_MIXTURES],
}


def test_the_bounds_are_those_of_the_code() -> None:
    table = TEXT.split("## Bounds")[1]
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", table, re.M))
    numeric = {
        k: [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", v)] for k, v in rows.items()
    }
    for start, bounds in BOUNDS.items():
        (found,) = [numbers for name, numbers in numeric.items() if name.startswith(start)]
        assert found == bounds, start
    counted = [name for name in numeric if name.startswith(tuple(BOUNDS))]
    left = set(numeric) - set(counted) - {"what", "---"}
    assert left == {"files open at once, over all checkpoints", "memory of a merge"}


def test_what_it_links_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)", TEXT):
        assert (Path(__file__).parents[1] / target).exists(), target
