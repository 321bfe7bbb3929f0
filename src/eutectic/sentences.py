"""The sentences of notes and reasons. Records carry a kind; only people read these words.

A template may use the subject's names by position (`{0}`), all of them (`{all}`), the first four
with a count of the others (`{few}`), and every number by its name: `{count:n tensor}` has its noun
in the singular or the plural, `{count:n matrix/matrices}` an irregular one.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eutectic.sentences_of_checks import OF_CHECKS, Template
from eutectic.words import counted, few, percent, percents, shown, with_urls


def sentence(kind: str, subject: Sequence[str], numbers: Mapping[str, Any]) -> str:
    """Return the text of one record."""
    template = SENTENCES[kind]
    if not isinstance(template, str):
        return with_urls(template(subject, numbers))
    named: dict[str, Any] = {"all": ", ".join(subject), "few": few(subject), **numbers}
    return with_urls(_FORMATTER.format(template, *subject, **named))


class _Formatter(string.Formatter):
    """`str.format` with nouns behind numbers."""

    def format_field(self, value: Any, format_spec: str) -> str:
        """Return a value as a field of a template shows it."""
        if format_spec.startswith("n "):
            one, _, many = format_spec[2:].partition("/")
            return counted(value, one, many)
        return format(value, format_spec)


_FORMATTER = _Formatter()


def _of_the_base(text: str) -> Callable[[Sequence[str], Mapping[str, Any]], str]:
    """Return a template of names that ends with their share of the base's numbers, if known."""

    def template(names: Sequence[str], numbers: Mapping[str, Any]) -> str:
        told = text.format(few=few(names), **numbers)
        share = numbers.get("share")
        return told if share is None else f"{told}; {percent(share)} of the base's numbers"

    return template


def _fallen(text: str) -> Callable[[Sequence[str], Mapping[str, Any]], str]:
    """Return a template that ends with how much of a method's tensors fell back."""

    def template(names: Sequence[str], numbers: Mapping[str, Any]) -> str:
        return (
            f"{text.format(few=few(names), **numbers)} ({numbers['tensors']} of {numbers['of']} "
            f"tensors that {numbers['asked']} is for, {percent(numbers['share'])} of their numbers)"
        )

    return template


def _exploded(_: Sequence[str], numbers: Mapping[str, Any]) -> str:
    model = f"'{numbers['model']}': " if numbers.get("model") else ""
    text = (
        f"{model}the merged change is {numbers['ratio']:.3g} times as large as the experts' own "
        "are on average (α‖Δ‖ against the mean ‖Δ_t‖)"
    )
    if numbers["above"]:
        largest = ", ".join(f"{name} ({own:.3g})" for name, own in numbers["largest"].items())
        text += (
            f"; more than {numbers['bound']:.3g} times in {numbers['above']} of "
            f"{numbers['matrices']:,} matrices: {largest}"
            + (" …" if numbers["above"] > len(numbers["largest"]) else "")
            + " (of those that an expert changes)"
        )
    return text + ". Such a model is seldom any good: try a smaller scale, or scale: norm"


def _unrelated(subject: Sequence[str], numbers: Mapping[str, Any]) -> str:
    share, kin = numbers["share"], numbers["kin"]
    told = [] if share is None else [f"{share:.2g} times the base's own norm"]
    told += [] if kin is None else [f"{kin:.2g} times the other experts' median"]
    return (
        f"expert '{subject[0]}' is far from the base, by {' and '.join(told)}: was it fine-tuned "
        "from this one?"
    )


def _no_kin(subject: Sequence[str], numbers: Mapping[str, Any]) -> str:
    kin = numbers["kin"]
    others = "" if kin is None else f"; the other experts' {kin:.2f}"
    return (
        f"expert '{subject[0]}' is no kin of the base: the cosine of its matrices to the base's is "
        f"{numbers['cosine']:.2f} (1: the same{others}). Either it was fine-tuned from another "
        "model, and a merge of the two is neither the one nor the other, or it was trained so hard "
        "that little of the base is left"
    )


def _left_alone(names: Sequence[str], numbers: Mapping[str, Any]) -> str:
    return (
        f"expert '{numbers['expert']}': {percent(numbers['share'])} of its numbers are neither "
        f"merged nor kept: {few(names)}"
    )


def shares(record: Mapping[str, Any]) -> str:
    """Return the shares of the experts' numbers (`Shares.record`) as text."""
    merged, kept, left = percents([record[part] for part in ("merged", "kept", "left")])
    parts = f"{merged} merged, {kept} kept as heads, {left} left"
    return f"of the experts' {counted(record['numbers'], 'number')}: {parts}"


