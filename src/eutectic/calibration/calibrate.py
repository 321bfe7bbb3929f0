"""Calibrating: layer after layer of a merged model is fitted to its experts."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from eutectic.calibration.calibrated_folder import PROVENANCE, write_calibrated
from eutectic.calibration.layer_run import Progress, Run, calibrate_layers
from eutectic.calibration.opened_models import OpenedModels, keys_of, open_models
from eutectic.calibration.places import Survey, survey
from eutectic.calibration.proxies import Data, Proxies, draw
from eutectic.calibration.settings import CalibrateOptions, Settings
from eutectic.calibration.unfinished_calibration import MODEL, open_unfinished
from eutectic.checkpoint.locating import locate
from eutectic.data.fingerprints import example_hashes
from eutectic.errors import (
    CheckpointError,
    OutputError,
    RequestError,
    suggest,
    why_failed,
)
from eutectic.models.batches import Batch, examples, sample_count
from eutectic.models.loading import load_model
from eutectic.models.sites import is_encoder_decoder
from eutectic.notebook import with_bar
from eutectic.options import options_from
from eutectic.storage import local_path, storage_of
from eutectic.storage.small_files import JOURNAL_BYTES, read_json
from eutectic.tables import InNotebooks, Shown, data_frame, facts, number, table
from eutectic.versions import version
from eutectic.words import few

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class CalibrationReport(InNotebooks):
    """What a calibration did.

    Attributes:
        output: the folder written.
        calibrated: number of tensors of every kind: matrices, convolutions, biases, norms.
        left: reason -> the parameters of linear maps and norms that keep the merged values for it.
        layers: parameter -> `before` and `after`, how far the layer's outputs are from the experts'
            own, relative, with the inputs that the calibrated layers before it give; and `tokens`.
        held_out: whether that was measured on inputs that no layer was fitted to.
        data: task -> number of `examples` fitted to, and `held_out`.
        resumed: whether an unfinished run was continued.
        seconds: wall-clock time.
    """

    output: Path
    calibrated: Mapping[str, int]
    left: Mapping[str, Sequence[str]]
    layers: Mapping[str, Mapping[str, Any]] = field(repr=False)
    held_out: bool
    data: Mapping[str, Mapping[str, int]]
    resumed: bool
    seconds: float

    def to_pandas(self) -> Any:
        """Return the layers as a data frame: their errors before and after."""
        return data_frame(({"layer": n, **own} for n, own in self.layers.items()), "layer")

    def __repr__(self) -> str:
        """Show what was calibrated, and the errors of the layers."""
        return "\n\n".join(self._parts())

    def _parts(self) -> Sequence[Shown]:
        """Return the same for notebooks too."""
        known = {
            "calibrated": ", ".join(f"{n} {kind}" for kind, n in self.calibrated.items()),
            "as merged": "\n".join(f"{few(names)}: {why}" for why, names in self.left.items()),
            "inputs": ", ".join(f"{task} {own['examples']}" for task, own in self.data.items()),
            "errors": "on held-out inputs" if self.held_out else "on the inputs fitted to",
            "took": f"{self.seconds:.1f} s{', continued' if self.resumed else ''}",
            "output": self.output,
        }
        rows = [
            [name, number(own["before"], 3), number(own["after"], 3)]
            for name, own in self.layers.items()
        ]
        return facts("CalibrationReport", known), table(["layer", "before", "after"], rows)


@with_bar("calibrating")
def calibrate(
    merged: str | Path,
    experts: Mapping[str, str | Path],
    data: Mapping[str, Data],
    output: str | Path,
    *,
    base: str | Path | None = None,
    progress: Progress | None = None,
    **options: Unpack[CalibrateOptions],
) -> CalibrationReport:
    """Calibrate a merged model towards its experts from a few unlabelled inputs of every task.

    Layers are taken in the order of a forward pass. On the same inputs, a layer gets x from the
    model as far as it is calibrated, and its expert's layer gets z in the expert's own pass. With
    x* = (1 − a) x + a z, S_t = Σ x xᵀ and R_t = Σ x x*ᵀ over the tokens of task t that are no
    padding, both over ‖S_t‖_F,

        Wᵀ = (Σ S_t + λI)⁻¹ (Σ R_t W_tᵀ + λ (ρ W_merged + (1 − ρ) W_base)ᵀ),
        b = (Σ_t (b_t + W_t x̄*_t − W x̄_t) + λ b_a) / (T + λ),

    with b_a anchored like W; norms solve the same in two unknowns a channel.
    `calibration.formulas` has the derivation and the identities: T = 1 and λ → 0 reproduce the
    expert on its inputs where its tables are the merged model's, λ → ∞ gives the anchor. Sums and
    solutions are in float64.

    It calibrates linear maps (`nn.Linear`, `Conv1D`), their biases, ungrouped convolutions and
    norms of any model of transformers that the merged folder's configuration names. Tables, heads,
    output vocabularies, modules that are called several times in a pass (ALBERT's) and what no
    layer multiplies by (packed mixtures, `nn.MultiheadAttention`) keep the merged values and are
    listed under `left`. Experts' heads are not needed.

    All passes go on side by side and stop in front of each layer. Cost: one forward pass of the
    merged model and of an expert for every input; a layer with n tokens takes 4n·in² + in³/3 in
    float64, and its outputs three times more. Memory: the hidden states of all inputs in both
    models; for T experts T + 3 matrices of in²; one block of the merged model and of every expert,
    and their tables; at the start the whole merged model. Forward passes are computed on the CPU in
    float32, sums in float64.

    Args:
        merged: the merged model, a folder that transformers loads.
        experts: name -> fine-tune or adapter of the base it was merged from.
        data: name -> a file or folder of rows as `eutectic collect` takes them, or batches.
        output: folder to write, laid out like `merged`. A killed run goes on from
            `<output>.partial` when the same call is made again, and gives the same bytes.
        base: the base; needed for adapters and for `anchor_scale` other than 1.
        progress: called with (layers done, layers in all, the layer).
        **options: the settings:

            - `ridge` (0.05): λ, how strongly layers are held at the anchor, relative to the norm of
              a task's Gram.
            - `anchor_scale` (1): ρ, how much of the merged delta is in the anchor.
            - `expert_share` (0.25): a, the expert's share in the mixture of inputs.
            - `sites`: which of "matrices", "biases", "norms", "convolutions"; default all.
            - `layers`: globs over parameter names.
            - `samples` (256): inputs of every task at most, drawn from rows by `seed`.
            - `holdout` (0): share of them that no layer is fitted to, for the errors.
            - `task`: what the model does, where its configuration does not tell.
            - `reading`: a `BatchOptions`: columns, batch size, length of texts.
            - `threads`: passes that compute side by side; default one per core. No byte depends
              on it.
            - `restart`: discard an unfinished run.

    Raises:
        RequestError: settings out of range, experts without data, too few inputs, an output that
            exists.
        CheckpointError: a checkpoint that cannot be read, or is no fine-tune of the same base.
        NumericalError: NaN or Inf in a layer's inputs.
        ResumeError: `<output>.partial` belongs to another request.
        OutputError: the output cannot be written.

    Deviations from the source: the target mixture also enters norms; biases count every task once
    and their anchor as λ of a task, where the source weighs both by 1/‖S_t‖_F; layers are taken one
    by one, not block by block; all tokens weigh the same.

    References:
        FeatCal: Feature Calibration for Post-Model Merging, arXiv 2605.13030.
    """
    started = time.perf_counter()
    settings = options_from(Settings, options, "calibrate")
    settings.check()
    _check_kinds(merged, experts, data, output)
    _check_names(experts, data)
    if settings.anchor_scale != 1 and base is None:
        raise RequestError(
            f"anchor_scale {settings.anchor_scale:g} needs the base.\nName it with --base."
        )
    output = local_path(output)
    if output.name in ("", ".."):
        raise RequestError(f"'{output}' has no name of its own. Name a new folder.")
    work = output.with_name(f"{output.name}.partial")
    _check_output(output, work)
    with ExitStack() as stack:
        models = stack.enter_context(
            open_models(
                locate(merged, full=True).path,
                None if base is None else locate(base, full=True).path,
                {name: locate(path).path for name, path in experts.items()},
            )
        )
        feeds = any(isinstance(source, str | Path) for source in data.values())
        folder = models.merged.index.folder
        loaded = load_model(folder, None, settings.task, feeds=feeds, named_class=True)
        proxies = {name: draw(name, data[name], loaded, settings) for name in models.experts}
        _without_cache(loaded.model)
        known = models.identity()
        identity = _identity(models, proxies, settings, is_encoder_decoder(loaded.model))
        if storage_of(output).list(output):
            return _finished_before(output, work, identity, started)
        keys, whole = keys_of(loaded.model, models.merged)
        drawn = dict.fromkeys(loaded.randomly_initialised, "the merged checkpoint does not hold it")
        parameters = dict(loaded.model.named_parameters(remove_duplicate=False))
        found = _surveyed(loaded.model, proxies, settings, models.kept(keys, parameters) | drawn)
        unfinished = open_unfinished(work, identity, restart=settings.restart)
        stack.callback(unfinished.lock.release)
        resumed = bool(unfinished.layers)
        run = Run(models, loaded.model, keys, whole, found, unfinished, settings)
        calibrate_layers(run, proxies, progress)
        record = _record(run, proxies, identity)
        _finish(run, output, record, known)
    return _report(output, record, resumed, started)


def _check_kinds(merged: Any, experts: Any, data: Any, output: Any) -> None:
    """Refuse what callers without a type checker may give."""
    for name, value in {"experts": experts, "data": data}.items():
        if not isinstance(value, Mapping):
            raise RequestError(
                f"{name} must be a mapping of the experts' names, such as {{'sst2': …}}; got "
                f"{type(value).__name__}."
            )
    places: dict[str, Any] = {"merged": merged, "output": output, **experts}
    for name, place in places.items():
        if not isinstance(place, str | Path):
            raise RequestError(
                f"{name} must be the path of a folder; got {type(place).__name__}.\n"
                "Save a model first (save_pretrained)."
            )


def _check_names(experts: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    if not experts:
        raise RequestError("no experts are named.")
    for name in data:
        if name not in experts:
            near = suggest(name, list(experts))
            raise RequestError(
                f"there are data of '{name}', which is no expert.{near}\n"
                f"The experts are {', '.join(experts)}."
            )
    lacking = [name for name in experts if name not in data]
    if lacking:
        raise RequestError(
            f"{', '.join(lacking)}: no data.\nCalibration needs unlabelled inputs of the task of "
            "every expert."
        )


def _check_output(output: Path, work: Path) -> None:
    storage = storage_of(output)
    obstacle = storage.obstacle(output)
    if obstacle is not None:
        raise RequestError(obstacle)
    moved = work.is_dir() and MODEL not in storage.list(work) and (output / PROVENANCE).exists()
    if storage.list(output) and not moved:
        raise RequestError(f"{output} is not empty.\nChoose another output, or remove it first.")


def _finished_before(output: Path, work: Path, identity: str, started: float) -> CalibrationReport:
    """Take up a run that was killed between moving its model and removing its work folder."""
    record: Any = None
    with suppress(OutputError):  # something else, then
        record = read_json(output / PROVENANCE, OutputError, limit=JOURNAL_BYTES).get("calibration")
    if not isinstance(record, dict) or record.get("request") != identity:
        raise RequestError(f"{output} is not empty.\nChoose another output, or remove it first.")
    unfinished = open_unfinished(work, identity, restart=False)
    try:
        unfinished.remove()
    finally:
        unfinished.lock.release()
    return _report(output, record, True, started)


def _without_cache(model: nn.Module) -> None:
    """Keep decoders from caching the keys and values of all layers for tokens to come."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False


def _identity(
    models: OpenedModels, proxies: Mapping[str, Proxies], settings: Settings, paired: bool
) -> str:
    """Return a hash of all that decides the output's bytes."""

    def hashed(batches: Iterable[Batch]) -> list[list[int]]:
        return [example_hashes(batch, paired)[1] for batch in batches]

    described = {
        "eutectic": version("eutectic"),
        "torch": version("torch"),
        "settings": settings.describe(),
        "models": models.identity(),
        "data": {n: [hashed(p.fitted), hashed(p.held_out)] for n, p in proxies.items()},
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _surveyed(
    model: nn.Module, proxies: Mapping[str, Proxies], settings: Settings, keep: Mapping[str, str]
) -> Survey:
    first = next(iter(proxies.values())).fitted[0]
    sample = examples(first, 0, min(2, sample_count(first)))
    found = survey(model, sample, settings, keep)
    if not found.places:
        reasons = "".join(f"\n  - {name}: {why}" for name, why in list(found.left.items())[:8])
        raise RequestError(f"there is no layer to calibrate.{reasons}")
    return found


def _record(run: Run, proxies: Mapping[str, Proxies], identity: str) -> dict[str, Any]:
    """Return what is kept of the calibration, without anything that depends on how it ran."""
    layers: dict[str, Any] = {}
    left: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    reasons = dict(run.survey.left)
    named = set(run.keys.values())
    for key in run.models.merged.entries:
        if key not in named:
            reasons[key] = "the model that runs has no such parameter"
    for place in run.survey.places:
        record = run.unfinished.layers[place.path][1]
        if "left" in record:
            reasons[place.weight] = record["left"]
            continue
        layers[place.weight] = {key: record[key] for key in ("before", "after")}
        counts.update(
            place.kind if place.scaling or name == place.weight else "biases"
            for name in place.parameters
        )
    for name, why in sorted(reasons.items()):
        left.setdefault(why, []).append(name)
    return {
        "request": identity,
        "versions": {name: version(name) for name in ("eutectic", "torch", "transformers")},
        "settings": run.settings.describe(),
        "base": None if run.models.base is None else run.models.base.fingerprint(),
        "merged": run.models.merged.fingerprint(),
        "experts": {name: e.fingerprint() for name, e in run.models.experts.items()},
        "data": {
            name: dict(zip(("examples", "held_out"), own.counts, strict=True))
            for name, own in proxies.items()
        },
        "calibrated": dict(sorted(counts.items())),
        "left": left,
        "layers": layers,
    }


def _finish(run: Run, output: Path, record: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Write the output aside and give it its name, unless a checkpoint is not what it was."""
    new, unfinished, written = run.new, run.unfinished, run.unfinished.written
    try:
        with written.writing():
            write_calibrated(
                run.models.merged,
                unfinished.model,
                lambda key: new[key][key] if key in new else None,
                record,
            )
        written.check()
        now = run.models.identity()
        if changed := [name for name in known if now.get(name) != known[name]]:
            raise CheckpointError(
                f"{', '.join(changed)}: changed while the model was calibrated.\n"
                "Nothing has been put in place. Run again with --restart when the files are "
                "complete."
            )
        storage_of(output).commit(unfinished.model, output)
    except OSError as error:
        where = error.filename or unfinished.model
        raise OutputError(f"{where}: cannot be written ({why_failed(error)}).") from error
    unfinished.remove()


def _report(
    output: Path, record: Mapping[str, Any], resumed: bool, started: float
) -> CalibrationReport:
    return CalibrationReport(
        output=output,
        calibrated=record["calibrated"],
        left=record["left"],
        layers=record["layers"],
        held_out=any(own["held_out"] for own in record["data"].values()),
        data=record["data"],
        resumed=resumed,
        seconds=round(time.perf_counter() - started, 3),
    )
