"""What a folder of plain weights must not say any more of quantisation."""

import json
from pathlib import Path

from eutectic.checkpoint.index import read_json_object
from eutectic.checkpoint.quantised.recognition import without_quantisation
from eutectic.checkpoint.writer import write_atomically
from eutectic.storage import storage_of

# Files in which AutoGPTQ, AutoAWQ and ModelOpt repeat it.
_OWN_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


def forget_quantisation(folder: Path) -> bool:
    """Take quantisation out of a folder's configuration; tell whether there was any."""
    for name in _OWN_FILES:
        storage_of(folder).remove(folder / name)
    path = folder / "config.json"
    if not path.exists():
        return False
    config = read_json_object(path)
    plain = without_quantisation(config)
    if plain == config:
        return False
    write_atomically(path, (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode())
    return True
