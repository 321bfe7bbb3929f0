"""Collecting: run a model over proxy data and keep the sums that merging needs."""

from __future__ import annotations

import functools
import json
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from eutectic.checkpoint.reader import StateDictReader
from eutectic.cluster.devices import CPU, device_model
from eutectic.cluster.gpus import device_of_workers
from eutectic.cluster.where import check_where, joined, taken_for_merge
from eutectic.errors import RequestError, StatisticsError
from eutectic.models.batches import Batch, mask_policy, sample_count
from eutectic.models.names import saved_names
from eutectic.models.sites import is_encoder_decoder
from eutectic.notebook import with_bar
from eutectic.options import options_from
from eutectic.statistics.collection_plan import (
    Plan,
    describe_layers,
    device_of,
    make_plan,
    sample_weights,
)
from eutectic.statistics.data_pass import Pass
from eutectic.statistics.kept_pass import Counts, Running, one_pass
from eutectic.statistics.least_tokens import check_least_tokens
from eutectic.statistics.recorder import PassSums
from eutectic.statistics.settings import CollectOptions, Settings
from eutectic.statistics.sharded_pass import Sharing
from eutectic.statistics.statistics_file import (
    EXAMPLES,
    FORMAT,
    StatisticsFile,
    beside_directions,
)
from eutectic.statistics.unfinished_collection import DataLog, Partial, open_partial
from eutectic.storage import local_path
from eutectic.types import gram_names
from eutectic.versions import version

if TYPE_CHECKING:
    from typing_extensions import Unpack

Progress = Callable[[int, int | None], None]


