"""Statistics that a method needs and experts lack: refused as a whole, counted where single.

A method that no expert has statistics for, or not every expert that takes part, would be another
method in all but name. Single tensors without (tied, stacked, not seen by any token) are usual.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from eutectic.errors import Fault
from eutectic.methods.matrices import needed, takes_part
from eutectic.methods.registry import all_methods
from eutectic.planning.inputs import MergeRequest
from eutectic.planning.tensor_plan import TensorPlan
from eutectic.planning.tensors import experts_without
from eutectic.types import Treatment
from eutectic.words import few

FALLEN = frozenset({"no_statistics", "no_statistics_of_stacks"})
_OF_ENTRIES = {"fisher_diagonal", "block_fisher"}  # statistics that tensors of any shape may have
_OPTIONS = {
    "output_gradient_gram": "--output-gradients",
    "fisher_diagonal": "--fisher",
    "block_fisher": "--block-fisher",
}


def option_for(need: str) -> str | None:
    """Return the option of `eutectic collect` without which statistics hold no such sums."""
    return _OPTIONS.get(need)


def has_fallen(planned: TensorPlan) -> bool:
    """Tell whether a tensor takes the fall-back of its method, for lack of statistics."""
    return any(reason.kind in FALLEN for reason in planned.reason)


def fallback_faults(tensors: Sequence[TensorPlan], request: MergeRequest) -> list[Fault]:
    """Return a fault where no expert, or not every one, has what the method needs of any tensor."""
    found = _faults_of_method(tensors, request)
    return found or _faults_of_post(tensors, request)


def _faults_of_post(tensors: Sequence[TensorPlan], request: MergeRequest) -> list[Fault]:
    """Return a fault where an expert has nothing that a post-processor needs, of any matrix."""
    post = request.post
    asked = [t for t in tensors if t.post is not None and not t.layout.stacked]
    if post is None or not post.needs or not asked:
        return []
    having: set[str] = set()
    for planned in asked:
        lacking = experts_without(planned, set(post.needs), request)
        having.update(s.owner for s in planned.experts if s.owner not in lacking)
    without = [n for n in dict.fromkeys(s.owner for t in asked for s in t.experts if s.weight)]
    without = [name for name in without if name not in having]
    if not without:
        return []
    listed = " and ".join(sorted(need.replace("_", " ") for need in post.needs))
    what = f"post-processor '{post.name}' needs statistics of every expert ({listed}), and "
    what += f"{few(without)} {'has' if len(without) == 1 else 'have'} none."
    return [
        Fault(
            "statistics_needed",
            what,
            line=request.document.line("post"),
            next="Collect them (eutectic collect EXPERT --data FILE -o FILE) and name them with "
            "--statistics NAME=FILE or in the recipe; or choose fallback: allow, which does "
            "without them.",
        )
    ]


def _faults_of_method(tensors: Sequence[TensorPlan], request: MergeRequest) -> list[Fault]:
    method, parameters = request.method, request.parameters
    needs = set(needed(method, parameters))
    asked = [
        t
        for t in _asked(tensors, request)
        if t.treatment is Treatment.MATRIX or needs <= _OF_ENTRIES
    ]
    if not needs or not asked:
        return []
    having: set[str] = set()
    taking: list[str] = []
    complete = False
    for planned in asked:
        own = [s.owner for s in planned.experts if takes_part(method, s.weight)]
        taking += own
        if planned.layout.stacked:
            continue
        lacking = experts_without(planned, needs, request)
        having.update(name for name in own if name not in lacking)
        complete = complete or not set(own) & set(lacking)
    without = [name for name in dict.fromkeys(taking) if name not in having]
    if complete and not without:
        return []
    listed = " and ".join(sorted(need.replace("_", " ") for need in needs))
    what = f"method '{method.name}' needs statistics of every expert ({listed}), and "
    if having and without:
        verb = "has" if len(without) == 1 else "have"
        what += f"{few(without)} {verb} none."
    elif having:
        what += "no tensor has them of all experts."
    else:
        what += "no expert has any."
        if all(t.layout.stacked for t in asked):
            what += " All of its matrices lie in stacks, of which there are none."
    for name in without:
        if name in request.inputs.statistics:
            what += _what_is_there(name, needs, request)
    rest = _rest(request)
    return [
        Fault(
            "statistics_needed",
            what,
            line=request.document.line("method"),
            next=(
                "Collect them (eutectic collect EXPERT --data FILE -o FILE) and name them with "
                "--statistics NAME=FILE or in the recipe; or choose fallback: allow, which merges "
                f"by {rest} instead."
            ),
        )
    ]


def _what_is_there(name: str, needs: set[str], request: MergeRequest) -> str:
    """Return what is wrong with statistics that are given and hold nothing that is needed."""
    held = request.inputs.statistics[name]
    for need in sorted(needs):
        if not any(held.has(own, need) for own in held):
            option = option_for(need)
            how = f": collect them with {option}" if option else ""
            return f" The statistics of '{name}' hold no {need}{how}."
    return f" The statistics of '{name}' are of none of these tensors."


def fallen_share(tensors: Sequence[TensorPlan], request: MergeRequest) -> dict[str, Any]:
    """Return how many tensors fell back, on what, and their share of what the method is for."""
    asked = _asked(tensors, request)
    fallen = [t for t in asked if has_fallen(t)]
    if not fallen:
        return {}
    numbers = sum(t.elements for t in asked)
    return {
        "asked": request.method.name,
        "method": _rest(request),
        "tensors": len(fallen),
        "of": len(asked),
        "share": sum(t.elements for t in fallen) / max(numbers, 1),
    }


def merged_mostly_by(tensors: Sequence[TensorPlan], request: MergeRequest) -> str:
    """Return the method that merges most numbers, of the tensors that the recipe's is for.

    Of all tensors where it is for none of them.
    """
    asked = _asked(tensors, request)
    numbers: Counter[str] = Counter()
    for planned in asked or [t for t in tensors if t.merged]:
        numbers[_rest(request) if has_fallen(planned) else planned.method] += planned.elements
    return numbers.most_common(1)[0][0]


def _asked(tensors: Sequence[TensorPlan], request: MergeRequest) -> list[TensorPlan]:
    """Return the tensors that the recipe's method merges, or would if it had statistics."""
    return [t for t in tensors if t.method == request.method.name or has_fallen(t)]


def _rest(request: MergeRequest) -> str:
    """Return the method that merges tensors without statistics.

    A method with a rule of its own averages them, unless it says that it takes its initial guess:
    "init" where that is a checkpoint.
    """
    chosen = request.method.fallback(request.parameters)
    if chosen != request.method.name:
        return chosen
    own = getattr(request.parameters, "rest", "average")
    init = getattr(request.parameters, "init", "")
    return init if own == "init" and init in all_methods() else own
