"""Tables of different vocabularies, against rows that are computed one by one."""

import importlib
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.vocabularies import (
    BIAS,
    EMBED,
    HEAD,
    WIDTH,
    naive_rows,
    rows_by_token,
    write_model,
)

import eutectic
from eutectic.errors import OutputError, RecipeError
from eutectic.planning.inputs import open_inputs
from eutectic.planning.plan import make_plan
from eutectic.recipes.load import check_recipe

WORDS = ["<s>", "</s>", "the", "fox", "Ġjumps", "▁dog", "é", "语"]
SHUFFLED = ["<s>", "</s>", *random.Random(1).sample(WORDS[2:], len(WORDS) - 2)]


@pytest.fixture
def models(tmp_path):
    """A padded base, experts with other added tokens, a trimmed and a re-ordered one."""
    made = {
        "base": write_model(tmp_path / "base", WORDS, rows=10),
        "a": write_model(tmp_path / "a", WORDS, ["<a>", "<both>"], rows=12, seed=1),
        "b": write_model(tmp_path / "b", WORDS, ["<both>", "<b>"], rows=16, seed=2),
        "trimmed": write_model(tmp_path / "trimmed", WORDS[:6], seed=3),
        "moved": write_model(tmp_path / "moved", SHUFFLED, ["<b>"], seed=4),
    }
    return tmp_path, {n: (t, rows_by_token(tmp_path / n)) for n, t in made.items()}


def merge(folder: Path, chosen, **options):
    """Merge experts of a folder; return the tensors, the tokens and the report."""
    output = folder / f"out{len(list(folder.glob('out*')))}"
    report = eutectic.merge(
        base=str(folder / "base"),
        output=output,
        **{
            "experts": {n: str(folder / n) for n in chosen},
            "method": "task_arithmetic",
            "scale": 1.0,
            **options,
        },
    )
    tensors = load_file(output / "model.safetensors")
    return tensors, rows_by_token(output), report


def check_rows(merged, rows, models, weights):
    """Compare every row that stands for a token, in all tensors that have some."""
    order = sorted(rows, key=rows.__getitem__)
    for name in (EMBED, HEAD, BIAS):
        expected = naive_rows(name, order, models, weights)
        held = torch.stack([merged[name][rows[token]] for token in order]).double()
        torch.testing.assert_close(held, expected, rtol=1e-5, atol=1e-6)


EXPERTS = ("a", "b", "trimmed", "moved")


@pytest.mark.parametrize(
    ("policy", "tokens", "size"),
    [
        ("union", [*WORDS, "<a>", "<both>", "<b>"], 11),
        ("base", WORDS, 10),
        ("b", [*WORDS, "<both>", "<b>"], 16),
        ("moved", [*SHUFFLED, "<b>"], 9),
        ("intersection", WORDS[:6], 6),
    ],
)
def test_rows_are_matched_by_token(models, policy, tokens, size):
    folder, known = models
    merged, rows, report = merge(folder, EXPERTS, vocabulary=policy, scale=1.0)
    assert sorted(rows, key=rows.__getitem__) == tokens
    assert {len(merged[name]) for name in (EMBED, HEAD, BIAS)} == {size}
    check_rows(merged, rows, known, dict.fromkeys(EXPERTS, 1.0))
    config = json.loads((report.output / "config.json").read_text())
    assert config["vocab_size"] == size
    assert any(note.kind == "vocabulary" for note in report.note_records)


def test_weights_count_in_rows_that_the_base_lacks(models):
    folder, known = models
    weights = {"a": 0.7, "b": 0.2}
    experts = {n: {"path": str(folder / n), "weight": w} for n, w in weights.items()}
    merged, rows, _ = merge(folder, (), experts=experts, vocabulary="union")
    check_rows(merged, rows, {n: known[n] for n in ("base", "a", "b")}, weights)
    # base (A + B)/2 + 0.7 (A − B)/2 + 0.2 (B − A)/2
    a, b = known["a"][0][EMBED][9], known["b"][0][EMBED][8]
    torch.testing.assert_close(merged[EMBED][rows["<both>"]], 0.75 * a + 0.25 * b)
    # Only one expert has them, so nothing is to be merged: its row, whatever its weight.
    assert torch.equal(merged[EMBED][rows["<a>"]], known["a"][0][EMBED][8])
    assert torch.equal(merged[BIAS][rows["<b>"]], known["b"][0][BIAS][9])


