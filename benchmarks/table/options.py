"""The command line of a suite's table, and the commands that fill parts of it."""

from __future__ import annotations

import argparse
from pathlib import Path

from table.routing import add_row_options
from table.spreading import Workers, add_executor_options, asked_workers, python

VALIDATION_TEXTS = 150
LABEL_FREE = ("divergence", "grams", "held_out")
# Of every task; of the adapters, all.
TEST_EXAMPLES = {"text": 500, "mpnet": 500, "gemma": 500, "glyphs": 1000, "emoji": 300}
THREADS = 2


def parse() -> tuple[argparse.Namespace, Workers | None]:
    """Return what the command line asks for, and the workers of a cluster if it names one."""
    parser = argparse.ArgumentParser(description="Make a suite's table of methods.")
    parser.add_argument("suite", choices=["text", "mpnet", "gemma", "glyphs", "emoji", "adapters"])
    parser.add_argument("--work", type=Path, required=True, help="folder of the suite's experts")
    parser.add_argument(
        "--regime", default="hard", help="kind, hard, lora, lora-unequal or lora-extracted (text)"
    )
    parser.add_argument(
        "--tasks",
        type=int,
        default=8,
        help="the first so many tasks; 6: the miniature; 0: the texts of confirmation.py",
    )
    parser.add_argument("--seeds", type=int, default=3, help="proxy samples")
    add_row_options(parser, "all")
    parser.add_argument(
        "--counts", type=int, nargs="*", default=[], help="smaller proxy samples for the routers"
    )
    parser.add_argument(
        "--routed",
        nargs="+",
        metavar="ROW",
        help="of the routed rows only these, such as routed-iso_a-32-discriminant",
    )
    parser.add_argument(
        "--label-free",
        nargs="*",
        choices=LABEL_FREE,
        default=LABEL_FREE[:2],
        help="how α is chosen without labels (default: divergence grams; nothing: not at all)",
    )
    parser.add_argument("--no-alignment", action="store_true", help="no subspace alignment")
    parser.add_argument(
        "--test-texts", type=int, help="of every task; default: 500 texts, 1000 glyphs, 300 emoji"
    )
    parser.add_argument(
        "--validation-texts", type=int, default=VALIDATION_TEXTS, help="of every task, to choose α"
    )
    parser.add_argument(
        "--collect",
        nargs="*",
        help="only collect the statistics of these tasks that the rows read",
        metavar="TASK",
    )
    parser.add_argument(
        "--in-process", action="store_true", help="merge in this process: no peak memory of its own"
    )
    parser.add_argument(
        "--threads", type=int, help=f"of a process (default: {THREADS}; of a cluster's worker one)"
    )
    add_executor_options(parser)
    arguments = parser.parse_args()
    if arguments.test_texts is None:
        arguments.test_texts = TEST_EXAMPLES.get(arguments.suite)
    spread = arguments.executor == "ray"
    if spread and arguments.collect is not None:
        parser.error("--collect is one command of those that --executor ray spreads")
    if spread and arguments.routed:
        parser.error("--routed names rows that this process measures: leave --executor ray out")
    if spread and arguments.threads not in (None, 1):
        parser.error("a worker of a cluster has one core: leave --threads out")
    if arguments.threads is None:
        arguments.threads = 1 if spread else THREADS
    workers = asked_workers(parser, arguments)
    return arguments, workers if spread else None


def table_command(arguments: argparse.Namespace) -> list[str]:
    """Return the command of the same table without its rows and who measures them."""
    words = [arguments.suite, "--work", str(arguments.work.resolve())]
    words += ["--regime", arguments.regime, "--tasks", str(arguments.tasks)]
    words += ["--seeds", str(arguments.seeds), "--counts", *map(str, arguments.counts)]
    words += ["--label-free", *arguments.label_free]
    words += ["--validation-texts", str(arguments.validation_texts)]
    if arguments.test_texts is not None:
        words += ["--test-texts", str(arguments.test_texts)]
    words += ["--no-alignment"] if arguments.no_alignment else []
    words += ["--in-process"] if arguments.in_process else []
    return python("table/run.py", *words)
