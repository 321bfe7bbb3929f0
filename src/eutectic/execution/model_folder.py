"""What makes a folder of weights a model: config, tokenizer, card, provenance."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eutectic.checkpoint.adapters import WEIGHT_NAMES
from eutectic.checkpoint.expert_tensors import ADAPTER_CONFIG
from eutectic.checkpoint.experts import Expert
from eutectic.checkpoint.folder import copy_side_files, layout_files, survey
from eutectic.checkpoint.index import CheckpointIndex, modules_with_weights, read_json_object
from eutectic.checkpoint.quantised.side_files import forget_quantisation
from eutectic.checkpoint.writer import OutputFile, write_atomically
from eutectic.conventions_ties import is_tied, with_tie
from eutectic.errors import Note, OutputError
from eutectic.execution.expert_folders import write_expert_folders
from eutectic.execution.gguf_side_files import write_from_gguf
from eutectic.execution.model_card import PROVENANCE, card, licence_of
from eutectic.execution.model_vocabulary import check_vocabulary, write_vocabulary
from eutectic.execution.tasks import Finished
from eutectic.planning.cost import merged_by, treatments
from eutectic.planning.inputs import Inputs
from eutectic.planning.layer_config import with_edits
from eutectic.planning.plan import OutputLayout, Plan
from eutectic.storage.small_files import JOURNAL_BYTES, read_json
from eutectic.types import Statistics
from eutectic.versions import version


def document(
    plan: Plan,
    inputs: Inputs,
    finished: Mapping[tuple[str, str], Finished],
    identity: str,
    known: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the provenance of a merge: what was asked, what each tensor took, hashes, versions.

    `identity` is the request's (see `request_identity`): by it a sweep knows its own merges again.
    `known` is what `input_identities` found; it is compared again before the model gets its name.
    Nothing depends on when or how it ran, so that a resumed run gives the same bytes.
    """
    names = plan.request.names
    provenance: dict[str, Any] = {
        "eutectic": version("eutectic"),
        "torch": version("torch"),
        "request": identity,
        "recipe": plan.stated_recipe,
        # A recipe in words of its own says it by another key.
        **({} if "method" in plan.stated_recipe else {"method": plan.method.name}),
        "scale": plan.scale,
        "treatments": treatments(plan),
        "merged_by": merged_by(plan),
        "mostly_by": plan.mostly_by,
        "fallback": dict(plan.fallback),
        "norms": dict(plan.norms),
        "shares": plan.shares.record,
        "notes": [str(note) for note in plan.notes],
        "parents": {
            "base": {
                "name": names["base"],
                **({"hub": True} if plan.request.hub_base else {}),
                "fingerprint": known["the base"][0],
                "licence": licence_of(inputs.index.folder if inputs.index else None),
            },
            **{
                name: _parent(
                    names[name], expert, known[f"expert '{name}'"][0], inputs.statistics.get(name)
                )
                for name, expert in inputs.experts.items()
            },
        },
        "tensors": {
            t.name: {
                "treatment": t.treatment.value,
                "method": t.method,
                **({} if t.post is None else {"post": t.post.name}),
                "scale": t.scale,
                "reason": t.why,
                "sha256": finished["merge", t.name].sha256,
            }
            for t in plan.tensors
            if ("merge", t.name) in finished  # an adapter has nothing of what is copied
        },
    }
    if inputs.initial is not None:
        provenance["initial"] = _parent(names["initial"], inputs.initial, known["init"][0])
    return provenance


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return what a merged model's folder says of its merge."""
    return read_json(folder / PROVENANCE, OutputError, limit=JOURNAL_BYTES)


def _parent(
    name: str, expert: Expert, fingerprint: str, statistics: Statistics | None = None
) -> dict[str, Any]:
    """Describe an expert, and which data its statistics are of, if the recipe names any."""
    known = statistics is not None and statistics.provenance
    data = {"statistics": known["data"]} if known else {}
    licence = licence_of(expert.folder)
    return {"name": name, "fingerprint": fingerprint, "licence": licence, **data}


