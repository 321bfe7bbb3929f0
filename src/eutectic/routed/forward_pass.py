"""What one forward pass of a routed model carries along: masks, running scores, held decisions.

Hooks on the model, and on every transformers model inside it, open a `Call` when the outermost of
them is entered. Everything lives in context variables and on the caches of generation, so threads
do not see each other and the model itself keeps no state.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from types import MethodType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from eutectic.errors import RequestError, suggest
from eutectic.models.arguments import (
    ENCODER_OUTPUTS,
    OF_DECODER,
    Signature,
    given_cache,
    returned_cache,
    signature_of,
    tokens_seen,
)
from eutectic.routed.forward_masks import Frame, hidden_states, open_frame
from eutectic.routed.router import RouterKind

Mode = Literal["route", "oracle", "base", "soft", "vote"]
MODES = ("route", "oracle", "base", "soft", "vote")

_COMPILER = "torch._dynamo"
_Function = TypeVar("_Function", bound=Callable[..., Any])
# A layer's tower, by number, or the layer itself where it has none; and how many samples it saw.
Group = tuple[int | str, int]
Ballots = list[tuple[str, Tensor]]  # layers as they were passed, and scores [samples, T]


@dataclass(frozen=True, eq=False)
class Settings:
    """How the experts are chosen, see `routing`; `ballots` takes layers' scores, for a vote."""

    mode: Mode = "route"
    experts: tuple[int, ...] = ()
    temperature: float = 1.0
    layer: str | None = None
    decisions: Decisions | None = None
    ballots: dict[Group, Ballots] | None = None

    def chosen(self, scores: Tensor) -> Tensor:
        """Return what scores `[N, T]` decide: an expert each `[N]`, or weights `[N, T]` (soft)."""
        if self.mode == "soft":
            return (scores / self.temperature).softmax(-1)
        return scores.argmax(-1)


class Decisions(dict[str, Tensor]):
    """Layer name -> expert index per sample, in the order of the batches."""

    def __repr__(self) -> str:
        """Show how many decisions there are."""
        samples = max(map(len, self.values()), default=0)
        return f"Decisions({len(self)} layers, {samples} samples)"

    def add(self, layer: str, indices: Tensor) -> None:
        """Append the decisions of one batch."""
        rows = indices.detach().cpu()
        self[layer] = torch.cat([self[layer], rows]) if layer in self else rows


@dataclass(eq=False)
class Held:
    """The decisions taken on a prompt, which decoding goes on using."""

    mode: Mode
    choices: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Encoded:
    """What an encoder leaves to its decoder: generation runs the two in calls of their own.

    It leaves scores and no decision, since the decoder may be run in another mode.
    """

    first: Tensor  # its outputs at the first position, by which the decoder's call knows it
    running: Tensor | None  # its summed log-posteriors [samples, T], if it has any
    ballots: Ballots  # empty without a vote


@dataclass(eq=False)
class Call:
    """One outermost forward pass."""

    routing: Routing
    settings: Settings
    frames: list[Frame] = field(default_factory=list)  # the models entered and not left yet
    carried: Encoded | None = None  # what an encoder that ran in a call of its own leaves
    choices: dict[str, Tensor] = field(default_factory=dict)  # the decisions taken so far
    held: Held | None = None  # those of the prompt that this call continues
    ballots: Mapping[Group, Ballots] = field(default_factory=dict)  # of the vote, if there is one
    voted: Mapping[Group, Tensor] = field(default_factory=dict)  # one decision per sample
    generating: bool = False  # a cache was passed


_CALL: ContextVar[Call | None] = ContextVar("eutectic_routed_call", default=None)
_SETTINGS: ContextVar[tuple[tuple[Routing, Settings], ...]] = ContextVar(
    "eutectic_routed_settings", default=()
)
_ENCODED: ContextVar[Encoded | None] = ContextVar("eutectic_routed_encoded", default=None)
_HELD: weakref.WeakKeyDictionary[Any, Held] = weakref.WeakKeyDictionary()
# Of a `generate`, with a cache or without: module that is called -> the decisions on its prompt.
_RUN: ContextVar[dict[int, Held] | None] = ContextVar("eutectic_routed_run", default=None)


