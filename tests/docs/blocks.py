"""Blocks of code in Markdown, and what running each of them means.

A block without a language shows output. Others are carried out, in the order of the page, in one
folder: `bash` line by line, `python` in one namespace, `yaml` as a file of the name in its first
line, or else read as what it is. A comment `<!-- not run: WHY -->` in front of a block excepts it.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eutectic.evaluation import load_tasks
from eutectic.recipes.load import check_recipe, load_recipe
from eutectic.recipes.mergekit_stages import check_stages, read_stages
from helpers.cli import invoke

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(
    r"(?:^ *<!-- not run: (?P<why>[^\n]+?) -->\n+)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n"
    r"(?P<text>.*?)^ *```$",
    re.M | re.S,
)
_NAMED = re.compile(r"#+ *([\w./-]+\.(?:yaml|yml|jsonl|py))\b")
_OUTPUTS = ("-o", "--output", "--plot", "--export", "--best", "--work")


@dataclass(frozen=True)
class Block:
    """One block of a page."""

    page: str
    line: int
    language: str
    text: str
    why_not: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of code of a page, without those that show output."""
    text = page.read_text("utf-8")
    name = page.relative_to(ROOT).as_posix()
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        indent = match["indent"]
        code = "".join(
            part.removeprefix(indent) for part in match["text"].splitlines(keepends=True)
        )
        if match["language"] not in ("", "text"):
            found.append(Block(name, line, match["language"], code, match["why"]))
    return found


def run_block(block: Block, folder: Path, names: dict[str, Any]) -> None:
    """Carry a block out in a folder, which is the working folder."""
    if block.language == "bash":
        for words in commands(block.text):
            _run(words, folder, str(block))
    elif block.language == "python":
        for target in re.findall(r"\boutput=\"([\w-]+)\"", block.text):
            _forget(folder / target)
        exec(compile(block.text, str(block), "exec"), names)
    elif block.language == "yaml":
        _read_yaml(block.text, folder)
    elif block.language == "json":
        yaml.safe_load(block.text)
    else:
        raise AssertionError(f"{block}: nothing is known of the language {block.language}")


def commands(text: str) -> list[list[str]]:
    """Return the words of every command: comments are left out, continued lines are joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [part for words in found for part in _chained(words) if part]


def _chained(words: list[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "|":  # what comes behind it is not ours
            break
        if word == "&&":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def _run(words: list[str], folder: Path, where: str) -> None:
    program, *rest = words
    if program == "eutectic":
        for option, value in zip(rest, rest[1:], strict=False):
            if option in _OUTPUTS:
                _forget(folder / value)
        answer = invoke(*rest)
        assert answer.code == 0, f"{where}: {shlex.join(words)}\n{answer.err}\n{answer.out}"
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
        assert set(rest) <= {*targets}, f"{where}: {rest} in the Makefile"
    elif program in ("python", "pytest"):
        _check_script(rest, where)
    elif program == "pip":
        _check_extras(rest, where)
    else:
        assert program in ("git", "cd", "source", "python3"), f"{where}: {words}"


def _forget(output: Path) -> None:
    """Remove what an earlier block wrote there: a page shows several ways to the same output."""
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)


def _check_script(words: list[str], where: str) -> None:
    """Scripts that take long are there, parse, and know the options that are named."""
    script = next((word for word in words if word.endswith(".py")), None)
    if script is None:
        return
    path = ROOT / script
    source = path.read_text("utf-8")
    ast.parse(source)
    beside = "".join(p.read_text("utf-8") for p in path.parent.rglob("*.py"))
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in beside, f"{where}: {script} has no {word}"


def _check_extras(words: list[str], where: str) -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    known = set(re.findall(r"^([\w-]+) = \[", extras, re.M))
    for word in words:
        for named in re.findall(r"\[([\w,-]+)\]", word):
            assert set(named.split(",")) <= known, f"{where}: extras {named}"


def _read_yaml(text: str, folder: Path) -> None:
    named = _NAMED.match(text)
    if named is not None:
        target = folder / named[1]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, "utf-8")
        content = yaml.safe_load(text)
        if "tasks" in content:
            load_tasks(target)
        else:
            load_recipe(target)
        return
    twice = re.search(r"^(\w+):[^\n]*(\n(?!\1:).*)*\n\1:", text, re.M)
    if twice and "\n---\n" not in text:  # ways to say the same key
        for line in filter(None, text.splitlines()):
            _check_part(yaml.safe_load(line) or {}, folder)
        return
    path = folder / "block.yaml"
    path.write_text(text, "utf-8")
    content, *later = yaml.safe_load_all(text)
    if later:  # stages of mergekit's
        check_stages(read_stages(path), folder / "stages", {})
    elif "tasks" in content:
        load_tasks(path)
    elif {"base", "merge_method", "slices", "models"} & set(content):
        load_recipe(path)
    else:
        _check_part(content, folder)


def _check_part(content: dict[str, Any], folder: Path) -> None:
    """Check keys of a recipe on top of the world's own."""
    whole = yaml.safe_load((folder / "recipe.yaml").read_text("utf-8"))
    check_recipe({**whole, **content})
