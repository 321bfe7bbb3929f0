"""From a recipe and opened inputs to one treatment per tensor, with every fault at once."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from eutectic.checkpoint.adapters import WEIGHT_NAMES
from eutectic.checkpoint.folder import check_side_files
from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.output_format import (
    InShards,
    LaidOutLikeBase,
    OutputFormat,
    OutputTensor,
    TensorFiles,
)
from eutectic.checkpoint.writer import OutputFile
from eutectic.conventions import CLASSIFIERS
from eutectic.conventions_heads import is_buffer, is_output_layer, vocabulary_heads
from eutectic.conventions_stacks import stack_depths
from eutectic.errors import CheckpointError, Fault, MethodError, Note, RecipeError, RequestError
from eutectic.methods import Method, Post, as_post, get_method
from eutectic.models.task_kinds import GENERATIVE, kind_of_architectures
from eutectic.planning.adapter_plan import AdapterPlan, adapter_plan, rank_notes
from eutectic.planning.collector import collector_paused
from eutectic.planning.compression import compressed_before, compression_faults
from eutectic.planning.coverage import coverage_faults, unmatched
from eutectic.planning.cut_metric import cut_faults, cut_in_inputs, cut_notes
from eutectic.planning.directions import directed, first_direction
from eutectic.planning.fallbacks import fallback_faults, fallen_share, merged_mostly_by
from eutectic.planning.inputs import Inputs, MergeRequest
from eutectic.planning.kernels import kernel_faults
from eutectic.planning.layer_config import Edit, layer_edits
from eutectic.planning.notes import notes_on
from eutectic.planning.shapes import another_base, empty_heads, shape_faults
from eutectic.planning.shares import Shares, shares_of
from eutectic.planning.stated_request import StatedRequest, stated_request
from eutectic.planning.statistics_match import statistics_faults, statistics_names
from eutectic.planning.table_rows import as_one_size, head_faults, with_vocabulary
from eutectic.planning.tensor_plan import TensorPlan
from eutectic.planning.tensors import plan_tensor
from eutectic.planning.ties import Ties, find_ties
from eutectic.planning.vocabulary import find_vocabulary
from eutectic.recipes.load import Source
from eutectic.recipes.particular import constant
from eutectic.recipes.schema import Recipe, ScaleSearch
from eutectic.types import Treatment
from eutectic.versions import version
from eutectic.vocabulary.agreement import Vocabulary
from eutectic.words import few

USUAL_SHARD = 5_000_000_000  # bytes in a file, where the base's own files are no pattern


@dataclass(frozen=True)
class OutputOptions:
    """What is decided of the output as a whole."""

    dtype: torch.dtype | None  # of all floating-point tensors; None where each keeps its own
    heads: Literal["per_expert", "base", "drop"]
    side_files: str  # "base", or the expert whose config and tokenizer files are copied
    shard_bytes: int | None = None  # most bytes in one file; None where files are the base's
    tied: bool | None = None  # what its configuration says of tied tables; None: as it stands
    nonfinite: Literal["error", "allow"] = "error"  # NaN or Inf in it
    layers: tuple[Edit, ...] = ()  # what its configuration says of layers of several models
    vocabulary: Vocabulary | None = None  # whose tokenizer it gets; None: that of `side_files`
    # model -> folder of its tokenizer
    tokenizers: Mapping[str, Path] = field(default_factory=dict[str, Path])
    chat_template: str | None = None  # Jinja; None leaves the tokenizer's


@dataclass(frozen=True)
class Plan:
    """A merge, decided. Its tensors own what decides their bytes; the rest is told of the whole."""

    method: Method
    parameters: Any
    scale: float
    search: ScaleSearch | None  # how α is to be chosen; None where it is a number
    tensors: tuple[TensorPlan, ...]  # one entry per tensor of the output, in file order
    heads: Mapping[str, tuple[TensorEntry, ...]]  # expert -> tensors kept for it alone
    # expert -> output layers of the base that it lacks, and that its own folder leaves out
    foreign_heads: Mapping[str, frozenset[str]]
    left_out: tuple[str, ...]  # tensors of the base that the output does not hold (`heads: drop`)
    output: OutputOptions  # what is decided of the output as a whole
    request: StatedRequest  # what was asked for, for the card and the journal
    shares: Shares  # of the experts' numbers: merged, kept, left
    mostly_by: str  # the method that merges most numbers of those that `method` is for
    # how much of those takes the method's fall-back, for lack of statistics; empty where nothing
    fallback: Mapping[str, Any]
    notes: tuple[Note, ...]  # alignments, tensors that nobody changes, fall-backs
    post: Post | None = None  # what follows the merge of every matrix
    adapter: AdapterPlan | None = None  # how a PEFT adapter holds the change, if that is asked for
    # how large the merged change is, once it is merged; see `execution.norms.measured`
    norms: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def stated_recipe(self) -> dict[str, Any]:
        """The recipe as a user would write it, with the scale that was used."""
        if "stated" in self.request.published:  # in words of its own, which say the scale
            return dict(self.request.published["stated"])
        return {**self.request.published, "scale": self.scale}

    @property
    def merged(self) -> list[TensorPlan]:
        """The tensors that are not copied."""
        return [t for t in self.tensors if t.merged]


@dataclass(frozen=True)
class OutputLayout:
    """The weight files of an output, and the format that writes them."""

    format: OutputFormat
    files: tuple[OutputFile, ...]

    def open(self, folder: Path, *, resume: bool) -> AbstractContextManager[TensorFiles]:
        """Create the files in a folder, or take up those that are there."""
        return self.format.open(folder, self.files, resume=resume)


@collector_paused()
def make_plan(recipe: Recipe, inputs: Inputs, source: Source | None = None) -> Plan:
    """Decide what becomes of every tensor, from headers alone."""
    source = source or Source()
    faults: list[Fault] = []
    _check_files(recipe, inputs, source, faults)
    found = find_vocabulary(recipe, inputs, source)
    _refuse(found.faults, source)
    opened, vocabulary = inputs, found.planned
    if vocabulary is not None:
        inputs = as_one_size(opened, vocabulary)
    request = _request(recipe, inputs, source)
    if recipe.statistics_of == "expert":
        faults += statistics_faults(opened, request.statistics_names)
    entries = [*inputs.base.entries.values(), *_untied(inputs, request.ties)]
    planned = [plan_tensor(entry, request) for entry in entries]
    faults += request.ties.faults
    faults += _told([fault for fault in planned if isinstance(fault, Fault)], request)
    _refuse(faults, source)
    chosen = [directed(t, request) for t in planned if not isinstance(t, Fault)]
    _refuse(list(dict.fromkeys(f for t in chosen if isinstance(t, list) for f in t)), source)
    tensors = [t for t in chosen if not isinstance(t, list)]
    if vocabulary is not None:
        placed = [with_vocabulary(t, vocabulary, opened) for t in tensors]
        _refuse([fault for fault in placed if isinstance(fault, Fault)], source)
        tensors = [t for t in placed if not isinstance(t, Fault)]
    _refuse(kernel_faults(tensors, request), source)
    substitutes = fallback_faults(tensors, request) if recipe.fallback == "error" else []
    _refuse([*substitutes, *_unfit(tensors)], source)
    heads = _heads(recipe, opened, tensors, request.ties)
    if vocabulary is not None:
        _refuse(head_faults(heads, vocabulary), source)
    _refuse(_side_file_faults(heads, inputs), source)
    left_out = ()
    if recipe.heads == "drop":
        left_out = tuple(t.name for t in tensors if t.treatment is Treatment.HEAD)
        tensors = [t for t in tensors if t.treatment is not Treatment.HEAD]
    method, parameters = request.method, request.parameters
    if request.post is not None and not any(t.post is not None for t in tensors):
        what = f"'{request.post.name}' follows the merge of matrices, and none is merged."
        line = source.line("post")
        _refuse([Fault("nothing_to_follow", what, "post", line, next="Leave post out.")], source)
    if method.prepare is not None and method.model_scope(parameters):
        _refuse_partial(tensors, request)
    if not any(t.merged for t in tensors):
        nothing = Fault("nothing_to_merge", "no tensor would be merged: every one is copied.")
        _refuse([nothing], source)
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else None
    adapter = _adapter(recipe, inputs, tensors, heads, dtype)
    if isinstance(adapter, list):
        _refuse(adapter, source)
        adapter = None
    if adapter is not None:
        _refuse(
            [*compression_faults(tensors, adapter), *cut_faults(tensors, adapter, inputs)], source
        )
        tensors = cut_in_inputs(compressed_before(tensors, adapter), adapter, inputs)
    shares = shares_of(tensors, heads, unmatched(request), request)
    return Plan(
        method=method,
        parameters=parameters,
        scale=request.scale,
        search=recipe.scale if isinstance(recipe.scale, ScaleSearch) else None,
        tensors=tuple(tensors),
        heads=heads,
        foreign_heads=_foreign_heads(heads, inputs, request.ties),
        left_out=left_out,
        output=OutputOptions(
            dtype,
            recipe.heads,
            recipe.side_files,
            recipe.shard_size,
            request.ties.tied,
            recipe.nonfinite,
            layer_edits(inputs, recipe.script) if inputs.rows and recipe.script else (),
            None if vocabulary is None else vocabulary.agreed,
            {} if vocabulary is None else vocabulary.folders,
            found.chat_template,
        ),
        request=replace(
            stated_request(recipe),
            default_for_texts=_defaults_for_texts(recipe, inputs),
        ),
        shares=shares,
        mostly_by=merged_mostly_by(tensors, request),
        fallback=fallen_share(tensors, request),
        notes=(
            *found.notes,
            *notes_on(tensors, heads, left_out, shares, request),
            *(() if adapter is None else rank_notes(tensors, adapter)),
            *(() if adapter is None else cut_notes(tensors, adapter)),
        ),
        adapter=adapter,
        post=request.post,
    )


def _adapter(
    recipe: Recipe,
    inputs: Inputs,
    tensors: Sequence[TensorPlan],
    heads: Mapping[str, tuple[TensorEntry, ...]],
    dtype: torch.dtype | None,
) -> AdapterPlan | list[Fault] | None:
    """Decide how an adapter holds the change; None where the output is a model."""
    options = recipe.adapter_options
    if options is None:
        return None
    vectors = inputs.index is not None and inputs.index.files[0] in WEIGHT_NAMES
    if inputs.index is None or vectors or inputs.rows:
        what = "this merge makes no change of one base that a LoRA could hold"
        return [Fault("adapter_output", f"{what}.", "output", next="Choose output: model.")]
    return adapter_plan(tensors, heads, inputs, options, dtype or torch.float32)


def _side_file_faults(heads: Mapping[str, Any], inputs: Inputs) -> list[Fault]:
    """Return what keeps the experts with heads from folders of their own."""
    folders = {f"expert '{name}'": inputs.experts[name].folder for name in heads}
    if heads and inputs.index is not None:
        folders["base"] = inputs.index.folder  # which these folders begin with
    faults: list[Fault] = []
    for whose, folder in folders.items():
        try:
            check_side_files(folder)
        except CheckpointError as error:
            faults.append(Fault("unusable_side_files", str(error), whose))
    return faults


def with_scale(plan: Plan, scale: float, note: Note) -> Plan:
    """Return the plan with a number, explained by `note`, in place of a search for α."""
    return replace(
        plan,
        scale=scale,
        search=None,
        tensors=tuple(replace(t, scale=scale) if t.tunable else t for t in plan.tensors),
        notes=(*plan.notes, note),
    )


def output_layout(plan: Plan, inputs: Inputs) -> OutputLayout:
    """Return where every tensor of a plan will lie."""
    index = inputs.index
    if index is None:
        raise RequestError("a merge into files needs a base in files.")
    tensors: list[OutputTensor] = []
    for planned in plan.tensors:
        kept = planned.like or (planned.base.tensor if planned.base is not None else None)
        own = index.entries.get(kept or "")
        file = None if own is None else own.file
        tensors.append(OutputTensor(planned.name, planned.dtype, planned.shape, file))
    recipe = json.dumps(plan.stated_recipe, sort_keys=True)
    bound = plan.output.shard_bytes or (USUAL_SHARD if inputs.rows else None)
    form = LaidOutLikeBase(index) if bound is None else InShards(bound, index)
    files = form.lay_out(tensors, {"eutectic": version("eutectic"), "recipe": recipe})
    return OutputLayout(form, tuple(files))


def _defaults_for_texts(recipe: Recipe, inputs: Inputs) -> bool:
    """Tell whether nobody chose a scale for language models, as their configuration says."""
    if recipe.scale is not None or recipe.script is not None:
        return False
    named = inputs.config.get("architectures")
    listed = [str(name) for name in named] if isinstance(named, list) else []
    return kind_of_architectures(listed) in GENERATIVE


def _request(recipe: Recipe, inputs: Inputs, source: Source) -> MergeRequest:
    method, post = get_method(recipe.method), as_post(recipe.post)
    scale = recipe.scale
    if scale is None or isinstance(scale, ScaleSearch):
        scale = method.default_scale(len(inputs.experts))
        scale = scale if post is None else post.entry.default_scale
    own = {
        name: method.parse({**recipe.parameters, **spec.parameters})
        for name, spec in recipe.experts.items()
        if spec.parameters and recipe.script is None
    }
    owners = dict(inputs.experts)
    if inputs.initial is not None:
        owners["initial"] = inputs.initial
    plain = recipe.script is None
    stated = recipe.script is None or recipe.script.stated is None  # in words of our own
    request = MergeRequest(
        recipe=recipe,
        inputs=inputs,
        document=source,
        method=method,
        parameters=method.parse(constant(method, recipe.parameters)) if stated else None,
        scale=scale,
        own_parameters=own,
        ties=find_ties(inputs.base, inputs.config, owners),
        statistics_names={n: statistics_names(s, inputs) for n, s in inputs.statistics.items()},
        depths={} if plain else stack_depths(inputs.base.entries),
        post=post,
    )
    first = None if stated else first_direction(request)
    if first is None:
        return request
    found = get_method(first.method)
    scale = scale if first.scale is None else first.scale
    return replace(request, method=found, parameters=first.parameters, scale=scale)


def _told(faults: Sequence[Fault], request: MergeRequest) -> list[Fault]:
    """Return the faults of tensors by their causes, and those of the experts as a whole."""
    kinship, uncovered = another_base(request), coverage_faults(request)
    shaped = [fault.where for fault in faults if fault.kind == "other_shape"]
    hidden = {"other_shape"}
    if uncovered:  # where names do not meet, `missing: base` would be the wrong advice
        hidden.add("missing_tensor")
    told = [fault for fault in faults if fault.kind not in hidden]
    shapes = shape_faults(shaped, request, leave_out=kinship)
    return [*kinship.values(), *uncovered, *shapes, *empty_heads(request), *told]


def _refuse(faults: Sequence[Fault], source: Source) -> None:
    if faults:
        raise RecipeError(faults, source.name)


def _check_files(recipe: Recipe, inputs: Inputs, source: Source, faults: list[Fault]) -> None:
    """Refuse shards of an adapter, and a chat template where it gets no tokenizer."""
    vectors = inputs.index is not None and inputs.index.files[0] in WEIGHT_NAMES
    factors = recipe.adapter_options is not None
    if recipe.shard_size is not None and (vectors or factors):
        kind = "a PEFT" if factors else "an (IA)³"
        what = f"the output is {kind} adapter, which PEFT reads from one file."
        where, line = "shard_size", source.line("shard_size")
        faults.append(Fault("adapter_in_shards", what, where, line, next="Leave shard_size out."))
    chosen = recipe.vocabulary is not None and recipe.vocabulary.source != "error"
    if recipe.chat_template is not None and factors and not chosen:
        what = "the output is an adapter, which is used with the base's tokenizer and its template."
        where, line = "chat_template", source.line("chat_template")
        choose = "Leave it out, or choose a vocabulary: the adapter then gets a tokenizer."
        faults.append(Fault("template_of_adapter", what, where, line, next=choose))


def _unfit(tensors: Sequence[TensorPlan]) -> list[Fault]:
    """Return what is wrong with the number or the weights of the experts that hold a tensor."""
    faults: list[Fault] = []
    seen: set[tuple[object, ...]] = set()
    for planned in tensors:
        shares = tuple((s.owner, s.weight) for s in planned.experts)
        held = (planned.method, shares, repr(planned.parameters), repr(planned.post))
        if not planned.merged or held in seen:
            continue
        seen.add(held)
        method = get_method(planned.method)
        try:
            method.check_expert_count(len(planned.experts))
        except MethodError as error:
            choose = "Choose missing: base, which counts an expert without the tensor as unchanged."
            faults.append(Fault("expert_count", str(error), planned.name, next=choose))
            continue
        weights = [source.weight for source in planned.experts]
        fault = None if method.check is None else method.check(planned.parameters, weights)
        post = planned.post
        if fault is None and post is not None and post.entry.check is not None:
            fault = post.entry.check(post.parameters, weights)
        if fault is not None:
            faults.append(Fault("method_check", fault, planned.name))
    return faults


def _refuse_partial(tensors: Sequence[TensorPlan], request: MergeRequest) -> None:
    """Refuse tensors that some expert lacks, for a method that looks at the whole model at once."""
    name, count = request.method.name, len(request.inputs.experts)
    partial = [t.name for t in tensors if t.method == name and len(t.experts) < count]
    if partial:
        what = (
            f"method '{name}' looks at the whole model at once, but some expert "
            f"lacks {few(partial)}."
        )
        choose = "Choose missing: base, which counts it as unchanged."
        _refuse([Fault("missing_tensor", what, next=choose)], request.document)


def _untied(inputs: Inputs, ties: Ties) -> list[TensorEntry]:
    """Return the tensors of the output that the base's file leaves out, as the base has them."""
    return [replace(inputs.base.entries[own], name=name) for name, own in ties.added.items()]


