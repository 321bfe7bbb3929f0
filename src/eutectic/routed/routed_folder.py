"""Routed models on disk: saved beside the merged model, loaded, exported as LoRA adapters."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eutectic.checkpoint.folder import copy_side_files, feeding_files, module_files
from eutectic.checkpoint.reader import StateDictReader
from eutectic.checkpoint.writer import CheckpointWriter, OutputFile, write_atomically
from eutectic.errors import CheckpointError, OutputError, RequestError, why_failed
from eutectic.models.loading import load_stored, writing_quietly
from eutectic.models.sites import Site, routable_sites
from eutectic.routed.adapter_folders import Export, write_expert
from eutectic.routed.forward_pass import Routing, install_hooks
from eutectic.routed.head_files import read_heads, write_heads
from eutectic.routed.heads import RoutedHeads, StoredHead, heads_of
from eutectic.routed.routed_modules import Experts, RoutedLinear, install
from eutectic.routed.router import RouterKind
from eutectic.routed.routing_modes import routing_of
from eutectic.routed.single_decision import ROUTERS
from eutectic.serving import ROUTER_FORMAT, ROUTER_JSON
from eutectic.storage import announce, folder_aside, local_path, storage_of, view_once
from eutectic.storage.small_files import check_regular, read_bytes

Model = TypeVar("Model", bound=nn.Module)

DESCRIPTION = "routed.json"
FACTORS = "routed.safetensors"
PLAIN_WEIGHTS = "model.safetensors"  # of models that do not come from transformers
ROUTERS_FILE = "prototypes.safetensors"
_SAVING = "saving"  # a folder, while a model saves itself
FORMAT = 1


class RoutedLayer(BaseModel):
    """A routed layer: the name of its weight, and the path of its module."""

    name: str
    path: str


class Description(BaseModel):
    """What `routed.json` says; see `Routing` for most of it."""

    model_config = ConfigDict(strict=True)

    format: int = FORMAT
    architecture: str
    experts: tuple[str, ...]
    router: RouterKind
    accumulate: bool
    batch_first: bool
    short: dict[str, dict[str, int]]
    left_out: list[str] = []  # absent in files of earlier versions
    layers: list[RoutedLayer]
    heads: tuple[str, ...] = ()  # experts that have one in `heads/`
    decider: str | None = None  # absent where every layer decides
    quality: dict[str, Any] | None = None  # `RouterQuality.record()`, if it is known


def finish(model: Model, routing: Routing, heads: Mapping[str, StoredHead] | None = None) -> Model:
    """Attach the handle, the hooks, `save_pretrained` and heads to a model with routed layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            # It would drop the padding between its layers, so that no mask fits what they see.
            module.use_nested_tensor = False
    install_hooks(model, routing)
    model.routing = routing  # type: ignore[assignment]
    model.save_pretrained = MethodType(save_routed, model)  # type: ignore[assignment]
    model.expert_heads = RoutedHeads(model, heads or {})  # type: ignore[assignment]
    return model


def save_routed(routed: nn.Module, folder: str | Path, **options: Any) -> None:
    """Write a routed model: the merged model as it would save itself, and the experts beside it.

    The folder, which must be empty or absent, loads in transformers as the merged model;
    `load_routed` adds the experts. It is written aside and gets its name when it is complete.
    `options` go to the model's own `save_pretrained`; without one it takes none.
    """
    with folder_aside(local_path(folder), _identity(routed), DESCRIPTION) as aside:
        if not aside.finished:
            with aside.writing() as path:
                write_routed(routed, path, **options)
            aside.commit()
        aside.clear()


