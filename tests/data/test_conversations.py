"""Lines of text, prompts with completions and chats: the tokens that count, held to naive masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eutectic
from eutectic.data.columns import Columns
from eutectic.data.conversations import answered_ids
from eutectic.data.encoded_rows import BatchOptions, EncodedRows, open_batches
from eutectic.data.row_files import read_rows
from eutectic.errors import RequestError, TaskError
from eutectic.evaluation import load_tasks, prepare
from eutectic.models.loading import load_model
from evaluation import world
from helpers.cli import invoke

PLAIN = (
    "{% for m in messages %}{{ 'w20 ' if m.role == 'user' else 'w21 ' }}{{ m.content }} </s> "
    "{% endfor %}{% if add_generation_prompt %}w21 {% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}w21 {% generation %}{{ m.content }} </s>"
    "{% endgeneration %} {% else %}w20 {{ m.content }} </s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w21 {% endif %}"
)
REWRITING = (
    "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }} {% else %}w9 "
    "{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4"},
    {"role": "assistant", "content": "w5 w6"},
]
PAIR = {"prompt": "w1 w2 w3", "completion": " w4 w5"}


class Task:
    """What says which rows these are."""

    kind = "language-model"

    def __init__(self, columns: Columns | None = None, chat_template: str | None = None) -> None:
        self.columns = columns or Columns()
        self.chat_template = chat_template


class Slow:
    """A tokenizer that tells no offsets."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self.fast = fast
        self.truncation_side = fast.truncation_side

    def __call__(self, text: str, **options: Any) -> Any:
        assert "return_offsets_mapping" not in options
        return self.fast(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fast, name)


def tokenizer(template: str | None = None, end: str = " </s>") -> Any:
    found = world.tokenizer(end)
    found.chat_template = template
    return found


def ids_of(words: str) -> list[int]:
    return [world.WORDS.index(word) for word in words.split()]


def answers_of(rows: Sequence[Any], own: Any, length: int = 99, **task: Any) -> list[list[int]]:
    """Return the tokens that count, row by row."""
    found = answered_ids(Task(**task), rows, own, length)
    return [
        [i for i, mark in zip(ids, marks, strict=True) if mark]
        for ids, marks in zip(found.ids, found.answers, strict=True)
    ]


@pytest.mark.parametrize("wrap", [lambda t: t, Slow])
@pytest.mark.parametrize("end", [" </s>", ""])
def test_of_a_completion_its_tokens_and_its_end_count(wrap: Callable[..., Any], end: str) -> None:
    own = wrap(tokenizer(end=end))
    assert answers_of([PAIR], own) == [ids_of("w4 w5" + end)]
    whole = own.fast if isinstance(own, Slow) else own
    assert answered_ids(Task(), [PAIR], own, 99).ids == [whole("w1 w2 w3 w4 w5")["input_ids"]]


@pytest.mark.parametrize("wrap", [lambda t: t, Slow])
def test_of_a_chat_all_that_an_answer_adds_counts(wrap: Callable[..., Any]) -> None:
    own = wrap(tokenizer(PLAIN))
    whole = ids_of("w20 w1 w2 </s> w21 w3 </s> w20 w4 </s> w21 w5 w6 </s>")
    assert answered_ids(Task(), [{"messages": CHAT}], own, 99).ids == [whole]
    assert answers_of([{"messages": CHAT}], own) == [ids_of("w3 </s> w5 w6 </s>")]


def test_of_a_chat_what_the_template_marks_counts() -> None:
    own = tokenizer(MARKED)
    assert answers_of([{"messages": CHAT}], own) == [ids_of("w3 </s> w5 w6 </s>")]
    said = own.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    found = answered_ids(Task(), [{"messages": CHAT}], own, 99)
    assert found.ids == [said["input_ids"]]
    assert found.answers == [[bool(mark) for mark in said["assistant_masks"]]]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_of_a_completion_in_messages_the_completions_answers_count(template: str) -> None:
    row = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    assert answers_of([row], tokenizer(template)) == [ids_of("w5 w6 </s>")]


def test_the_words_of_other_formats_are_read() -> None:
    turns = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "w1"}]},
             {"role": "assistant", "content": "w2"}]  # fmt: skip
    columns = Columns(messages="conversations")
    own = tokenizer(PLAIN)
    assert answers_of([{"conversations": turns}], own, columns=columns) == [ids_of("w2 </s>")]
    assert answers_of([{"messages": parts}], own) == [ids_of("w2 </s>")]


