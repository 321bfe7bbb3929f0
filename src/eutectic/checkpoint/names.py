"""Names: of files inside a checkpoint folder, and of tensors in two checkpoints of one model."""

from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from eutectic.errors import CheckpointError

_MAX_EXTRA_COMPONENTS = 3


def check_plain_name(name: str, where: str) -> None:
    """Raise CheckpointError unless `name` is a plain file name: no folder, no '..', no drive."""
    if not name or name in {".", ".."} or any(c in name for c in "/\\:\0"):
        raise CheckpointError(
            f"{where} names the file {name!r}, which is not a plain name in its own folder.\n"
            "Refused: a checkpoint may not read files elsewhere."
        )


def check_inside(folder: Path, name: str) -> Path:
    """Return the path of file `name` in `folder` after following links.

    The file must lie inside the folder. One exception: the cache of the Hugging Face hub, where
    `…/snapshots/<revision>/x` links to `…/blobs/<hash>`.
    """
    path = folder / name
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is missing, or a link that leads nowhere.") from error
    home = folder.resolve()
    if not real.is_relative_to(home) and not _is_hub_blob(home, real):
        raise CheckpointError(
            f"{path} is a link that leads out of its folder, to {real}.\n"
            "Refused: a checkpoint may not read files elsewhere (links of the hub's cache are "
            "understood).\nPut the file itself there, or name the other folder."
        )
    if not real.is_file():
        raise CheckpointError(f"{path} is not a regular file.")
    return real


def _is_hub_blob(home: Path, real: Path) -> bool:
    # <cache>/models--org--name/snapshots/<revision>/x -> <cache>/models--org--name/blobs/<hash>,
    # which newer versions make a link to <cache>/blobs/<two digits>/<hash>.
    for folder in (home, *home.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and "--" in repository.name:
            shared = repository.parent / "blobs"
            return real.parent == repository / "blobs" or real.parent.parent == shared
    return False


@dataclass(frozen=True)
class Alignment:
    """Leading components that the expert's keys have in excess of the base's ("bert."), or lack."""

    strip: str = ""
    add: str = ""

    def __str__(self) -> str:
        if self.strip:
            return f"its keys without the prefix '{self.strip}'"
        return f"its keys with the prefix '{self.add}'" if self.add else "its keys as they are"

    def to_base(self, key: str, base_names: Container[str]) -> str:
        """Return the base's name for one key of the expert, whether the base has it or not."""
        if self.strip and key.startswith(self.strip):
            return key[len(self.strip) :]
        if self.add and (self.add + key in base_names or key not in base_names):
            return self.add + key
        return key


def align(
    base_names: Iterable[str], expert_names: Iterable[str], *, expert: str = "the expert"
) -> tuple[dict[str, str], Alignment]:
    """Return which key of the base each key of the expert means, and by what alignment.

    Either the keys agree as they are, or one side carries extra leading components ("bert.",
    "model.", "base_model.model."): the choice that lets most keys meet wins, and CheckpointError
    is raised where there are two. Keys without a partner are left out of the mapping. Linear.
    """
    base = frozenset(base_names)
    keys = list(expert_names)
    chosen = _choose(base, keys, expert)
    mapping: dict[str, str] = {}
    taken: dict[str, str] = {}
    for key in keys:
        name = chosen.to_base(key, base)
        if name in taken:
            raise CheckpointError(
                f"{expert}: the keys '{taken[name]}' and '{key}' both mean '{name}' of the base "
                f"({chosen}).\nRename the keys of the expert as the base's."
            )
        taken[name] = key
        if name in base:
            mapping[key] = name
    return mapping, chosen


def _choose(base: frozenset[str], keys: list[str], expert: str) -> Alignment:
    present = frozenset(keys)
    met = Counter(("strip", p) for key in keys for p in _prefixes(key) if key[len(p) :] in base)
    met.update(("add", p) for key in base for p in _prefixes(key) if key[len(p) :] in present)
    best = max(met.values(), default=0)
    if sum(key in base for key in keys) >= best:
        return Alignment()
    winners = sorted(choice for choice, count in met.items() if count == best)
    if len(winners) > 1:
        listed = ", ".join(f"'{p}'" for _, p in winners[:5])
        raise CheckpointError(
            f"{expert}: its keys fit the base's in more than one way ({best} of {len(keys)} keys "
            f"each with the prefixes {listed}).\n"
            "Is it a fine-tune of this base? If so, rename its keys as the base's."
        )
    side, prefix = winners[0]
    return Alignment(**{side: prefix})


def _prefixes(key: str) -> list[str]:
    components = key.split(".")[:-1][:_MAX_EXTRA_COMPONENTS]
    return list(accumulate(f"{component}." for component in components))