@dataclass(eq=False)
class Routing:
    """What the routed layers of one model share."""

    experts: tuple[str, ...]  # in the order of every layer's factors
    router: RouterKind
    accumulate: bool  # layers decide by the log-posteriors summed over the layers passed so far
    batch_first: bool  # activations are `[samples, tokens, features]` where both orders would fit
    # Layer -> expert -> directions, where those are fewer than the rank.
    short: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    left_out: list[str] = field(default_factory=list[str])  # default layers that are not routed
    # `RouterQuality.record()` of what was measured or estimated, kept with the model.
    quality: dict[str, Any] | None = None
    # The layer that decides for the whole network, in a first pass; None where every layer does.
    decider: str | None = None

    def settings(self) -> Settings:
        """Return the settings in force in this context."""
        stated = (settings for owner, settings in reversed(_SETTINGS.get()) if owner is self)
        return next(stated, Settings())

    def call(self) -> Call | None:
        """Return the forward pass that is under way, or None outside of one."""
        call = _CALL.get()
        return call if call is not None and call.routing is self else None

    def frame(self, x: Tensor) -> Frame:
        """Return the frame of the model being run that a layer's input belongs to."""
        call = self.call()
        return (call.frames[-1] if call is not None and call.frames else Frame()).of(x)

    def index(self, expert: str) -> int:
        """Return the position of an expert."""
        if expert not in self.experts:
            raise RequestError(
                f"unknown expert '{expert}'.{suggest(expert, self.experts)}\n"
                f"Experts: {', '.join(self.experts)}."
            )
        return self.experts.index(expert)


@contextmanager
def applying(routing: Routing, settings: Settings) -> Iterator[None]:
    """Put settings in force for one model in this context."""
    token = _SETTINGS.set((*_SETTINGS.get(), (routing, settings)))
    try:
        yield
    finally:
        _SETTINGS.reset(token)


def install_hooks(model: nn.Module, routing: Routing) -> None:
    """Let the model, and every transformers model inside it, announce its masks, once each."""
    if hasattr(type(model), "generate"):
        vars(model)["generate"] = MethodType(_generate, model)
    for module in model.modules():
        # By name, so that transformers is not imported for models that do not come from it.
        kinds = {kind.__name__ for kind in type(module).__mro__}
        hooks = vars(module)["_forward_pre_hooks"].values()
        owners = [getattr(hook, "__self__", None) for hook in hooks]
        known = any(isinstance(o, _Scope) and o.routing is routing for o in owners)
        if not known and (module is model or "PreTrainedModel" in kinds):
            scope = _Scope(routing, signature_of(module))
            module.register_forward_pre_hook(scope.enter, with_kwargs=True)
            module.register_forward_hook(scope.leave, with_kwargs=True, always_call=True)


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Generate as the model's class does; without a cache, too, a prompt is decided once."""
    token = _RUN.set({})
    try:
        return type(model).generate(model, *args, **kwargs)
    finally:
        _RUN.reset(token)


def uncompiled(function: _Function) -> _Function:
    """Keep torch's compiler out of a function, as `torch.compiler.disable` does.

    That one imports the compiler, which takes seconds; here this waits until somebody else does,
    since nothing is compiled before.
    """
    disabled: Callable[..., Any] | None = None

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            if _COMPILER not in sys.modules:
                return function(*args, **kwargs)
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    vars(call)["_torchdynamo_disable"] = True  # the compiler shall not look into it either
    return call  # type: ignore[return-value]


class _Scope:
    """The pair of hooks around one module; `enter` and `leave` nest like its forward passes."""

    def __init__(self, routing: Routing, signature: Signature) -> None:
        self.routing = routing
        self.signature = signature

    @uncompiled  # as `leave`: what they look at differs from call to call
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self.signature.given(args, kwargs)
        call = self.routing.call()
        if call is None:
            call = self._open(module, given)
        parent = call.frames[-1] if call.frames else None
        frame = open_frame(given, self.signature.names, parent, self.routing.batch_first)
        if parent is None and frame.tower is not None and call.carried is not None:
            scores = call.carried.running
            frame.tower.running = {} if scores is None else {len(scores): scores}
        call.frames.append(frame)

    @uncompiled
    def leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        call = self.routing.call()
        if call is None:
            return
        frame = call.frames.pop()
        if call.frames:
            call.frames[-1].closed(frame, output)
        else:
            _CALL.set(None)
            given = self.signature.given(args, kwargs)
            _close(call, frame, given, output)
            run = _RUN.get()
            if run is not None and call.held is None and call.choices:
                run.setdefault(id(module), Held(call.settings.mode, dict(call.choices)))

    def _open(self, module: nn.Module, given: Mapping[str, Any]) -> Call:
        call = Call(self.routing, self.routing.settings())
        cache = given_cache(given)
        if cache is not None:
            call.generating = True
            held = _held(cache, call.settings.mode)
            call.held = held if held is not None and held.mode == call.settings.mode else None
        # Versions of transformers before 5 pass a cache that stays empty where none is used.
        if call.held is None and (run := _RUN.get()) is not None:
            call.held = run.get(id(module))
        call.carried = _carried(given)
        once = self.routing.decider is not None and call.settings.mode in ("route", "soft")
        if (once or call.settings.mode == "vote") and call.held is None:
            call.ballots = _ballots(module, self.signature, given, call)
            call.voted = _elected(call)
        _CALL.set(call)
        return call