def _foreign_heads(
    heads: Mapping[str, tuple[TensorEntry, ...]], inputs: Inputs, ties: Ties
) -> dict[str, frozenset[str]]:
    """Return, per expert with heads, the base's output layers that its class has no place for.

    They are those that it has under no name. An adapter lacks nothing of its base; one that brings
    a classifier has it in place of a language model's output layer.
    """
    foreign: dict[str, frozenset[str]] = {}
    for name, own in heads.items():
        expert = inputs.experts[name]
        if expert.is_delta:
            classifier = any(e.name.endswith(CLASSIFIERS) for e in own)
            foreign[name] = vocabulary_heads(inputs.base.entries) if classifier else frozenset()
        else:
            absent = (n for n in expert.missing if ties.source(name, expert, n) is None)
            foreign[name] = frozenset(n for n in absent if is_output_layer(n))
    return foreign


def _heads(
    recipe: Recipe, inputs: Inputs, tensors: Sequence[TensorPlan], ties: Ties
) -> dict[str, tuple[TensorEntry, ...]]:
    """Return, per expert, the head tensors that it has."""
    if recipe.heads != "per_expert":
        return {}
    shared = [t.name for t in tensors if t.treatment is Treatment.HEAD]
    heads: dict[str, tuple[TensorEntry, ...]] = {}
    for name, expert in inputs.experts.items():
        own = [replace(expert.entries[k], name=k) for k in shared if k in expert.entries]
        no_heads = ties.explained[name].difference(shared)
        own += [replace(e, name=k) for k, e in expert.extra.items() if k not in no_heads]
        # A buffer comes along with heads, and is no reason for a folder of its own.
        if not all(is_buffer(e.name, len(e.shape)) for e in own):
            heads[name] = tuple(own)
    return heads
