"""Experts' own heads on a routed model: models of the experts' classes around its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eutectic.checkpoint.reader import StateDictReader
from eutectic.errors import CheckpointError, EutecticError, RequestError, first_line, suggest
from eutectic.models.arguments import NO_TEXTS, TEXTS
from eutectic.models.loading import pretrained, transformers_for
from eutectic.models.named_classes import model_class
from eutectic.models.zero_shot import has_both_towers
from eutectic.routed.forward_pass import Decisions, Routing, Settings, applying, install_hooks
from eutectic.routed.routed_modules import Experts
from eutectic.routed.routing_modes import elect, routing_of


@dataclass(frozen=True, eq=False)
class StoredHead:
    """What is kept of an expert's head: configuration and tensors, as its checkpoint has them."""

    config: Any  # of transformers, with the class under `architectures`
    tensors: Mapping[str, Tensor]  # by the keys of the expert's files
    feeding: Path | None = None  # a folder whose tokenizer or processor is the expert's own

    @property
    def classes(self) -> int:
        """How many outputs it has."""
        return int(getattr(self.config, "num_labels", 0))


class RoutedHeads(Mapping[str, Any]):
    """Expert -> the routed model with this expert's head: its class, around the routed layers.

    All share the routed model's layers; each has the tensors of its head besides. They follow the
    routed model to its device and dtype when they are asked for.
    """

    def __init__(self, routed: nn.Module, stored: Mapping[str, StoredHead]) -> None:
        self.stored = dict(stored)
        self._models = {n: with_head(routed, head, f"expert '{n}'") for n, head in stored.items()}

    def __getitem__(self, name: str) -> Any:
        if name not in self._models:
            known = f"Heads of: {', '.join(self) or 'none'}."
            raise RequestError(f"no head of '{name}'.{suggest(name, [*self])}\n{known}")
        model, own = self._models[name]
        held = dict(model.named_parameters())
        like = next((p for n, p in held.items() if n not in own), None)
        if like is not None:
            for parameter in (held[n] for n in own if n in held):
                parameter.data = parameter.data.to(like.device, like.dtype)
        return model.train(model.training)

    def __contains__(self, name: object) -> bool:
        return name in self._models

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def __repr__(self) -> str:
        listed = ", ".join(f"{n}: {h.config.architectures[0]}" for n, h in self.stored.items())
        return f"RoutedHeads({listed})"

    def own_names(self, name: str) -> frozenset[str]:
        """Return the names of the head's tensors in the model that has it."""
        return self._models[name][1]

    def fingerprints(self) -> dict[str, str]:
        """Return the identity of every head's tensors."""
        return {n: StateDictReader(h.tensors).fingerprint() for n, h in self.stored.items()}


def heads_of(routed: nn.Module) -> Mapping[str, Any]:
    """Return expert -> model with its head; empty where the routed model keeps none."""
    return getattr(routed, "expert_heads", None) or {}


def with_head(routed: nn.Module, head: StoredHead, where: str) -> tuple[Any, frozenset[str]]:
    """Return a model of the head's class around a routed model's layers, and the head's names.

    It shares all but the head's tensors with `routed`, experts and routers among it, and is routed
    as that is: one `with eutectic.routing(…)` block counts for both.

    Raises:
        RequestError: the head belongs to another architecture.
        CheckpointError: transformers cannot load it, or tensors that its class needs are nowhere.
    """
    kind = head.config.architectures[0]
    transformers = transformers_for("Experts' heads")
    chosen = model_class(kind, Path(where), transformers)
    dtype = next(routed.parameters()).dtype
    # A model of two towers has its body in no part of that name.
    prefix = "" if has_both_towers(head.config) else getattr(chosen, "base_model_prefix", "")
    beside = _of_the_body(routed, str(prefix), head)
    try:
        whole, report = pretrained(
            chosen, None, config=head.config, state={**beside, **head.tensors}, dtype=dtype
        )
    except (EutecticError, ImportError):
        raise
    except Exception as error:  # transformers raises anything at values that it does not expect
        raise CheckpointError(
            f"{where}: transformers cannot load its head ({kind}): {first_line(error)}"
        ) from None
    own = frozenset(whole.state_dict()) - {*report["missing_keys"], *beside}
    prefix, inner, host = _bodies(whole, routed, where)
    before = {id(p): n for n, p in inner.named_parameters()}
    _share(inner, host, frozenset(n.removeprefix(prefix) for n in own if n.startswith(prefix)))
    _tie(whole, before, dict(inner.named_parameters(remove_duplicate=False)))
    shared = {id(p) for p in routed.parameters()}
    lost = [n for n, p in whole.named_parameters() if id(p) not in shared and n not in own]
    if lost:
        raise CheckpointError(
            f"{where}: its head ({kind}) needs {lost[0]}, which neither it nor the routed model "
            "has.\nKeep it with the head when merging: a rule with treatment head for it."
        )
    whole.routing = routing = routing_of(routed)
    install_hooks(whole, routing)
    return whole.train(routed.training), own


def _of_the_body(routed: nn.Module, prefix: str, head: StoredHead) -> dict[str, Tensor]:
    """Return one tensor of the body, if the head has none.

    Versions of transformers before 5 take a head alone for a damaged file.
    """
    if not prefix or any(name.startswith(f"{prefix}.") for name in head.tensors):
        return {}
    name, values = next(iter(routed.named_parameters()))
    return {name if name.startswith(f"{prefix}.") else f"{prefix}.{name}": values.detach()}


