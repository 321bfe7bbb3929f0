"""What tests of faults start from."""

from pathlib import Path

import pytest

from helpers.folders import make_base, make_expert, save


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder with a sound base and two sound experts."""
    base = make_base()
    save(tmp_path / "base", base)
    for i, name in enumerate("ab"):
        save(tmp_path / name, make_expert(base, i))
    return tmp_path
