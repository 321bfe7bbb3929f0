"""Workers of a cluster that each keep a state between calls, and may be lost with it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from eutectic.cluster.connection import Cluster, import_ray, size_of_cluster
from eutectic.cluster.gpus import ALL_VISIBLE
from eutectic.cluster.workers import Answer, answer, versions
from eutectic.errors import EutecticError


class LostMember(Exception):
    """A member is lost with its state."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(number, why)
        self.number, self.why = number, why


class _Host:
    """What runs on the worker: the member's object, made by the first call."""

    def __init__(self, make: Callable[[Any], Any], payload: Any) -> None:
        self._make, self._payload = (
            make,
            payload,
        )  # Ray has put the payload in place of its reference
        self._member: Any = None

    def call(self, method: str, arguments: tuple[Any, ...], expected: dict[str, str]) -> Answer:
        import ray

        def work(given: tuple[Any, ...]) -> Any:
            if self._member is None:
                self._member = self._make(self._payload)
            return getattr(self._member, method)(*given)

        return answer(work, arguments, expected, ray.util.get_node_ip_address())


class Crew:
    """Members that stay; `make(payload)`, both picklable, makes each on its worker.

    Each has a core and the share `gpus` of a GPU, which is `gpus.given_gpu()` there.
    """

    def __init__(
        self,
        make: Callable[[Any], Any],
        payload: Any,
        count: int,
        memory: int,
        cluster: Cluster,
        gpus: float = 0.0,
    ) -> None:
        self._ray = import_ray()
        self._make, self._payload = make, self._ray.put(payload)
        largest = cluster.largest_with_gpu if gpus else cluster.largest
        self._memory, self._expected, self._gpus = min(memory, largest), versions(), gpus
        self._members = [self._hire(1, self._memory) for _ in range(count)]

    def _hire(self, cpus: int, memory: int) -> Any:
        hosts = self._ray.remote(max_restarts=0, max_task_retries=0)(_Host)
        own: dict[str, Any] = {"num_cpus": cpus, "memory": memory or None}
        if self._gpus:
            own |= {"num_gpus": self._gpus, "runtime_env": ALL_VISIBLE}
        return hosts.options(**own).remote(self._make, self._payload)

    def __len__(self) -> int:
        return len(self._members)

    def ask(self, number: int, method: str, *arguments: Any) -> Any:
        """Call a method of a member and return what `wait_for` takes."""
        return self._members[number].call.remote(method, arguments, self._expected)

    def wait_for(self, number: int, asked: Any) -> Any:
        """Return what a method returned, or raise what it raised; LostMember where it is gone."""
        errors = self._ray.exceptions
        while True:  # a wait without an end could not be interrupted everywhere
            done, _ = self._ray.wait([asked], timeout=0.5)
            if done:
                break
        try:
            found: Answer = self._ray.get(asked)
        except errors.RayTaskError:
            raise
        except errors.RayError as error:
            raise LostMember(number, type(error).__name__) from error
        if found.out_of_memory:
            raise LostMember(number, "out of memory")
        if found.kind is not None:
            raise found.error()
        return found.value

    def replace(self, number: int) -> None:
        """Hire somebody for a lost member, beside others where the cluster has become too small."""
        with suppress(Exception):
            self._ray.kill(self._members[number])
        room = size_of_cluster()
        if room.gpus < self._gpus * len(self):
            raise EutecticError(
                f"{len(self)} workers need {self._gpus:.1%} of a GPU each, and the cluster has "
                f"{room.gpus:g} left.\nWhat was saved is kept for the same command, which takes "
                "as many workers as there are GPUs."
            )
        fits = room.cpus >= len(self) and room.memory >= self._memory * len(self)
        self._members[number] = self._hire(int(fits), self._memory if fits else 0)

    def dismiss(self) -> None:
        """End all members."""
        for member in self._members:
            with suppress(Exception):  # the cluster may be gone
                self._ray.kill(member)
