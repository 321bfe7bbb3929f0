"""The output folder: refused beforehand, written aside, and moved to its name when complete."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from eutectic.checkpoint.adapter_keys import WEIGHT_NAMES
from eutectic.checkpoint.output_format import TensorSink
from eutectic.checkpoint.writer import CheckpointWriter, OutputFile
from eutectic.errors import (
    CheckpointError,
    Note,
    OutputError,
    RequestError,
    why_failed,
)
from eutectic.execution.adapter_folder import write_adapter_folder
from eutectic.execution.executors import Limits
from eutectic.execution.journal import (
    JOURNAL,
    MODEL,
    PARTS,
    Journal,
    Ledger,
    input_identities,
    records_of,
    request_identity,
    squares_in,
    weight_identities,
)
from eutectic.execution.model_card import card
from eutectic.execution.model_folder import (
    PROVENANCE,
    document,
    read_provenance,
    write_folder,
    write_provenance,
)
from eutectic.execution.norms import measured, new_norm_notes
from eutectic.execution.schedule import (
    CHOSEN,
    Choose,
    Desk,
    Unscaled,
    merged_deltas,
    run_schedule,
    write_scaled,
)
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import OutputLayout, Plan, output_layout, with_scale
from eutectic.storage import announced_to, storage_of

_Identities = Mapping[str, Any]  # name of an input -> what it is known by


def check_output(output: Path, work: Path) -> None:
    """Refuse an output that exists, before any work."""
    storage = storage_of(output)
    obstacle = storage.obstacle(output)
    if obstacle is not None:
        raise RequestError(obstacle)
    if storage.list(output) and not _complete(output, work):
        raise _not_empty(output)


@dataclass(frozen=True)
class Written:
    """A finished model."""

    plan: Plan  # the plan with α
    records: dict[str, Any]  # tensor -> what its method reported
    resumed: bool
    search: dict[str, Any] | None  # how α was chosen, where it was searched
    notes: tuple[Note, ...] = ()  # of what happened while it was written


def write_to_folder(
    plan: Plan,
    output: Path,
    work: Path,
    inputs: Inputs,
    limits: Limits,
    restart: bool,
    choose: Choose | None,
) -> Written:
    """Write the model into the work folder and move it to its name when it is complete."""
    before = input_identities(plan, inputs)
    identity = request_identity(plan, inputs, before, limits.device.model)
    made = _made_before(output, identity) if storage_of(output).list(output) else None
    # A model that has its name is finished: there is nothing to start over.
    told: tuple[Note, ...] = ()
    with Journal(work, identity, restart=restart and made is None) as journal:
        if made is not None:
            plan, search = _chosen_before(plan, made, journal, choose)
            plan = _with_norms(plan, made["norms"])
            records, resumed = made["records"], True
        else:
            plan, choice = run_schedule(plan, _desk(work, inputs, journal, limits), choose)
            search = None if choice is None else choice.record
            plan = _with_norms(plan, measured(plan, squares_in(journal)))
            told = _write(
                plan,
                work / MODEL,
                inputs,
                journal,
                (identity, before),
                (search, limits.device.model),
            )
            _check_unchanged(before, input_identities(plan, inputs))
            _commit(work / MODEL, output)
            records, resumed = records_of(journal), journal.resumed
        left = journal.remove_folder()
        notes = told if left is None else (*told, _left_behind(work, left))
        if plan.adapter is not None and (lost := plan.adapter.left_out(records)):
            notes += (Note("uncarried", tuple(lost), level="warning"),)
        return Written(plan, records, resumed, search, notes)


def _not_empty(output: Path) -> RequestError:
    return RequestError(f"{output} is not empty.\nChoose another output, or remove it first.")


def _made_before(output: Path, identity: str) -> dict[str, Any]:
    """Return the provenance of a model that got its name before its run was killed."""
    made: dict[str, Any] = {}
    with suppress(OutputError):  # something else, then
        made = read_provenance(output)
    if made.get("request") != identity:
        raise _not_empty(output)
    return made


def _with_norms(plan: Plan, norms: Mapping[str, Any]) -> Plan:
    """Return the plan of a finished merge, with how large its change is and what that says."""
    return replace(plan, norms=norms, notes=(*plan.notes, *new_norm_notes(plan, norms)))


def _chosen_before(
    plan: Plan, made: Mapping[str, Any], journal: Journal, choose: Choose | None
) -> tuple[Plan, dict[str, Any] | None]:
    """Return the plan with the α of a model that was finished before its run could end."""
    if choose is None:
        return plan, None
    note = Note("earlier_scale", (), {"scale": made["scale"]})
    if (CHOSEN, "note") in journal.finished:  # unless only the work folder was left
        kept = journal.finished[CHOSEN, "note"].record
        note = Note(kept["kind"], tuple(kept["subject"]), kept["numbers"], kept["level"])
    return with_scale(plan, made["scale"], note), made["search"]


def _check_unchanged(before: _Identities, after: _Identities) -> None:
    """Refuse to give a name to a model of inputs that changed while they were read."""
    changed = [name for name, known in before.items() if after.get(name) != known]
    if changed:
        raise CheckpointError(
            f"{', '.join(changed)}: changed while it was merged; parts of the result may be of the "
            "old content.\nNothing has been put in place. Run again with --restart when the files "
            "are complete."
        )


def _left_behind(work: Path, reason: str) -> Note:
    return Note("work_folder_left", (str(work),), {"reason": reason}, "warning")


def _desk(work: Path, inputs: Inputs, journal: Journal, limits: Limits) -> Desk:
    @contextmanager
    def open_output(plan: Plan) -> Iterator[TensorSink | None]:
        if plan.adapter is not None:  # its file is put together from the parts
            yield None
            return
        layout, model = output_layout(plan, inputs), work / MODEL
        journal.own(file.name for file in layout.files)
        journal.check_files()
        with layout.open(model, resume=model.exists()) as files:
            yield files
            files.sync()

    def open_deltas(layout: OutputFile) -> CheckpointWriter:
        return CheckpointWriter(work, [layout], resume=(work / layout.name).exists())

    return Desk(inputs, journal, limits, open_deltas, open_output, work / PARTS)


def _write(
    plan: Plan,
    model: Path,
    inputs: Inputs,
    journal: "Journal | _Hashed",
    identities: tuple[str, _Identities],
    ran: tuple[Mapping[str, Any] | None, str],
) -> tuple[Note, ...]:
    """Write what is not written yet; `ran` says how α was searched, and on which device."""
    provenance = document(plan, inputs, journal.finished, *identities)
    search, device = ran
    if search is not None:
        provenance["search"] = search
    if device:
        provenance["device"] = device
    if plan.adapter is not None:
        _write_adapter(plan, model, inputs, journal, provenance)
        return ()
    layout = output_layout(plan, inputs)
    try:
        with announced_to(journal.will_write):
            told = write_folder(plan, inputs, model, layout, provenance, records_of(journal))
        journal.check_files()
        _check_there(layout, model)
    except OSError as error:
        where = error.filename or model
        raise OutputError(f"{where}: cannot be written ({why_failed(error)}).") from error
    return told


def _write_adapter(
    plan: Plan,
    model: Path,
    inputs: Inputs,
    journal: "Journal | _Hashed",
    provenance: Mapping[str, Any],
) -> None:
    records, parts = records_of(journal), model.with_name(PARTS)
    try:
        model.mkdir(exist_ok=True)
        journal.own([WEIGHT_NAMES[0]])
        with announced_to(journal.will_write):
            held = write_adapter_folder(plan, inputs, model, parts, records, card(provenance))
            write_provenance(model, {**provenance, "adapter": held}, records)
        journal.check_files()
    except OSError as error:
        where = error.filename or model
        raise OutputError(f"{where}: cannot be written ({why_failed(error)}).") from error


def _check_there(layout: OutputLayout, model: Path) -> None:
    """Refuse to publish a model of whose weight files some were removed or cut off."""
    with layout.open(model, resume=True) as files:
        if files.laid_out:
            raise OutputError(
                f"{model / files.laid_out[0]}: was removed while the merge ran.\n"
                "Nothing has been put in place. Run the same command again."
            )


def _commit(model: Path, output: Path) -> None:
    try:
        storage_of(output).commit(model, output)
    except OSError as error:
        raise OutputError(
            f"{error.filename or model}: the merged model cannot be moved to {output} "
            f"({why_failed(error)})."
        ) from error


def _complete(output: Path, work: Path) -> bool:
    """Tell whether a run was killed between moving its model and removing its work folder."""
    begun = (work / JOURNAL).exists() or (work.is_dir() and not storage_of(work).list(work))
    return begun and (output / PROVENANCE).exists() and not (work / MODEL).exists()


@contextmanager
def unscaled_folder(
    folder: Path, plan: Plan, inputs: Inputs, limits: Limits, restart: bool = False
) -> Iterator[Unscaled]:
    """Merge into a scratch folder of its own, before α, for any number of searches.

    The folder stays. The same recipe finds its deltas there again, whatever it says of the scale.
    """
    with Journal(
        folder, unscaled_identity(plan, inputs, limits.device.model), restart=restart
    ) as journal:
        desk = _desk(folder, inputs, journal, limits)
        with merged_deltas(plan, desk, plan.merged) as unscaled:
            yield unscaled


def unscaled_identity(plan: Plan, inputs: Inputs, device: str = "") -> str:
    """Return a hash of all that decides the deltas of a plan, whatever it says of the scale."""
    tensors = tuple(replace(t, scale=1.0) if t.tunable else t for t in plan.tensors)
    request = replace(plan.request, complete={**plan.request.complete, "scale": None})
    known = weight_identities(plan, inputs)  # no configuration or tokenizer is in a delta
    unscaled = replace(plan, tensors=tensors, request=request)
    return request_identity(unscaled, inputs, known, device)


class _Hashed(Ledger):
    """What is finished of a model that is written in one go: hashed, but kept in memory only.

    Its folder is removed afterwards, whatever it holds: nobody looks after files of others there.
    """

    durable = True

    def will_write(self, file: Path) -> None:
        """Take note of nothing."""

    def own(self, names: Iterable[str]) -> None:
        """Take note of nothing."""

    def check_files(self) -> None:
        """Check nothing."""


def write_model(plan: Plan, unscaled: Unscaled, folder: Path) -> Plan:
    """Write the model of a plan whose α is a number into a new folder, from merged deltas.

    The folder has the bytes of a merge by the same recipe. Returns the plan with how large its
    change is, and what that says. A folder that a kill left unfinished must be removed first.
    """
    inputs, ledger = unscaled.inputs, _Hashed()
    before = input_identities(plan, inputs)
    identity = request_identity(plan, inputs, before, unscaled.limits.device.model)

    @contextmanager
    def open_output(plan: Plan) -> Iterator[TensorSink]:
        with output_layout(plan, inputs).open(folder, resume=False) as files:
            yield files
            files.sync()

    def refuse(_: OutputFile) -> NoReturn:
        raise AssertionError("its deltas are merged")

    write_scaled(plan, unscaled, Desk(inputs, ledger, unscaled.limits, refuse, open_output))
    plan = _with_norms(plan, measured(plan, squares_in(ledger)))
    ran = (None, unscaled.limits.device.model)
    _write(plan, folder, inputs, ledger, (identity, before), ran)
    _check_unchanged(before, input_identities(plan, inputs))
    return plan