def write_routed(routed: nn.Module, path: Path, **options: Any) -> None:
    """Write the files of a routed model into a folder that has no other name yet."""
    handle = routing_of(routed)
    weights, held = _base_state_dict(routed), experts_of(routed)
    layers = [RoutedLayer(name=experts.name, path=path) for path, experts in held.items()]
    kind, heads = type(routed).__name__, _stored_heads(routed)
    description = Description(architecture=kind, layers=layers, heads=tuple(heads), **vars(handle))
    tensors = {
        f"{path}.{key}": tensor.contiguous()
        for path, experts in held.items()
        for key, tensor in experts.state_dict().items()
    }
    own = getattr(type(routed), "save_pretrained", None)
    if own is None and options:
        raise RequestError(f"{kind} takes no options for saving: {options}.")
    try:
        if own is not None:
            _save_model(own, routed, path, weights, options)
        else:
            announce(path / PLAIN_WEIGHTS)
            save_file({n: t.contiguous().clone() for n, t in weights.items()}, path / PLAIN_WEIGHTS)
        announce(path / FACTORS)
        save_file(tensors, path / FACTORS)
        write_heads(path, heads)
        # Last: a folder without it is no finished routed model.
        every = {"decider"} if description.decider is None else set[str]()
        text = json.dumps(description.model_dump(exclude=every), indent=1)
        announce(path / DESCRIPTION)
        (path / DESCRIPTION).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{path}: the routed model cannot be written: {why_failed(error)}."
        ) from error


def _save_model(
    own: Any,
    routed: nn.Module,
    folder: Path,
    weights: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> None:
    """Save a model's own way, whose files nobody knows beforehand, and move them to the folder."""
    aside = folder / _SAVING
    announce(aside)
    aside.mkdir(parents=True)
    with writing_quietly():
        own(routed, aside, state_dict=weights, **options)
    for name in storage_of(aside).files_below(aside):
        announce(folder / name)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (aside / name).rename(folder / name)
    storage_of(aside).remove(aside)


def load_routed(folder: str | Path, model: nn.Module | type[Any] | None = None) -> Any:
    """Return the routed model of a folder that `save_pretrained` wrote.

    Args:
        folder: the folder.
        model: a class with `from_pretrained`, or a module of the right architecture, which takes
            the stored weights and becomes the routed model; None loads the class that the folder
            names from transformers.

    Raises:
        CheckpointError: not a routed model, a damaged file, or one that does not fit the model.
        MissingExtraError: transformers is needed and not installed.
    """
    path = view_once(folder)
    description = _read_description(path)
    loaded = _load_base(path, model)
    try:
        check_regular(path / FACTORS)
        tensors = load_file(path / FACTORS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / FACTORS}: cannot be read: {error}.") from None
    routing = Routing(**{f.name: getattr(description, f.name) for f in fields(Routing)})
    available = {layer.name: layer for layer in routable_sites(loaded)}
    device = next(loaded.parameters()).device
    for item in description.layers:
        layer = available.get(item.name)
        if layer is None or layer.path != item.path:
            raise CheckpointError(
                f"{path}: the routed layer '{item.name}' is not in {type(loaded).__name__}.\n"
                "Load it with the class that it was saved from."
            )
        up, down, weight, bias = _tensors(path, tensors, layer, routing)
        router = ROUTERS[description.router](weight, bias)
        install(loaded, layer, up.to(device), down.to(device), router.to(device), routing)
    return finish(loaded, routing, read_heads(path, description.heads))


def _tensors(path: Path, held: Mapping[str, Tensor], layer: Site, routing: Routing) -> list[Tensor]:
    """Return `up`, `down`, and the router's weight and bias of one layer."""
    keys = [f"{layer.path}.{key}" for key in ("up", "down", "router.weight", "router.bias")]
    found = [held[key] for key in keys if key in held]
    if len(found) < len(keys) or found[0].ndim != 3:
        raise CheckpointError(f"{path / FACTORS}: incomplete for the layer '{layer.name}'.")
    size, (rows, columns) = found[0].shape[2], layer.shape
    experts, own = len(routing.experts), len(found[2]) if found[2].ndim else 0
    scored = own if routing.router == "sim" and own and own % experts == 0 else experts
    wanted = [(experts, rows, size), (experts, size, columns), (scored, columns), (experts,)]
    shapes = [tuple(tensor.shape) for tensor in found]
    if shapes != wanted:
        raise CheckpointError(
            f"{path / FACTORS}: '{layer.name}' has factors of shapes {shapes}, where {wanted} fit."
        )
    return found


def _read_description(path: Path) -> Description:
    file = path / DESCRIPTION
    try:
        description = Description.model_validate_json(read_bytes(file))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not a routed model, it has no {DESCRIPTION}.") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}.") from None
    except ValidationError as error:
        bad = dict.fromkeys(str(item["loc"][0]) for item in error.errors() if item["loc"])
        raise CheckpointError(
            f"{file}: damaged; {', '.join(bad) or 'its JSON'} is not as expected."
        ) from None
    if description.format != FORMAT:
        raise CheckpointError(
            f"{file}: format {description.format}, this version reads {FORMAT}; update eutectic."
        )
    return description