def test_an_adapter_gets_the_tokenizer_of_its_rows(tmp_path):
    """Without it nobody knows which tokens the rows are that it saves whole."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 1}
    for seed, (name, added) in enumerate({"base": (), "a": ["<a>"], "b": ["<b>", "<c>"]}.items()):
        write_model(tmp_path / name, WORDS, added, seed=seed, tied=True, config=sizes)
    merged, rows, _ = merge(tmp_path, ("a", "b"), vocabulary="union")
    asked = {"adapter": {"rank": 4}, "vocabulary": "union", "chat_template": "chatml"}
    common = {"base": str(tmp_path / "base"), "method": "task_arithmetic", "scale": 1.0}
    common["experts"] = {n: str(tmp_path / n) for n in "ab"}
    adapter = eutectic.merge(**common, **asked, output=tmp_path / "adapter").output
    held = load_file(adapter / "adapter_model.safetensors")
    assert torch.equal(held[f"base_model.model.{EMBED}"], merged[EMBED])
    assert rows_by_token(adapter) == rows
    assert "im_start" in (adapter / "chat_template.jinja").read_text()
    for lost in ({"chat_template": "chatml"}, {"shard_size": "1MB"}):
        with pytest.raises(RecipeError, match="the output is an? (PEFT )?adapter"):
            eutectic.plan(**common, adapter={"rank": 4}, **lost)
    by_number = {**common, "experts": {"same": common["base"]}, "vocabulary": "error"}
    with pytest.raises(RecipeError, match="the output is an adapter"):
        eutectic.plan(**by_number, adapter={"rank": 4}, chat_template="chatml")


def test_one_vocabulary_gives_the_bytes_of_a_plain_merge(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        write_model(tmp_path / name, WORDS, rows=12, seed=seed)
    plain, _, _ = merge(tmp_path, "ab", method="ties")
    for policy in ("base", "union", "intersection", "a"):
        merged, _, _ = merge(tmp_path, "ab", method="ties", vocabulary=policy)
        assert merged.keys() == plain.keys()
        assert all(torch.equal(merged[name], plain[name]) for name in plain)


def test_padding_is_kept_trimmed_and_rounded(models):
    folder, _ = models
    for padding, step, size in [
        *(("keep", None, 11), ("trim", None, 11), ("trim", 8, 16), ("keep", 64, 64)),
    ]:
        asked = {"source": "union", "padding": padding, "pad_to_multiple_of": step}
        merged, _, _ = merge(folder, EXPERTS, vocabulary=asked)
        assert len(merged[EMBED]) == len(merged[HEAD]) == size
        # Added rows are the mean of each model's others, merged: nobody's highest logit.
        if size > 11:
            mean = merged[EMBED][:11].mean(0)
            torch.testing.assert_close(merged[EMBED][11:], mean.expand(size - 11, -1))
    merged, _, _ = merge(folder, "a", vocabulary={"source": "base", "padding": "trim"})
    assert len(merged[EMBED]) == len(WORDS)


def test_rules_of_single_tokens(models):
    folder, known = models
    rules = {
        "<a>": "zero",
        "<both>": {"source": {"model": "b"}, "force": True},
        "<b>": {"source": {"model": "a", "token": "<a>"}, "force": True},
        "fox": {"source": {"model": "a", "row": 2}, "force": True},
        "语": {"source": "b"},
    }
    asked = {"source": "union", "tokens": rules}
    merged, rows, _ = merge(folder, ("a", "b", "trimmed"), vocabulary=asked)
    table, (base, a, b) = merged[EMBED], (known[n][0][EMBED] for n in ("base", "a", "b"))
    # The base lacks <a>, and so its row is zero there; the expert's own counts as its change.
    torch.testing.assert_close(table[rows["<a>"]], a[8])
    assert torch.equal(table[rows["<both>"]], b[8])
    assert torch.equal(table[rows["<b>"]], a[8])
    assert torch.equal(table[rows["fox"]], a[2])
    # `trimmed` lacks 语: it has the row of b in its place.
    expected = base[7] + (a[7] - base[7]) + 2 * (b[7] - base[7])
    torch.testing.assert_close(table[rows["语"]], expected, rtol=1e-5, atol=1e-6)


def test_rules_may_add_tokens(models):
    folder, known = models
    rules = {
        "<new>": {"source": {"model": "a", "token": "<a>"}, "add": True},
        "<none>": {"source": "zero", "add": True},
        "the": {"source": {"model": "b"}, "add": True},
    }
    for policy in ("union", "base", "intersection"):
        asked = {"source": policy, "tokens": rules}
        merged, rows, report = merge(folder, ("a", "b", "trimmed"), vocabulary=asked)
        assert (rows["<new>"], rows["<none>"]) == (len(rows) - 2, len(rows) - 1)
        assert torch.equal(merged[HEAD][rows["<new>"]], known["a"][0][HEAD][8])
        assert not merged[EMBED][rows["<none>"]].any() and len(merged[EMBED]) >= len(rows)
        told = [n.subject for n in report.note_records if n.kind == "tokens_created"]
        assert told == [("<new>", "<none>")]
        config = json.loads((report.output / "config.json").read_text())
        assert config["vocab_size"] == len(merged[EMBED])


def test_tied_tables_and_other_dtypes(tmp_path):
    kinds = {"tied": True, "dtype": torch.bfloat16}
    base = write_model(tmp_path / "base", WORDS, **kinds)
    a = write_model(tmp_path / "a", WORDS, ["<a>"], seed=1, **kinds)
    b = write_model(tmp_path / "b", SHUFFLED, ["<b>"], seed=2, **kinds)
    merged, rows, _ = merge(tmp_path, "ab", vocabulary="union")
    assert HEAD not in merged and merged[EMBED].dtype == torch.bfloat16
    known = {"base": base, "a": a, "b": b}
    models = {n: (t, rows_by_token(tmp_path / n)) for n, t in known.items()}
    order = sorted(rows, key=rows.__getitem__)
    expected = naive_rows(EMBED, order, models, {"a": 1.0, "b": 1.0})
    torch.testing.assert_close(merged[EMBED].double(), expected, rtol=8e-3, atol=1e-2)


def test_matrix_methods_and_masks_take_such_tables(models):
    folder, _ = models
    for method in ("iso_c", "dare_ties", "slerp", "average"):
        experts = ("a", "moved") if method == "slerp" else EXPERTS
        merged, rows, _ = merge(folder, experts, vocabulary="union", method=method)
        assert len(merged[EMBED]) > max(rows.values()) and merged[HEAD].isfinite().all()


def test_no_policy_refuses_sizes_and_warns_of_other_tokens(models):
    folder, _ = models
    with pytest.raises(RecipeError, match="vocabulary: union"):
        merge(folder, "a")
    write_model(folder / "c", SHUFFLED, rows=10, seed=5)
    _, _, report = merge(folder, "c")
    told = [note for note in report.note_records if note.kind == "other_tokens"]
    assert [note.subject for note in told] == [("c",)] and told[0].level == "warning"
    with pytest.raises(RecipeError) as caught:
        merge(folder, "c", vocabulary="error")
    assert [fault.kind for fault in caught.value.faults] == ["other_tokens"]


def test_layers_of_several_models_share_one_vocabulary(models):
    folder, known = models
    document = folder / "stacked.yml"
    document.write_text(
        f"""