def _held(cache: Any, mode: Mode) -> Held | None:
    """Return the decisions on the prompt whose tokens a cache holds, if any were taken."""
    try:
        return None if tokens_seen(cache) == 0 else _HELD.get(cache)
    except TypeError:  # tuples and lists, which are made anew at every step
        if mode in ("oracle", "base"):
            return None
        raise RequestError(
            f"routed generation needs a cache object, got a {type(cache).__name__}.\n"
            "Pass transformers.DynamicCache() as the cache, or use_cache=False."
        ) from None


def _carried(given: Mapping[str, Any]) -> Encoded | None:
    """Return what the encoder whose outputs this call was given leaves, one row a sample."""
    hidden, encoded = hidden_states(given.get(ENCODER_OUTPUTS)), _ENCODED.get()
    if hidden is None or encoded is None:
        return None
    copies = len(hidden) // max(1, len(encoded.first))
    divides = len(hidden) == copies * len(encoded.first)
    if not (divides and torch.equal(hidden[::copies, 0], encoded.first)):
        return None
    running = encoded.running
    return Encoded(
        hidden[:, 0],
        None if running is None else running.repeat_interleave(copies, dim=0),
        [(name, scores.repeat_interleave(copies, dim=0)) for name, scores in encoded.ballots],
    )


def _close(call: Call, frame: Frame, given: Mapping[str, Any], output: Any) -> None:
    """Keep the decisions of a prompt for the decoding steps that share its cache."""
    if call.held is not None:
        return
    own = returned_cache(output)
    cache = given_cache(given) if own is None else own
    if cache is not None and call.choices:
        _HELD[cache] = Held(call.settings.mode, dict(call.choices))
    elif cache is None and frame.tower is not None and OF_DECODER[0] not in given:
        hidden = hidden_states(output)
        if hidden is not None:
            running = frame.tower.running.get(len(hidden))
            ballots = call.ballots.get((frame.tower.number, len(hidden)), [])
            if running is None and ballots and call.routing.accumulate:
                running = ballots[-1][1]
            if running is not None or ballots:
                _ENCODED.set(Encoded(hidden[:, 0].detach(), running, ballots))


def _ballots(
    module: nn.Module, signature: Signature, given: Mapping[str, Any], call: Call
) -> Mapping[Group, Ballots]:
    """Run once with the experts off and return what every layer says, by groups of layers.

    A decoder goes on with the ballots of an encoder that ran in a call of its own, or else with
    the log-posteriors that this one has summed; not where a layer is to decide that is not
    among them.
    """
    carried, layer = call.carried, call.settings.layer
    if carried is not None and (layer is None or layer in dict(carried.ballots)):
        ballots = carried.ballots
        if not ballots:
            assert carried.running is not None
            ballots = [("", carried.running)]
        return {(0, len(carried.first)): ballots}
    first = Settings(mode="base", ballots={})
    with applying(call.routing, first), torch.no_grad():
        module(**signature.without_cache(given))
    return first.ballots or {}


def _elected(call: Call) -> dict[Group, Tensor]:
    """Return one decision per sample for each group of layers.

    That of the layer which the settings name, or the model's own; a group that does not pass it
    takes the expert of most of its layers, or in soft mode the mean of their weights.
    """
    layer = call.settings.layer
    passed = [name for cast in call.ballots.values() for name, _ in cast]
    if layer is None:
        layer = call.routing.decider
    elif layer not in passed:
        raise RequestError(
            f"the layer '{layer}' was not passed, so it cannot vote.\n"
            f"Passed: {', '.join(passed[:5])}, …"
        )
    elected: dict[Group, Tensor] = {}
    for group, cast in call.ballots.items():
        named = [scores for name, scores in cast if name == layer]
        votes = torch.stack([call.settings.chosen(s) for s in named or [s for _, s in cast]])
        if call.settings.mode == "soft":
            elected[group] = votes.mean(0)
        else:
            counts = nn.functional.one_hot(votes, len(call.routing.experts)).sum(0)
            elected[group] = counts.argmax(-1)
    return elected