def test_what_is_cut_off_does_not_count() -> None:
    own = tokenizer(PLAIN)
    assert answers_of([{"messages": CHAT}], own, 6) == [ids_of("w3")]
    ends = tokenizer()
    assert answers_of([PAIR], ends, 5) == [ids_of("w4")]  # w1 w2 w3 w4, and the tokenizer's end
    assert answers_of([PAIR], tokenizer(end=""), 2) == [[]]
    ends.truncation_side = own.truncation_side = "left"
    assert answers_of([PAIR], ends, 3) == [ids_of("w4 w5 </s>")]
    assert answers_of([{"messages": CHAT}], own, 2) == [ids_of("w6 </s>")]


def test_a_token_across_the_border_belongs_to_the_answer() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["the answer is yes"] * 50
    fast.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    own = world.hf.PreTrainedTokenizerFast(tokenizer_object=fast)
    for prompt, completion in (("the answer is ", "yes"), ("the answer is", " yes"),
                               ("the ans", "wer is yes"), ("né", " ü")):  # fmt: skip
        row = {"prompt": prompt, "completion": completion}
        (answer,) = answers_of([row], own)
        text = own.decode(answer)
        assert text.endswith(completion.strip()) and (prompt + completion).endswith(text)
        short = own.decode(answer[1:])
        assert len(short) < len(completion)  # no token more than the completion needs


def test_chats_that_cannot_be_read_are_refused() -> None:
    def refused(row: Any, why: str, template: str | None = PLAIN, **task: Any) -> None:
        with pytest.raises(RequestError, match=why):
            answers_of([row], tokenizer(template), **task)

    refused({"messages": CHAT}, "has no chat template", None)
    refused({"messages": CHAT}, "turn 2 otherwise", REWRITING)
    refused({"messages": CHAT}, "refuses it", "{{ raise_exception('alternate') }}")
    refused({"messages": [{"role": "user"}]}, "message 1: a message has a role and a content")
    refused({"messages": ["w1"]}, "message 1: is a str")
    refused({"messages": []}, "without any")
    refused({"prompt": "w1", "completion": CHAT[3:]}, "one is a text and the other messages")
    refused({"messages": CHAT}, "no known template", chat_template="chatlm")
    assert answers_of([{"messages": CHAT}], tokenizer(None), chat_template=PLAIN)


