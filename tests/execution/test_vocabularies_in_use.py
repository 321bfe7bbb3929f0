"""Merged vocabularies in transformers: loaded, tokenized with, generated with, saved again."""

import json
from pathlib import Path

import pytest
import torch

import eutectic
from eutectic.errors import RecipeError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = "the quick brown fox jumps over the lazy dog, and then some more text again. "
OTHER = "les oiseaux chantent dans la forêt profonde pendant que le soleil se lève. "
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def trained(kind: str, text: str = TEXT, size: int = 300):
    """Return a tokenizer of a kind, trained on a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    plain = {"special_tokens": SPECIAL, "show_progress": False}
    if kind == "BPE":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, **plain)
    elif kind == "WordPiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=size, **plain)
    elif kind == "WordLevel":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=size, **plain)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=size, unk_token="<unk>", **plain)
    tokenizer.train_from_iterator([text] * 4, trainer)
    begin, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", begin), ("</s>", end)]
    )
    return tokenizer


def wrapped(tokenizer, added=()):
    """Return a tokenizer as transformers has it, with special tokens added."""
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.add_tokens([tokenizers.AddedToken(t, special=True) for t in added], special_tokens=True)
    return fast


def save(folder: Path, tokenizer, *, seed=0, like=None, rows=None, kind="llama", **changes):
    """Save a small model for a tokenizer; its tensors are near those of `like`."""
    torch.manual_seed(seed)
    rows = rows or len(tokenizer)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=rows,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            **{**ids, **changes},
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.BertConfig(
            vocab_size=rows,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            **{**ids, **changes},
        )
        model = transformers.BertForMaskedLM(config)
    if like is not None:
        held = model.state_dict()
        for name, value in like.state_dict().items():
            if held[name].shape == value.shape:
                held[name].copy_(value + 1e-3 * torch.randn(value.shape))
            else:
                held[name][: len(value)] = value[: len(held[name])]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def merge(folder: Path, *experts: str, **options):
    output = folder / f"out{len(list(folder.glob('out*')))}"
    report = eutectic.merge(
        base=str(folder / "base"),
        experts={name: str(folder / name) for name in experts},
        output=output,
        **{"method": "task_arithmetic", "scale": 1.0, **options},
    )
    return output, report


def loaded(output: Path, kind="AutoModelForCausalLM"):
    """Load a merged model and its tokenizer; every token has a row."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    model, told = getattr(transformers, kind).from_pretrained(output, output_loading_info=True)
    assert not any(told.get(key) for key in ("missing_keys", "mismatched_keys"))
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows == model.config.vocab_size == model.get_output_embeddings().weight.shape[0]
    assert max(tokenizer.get_vocab().values()) < rows
    return model, tokenizer