def write_folder(
    plan: Plan,
    inputs: Inputs,
    model: Path,
    layout: OutputLayout,
    provenance: Mapping[str, Any],
    records: Mapping[str, Any],
) -> tuple[Note, ...]:
    """Complete a folder of merged weights; may be repeated after a kill.

    Returns what of its tables, tokenizer and configuration does not agree.
    """
    index = inputs.index
    assert index is not None
    layout.format.finish(model, layout.files)
    _copy_side_files(plan, inputs, index, model)
    told = write_from_gguf(index, model)
    if layout.files[0].name == WEIGHT_NAMES[0]:  # (IA)³ vectors: the output is an adapter again
        copy_side_files(_donor(plan, inputs, index), model, [ADAPTER_CONFIG])
    write_expert_folders(plan, inputs, model, layout)
    home = next((m.folder for m in index.modules if m.transformer), "")
    write_vocabulary(plan, model, home)
    asked = plan.output.dtype
    stated = _stated_dtype(inputs.config) if asked is None else _name_of(asked)
    dtype = stated or _prevailing_dtype(layout.files)
    for place in [m.folder for m in index.modules if m.transformer] or [""]:
        for folder in model.glob("experts/*"):
            forget_quantisation(folder / place)
            _state_dtype(folder / place / "config.json", dtype)
        changed = forget_quantisation(model / place)
        if changed or asked is not None or plan.output.side_files != "base":
            _state_dtype(model / place / "config.json", dtype)
        for folder in (model, *model.glob("experts/*")):
            _state_ties(folder / place / "config.json", plan.output.tied)
        _state_layers(model / place / "config.json", plan)
    write_atomically(model / "README.md", card(provenance).encode())
    write_provenance(model, provenance, records)
    return (*told, *check_vocabulary(model, home, layout.files))


def write_provenance(
    model: Path, provenance: Mapping[str, Any], records: Mapping[str, Any]
) -> None:
    """Write what a merge says of itself; the last file of its folder."""
    text = json.dumps({**provenance, "records": dict(records)}, indent=1, ensure_ascii=False)
    write_atomically(model / PROVENANCE, (text + "\n").encode())


def _donor(plan: Plan, inputs: Inputs, index: CheckpointIndex) -> Path:
    """Return the folder whose configuration and tokenizer the output gets."""
    if plan.output.side_files == "base":
        return index.folder
    return inputs.experts[plan.output.side_files].folder or index.folder


def _copy_side_files(plan: Plan, inputs: Inputs, index: CheckpointIndex, model: Path) -> None:
    donor = _donor(plan, inputs, index)
    own = survey(index.folder, index.weight_files).taken
    if donor == index.folder or not (donor / "config.json").is_file():
        copy_side_files(index.folder, model, own)  # an adapter brings a tokenizer at most
    if donor != index.folder:
        # The weights lie as the base's do, in the same modules.
        layout = layout_files(index.folder)
        apart = any(module.prefix for module in modules_with_weights(donor))
        dropped = layout_files(donor) if layout or apart else ()
        names = [name for name in survey(donor).taken if name not in dropped]
        copy_side_files(donor, model, names, like=index.folder)
        copy_side_files(index.folder, model, layout)


def _stated_dtype(config: Mapping[str, Any]) -> str | None:
    found = config.get("dtype", config.get("torch_dtype"))
    known = isinstance(found, str) and isinstance(getattr(torch, found, 0), torch.dtype)
    return found if known else None


def _prevailing_dtype(files: Sequence[OutputFile]) -> str:
    """Return the dtype of most of the output's numbers."""
    counts: Counter[torch.dtype] = Counter()
    for file in files:
        for _, dtype, shape in file.entries:
            counts[dtype] += math.prod(shape) if dtype.is_floating_point else 0
    return _name_of(counts.most_common(1)[0][0])


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _state_dtype(config: Path, dtype: str) -> None:
    """Write the output's dtype into its config under whichever key the model uses."""
    if not config.exists():
        return  # bare weights without a config
    values = read_json_object(config)
    if "architecture" in values and "model_type" not in values:
        return  # timm reads the dtype from the weights
    key = "torch_dtype" if "torch_dtype" in values else "dtype"
    values[key] = _name_of(getattr(torch, dtype))
    write_atomically(config, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def _state_ties(config: Path, tied: bool | None) -> None:
    """Let a configuration say of tied tables what the weights are, if it says otherwise."""
    if tied is None or not config.exists():
        return
    values = read_json_object(config)
    stated = is_tied(values)
    if stated is not tied and not (tied and stated is None):
        written = json.dumps(with_tie(values, tied), indent=2, ensure_ascii=False)
        write_atomically(config, (written + "\n").encode())


def _state_layers(config: Path, plan: Plan) -> None:
    """Let a configuration say of the layers what the weights are."""
    if plan.output.layers and config.exists():
        changed = with_edits(read_json_object(config), plan.output.layers)
        written = json.dumps(changed, indent=2, ensure_ascii=False)
        write_atomically(config, (written + "\n").encode())