@with_bar("collecting")
def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    output: str | Path | None = None,
    grams: bool = True,
    output_gradients: bool = False,
    *,
    progress: Progress | None = None,
    **options: Unpack[CollectOptions],
) -> StatisticsFile:
    """Collect the statistics of one expert over its proxy data.

    For every linear layer with inputs x `[in]` and output gradients y `[out]`, summed over tokens
    that are not padding: the Gram Σ x xᵀ, Σ x, and with x̄ a sample's mean over its tokens Σ x̄ and
    Σ x̄ x̄ᵀ; on request Σ y yᵀ; per parameter Σ g² or (vectors) Σ g gᵀ over examples, where g is one
    example's gradient of log p(labels | input), averaged over the example's targets. Sums are
    never divided; counts are kept beside them. Grams of `Conv1D` (GPT-2), whose weight is stored
    `[in, out]`, are those of the linear map, `[in, in]` and `[out, out]`, as for `nn.Linear`;
    diagonal Fisher has the parameter's own shape.

    The model is put into evaluation mode and given back as it was. Products are formed in float32
    and added in float64; stored in `dtype`. Layers that see the same tensor (query, key and value)
    are summed once and stored once. A sum over fewer tokens than features is stored as a factor.

    Padding: layers of the encoder, and keys and values of cross-attention, see `attention_mask`;
    other layers of an encoder-decoder see `decoder_attention_mask` or the positions whose label is
    not -100. Which mask fits is decided by length, and by the layer's path where both fit. Layers
    of an image tower have no mask; of inputs `[samples, in]` every row counts.

    Cost: one forward pass per batch and n·in² per layer; with output gradients one backward pass;
    with Fisher statistics one forward and backward pass per example. Memory: 8 bytes times
    2·in² + out² per layer; `memory_bytes` splits the layers over several passes.

    Args:
        model: any module; transformers and PEFT models are understood.
        batches: mappings (passed as keywords), sequences or tensors, examples on the first axis.
            Read once per pass; several passes need something that can be read again.
        output: file to write, over statistics if there are any. Without it the result stays in
            memory. A killed collection goes on
            from `<output>.partial` when the same call is made again, and gives the same bytes.
        grams: input Grams, input sums, pooled sums and Grams.
        output_gradients: output-gradient Grams (K-FAC).
        progress: called with (batches done, batches in all or None).
        **options: what else is collected, how, and how fast:

            - `fisher`: diagonal Fisher of every floating-point parameter.
            - `block_fisher`: block Fisher of vectors: norms, biases, (IA)³ vectors.
            - `labels`: "data": labels of the batch (empirical Fisher). "sample": labels drawn from
              the model's predictions (true Fisher); unlabelled data are enough.
            - `objective`: what the logits stand for; "auto" asks the model's configuration and
              class. Or a function (outputs, batch) -> log-likelihoods `[examples]`, known to a
              resumed run and to `add_statistics` by its code, defaults and closure.
            - `head`: from `read_head`: makes logits of a bare model's pooled features, for
              gradients. It is no part of the model and gets no statistics.
            - `max_examples`: stop after so many; default all, or 1000 when gradients are collected.
            - `min_tokens`: refuse to write sums over fewer tokens: texts can be told from them.
            - `layers`: globs over parameter names.
            - `convolutions`: 1-D and 2-D convolutions too, as `[out, in·k·k]`, transposed ones as
              `[out·k·k, in]`; of several groups, a Gram for each.
            - `rank`: store Grams of layers wider than this as `rank` directions plus a diagonal;
              "auto": as the fewest that leave at most a tenth of the trace to it, and at most 512.
              Where 4·rank + 32 or more inputs are seen ("auto": 2080), the matrix is never formed:
              its product with a random one is summed (arXiv 1706.05736). `beside_directions` of
              the provenance has the share of the trace that each Gram leaves to the diagonal, which
              is the error of its directions in nuclear norm, exactly.
            - `core`: from `core_rows`: keep only what these adapters' rows see of the inputs,
              Σ (Ax)(Ax)ᵀ `[R, R]`, in place of the Gram, the sums and the pooled sums.
            - `share_inputs`: detect layers that see the same inputs (the default).
            - `unmatched`: what becomes of a layer whose inputs fit no mask: "error", "all" rows
              count (no pooled statistics then), or "skip".
            - `token_mask`: function from a batch to `[samples, tokens]`, instead of
              `attention_mask`.
            - `seed`: of sampled labels; each example's labels depend on it and on the example
              alone.
            - `output_gradient_limit` (16384): layers with more outputs (a vocabulary) get no
              Σ y yᵀ, and are listed as skipped.
            - `block_limit` (4096): longer vectors get no block Fisher, and are listed as skipped.
            - `dtype`: of the stored sums, float32 or float64.
            - `memory_bytes`: limit for the running sums.
            - `layers_per_pass`: limit for layers (groups with shared inputs) summed in one pass.
            - `fingerprint`: of the checkpoint; default that of the model's state dict.
            - `snapshot_seconds` (60): how often the unfinished state is saved.
            - `executor` ("threads"): with "ray", the workers of a cluster run a copy of the model
              each, and `ray_address` says where it is, as for `eutectic.merge`. Batch i goes to
              worker i mod `shards` (default: one per core); the sums are added in the order of the
              workers, so that the result depends on `shards` alone, and by rounding only.
              `open_model` opens the same model on a worker, where it is too large to be sent.
              `device` ("cpu"): "cuda" gives every worker a GPU, "auto" where the cluster has any;
              this process needs none, and the model stays where it is. `shards` then counts GPUs.

    Returns:
        The statistics, a mapping from parameter name to `LayerStatistics` with `.provenance`. A
        layer that saw no token has count 0, no Gram, and is listed under `unseen`; so is a vector
        or a table whose gradient was zero for every example.

    Raises:
        RequestError: arguments out of range, no batches, nothing to observe, no labels or logits
            for gradients, batches that cannot be read twice where two passes are needed.
        StatisticsError: inputs that fit no mask; layers that cease to share their inputs; data
            that change between passes.
        NumericalError: NaN or Inf, with the layer and the batch; nothing is written.
        ResumeError: `<output>.partial` belongs to another collection.
        OutputError: the output cannot be written.

    References:
        Merging by Matching Models in Task Parameter Subspaces, arXiv 2312.04339; Essential
        Subspace Merging, arXiv 2602.20208 and 2606.19164 (prototypes).

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> statistics = collect(model, [torch.eye(2), torch.ones(1, 2)])
        >>> statistics["weight"].dense_gram(), statistics["weight"].count
        (tensor([[2., 1.],
                [1., 2.]], dtype=torch.float64), 3)
    """
    given: dict[str, Any] = {"grams": grams, "output_gradients": output_gradients, **options}
    sharing = _sharing(given)
    settings = options_from(Settings, given, "collect")
    settings.check()
    given_batches: Any = batches  # callers without a type checker may give anything
    if isinstance(given_batches, str | Path):
        raise RequestError(
            f"collect takes batches of tensors; got '{given_batches}'.\n"
            "Rows of a file are read by the command: eutectic collect CHECKPOINT --data FILE."
        )
    first, batches, once = _peek(batches)
    if sharing is not None and once:  # they are gone through again for a worker that is lost
        batches, once = list(batches), False
    plan = make_plan(model, first, settings)
    parts = plan.parts(settings)
    if once and len(parts) > 1:
        raise RequestError(
            f"{len(parts)} passes over the data are needed, but the batches can be read only once."
            "\nPass a list or a data loader instead of an iterator, or allow more memory."
        )
    fingerprint = settings.fingerprint or StateDictReader(model.state_dict()).fingerprint()
    makers = {type(module).__module__.partition(".")[0] for module in model.modules()}
    packages = ["eutectic", "torch", *sorted(makers & {"transformers", "peft"})]
    record: dict[str, Any] = {
        "format": FORMAT,
        "checkpoint": {"fingerprint": fingerprint},
        "mask_policy": mask_policy(first, is_encoder_decoder(model), settings.token_mask),
        "settings": settings.describe(),
        "versions": {name: version(name) for name in packages},
        "samples": sample_weights(model, plan),
        "saved_as": saved_names(model),
    }
    path = None if output is None else local_path(output)
    partial = None if path is None else _begin(path, {**record, **_device(model, sharing)}, parts)
    total = len(batches) if hasattr(batches, "__len__") else None  # pyright: ignore

    def report(index: int, done: int) -> None:
        if progress is not None:
            progress(done + index * (total or 0), None if total is None else len(parts) * total)

    log, results = DataLog(), []
    try:
        for index, part in enumerate(parts):
            sums, tell = PassSums(part, settings), functools.partial(report, index)
            job = Pass(model, batches, part, settings, sums, log, 0, tell)
            run = Running(index, partial, len(parts) > 1, first, sharing)
            results.append(one_pass(job, run))
            log = job.log
        return _finish(path, partial, plan, record, log, results, settings.min_tokens)
    except BaseException:
        if partial is not None:
            partial.remove_if_empty()
        raise
    finally:
        if partial is not None:
            partial.lock.release()


