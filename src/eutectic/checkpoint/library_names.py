"""Names as transformers itself relates them, for what the table of equivalences leaves unmatched.

transformers 5 keeps, for every architecture, how keys of files become names of parameters. Asking
it takes seconds, so it comes last, and only where both sides have tensors left that are no heads.
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch

from eutectic.conventions_heads import is_output_layer
from eutectic.conventions_names import canonical

Config = Mapping[str, Any]


def library_forms(
    missing: Sequence[str], extra: Iterable[str], configs: Sequence[Config]
) -> dict[str, str]:
    """Return the names in memory, in canonical form, that transformers gives the names left over.

    `missing` are names of the base, `extra` the expert's as the base would call them, `configs`
    theirs; the first one that names an architecture is used. Empty where transformers cannot tell.
    """
    lost = [name for name in missing if not is_output_layer(name)]
    own = [name for name in extra if not is_output_layer(name)]
    config = next((c for c in configs if c.get("architectures") and c.get("model_type")), None)
    if not (lost and own) or config is None:
        return {}
    rename = _renaming(config)
    if rename is None:
        return {}
    return {name: canonical(rename(name)).name for name in {*lost, *own}}


def _renaming(config: Config) -> Callable[[str], str] | None:
    """Return transformers' renaming of a model's keys, None where it has none or is not there."""
    if importlib.util.find_spec("transformers") is None:
        return None
    logger = logging.getLogger("transformers")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _asked(config)
    except Exception:  # of a configuration that this version does not know, whatever it raises
        return None
    finally:
        logger.setLevel(level)


def _asked(config: Config) -> Callable[[str], str] | None:
    import transformers
    from transformers import CONFIG_MAPPING, PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    kind = getattr(transformers, str(config["architectures"][0]), None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        return None
    with torch.device("meta"):
        model = cast("Any", kind)(made)
    rules = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]

    def rename(name: str) -> str:
        for rule in rules:
            name = rule.rename_source_key(name)[0]
        return name

    return rename if rules else None
