"""Guards `eutectic collect` from end to end, on small checkpoints with real tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
import typer
from safetensors.torch import save_file
from tiny_models import assert_near, assert_same, bert, t5
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from eutectic.checkpoint.index import open_index
from eutectic.checkpoint.reader import CheckpointReader
from eutectic.cli.collect import collect as command
from eutectic.statistics import collect, load_statistics
from helpers.pretended_device import DEVICE, pretended

# peft asks transformers by a name that is going away.
OLD_NAMES = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
TEXTS = ["a b c", "d", "e f g h", "b b", "c i j"]
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def run(*words: Any, code: int = 0) -> Any:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output + result.stderr
    return result


def tokenizer() -> hf.PreTrainedTokenizerFast:
    model = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    core = Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture
def expert(tmp_path: Path) -> Path:
    bert().save_pretrained(tmp_path / "expert")
    tokenizer().save_pretrained(tmp_path / "expert")
    return tmp_path / "expert"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "proxy.jsonl"
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(TEXTS)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.transformers_versions
def test_a_checkpoint_and_its_data(expert: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.stats.safetensors"
    result = run(expert, "--data", data, "-o", output, "--fisher", "--batch-size", 2, "--json")
    report = json.loads(result.stdout)
    assert report["examples"] == 5 and report["unseen"] == []

    found = load_statistics(output)
    assert found[QUERY].count == sum(len(text.split()) for text in TEXTS)
    assert found.fingerprint == CheckpointReader(open_index(expert)).fingerprint()
    assert found[QUERY].fisher_diagonal is not None
    batches = [
        {**tokenizer()(text, return_tensors="pt"), "labels": torch.tensor([i % 3])}
        for i, text in enumerate(TEXTS)
    ]
    assert_same(collect(bert(), batches, fisher=True), found, 1e-5)


def test_a_person_reads_a_table(expert: Path, data: Path, tmp_path: Path) -> None:
    result = run(expert, "--data", data, "-o", tmp_path / "x.safetensors", "--layers", "*query*")
    assert "examples" in result.stdout and "written" in result.stdout
    assert set(load_statistics(tmp_path / "x.safetensors").names) == {
        QUERY,
        QUERY.replace("0", "1"),
    }


def test_wider_sums_each_of_its_own(expert: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    words = [expert, "--data", data, "-o", output, "--layers", "*attention.self*"]
    run(*words, "--dtype", "float64", "--no-share-inputs")
    found = load_statistics(output)
    assert {layer["same_as"] or name for name, layer in found.provenance["layers"].items()} == set(
        found.names
    )
    own = found[QUERY].gram if found[QUERY].gram is not None else found[QUERY].gram_factor
    assert own is not None and own.dtype == torch.float64
    assert "allowed are float32" in run(*words, "--dtype", "bfloat16", code=2).stderr


def test_adding_with_and_without_collecting(expert: Path, data: Path, tmp_path: Path) -> None:
    lines = data.read_text().splitlines()
    parts = [tmp_path / "p0.jsonl", tmp_path / "p1.jsonl"]
    parts[0].write_text("\n".join(lines[:2]))
    parts[1].write_text("\n".join(lines[2:]))
    first, second, whole = (tmp_path / f"{n}.safetensors" for n in "abc")
    run(expert, "--data", parts[0], "-o", first)
    run(expert, "--data", parts[1], "-o", second)
    run(expert, "--data", data, "-o", whole)
    run("--add", first, "--add", second, "-o", tmp_path / "sum.safetensors")
    run(expert, "--data", parts[1], "--add", first, "-o", tmp_path / "both.safetensors")
    for name in ("sum", "both"):
        assert_same(load_statistics(whole), load_statistics(tmp_path / f"{name}.safetensors"), 1e-5)
    assert not list(tmp_path.glob("*.collected*"))
    result = run("--add", first, "--add", whole, "-o", tmp_path / "twice.safetensors", code=1)
    assert "shares 2 of its 5 examples" in result.stderr


def test_a_file_that_cannot_be_added_is_told_before_any_data_are_run(
    expert: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"\x08")
    words = (expert, "--data", data, "-o", tmp_path / "both.safetensors")
    for name in ("absent", "torn"):
        result = run(*words, "--add", tmp_path / f"{name}.safetensors", code=1)
        assert f"{name}.safetensors" in result.stderr
        assert not list(tmp_path.glob("both*"))  # what was collected would lie beside the output


@pytest.mark.transformers_versions
def test_a_head_beside_the_checkpoint_gives_gradients(data: Path, tmp_path: Path) -> None:
    whole = bert()
    body, classifier = whole.bert, whole.classifier
    body.save_pretrained(tmp_path / "body")
    tokenizer().save_pretrained(tmp_path / "body")
    head, output = tmp_path / "head.safetensors", tmp_path / "x.safetensors"
    save_file({"weight": classifier.weight.data, "bias": classifier.bias.data}, head)
    words = [tmp_path / "body", "--data", data, "-o", output, "--output-gradients", "--fisher"]

    run(*words, "--head", head, "--pooling", "pooler")
    batches = [
        {**tokenizer()(text, return_tensors="pt"), "labels": torch.tensor([i % 3])}
        for i, text in enumerate(TEXTS)
    ]
    expected = collect(whole, batches, output_gradients=True, fisher=True)
    found = load_statistics(output)
    for name in found.names:
        wanted = expected[f"bert.{name}"]
        if wanted.gram is not None or wanted.gram_factor is not None:
            assert_near(found[name].dense_gram(), wanted.dense_gram(), 1e-5)
            assert_near(found[name].output_gradient_gram, wanted.output_gradient_gram, 1e-5)
        assert wanted.fisher_diagonal is not None
        if float(wanted.fisher_diagonal.max()) > 1e-12:  # keys' biases have rounding only
            assert_near(found[name].fisher_diagonal, wanted.fisher_diagonal, 1e-5)

    run(*words, "--head", head, "--labels", "sample")  # the mean of the tokens, drawn labels
    drawn = load_statistics(output)
    assert drawn.provenance["settings"]["head"] != found.provenance["settings"]["head"]
    assert drawn[QUERY.removeprefix("bert.")].fisher_diagonal is not None


def test_a_head_that_does_not_fit_is_refused(expert: Path, data: Path, tmp_path: Path) -> None:
    bert().bert.save_pretrained(tmp_path / "body")
    tokenizer().save_pretrained(tmp_path / "body")
    head, output = tmp_path / "head.safetensors", tmp_path / "x.safetensors"
    save_file({"weight": torch.ones(3, 5)}, head)
    body = [tmp_path / "body", "--data", data, "-o", output]
    for words, code, message in (
        ([*body, "--fisher"], 2, "--head"),
        ([*body, "--head", head], 2, "--head is for gradients"),
        ([*body, "--fisher", "--head", head], 2, "the head takes 5 features, the model gives"),
        ([*body, "--fisher", "--head", head, "--pooling", "max"], 2, "unknown pooling 'max'"),
        ([*body, "--fisher", "--head", data], 1, "is no head"),
        ([*body, "--fisher", "--head", head, "--task", "causal-lm"], 2, "--head is for bare"),
    ):
        assert message in run(*words, code=code).stderr
    assert not list(tmp_path.glob("x.safetensors*"))


@OLD_NAMES
def test_a_lora_adapter_is_named_after_its_base(expert: Path, data: Path, tmp_path: Path) -> None:
    base = bert()
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "lora")
    output = tmp_path / "x.safetensors"
    words = [tmp_path / "lora", "--data", data, "-o", output]
    assert "--base" in run(*words, code=2).stderr
    run(*words, "--base", expert, "--output-gradients")
    found = load_statistics(output)
    plain = hf.AutoModelForSequenceClassification.from_pretrained(expert)
    assert set(found.names) == {n for n, m in named_linear(plain)}

    merged = peft.PeftModel.from_pretrained(plain, str(tmp_path / "lora")).merge_and_unload()
    batch = tokenizer()(TEXTS, padding=True, return_tensors="pt")
    batch = {**batch, "labels": torch.arange(5) % 3}
    expected = collect(merged, [batch], output_gradients=True)
    assert_same(expected, found, 2e-5)


@OLD_NAMES
def test_an_ia3_adapter_is_collected_and_merged_again(tmp_path: Path) -> None:
    import eutectic

    t5().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "x.csv").write_text("source,target\na b,d\ne f,g h\nc,a\n")
    experts = {}
    for seed, name in enumerate("ab"):
        config = peft.IA3Config(
            task_type="SEQ_2_SEQ_LM", target_modules=["k", "wo"], feedforward_modules=["wo"]
        )
        adapted = peft.get_peft_model(t5(), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "ia3_l" in key:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path / name)
        output = tmp_path / f"{name}.safetensors"
        options = ["--data", tmp_path / "x.csv", "--block-fisher", "--layers", "*.ia3_l"]
        run(tmp_path / name, "--base", tmp_path / "base", *options, "-o", output)
        experts[name] = {"path": tmp_path / name, "statistics": output}
    options = {"method": "mats", "operator": "block", "base": tmp_path / "base"}
    report = eutectic.merge(experts=experts, output=tmp_path / "merged", **options)
    assert set(report.merged_by) == {"mats"}
    assert all("residuals" in record["matrix"] for record in report.records.values())
    assert not any("prove" in note for note in report.notes)
    experts["a"]["statistics"], experts["b"]["statistics"] = (
        experts["b"]["statistics"],
        experts["a"]["statistics"],
    )
    with pytest.raises(eutectic.EutecticError, match="another checkpoint"):
        eutectic.merge(experts=experts, output=tmp_path / "swapped", **options)


def named_linear(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    return [
        (f"{name}.weight", m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    ]


@OLD_NAMES
def test_ia3_vectors_have_a_block_fisher() -> None:
    model = t5()
    config = peft.IA3Config(
        task_type="SEQ_2_SEQ_LM",
        target_modules=["k", "v", "wo"],
        feedforward_modules=["wo"],
        init_ia3_weights=True,
    )
    adapted = peft.get_peft_model(model, config)
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]), "labels": torch.tensor([[4], [5]])}
    batch["attention_mask"] = (batch["input_ids"] > 0).long()
    found = collect(adapted, [batch], grams=False, block_fisher=True, layers=["*ia3_l"])
    name = "encoder.block.0.layer.0.SelfAttention.k.ia3_l"
    assert len(found) == 2 * 3 + 2 * 5
    gradients = []
    for i in range(2):
        adapted.zero_grad()
        adapted(**{k: v[i : i + 1] for k, v in batch.items()}).loss.backward()
        (vector,) = (
            p for n, p in adapted.named_parameters() if n.startswith(f"base_model.model.{name}")
        )
        gradients.append(vector.grad.flatten().double().clone())
    stack = torch.stack(gradients)
    assert_near(found[name].block_fisher, stack.T @ stack, 1e-5)
    assert found[name].sample_count == 2


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["-o", "x"], 2, "name a CHECKPOINT and its --data"),
        (["EXPERT", "-o", "x"], 2, "no data to run it on"),
        (["EXPERT", "-o", "x", "--data", "DATA", "--task", "poetry"], 2, "unknown task 'poetry'"),
        (["EXPERT", "-o", "x", "--data", "DATA", "--base", "EXPERT"], 2, "--base is for adapters"),
        (["nowhere", "-o", "x", "--data", "DATA"], 1, "nowhere: no such folder"),
        (["EXPERT", "-o", "x", "--data", "DATA", "--device", "mars"], 2, "--device mars cannot"),
        (
            ["EXPERT", "-o", "x", "--data", "WRONG", "--fisher"],
            1,
            "row 1: the model knows no label '7'",
        ),
        (["EXPERT", "-o", "x", "--data", "NONE", "--fisher"], 2, "need 'labels' in every batch"),
        (
            ["EXPERT", "-o", "x", "--data", "DATA", "--task", "causal-lm", "--output-gradients"],
            2,
            "does not hold cls.predictions",
        ),
        (["EXPERT", "-o", "none.jsonl/x", "--data", "DATA"], 1, "none.jsonl"),
        (["EXPERT", "-o", "DATA", "--data", "DATA"], 2, "holds something else"),
        (["EXPERT", "-o", "expert", "--data", "DATA"], 1, "is a folder"),
        (["EXPERT", "-o", "expert/model.safetensors", "--data", "DATA"], 2, "something else"),
        (["EXPERT", "-o", "x", "--data", "DATA", "--memory", "1KB"], 2, "more than the"),
        (
            ["EXPERT", "-o", "x", "--data", "DATA", "--labels", "mine", "--fisher"],
            2,
            "labels must be one of",
        ),
    ],
)
def test_errors_in_a_few_lines(
    expert: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.jsonl").write_text('{"text": "a", "label": 7}')
    (tmp_path / "none.jsonl").write_text('{"text": "a"}')
    names = {"EXPERT": expert, "DATA": data, "WRONG": "wrong.jsonl", "NONE": "none.jsonl"}
    result = run(*[names.get(word, word) for word in words], code=code)
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 4
    assert not list(tmp_path.glob("x*"))


IGNORED = {
    "--labels sample": "--labels is for gradients, and none are asked for",
    "--labels data --seed 0": "--labels, --seed are for gradients",
    "--label-column label": "--label-column is for gradients",
    "--fisher --seed 0": "--seed: labels of the data are not drawn",
    "--fisher --labels sample --label-column label": "--label-column: drawn labels take no column",
    "--fisher --pooling mean": "--pooling is for --head, and none is named",
    "--normalize": "--normalize is for --head",
    "--split train": "data without splits, so there is no 'train' to choose",
}


@pytest.mark.parametrize("words", IGNORED)
def test_options_that_would_be_ignored_are_refused(data: Path, tmp_path: Path, words: str) -> None:
    # Refused before anything is opened: there is no such checkpoint.
    result = run("nowhere", "--data", data, "-o", tmp_path / "x", *words.split(), code=2)
    assert IGNORED[words] in " ".join(result.stderr.split())
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize(
    "words",
    ["--fisher", "--batch-size 16", "--dtype float32", "--no-share-inputs", "--device cpu"],
)
def test_files_that_are_only_added_take_no_options_of_collecting(
    tmp_path: Path, words: str
) -> None:
    added = ["--add", "nowhere", "--add", "nowhere", "-o", tmp_path / "x"]
    option = words.split()[0].replace("--no-", "--")
    result = run(*added, *words.split(), code=2)
    assert f"{option} is for collecting, and files are only added" in result.stderr
    assert "nowhere" in run(*added, code=1).stderr


def test_grams_need_no_labels_no_head_and_not_even_tokens(expert: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": t, "label": "?"}) for t in ("", "a b", "c")))
    output = tmp_path / "x.safetensors"
    words = [expert, "--data", data, "-o", output, "--batch-size", 1, "--json"]
    report = json.loads(run(*words, "--task", "causal-lm").stdout)
    assert "cls.predictions.bias" in report["randomly_initialised"]
    assert load_statistics(output)[QUERY].count == 3  # the empty text has none
    drawn = run(*words, "--output-gradients", "--labels", "sample")
    assert json.loads(drawn.stdout)["randomly_initialised"] == []


@pytest.mark.transformers_versions
def test_a_causal_model_and_an_encoder_decoder(tmp_path: Path) -> None:
    from tiny_models import gpt2

    for name, model in (("gpt2", gpt2()), ("t5", t5())):
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "x.csv").write_text("text,source,target\na b c,a b,d\nd,d e f,g h\n")
    for name, layer, count in (
        ("gpt2", "transformer.h.0.attn.c_attn.weight", 4),
        ("t5", "decoder.block.1.layer.2.DenseReluDense.wo.weight", 3),
    ):
        output = tmp_path / f"{name}.safetensors"
        run(tmp_path / name, "--data", tmp_path / "x.csv", "-o", output, "--output-gradients")
        found = load_statistics(output)
        assert found[layer].count == count
        assert found[layer].output_gradient_gram is not None


@pytest.mark.transformers_versions
def test_images(tmp_path: Path) -> None:
    from PIL import Image

    config = hf.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4, label2id={"cat": 0, "dog": 1}, id2label={0: "cat", 1: "dog"},
    )  # fmt: skip
    hf.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    hf.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    for name, color in (("cat/a.png", "red"), ("dog/b.png", "blue"), ("dog/c.png", "green")):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 9), color).save(tmp_path / "images" / name)
    output = tmp_path / "x.safetensors"
    run(tmp_path / "vit", "--data", tmp_path / "images", "-o", output, "--output-gradients")
    found = load_statistics(output)
    layers = [n for n in found if found.provenance["layers"][n]["shape"] == [24, 16]]
    assert len(layers) == 1 and found[layers[0]].count == 3 * 5
    assert found["classifier.weight"].count == 3
    # transformers 5 renames ViT's layers on loading; a merge finds them by the file's names.
    import eutectic

    # A file may also hold the names of the model in memory.
    loaded = hf.ViTForImageClassification.from_pretrained(tmp_path / "vit")
    shutil.copytree(tmp_path / "vit", tmp_path / "own")
    save_file(loaded.state_dict(), tmp_path / "own" / "model.safetensors")
    own = next(n for n in loaded.state_dict() if ".0." in n).split(".0.")[0]
    for folder, layer in (("vit", "vit.encoder.layer"), ("own", own)):
        expert = {"path": tmp_path / folder, "statistics": output}
        report = eutectic.merge(
            base=tmp_path / folder, experts={"a": expert}, method="regmean",
            output=tmp_path / f"merged-{folder}",
        )  # fmt: skip
        matched = [n for n, r in report.records.items() if "ridge" in r.get("matrix", {})]
        assert len(matched) == 7 and any(n.startswith(layer) for n in matched)


def test_bare_encoders_of_grey_images(tmp_path: Path) -> None:
    from PIL import Image

    config = hf.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4, num_channels=1,
    )  # fmt: skip
    hf.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    processor = hf.ViTImageProcessor(size={"height": 8, "width": 8}, do_normalize=False)
    processor.save_pretrained(tmp_path / "vit")
    (tmp_path / "images" / "cat").mkdir(parents=True)
    for index, color in enumerate(("red", "blue")):
        Image.new("RGB", (10, 9), color).save(tmp_path / "images" / "cat" / f"{index}.png")
    output = tmp_path / "x.safetensors"
    run(tmp_path / "vit", "--data", tmp_path / "images", "-o", output)
    found = load_statistics(output)
    layers = [n for n in found if found.provenance["layers"][n]["shape"] == [24, 16]]
    assert len(layers) == 1 and found[layers[0]].count == 2 * 5


def test_the_device_of_the_model_is_an_option(
    expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    asked = [expert, "--data", tmp_path / "d.jsonl", "-o"]
    run(*asked, tmp_path / "here.safetensors")
    monkeypatch.setattr("eutectic.models.loading.device_of_models", lambda _: str(DEVICE))
    monkeypatch.setattr("eutectic.cluster.devices.WITHOUT_FLOAT64", frozenset({DEVICE.type}))
    with pretended(float64=False):
        run(*asked, tmp_path / "there.safetensors", "--device", "mps")
    here, there = (load_statistics(tmp_path / f"{n}.safetensors") for n in ("here", "there"))
    assert_same(there, here)