def _device(model: nn.Module, sharing: Sharing | None) -> dict[str, str]:
    """Return the device that adds up, by its model: another may round otherwise."""
    found = device_model(str(device_of(model))) if sharing is None else sharing.device.model
    return {"device": found} if found else {}


def _sharing(given: dict[str, Any]) -> Sharing | None:
    """Take out of the options what says who collects; None for this process."""
    where = taken_for_merge(given)
    device = where.get("device")
    shards, open_model = given.pop("shards", None), given.pop("open_model", None)
    check_where(where.get("executor", "threads"), where.get("ray_address"))
    if where.get("executor") != "ray":
        if shards is not None or open_model is not None or device is not None:
            raise RequestError(
                "shards, open_model and device are for the workers of a cluster.\n"
                "Choose the executor ray, or leave them out; a model here is where it is."
            )
        return None
    if shards is not None and shards < 1:
        raise RequestError(f"shards must be at least 1, got {shards}.")
    cluster = joined(where.get("ray_address"))
    workers = device_of_workers(device or CPU)
    if workers.model:
        if shards is not None and shards > cluster.gpus:
            raise RequestError(
                f"{shards} shards need a GPU each, and the cluster has {cluster.gpus:g}.\n"
                "Ask for fewer, or add machines."
            )
        return Sharing(cluster, shards or int(cluster.gpus), open_model, workers)
    if shards is not None and shards > cluster.cpus:
        raise RequestError(
            f"{shards} shards need a core each, and the cluster has {cluster.cpus}.\n"
            "Ask for fewer, or add machines."
        )
    return Sharing(cluster, shards or cluster.cpus, open_model)


