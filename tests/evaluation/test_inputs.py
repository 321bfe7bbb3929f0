"""Inputs that models and files often have, and that once gave wrong figures or a traceback.

Guards: padding plays no part in a decoder's classes; an adapter's own head serves the base; empty
and long texts, truth values as labels, and faulty functions are handled or refused in words.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eutectic
from eutectic.data.python_functions import source_file
from eutectic.errors import EutecticError, RequestError, TaskError
from eutectic.evaluation import load_tasks, outputs, prepare
from evaluation import world
from helpers.cli import invoke

LABELS = ("no", "maybe", "yes")
TEXTS = {"kind": "text-classification", "data": "d.jsonl"}


def evaluated(folder: Path, rows: list[dict[str, Any]], model: Path, **spec: Any) -> Any:
    world.jsonl(folder / "d.jsonl", rows)
    tasks = world.tasks(folder / "t.yaml", a=TEXTS | spec)
    return eutectic.evaluate(tasks, models=[model], resamples=0, trust_code=True)


def labelled(texts: list[str]) -> list[dict[str, Any]]:
    return [{"text": text, "label": LABELS[i % 3]} for i, text in enumerate(texts)]


def predicted(model: Any, texts: list[str]) -> list[int]:
    tokenizer = world.tokenizer()
    with torch.no_grad():
        return [int(model(**tokenizer(t, return_tensors="pt")).logits.argmax()) for t in texts]


def decoder(pad: int | None) -> Any:
    torch.manual_seed(0)
    model = world.hf.GPT2ForSequenceClassification(
        world.hf.GPT2Config(
            vocab_size=30, n_positions=24, n_embd=16, n_layer=1, n_head=2, num_labels=3,
            bos_token_id=1, eos_token_id=1, pad_token_id=pad,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape))
    return model.eval()


@pytest.mark.parametrize("pad", [None, 1, 0])
def test_decoders_classify_by_the_last_token_that_is_no_padding(tmp_path: Path, pad: int | None):
    model = decoder(pad)
    folder = world.save(model, tmp_path / "m")
    texts = world.sentences(30)
    world.jsonl(tmp_path / "d.jsonl", labelled(texts))
    spec = TEXTS | {"labels": list(LABELS)}
    task = load_tasks(world.tasks(tmp_path / "t.yaml", a=spec))["a"]
    tokenizer = world.hf.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        expected = torch.cat(
            [
                model.score(model.transformer(**tokenizer(t, return_tensors="pt"))[0][:, -1])
                for t in texts
            ]
        )
    for size in (1, 30):
        loaded = world.hf.GPT2ForSequenceClassification.from_pretrained(folder)
        found = outputs(loaded, prepare(task, "test", folder, batch_size=size))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks by names that are going away
def test_an_adapters_own_head_serves_the_base_and_merged_bodies(tmp_path: Path):
    peft = pytest.importorskip("peft")
    world.save(world.make("encoder"), tmp_path / "base")
    body = world.hf.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query"], modules_to_save=["classifier"]
    )
    tuned = peft.get_peft_model(body, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.5 * torch.randn(parameter.shape))
    tuned.save_pretrained(tmp_path / "adapter")
    eutectic.merge(
        base=str(tmp_path / "base"), experts={"a": str(tmp_path / "adapter")},
        method="task_arithmetic", scale=1.0, output=tmp_path / "merged",
    )  # fmt: skip
    texts = world.sentences(40)
    classes = predicted(tuned.eval(), texts)
    world.jsonl(
        tmp_path / "d.jsonl", [{"text": t, "label": c} for t, c in zip(texts, classes, strict=True)]
    )
    found = eutectic.evaluate(
        world.tasks(tmp_path / "t.yaml", a=TEXTS | {"labels": ["0", "1", "2"]}),
        base=tmp_path / "base", experts={"a": tmp_path / "adapter"},
        models={"m": tmp_path / "merged"}, resamples=0,
    )  # fmt: skip
    value = {r.checkpoint: r.value for r in found.results}
    assert value["a"] == 1.0  # the adapter itself is what labelled the texts
    assert value["m"] == 1.0  # one expert at α = 1
    assert value["base"] < 1.0
    # A tokenizer that the adapter brings is its own: words in another order, told by the labels.
    own = world.tokenizer()
    own.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "tokenizer.json"
    values = json.loads(file.read_text())
    numbers = values["model"]["vocab"]
    words = [word for word in numbers if word.startswith("w")]
    numbers.update(zip(words, [numbers[word] for word in reversed(words)], strict=True))
    file.write_text(json.dumps(values))
    mirrored = [" ".join(f"w{26 - int(w[1:])}" for w in text.split()) for text in texts]
    rows = [{"text": t, "label": c} for t, c in zip(mirrored, classes, strict=True)]
    world.jsonl(tmp_path / "d.jsonl", rows)
    found = eutectic.evaluate(
        tmp_path / "t.yaml", base=tmp_path / "base", experts={"a": tmp_path / "adapter"},
        resamples=0,
    )  # fmt: skip
    value = {r.checkpoint: r.value for r in found.results}
    assert value["a"] == 1.0


def test_empty_texts(tmp_path: Path):
    model = world.make("bert")
    model.save_pretrained(tmp_path / "m")
    world.tokenizer(end="").save_pretrained(tmp_path / "m")
    together = evaluated(tmp_path, labelled(["w1 w2", "", "w3"]), tmp_path / "m")
    alone = evaluated(tmp_path, labelled([""] * 3), tmp_path / "m")
    assert together.results[0].n == alone.results[0].n == 3


def test_pooled_features_of_empty_texts_are_numbers(tmp_path: Path):
    from safetensors.torch import save_file

    world.make("encoder").save_pretrained(tmp_path / "m")
    world.tokenizer(end="").save_pretrained(tmp_path / "m")
    save_file({"weight": torch.randn(3, 16), "bias": torch.zeros(3)}, tmp_path / "h.safetensors")
    spec: dict[str, Any] = {"head": "h.safetensors", "labels": list(LABELS)}
    found = evaluated(tmp_path, labelled(["w1 w2", ""]), tmp_path / "m", **spec)
    assert found.results[0].value is not None


def test_texts_longer_than_the_models_positions(tmp_path: Path):
    folder = world.save(world.make("bert"), tmp_path / "m")
    rows = labelled([" ".join(["w1"] * 60)])
    assert evaluated(tmp_path, rows, folder).results[0].n == 1  # cut to what the model takes
    with pytest.raises(RequestError, match=r"(?s)inputs of 61 tokens, .* 24 positions.*max_length"):
        evaluated(tmp_path, rows, folder, max_length=100)


def test_tokens_without_a_row_are_named(tmp_path: Path):
    folder = world.save(world.make("bert"), tmp_path / "m")
    tokenizer = world.tokenizer()
    tokenizer.add_tokens([f"added{i}" for i in range(30)])  # and the table was not resized
    tokenizer.save_pretrained(folder)
    last = len(tokenizer) - 1
    said = rf"task 'a': the inputs hold the token {last}, and the model's table ends at 29"
    with pytest.raises(RequestError, match=said):
        evaluated(tmp_path, labelled(["w1 added29", "w2"]), folder)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"true": 0, "false": 1}, 1.0),
        ({"True": 0, "False": 1}, 1.0),
        ({"LABEL_0": 0, "LABEL_1": 1}, 0),
    ],
)
def test_truth_values_go_by_their_names(tmp_path: Path, names: dict[str, int], expected: float):
    model = world.make("bert", labels=list(names))
    folder = world.save(model, tmp_path / "m")
    texts = world.sentences(20)
    rows = [
        {"text": t, "label": c == 0} for t, c in zip(texts, predicted(model, texts), strict=True)
    ]
    assert evaluated(tmp_path, rows, folder).results[0].value == expected


def test_truth_values_are_no_class_of_another_name(tmp_path: Path):
    folder = world.save(world.make("bert"), tmp_path / "m")
    with pytest.raises(TaskError, match="label True is none of"):
        evaluated(tmp_path, [{"text": "w1", "label": True}], folder)


def test_numbers_are_no_places_where_classes_are_named_by_numbers(tmp_path: Path):
    folder = world.save(world.make("bert", labels=("1", "2", "3")), tmp_path / "m")
    rows = [{"text": text, "label": i % 3 + 1} for i, text in enumerate(world.sentences(6))]
    assert evaluated(tmp_path, rows, folder).results[0].n == 6
    with pytest.raises(TaskError, match="row 1: the label 0 is none of 1, 2, 3"):
        evaluated(tmp_path, [{"text": "w1", "label": 0}, *rows], folder)


@pytest.mark.parametrize(
    ("labels", "said"),
    [(["no", "no", "yes"], "named once"), ([False, "maybe", True], "quote them")],
)
def test_names_of_classes_are_different_and_quoted(tmp_path: Path, labels: Any, said: str):
    world.jsonl(tmp_path / "d.jsonl", labelled(["w1"]))
    with pytest.raises(TaskError, match=said):
        load_tasks(world.tasks(tmp_path / "t.yaml", a=TEXTS | {"labels": labels}))


def test_a_cell_may_be_empty_rather_than_missing(tmp_path: Path):
    folder = world.save(world.make("bert"), tmp_path / "m")
    with pytest.raises(RequestError, match="row 2 is empty in the column 'text'"):
        evaluated(tmp_path, [*labelled(["w1"]), {"text": None, "label": "no"}], folder)


def test_classes_of_a_configuration_that_only_numbers_them(tmp_path: Path):
    import json

    folder = world.save(world.make("bert"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    del config["label2id"]
    (folder / "config.json").write_text(json.dumps(config))
    assert evaluated(tmp_path, labelled(world.sentences(9)), folder).results[0].n == 9


def test_a_regression_has_one_output(tmp_path: Path):
    from safetensors.torch import save_file

    folder = world.save(world.make("encoder"), tmp_path / "m")
    save_file({"weight": torch.randn(3, 16), "bias": torch.zeros(3)}, tmp_path / "h.safetensors")
    rows = [{"text": t, "label": i} for i, t in enumerate(world.sentences(4))]
    with pytest.raises(RequestError, match="one output, the head gives 3"):
        evaluated(tmp_path, rows, folder, kind="regression", head="h.safetensors")


@pytest.mark.parametrize("predicted", ["constant", "true"])
def test_correlations_with_constants_are_undefined(predicted: str):
    from eutectic.evaluation.metrics import Outcomes, metric_value

    constant = np.full(7, 0.1)
    for size in (3, 7):
        values = constant[:size] if predicted == "constant" else np.arange(float(size))
        for metric in ("pearson", "spearman"):
            assert np.isnan(metric_value(metric, Outcomes(constant[:size], values)))
            assert np.isnan(metric_value(metric, Outcomes(values, constant[:size])))


def test_a_share_of_an_expert_below_zero_is_undefined(tmp_path: Path):
    folder = world.save(world.make("bert", labels=("score",)), tmp_path / "m")
    world.save(world.make("bert", labels=("score",), seed=1), tmp_path / "e")
    texts = world.sentences(20)
    spec = TEXTS | {"kind": "regression"}
    world.jsonl(tmp_path / "d.jsonl", [{"text": t, "label": i} for i, t in enumerate(texts)])
    task = load_tasks(world.tasks(tmp_path / "t.yaml", a=spec))["a"]
    expert = world.hf.BertForSequenceClassification.from_pretrained(tmp_path / "e")
    found = -outputs(expert, prepare(task, "test", tmp_path / "e"))[:, 0]
    rows = [{"text": t, "label": float(v)} for t, v in zip(texts, found, strict=True)]
    world.jsonl(tmp_path / "d.jsonl", rows)
    results = eutectic.evaluate(
        tmp_path / "t.yaml", experts={"a": tmp_path / "e"}, models={"m": folder}, resamples=50
    ).results
    expert, model = results
    assert expert.value == pytest.approx(-1)
    assert model.normalized is None and model.normalized_interval is None


FUNCTIONS = {
    "return 0.5": "gave a float; it must give a list of numbers",
    "return None": "gave a NoneType",
    "return ['high'] * len(rows)": "gave a list; it must give a list of numbers",
    "return {}['x']": "failed: KeyError: 'x'",
    "return [1.0]": "gave 1 values for 3 rows",
}


@pytest.mark.parametrize("body", FUNCTIONS)
def test_faulty_functions_are_named(tmp_path: Path, body: str):
    folder = world.save(world.make("bert"), tmp_path / "m")
    (tmp_path / "f.py").write_text(f"def score(folder, rows):\n    {body}\n")
    spec = {"kind": "function", "function": "f.py:score"}
    with pytest.raises(EutecticError, match="score' ") as failure:
        evaluated(tmp_path, labelled(["w1", "w2", "w3"]), folder, **spec)
    assert FUNCTIONS[body] in str(failure.value)
    with pytest.raises(EutecticError, match="failed: TypeError: .*unknown"):
        evaluated(tmp_path, labelled(["w1"]), folder, **spec, options={"unknown": 1})


def test_code_of_modules_is_found_without_running_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "pack" / "deep").mkdir(parents=True)
    for file in ("pack/__init__.py", "pack/deep/__init__.py", "pack/deep/code.py"):
        (tmp_path / file).write_text("raise SystemExit('ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert source_file("pack.deep.code") == tmp_path / "pack/deep/code.py"
    assert source_file("pack") == tmp_path / "pack/__init__.py"
    assert source_file("pack.other") is None and source_file("sys") is None
    assert source_file("/somewhere/f.py") == Path("/somewhere/f.py")


@pytest.mark.parametrize("what", ["folder", "tasks", "checkpoint"])
def test_results_take_the_place_of_results_only(tmp_path: Path, what: str):
    folder = world.save(world.make("bert"), tmp_path / "m")
    world.jsonl(tmp_path / "d.jsonl", labelled(world.sentences(6)))
    tasks = world.tasks(tmp_path / "t.yaml", a=TEXTS)
    output = {"folder": folder, "tasks": tasks, "checkpoint": folder / "model.safetensors"}[what]
    before = None if output.is_dir() else output.read_bytes()
    with pytest.raises(RequestError, match="results would be written there"):
        eutectic.evaluate(tasks, models=[folder], resamples=0, output=output)
    assert before is None or output.read_bytes() == before
    for _ in range(2):
        eutectic.evaluate(tasks, models=[folder], resamples=0, output=tmp_path / "r.json")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"kind": "image-classification", "max_length": 9}, "`max_length` is not for the kind"),
        ({"kind": "regression", "labels": ["a"]}, "`labels` name classes"),
        ({"kind": "language-model", "labels": ["a"]}, "`labels` name classes"),
    ],
)
def test_keys_that_would_be_ignored_are_refused(tmp_path: Path, spec: dict[str, Any], said: str):
    world.jsonl(tmp_path / "d.jsonl", [{"text": "w1"}])
    with pytest.raises(TaskError, match=said):
        load_tasks(world.tasks(tmp_path / "t.yaml", a=spec | {"data": "d.jsonl"}))


def test_modes_of_routing_need_a_routed_model(tmp_path: Path):
    world.jsonl(tmp_path / "d.jsonl", labelled(["w1 w2"]))
    tasks = world.tasks(tmp_path / "t.yaml", a=TEXTS)
    model = world.save(world.make("bert"), tmp_path / "m")
    with pytest.raises(RequestError, match="'oracle' is for routed models, and none"):
        eutectic.evaluate(tasks, models=[model], routing="oracle")


def test_code_finds_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in sys.path if p not in ("", str(tmp_path))])
    model = world.save(world.make("bert"), tmp_path / "m")
    (tmp_path / "beside_it.py").write_text("HALF = 0.5\n")
    code = "from beside_it import HALF\ndef f(folder, rows):\n    return [HALF]\n"
    (tmp_path / "code_of_it.py").write_text(code)
    (tmp_path / "some_rows.py").write_text("def rows():\n    return [{'text': 'w9'}]\n")
    for name in ("code_of_it:f", "code_of_it.py:f"):
        spec = {"kind": "function", "function": name}
        tasks = world.tasks(tmp_path / "t.yaml", a=spec)
        found = eutectic.evaluate(tasks, models=[model], trust_code=True, resamples=0)
        assert found.results[0].value == 0.5
    assert source_file("code_of_it") == tmp_path / "code_of_it.py"
    world.jsonl(tmp_path / "d.jsonl", labelled(["w1 w2"]))
    tasks = world.tasks(tmp_path / "t.yaml", a=TEXTS)
    proxy = {"a": "some_rows:rows"}
    with pytest.raises(RequestError, match="--trust-code"):
        eutectic.evaluate(tasks, models=[model], proxy=proxy)
    found = eutectic.evaluate(tasks, models=[model], proxy=proxy, trust_code=True, resamples=0)
    assert found.tasks[0].splits == {"proxy": 1, "test": 1}
    (tmp_path / "code_of_it.py").write_text("undefined_name\n")
    tasks = world.tasks(tmp_path / "t.yaml", a={"kind": "function", "function": "code_of_it.py:f"})
    with pytest.raises(RequestError, match="NameError: name 'undefined_name'"):
        eutectic.evaluate(tasks, models=[model], trust_code=True)


def test_positions_are_counted_as_the_model_counts_them(tmp_path: Path):
    config = world.hf.RobertaConfig(
        **world.SMALL, vocab_size=30, max_position_embeddings=26, pad_token_id=0, num_labels=3
    )
    model = world.save(world.hf.RobertaForSequenceClassification(config), tmp_path / "m")
    rows = [{"text": "w1 " * 30, "label": 0}]
    with pytest.raises(RequestError, match="Set the task's max_length to 25 or less"):
        evaluated(tmp_path, rows, model, max_length=27)
    assert evaluated(tmp_path, rows, model, max_length=25).results[0].n == 1


def test_names_with_brackets_and_folders_with_equals_signs(tmp_path: Path):
    folder = world.save(world.make("bert"), tmp_path / "alpha=0.3")
    world.jsonl(tmp_path / "d.jsonl", labelled(["w1 w2"]))
    tasks = world.tasks(tmp_path / "t.yaml", a=TEXTS)
    answer = invoke("evaluate", folder, f"q[/b]={folder}", "-t", tasks, "--resamples", 0)
    assert answer.code == 0, answer.err
    assert "q[/b]" in answer.out


def test_untrusted_code_is_refused_before_anything_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With outcomes of an earlier run, identities used to be computed, and modules found, first."""
    monkeypatch.chdir(tmp_path)
    model = world.save(world.make("bert"), tmp_path / "m")
    (tmp_path / "score.py").write_text("def f(folder, rows):\n    return [0.5]\n")
    tasks = world.tasks(tmp_path / "t.yaml", a={"kind": "function", "function": "score:f"})
    before = list(sys.path)
    eutectic.evaluate(tasks, models=[model], trust_code=True, resamples=0, output=tmp_path / "r")
    for module in ("transformers", "json", "lm_eval"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.setattr("eutectic.evaluation.checkpoints.source_file", lambda _: 1 / 0)
    with pytest.raises(RequestError, match="task 'a': 'score:f' runs Python code"):
        eutectic.evaluate(tasks, models=[model], resamples=0, output=tmp_path / "r")
    assert sys.path == before


def test_texts_without_a_predicted_token_are_refused(tmp_path: Path):
    world.make("gpt2").save_pretrained(tmp_path / "m")
    world.tokenizer(end="").save_pretrained(tmp_path / "m")
    spec: dict[str, Any] = {"kind": "language-model"}
    for text in ("", "w1"):
        with pytest.raises(RequestError, match="none of the 3 texts has a token that is predicted"):
            evaluated(tmp_path, [{"text": text}] * 3, tmp_path / "m", **spec)
    found = evaluated(tmp_path, [{"text": "w1 w2"}, {"text": ""}], tmp_path / "m", **spec)
    assert found.results[0].value is not None