def _untaken(_: Sequence[str], numbers: Mapping[str, Any]) -> str:
    others = ", ".join(f"{name} ({count})" for name, count in numbers["merged_by"].items())
    return (
        f"no tensor takes {numbers['method']}: it merges matrices, and none of these models' "
        f"tensors is one for it. All are merged by {others}"
    )


def _uncollected(subject: Sequence[str], numbers: Mapping[str, Any]) -> str:
    how = f": collect them with {numbers['option']}" if numbers.get("option") else ""
    return f"the statistics of '{subject[0]}' hold no {numbers['need']} at all{how}"


def _mixed_classes(_: Sequence[str], numbers: Mapping[str, Any]) -> str:
    differ = ", ".join(
        f"{model} (output {index} is {own}, not {wanted})"
        for model, (index, own, wanted) in numbers["differ"].items()
    )
    rules = ", ".join(f"{{match: {pattern}, treatment: head}}" for pattern in numbers["heads"])
    return (
        "one head is merged from outputs that stand for other classes than those of "
        f"{numbers['reference']}: {differ}. The merged outputs mean nothing unless these are two "
        f"names of one class. Keep the heads apart: tensors: [{rules}]"
    )


def _searched(tasks: Sequence[str], numbers: Mapping[str, Any]) -> str:
    text = (
        "scale {scale:g} chosen by {search} on the {split} splits of {tasks}: {points} values of "
        "α, best {best:.4g}"
    ).format(tasks=", ".join(tasks), **numbers)
    if numbers["edge"]:
        text += "; it is at the edge of the range, so a wider one may be better"
    if numbers.get("flat"):
        text += (
            "; the smallest that was tried did as well, so that no α was seen to help: try more "
            "values, or the search divergence"
        )
    for task, other, count in numbers["shared"]:
        text += f"; {count} rows of {task} are test rows of {other}"
    if numbers["ignored"]:
        text += f"; experts without a task were ignored: {', '.join(numbers['ignored'])}"
    return text


def _read_as(subject: Sequence[str], numbers: Mapping[str, Any]) -> str:
    expert, own, base = subject
    return f"expert '{expert}': {read_as(own, base, numbers['count'])}"


def read_as(own: str, base: str, count: int) -> str:
    """Return in words that a spelling in an expert's names is read as one of the base's."""
    tensors = f"({counted(count, 'tensor')})"
    if not base:
        return f"'{own}' left out of its names {tensors}"
    if not own:
        return f"'{base}' of the base's names added {tensors}"
    return f"{own} read as {base} {tensors}"


