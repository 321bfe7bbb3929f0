"""Who runs the commands of a suite: processes of this machine, or the workers of a Ray cluster."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from table.merging import ALL_ROWS, Row

HERE = Path(__file__).resolve().parents[1]
PROCESSES = min(2, os.cpu_count() or 1)
COMMAND_BYTES = 2_000_000_000  # that a command asks a cluster for
LINES = 20  # of what a failed command told

# By what it says and not as a function of this file, which the workers need not find.
_on_worker = partial(
    subprocess.run, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
)


def python(script: str, *words: str) -> list[str]:
    """Return the command that runs a script of the benchmarks with one thread."""
    return ["env", "OMP_NUM_THREADS=1", sys.executable, str(HERE / script), *words]


@dataclass
class Workers:
    """Who runs commands: so many processes of this machine, or the workers of a Ray cluster."""

    count: int = PROCESSES
    memory: int | None = None  # bytes of a whole cluster; None: no cluster

    def codes(self, commands: Sequence[Sequence[str]]) -> list[int]:
        """Run commands side by side and return their exit codes.

        What a command tells appears as it comes; on a cluster, its last lines if it failed.
        """
        if self.memory is None:
            with ThreadPoolExecutor(self.count) as pool:
                runs = pool.map(partial(subprocess.run, check=False), commands)
                return [done.returncode for done in runs]
        from eutectic.cluster.spread import Bounds, Call, spread

        calls = [Call(" ".join(words)[:80], _on_worker, words, COMMAND_BYTES) for words in commands]
        codes: list[int] = []
        for call, found in spread(calls, Bounds(self.count, self.memory)):
            done = found.value
            codes.append(done.returncode)
            if done.returncode:
                last = "\n".join(done.stdout.splitlines()[-LINES:])
                print(f"{' '.join(call.payload)}\n{last}", file=sys.stderr, flush=True)
        return codes

    def share(self, commands: Iterable[Sequence[str]], what: str) -> None:
        """Run the commands, as many at a time as there are workers; stop if one of them failed."""
        start = time.monotonic()
        if any(self.codes(list(commands))):
            raise SystemExit(f"Not all of it was made ({what}); the same command continues.")
        print(f"{what}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)

    def divided(self, names: Sequence[str]) -> list[Sequence[str]]:
        """Return the names in as many parts as there are workers, or fewer."""
        return [own for k in range(self.count) if (own := names[k :: self.count])]


def add_executor_options(parser: argparse.ArgumentParser) -> None:
    """Let the command line say who runs the commands."""
    parser.add_argument("--executor", choices=["threads", "ray"], default="threads")
    parser.add_argument("--ray-address", help="of a cluster (default: one is started here)")


def asked_workers(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Workers:
    """Return those that the command line asks for; a cluster is joined or started here."""
    if arguments.executor == "ray":
        from eutectic.cluster.where import joined

        found = joined(arguments.ray_address)
        return Workers(found.cpus, found.memory)
    if arguments.ray_address:
        parser.error("--ray-address goes with --executor ray")
    return Workers()


def measure_rows(
    workers: Workers, table: Sequence[str], rows: Collection[str], bases: Sequence[str]
) -> None:
    """Have the rows of a table measured, a command each, in the order in which they need others.

    Args:
        workers: who runs the commands.
        table: the command of the table without its rows.
        rows: names of static rows, and `routed` for the routed models.
        bases: what the routed models stand on, a command each.
    """

    def command(*names: str, bases: Sequence[str] = bases) -> list[str]:
        return [*table, "--rows", *names, "--bases", *bases, "--threads", "1"]

    kept = [name for name in ALL_ROWS if name in rows]
    first = {needed for row in ALL_ROWS.values() for needed in (row.init, row.scale_of)}
    initial = [name for name in kept if name in first]
    # The last rows of the list take the longest, so they begin first.
    later = [name for name in reversed(kept) if name not in first]
    for names, what in ((initial, "initial merges"), (later, "merges")):
        if names:
            workers.share([command(name) for name in names], what)
    if "routed" in rows:
        workers.share([command("routed", bases=(base,)) for base in bases], "routed models")


def collect(
    workers: Workers, table: Sequence[str], rows: Collection[str], tasks: Sequence[str]
) -> None:
    """Have the statistics of a suite's tasks collected that rows of its table read."""
    commands = [
        [*table, "--rows", *rows, "--collect", *own, "--threads", "1"]
        for own in workers.divided(tasks)
    ]
    workers.share(commands, "statistics")


def needed_rows(rows: Collection[str], known: Mapping[str, Row]) -> set[str]:
    """Return the rows, and those whose α they take over or begin with."""
    own = [known[name] for name in rows if name in known]
    return {*rows, *(name for row in own for name in (row.init, row.scale_of) if name)}