def _peek(batches: Iterable[Batch]) -> tuple[Batch, Iterable[Batch], bool]:
    """Return the first batch, all batches, and whether they can be read only once."""
    iterator = iter(batches)
    first = next((batch for batch in iterator if sample_count(batch) > 0), None)
    if first is None:
        raise RequestError(
            "there is no data: the batches are empty.\nNothing was collected and nothing written."
        )
    once = iterator is batches
    return first, chain([first], iterator) if once else batches, once


def _begin(path: Path, record: Mapping[str, Any], parts: Sequence[Plan]) -> Partial:
    observed = [
        {
            "layers": [[s.name, leader.name] for s, leader in part.leaders.items()],
            "outputs": [s.name for s in part.gradient_sites],
            "diagonal": list(part.diagonal),
            "block": list(part.block),
        }
        for part in parts
    ]
    described = json.dumps({**record, "parts": observed}, sort_keys=True)
    return open_partial(path, sha256(described.encode()).hexdigest(), record.get("device", ""))


def _finish(
    path: Path | None,
    partial: Partial | None,
    plan: Plan,
    record: dict[str, Any],
    log: DataLog,
    results: Sequence[tuple[Mapping[str, Tensor], Counts]],
    least: int | None,
) -> StatisticsFile:
    hashes = torch.tensor(sorted(log.inputs), dtype=torch.int64)
    counts = {name: tuple(pair) for _, part in results for name, pair in part.items()}
    record["data"] = {
        "examples": len(hashes),
        "fingerprint": sha256(hashes.numpy().tobytes()).hexdigest(),
    }
    # Finished passes stay in their files until their tensors are asked for.
    maps = [{EXAMPLES: hashes}, *(found for found, _ in results)]
    tensors = ChainMap(*cast("list[dict[str, Tensor]]", maps))
    record["layers"] = describe_layers(plan, counts, len(hashes))
    record["unseen"] = _unseen(record["layers"], tensors)
    record["skipped"] = plan.skipped
    if record["settings"]["rank"] is not None:
        record["beside_directions"] = beside_directions(tensors, list(record["layers"]))
    try:
        _check_seen(record)
        check_least_tokens(record, least)
    except (RequestError, StatisticsError):
        if partial is not None:
            partial.remove()  # the same sums
        raise
    result = StatisticsFile(record, tensors)
    if path is not None and partial is not None:
        result = result.save(path)
        partial.remove()
    return result


def _check_seen(record: Mapping[str, Any]) -> None:
    """Refuse statistics of nothing: examples without a token that counts."""
    layers = [layer for layer in record["layers"].values() if layer["kind"] != "parameter"]
    skips = record["settings"]["unmatched"] == "skip"  # as many layers as that leaves out
    if layers and not skips and not any(layer["count"] for layer in layers):
        raise StatisticsError(
            f"no token of the {record['data']['examples']} examples reached any layer.\n"
            "Are the texts empty, or does the tokenizer make nothing of them? Nothing was written."
        )


def _unseen(layers: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the layers that no token reached, and the other parameters that no gradient did."""

    def moved(name: str) -> bool:
        names = (f"{name}/{kind}" for kind in ("fisher_diagonal", *gram_names("block_fisher")))
        return any(bool(tensors[n].any()) for n in names if n in tensors)

    return [
        name
        for name, layer in layers.items()
        if not (moved(name) if layer["kind"] == "parameter" else layer["count"])
    ]
