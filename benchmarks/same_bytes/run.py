"""Does a change of the code change one output byte?

    python benchmarks/same_bytes/run.py --work DIR --output old.json          # before
    python benchmarks/same_bytes/run.py --work DIR --output new.json          # after
    python benchmarks/same_bytes/run.py --compare old.json new.json

Carries out some seven hundred merges, collections, routes, evaluations, inspections and searches on
tiny models and on the demo's adapters, through the public functions and the command line alone, and
writes a hash of every file and of every returned value. Inputs are made in DIR/inputs by whichever
commit runs first; runs that are to be compared must share DIR. `PYTHONPATH=…/src` chooses the code.
A case that fails is kept with its error; refusals are among what is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

TOLD = "plan/"  # cases that may differ

Found = dict[str, dict[str, str]]


def carry_out(work: Path, output: Path, pattern: str, threads: int) -> int:
    """Carry out the cases whose names match, and write their hashes."""
    import torch
    import transformers

    import eutectic

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    from case import World
    from inputs import make_inputs
    from merges import merge_cases
    from others import other_cases

    print(f"eutectic of {Path(eutectic.__file__).parent}")
    work = work.resolve()
    make_inputs(work / "inputs", HERE.parents[1] / "examples" / "minilm")
    world = World(work / "inputs", threads)
    cases = [
        case
        for case in (*merge_cases(world), *other_cases(world))
        if pattern in case.name or fnmatchcase(case.name, pattern)
    ]
    names = [case.name for case in cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SystemExit(f"cases of one name: {twice}")
    scratch = work / f"scratch-{os.getpid()}"
    found: Found = {}
    took: dict[str, float] = {}
    try:
        for case in cases:
            start = time.perf_counter()
            found[case.name] = one(case, scratch, work)
            took[case.name] = time.perf_counter() - start
            if "error" in found[case.name]:
                print(f"{case.name}: {found[case.name]['error']}", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    output.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    failed = sum("error" in files for files in found.values())
    print(f"{len(found)} cases, {failed} of them errors, {sum(took.values()):.0f} s")
    for name in sorted(took, key=lambda name: -took[name])[:10]:
        print(f"  {took[name]:6.1f} s  {name}")
    return 0


def one(case: Any, scratch: Path, work: Path) -> dict[str, str]:
    """Carry out one case in an empty folder; an error is a result too."""
    from hashes import Places, digests, value_digests

    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    places = Places({"OUT": scratch, "WORK": work})
    try:
        returned = case.run(scratch)
    except Exception as error:
        text = " ".join(places.hide(str(error)).split())
        return {"error": f"{type(error).__name__}: {text}"}
    if case.name.startswith(TOLD):
        return {key: places.hide(json.dumps(value)) for key, value in timeless(returned).items()}
    files = digests(scratch, places)
    if returned is not None:
        files |= value_digests(returned, places)
    return files


def timeless(text: str) -> dict[str, Any]:
    """Return a plan in JSON without its seconds, which are measured on the machine."""

    def without(value: Any) -> Any:
        if isinstance(value, list):
            return [without(item) for item in value]
        if isinstance(value, dict):
            return {key: without(item) for key, item in value.items() if key != "seconds"}
        return value

    return without(json.loads(text))


def compare(old: Found, new: Found) -> int:
    """Print the cases that differ or are missing; return 1 if there are any.

    Plans, and fields of reports that the old code did not have, are told but not judged.
    """
    names = sorted(old.keys() | new.keys())
    faults, told = 0, 0
    added: dict[str, int] = {}
    for name in names:
        changed = _changed(old.get(name), new.get(name))
        fields = [c for c in changed if _is_new_field(c, old.get(name))]
        for field in fields:
            added[field] = added.get(field, 0) + 1
        if changed := [c for c in changed if c not in fields]:
            judged = not name.startswith(TOLD)
            faults, told = faults + judged, told + (not judged)
            print(f"{'' if judged else 'told, not judged: '}{name}: {', '.join(changed)}")
    for field, count in added.items():
        print(f"told, not judged: {field} is new in {count} cases")
    print(f"{len(names)} cases compared, {faults} differ; {told} that are only told")
    return 1 if faults else 0


def _is_new_field(changed: str, old: Mapping[str, str] | None) -> bool:
    return old is not None and changed.startswith("returned.") and changed not in old


def _changed(old: Mapping[str, str] | None, new: Mapping[str, str] | None) -> list[str]:
    """Return in words what differs: names of files and fields, or errors."""
    if old is None or new is None:
        return ["only in the new file" if old is None else "only in the old file"]
    if old == new:
        return []
    if "error" in old or "error" in new:
        return [f"{old.get('error', 'done')}  ->  {new.get('error', 'done')}"]
    return [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder for inputs and scratch files")
    parser.add_argument("--output", type=Path, help="file for the hashes")
    parser.add_argument("--only", default="*", help="part of a name, or a shell pattern")
    parser.add_argument("--threads", type=int, default=1, help="of merges; changes no byte")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"))
    asked = parser.parse_args()
    if asked.compare:
        old, new = (json.loads(path.read_text(encoding="utf-8")) for path in asked.compare)
        return compare(old, new)
    if asked.work is None or asked.output is None:
        parser.error("name --work and --output, or --compare OLD NEW")
    return carry_out(asked.work, asked.output, asked.only, asked.threads)


if __name__ == "__main__":
    sys.exit(main())
