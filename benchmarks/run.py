"""A suite from nothing to its table: data, base, experts, statistics, merges, accuracies.

    python benchmarks/run.py text --work DIR --regime hard --tasks 8
    python benchmarks/run.py glyphs --work DIR --tasks 8 --seeds 3
    python benchmarks/run.py mpnet --work DIR2 --tasks 8    # the text tasks, five times the size
    python benchmarks/run.py gemma --work DIR3 --tasks 8    # a decoder: answers of one token

Every step is resumable, so the same command continues a killed run and repeats nothing. As many
processes as there are cores (two at most, one thread each) share the work: first one proxy sample
of every row, then, with `--seeds`, further samples of the rows that read any. Every row is measured
except MaTS at a hundred plain steps, which takes as long as all the others, on 500 test texts or
1000 test images a task (`--test-texts` for another number). With `--executor ray` the processes are
those of a Ray cluster, a core each, whose machines see this folder and DIR under the same paths.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

from table.merging import ALL_ROWS, ROWS
from table.routing import BASES, add_row_options

PROCESSES = min(2, os.cpu_count() or 1)
COMMAND_BYTES = 2_000_000_000  # that a command asks a cluster for


def python(script: str, *words: str) -> list[str]:
    """Return the command that runs a script of this folder."""
    return [sys.executable, str(HERE / script), *words]


def run_words(words: Sequence[str]) -> int:
    """Run a command, here or on a worker of a cluster, and return its exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, check=False, env=environment).returncode


@dataclass
class Workers:
    """Who runs commands: so many processes of this machine, or the workers of a Ray cluster."""

    count: int = PROCESSES
    memory: int | None = None  # bytes of a whole cluster; None: no cluster

    def codes(self, commands: Sequence[Sequence[str]]) -> list[int]:
        """Run commands side by side and return their exit codes."""
        if self.memory is None:
            with ThreadPoolExecutor(self.count) as pool:
                return list(pool.map(run_words, commands))
        from eutectic.cluster.spread import Bounds, Call, spread

        calls = [Call(" ".join(words)[:80], run_words, words, COMMAND_BYTES) for words in commands]
        return [found.value for _, found in spread(calls, Bounds(self.count, self.memory))]


workers = Workers()


def join(address: str | None) -> None:
    """Let the workers of a Ray cluster run what follows; one is started here without an address."""
    from eutectic.cluster.where import joined

    found = joined(address)
    workers.count, workers.memory = found.cpus, found.memory


def share(commands: Iterable[Sequence[str]], what: str) -> None:
    """Run the commands, as many at a time as there are workers; stop if one of them failed."""
    start = time.monotonic()
    if any(workers.codes(list(commands))):
        raise SystemExit(f"Not all of it was made ({what}); the same command continues.")
    print(f"{what}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


def names_of(suite: str, tasks: int) -> tuple[str, ...]:
    """Return the names of the first tasks of a suite."""
    sys.path[:0] = [str(HERE / ("text" if suite == "mpnet" else suite))]
    if suite == "glyphs":
        from data import TASKS

        return TASKS[:tasks]
    if suite == "gemma":
        from tasks import TASKS

        return tuple(TASKS)[:tasks]
    from sources import first_tasks

    return first_tasks(tasks)


def make_experts(arguments: argparse.Namespace) -> None:
    """Fetch the data and train what is missing."""
    work = ("--work", str(arguments.work))
    if arguments.suite == "glyphs":
        share([python("glyphs/run.py", *work)], "data, base and experts")
        return
    names = names_of(arguments.suite, arguments.tasks)
    parts = [names[k :: workers.count] for k in range(workers.count)]
    parts = [part for part in parts if part]
    words = [[word for name in part for word in ("--task", name)] for part in parts]
    regime = ("--regime", arguments.regime)
    script = "gemma/experts.py" if arguments.suite == "gemma" else "text/experts.py"
    based = () if arguments.suite == "gemma" else ("--base", arguments.suite)
    commands = [python(script, *based, *work, *regime, *own) for own in words]
    if arguments.suite != "text" and not (arguments.work / "tasks").is_dir():
        # Both would unpack the base.
        first = python(script, *based, *work, *regime, *words[0][:2])
        share([first], "packages and the first expert")
    share(commands, "data and experts")


def make_table(arguments: argparse.Namespace, others: Sequence[str], seeds: int) -> None:
    """Measure every row on so many proxy samples and print the table."""
    suite = [arguments.suite, "--work", str(arguments.work), "--regime", arguments.regime]
    suite += ["--tasks", str(arguments.tasks), "--seeds", str(seeds)]
    suite += others

    def rows(*names: str, bases: Sequence[str] = BASES, threads: int = 1) -> list[str]:
        words = ["--rows", *names, "--bases", *bases, "--threads", str(threads)]
        return python("table/run.py", *suite, *words)

    known = ALL_ROWS if arguments.regime.startswith("lora") else ROWS
    asked = set(arguments.rows or [*(n for n in known if not n.endswith("_100")), "routed"])
    asked |= set(arguments.bases if "routed" in asked else ())
    own = [known[name] for name in asked if name in known]
    asked |= {needed for row in own for needed in (row.init, row.scale_of) if needed}
    kept = [name for name in known if name in asked and (seeds == 1 or known[name].seeded)]
    initial = [n for n in kept if any(n in (row.init, row.scale_of) for row in known.values())]
    # The last rows of the list take the longest, so they begin first.
    later = [name for name in reversed(kept) if name not in initial]
    names = names_of(arguments.suite, arguments.tasks)
    divided = [own for k in range(workers.count) if (own := names[k :: workers.count])]
    samples = "one proxy sample" if seeds == 1 else f"{seeds} proxy samples"
    if arguments.regime.startswith("lora"):
        share([[*rows(), "--collect"]], "adapters made dense")
    share([[*rows(), "--collect", *own] for own in divided], "statistics")
    share([rows()], "base and experts")
    share([rows(name) for name in initial], "initial merges")
    share([rows(name) for name in later], f"merges, {samples}")
    if "routed" in asked:
        models = [rows("routed", bases=(base,)) for base in arguments.bases]
        share(models, f"routed models, {samples}")
    subprocess.run(rows(*sorted(asked), bases=arguments.bases, threads=PROCESSES), check=True)


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Other options go to table/run.py: --test-texts, --validation-texts, --label-free, "
        "--no-alignment.",
    )
    parser.add_argument("suite", choices=["text", "mpnet", "gemma", "glyphs"])
    parser.add_argument("--work", type=Path, required=True, help="folder of everything it makes")
    parser.add_argument(
        "--regime",
        default="hard",
        choices=["kind", "hard", "lora", "lora-unequal", "lora-extracted"],
    )
    parser.add_argument("--tasks", type=int, default=8, help="the first so many")
    parser.add_argument("--seeds", type=int, default=1, help="proxy samples")
    parser.add_argument("--executor", choices=["threads", "ray"], default="threads")
    parser.add_argument("--ray-address", help="of a cluster (default: one is started here)")
    add_row_options(parser, "all but MaTS at 100 plain steps")
    arguments, others = parser.parse_known_args()
    if arguments.executor == "ray":
        join(arguments.ray_address)
    elif arguments.ray_address:
        parser.error("--ray-address goes with --executor ray")
    start = time.monotonic()
    make_experts(arguments)
    for seeds in sorted({1, arguments.seeds}):
        make_table(arguments, others, seeds)
        print(f"{(time.monotonic() - start) / 60:.1f} minutes in all", flush=True)


if __name__ == "__main__":
    main()
