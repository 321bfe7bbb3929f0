"""What checkpoints and adapters are: their names, which of them is the base, what they do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.experts import is_adapter, is_ia3
from eutectic.checkpoint.hub import hub_id
from eutectic.checkpoint.index import read_json_object
from eutectic.checkpoint.locating import locate
from eutectic.checkpoint.opening import open_reader
from eutectic.checkpoint.reader import CheckpointReader, sample_ranges
from eutectic.checkpoint.weight_files import ADAPTER_CONFIG, holds_adapter, holds_weights, names_in
from eutectic.errors import EutecticError, RequestError
from eutectic.models.sentence_modules import is_sentence_model
from eutectic.models.task_kinds import (
    ARCHITECTURES,
    ZERO_SHOT,
    TaskKind,
    kind_of_architectures,
)

_STEPS = re.compile(r"(checkpoint|step|epoch)[-_]?\d*|final|best|last|adapter|model|merged|output")
_BASES = ("base", "pretrained", "pretrained-model", "base-model", "base_model", "init")
_SAMPLED = 48  # tensors that kinship is judged by
_TASK_TYPES: Mapping[str, TaskKind] = {  # of PEFT
    "SEQ_CLS": "text-classification",
    "CAUSAL_LM": "language-model",
    "SEQ_2_SEQ_LM": "sequence-to-sequence",
    "FEATURE_EXTRACTION": "feature-extraction",
}


@dataclass(frozen=True)
class Found:
    """A checkpoint or an adapter."""

    typed: str  # as it is to be written in a recipe
    path: Path  # the folder or file that holds it
    config: Mapping[str, Any]
    adapter: Mapping[str, Any] | None  # its adapter_config.json, if it is one
    ia3: bool = False

    @property
    def stated_base(self) -> str | None:
        """What an adapter says that it was trained on."""
        named = (self.adapter or {}).get("base_model_name_or_path")
        return named if isinstance(named, str) and named else None


def find_models(named: Sequence[str]) -> list[Found]:
    """Return the checkpoints and adapters at paths, or one level below folders that hold neither.

    Raises:
        RequestError: with everything that is none.
    """
    found: list[Found] = []
    faults: list[str] = []
    for text in named:
        path = Path(text)
        try:
            places = [text] if not path.is_dir() or _holds_model(path) else _below(path)
            found += [_look(place) for place in places]
        except (EutecticError, OSError) as error:
            faults.append("  - " + " ".join(str(error).splitlines()))
    if faults:
        raise RequestError("these are no checkpoints or adapters:\n" + "\n".join(faults))
    unique = {one.path.resolve(): one for one in found}
    return list(unique.values())


def holds_models(folder: Path) -> bool:
    """Tell whether a folder is a model, or holds some."""
    try:
        return bool(find_models([str(folder)]))
    except RequestError:
        return False


def _holds_model(folder: Path) -> bool:
    """Tell whether a folder is a model itself: files of heads may lie beside folders of models."""
    names = names_in(folder)
    if holds_adapter(names) or ADAPTER_CONFIG in names or "config.json" in names:
        return True
    return holds_weights(names) and len(_below(folder)) < 2


def _below(folder: Path) -> list[str]:
    """Return the models in a folder of models; itself where there is at most one, see `locate`."""
    inside: list[str] = []
    for child in sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] not in "._"):
        try:
            names = names_in(locate(child).path)
            if holds_weights(names) or holds_adapter(names) or ADAPTER_CONFIG in names:
                inside.append(str(child))
        except EutecticError:  # several below it: they are no experts of one kind
            continue
    steps = all(_STEPS.fullmatch(Path(name).name) for name in inside)
    return [str(folder)] if len(inside) < 2 or steps else inside


def _look(text: str) -> Found:
    path = locate(text).path
    folder = path if path.is_dir() else path.parent
    config = folder / "config.json"
    values = read_json_object(config) if config.is_file() else {}
    adapter = read_json_object(folder / ADAPTER_CONFIG) if is_adapter(folder) else None
    if adapter is None:
        open_reader(path).close()  # says what is wrong with it
    return Found(text, path, values, adapter, ia3=is_ia3(folder))


def expert_names(experts: Sequence[Found], base: Found | None = None) -> list[str]:
    """Return a name for every expert: of its folder, or of the one above `checkpoint-500` and like.

    Beside other models, such a folder keeps its own name. Names that would be equal get the folder
    above in front, then a number.
    """
    names: list[str] = []
    models = [*experts, *([] if base is None else [base])]
    places = Counter(Path(one.typed).absolute().parent for one in models)
    for one in experts:
        place = Path(one.typed).absolute()
        parts = [p for p in place.parts if p not in ("/", "")]
        if one.path.is_file():
            parts[-1] = Path(parts[-1]).stem
        while places[place.parent] < 2 and len(parts) > 1 and _STEPS.fullmatch(parts[-1]):
            parts.pop()
        name = _plain(parts[-1])
        if name in names and len(parts) > 1:
            name = _plain(f"{parts[-2]}-{parts[-1]}")
        number, whole = 2, name
        while name in names or name in ("base", "initial", "experts"):
            name, number = f"{whole}-{number}", number + 1
        names.append(name)
    return names


def _plain(text: str) -> str:
    found = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).lstrip("_.+-")
    return found or "expert"


@dataclass(frozen=True)
class Base:
    """The base: what to write, where it lies if it is here, and why it is taken for it."""

    typed: str | None
    found: Found | None
    why: str


def choose_base(models: Sequence[Found], stated: str | None) -> Base:
    """Return the base of experts: stated, called so, named by adapters, or nearest to all others.

    Args:
        models: all that were found; the base may be among them.
        stated: what a user says, a path or a name on the hub.
    """
    if stated is not None:
        (found,) = find_models([stated]) if Path(stated).exists() else (None,)
        return Base(stated, found, "as you say")
    full = [one for one in models if one.adapter is None]
    called = [one for one in full if Path(one.typed).absolute().name.lower() in _BASES]
    if len(called) == 1:
        return Base(called[0].typed, called[0], "by its name")
    named = list(dict.fromkeys(b for one in models if (b := one.stated_base) is not None))
    if len(named) == 1:
        here = [o for o in full if o.path.resolve() == Path(named[0]).resolve()]
        here = here or [o for o in full if o.path.name == Path(named[0]).name]
        if here:
            return Base(here[0].typed, here[0], "the adapters name it")
        if Path(named[0]).exists() or hub_id(named[0]) is not None:
            return Base(named[0], None, "the adapters name it")
    if len(full) == 1 and len(full) < len(models):
        return Base(full[0].typed, full[0], "the only full checkpoint")
    if len(full) > 2 and (nearest := _nearest(full)) is not None:
        return Base(nearest.typed, nearest, "it is nearest to all others")
    return Base(None, None, "")


def _nearest(models: Sequence[Found]) -> Found | None:
    """Return the model nearest to all others, where it is so by far; None if nothing says so.

    Fine-tunes of one base lie about it, √2 times as far from each other as from it. Distances are
    taken over samples of tensors that all have in one shape.
    """
    values: list[Tensor] = []
    readers: list[CheckpointReader] = []
    try:
        readers = [open_reader(one.path) for one in models]  # pyright: ignore
        common = [
            name
            for name, entry in readers[0].entries.items()
            if entry.dtype.is_floating_point
            and all(n in r.entries for r in readers for n in (name,))
            and all(r.entries[name].shape == entry.shape for r in readers)
        ]
        chosen = common[:: max(1, len(common) // _SAMPLED)]
        for reader in readers:
            parts = [
                reader.read(name, start, stop).float()
                for name in chosen
                for start, stop in sample_ranges(reader.entries[name].numel)
            ]
            values.append(torch.cat(parts) if parts else torch.zeros(0))
    except EutecticError:
        return None
    finally:
        for reader in readers:
            reader.close()
    stack = torch.stack(values)
    if not stack.shape[1]:
        return None
    sums = torch.cdist(stack, stack).sum(1)
    order = sums.argsort().tolist()
    return models[order[0]] if sums[order[0]] < 0.9 * sums[order[1]] else None


def config_of(expert: Found, base: Found | None) -> Mapping[str, Any]:
    """Return an expert's configuration; an adapter's is the base's."""
    return expert.config or ({} if base is None else base.config)