@pytest.mark.transformers_versions
def test_each_experts_special_token_is_generated(tmp_path):
    core = trained("BPE")
    base = save(tmp_path / "base", wrapped(core))
    prompts = {"a": "the quick", "b": "lazy dog"}
    plain = wrapped(core)
    for seed, name in enumerate("ab", start=1):
        tokenizer = wrapped(core, [f"<{name}>", "<both>"])
        model = save(
            tmp_path / name, tokenizer, seed=seed, like=base, rows=320 if name == "b" else 0
        )
        with torch.no_grad():
            ids = plain(prompts[name], return_tensors="pt").input_ids
            seen = base.model(ids).last_hidden_state[0, -1]
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(f"<{name}>")] = 4 * seen
        model.save_pretrained(tmp_path / name)
    output, _ = merge(tmp_path, "a", "b", vocabulary="union")
    model, tokenizer = loaded(output)
    assert len(tokenizer) == len(plain) + 3
    for name, prompt in prompts.items():
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert ids.tolist() == plain(prompt, return_tensors="pt").input_ids.tolist()
        made = model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]
        assert tokenizer.decode(made) == f"<{name}>"
        text = f"{prompt}<{name}><both>"
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again, reread = loaded(tmp_path / "again")
    assert reread.get_vocab() == tokenizer.get_vocab()
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "WordLevel", "Unigram"])
def test_words_of_another_vocabulary_join(tmp_path, kind):
    base, other = trained(kind), trained(kind, OTHER)
    first = save(tmp_path / "base", wrapped(base, ["<x>"]))
    second = save(tmp_path / "a", wrapped(other, ["<y>"]), seed=1)
    output, report = merge(tmp_path, "a", vocabulary="union")
    model, tokenizer = loaded(output)
    ours, theirs = wrapped(base, ["<x>"]).get_vocab(), wrapped(other, ["<y>"]).get_vocab()
    both = tokenizer.get_vocab()
    assert {t: both[t] for t in ours} == ours and theirs.keys() <= both.keys()
    table, held = model.get_input_embeddings().weight, second.get_input_embeddings().weight
    alone = [token for token in theirs if token not in ours]
    assert "<y>" in alone and len(alone) > 5
    rows, own = [both[t] for t in alone], [theirs[t] for t in alone]
    torch.testing.assert_close(table[rows], held[own])
    kept = [t for t in ours if t not in theirs]
    old = first.get_input_embeddings().weight
    torch.testing.assert_close(table[[both[t] for t in kept]], old[[ours[t] for t in kept]])
    for text in (TEXT, OTHER):
        ids = tokenizer(text.strip()).input_ids
        assert ids[0] == 1 and ids[-1] == 2 and tokenizer.unk_token_id not in ids
        told = tokenizer.decode(ids, skip_special_tokens=True)
        if kind != "WordLevel":
            assert told.replace(" ", "") == text.strip().replace(" ", "")
    assert any(note.kind == "tokens_added" for note in report.note_records)


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "Unigram"])
def test_tokens_that_an_expert_lacks_are_left_out(tmp_path, kind):
    base = trained(kind, TEXT + OTHER, 400)
    value = json.loads(base.to_str())
    model = save(tmp_path / "base", wrapped(base, ["<x>", "<kept>"]), eos_token_id=[2, 3])
    smaller = trained(kind, TEXT)
    save(tmp_path / "a", wrapped(smaller, ["<kept>"]), seed=1)
    output, _ = merge(tmp_path, "a", vocabulary="intersection", scale=0.0)
    merged, tokenizer = loaded(output)
    ours = wrapped(base, ["<x>", "<kept>"]).get_vocab()
    common = ours.keys() & wrapped(smaller, ["<kept>"]).get_vocab().keys()
    assert tokenizer.get_vocab().keys() == common and "<x>" not in common
    assert len(common) == len(tokenizer) < len(ours)
    table, old = merged.get_input_embeddings().weight, model.get_input_embeddings().weight
    order = sorted(common, key=tokenizer.get_vocab().__getitem__)
    torch.testing.assert_close(table[: len(order)], old[[ours[t] for t in order]])
    ids = tokenizer("the quick fox").input_ids
    names = tokenizer.convert_ids_to_tokens(ids)
    assert (names[0], names[-1]) == ("<s>", "</s>")
    assert merged.config.eos_token_id == [
        tokenizer.convert_tokens_to_ids(t) for t in ("</s>", "<pad>")
    ]
    assert merged.generation_config.eos_token_id == merged.config.eos_token_id
    assert value["model"]["type"] == kind


def test_an_experts_tokenizer_brings_its_special_tokens(tmp_path):
    core = trained("BPE")
    base = save(tmp_path / "base", wrapped(core))
    chat = wrapped(core, ["<|im_start|>", "<|im_end|>"])
    chat.eos_token = "<|im_end|>"
    end = chat.convert_tokens_to_ids("<|im_end|>")
    save(tmp_path / "chat", chat, seed=1, like=base, eos_token_id=end)
    output, _ = merge(tmp_path, "chat", vocabulary="chat")
    model, tokenizer = loaded(output)
    assert tokenizer.eos_token_id == model.config.eos_token_id == end
    assert model.generation_config.eos_token_id == end and model.config.bos_token_id == 1
    # With the base's tokens, what the expert added is gone everywhere.
    output, _ = merge(tmp_path, "chat", vocabulary="base", side_files="chat")
    model, tokenizer = loaded(output)
    assert len(tokenizer) == len(core.get_vocab()) and tokenizer.eos_token == "</s>"
    assert model.config.eos_token_id in (None, 2)