def _no_gain(_: Sequence[str], values: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{t} ({own:.4g}, base {base:.4g})" for t, (own, base) in values.items())
    return "the expert does not outperform the base, so NAI is not meaningful here: " + listed


def _dequantised(owners: Sequence[str], numbers: Mapping[str, Any]) -> str:
    kinds = (f"{k} ({counted(n, 'tensor')})" for k, n in numbers["kinds"].items())
    return f"dequantised: {', '.join(kinds)} of {', '.join(owners)}"


def _near_chance(tasks: Sequence[str], numbers: Mapping[str, Any]) -> str:
    shares = numbers["shares"]
    listed = ", ".join(f"{task} ({shares[task]:.0%})" for task in tasks[:8])
    how = "of its own data" if numbers["measured"] else "by its statistics"
    return (
        f"the router sends few samples to their own expert, {how}: {listed}; by chance "
        f"{numbers['chance']:.0%}. Route by statistics of the merged model (--router-data) of more "
        "samples, by another router, or let the caller name the expert (oracle)"
    )


def tokens(names: Sequence[str], limit: int = 4) -> str:
    """Return tokens for a message: quoted, the first of them, and how many more there are."""
    return few([shown(name, 40) for name in names[:limit]] + ["…"] * (len(names) - limit), limit)


def _vocabulary(_: Sequence[str], numbers: Mapping[str, Any]) -> str:
    before, rows = numbers["before"], numbers["rows"]
    size = f"{rows:,} rows" if rows == before else f"{rows:,} rows, the base's have {before:,}"
    return (
        f"vocabulary {numbers['policy']}: {numbers['tokens']:,} tokens in tables of {size}; rows "
        "are matched by their tokens"
    )


def _tokens_added(names: Sequence[str], numbers: Mapping[str, Any]) -> str:
    owners = ", ".join(f"{count:,} from '{n}'" for n, count in numbers["owners"].items())
    return (
        f"{_many(names, 'token')} added to the base's ({owners}): {tokens(names)}; a row that the "
        "base lacks counts there as the mean over the experts that have it"
    )


def _tokens_lacking(names: Sequence[str], numbers: Mapping[str, Any]) -> str:
    if numbers["model"] == "base":
        return f"the base has no row for {_many(names, 'token')} of the output: {tokens(names)}"
    return (
        f"expert '{numbers['model']}' has no row for {_many(names, 'token')} of the output: "
        f"{tokens(names)}; unchanged there"
    )


def _many(names: Sequence[str], what: str) -> str:
    return counted(len(names), what)


def _other_tokens(subject: Sequence[str], numbers: Mapping[str, Any]) -> str:
    count, base, own = numbers["count"], shown(numbers["base"], 40), shown(numbers["own"], 40)
    return (
        f"{counted(count, 'row')} of the tables stand{'s' * (count == 1)} for other tokens in "
        f"'{subject[0]}' than in the base, such as row {numbers['row']:,}: {own} there, {base} in "
        "the base. Rows are merged by their number; vocabulary: union matches them by their tokens"
    )


SENTENCES: dict[str, Template] = {
    "router_near_chance": _near_chance,
    # Why a tensor takes its treatment.
    "matrix": "matrix",
    "stack": "stack of matrices",
    "integers": "integers or booleans",
    "empty": "empty",
    "small": "bias, norm or scalar",
    "vectors": "stack of vectors: biases, scales or norms",
    "several_axes": "linear map of several axes",
    "ia3_vector": "(IA)³ vector",
    "convolution": "convolution kernel",
    "kernel_as_matrix": "convolution as a matrix over patches",
    "transposed_kernel_as_matrix": "transposed convolution as a matrix from inputs to patches",
    "groups_unknown": "no statistics say how many groups it has",
    "groups_assumed": "no statistics say how many groups it has: taken as one",
    "kernels_of_one_row": "averaged: each row is a map of its own",
    "table": "lookup table",
    "single_row": "a single row or column",
    "text_projection": "text projection, not flattened officially",
    "rule": "rule '{0}'",
    "tied": "tied to {0}",
    "tied_by_base": "treated as {0}, to which the base ties it",
    "other_shape": lambda experts, shapes: (
        "shape differs: " + ", ".join(f"{n} {shapes[n]}" for n in experts)
    ),
    "unchanged_by_adapters": "no adapter changes it",
    "in_no_expert": "no expert has it",
    "base_alone": "nothing but the base is merged here",
    # Why its method is not the recipe's, or not as usual.
    "averaged_as_tied": "averaged, tied to another tensor of the file",
    "no_statistics": "no statistics of {all}",
    "no_statistics_of_stacks": "no statistics of the matrices of a stack",
    "split_by_inputs": "query, key and value saw different inputs",
    # What a user should know of a plan.
    "vocabulary": _vocabulary,
    "tokens_added": _tokens_added,
    "tokens_removed": lambda names, _: (
        f"{_many(names, 'token')} of the base left out, which some expert lacks: {tokens(names)}"
    ),
    "tokens_created": lambda names, _: (
        f"{_many(names, 'token')} added to the tokenizer by rules: {tokens(names)}"
    ),
    "tokens_lacking": _tokens_lacking,
    "tokens_without_row": lambda names, _: (
        f"{_many(names, 'token')} of the tokenizer have a row in no model: {tokens(names)}; their "
        "rows are zero"
    ),
    "tokenizer_assumed": "no tokenizer lies beside {all}: taken is that of the base",
    "other_tokens": _other_tokens,
    "tables_differ": lambda names, numbers: (
        "tables of tokens have different numbers of rows: "
        + ", ".join(f"{n} {numbers['rows'][n]:,}" for n in names)
    ),
    "table_too_small": (
        "'{0}' has {rows:,} rows, but the configuration's vocab_size is {stated:,}: the model does "
        "not load"
    ),
    "tokens_beyond_table": lambda names, numbers: (
        f"{_many(names, 'token')} of the tokenizer lie beyond the {numbers['rows']:,} rows of "
        f"'{numbers['table']}', from row {numbers['row']:,} on: {tokens(names)}; a text that holds "
        "one fails"
    ),
    "special_beyond_table": lambda names, numbers: (
        f"the tables have {numbers['rows']:,} rows, but the configuration names tokens beyond: "
        + ", ".join(f"{key} {numbers['named'][key]:,}" for key in names)
    ),
    "gguf_tokenizer": (
        "the tokenizer of the GGUF file could not be converted ({reason}): put one beside the model"
    ),
    "template": "chat template: that of {all}, which most of the models have",
    "no_template": "no model has a chat template, so that there is none to choose",
    "mixed_classes": _mixed_classes,
    "stages_kept": "the outputs of {count} earlier stages are kept in {0}; nothing needs them now",
    "recipe_key_ignored": "the recipe's '{0}' changes nothing, as in mergekit: passed over",
    "parameters_ignored": (
        "the recipe gives {all}, which change nothing under {method}, as in mergekit: passed over"
    ),
    "shards_without_index": (
        "no index lists the shards of {all}; all {count} are there by their names, and were read"
    ),
    "other_ending": "'{file}' of {all} holds {format}, whatever its ending says; read as that",
    "wrapped_weights": (
        "'{file}' of {all} holds the weights under '{name}', and {others} other entries, left out"
    ),
    "one_level_down": "{0}: the folder itself holds no weights; taken is what lies below: {1}",
    "further_adapters": (
        "{who}: taken is the adapter in the folder itself; to merge another, name it: {few}"
    ),
    "extra_prefix": "expert '{0}': the expert's keys carry the prefix '{1}', which the base's lack",
    "lacking_prefix": "expert '{0}': the expert's keys lack the prefix '{1}' of the base's",
    "dequantised": _dequantised,
    "stale_quantisation": (
        "the configuration of {all} says that it is quantised ({method}), but its tensors are "
        "plain numbers and are read as such"
    ),
    "adapter_of_quantised": (
        "expert '{0}' is an adapter that was trained on '{trained_on}', quantised by its name: its "
        "change is added to the weights of this base, which are not quite those it was trained on"
    ),
    "scaled_by_zero": (
        "expert '{0}' is an adapter whose scaling is 0 (lora_alpha): its factors change nothing"
    ),
    "trimmed_away": (
        "{method} keeps nothing of {count:n layer} ({few}): the experts' core has at most "
        "{entries:,} entries there, and density {density:g} keeps none of so few. A density of "
        "{least:g} keeps one"
    ),
    "rank_above_layer": (
        "expert '{0}' has factors of rank {rank} for {1}, which has {side} directions: the change "
        "is what the factors make, and no adapter needs more than {side} for it"
    ),
    "cut_plainly": (
        "cut where they lose the least of their change, not of the outputs, since no statistics "
        "know their inputs: {few}"
    ),
    "rank_above_layers": (
        "rank {rank} is more than any layer has ({side} at most): each gets what it has"
    ),
    "projections_drawn": (
        "expert '{0}' is a VeRA adapter without its projections: they are drawn again from its "
        "seed {seed}, as PEFT does, and are right if the base has the layers it was trained on"
    ),
    "adapter_on_quantised": (
        "expert '{0}' is an adapter on a quantised base: its change is added to the dequantised "
        "weights, as peft's merge_and_unload does after dequantising"
    ),
    "other_prefix": "expert '{0}': the prefix '{1}' of its keys is the base's '{2}'",
    "read_as": _read_as,
    "repeated": "expert '{expert}' holds these again under other names, unchanged: {few}",
    "copied": _of_the_base("copied from the base, since no expert has them: {few}"),
    "extra_left_out": (
        "expert '{expert}' has tensors that the base lacks, left out because of heads: {heads}: "
        "{few}"
    ),
    "expert_lacks": _of_the_base("expert '{expert}' lacks (missing: {missing}): {few}"),
    "left_alone": _left_alone,
    "untaken": _untaken,
    "other_base_named": (
        "adapter '{0}' says that it was trained on '{stated}', and the base is '{base}': is that "
        "the same model?"
    ),
    "heads_kept": lambda experts, heads: (
        "heads kept per expert: " + "; ".join(f"{n}: {few(heads[n])}" for n in experts)
    ),
    "rank_untold": (
        "{0} merges all directions, which are cut to {rank} afterwards: --param "
        "directions={rank} has it choose them itself"
    ),
    "uncarried": "the adapter does not hold the change of these: {few}",
    "heads_left_out": "heads left out of the output: {few}",
    "side_files_left": "beside the base's weights, and not copied: {few}",
    "idle_rules": "rules that match no tensor: {few}",
    "rules_of_tied": (
        "'{0}' is a copy of '{1}' and takes the rules of that, not those that match its own name"
    ),
    "untied": (
        "no longer tied to {partner} in the output, since {experts} changed one without the other: "
        "{few}"
    ),
    "base_untied": (
        "the base's configuration ties '{1}' to '{0}', but its file holds them with different "
        "values: both are merged, and the output's configuration ties nothing. Versions of "
        "transformers before 5 use '{0}' for both"
    ),
    "scale_apart": (
        "models of the type {0} scale their outputs where tables are tied. The output's "
        "configuration unties them and says scale_decoder_outputs: true, which transformers 5 "
        "reads; in versions before, its logits are larger by the root of the model's width"
    ),
    "tie_kept": (
        "the output's file holds tables apart that its configuration ties, because models of the "
        "type {0} scale their outputs by the same key. transformers 5 goes by the file; versions "
        "before do not"
    ),
    "split_ignored": "split plays no part in {method}, which looks at a tensor as a whole: {few}",
    "side_files_shape": (
        "side_files: the configuration of '{expert}' may not fit the output, where these have the "
        "base's shape: {few}"
    ),
    "no_tensors": "entries of the base that are no tensors: {few}",
    "unproven_statistics": (
        "statistics of '{0}' do not prove that they are of this expert; they may be of another "
        "checkpoint"
    ),
    "fallback": _fallen("without statistics, merged by {method}: {few}"),
    "own_fallback": _fallen(
        "without statistics, merged by {method}'s own rule for such tensors: {few}"
    ),
    "statistics_needed": (
        "no expert has statistics, and {method} needs them: collect them (eutectic collect) and "
        "name them with --statistics, or in the recipe"
    ),
    "uncollected": _uncollected,
    # What a merge shows of its experts and of itself.
    "exploded": _exploded,
    "vanished": (
        "the experts change {count:n matrix/matrices} of which the merge leaves no change at all: "
        "{all}. A larger density keeps more; changes of opposite sign cancel"
    ),
    "changes_nothing": ("expert '{0}' changes nothing that was looked at: is it the base itself?"),
    "unrelated": _unrelated,
    "no_kin": _no_kin,
    "changes_alike": (
        "experts {few} change the base in nearly the same direction (cosines of {cosine:.2f} and "
        "more): they are checkpoints of one run, or were all fine-tuned from another model than "
        "this base, which is then the one to name"
    ),
    "same_expert": "experts {all} are the same checkpoint, which therefore counts {count} times",
    "same_as_base": (
        "expert '{0}' is the base itself, wherever compared: it draws the merge towards that"
    ),
    "scale_far_out": (
        "scale {scale:g} is far from what is usual for {method} (by default {usual:g})"
    ),
    # How a scale was chosen.
    "closed_form_scale": (
        "scale {scale:g} in closed form from the Grams of {layers} of "
        "{matrices:n matrix/matrices}. There the squared distance of every layer's outputs from "
        "the experts' is {lost_percent:.0f} % of what it is without merging (100 %: the base). "
        "That compares values of α and says little of how well the model does: one that keeps "
        "most of the experts' accuracy may have 80 % and more. Where there are inputs, even "
        "unlabelled, a search by divergence is safer"
    ),
    "norm_scale": (
        "scale {scale:g}, at which the merged change is as large as the experts' own are on "
        "average (the default is {default:g})"
    ),
    "default_for_pictures": (
        "the default scale of {method}, {scale:g}, was chosen on classifiers of images and texts; "
        "here it makes the change {ratio:.2g} times as large as the experts' own, and language "
        "models seldom bear that. --scale norm takes {norm:.3g}; better, search with data "
        "(eutectic tune --search divergence)"
    ),
    "searched_scale": _searched,
    "searched_parameter": (
        "{0} = {value:.3g}, chosen by {search} on the split '{split}': {points} values from as "
        "many merges, each at scale {scale:g}"
    ),
    "parameter_at_edge": (
        "the best {0} = {value:.3g} is at the edge of what was tried: a wider range may hold a "
        "better one"
    ),
    "earlier_scale": "scale {scale:g}, chosen by the search of the run that was killed",
    "work_folder_left": (
        "the model is complete, but {0} could not be removed: {reason}. Remove it yourself"
    ),
    **OF_CHECKS,
    # What a reader of measurements should know.
    "no_gain": _no_gain,
    "tasks_without_expert": (
        "tasks of no expert of the recipe, so that rows are ranked by the mean of the metric: {few}"
    ),
    "chosen_on_shown_rows": (
        "α was chosen on the {split} rows that are shown, which favours: {few}. Show another split"
    ),
    "best_of_many": (
        "the best of {count} is best by luck in part: for a figure to report, measure it on rows "
        "that chose nothing"
    ),
    "inspected": "{matrices:n matrix/matrices}; left aside: {others:n other tensor}",
    "unchanged": "expert '{0}' leaves {unchanged} of {matrices:n matrix/matrices} unchanged",
    "no_activation_interference": "no activation interference on the data of {all}",
    "nai_split": "NAI on the split '{0}'",
}