def kind_of(expert: Found, base: Found | None) -> TaskKind | None:
    """Return what an expert does, as far as its configuration tells."""
    if expert.adapter is not None:
        found = _TASK_TYPES.get(str(expert.adapter.get("task_type")))
        if found is not None:
            return found
    config = config_of(expert, base)
    stated: Any = config.get("architectures")
    names_of = [str(a) for a in stated] if isinstance(stated, list) else []
    if any(name.endswith(ARCHITECTURES[ZERO_SHOT]) for name in names_of):
        return ZERO_SHOT
    found = kind_of_architectures(names_of)
    if found == "text-classification":
        names: Any = config.get("id2label")
        labels = config.get("num_labels", len(names) if isinstance(names, dict) and names else 2)
        if config.get("problem_type") == "regression" or labels == 1:
            return "regression"
    return found


def embeds_texts(expert: Found, base: Found | None) -> bool:
    """Tell whether the folder of an expert, or else the base's, says how texts become vectors."""
    places = [one.path for one in (expert, base) if one is not None]
    return any(is_sentence_model(p if p.is_dir() else p.parent) for p in places)


def takes_pictures(config: Mapping[str, Any]) -> bool:
    """Tell whether a configuration is that of a model whose inputs are pictures alone."""
    seen = config.get("vision_config")
    if isinstance(seen, Mapping):
        return not isinstance(config.get("text_config"), Mapping)
    return any(key in config for key in ("image_size", "patch_size", "num_channels"))


def classes_of(expert: Found) -> list[str]:
    """Return the names of an expert's classes, if its configuration has some that say anything."""
    found = expert.config.get("id2label")
    if not isinstance(found, dict) or not found:
        return []
    try:
        names = [str(found[key]) for key in sorted(found, key=int)]
    except ValueError:
        return []
    return [] if all(n == f"LABEL_{i}" for i, n in enumerate(names)) else names
