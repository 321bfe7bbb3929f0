"""The statistics file: one per expert, portable, read one parameter at a time.

A safetensors file that any reader of the format opens. Tensors are `<parameter>/<statistic>`:

    gram | gram_factor, gram_diagonal                    Σ x xᵀ over tokens; [groups, in, in] of a
                                                         convolution of several groups
    core_gram | core_factor                              Σ (Ax)(Ax)ᵀ over tokens, A adapters' rows
    input_sum                                            Σ x over tokens
    pooled_gram | pooled_factor, pooled_diagonal         Σ x̄ x̄ᵀ over samples, x̄ the mean of a sample
    pooled_sum                                           Σ x̄ over samples
    output_gradient_gram | output_gradient_factor, …     Σ y yᵀ over tokens, y output gradients
    fisher_diagonal                                      Σ g² over examples, g gradients
    block_fisher | block_fisher_factor                   Σ g gᵀ over examples, of small vectors

A factor F stands for FᵀF, plus diag(…_diagonal) where there is one. Layers that see the same inputs
keep their input statistics under one name; the JSON record (metadata `eutectic_statistics`) says
under which, beside counts, shapes and provenance. `examples` holds a hash of every example.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eutectic.errors import (
    CheckpointError,
    OutputError,
    RequestError,
    StatisticsError,
    suggest,
    why_failed,
)
from eutectic.statistics.record import check_record
from eutectic.statistics.tensor_file import TensorFile, write_tensors
from eutectic.storage import Lock, local_path, storage_of, view
from eutectic.tables import InNotebooks, Shown, data_frame, facts
from eutectic.types import FACTORED, LayerStatistics, gram_names
from eutectic.words import few, shown

RECORD_KEY = "eutectic_statistics"
FORMAT = 1
EXAMPLES = "examples"
# Kept under the name of the layer whose inputs are shared.
INPUT_STATISTICS = frozenset({"gram", "core_gram", "input_sum", "pooled_gram", "pooled_sum"})
VECTORS = ("input_sum", "pooled_sum", "fisher_diagonal")
STATISTICS = ("gram", "core_gram", "pooled_gram", "output_gradient_gram", "block_fisher", *VECTORS)


class StatisticsFile(InNotebooks, Mapping[str, LayerStatistics]):
    """Statistics of one expert: parameter name -> `LayerStatistics`, read when asked for.

    Grams of samples, of output gradients and of vectors are returned dense, whichever way they are
    stored, unless `read` is asked for their rows; an input Gram that is stored as a factor is
    returned as `gram_factor`.

    Attributes:
        provenance: what the file says about itself: `checkpoint`, `data`, `mask_policy`,
            `samples`, `settings`, `versions`, `unseen` (layers that saw no token, other parameters
            that got no gradient), `skipped` (name -> why), `layers` (name -> counts, shape, kind,
            whose inputs it shares).
        path: the file, or None in memory.
    """

    def __init__(
        self, record: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path | None = None
    ) -> None:
        self.provenance = dict(record)
        self.path = path
        self.tensors = tensors
        self._layers: dict[str, dict[str, Any]] = self.provenance["layers"]

    def __getitem__(self, name: str) -> LayerStatistics:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __contains__(self, name: object) -> bool:
        return name in self._layers

    def to_pandas(self) -> Any:
        """Return the layers as a data frame: counts, shapes and kinds; no tensor."""
        return data_frame(({"layer": n, **own} for n, own in self._layers.items()), "layer")

    def __repr__(self) -> str:
        """Show what was collected of what, without a tensor."""
        return "\n\n".join(self._parts())

    def _parts(self) -> Sequence[Shown]:
        """Return the same for notebooks too."""
        made = self.provenance
        kinds = dict.fromkeys(key.rpartition("/")[2] for key in self.tensors)
        known = {
            "layers": len(self),
            "examples": made.get("data", {}).get("examples"),
            "of each": ", ".join(kind for kind in kinds if kind != EXAMPLES),
            "unseen": few(made.get("unseen", ())),
            "left out": few(list(made.get("skipped", ()))),
            "beside directions": _largest(made.get("beside_directions") or {}),
            "checkpoint": self.fingerprint,
            "file": self.path,
        }
        return (facts("StatisticsFile", known),)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that have an entry."""
        return tuple(self._layers)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the checkpoint that the statistics were collected on."""
        return str(self.provenance["checkpoint"]["fingerprint"])

    @property
    def samples(self) -> dict[str, Tensor]:
        """A few values of each parameter that the statistics were collected with.

        Empty in files that were written before samples were kept.
        """
        samples = self.provenance.get("samples", {}).items()
        return {
            name: torch.tensor(kept["values"], dtype=torch.float64).to(
                getattr(torch, kept["dtype"])
            )
            for name, kept in samples
        }

    def read(
        self, name: str, only: Collection[str] | None = None, *, in_rows: bool = False
    ) -> LayerStatistics:
        """Return the statistics of one parameter.

        Args:
            name: the parameter.
            only: read no more than these of `gram`, `input_sum`, `pooled_gram`, `pooled_sum`,
                `output_gradient_gram`, `fisher_diagonal`, `block_fisher`.
            in_rows: leave every Gram in the form that it is stored in: those of samples and of
                output gradients may come as `pooled_factor` and `output_gradient_factor`, with a
                diagonal beside them.

        Raises:
            KeyError: no such parameter.
            StatisticsError: the file cannot be read any more.
        """
        if name not in self._layers:
            raise KeyError(f"no statistics of '{name}'.{suggest(name, self.names)}")
        layer = self._layers[name]
        found: dict[str, Any] = {"count": layer["count"], "sample_count": layer["sample_count"]}
        found["examples"] = self.provenance["data"].get("examples", 0)
        for statistic in STATISTICS if only is None else only:
            names = gram_names(statistic)
            held = [self.tensors.get(self.key(name, statistic, stored)) for stored in names]
            found[statistic], factor, diagonal = held
            if statistic == "gram" or (in_rows and statistic in FACTORED):
                found |= dict(zip(names, held, strict=True))
            elif factor is not None:
                found[statistic] = expand(factor, diagonal).to(factor.dtype)
        return LayerStatistics(**found)

    def has(self, name: str, statistic: str) -> bool:
        """Tell, without reading, whether a parameter has a statistic (named as for `read`)."""
        if name not in self._layers:
            return False
        dense, factor, _ = gram_names(statistic)
        return any(self.key(name, statistic, key) in self.tensors for key in (dense, factor))

    def read_bytes(self, name: str, only: Collection[str]) -> int:
        """Return how many bytes `read` takes from the file; nothing in memory."""
        if name not in self._layers or not isinstance(self.tensors, TensorFile):
            return 0
        keys = {self.key(name, of, stored) for of in only for stored in gram_names(of)}
        return sum(self.tensors.nbytes(key) for key in keys if key in self.tensors)

    def key(self, name: str, statistic: str, stored: str) -> str:
        """Return the name of the tensor that holds a statistic of a parameter."""
        layer = self._layers[name]
        owner = layer["inputs"] if statistic in INPUT_STATISTICS else layer["same_as"]
        return f"{owner}/{stored}"

    def save(self, path: str | Path) -> StatisticsFile:
        """Write the file atomically and return it opened.

        Raises:
            OutputError: it cannot be written.
            RequestError: there is a file already that is not of statistics.
        """
        path = local_path(path)
        check_target(path)
        write_tensors(path, self.tensors, RECORD_KEY, self.provenance)
        return load_statistics(path)


def beside_directions(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, float]:
    """Return, of input Grams in few directions, the share of the trace that is on the diagonal.

    FᵀF lies below the Gram, so that the share is the error of FᵀF in nuclear norm, and bounds it in
    any other.
    """
    shares: dict[str, float] = {}
    for name in names:
        _, factor, diagonal = (f"{name}/{stored}" for stored in gram_names("gram"))
        if diagonal in tensors:
            rest = float(tensors[diagonal].sum(dtype=torch.float64))
            held = float(tensors[factor].square().sum(dtype=torch.float64))
            shares[name] = round(rest / (rest + held), 6) if rest + held else 0.0
    return shares


def holds_statistics(path: str | Path) -> bool:
    """Tell whether a file is one of statistics, by its header."""
    path = view(path)
    if not path.is_file():
        return False
    try:
        TensorFile(path, RECORD_KEY)
    except (StatisticsError, OSError):
        return False
    return True


def check_target(path: Path) -> None:
    """Find out whether statistics may be written there: over statistics alone, if over anything."""
    view(path)
    if path.is_dir():
        raise OutputError(f"{path}: cannot be written: is a folder.")
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return
    if not holds_statistics(path):
        raise RequestError(
            f"{path}: statistics would be written there, and it holds something else.\n"
            "Choose another name."
        )


def _largest(shares: Mapping[str, float]) -> str | None:
    """Return the largest share in words, None for none."""
    if not shares:
        return None
    worst = max(shares, key=lambda name: shares[name])
    return f"up to {100 * shares[worst]:.2g} % of a Gram's trace ({worst})"


def lock_output(path: Path) -> Lock:
    """Become the only one who writes a statistics file; folders that are missing are made."""
    check_target(path)
    try:
        return storage_of(path).lock(path)
    except BlockingIOError:
        raise RequestError(f"another process is collecting into {path}.") from None
    except OSError as error:
        where = error.filename or path
        raise OutputError(f"{where}: cannot be written ({why_failed(error)}).") from None


def expand(factor: Tensor, diagonal: Tensor | None) -> Tensor:
    """Return FᵀF + diag(d) in float64."""
    wide = factor.double()
    gram = wide.T @ wide
    if diagonal is not None:
        gram.diagonal().add_(diagonal.double())
    return gram


def load_statistics(path: str | Path) -> StatisticsFile:
    """Open a statistics file; only its header is read.

    Returns:
        A mapping from parameter name to `LayerStatistics`, with `.provenance`.

    Raises:
        StatisticsError: the file is missing, damaged, of a newer format, or not a statistics file.
    """
    try:
        place = view(path)
    except CheckpointError as error:
        raise StatisticsError(str(error)) from None
    tensors = TensorFile(place, RECORD_KEY)
    _check(tensors.path, tensors)
    return StatisticsFile(tensors.record, tensors, tensors.path)


def _check(path: Path, tensors: TensorFile) -> None:
    record = tensors.record
    if record.get("format") != FORMAT:
        raise StatisticsError(
            f"{path}: format {shown(record.get('format'))}; this version of eutectic reads "
            f"{FORMAT}.\nUpdate eutectic, or collect the statistics again."
        )
    check_record(record, path)
    for name, _, shape in tensors.entries():
        if name != EXAMPLES:
            _check_tensor(path, name, shape, record)


def _check_tensor(path: Path, name: str, shape: tuple[int, ...], record: Mapping[str, Any]) -> None:
    layer, _, stored = name.rpartition("/")
    layers: Mapping[str, Any] = record["layers"]
    if layer not in layers:
        raise StatisticsError(f"{path}: tensor '{name}' belongs to no layer of its record.")
    size, parameter = layers[layer]["shape"], layers[layer]["parameter"]
    if stored == "fisher_diagonal":
        sound = list(shape) == parameter
    elif stored.startswith("core_"):
        ranks = core_ranks(record).get(layer, [])
        sound = len(shape) == 2 and shape[1] == sum(ranks)
    elif stored.startswith("block_fisher"):
        sound = shape[-1:] == (torch.Size(parameter).numel(),)
    else:
        width = size[:1] if stored.startswith("output_gradient") else size[-1:]
        sound = len(shape) in (1, 2) and [*shape[-1:]] == [*width]
        if stored == "gram" and (groups := groups_of(layers[layer])) > 1:
            inner = size[-1] // groups
            sound = [*shape] == [groups, inner, inner]
    if not sound:
        raise StatisticsError(
            f"{path}: tensor '{name}' {[*shape]} does not fit a layer of shape {size}."
        )


def groups_of(layer: Mapping[str, Any]) -> int:
    """Return how many groups a layer of a record has: 1 but for grouped convolutions.

    Beside its kernel `[out, in/groups, *k]` stands the shape `[out, in·k]` of the map of all, and
    beside a transposed one's `[in, out/groups, *k]` the shape `[out·k, in]`.
    """
    shape, parameter = layer["shape"], layer["parameter"]
    kernel = math.prod(parameter[1:])
    side = {"convolution": 1, "transposed_convolution": 0}.get(str(layer.get("kind")))
    if side is None or len(shape) != 2 or not kernel:
        return 1
    return max(shape[side] // kernel, 1)


def core_ranks(record: Mapping[str, Any]) -> Mapping[str, list[int]]:
    """Return parameter -> ranks of the adapters that statistics were collected for, if for any."""
    stated = record["settings"].get("core") or {}
    return stated.get("ranks", {})
