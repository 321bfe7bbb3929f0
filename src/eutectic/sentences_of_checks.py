"""The sentences of what a check of a checkpoint or adapter shows; `sentences` has all others."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eutectic.words import counted, few

Template = str | Callable[[Sequence[str], Mapping[str, Any]], str]


def _mixture(names: Sequence[str], numbers: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{count:,} {dtype}" for dtype, count in numbers["counts"].items())
    return f"numbers of several types: {counts}; {numbers['rare']} are {few(names)}"


def _held_twice(names: Sequence[str], numbers: Mapping[str, Any]) -> str:
    said = {True: "which the configuration ties", False: "which the configuration does not tie"}
    told = f", {said[numbers['tied']]}" if numbers["tied"] is not None else ""
    return f"one tensor under several names{told}: {', '.join(names)}"


OF_CHECKS: dict[str, Template] = {
    "empty_file": "an empty file (0 bytes): {0}",
    "empty_shard": "{0} holds no numbers ({count:n tensor})",
    "unfinished_download": "a download beside it was not finished: {few}",
    "stale_index": "{0} names files that are not here ({files}); it is not read",
    "stale_weights": (
        "weights that are not those of the checkpoint, stale or another model's: {few}. Read are "
        "{read}"
    ),
    "second_copy": "the same tensors lie here again, and are not read: {few}",
    "index_total": "{0} states {stated:,} bytes of tensors, its files hold {held:,}",
    "pickled": "weights in torch's own format, read without running what they hold: {few}",
    "other_entries": "entries that are no tensors: {few}",
    "no_config": "there is no config.json: what kind of model it is stays unknown",
    "names_code": "its configuration names code, which runs only where you allow it: {few}",
    "hub_kernel": (
        "its configuration asks for code of the hub ({key}: {0}), which is refused where a model "
        "is loaded"
    ),
    "other_dtype": "the configuration says {0}, most numbers are {1}",
    "other_depth": "the configuration says {stated:n layer}, {0} has {held}",
    "other_labels": "'{0}' has {rows:n row}, the configuration has {stated:n label}",
    "other_width": "'{0}' is {held} wide, the configuration says {stated}",
    "no_output_layer": (
        "its files hold no output layer of {classes}, and models of its type do not tie it to "
        "'{0}': a model would get a random one"
    ),
    "output_rows": "'{0}' has {held:n row}, the table '{table}' has {rows:,}",
    "no_tokenizer": "there is no tokenizer",
    "rows_without_token": "{count:,} of {rows:n row} of '{0}' belong to no token",
    "special_id": "{file}: {0} is {id}, the table of tokens has {rows:n row}",
    "other_special_id": "{0} is {token!r} with the id {own}, the configuration says {stated}",
    "dtype_mixture": _mixture,
    "empty_tensors": "tensors without numbers: {few}",
    "integers_held": "integers or booleans, which a merge copies: {few}",
    "held_twice": _held_twice,
    "untied_copies": (
        "the configuration ties '{1}' to '{0}', and the file holds them with different values: "
        "versions of transformers before 5 use '{0}' for both"
    ),
    "all_zero": "nothing but zeros: {few}",
    "adapter_of": "trained on {0}",
    "adapter_of_nothing": "does not say which model it was trained on",
    "ia3_only": "an (IA)³ adapter, which merges with other (IA)³ adapters",
    "weights_beside_adapter": "not read, since the folder is an adapter's: {few}",
    "idle_targets": "no factors of modules that it names in target_modules: {few}",
    "idle_adapter": "changes nothing: all of its second factors are zero",
    "adapter_fits": lambda names, numbers: (
        f"changes {counted(numbers['count'], 'tensor') if numbers['count'] else 'no tensor'} of "
        f"{names[0]}"
    ),
    "fits_other_base": "fits {0} by its names and shapes, not {base}",
    "unrelated_names": "no fine-tune of {0}: {why}",
    "other_shapes": "other shapes than in {base}: {few}",
    "other_heads": "heads of another shape than in {base}: {few}",
    "lacks_of_base": "lacks of what {base} has: {few}",
    "lacked_by_base": "has what {base} lacks: {few}",
    "further_heads": "heads that {base} lacks: {few}",
    "other_ids": "{count:n token} with other ids than in {base}: {0}",
}
