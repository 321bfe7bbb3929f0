"""Which tensors of a checkpoint are codes, by its configuration and by what stands beside them."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from eutectic import conventions
from eutectic import conventions_quantised as names
from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.quantised import bitsandbytes, gptq, mxfp4, packed, scaled
from eutectic.checkpoint.quantised.codes import Codes, Entries, Read, Stated, Unreadable
from eutectic.errors import CheckpointError, Note

Found = Iterator[Codes | tuple[str, Unreadable]]

# Families, each in its file. All look at all tensors: a checkpoint may mix them.
FAMILIES: tuple[Callable[[Entries, Stated, Read], Found], ...] = (
    lambda entries, stated, _: scaled.find(entries, stated),
    packed.find,
    lambda entries, stated, _: mxfp4.find(entries, stated),
    bitsandbytes.find,
    lambda entries, stated, _: gptq.find(entries, stated),
)

_KEYS = ("quantization_config", "compression_config")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SMALL_INTEGERS = (torch.int8, torch.uint8)
_INTEGERS = tuple(
    getattr(torch, name)
    for name in ("int8", "uint8", "int16", "uint16", "int32", "uint32")
    if hasattr(torch, name)
)
_GET_ANOTHER = "name the checkpoint that it was quantised from (hf download ORG/NAME)"
_TRANSFORMERS = (
    'write it in full with transformers: python -c "from transformers import AutoModelForCausalLM '
    "as M; M.from_pretrained('{where}').dequantize().save_pretrained('plain')\""
)
# Formats that are told by name and refused: kind -> what it is called, and what to do.
_REFUSED = {
    "quanto": ("Quanto", _GET_ANOTHER),
    "torchao": ("torchao", _GET_ANOTHER),
    "eetq": ("EETQ", _GET_ANOTHER),
    "hqq": ("HQQ", _GET_ANOTHER),
    "aqlm": ("AQLM", _GET_ANOTHER),
    "vptq": ("VPTQ", _GET_ANOTHER),
    "spqr": ("SpQR", _GET_ANOTHER),
    "higgs": ("HIGGS", _TRANSFORMERS),
    "bitnet": ("BitNet", _GET_ANOTHER),
    "fp_quant": ("FP-Quant", _GET_ANOTHER),
    "fouroversix": ("Four over Six", _GET_ANOTHER),
    "sinq": ("SINQ", _GET_ANOTHER),
    "metal": ("Metal", _GET_ANOTHER),
    "exl2": ("EXL2", _GET_ANOTHER),
    "exl3": ("EXL3", _GET_ANOTHER),
    "gguf": ("GGUF", _GET_ANOTHER),
    "mlx": ("MLX", "write it in full: mlx_lm.convert --hf-path {where} --mlx-path plain -d"),
}


@dataclass(frozen=True)
class Recognised:
    """What a checkpoint's codes are: nothing of it is read yet. The notes lack its name."""

    codes: Mapping[str, Codes]  # logical name -> how it is computed
    hidden: frozenset[str]  # stored tensors that are no logical ones
    notes: tuple[Note, ...] = ()


