"""Sums over few tokens are not written: what they were summed over can be told from them."""

import math
from collections.abc import Mapping
from typing import Any

from eutectic.errors import RequestError
from eutectic.words import few


def check_least_tokens(record: Mapping[str, Any], least: int | None) -> None:
    """Raise RequestError where a layer's sums are over fewer than `least` tokens.

    `record` is that of a statistics file. Layers that saw none hold nothing; parameters that are
    no layers, whose squared gradients are summed by examples, count examples.
    """
    if least is None:
        return
    examples = record["data"]["examples"]
    counts = {
        name: layer["count"] if layer["kind"] != "parameter" else layer["sample_count"]
        for name, layer in record["layers"].items()
    }
    short = {name: count for name, count in counts.items() if 0 < count < least}
    if not short:
        return
    fewest = min(short, key=short.__getitem__)
    needed = math.ceil(least * examples / short[fewest]) if examples else least
    names = few(sorted(short, key=short.__getitem__))
    raise RequestError(
        f"{names}: the sums are over fewer than {least:,} tokens "
        f"('{fewest}': {short[fewest]:,}, in {examples:,} examples). Nothing is written.\n"
        f"Give about {needed:,} examples, or leave these layers out (layers, --layers)."
    )
