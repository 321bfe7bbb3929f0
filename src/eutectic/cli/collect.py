"""`eutectic collect`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from eutectic.cli.console import doing, grid, out, print_json, progress_bar, tell_done, verb
from eutectic.cli.named_words import named_paths
from eutectic.cli.options import (
    DataOptions,
    Json,
    WhereOptions,
    argument,
    given_options,
    option,
    refuse,
)
from eutectic.errors import RequestError
from eutectic.options import dtype_name
from eutectic.recipes.units import format_bytes, parse_bytes
from eutectic.storage import storage_of, url_of
from eutectic.words import few

if TYPE_CHECKING:
    from eutectic.models.linear_head import Head
    from eutectic.models.loading import LoadedModel
    from eutectic.statistics import StatisticsFile

# What only some collections look at.
_WITH_GRADIENTS = ("head", "labels", "seed", "label_column", "prompt")
_WITH_HEAD = ("pooling", "normalize")
_ADDING = {"output", "add", "min_tokens", "json"}


@dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """The model that is run, and on what."""

    checkpoint: Path | None = argument(
        None, "The expert: a folder, or an adapter folder with --base."
    )
    data: str | None = option(
        None,
        "Proxy data: jsonl, csv, tsv, parquet, txt, folder of images, `datasets` folder, or "
        "module:function.",
    )
    base: Path | None = option(None, "The base of an adapter.")
    adapters: list[str] | None = option(
        None,
        "Keep only what these LoRA adapters see of the inputs; name all that will be merged.",
        "--for",
        metavar="[NAME=]ADAPTER",
    )


@dataclass(frozen=True, kw_only=True)
class GradientOptions:
    """What is collected of gradients, and by which head and labels."""

    output_gradients: bool = option(
        False, "Also Grams of output gradients (K-FAC).", "--output-gradients"
    )
    fisher: bool = option(False, "Also the diagonal Fisher of all parameters.", "--fisher")
    block_fisher: bool = option(False, "Also the block Fisher of vectors.", "--block-fisher")
    labels: str = option("data", "data: labels of the data; sample: drawn from the model.")
    seed: int = option(0, "Seed of sampled labels.")
    head: Path | None = option(
        None, "A linear head beside the checkpoint: safetensors with `weight` and `bias`."
    )
    pooling: str = option("mean", "Features that --head takes: mean, cls or pooler.")
    normalize: bool = option(False, "Scale those features to length 1 first.", "--normalize")
    prompt: list[str] | None = option(
        None, "Of zero-shot tasks: a text with {} for the class name; repeatable.", metavar="TEXT"
    )

    @property
    def any(self) -> bool:
        """Whether gradients are asked for."""
        return self.output_gradients or self.fisher or self.block_fisher


@dataclass(frozen=True, kw_only=True)
class SumOptions(WhereOptions):
    """What is summed, of which layers, and how it is stored."""

    max_examples: int | None = option(None, "Stop after so many (with gradients: 1000).", min=1)
    min_tokens: int | None = option(
        None, "Refuse to write sums over fewer tokens, of which texts can be told.", min=1
    )
    rank: str | None = option(
        None,
        "Keep so many directions, and a diagonal, of wider layers; auto: 90 % of the energy.",
        metavar="N|auto",
    )
    layers: list[str] | None = option(None, "Parameters to observe.", metavar="GLOB")
    convolutions: bool = option(False, "Observe convolutions too.", "--convolutions")
    unmatched: str = option("error", "Layers whose inputs fit no mask: error, all or skip.")
    share_inputs: bool = option(
        True, "Store once what layers with one input share.", "--share-inputs/--no-share-inputs"
    )
    dtype: str = option("float32", "Of the stored sums: float32 or float64.")
    memory: str | None = option(None, "Limit for the running sums, such as 4GB; more passes.")
    shards: int | None = option(
        None,
        "With --executor ray: parts of the data, a worker each (default: cores).",
        min=1,
    )


@verb
def collect(
    *,
    context: typer.Context,
    output: Path = option(..., "Statistics file to write.", "--output", "-o"),
    expert: ExpertOptions,
    gradients: GradientOptions,
    sums: SumOptions,
    reading: DataOptions,
    add: list[Path] | None = option(
        None, "Add statistics of other data; may be repeated.", metavar="FILE"
    ),
    json: Json = False,
) -> None:
    """Collect an expert's statistics over its proxy data, or add statistics files.

    The unfinished state is kept in OUTPUT.partial; a killed run is continued by the same command.

    Examples:
      eutectic collect ./sst2 --data proxy.jsonl -o sst2.stats.safetensors

      eutectic collect ./sst2-lora --base ./base --data proxy.csv -o sst2.stats.safetensors

      eutectic collect ./sst2 --data proxy.jsonl --output-gradients --labels sample -o x.safetensors

      eutectic collect ./sst2 --head sst2-head.safetensors --output-gradients \
          --labels sample --data proxy.jsonl -o sst2.stats.safetensors

      eutectic collect ./sst2-lora --base ./base --data proxy.csv --for ./sst2-lora \
          --for ./mnli-lora -o sst2.stats.safetensors

      eutectic collect --add first.safetensors --add second.safetensors -o both.safetensors
    """
    if dtype_name(sums.dtype) not in ("float32", "float64"):
        raise RequestError(f"--dtype {sums.dtype}: allowed are float32 and float64.")
    from eutectic.statistics import add_statistics, load_statistics
    from eutectic.statistics.statistics_file import check_target

    started = time.monotonic()
    given = given_options(context)
    randomly_initialised: Sequence[str] = ()
    if expert.checkpoint is None:
        if expert.data is not None or not add:
            raise RequestError(
                "name a CHECKPOINT and its --data, or statistics files to --add.\n"
                "Example: eutectic collect ./expert --data proxy.jsonl -o expert.stats.safetensors"
            )
        refuse(
            [option for name, option in given.items() if name not in _ADDING],
            "for collecting, and files are only added.",
            "Name a CHECKPOINT and its --data to collect and add.",
        )
        result = add_statistics(add, output, sums.min_tokens)
    else:
        if expert.data is None:
            raise RequestError(f"{expert.checkpoint}: no data to run it on; name them with --data.")
        _check_given(given, gradients)
        _rank(sums.rank)
        for file in add or ():
            load_statistics(file)  # a file that cannot be added is told before any data are run
        check_target(output)
        with _locked(output) if add else nullcontext():
            # What is to be added goes through a file of its own: OUTPUT is never half a sum.
            target = output.with_name(f"{output.name}.collected") if add else output
            own = replace(sums, min_tokens=None) if add else sums  # it is the whole that counts
            result, randomly_initialised = _collected(expert, gradients, own, reading, target)
            if add:
                result = add_statistics([result, *add], min_tokens=sums.min_tokens).save(output)
                target.unlink()
    _report(result, output, randomly_initialised, round(time.monotonic() - started, 1), json)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keep others from writing the sum while its part is collected."""
    from eutectic.statistics.statistics_file import lock_output

    lock = lock_output(output)
    try:
        yield
    finally:
        lock.release()