def stated_by(config: Mapping[str, Any]) -> Stated:
    """Return what a configuration, or one part of a composed one, says of quantisation."""
    parts = [config, *(v for v in config.values() if isinstance(v, Mapping))]
    settings = next((p[k] for p in parts for k in _KEYS if isinstance(p.get(k), Mapping)), {})
    mlx = next((p["quantization"] for p in parts if isinstance(p.get("quantization"), Mapping)), {})
    method = str(settings.get("quant_method", "")).lower()
    if not method and (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        method = "bitsandbytes"
    if not settings and "group_size" in mlx:
        settings, method = mlx, "mlx"
    stated = (p.get(key) for p in parts for key in ("dtype", "torch_dtype"))
    dtypes = (getattr(torch, d.removeprefix("torch."), None) for d in stated if isinstance(d, str))
    conv1d = any(str(part.get("model_type")) in conventions.CONV1D_MODELS for part in parts)
    dtype = next((d for d in dtypes if d in _FLOATS), None)
    return Stated(method, settings, dtype, conv1d=conv1d)


def _dtype_of_rest(entries: Entries) -> torch.dtype:
    """Return the dtype of most numbers that are no scales, as bfloat16 where there are none."""
    held: Counter[torch.dtype] = Counter()
    for entry in entries.values():
        scales = names.is_companion(entry.name) or names.is_weight_scale(entry.name)
        if entry.dtype in _FLOATS and not scales and not names.is_of_activations(entry.name):
            held[entry.dtype] += entry.numel
    return max(held, key=held.__getitem__, default=torch.bfloat16)


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that says nothing of quantisation, in any of its parts."""
    return {
        key: without_quantisation(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _KEYS
    }


_ALONE = "the codes beside are missing"
_PLAIN = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def recognise(entries: Entries, config: Mapping[str, Any], read: Read, where: str) -> Recognised:
    """Find the codes among a checkpoint's tensors; CheckpointError where some cannot be read.

    Tensors are known by what stands beside them and by their types; the configuration names the
    method where these leave it open. Nothing that looks like codes is passed on as numbers.
    """
    stated = stated_by(config)
    # Codes are integers or of 8 bits: a plain checkpoint can only hold what belongs to some.
    if not stated.settings and all(e.dtype in _PLAIN for e in entries.values()):
        orphans = [name for name in entries if names.is_companion(name)]
        if orphans:
            raise _refusal(where, stated.method, orphans, _GET_ANOTHER, _ALONE)
        return Recognised({}, frozenset())
    stated = replace(stated, beside=_dtype_of_rest(entries))
    method = _foreign(entries, stated)
    codes: dict[str, Codes] = {}
    unreadable: dict[str, str] = {}
    if method is None:
        for family in FAMILIES:
            for found in family(entries, stated, read):
                if isinstance(found, tuple):
                    unreadable[found[0]] = str(found[1])
                elif _is_taken(found, codes, entries):
                    unreadable[found.anchor] = f"another tensor means '{found.entry.name}' too"
                else:
                    codes[found.entry.name] = found
    if unreadable:
        first = next(iter(unreadable))
        raise _refusal(where, stated.method, list(unreadable), _GET_ANOTHER, unreadable[first])
    parts = {part for found in codes.values() for part in found.parts}
    quantised = bool(stated.settings or codes)
    hidden = {n for n in entries if n not in parts and quantised and names.is_of_activations(n)}
    left = [e for e in entries.values() if e.name not in parts and e.name not in hidden]
    if method is not None and any(_may_be_codes(e, True) for e in left):
        kind, way = _REFUSED[method]
        raise _refusal(where, kind, [e.name for e in left if _may_be_codes(e, True)], way)
    orphans = [
        e.name
        for e in left
        if names.is_companion(e.name) or (stated.settings and names.is_weight_scale(e.name))
    ]
    if orphans:
        raise _refusal(where, stated.method, orphans, _GET_ANOTHER, _ALONE)
    strange = [e.name for e in left if _may_be_codes(e, quantised)]
    if strange:
        raise _refusal(where, stated.method, strange, _GET_ANOTHER, "what they mean is not stated")
    for entry in left:
        if entry.dtype in scaled.FLOAT8:
            codes[entry.name] = scaled.plain8(entry, stated)
    hidden |= parts - {c.anchor for c in codes.values()}
    return Recognised(codes, frozenset(hidden), _notes(codes, stated))


def _is_taken(found: Codes, codes: Mapping[str, Codes], entries: Entries) -> bool:
    name = found.entry.name
    return name in codes or (name in entries and name not in found.parts)


def _notes(codes: Mapping[str, Codes], stated: Stated) -> tuple[Note, ...]:
    if codes:
        counts = Counter(found.kind for found in codes.values())
        return (Note("dequantised", numbers={"kinds": dict(counts)}),)
    stale = Note("stale_quantisation", numbers={"method": stated.method or "without a method"})
    return (stale,) if stated.settings else ()


def _foreign(entries: Entries, stated: Stated) -> str | None:
    """Return the kind among those that are refused, None for another or none."""
    if stated.method in _REFUSED:
        return stated.method
    if stated.method:
        return None
    return next((kind for name in entries if (kind := names.foreign_kind(name))), None)


def _may_be_codes(entry: TensorEntry, quantised: bool) -> bool:
    """Tell whether a tensor's numbers may be codes: 8-bit floats and integers, packed integers.

    Beside quantised weights, any integers but masks and positions; else what is called a weight.
    """
    if entry.dtype in scaled.FLOAT8 or str(entry.dtype).startswith("torch.float8"):
        return quantised or entry.dtype not in scaled.FLOAT8
    if entry.dtype not in _INTEGERS or len(entry.shape) < 2:
        return False
    if quantised:
        return not names.is_integer_buffer(entry.name)
    return names.is_called_weight(entry.name)


def _refusal(
    where: str, method: str, tensors: Sequence[str], way: str, why: str = ""
) -> CheckpointError:
    count = f"{len(tensors)} tensor{'s' if len(tensors) != 1 else ''}, such as '{tensors[0]}'"
    what = f"quantised ({method})" if method else "quantised"
    reason = f": {why}" if why else ""
    return CheckpointError(
        f"{where}: {what} in a way that cannot be read exactly ({count}){reason}; "
        f"{way.format(where=where)}."
    )
