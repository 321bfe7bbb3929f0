"""A suite from nothing to its table: data, base, experts, statistics, merges, accuracies.

    python benchmarks/run.py text --work DIR --regime hard --tasks 8
    python benchmarks/run.py glyphs --work DIR --tasks 8 --seeds 3
    python benchmarks/run.py mpnet --work DIR2 --tasks 8    # the text tasks, five times the size
    python benchmarks/run.py gemma --work DIR3 --tasks 8    # a decoder: answers of one token
    python benchmarks/run.py emoji --work DIR5 --tasks 8    # a network of convolutions

Every step is resumable, so the same command continues a killed run and repeats nothing. As many
processes as there are cores (two at most, one thread each) share the work: first one proxy sample
of every row, then, with `--seeds`, further samples of the rows that read any. Every row is measured
except MaTS at a hundred plain steps, which takes as long as all the others, on 500 test texts,
1000 glyphs or 300 emoji a task (`--test-texts` for another number). With `--executor ray` the
processes are those of a Ray cluster, a core each, whose machines see this folder and DIR under the
same paths.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

from table.merging import known_rows
from table.routing import add_row_options
from table.spreading import (
    PROCESSES,
    Workers,
    add_executor_options,
    asked_workers,
    collect,
    measure_rows,
    needed_rows,
    python,
)


def names_of(suite: str, tasks: int) -> tuple[str, ...]:
    """Return the names of the first tasks of a suite."""
    sys.path[:0] = [str(HERE / ("text" if suite == "mpnet" else suite))]
    if suite in ("glyphs", "emoji"):
        from data import TASKS

        return TASKS[:tasks]
    if suite == "gemma":
        from tasks import TASKS

        return tuple(TASKS)[:tasks]
    from confirmation import named_tasks

    return named_tasks(tasks)


def make_experts(arguments: argparse.Namespace, workers: Workers) -> None:
    """Fetch the data and train what is missing."""
    work = ("--work", str(arguments.work))
    if arguments.suite == "glyphs":
        workers.share([python("glyphs/run.py", *work)], "data, base and experts")
        return
    names = names_of(arguments.suite, arguments.tasks)
    parts = workers.divided(names)
    words = [[word for name in part for word in ("--task", name)] for part in parts]
    regime = ("--regime", arguments.regime)
    own_script = arguments.suite in ("gemma", "emoji")
    script = f"{arguments.suite if own_script else 'text'}/experts.py"
    based = () if own_script else ("--base", arguments.suite)
    commands = [python(script, *based, *work, *regime, *own) for own in words]
    made = any((arguments.work / folder).is_dir() for folder in ("tasks", "base"))
    if arguments.suite != "text" and not made:
        # Both would unpack the base.
        first = python(script, *based, *work, *regime, *words[0][:2])
        workers.share([first], "packages and the first expert")
    workers.share(commands, "data and experts")


def make_table(
    arguments: argparse.Namespace, workers: Workers, others: Sequence[str], seeds: int
) -> None:
    """Measure every row on so many proxy samples and print the table."""
    words = [arguments.suite, "--work", str(arguments.work), "--regime", arguments.regime]
    words += ["--tasks", str(arguments.tasks), "--seeds", str(seeds), *others]
    table = python("table/run.py", *words)
    adapters = arguments.regime.startswith("lora")
    convolutions = arguments.suite == "emoji"
    known = known_rows(adapters, convolutions)
    routed = [] if convolutions else ["routed"]
    asked = set(arguments.rows or [*(n for n in known if not n.endswith("_100")), *routed])
    asked |= set(arguments.bases if "routed" in asked else ())
    asked = needed_rows(asked, known)
    rows = [name for name in known if name in asked and (seeds == 1 or known[name].seeded)]
    rows += ["routed"] if "routed" in asked else []
    samples = "one proxy sample" if seeds == 1 else f"{seeds} proxy samples"
    if adapters:
        workers.share([[*table, "--rows", "--collect"]], "adapters made dense")
    collect(workers, table, sorted(asked), names_of(arguments.suite, arguments.tasks))
    workers.share([[*table, "--rows", "--threads", "1"]], "base and experts")
    print(f"rows, {samples}", flush=True)
    measure_rows(workers, table, rows, arguments.bases)
    last = ["--rows", *sorted(asked), "--bases", *arguments.bases, "--threads", str(PROCESSES)]
    subprocess.run([*table, *last], check=True)


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Other options go to table/run.py: --test-texts, --validation-texts, --label-free, "
        "--no-alignment.",
    )
    parser.add_argument("suite", choices=["text", "mpnet", "gemma", "glyphs", "emoji"])
    parser.add_argument("--work", type=Path, required=True, help="folder of everything it makes")
    parser.add_argument(
        "--regime",
        default="hard",
        choices=["kind", "hard", "lora", "lora-unequal", "lora-extracted"],
    )
    parser.add_argument("--tasks", type=int, default=8, help="the first so many")
    parser.add_argument("--seeds", type=int, default=1, help="proxy samples")
    add_executor_options(parser)
    add_row_options(parser, "all but MaTS at 100 plain steps")
    arguments, others = parser.parse_known_args()
    arguments.work = arguments.work.resolve()  # workers begin elsewhere
    workers = asked_workers(parser, arguments)
    start = time.monotonic()
    make_experts(arguments, workers)
    for seeds in sorted({1, arguments.seeds}):
        make_table(arguments, workers, others, seeds)
        print(f"{(time.monotonic() - start) / 60:.1f} minutes in all", flush=True)


if __name__ == "__main__":
    main()