def test_lines_of_text_are_rows(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("\ufefffirst line\r\n\n  second \n\u2028third\n", "utf-8")
    assert read_rows(str(tmp_path / "d.txt")) == [
        {"text": "first line"}, {"text": "second"}, {"text": "third"},
    ]  # fmt: skip


def naive_loss(model: nn.Module, ids: list[int], answers: list[int]) -> tuple[float, int]:
    """Return −Σ log p of the last tokens of a row, which are its answers."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    places = range(len(ids) - len(answers), len(ids))
    total = -sum(float(logits[p - 1].log_softmax(-1)[ids[p]]) for p in places)
    return total, len(answers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat")
    for seed, name in enumerate(("base", "a", "bare")):
        world.make("gpt2", seed=seed).save_pretrained(path / name)
        tokenizer(None if name == "bare" else PLAIN).save_pretrained(path / name)
    world.jsonl(path / "chat.jsonl", [
        {"messages": CHAT[:2]}, {"messages": [CHAT[0], {"role": "assistant", "content": "w7 w8"}]},
    ])  # fmt: skip
    world.jsonl(path / "pairs.jsonl", [PAIR, {"prompt": "w6", "completion": " w7"}])
    (path / "lines.txt").write_text("w1 w2 w3\n\nw4 w5\n")
    return path


EXPECTED = {
    "chat.jsonl": [("w20 w1 w2 </s> w21 w3 </s>", "w3 </s>"),
                   ("w20 w1 w2 </s> w21 w7 w8 </s>", "w7 w8 </s>")],
    "pairs.jsonl": [("w1 w2 w3 w4 w5 </s>", "w4 w5 </s>"), ("w6 w7 </s>", "w7 </s>")],
    "lines.txt": [("w1 w2 w3 </s>", "w2 w3 </s>"), ("w4 w5 </s>", "w5 </s>")],
}  # fmt: skip


@pytest.mark.parametrize("file", EXPECTED)
def test_the_loss_is_that_of_the_answers(folder: Path, file: str) -> None:
    spec = {"kind": "language-model", "data": str(folder / file)}
    tasks = world.tasks(folder / "t.yaml", a=spec)
    found = eutectic.evaluate(tasks, base=folder / "base", resamples=0)
    model = world.hf.AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    parts = [naive_loss(model, ids_of(row), ids_of(end)) for row, end in EXPECTED[file]]
    wanted = sum(total for total, _ in parts) / sum(count for _, count in parts)
    assert found.results[0].value == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("file", EXPECTED)
def test_collect_and_evaluate_encode_rows_alike(folder: Path, file: str) -> None:
    loaded = load_model(folder / "a", None, None, "cpu")
    batches = open_batches(str(folder / file), loaded, BatchOptions(), needs_labels=True)
    (batch,) = list(batches)
    spec = {"kind": "language-model", "data": str(folder / file)}
    task = load_tasks(world.tasks(folder / "u.yaml", a=spec))["a"]
    ready = prepare(task, "test", folder / "a")
    assert all(torch.equal(batch[n][ready.order], ready.batches[0][n]) for n in batch)
    ends = [ids_of(end) for _, end in EXPECTED[file]]
    counted = [row[row != -100].tolist() for row in batch["labels"]]
    assert [row[-len(end) :] for row, end in zip(counted, ends, strict=True)] == ends
    if file != "lines.txt":
        assert counted == ends


def test_gradients_are_of_the_answers(folder: Path, tmp_path: Path) -> None:
    """The diagonal Fisher of the bias behind the logits, against a naive sum over one row."""
    world.jsonl(tmp_path / "one.jsonl", [PAIR])
    done = invoke("collect", folder / "a", "--data", tmp_path / "one.jsonl", "--fisher",
                  "-o", tmp_path / "s.safetensors")  # fmt: skip
    assert done.code == 0, done.err
    found = eutectic.load_statistics(tmp_path / "s.safetensors")
    model = world.hf.AutoModelForCausalLM.from_pretrained(folder / "a").eval()
    ids = torch.tensor([ids_of("w1 w2 w3 w4 w5 </s>")])
    logits = model(input_ids=ids).logits[0].log_softmax(-1)
    mean = torch.stack([logits[p - 1, ids[0, p]] for p in (3, 4, 5)]).mean()
    name = "transformer.ln_f.bias"
    (wanted,) = torch.autograd.grad(mean, [dict(model.named_parameters())[name]])
    entry = found[name]
    assert entry.fisher_diagonal is not None
    assert torch.allclose(entry.fisher_diagonal, wanted.square(), rtol=1e-4, atol=1e-9)


def test_a_checkpoint_without_a_template_borrows_the_experts(folder: Path, tmp_path: Path) -> None:
    spec = {"kind": "language-model", "data": str(folder / "chat.jsonl")}
    tasks = world.tasks(tmp_path / "t.yaml", a=spec)
    alone = [eutectic.evaluate(tasks, models=[folder / "a"], resamples=0).results[0].value]
    with pytest.raises(RequestError, match="no chat template"):
        eutectic.evaluate(tasks, models=[folder / "bare"], resamples=0)
    found = eutectic.evaluate(tasks, base=folder / "bare", experts={"a": folder / "a"}, resamples=0)
    values = {r.checkpoint: r.value for r in found.results}
    assert values["a"] == alone[0]
    named = world.tasks(tmp_path / "n.yaml", a={**spec, "chat_template": str(folder / "a")})
    stated = eutectic.evaluate(named, models=[folder / "bare"], resamples=0).results[0].value
    assert stated == values["base"]


def test_what_tasks_and_options_say_in_vain_is_refused(folder: Path, tmp_path: Path) -> None:
    spec = {"kind": "language-model", "data": str(folder / "lines.txt"), "chat_template": "chatml"}
    with pytest.raises(TaskError, match="hold no messages"):
        eutectic.evaluate(world.tasks(tmp_path / "t.yaml", a=spec), models=[folder / "a"])
    for value, why in (("chatlm", "no such file"), ("{% for %}", "no valid Jinja")):
        broken = world.tasks(tmp_path / "b.yaml", a={**spec, "chat_template": value})
        with pytest.raises(TaskError, match=why):
            load_tasks(broken)
    words = ("collect", folder / "a", "--data", folder / "lines.txt", "-o", tmp_path / "s")
    refused = invoke(*words, "--chat-template", "chatml")
    assert refused.code == 2 and "rows hold no messages" in refused.err


def test_rows_of_several_forms_are_refused(tmp_path: Path) -> None:
    rows = [{"text": "w1"}, {"messages": CHAT}]
    with pytest.raises(RequestError, match="row 2 has messages, row 1 has text"):
        EncodedRows(rows, "language-model", tokenizer(PLAIN), Columns(), 2, 9)


def test_texts_come_first_unless_another_column_is_named() -> None:
    row = {"text": "w1 w2", "messages": CHAT}
    own = tokenizer(PLAIN)
    (batch,) = EncodedRows([row], "language-model", own, Columns(), 2, 99)
    assert batch["input_ids"].tolist() == [ids_of("w1 w2 </s>")]
    other = {"text": "w1 w2", "chat": CHAT}
    (batch,) = EncodedRows([other], "language-model", own, Columns(messages="chat"), 2, 99)
    assert len(batch["input_ids"][0]) > 3


def test_prompts_and_completions_are_sources_and_targets(tmp_path: Path) -> None:
    world.save(world.make("t5"), tmp_path / "m")
    rows = [{"prompt": "w1 w2", "completion": "w3"}, {"prompt": "w4", "completion": "w5"}]
    world.jsonl(tmp_path / "d.jsonl", rows)
    renamed = [{"source": r["prompt"], "target": r["completion"]} for r in rows]
    world.jsonl(tmp_path / "e.jsonl", renamed)
    values = []
    for file in ("d.jsonl", "e.jsonl"):
        spec = {"kind": "sequence-to-sequence", "data": str(tmp_path / file)}
        task = load_tasks(world.tasks(tmp_path / "t.yaml", a=spec))["a"]
        ready = prepare(task, "test", tmp_path / "m")
        values.append((ready.references, [b["input_ids"].tolist() for b in ready.batches],
                       [b["labels"].tolist() for b in ready.batches]))  # fmt: skip
    assert values[0] == values[1]


def test_a_chat_may_begin_with_an_answer() -> None:
    chat = [{"role": "assistant", "content": "w3"}, *CHAT[2:]]
    assert answers_of([{"messages": chat}], tokenizer(PLAIN)) == [ids_of("w3 </s> w5 w6 </s>")]


@pytest.mark.parametrize(
    "row", [{"messages": CHAT[:1]}, {"prompt": "w1", "completion": ""}, {"messages": CHAT[::2]}]
)
def test_gradients_without_an_answer_are_refused(folder: Path, tmp_path: Path, row: Any) -> None:
    world.jsonl(tmp_path / "d.jsonl", [row])
    words = ("collect", folder / "a", "--data", tmp_path / "d.jsonl", "-o", tmp_path / "s")
    refused = invoke(*words, "--fisher")
    assert refused.code == 2 and "none of its rows has an answer" in refused.err
    if "messages" in row and len(row["messages"]) == 1:
        assert invoke(*words).code == 0  # inputs alone are seen all the same


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([{"messages": ["w1", "w2"]}], "message 1: is a str"),
        ([{"messages": [None]}], "message 1: is a NoneType"),
        ([{"messages": {"role": "user"}}], "got dict"),
        ([{"prompt": "w1"}], "no column 'completion'"),
        ([], "there is no data"),
    ],
)
def test_rows_that_are_none_are_told_as_such(
    folder: Path, tmp_path: Path, rows: list[Any], why: str
) -> None:
    """Of gradients, too, which need answers."""
    world.jsonl(tmp_path / "d.jsonl", rows)
    words = ("collect", folder / "a", "--data", tmp_path / "d.jsonl", "-o", tmp_path / "s")
    for more in ((), ("--fisher",)):
        refused = invoke(*words, "--task", "language-model", *more)
        assert refused.code == 2 and why in refused.err


def test_an_answer_may_be_a_number() -> None:
    own = tokenizer()
    (numbers,) = answered_ids(Task(), [{"prompt": 1, "completion": 4.5}], own, 99).ids
    (texts,) = answered_ids(Task(), [{"prompt": "1", "completion": "4.5"}], own, 99).ids
    assert numbers == texts


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "alpaca", "exaone"])
def test_known_templates_against_naive_masks(name: str) -> None:
    """All that follows the prompt counts, turn by turn, token by token of single bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = {letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    fast = Tokenizer(models.BPE(alphabet, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own = world.hf.PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")
    own.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|eot_id|>"]})
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Où?"},
        {"role": "assistant", "content": "Là-bas"},
        {"role": "user", "content": "Why? 🙂"},
        {"role": "assistant", "content": "So."},
    ]
    found = answered_ids(Task(chat_template=name), [{"messages": chat}], own, 999)

    def naive(turns: list[dict[str, str]], **further: Any) -> list[int]:
        from eutectic.vocabulary.chat_templates import BUILT_IN

        text = own.apply_chat_template(
            turns, chat_template=BUILT_IN[name], tokenize=False, **further
        )
        return own(text, add_special_tokens=False)["input_ids"]

    wanted = [False] * len(naive(chat))
    for end in (3, 5):
        start = len(naive(chat[: end - 1], add_generation_prompt=True))
        stop = len(naive(chat[:end]))
        wanted[start:stop] = [True] * (stop - start)
    assert found.ids == [naive(chat)] and found.answers == [wanted]
    assert any(wanted)


def test_dtypes_of_evaluations_have_their_usual_spellings(folder: Path) -> None:
    spec = {"kind": "language-model", "data": str(folder / "pairs.jsonl")}
    tasks = world.tasks(folder / "d.yaml", a=spec)
    short, long = (
        eutectic.evaluate(tasks, base=folder / "base", dtype=dtype, resamples=0)  # type: ignore[arg-type]
        for dtype in ("bf16", "bfloat16")
    )
    assert short.results[0].value == long.results[0].value and short.dtype == "bfloat16"
