"""Opening experts: full checkpoints and adapters, under the base's names."""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from eutectic.checkpoint.adapters import open_lora
from eutectic.checkpoint.expert_tensors import ADAPTER_CONFIG, Expert, full_expert
from eutectic.checkpoint.ia3 import ia3_vectors, identity_adapter, is_ia3, open_ia3
from eutectic.checkpoint.index import CheckpointIndex, open_index
from eutectic.checkpoint.reader import CheckpointReader, StateDictReader

BaseReader = CheckpointReader | StateDictReader


def common_base(
    base: CheckpointReader, experts: Mapping[str, Path]
) -> tuple[BaseReader, CheckpointIndex]:
    """Return what the experts' tensors are compared with, and its layout.

    The base itself; where every expert is an (IA)³ adapter, the adapter of it that changes nothing.

    Raises:
        CheckpointError: (IA)³ adapters that do not fit together, or do not fit the base.
    """
    if not experts or not all(is_ia3(path) for path in experts.values()):
        return base, base.index
    return identity_adapter({name: open_ia3(path) for name, path in experts.items()}, base)


def open_expert(path: Path, base: CheckpointIndex) -> Expert:
    """Return the expert at `path`: a checkpoint (folder or file) or a PEFT adapter folder.

    A folder with an adapter_config.json is an adapter, whatever else it holds. `base` is the
    layout that `common_base` returned.

    Raises:
        CheckpointError: it cannot be read, is of a kind that is not supported, or belongs to
            another base.
    """
    path = Path(path)
    vectors = is_ia3(path) and bool(ia3_vectors(base))
    if is_adapter(path) and not vectors:
        return open_lora(path, base.entries)
    index = open_ia3(path) if vectors else open_index(path)
    folder = path if vectors else index.folder
    return full_expert(CheckpointReader(index), base.entries, str(path), index.config, folder)


def is_adapter(path: Path) -> bool:
    """Return whether `path` is a PEFT adapter folder."""
    return (path / ADAPTER_CONFIG).is_file()


def fingerprint_of(path: Path, base: Path | None = None) -> str:
    """Return the identity of the content of a checkpoint, or of an adapter alone.

    Raises:
        CheckpointError: it cannot be read, or is an adapter of a kind that no reader understands.
    """
    if is_adapter(path) and not is_ia3(path) and base is not None:
        with closing(open_expert(path, open_index(base))) as expert:
            return expert.fingerprint()
    with CheckpointReader(open_ia3(path) if is_ia3(path) else open_index(path)) as reader:
        return reader.fingerprint()
