"""Guards which files accompany the weights into the output."""

from __future__ import annotations

from pathlib import Path

import pytest

from eutectic.checkpoint.folder import copy_side_files, side_files
from eutectic.errors import CheckpointError, OutputError

TAKEN = [
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "LICENSE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "added_tokens.json",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "config_sentence_transformers.json",
    "generation_config.json",
    "merges.txt",
    "modeling_custom.py",
    "modules.json",
    "preprocessor_config.json",
    "processor_config.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
]
LEFT = [
    ".gitattributes",
    ".hidden.py",
    ".git/config.json",
    "2_Dense/model.safetensors",
    "2_Dense/pytorch_model.bin",
    "README.md",
    "adapter_config.json",
    "checkpoint-500/config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "optimizer.pt",
    "pytorch_model.bin",
    "rng_state.pth",
    "tokenizer.pkl",
    "trainer_state.json",
    "training_args.bin",
    "vocab.bin",
]


def content(name: str) -> str:
    return "[]" if name == "modules.json" else name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    for name in (*TAKEN, *LEFT):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content(name))
    return root


def test_what_is_taken_and_what_is_left(folder: Path) -> None:
    assert side_files(folder) == tuple(TAKEN)


def test_copies_have_the_content(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert copy_side_files(folder, out) == tuple(TAKEN)
    copied = {p.relative_to(out).as_posix(): p.read_text() for p in out.rglob("*") if p.is_file()}
    assert copied == {name: content(name) for name in TAKEN}


def test_chosen_names_only(folder: Path, tmp_path: Path) -> None:
    assert copy_side_files(folder, tmp_path / "out", ["config.json"]) == ("config.json",)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["config.json"]


def test_links_inside_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("vocab.json")
    copy_side_files(folder, tmp_path / "out")
    copy = tmp_path / "out" / "tokenizer.json"
    assert not copy.is_symlink()
    assert copy.read_text() == "vocab.json"


@pytest.mark.parametrize("name", ["tokenizer.json", "1_Pooling/config.json"])
def test_links_that_lead_out_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        copy_side_files(folder, tmp_path / "out")
    with pytest.raises(CheckpointError):
        copy_side_files(folder, tmp_path / "out", ["../secret"])


def test_linked_subfolder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    (folder / "3_Normalize").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        side_files(folder)


def test_unwritable_destination(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        copy_side_files(folder, tmp_path / "file")
