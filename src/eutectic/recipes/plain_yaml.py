"""YAML from elsewhere: plain values only, with bounds on its size, depth and aliases.

A document is composed once, looked at, and only then made into values, so that nothing grows
before its bounds are known. Dates stay the texts that they are written as.
"""

from typing import Any, cast

import yaml

from eutectic.storage.small_files import MOST_DIGITS

YAML_BYTES = 1 << 20  # of a recipe or of a file of tasks
MOST_VALUES = 200_000  # in a document, with every alias counted as what it stands for
MOST_LEVELS = 50

_TAG = "tag:yaml.org,2002:"
_KNOWN = frozenset(_TAG + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map"))
_TIMESTAMP = _TAG + "timestamp"
# The loader written in C is ten times as fast, and is not there in every installation.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# What PyYAML raises on a text that it cannot read: its own errors on syntax, and whatever Python
# raises while a value is built (`!!int x`, an integer of 5,000 digits).
UNREADABLE = (
    yaml.YAMLError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    OverflowError,
    RecursionError,
)


def compose(text: str) -> yaml.Node | None:
    """Return the nodes of a document, within its bounds; None where it is empty.

    One of `UNREADABLE` is raised for a text that is no YAML or is beyond them.
    """
    _check_events(text)
    root: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    if root is not None:
        _check_nodes(root)
    return root


def compose_all(text: str) -> list[yaml.Node]:
    """Return the nodes of each document of a text, as `compose` does of one."""
    _check_events(text)
    roots = list(yaml.compose_all(text, Loader=_Loader))
    for root in roots:
        _check_nodes(root)
    return roots


def values_of(root: yaml.Node) -> Any:
    """Return the values of a composed document."""
    constructor = yaml.constructor.SafeConstructor()
    return constructor.construct_document(root)


def load_plain(text: str) -> Any:
    """Return the values of a YAML text."""
    root = compose(text)
    return None if root is None else values_of(root)


def _refused(what: str, node: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark)


def _check_events(text: str) -> None:
    """Refuse a text before nodes are made of it: that calls itself for every level."""
    level = count = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            level += 1
            if level > MOST_LEVELS:
                raise _refused(f"nested more than {MOST_LEVELS} levels deep", event)
        elif isinstance(event, yaml.CollectionEndEvent):
            level -= 1
        count += 1
        if count > 2 * MOST_VALUES:
            raise _refused(f"more than {MOST_VALUES:,} values, the limit", event)


def _check_nodes(root: yaml.Node) -> None:
    """Refuse aliases that multiply and values of other kinds; dates become texts."""
    weights: dict[int, tuple[int, int]] = {}  # node -> values and levels with aliases written out
    open_nodes: set[int] = set()
    waiting: list[tuple[yaml.Node, bool]] = [(root, False)]
    while waiting:
        node, done = waiting.pop()
        key = id(node)
        parts = _parts(node)
        if done:
            open_nodes.discard(key)
            inner = [weights[id(part)] for part in parts]
            values = 1 + sum(count for count, _ in inner)
            levels = 1 + max((depth for _, depth in inner), default=0)
            if values > MOST_VALUES or levels > MOST_LEVELS:
                what = (
                    f"{MOST_VALUES:,} values" if values > MOST_VALUES else f"{MOST_LEVELS} levels"
                )
                raise _refused(f"aliases expand beyond the limit of {what}", node)
            weights[key] = (values, levels)
        elif key in open_nodes:
            raise _refused("an alias is part of itself", node)
        elif key not in weights:
            _check_tag(node)
            open_nodes.add(key)
            waiting.append((node, True))
            waiting += [(part, False) for part in parts]


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        pairs = cast("list[tuple[yaml.Node, yaml.Node]]", node.value)
        return [part for pair in pairs for part in pair]
    return cast("list[yaml.Node]", node.value) if isinstance(node, yaml.SequenceNode) else []


def _check_tag(node: yaml.Node) -> None:
    tag: str = node.tag
    if tag == _TIMESTAMP:
        node.tag = _TAG + "str"
    elif tag == _TAG + "value":  # a bare `=`
        node.tag = _TAG + "str"
    elif tag not in _KNOWN and tag != _TAG + "merge":
        raise _refused(f"the tag {tag.removeprefix(_TAG)!r} is not understood", node)
    if isinstance(node, yaml.ScalarNode):
        text: str = node.value
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise _refused(f"{text[:60]!r} is not valid Unicode (half of a pair)", node) from None
        if node.tag == _TAG + "int" and len(text) > MOST_DIGITS:
            what = f"an integer of {len(text):,} digits, the limit is {MOST_DIGITS}"
            raise _refused(what, node)


def described(fault: Exception) -> tuple[str, int]:
    """Return what is wrong with a YAML text, and in which line (0: not known)."""
    if isinstance(fault, yaml.MarkedYAMLError):
        mark = fault.problem_mark or fault.context_mark
        why = ", ".join(part for part in (fault.context, fault.problem) if part)
        return why, 0 if mark is None else mark.line + 1
    return " ".join(str(fault).split()) or type(fault).__name__, 0