def _collected(
    expert: ExpertOptions,
    gradients: GradientOptions,
    sums: SumOptions,
    reading: DataOptions,
    target: Path,
) -> tuple[StatisticsFile, Sequence[str]]:
    """Return the statistics, and the names of parameters that the checkpoint does not hold."""
    from eutectic.data.row_files import check_split
    from eutectic.models.linear_head import read_head
    from eutectic.models.loading import load_model
    from eutectic.models.task_kinds import ZERO_SHOT
    from eutectic.statistics import collect as run
    from eutectic.statistics import core_rows

    data, head, task = expert.data, gradients.head, reading.task
    assert expert.checkpoint is not None and data is not None
    if reading.split is not None:
        check_split([data], reading.split)
    if head is not None and task not in (None, "feature-extraction"):
        raise RequestError(f"--head is for bare models, not for --task {task}.\nLeave it out.")
    own = None if head is None else read_head(head, gradients.pooling, gradients.normalize)  # pyright: ignore[reportArgumentType]
    wanted = "feature-extraction" if own is not None else task
    doing("loading the model")
    on_ray = sums.executor == "ray"  # whose workers have the device: here the model is looked at
    loaded = load_model(expert.checkpoint, expert.base, wanted, "cpu" if on_ray else reading.device)
    if gradients.any and loaded.task == ZERO_SHOT:
        loaded, own = _with_texts(expert.checkpoint, loaded, data, gradients, reading)
    elif gradients.any:
        loaded.check_head(own)
    batches = reading.batches(
        data,
        loaded,
        max_examples=sums.max_examples,
        needs_labels=gradients.any and gradients.labels != "sample",
        classes=None if own is None else len(own.bias),
    )
    doing("reading the data")
    options: dict[str, Any] = {**vars(sums), **vars(gradients), "rank": _rank(sums.rank)}
    memory, *_ = map(options.pop, ("memory", "prompt", *_WITH_HEAD))
    options["memory_bytes"] = None if memory is None else parse_bytes(memory)
    options.update(head=own, fingerprint=loaded.fingerprint)
    if on_ray:
        options["device"] = reading.device
        options["open_model"] = partial(
            _opened_elsewhere,
            expert.checkpoint,
            expert.base,
            wanted,
            str(Path.cwd()),
        )
    if expert.adapters:
        options["core"] = core_rows(
            loaded.model, named_paths(expert.adapters, "--for"), expert.base or expert.checkpoint
        )
    with progress_bar("collecting", "finding layers") as tell:
        result = run(
            loaded.model,
            batches,
            target,
            progress=lambda done, total: tell(done, total or done + 1, f"batch {done}"),
            **options,
        )
    return result, loaded.randomly_initialised