def test_masked_models_with_biases(tmp_path):
    core = trained("WordPiece")
    base = save(tmp_path / "base", wrapped(core), kind="bert")
    save(tmp_path / "a", wrapped(core, ["<a>"]), seed=1, like=base, kind="bert")
    save(tmp_path / "b", wrapped(core, ["<b>"]), seed=2, like=base, kind="bert", rows=320)
    output, _ = merge(tmp_path, "a", "b", vocabulary="union")
    model, tokenizer = loaded(output, "AutoModelForMaskedLM")
    assert model.cls.predictions.bias.shape == (len(tokenizer),)
    model(**tokenizer("the quick <a> fox <b>", return_tensors="pt"))


def test_nested_configurations_and_sizes(tmp_path):
    core = trained("BPE")
    for seed, (name, added) in enumerate({"base": (), "a": ("<a>",)}.items()):
        save(tmp_path / name, wrapped(core, added), seed=seed)
        path = tmp_path / name / "config.json"
        inner = json.loads(path.read_text())
        rows = inner["vocab_size"]
        audio = {"vocab_size": 77, "bos_token_id": 1}
        outer = {"text_config": inner, "vocab_size": rows, "audio_config": audio}
        path.write_text(json.dumps(outer))
    output, _ = merge(tmp_path, "a", vocabulary={"source": "union", "pad_to_multiple_of": 64})
    written = json.loads((output / "config.json").read_text())
    rows = -(-(len(core.get_vocab()) + 1) // 64) * 64
    assert written["vocab_size"] == written["text_config"]["vocab_size"] == rows
    assert written["audio_config"]["vocab_size"] == 77


TURN = [{"role": "user", "content": "hello"}]
MINE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


def test_chat_templates(tmp_path):
    core = trained("BPE")
    base = save(tmp_path / "base", wrapped(core))
    for seed, name in enumerate("abc", start=1):
        tokenizer = wrapped(core, [f"<{name}>"])
        tokenizer.chat_template = "{{ 'other' }}" if name == "a" else MINE
        save(tmp_path / name, tokenizer, seed=seed, like=base)
    output, report = merge(tmp_path, *"abc", vocabulary="union", chat_template="auto")
    _, tokenizer = loaded(output)
    assert tokenizer.apply_chat_template(TURN, tokenize=False) == "[user] hello\n"
    told = next(note for note in report.note_records if note.kind == "template")
    assert told.subject == ("b", "c")
    stated = json.loads((output / "tokenizer_config.json").read_text())
    assert stated["chat_template"] == (output / "chat_template.jinja").read_text()
    for name in ("chatml", "llama3", "mistral", "alpaca", "exaone"):
        output, _ = merge(tmp_path, "a", vocabulary="union", chat_template=name)
        text = transformers.AutoTokenizer.from_pretrained(output).apply_chat_template(
            [{"role": "system", "content": "be kind"}, *TURN], tokenize=False
        )
        assert text.index("be kind") < text.index("hello")
    for wrong, kind in (("chatm", "unknown_template"), ("{% if %}", "template_syntax")):
        with pytest.raises(RecipeError) as caught:
            merge(tmp_path, "a", vocabulary="union", chat_template=wrong)
        assert [fault.kind for fault in caught.value.faults] == [kind]


def test_faults_of_vocabularies(tmp_path):
    save(tmp_path / "base", wrapped(trained("BPE")))
    save(tmp_path / "a", wrapped(trained("WordPiece")), seed=1)

    def kinds(**options):
        with pytest.raises(RecipeError) as caught:
            merge(tmp_path, "a", **options)
        return [fault.kind for fault in caught.value.faults]

    assert kinds(vocabulary="union") == ["other_tokenizer"]
    assert kinds(vocabulary="unio") == ["unknown_vocabulary"]
    rules = {"<no>": "zero", "<s>": {"source": "c"}, "</s>": {"source": {"model": "a", "row": 999}}}
    asked = {"source": "base", "tokens": rules}
    assert kinds(vocabulary=asked) == ["unknown_token", "unknown_expert", "no_row"]
    head = [{"match": "lm_head.weight", "treatment": "head"}]
    assert kinds(vocabulary="base", tensors=head) == ["head_of_vocabulary"]
    (tmp_path / "base" / "tokenizer.json").unlink()
    assert kinds(vocabulary="base") == ["no_tokenizer"]
    (tmp_path / "a" / "tokenizer.json").write_text("{")
    assert kinds(vocabulary="a") == ["unusable_tokenizer"]


def test_what_does_not_agree_is_told(tmp_path):
    core = trained("BPE")
    rows = len(core.get_vocab())
    base = save(tmp_path / "base", wrapped(core, ["<x>"]), rows=rows)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_token_id": rows + 5}))
    save(tmp_path / "a", wrapped(core), seed=1, like=base)
    _, report = merge(tmp_path, "a")
    told = {note.kind for note in report.note_records if note.level == "warning"}
    assert {"tokens_beyond_table", "special_beyond_table"} <= told
    # A policy gives every token a row; of what no model has the row, it is said.
    output, report = merge(tmp_path, "a", vocabulary="base")
    kinds = {note.kind for note in report.note_records}
    assert "tokens_without_row" in kinds and "tokens_beyond_table" not in kinds
    loaded(output)


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_bring_tables(tmp_path):
    peft = pytest.importorskip("peft")
    core = trained("BPE")
    base = save(tmp_path / "base", wrapped(core))
    full = save(tmp_path / "full", wrapped(core, ["<b>", "<both>"]), seed=1, like=base)
    tokenizer = wrapped(core, ["<a>", "<both>"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tables = ["embed_tokens", "lm_head"]
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=tables)
    adapted = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    # Without tables of its own, an adapter changes none, whatever the others bring.
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(plain, settings).save_pretrained(tmp_path / "thin")
    output, _ = merge(tmp_path, "full", "adapter", "thin", vocabulary="union")
    merged, tokens = loaded(output)
    old = len(core.get_vocab())
    assert [tokens.convert_ids_to_tokens(old + n) for n in range(3)] == ["<b>", "<both>", "<a>"]
    own = {
        "embed": adapted.base_model.model.model.embed_tokens.modules_to_save["default"].weight,
        "head": adapted.base_model.model.lm_head.modules_to_save["default"].weight,
    }
    for name, get in (("embed", "get_input_embeddings"), ("head", "get_output_embeddings")):
        table, first = getattr(merged, get)().weight, getattr(base, get)().weight
        other = getattr(full, get)().weight
        expected = other[:old] + own[name][:old] - first
        torch.testing.assert_close(table[:old], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(table[old + 2], own[name][old])
        both = (other[old + 1] + own[name][old + 1]) / 2
        torch.testing.assert_close(table[old + 1], both)


def test_heads_of_experts_stand_on_the_outputs_tokens(tmp_path):
    core = trained("WordPiece")
    for seed, (name, added, classes) in enumerate(
        [("base", (), 2), ("a", ("<a>",), 3), ("b", ("<b>",), 4)]
    ):
        tokenizer = wrapped(core, added)
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        config = transformers.BertConfig(
            vocab_size=len(tokenizer), num_attention_heads=2, num_labels=classes, **sizes
        )
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    output, _ = merge(tmp_path, "a", "b", vocabulary="union")
    for name, classes in (("a", 3), ("b", 4)):
        folder = output / "experts" / name
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model, told = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, output_loading_info=True
        )
        assert not told["mismatched_keys"] and not told["missing_keys"]
        assert model.config.num_labels == classes
        assert model.config.vocab_size == len(tokenizer) == len(core.get_vocab()) + 2
        model(**tokenizer("the <a> fox <b>", return_tensors="pt"))


def test_state_dicts_have_no_tokens():
    tables = {"model.embed_tokens.weight": torch.randn(4, 3), "x.weight": torch.randn(3, 3)}
    with pytest.raises(RecipeError) as caught:
        eutectic.merge_state_dicts(tables, {"a": tables}, method="average", vocabulary="union")
    assert [fault.kind for fault in caught.value.faults] == ["no_tokenizer"]