def _load_base(path: Path, model: nn.Module | type[Any] | None) -> Any:
    if not isinstance(model, nn.Module):
        return load_stored(path, model)
    try:
        check_regular(path / PLAIN_WEIGHTS)
        given = load_file(path / PLAIN_WEIGHTS)
        missing, unknown = model.load_state_dict(given, strict=False)
        state = model.state_dict()
        filled = {state[name].data_ptr() for name in given if name in state}
        missing = [n for n in missing if state[n].data_ptr() not in filled]  # not tied either
        if missing or unknown:
            raise RuntimeError(f"missing {missing[:3]}, unknown {unknown[:3]}")
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{path / PLAIN_WEIGHTS}: does not fit {type(model).__name__}: {error}"
        ) from None
    return model


def export_lora(routed: nn.Module, folder: str | Path, beside: str | Path | None = None) -> None:
    """Write the merged model, one LoRA adapter per expert, and the routers.

    `merged/` is the base; `experts/<name>/` are adapters with A = F_t, B = B_t and scale 1, so that
    a model with adapter t equals the routed model with oracle t. `prototypes.safetensors` holds
    per layer `<path>.weight` `[T, in]` and `<path>.bias` `[T]`: scores are linear in the mean
    input of the layer's unmasked tokens (of norm 1 for the prototype router); its metadata names
    the experts in order and the router. `router.json` says the same in words and numbers, which
    `eutectic.serving.RequestRouter` reads.

    An expert's own head goes along whole in its adapter. Where it has another class than the merged
    model, or other classes to choose from, PEFT loads that class from `bases/<name>/`: the merged
    model's files (hard links) beside the head's configuration. The adapters name their base by its
    whole path, and load with PEFT's `AutoPeftModelFor…` of their kind, or with `AutoPeftModel`.
    Heads that are no modules of their own, such as a tower of texts, stay behind.

    Args:
        routed: a routed transformers model.
        folder: must be empty or absent; written aside, it gets its name when it is complete.
        beside: a model's folder whose tokenizer, chat template and processors go into all folders;
            modules of sentence-transformers, with their weights, go into `merged/`.

    Raises:
        RequestError: not a routed model, a packed in-projection (which LoRA has no form for), a
            model without `save_pretrained`, or a name of an expert that is no folder name.
        OutputError: the folder cannot be written.
    """
    source = None if beside is None else Path(beside)
    with folder_aside(local_path(folder), _identity(routed), ROUTERS_FILE) as aside:
        if not aside.finished:
            with aside.writing() as path:
                write_adapters(routed, path, aside.output, source)
            aside.commit()
        aside.clear()