def _opened_elsewhere(checkpoint: Path, base: Path | None, task: str | None, folder: str) -> Any:
    """Open the model of a collection on a worker."""
    from eutectic.cluster.workers import working_in
    from eutectic.models.loading import load_model

    with working_in(folder):
        return load_model(checkpoint, base, task).model


def _rank(given: str | None) -> int | Literal["auto"] | None:
    """Return the directions that are kept, as `collect` takes them."""
    if given is None or given == "auto":
        return given
    if not given.isdecimal() or int(given) < 1:
        raise RequestError(f"--rank {given}: a number of directions of at least 1, or auto.")
    return int(given)


def _with_texts(
    checkpoint: Path,
    loaded: LoadedModel,
    data: str,
    gradients: GradientOptions,
    reading: DataOptions,
) -> tuple[LoadedModel, Head]:
    """Return a model with the classes of its data, and their texts as a head on its pictures."""
    from eutectic.data.columns import names_of_classes
    from eutectic.data.row_files import read_rows
    from eutectic.models.loading import in_words, load_processor
    from eutectic.models.zero_shot import PROMPTS, head_in_texts

    rows = read_rows(data, split=reading.split, trust_code=reading.trust_code)
    names = names_of_classes(rows, reading.label_column)
    if names is None:
        raise RequestError(
            f"{data}: its column '{reading.label_column}' holds no class names that a text could "
            "hold.\nWrite the names, or keep a folder of pictures per class."
        )
    with in_words(checkpoint):
        tokenizer = load_processor(checkpoint, checkpoint, images=False)
    head = head_in_texts(loaded.model, tokenizer, names, gradients.prompt or PROMPTS)
    return replace(loaded, label_ids={name: i for i, name in enumerate(names)}), head


def _report(
    result: StatisticsFile,
    output: Path,
    randomly_initialised: Sequence[str],
    seconds: float,
    json: bool,
) -> None:
    held = storage_of(output).identity(output)  # in a store the file here only stands for it
    report: dict[str, Any] = {
        "output": str(url_of(output) or output),
        "bytes": 0 if held is None else held[0],
        "examples": result.provenance["data"]["examples"],
        "layers": len(result),
        "checkpoint": result.fingerprint,
        "unseen": result.provenance["unseen"],
        "skipped": result.provenance["skipped"],
        "beside_directions": result.provenance.get("beside_directions", {}),
        "randomly_initialised": list(randomly_initialised),
        "seconds": seconds,
    }
    if json:
        print_json(report)
        return
    table = grid()
    table.add_row("examples", f"{report['examples']:,}")
    table.add_row("parameters", f"{report['layers']:,}")
    kinds = {name: result.provenance["layers"][name]["kind"] for name in report["unseen"]}
    for label, names in (
        ("saw no token", [name for name, kind in kinds.items() if kind != "parameter"]),
        ("got no gradient", [name for name, kind in kinds.items() if kind == "parameter"]),
    ):
        if names:
            table.add_row(label, _counted(names))
    alike: dict[str, list[str]] = {}
    for name, reason in report["skipped"].items():
        alike.setdefault(reason, []).append(name)
    for reason, names in alike.items():
        table.add_row("left out", f"{_counted(names)}: {reason}")
    beside = result.provenance.get("beside_directions") or {}
    if beside:
        worst = max(beside, key=beside.__getitem__)
        share = f"up to {100 * beside[worst]:.2g} % of a Gram's trace ({worst})"
        table.add_row("beside --rank", share)
    if randomly_initialised:
        table.add_row("at random", f"{_counted(randomly_initialised)}: not in the checkpoint")
    table.add_row("took", f"{seconds:.1f} s, {format_bytes(report['bytes'])}")
    out.print(table)
    tell_done("written", output)


def _counted(names: Sequence[str]) -> str:
    """Return some names and how many there are, where there are many."""
    return few(names, 2) if len(names) < 4 else f"{len(names)} of them: {few(names, 2)}"


def _check_given(given: Mapping[str, str], gradients: GradientOptions) -> None:
    """Refuse options that this collection would ignore."""
    if not gradients.any:
        refuse(
            [given[name] for name in _WITH_GRADIENTS if name in given],
            "for gradients, and none are asked for.",
            "Add --output-gradients, --fisher or --block-fisher.",
        )
    if "head" not in given:
        refuse(
            [given[name] for name in _WITH_HEAD if name in given],
            "for --head, and none is named.",
            "The checkpoint's own head is used as it is.",
        )
    if gradients.labels == "sample" and "label_column" in given:
        raise RequestError(
            f"{given['label_column']}: drawn labels take no column.\n"
            f"Remove {given['label_column']} or --labels sample."
        )
    if gradients.labels == "data" and "seed" in given:
        raise RequestError(
            f"{given['seed']}: labels of the data are not drawn.\nAdd --labels sample."
        )
