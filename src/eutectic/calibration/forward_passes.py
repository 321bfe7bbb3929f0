"""Forward passes that stop in front of a layer and go on when they are told to.

Every pass, one model on one batch, has a thread of its own, whose stack keeps what the rest of the
pass needs: hidden states, masks, what a decoder reads of its encoder. So a model of any
architecture is calibrated in one pass, layer by layer, by its own code. Between two stops a pass
computes with one intra-op thread, so that no byte depends on how many run side by side.
"""

import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from eutectic.models.batches import Layout

_running = threading.local()


class _Ended(BaseException):
    """Unwinds a pass whose rest nobody needs; no model catches it."""


class ForwardPass:
    """One model on one batch; `stands_at` is the path of the module that it is about to call."""

    def __init__(
        self,
        run: Callable[[], object],
        layout: Layout,
        stops: Collection[str],
        slots: threading.Semaphore,
    ) -> None:
        """Make a pass that stops in front of modules in `stops`, once it is told to go.

        `stops` may shrink while it stands; where nothing is left, the pass ends.
        """
        self.layout = layout
        self.stands_at: str | None = None
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.error: BaseException | None = None
        self._run, self._stops, self._slots = run, stops, slots
        self._told, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._body, daemon=True)
        self._ending = False

    def go(self) -> None:
        """Begin, or go on from a stop, as soon as there is a slot."""
        self._slots.acquire()
        self.stands_at, self.arguments = None, ((), {})
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._told.release()

    def wait(self) -> None:
        """Return when the pass stands, or has ended."""
        self._stands.acquire()

    def end(self) -> None:
        """Unwind a pass that stands, now, or one that runs, at its next stop."""
        self._ending = True
        if self.stands_at is not None:
            self.go()
            self.wait()

    def stop_at(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Stand in front of a module until told to go on; called by the pass itself."""
        if self._ending:
            raise _Ended
        if path not in self._stops:
            return
        self.stands_at, self.arguments = path, (args, kwargs)
        self._slots.release()
        self._stands.release()
        self._told.acquire()
        if self._ending or not self._stops:
            raise _Ended

    def _body(self) -> None:
        _running.forward = self
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                self._run()
        except _Ended:
            pass
        except BaseException as error:  # told by the thread that waits
            self.error = error
        finally:
            self._slots.release()
            self._stands.release()


def advance(passes: Sequence[ForwardPass]) -> None:
    """Let passes run to their next stop or their end; the first error of any is raised."""
    for each in passes:
        each.go()
    for each in passes:
        each.wait()
    for each in passes:
        if each.error is not None:
            raise each.error


def stopping_hook(path: str) -> Callable[..., None]:
    """Return a forward pre-hook (with keywords) in front of which the passes stop.

    Calls of the module from elsewhere run through.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current = running_pass()
        if current is not None:
            current.stop_at(path, args, kwargs)

    return hook


def running_pass() -> ForwardPass | None:
    """Return the pass whose thread asks; None elsewhere."""
    return getattr(_running, "forward", None)