def _bodies(whole: Any, routed: Any, where: str) -> tuple[str, Any, Any]:
    """Return the prefix of a model's part that is of the routed model's class, the part, and that.

    Both may have heads, of different kinds, around bodies of one class.
    """
    prefix = str(getattr(whole, "base_model_prefix", ""))
    part = getattr(whole, prefix, None) if prefix else None
    body = getattr(routed, str(getattr(routed, "base_model_prefix", "")) or "_", None)
    if type(whole) is type(routed):
        return "", whole, routed
    if isinstance(part, nn.Module):
        for host in (routed, body):
            if type(part) is type(host):
                return f"{prefix}.", part, host
    if isinstance(body, nn.Module) and type(whole) is type(body):
        return "", whole, body
    for name, tower in whole.named_children():  # one of two
        for host in (routed, *routed.children()):
            if type(tower) is type(host) and any(isinstance(m, Experts) for m in host.modules()):
                return f"{name}.", tower, host
    raise RequestError(
        f"{where}: a head of {type(whole).__name__} does not fit a routed {type(routed).__name__}."
    )


def _share(own: nn.Module, host: nn.Module, heads: frozenset[str], at: str = "") -> None:
    """Put the host's parts into `own` wherever they hold no tensor of a head."""
    theirs = _held(host, "modules")
    for name, child in list(_held(own, "modules").items()):
        other, path = theirs.get(name), f"{at}{name}."
        if child is None or other is None:
            continue
        if any(head.startswith(path) for head in heads):
            _share(child, other, heads, path)
        else:
            _held(own, "modules")[name] = other
    for kind in ("parameters", "buffers"):
        values, others = _held(own, kind), _held(host, kind)
        for name in values:
            if f"{at}{name}" not in heads and others.get(name) is not None:
                values[name] = others[name]


def _tie(whole: nn.Module, before: Mapping[int, str], now: Mapping[str, nn.Parameter]) -> None:
    """Let parameters that were those of the body be so again, as tied output layers are."""
    for module in whole.modules():
        held = _held(module, "parameters")
        for name, parameter in held.items():
            tied = before.get(id(parameter))
            if tied is not None and now[tied] is not parameter:
                held[name] = now[tied]


def _held(module: nn.Module, kind: str) -> dict[str, Any]:
    """Return the table in which a module keeps what lies right below it; torch has no setter."""
    return vars(module)[f"_{kind}"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a routed model says of one sample."""

    expert: str  # whose head it is
    logits: Tensor  # `[classes]` of that head
    label: str  # the name of the largest


@torch.no_grad()
def predict(
    routed: nn.Module, batch: Mapping[str, Any], *, expert: str | None = None
) -> list[Prediction]:
    """Return what the experts' heads say of a batch: the chosen expert's, sample by sample.

    The expert of a sample is the one that the layers decide for: the last layer where evidence adds
    up over layers, else the majority; in oracle mode the one named. Layers are routed as
    `eutectic.routing` says; `expert` names one head for all samples. Cost: two forward passes, one
    of them over the samples of each expert apart; with `expert`, one.

    Args:
        routed: a routed model with heads.
        batch: model inputs by name, samples first, on the model's device.
        expert: whose head; None: the chosen expert's.

    Raises:
        RequestError: no such head; experts are off (mode "base") and none is named.
    """
    heads = heads_of(routed)
    if not heads:
        raise RequestError(
            "the routed model keeps no heads.\nBuild it from a merged folder with experts/<name>/ "
            "(heads: per_expert), or from experts with heads of their own."
        )
    samples = len(next(batch[name] for name in (*TEXTS, *NO_TEXTS, *batch) if name in batch))
    handle = routing_of(routed)
    chosen = [expert] * samples if expert is not None else _chosen(routed, handle, batch, samples)
    found: list[Prediction | None] = [None] * samples
    stated = handle.settings()
    for name in dict.fromkeys(chosen):
        model = heads[name]
        rows = [i for i, other in enumerate(chosen) if other == name]
        part = {
            k: v[rows] if isinstance(v, Tensor) and v.ndim and len(v) == samples else v
            for k, v in batch.items()
        }
        with applying(handle, _of_rows(stated, rows)):
            logits = model(**part).logits
        names: Mapping[int, str] = getattr(model.config, "id2label", None) or {}
        for i, row in zip(rows, logits, strict=True):
            best = int(row.argmax()) if row.ndim else 0
            found[i] = Prediction(name, row, str(names.get(best, best)))
    return [one for one in found if one is not None]


def _of_rows(settings: Settings, rows: Sequence[int]) -> Settings:
    """Return settings for some samples of a batch."""
    many = len(settings.experts) > 1
    experts = tuple(settings.experts[i] for i in rows) if many else settings.experts
    return Settings(settings.mode, experts, settings.temperature, settings.layer)


def _chosen(
    routed: nn.Module, routing: Routing, batch: Mapping[str, Any], samples: int
) -> list[str]:
    """Return the expert that each sample of a batch is routed to."""
    stated = routing.settings()
    if stated.mode == "base":
        raise RequestError("experts are off, so none is chosen; name the head with expert=.")
    if stated.mode == "oracle":
        named = [routing.experts[t] for t in stated.experts]
        return named * samples if len(named) == 1 else named
    votes = Decisions()
    asked = Settings(stated.mode, (), stated.temperature, stated.layer, votes)
    with applying(routing, asked):
        routed(**batch)
    cast = [choice for choice in votes.values() if len(choice) == samples]
    if not cast:
        raise RequestError("no routed layer saw these inputs, so no expert is chosen; name one.")
    return [routing.experts[int(t)] for t in elect(cast, routing)]
