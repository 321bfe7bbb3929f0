"""`eutectic route`: costs, building from files, inspecting, exporting, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

import eutectic
from eutectic.checkpoint import folder as side_files
from eutectic.cli.route import route
from eutectic.errors import RequestError
from eutectic.routed import export_lora, load_routed, routed_folder
from eutectic.routed.expert_weights import open_experts
from eutectic.statistics import collect
from eutectic.storage import FolderAside
from eutectic.storage.local_disk import LocalDisk
from routed.world import EXPERTS, bert, counted

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
app = typer.Typer()
app.command()(route)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world, path = bert(), tmp_path_factory.mktemp("route")
    world.merged.save_pretrained(path / "merged")  # type: ignore[operator]
    (path / "merged" / "vocab.txt").write_text("a\n")
    for t, (name, model) in enumerate(world.experts.items()):
        model.save_pretrained(path / name)  # type: ignore[operator]
        collect(model, [world.batch(t, 40, 1)], path / f"{name}.stats.safetensors")
        collect(world.merged, [world.batch(t, 40, 1)], path / f"{name}.merged.safetensors")
    return path


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def request(folder: Path) -> list[Any]:
    words: list[Any] = [folder / "merged", *(f"{n}={folder / n}" for n in EXPERTS)]
    for name in EXPERTS:
        words += ["-s", f"{name}={folder / name}.stats.safetensors"]
        words += ["--router-statistics", f"{name}={folder / name}.merged.safetensors"]
    return words


def test_costs_are_shown_before_building(folder: Path):
    words = [folder / "merged", *(f"{n}={folder / n}" for n in EXPERTS), "--dry-run"]
    result = run(*words, "--rank", 4)
    assert result.exit_code == 0, result.output
    assert "10" in result.output and "multiply-adds" in result.output
    costs = json.loads(run(*words, "--rank", 4, "--json").stdout)["costs"]
    assert costs["layers"] == 10


def test_costs_before_building_are_those_of_what_is_built(tmp_path: Path):
    """Of a tower whose last attention has a query of its own, which cannot be routed."""
    from helpers.configs import hf

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "image_size": 8, "patch_size": 4}
    config = hf.SiglipVisionConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    model = hf.SiglipVisionModel(config).eval()
    model.save_pretrained(tmp_path / "merged")
    for p in model.parameters():
        p.data.add_(0.02 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "a")
    file = tmp_path / "a.stats.safetensors"
    collect(model, [{"pixel_values": torch.randn(6, 3, 8, 8)}], file)
    words = [tmp_path / "merged", f"a={tmp_path / 'a'}", "-s", f"a={file}", "--rank", 4]
    dry = json.loads(run(*words, "--dry-run", "--json").stdout)
    built = json.loads(run(*words, "-o", tmp_path / "routed", "--json").stdout)
    assert dry["costs"] == built["costs"] and dry["left_out"] == built["left_out"]
    assert len(dry["left_out"]) == 2
    held = load_routed(tmp_path / "routed").state_dict()
    assert dry["costs"]["parameters"] == sum(t.numel() for n, t in held.items() if "experts." in n)
    shown = run(*words, "--dry-run").stdout
    assert "left out" in shown and not (tmp_path / "new").exists()


def test_a_routed_model_is_built_shown_and_exported(folder: Path, tmp_path: Path):
    result = run(*request(folder), "--rank", 4, "-o", tmp_path / "routed")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "routed" / "vocab.txt").exists()
    routed = load_routed(tmp_path / "routed")
    assert routed.routing.router == "discriminant"
    assert bool(torch.isfinite(counted(routed, bert().mixed())).all())
    shown = run(tmp_path / "routed", "--json", "--export", tmp_path / "adapters")
    assert shown.exit_code == 0, shown.output
    report = json.loads(shown.stdout[shown.stdout.index("{") :])
    assert report["experts"] == list(EXPERTS) and len(report["layers"]) == 10
    assert (tmp_path / "adapters" / "experts" / "b" / "adapter_config.json").exists()


def test_requests_that_cannot_be_met_end_with_2(folder: Path, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for words in (
        request(folder),
        [*request(folder), "-o", tmp_path / "full"],
        [*request(folder), "-o", tmp_path / "new", "--router", "cosine"],
        [*request(folder), "-o", tmp_path / "new", "--router-data", "a=x.jsonl"],
        [*request(folder)[:-4], "-o", tmp_path / "new"],
        [folder / "merged", "oops", "-o", tmp_path / "new"],
        [folder / "merged", "-o", tmp_path / "new"],
        [folder / "merged", "--dry-run"],
        [folder / "merged", "--rank", 4],
        [*request(folder), "-o", tmp_path / "new", "--device", "cpu"],
        [*request(folder), "--dry-run", "--router", "mad", "--decider", "x"],
        [*request(folder), "--dry-run", "--decider", "x"],
        [*request(folder), "--dry-run", "--router", "sim", "--accumulate"],
    ):
        assert run(*words).exit_code == 2, words
    assert run(folder / "merged").exit_code == 1
    assert not (tmp_path / "new").exists()


def test_an_adapter_without_a_base_is_told_the_option(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
    save_file({"x.lora_A.weight": torch.ones(1, 2)}, tmp_path / "adapter_model.safetensors")
    refused = pytest.raises(RequestError, match="base= in Python, --base on a command line")
    with refused, open_experts(torch.nn.Linear(2, 2), {"a": tmp_path}, None):
        pass


def test_what_will_be_refused_is_before_data_are_run_through_the_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("collected")

    monkeypatch.setattr("eutectic.statistics.collect", never)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    data = [f"{name}={tmp_path / name}.jsonl" for name in EXPERTS]
    for name in EXPERTS:
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}')
    experts = [f"{n}={folder / n}" for n in EXPERTS]
    statistics = [f"{n}={folder / n}.stats.safetensors" for n in EXPERTS]

    def refused(experts: list[str], statistics: list[str], data: list[str], message: str) -> None:
        words: list[Any] = [folder / "merged", *experts, "-o", tmp_path / "new"]
        words += [w for item in statistics for w in ("-s", item)]
        words += [w for item in data for w in ("--router-data", item)]
        result = run(*words)
        assert result.exit_code in (1, 2), result.output
        assert message in result.stderr and "multiply-adds" in result.stdout
        assert not (tmp_path / "new").exists()

    refused(experts, statistics, data[:2], "the experts are a, b, c")
    refused(experts, statistics, [*data, "d=x.jsonl"], "names a, b, c, d")
    refused(experts, statistics[:2], data, "statistics are missing for ['c']")
    refused([*experts[:2], f"c={adapter}"], statistics, data, "'c' is an adapter")
    refused([*experts[:2], f"c={tmp_path / 'nothing'}"], statistics, data, "nothing")


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(20)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", unk_token="w0")


def test_the_routers_data_are_read_as_collect_reads_them(folder: Path, tmp_path: Path):
    """Columns, split, task and device are named as in `eutectic collect`."""
    datasets = pytest.importorskip("datasets")
    tokenizer().save_pretrained(folder / "merged")
    asked = [folder / "merged", *(f"{n}={folder / n}" for n in EXPERTS), "--rank", 2]
    for t, name in enumerate(EXPERTS):
        rows = [{"words": f"w{1 + 6 * t + i % 6} w{1 + 6 * t + i % 5}"} for i in range(12)]
        splits = {
            "proxy": datasets.Dataset.from_list(rows),
            "other": datasets.Dataset.from_list([{"words": "w0"}]),
        }
        datasets.DatasetDict(splits).save_to_disk(tmp_path / name)
        asked += ["-s", f"{name}={folder / name}.stats.safetensors"]
        asked += ["--router-data", f"{name}={tmp_path / name}"]

    def refused(words: list[Any], message: str) -> None:
        result = run(*words, "-o", tmp_path / "routed")
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.stderr.split())
        assert not (tmp_path / "routed").exists()

    named = ["--split", "proxy", "--text-column", "words", "--task", "feature-extraction"]
    refused([*asked, "--text-column", "words"], "name one of them with --split")
    refused([*asked, *named[:2]], "words")
    refused([*asked, *named[:4], "--task", "poetry"], "unknown task 'poetry'")
    refused([*asked, *named, "--device", "abacus"], "--device abacus")
    refused([*asked[:-1], "c=some.module:rows", *named], "--trust-code")
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"text": "w1"}')
    data = {f"{n}={tmp_path / n}": f"{n}={plain}" for n in EXPERTS}
    refused([data.get(str(word), word) for word in [*asked, *named]], "data without splits")
    # A split that is some task's is not ignored, and others' data are read whole.
    refused([*asked[:-1], f"c={plain}", *named], "no column 'words'")
    result = run(*asked, *named, "--device", "cpu", "-o", tmp_path / "routed", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["router"] == "discriminant"


def test_the_routers_statistics_are_collected_on_the_merged_model(folder: Path, tmp_path: Path):
    fast = tokenizer()
    fast.save_pretrained(folder / "merged")
    generator = torch.Generator().manual_seed(0)
    texts: dict[str, list[str]] = {}
    asked = [folder / "merged", *(f"{n}={folder / n}" for n in EXPERTS)]
    for t, name in enumerate(EXPERTS):
        ids = torch.randint(1 + 6 * t, 7 + 6 * t, (24, 5), generator=generator)
        texts[name] = [" ".join(f"w{i}" for i in row) for row in ids.tolist()]
        rows = [json.dumps({"text": text}) for text in texts[name]]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        asked += ["-s", f"{name}={folder / name}.stats.safetensors"]
        asked += ["--router-data", f"{name}={tmp_path / name}.jsonl"]
    result = run(
        *asked,
        "--rank",
        4,
        "--batch-size",
        5,
        "--max-length",
        8,
        "-o",
        tmp_path / "routed",
        "--json",
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["router"] == "discriminant"
    quality = json.loads(result.stdout)["router_quality"]
    assert quality["measured"] and quality["samples"] == dict.fromkeys(EXPERTS, 24)
    routed = load_routed(tmp_path / "routed")
    right = 0
    for t, name in enumerate(EXPERTS):
        batch = fast(texts[name], return_tensors="pt")
        batch.pop("token_type_ids", None)
        with eutectic.routing(routed, record=True) as decisions, torch.no_grad():
            routed(**batch)
        last = list(decisions)[-1]
        right += int((torch.as_tensor(decisions[last]) == t).sum())
    assert right >= 0.9 * 24 * len(EXPERTS)
    mean = sum(quality["decisions"].values()) / len(EXPERTS)
    assert right / 24 / len(EXPERTS) == pytest.approx(mean)

    swapped = list(asked)
    for i, word in enumerate(swapped):
        if isinstance(word, str) and word.startswith("a=") and "stats" in word:
            swapped[i] = word.replace("a.stats", "b.stats")
    refused = run(*swapped, "-o", tmp_path / "swapped")
    assert refused.exit_code == 1
    assert "collected on another checkpoint" in refused.stderr
    assert not (tmp_path / "swapped").exists()
    accepted = run(*swapped, "-o", tmp_path / "swapped", "--statistics-of", "any", "--rank", 2)
    assert accepted.exit_code == 0, accepted.output


def test_router_statistics_of_an_expert_are_refused(folder: Path, tmp_path: Path):
    words = [w.replace("b.merged", "b.stats") if isinstance(w, str) else w for w in request(folder)]
    refused = run(*words, "-o", tmp_path / "routed")
    assert refused.exit_code == 1
    assert "the router's data of 'b'" in refused.stderr


class Killed(BaseException):
    """The end of a process."""


@pytest.mark.parametrize(
    "place", ["safetensors", "side files", "name", "export's name", "end", "very end"]
)
def test_a_killed_run_looks_unfinished_and_the_same_command_finishes_it(
    place: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    places: dict[str, tuple[Any, str, int]] = {
        "safetensors": (routed_folder, "save_file", 1),
        "side files": (side_files, "copy_side_files", 1),
        "name": (LocalDisk, "commit", 1),
        "export's name": (LocalDisk, "commit", 2),
        "end": (FolderAside, "clear", 1),
        "very end": (FolderAside, "clear", 2),
    }
    owner, name, call = places[place]
    original, calls = getattr(owner, name), []

    def killed(*given: Any, **more: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            raise Killed
        return original(*given, **more)

    words = [*request(folder), "--rank", 2, "-o", tmp_path / "routed", "--export", tmp_path / "x"]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, killed)
        with pytest.raises(Killed):
            CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    for written in ("routed", "x"):
        found = tmp_path / written
        assert not found.exists() or place in ("export's name", "end", "very end")
        assert not found.exists() or written == "routed" or place in ("end", "very end")
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["routed", "x"]
    assert (tmp_path / "routed/vocab.txt").exists() and (tmp_path / "routed/routed.json").exists()
    config = json.loads((tmp_path / "x/experts/a/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "x/merged")
    load_routed(tmp_path / "routed")
    assert run(*words).exit_code == 2  # what is finished is not written over


def test_an_export_replaces_nothing(folder: Path, tmp_path: Path):
    assert run(*request(folder), "--rank", 2, "-o", tmp_path / "routed").exit_code == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full/prototypes.safetensors").write_text("mine")
    refused = run(tmp_path / "routed", "--export", tmp_path / "full")
    assert refused.exit_code == 2 and "not empty" in refused.stderr
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["prototypes.safetensors"]
    assert (tmp_path / "full/prototypes.safetensors").read_text() == "mine"
    refused = run(*request(folder), "-o", tmp_path / "new", "--export", tmp_path / "new")
    assert refused.exit_code == 2 and "two folders" in refused.stderr
    routed = load_routed(tmp_path / "routed")
    for write in (routed.save_pretrained, lambda f: export_lora(routed, f)):
        with pytest.raises(RequestError, match="not empty"):
            write(tmp_path / "full")