def write_adapters(routed: nn.Module, path: Path, output: Path, beside: Path | None = None) -> None:
    """Write the files of `export_lora` into a folder that will be called `output`."""
    handle, layers = routing_of(routed), experts_of(routed)
    own = getattr(type(routed), "save_pretrained", None)
    packed = [p for p in layers if not isinstance(routed.get_submodule(p), RoutedLinear)]
    if packed or own is None:
        raise RequestError(
            f"the packed in-projections {packed[:3]} have no LoRA form; route other layers."
            if packed
            else f"{type(routed).__name__} has no save_pretrained, so PEFT could not load it."
        )
    _check_folders(handle.experts)
    if handle.router == "sim":
        raise RequestError(
            "the router 'sim' compares subspaces, for which router.json has no words: it holds "
            "one row an expert.\nBuild the routed model with --router mad, discriminant or "
            "prototype."
        )

    def save(model: Any, folder: Path) -> None:
        _save_model(type(model).save_pretrained, model, folder, _base_state_dict(model), {})

    try:
        save(routed, path / "merged")
        if beside is not None:
            names = (*feeding_files(beside), *module_files(beside))
            copy_side_files(beside, path / "merged", names)
        for expert in enumerate(handle.experts):
            write_expert(routed, layers, expert, Export(path, output, beside, save))
        routers = {
            f"{p}.{key}": tensor.contiguous()
            for p, experts in _deciding(handle, layers).items()
            for key, tensor in experts.router.state_dict().items()
        }
        metadata = {"experts": json.dumps(list(handle.experts)), "router": handle.router}
        write_atomically(path / ROUTER_JSON, _router_description(handle, layers).encode())
        _write_in_order(path, ROUTERS_FILE, routers, metadata)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: the export cannot be written: {why_failed(error)}.") from error


def _deciding(handle: Routing, layers: Mapping[str, Experts]) -> dict[str, Experts]:
    """Return the layers whose routers decide: all, or the one that does for the network."""
    return {p: e for p, e in layers.items() if handle.decider in (None, e.name)}


def _router_description(handle: Routing, layers: Mapping[str, Experts]) -> str:
    """Return router.json: what the tensors of the routers mean, for `eutectic.serving`."""
    description = {
        "format": ROUTER_FORMAT,
        "base": "merged",
        "adapters": {name: f"experts/{name}" for name in handle.experts},
        "experts": list(handle.experts),  # in the order of rows and biases
        "router": handle.router,
        "file": ROUTERS_FILE,  # "<layer>.weight" [experts, in] and "<layer>.bias" [experts]
        "layers": list(_deciding(handle, layers)),  # in the order in which they are passed
        "pooling": "mean of the layer's input over the sample's unmasked tokens",
        "normalise": handle.router == "prototype",  # the mean to norm 1, before the scores
        "accumulate": handle.accumulate,  # log-softmax of the scores, summed over the layers
        "choice": "the expert of most layers",
    }
    return json.dumps(description, indent=1) + "\n"


def _write_in_order(
    path: Path, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a file whose metadata have an order, so that the same values are the same bytes."""
    rows = tuple((key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items())
    with CheckpointWriter(path, [OutputFile(name, rows, metadata)]) as writer:
        for key, tensor in tensors.items():
            writer.write(key, 0, tensor)
        writer.sync()


def _identity(routed: nn.Module) -> dict[str, Any]:
    content = StateDictReader(routed.state_dict()).fingerprint()
    heads = getattr(heads_of(routed), "fingerprints", dict[str, str])()
    return {"content": content, "routing": repr(routing_of(routed)), "heads": heads}


def _stored_heads(routed: nn.Module) -> Mapping[str, StoredHead]:
    """Return the heads that are written; their names are folders."""
    stored: Mapping[str, StoredHead] = getattr(heads_of(routed), "stored", {})
    _check_folders(stored)
    return stored


def _check_folders(names: Iterable[str]) -> None:
    """Refuse names of experts that cannot be folders."""
    bad = [name for name in names if name in (".", "..") or set(name) & set("/\\\0")]
    if bad:
        raise RequestError(f"these names of experts cannot be folders: {bad}.")


def _base_state_dict(routed: nn.Module) -> dict[str, Tensor]:
    """Return the merged model's own state dict, without experts and routers."""
    prefixes = tuple(f"{path}.experts." for path in experts_of(routed))
    return {n: t for n, t in routed.state_dict().items() if not n.startswith(prefixes)}


def experts_of(routed: nn.Module) -> dict[str, Experts]:
    """Return the experts by the path of the layer that they belong to."""
    modules = routed.named_modules()
    return {p.removesuffix(".experts"): m for p, m in modules if isinstance(m, Experts)}
