"""Guards the public names: none is lost, none is added by accident, and importing stays cheap."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import eutectic

NAMES = [
    "CalibrationReport",
    "CheckReport",
    "Comparison",
    "EutecticError",
    "LayerStatistics",
    "MergeReport",
    "Merged",
    "PlanReport",
    "Treatment",
    "build_routed",
    "calibrate",
    "check",
    "collect",
    "compare",
    "evaluate",
    "extract",
    "inspect",
    "load_routed",
    "load_statistics",
    "merge",
    "merge_matrices",
    "merge_state_dicts",
    "methods",
    "plan",
    "report",
    "routing",
    "tune",
]


def test_all_is_locked():
    assert eutectic.__all__ == NAMES
    assert set(dir(eutectic)) == {*NAMES, "__version__"}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_can_be_imported(name):
    assert getattr(eutectic, name).__doc__


def test_every_name_is_in_the_reference():
    text = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
    shown = {line.rpartition(".")[2] for line in text.splitlines() if line.startswith("::: ")}
    assert set(NAMES) - {"EutecticError"} <= shown
    assert "::: eutectic.errors" in text


def test_all_that_the_reference_lists_is_importable_where_it_says():
    from importlib import import_module

    text = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
    paths = [line[4:].strip() for line in text.splitlines() if line.startswith("::: ")]
    for path in paths:
        room, _, name = path.rpartition(".")
        found = (
            import_module(path) if path == "eutectic.errors" else getattr(import_module(room), name)
        )
        assert found.__doc__, path


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="module 'eutectic' has no attribute 'merg'"):
        _ = eutectic.merg


def test_the_version_is_the_packages():
    from importlib.metadata import version

    assert eutectic.__version__ == version("eutectic")


@pytest.mark.slow
def test_what_an_import_leaves_alone():
    stages = {
        "import eutectic": ["torch", "transformers", "numpy", "pydantic"],
        "eutectic.merge_matrices": ["transformers", "peft"],
        "eutectic.merge": ["transformers", "peft", "datasets"],
        # Rooms that run models, and the command line: nothing that takes seconds by itself.
        "import eutectic.routed, eutectic.statistics, eutectic.cli.main": [
            *("torch._dynamo", "transformers", "ray", "matplotlib", "plotly", "peft", "datasets")
        ],
    }
    check = "\n".join(
        f"{code}\nimport sys\nprint([name for name in {absent!r} if name in sys.modules])"
        for code, absent in stages.items()
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert result.stdout == "[]\n" * len(stages), result.stderr


def test_a_room_does_not_take_the_name_of_a_function():
    """Also where the room is imported first, by whatever needs it."""
    code = (
        "import eutectic, eutectic.methods.registry\n"
        "from eutectic.methods import get_method\n"
        "print(type(eutectic.methods).__name__, 'iso_c' in eutectic.methods())\n"
        "import sys; print(sys.modules['eutectic.methods'].get_method is get_method)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "function True\nTrue\n", result.stderr


def test_imports_leave_the_collector_as_it_was():
    import gc

    from eutectic.on_first_use import quick_imports

    for on in (True, False):
        (gc.enable if on else gc.disable)()
        try:
            with quick_imports():
                assert not gc.isenabled()
            assert gc.isenabled() == on
        finally:
            gc.enable()


@pytest.mark.slow
def test_a_merge_imports_what_it_needs_and_works_with_the_collector(tmp_path: Path):
    from helpers.folders import make_base, make_expert, save

    base = make_base(layers=1, width=8)
    save(tmp_path / "base", base)
    for i, name in enumerate("ab"):
        save(tmp_path / name, make_expert(base, i))
    words = ["merge", "--base", f"{tmp_path / 'base'}", "-m", "iso_c", "-o", f"{tmp_path / 'out'}"]
    words += [f"{name}={tmp_path / name}" for name in "ab"]
    absent = ["evaluation", "reporting", "data", "calibration", "statistics.collect", "routed"]
    names = [*(f"eutectic.{room}" for room in absent), "transformers", "scipy", "pandas", "ray"]
    code = (
        f"import gc, sys\nfrom eutectic.cli import main\nsys.argv = ['eutectic', *{words!r}]\n"
        "try:\n    main.main()\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {names!r} if name in sys.modules], gc.isenabled())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[] True", result.stderr + result.stdout