slices:
  - sources: [{{model: {folder}/a, layer_range: [0, 1]}}]
  - sources: [{{model: {folder}/b, layer_range: [0, 1]}}]
merge_method: passthrough
tokenizer: {{source: union}}
"""
    )
    eutectic.merge(document, output=folder / "stacked")
    merged, rows = (
        load_file(folder / "stacked/model.safetensors"),
        rows_by_token(folder / "stacked"),
    )
    assert {"<a>", "<both>", "<b>"} < rows.keys()
    for name, owner in ((EMBED, "a"), (HEAD, "b"), (BIAS, "b")):
        tensors, own = known[owner]
        assert len(merged[name]) == len(rows)
        for token, row in rows.items():
            expected = tensors[name][own[token]] if token in own else 0 * tensors[name][0]
            assert torch.equal(merged[name][row], expected)
    config = json.loads((folder / "stacked/config.json").read_text())
    assert config["vocab_size"] == len(rows)
    document.write_text(document.read_text().replace("tokenizer: {source: union}", ""))
    with pytest.raises(RecipeError) as caught:
        eutectic.merge(document, output=folder / "mixed")
    assert [fault.kind for fault in caught.value.faults] == ["table_size"]


def test_an_interrupted_merge_goes_on_to_the_same_files(models, monkeypatch):
    folder, _ = models
    options = {"vocabulary": "union", "chat_template": "chatml"}
    _, _, report = merge(folder, "ab", **options)
    whole = {p.name: p.read_bytes() for p in report.output.iterdir()}
    modules = ("eutectic.vocabulary.tokenizer_files", "eutectic.execution.model_vocabulary")
    for last in range(5):  # of as many writes
        left = [last]
        for module in modules:
            real = importlib.import_module(module).write_atomically

            def write(path, content, real=real, left=left):
                if not left[0]:
                    raise OSError(28, "no space left")
                left[0] -= 1
                real(path, content)

            monkeypatch.setattr(f"{module}.write_atomically", write)
        output = folder / f"again{last}"
        experts = {name: str(folder / name) for name in "ab"}
        stated = {"base": str(folder / "base"), "experts": experts, "scale": 1.0, **options}
        with pytest.raises(OutputError):
            eutectic.merge(method="task_arithmetic", output=output, **stated)
        monkeypatch.undo()
        eutectic.merge(method="task_arithmetic", output=output, **stated)
        assert {p.name: p.read_bytes() for p in output.iterdir()} == whole
        assert not output.with_name(f"{output.name}.partial").exists()


def test_values_are_compared_within_the_rows_that_are_there(tmp_path):
    base = write_model(tmp_path / "base", WORDS)
    # Equal as far as they go: whoever compares checkpoints reads on to the end of the table.
    for name, words in (("short", WORDS[:5]), ("other", WORDS[:5])):
        write_model(tmp_path / name, words)
        cut = {n: v[: len(words)] if n in (EMBED, HEAD, BIAS) else v for n, v in base.items()}
        save_file(
            {n: v.contiguous() for n, v in cut.items()}, tmp_path / name / "model.safetensors"
        )
    merged, rows, _ = merge(tmp_path, ("short", "other"), vocabulary="union")
    assert all(torch.equal(merged[n], base[n]) for n in base) and len(rows) == len(WORDS)


def test_searches_that_run_the_base_are_refused(models, tmp_path):
    folder, _ = models
    (tmp_path / "tasks.yaml").write_text("{}")
    stated = {
        "base": str(folder / "base"),
        "experts": {n: str(folder / n) for n in "ab"},
        "method": "task_arithmetic",
        "vocabulary": "union",
        "scale": {"search": "divergence", "tasks": str(tmp_path / "tasks.yaml")},
    }
    recipe = check_recipe(stated)
    with open_inputs(recipe) as inputs, pytest.raises(RecipeError) as caught:
        make_plan(recipe, inputs)
    assert [fault.kind for fault in caught.value.faults] == ["search_of_vocabulary"]
