"""Files of tasks: every fault at once, with its line; shares; splits that share rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from eutectic.data.fingerprints import data_hash, row_key
from eutectic.errors import TaskError
from eutectic.evaluation import Task, load_tasks
from eutectic.evaluation.splits import check_disjoint, split_rows
from evaluation import world


def counts(task: Task) -> dict[str, int]:
    return {split: len(keys) for split, keys in check_disjoint(task).items()}


def test_all_faults_together_with_lines(tmp_path: Path):
    (tmp_path / "t.yaml").write_text(
        "tasks:\n  a:\n    kind: text-clasification\n    data: x.jsonl\n"
        "  b:\n    kind: regression\n    data: {test: {path: x.jsonl, shares: 0.5}}\n    heads: y\n"
        "  c:\n    kind: language-model\n    data: x.jsonl\n    metric: acuracy\n"
    )
    with pytest.raises(TaskError) as error:
        load_tasks(tmp_path / "t.yaml")
    text = str(error.value)
    assert "line 3: tasks.a.kind" in text
    assert "line 7: unknown key 'tasks.b.data.test.shares'. Did you mean 'share'?" in text
    assert "line 8: unknown key 'tasks.b.heads'. Did you mean 'head'?" in text
    assert "line 9: tasks.c: metric 'acuracy' is none of language-model: loss, perplexity" in text


def test_kinds_of_task_may_be_spelled_as_before(tmp_path: Path):
    world.jsonl(tmp_path / "x.jsonl", [{"text": "w1"}])
    kinds = {"causal-lm": "language-model", "text_classification": "text-classification"}
    for written, kind in kinds.items():
        path = world.tasks(tmp_path / "t.yaml", a={"kind": written, "data": "x.jsonl"})
        assert load_tasks(path)["a"].kind == kind
    path = world.tasks(tmp_path / "t.yaml", a={"kind": "feature-extraction", "data": "x.jsonl"})
    with pytest.raises(TaskError, match=r"tasks\.a\.kind: must be one of text-cl"):
        load_tasks(path)


def test_missing_files_are_named_with_lines(tmp_path: Path):
    path = tmp_path / "t.yaml"
    path.write_text("tasks:\n  a:\n    kind: regression\n    data: gone.jsonl\n    head: h.st\n")
    with pytest.raises(TaskError, match=r"line 4: tasks.a.data.test: no such file: gone.jsonl"):
        load_tasks(path)


def test_shares_part_a_file_by_content(tmp_path: Path):
    texts = world.sentences(400)
    world.jsonl(tmp_path / "d.jsonl", [{"text": t, "label": 0} for t in [*texts, texts[0].upper()]])
    shares = {"proxy": 0.2, "validation": 0.3, "test": 0.5}
    data = {s: {"path": "d.jsonl", "share": v} for s, v in shares.items()}
    spec = {"kind": "text-classification", "data": data}
    task = load_tasks(world.tasks(tmp_path / "t.yaml", a=spec))["a"]
    found = {s: split_rows(task, s) for s in shares}  # type: ignore[arg-type]
    assert sum(map(len, found.values())) == 401
    for split, share in shares.items():
        assert abs(len(found[split]) / 401 - share) < 0.08
    assert len(check_disjoint(task)["proxy"]) <= len(found["proxy"])


def test_shared_rows_are_refused_with_count_and_example(tmp_path: Path):
    world.jsonl(
        tmp_path / "a.jsonl", [{"text": "One  Fish", "label": 0}, {"text": "x", "label": 1}]
    )
    world.jsonl(tmp_path / "b.jsonl", [{"text": "one ﬁsh", "label": 1}, {"text": "y", "label": 0}])
    data = {"validation": "a.jsonl", "test": "b.jsonl"}
    path = world.tasks(tmp_path / "t.yaml", a={"kind": "text-classification", "data": data})
    task = load_tasks(path)["a"]
    with pytest.raises(TaskError, match="validation and test share 1 of 2 .* such as 'one ﬁsh'"):
        check_disjoint(task)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("one fish", "one\u00a0fi\u200bsh"),  # no-break space, zero-width space
        ("one fish", "\ufeffone fi\u00adsh\ufe0f"),  # byte order mark, soft hyphen, variation
        ("caf\u00e9", "cafe\u200d\u0301"),  # a joiner between a letter and its accent
        ("Stra\u00dfe", "STRASSE"),
    ],
)
def test_texts_that_look_alike_are_equal(tmp_path: Path, first: str, second: str):
    world.jsonl(tmp_path / "a.jsonl", [{"text": first, "label": 0}])
    world.jsonl(tmp_path / "b.jsonl", [{"text": second, "label": 0}])
    data = {"validation": "a.jsonl", "test": "b.jsonl"}
    path = world.tasks(tmp_path / "t.yaml", a={"kind": "text-classification", "data": data})
    with pytest.raises(TaskError, match="validation and test share 1 of 1"):
        check_disjoint(load_tasks(path)["a"])


def test_data_given_to_collect_count_as_proxy(tmp_path: Path):
    world.jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": 0}])
    proxy = world.jsonl(tmp_path / "p.jsonl", [{"text": "X "}])
    path = world.tasks(tmp_path / "t.yaml", a={"kind": "text-classification", "data": "a.jsonl"})
    task = load_tasks(path)["a"]
    assert counts(task) == {"test": 1}
    with pytest.raises(TaskError, match="proxy and test share 1 of 1"):
        check_disjoint(task, [str(proxy)])


def test_equal_pixels_are_one_row_whatever_the_file(tmp_path: Path):
    from PIL import Image

    world.images(tmp_path / "i", 1)
    png = next((tmp_path / "i").rglob("*.png"))
    with Image.open(png) as image:
        image.save(tmp_path / "same.bmp")
    path = world.tasks(tmp_path / "t.yaml", a={"kind": "image-classification", "data": "i"})
    task = load_tasks(path)["a"]
    assert row_key(task, {"image": png}) == row_key(task, {"image": tmp_path / "same.bmp"})


def test_one_file_by_two_names_is_a_fault_with_its_line(tmp_path: Path):
    world.jsonl(tmp_path / "x.jsonl", [{"text": "w1"}])
    (tmp_path / "t.yaml").write_text(
        "tasks:\n  a:\n    kind: language-model\n"
        "    data: {validation: x.jsonl, test: ./x.jsonl}\n"
        "  b:\n    kind: language-model\n    data: gone.jsonl\n"
    )
    with pytest.raises(TaskError) as error:
        load_tasks(tmp_path / "t.yaml")
    text = str(error.value)
    assert "line 2: tasks.a: splits of one file" in text
    assert "line 7: tasks.b.data.test: no such file" in text


def test_rows_of_functions_are_compared_by_their_content(tmp_path: Path):
    (tmp_path / "f.py").write_text("def f(folder, rows):\n    return [1.0] * len(rows)\n")
    for split in ("validation", "test"):
        rows = [{"id": f"{split} 1", "body": "One  Fish"}, {"id": f"{split} 2", "body": split}]
        world.jsonl(tmp_path / f"{split}.jsonl", rows)
    data = {s: f"{s}.jsonl" for s in ("validation", "test")}
    spec = {"kind": "function", "function": "f.py:f", "data": data}
    unnamed = load_tasks(world.tasks(tmp_path / "t.yaml", a=spec))["a"]
    assert counts(unnamed) == {"validation": 2, "test": 2}  # no column is known as content
    named = {**spec, "columns": {"text": "body"}}
    task = load_tasks(world.tasks(tmp_path / "t.yaml", a=named))["a"]
    with pytest.raises(TaskError, match="validation and test share 1 of 2"):
        check_disjoint(task)
    rows = split_rows(task, "test")
    changed = [{**rows[0], "answer": 1}, rows[1]]
    assert data_hash(task, rows) != data_hash(task, changed)  # functions read every column
