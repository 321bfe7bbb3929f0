"""Nobody is asked whether a checkpoint's code may run, and none runs: every call says so."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import eutectic
from eutectic.vocabulary.tokens import read_tokens
from helpers.cli import invoke
from helpers.folders import make_base, make_expert, save

SOURCES = Path(eutectic.__file__).parent
LOADERS = {"from_pretrained", "from_config"}
# Settings without code: (file, what it is called on).
HARMLESS = {("models/task_models.py", "settings")}


def calls() -> Iterator[tuple[str, ast.Call]]:
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr in LOADERS:
                    yield path.relative_to(SOURCES).as_posix(), node


def says_no(call: ast.Call) -> bool:
    """Tell whether a call refuses code, or passes on options, which `loading` makes of LOCAL."""
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    stated = named.get("trust_remote_code")
    return None in named or (isinstance(stated, ast.Constant) and stated.value is False)


def test_every_call_of_a_loader_refuses_code() -> None:
    found = [*calls()]
    assert len(found) >= 7
    for file, call in found:
        assert isinstance(call.func, ast.Attribute)
        if (file, ast.unparse(call.func.value)) not in HARMLESS:
            assert says_no(call), f"{file}:{call.lineno}: {ast.unparse(call)}"


def test_the_options_that_are_passed_on_refuse_code() -> None:
    from eutectic.models.loading import LOCAL

    assert LOCAL == {"local_files_only": True, "trust_remote_code": False}


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose tokenizer only transformers would read, by code in the folder."""

    def asked(*_: object) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", asked)
    base = make_base()
    own = {"AutoTokenizer": ["own.T", None], "AutoConfig": "own.C"}
    for seed, name in enumerate(("base", "a", "b")):
        config = {"model_type": "own", "vocab_size": 32, "auto_map": own}
        folder = save(tmp_path / name, make_expert(base, seed), config)
        written = {"tokenizer_class": "T", "auto_map": own}
        (folder / "tokenizer_config.json").write_text(json.dumps(written))
        (folder / "bpe.codes").write_text("a b\n")
        (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    return tmp_path


def test_no_tokenizer_runs_the_code_beside_it(hostile: Path) -> None:
    with pytest.raises(eutectic.EutecticError, match="cannot be read here"):
        read_tokens(hostile / "a")
    grown = make_expert(make_base(), 1)
    grown["embed_tokens.weight"] = torch.cat([grown["embed_tokens.weight"], torch.ones(2, 16)])
    stated = json.loads((hostile / "a/config.json").read_text())
    save(hostile / "a", grown, {**stated, "vocab_size": 34})
    start = [
        "--base",
        hostile / "base",
        "-m",
        "average",
        f"a={hostile / 'a'}",
        f"b={hostile / 'b'}",
    ]
    for words in (["plan"], ["merge", "-o", hostile / "out"], ["check", hostile / "a"]):
        for more in ([], ["--set", "vocabulary=union"]):
            if words[0] == "check" and more:
                continue
            invoke(*words, *(start if words[0] != "check" else ()), *more)
    assert not (hostile / "ran").exists()
