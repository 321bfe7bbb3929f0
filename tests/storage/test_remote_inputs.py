"""Inputs in an S3 store: the bytes of local ones, few requests, faults of the network, errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import eutectic
from eutectic.errors import CheckpointError, EutecticError, MissingExtraError, RecipeError
from eutectic.storage import file_systems, ranged_files, storage_of, view
from eutectic.storage.ranged_files import HEADER
from helpers.cli import invoke
from helpers.folders import digests, make_base, make_expert, save, save_sharded
from helpers.object_store import BUCKET, SECRET, Proxy, client, upload


def _models(folder: Path, store: Any, prefix: str, layers: int = 4, width: int = 160) -> list[str]:
    """Put a base and two experts here and there, one expert sharded."""
    base = make_base(layers=layers, width=width)
    save(folder / "base", base)
    save(folder / "a", make_expert(base, 1))
    other = make_expert(base, 2)
    half = len(other) // 2
    shards = dict(list(other.items())[:half]), dict(list(other.items())[half:])
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_sharded(folder / "b", dict(zip(names, shards, strict=True)))
    for name in ("base", "a", "b"):
        upload(store, folder / name, f"{prefix}/{name}")
    return [f"s3://{BUCKET}/{prefix}/{name}" for name in ("base", "a", "b")]


def _weights(output: Path) -> dict[str, str]:
    return {n: d for n, d in digests(output).items() if n.endswith((".safetensors", "config.json"))}


def _merge_both(folder: Path, urls: list[str], **options: Any) -> tuple[Path, Path]:
    base, a, b = urls
    eutectic.merge(base=base, experts={"a": a, "b": b}, output=folder / "there", **options)
    local = {name: folder / name for name in ("a", "b")}
    eutectic.merge(base=folder / "base", experts=local, output=folder / "here", **options)
    return folder / "there", folder / "here"


@pytest.mark.parametrize(("method", "threads"), [("task_arithmetic", 3), ("ties", 2), ("iso_c", 1)])
def test_the_same_bytes_as_local_inputs(
    tmp_path: Path, store: Any, s3: Proxy, method: str, threads: int
) -> None:
    urls = _models(tmp_path, store, f"same-{method}")
    s3.clear()
    there, here = _merge_both(tmp_path, urls, method=method, threads=threads)
    assert _weights(there) == _weights(here)
    files = [p for n in ("base", "a", "b") for p in (tmp_path / n).iterdir()]
    least = sum(p.stat().st_size for p in files)
    listings = sum(r.received for r in s3.requests if "list-type" in r.path)
    # Each byte once; the least number of requests is one a file and one listing a folder.
    assert s3.bytes_down - listings == least
    assert len(s3.requests) < 60
    assert not s3.count("PUT")
    assert not s3.count("POST")


def test_headers_alone_are_read_for_a_plan(tmp_path: Path, store: Any, s3: Proxy) -> None:
    base = {f"layers.{i}.proj.weight": torch.randn(512, 1024) for i in range(6)}
    for name, tensors in (("base", base), ("a", make_expert(base, 1)), ("b", make_expert(base, 2))):
        upload(store, save(tmp_path / name, tensors), f"plan/{name}")
    s3.clear()
    urls = {name: f"s3://{BUCKET}/plan/{name}" for name in ("a", "b")}
    planned = eutectic.plan(base=f"s3://{BUCKET}/plan/base", experts=urls, method="iso_c")
    assert len(planned.tensors) == 6
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    # A listing, the configuration, the header, and the samples that tell whether experts are kin.
    assert s3.bytes_down < 3 * (HEADER + 0.02 * size)
    assert len(s3.requests) <= 3 * (3 + 24)


def test_a_recipe_lies_there_and_names_what_lies_beside_it(tmp_path: Path, store: Any) -> None:
    _models(tmp_path, store, "recipe")
    recipe = "base: base\nexperts:\n  a: a\n  b: ./b\nmethod: task_arithmetic\nscale: 0.5\n"
    store.put_object(Bucket=BUCKET, Key="recipe/merge.yaml", Body=recipe.encode())
    (tmp_path / "merge.yaml").write_text(recipe)
    eutectic.merge(f"s3://{BUCKET}/recipe/merge.yaml", output=tmp_path / "there")
    eutectic.merge(tmp_path / "merge.yaml", output=tmp_path / "here")
    assert _weights(tmp_path / "there") == _weights(tmp_path / "here")
    told = (tmp_path / "there" / "README.md").read_text()
    told += (tmp_path / "there" / "eutectic.json").read_text()
    assert SECRET not in told
    assert str(tmp_path) not in told


def test_a_recipe_with_a_path_that_leads_nowhere_names_its_line(tmp_path: Path, store: Any) -> None:
    _models(tmp_path, store, "lines")
    recipe = f"base: base\nexperts:\n  a: a\n  b: s3://{BUCKET}/lines/c\nmethod: task_arithmetic\n"
    store.put_object(Bucket=BUCKET, Key="lines/merge.yaml", Body=recipe.encode())
    with pytest.raises(RecipeError, match=r"line 4: .*s3://models/lines/c: there is nothing"):
        eutectic.merge(f"s3://{BUCKET}/lines/merge.yaml", output=tmp_path / "there")


def test_a_changed_object_is_read_anew(tmp_path: Path, store: Any) -> None:
    urls = _models(tmp_path, store, "changed")
    options = {"method": "task_arithmetic", "threads": 1}
    base, a, b = urls
    eutectic.merge(base=base, experts={"a": a, "b": b}, output=tmp_path / "one", **options)
    save(tmp_path / "a", make_expert(make_base(layers=4, width=160), 9), {"model_type": "other"})
    upload(store, tmp_path / "a", "changed/a")
    there, here = _merge_both(tmp_path, urls, **options)
    assert _weights(there) == _weights(here) != _weights(tmp_path / "one")
    store.delete_object(Bucket=BUCKET, Key="changed/a/config.json")
    assert not (view(a) / "config.json").exists()


@pytest.mark.parametrize("moment", [8, 13])
def test_an_object_that_changes_while_it_is_merged_is_refused(
    tmp_path: Path, store: Any, s3: Proxy, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranged_files, "_CACHE", ranged_files._Cache())
    base, a, b = _models(tmp_path, store, "meanwhile")
    s3.clear()
    changed: list[int] = []
    other = make_expert(make_base(layers=4, width=160), 7)
    body = (save(tmp_path / "other", other) / "model.safetensors").read_bytes()

    def change(number: int, request: Any) -> None:
        if number >= moment and not changed:
            changed.append(number)
            client(s3).put_object(Bucket=BUCKET, Key="meanwhile/a/model.safetensors", Body=body)

    s3.fault = change
    with pytest.raises(CheckpointError, match="changed while it was read"):
        eutectic.merge(
            base=base, experts={"a": a, "b": b}, method="task_arithmetic", output=tmp_path / "out"
        )
    assert changed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["503", "cut", "die", "stall"])
def test_faults_that_pass_are_waited_for(
    tmp_path: Path, store: Any, s3: Proxy, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(file_systems.TIMEOUT, "0.3")
    urls = _models(tmp_path, store, f"fault-{fault}", layers=2, width=64)
    s3.clear()
    s3.stall = 1.0
    every = 7 if fault == "stall" else 3
    s3.fault = lambda number, request: fault if number % every == 1 else None
    there, here = _merge_both(tmp_path, urls, method="task_arithmetic", threads=2)
    assert _weights(there) == _weights(here)


def test_a_store_that_stays_unwell_is_an_error_that_says_so(
    tmp_path: Path, store: Any, s3: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(file_systems.TRIES, "3")
    base, a, b = _models(tmp_path, store, "unwell", layers=2, width=64)
    options = {"base": base, "experts": {"a": a, "b": b}, "method": "task_arithmetic"}
    s3.fault = lambda number, request: "503" if "model.safetensors" in request.path else None
    with pytest.raises(EutecticError, match=r"does not answer.*after 3 tries \(ServiceUnavailable"):
        eutectic.merge(**options, output=tmp_path / "out")
    s3.fault = lambda number, request: None
    eutectic.merge(**options, output=tmp_path / "out")


def test_a_server_that_is_not_there(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv(file_systems.TRIES, "2")
    with pytest.raises(CheckpointError, match=r"s3://models/x: the store does not .*2 tries"):
        view(f"s3://{BUCKET}/x")


def test_a_bucket_that_is_not_there(store: Any) -> None:
    with pytest.raises(CheckpointError, match="there is no bucket 'nobucket'"):
        view("s3://nobucket/base")


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"])
def test_credentials_that_are_refused(
    store: Any, s3: Proxy, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    text = f"<Error><Code>{code}</Code><Message>{SECRET}</Message></Error>".encode()
    monkeypatch.setattr("helpers.object_store._SLOW_DOWN", text)
    s3.fault = lambda number, request: "403"
    with pytest.raises(CheckpointError) as caught:
        view(f"s3://{BUCKET}/base")
    assert f"refuses the credentials ({code})" in str(caught.value)
    assert "AWS_ACCESS_KEY_ID" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert len(s3.requests) == 1  # asking again would not help


def test_no_credentials(store: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="no credentials were found"):
        view(f"s3://{BUCKET}/base")


@pytest.mark.parametrize(
    ("scheme", "package"),
    [("s3", "s3fs"), ("gs", "gcsfs"), ("az", "adlfs"), ("hf", "huggingface_hub")],
)
def test_the_extra_is_named_where_it_is_missing(
    store: Any, monkeypatch: pytest.MonkeyPatch, scheme: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"'{package}'.*\n.*'eutectic\[remote\]'"):
        view(f"{scheme}://{BUCKET}/base")


def test_libraries_find_no_zeros_in_what_was_not_fetched(tmp_path: Path, store: Any) -> None:
    upload(store, save(tmp_path / "base", make_base()), "loud/base")
    file = view(f"s3://{BUCKET}/loud/base") / "model.safetensors"
    from safetensors import SafetensorError, safe_open

    with pytest.raises(SafetensorError):
        safe_open(file, "pt")
    assert storage_of(file).open(file).size == (tmp_path / "base" / file.name).stat().st_size


def test_a_torch_pickle_is_fetched_whole(tmp_path: Path, store: Any) -> None:
    base = make_base()
    (tmp_path / "base").mkdir()
    torch.save(base, tmp_path / "base" / "pytorch_model.bin")
    (tmp_path / "base" / "config.json").write_text("{}")
    save(tmp_path / "a", make_expert(base, 1))
    save(tmp_path / "b", make_expert(base, 2))
    for name in ("base", "a", "b"):
        upload(store, tmp_path / name, f"pickle/{name}")
    urls = [f"s3://{BUCKET}/pickle/{name}" for name in ("base", "a", "b")]
    there, here = _merge_both(tmp_path, urls, method="task_arithmetic")
    assert _weights(there) == _weights(here)


def test_a_checkpoint_one_level_down_and_a_file_by_its_name(tmp_path: Path, store: Any) -> None:
    base = make_base()
    for name, tensors in (("base", base), ("a/final", make_expert(base, 1))):
        upload(store, save(tmp_path / name, tensors), f"down/{name}")
    b = save(tmp_path / "b", make_expert(base, 2))
    upload(store, b, "down/b")
    url = f"s3://{BUCKET}/down"
    experts = {"a": f"{url}/a", "b": f"{url}/b/model.safetensors"}
    options = {"method": "task_arithmetic", "threads": 1}
    told = eutectic.merge(base=f"{url}/base", experts=experts, output=tmp_path / "one", **options)
    assert any(f"{url}/a/final" in note for note in told.notes)
    local = {"a": tmp_path / "a", "b": b / "model.safetensors"}
    eutectic.merge(base=tmp_path / "base", experts=local, output=tmp_path / "two", **options)
    assert _weights(tmp_path / "one") == _weights(tmp_path / "two")


def test_file_urls_are_paths(tmp_path: Path) -> None:
    base = make_base()
    paths = {"base": save(tmp_path / "base", base), "a": save(tmp_path / "a", make_expert(base, 1))}
    eutectic.merge(
        base=paths["base"].as_uri(),
        experts={"a": paths["a"].as_uri()},
        method="task_arithmetic",
        output=tmp_path / "out",
    )
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_command_line_takes_urls(tmp_path: Path, store: Any) -> None:
    base, a, b = _models(tmp_path, store, "cli", layers=2, width=64)
    experts = [f"a={a}", f"b={b}"]
    made = ["--base", base, "-m", "task_arithmetic", *experts]
    for words in (
        ["plan", *made],
        ["merge", *made, "-o", tmp_path / "out"],
        ["check", a, "--base", base],
        ["inspect", "--base", base, *experts],
    ):
        told = invoke(*words)
        assert told.code == 0, told.err
        assert SECRET not in told.out + told.err
        assert str(tmp_path / "cache") not in told.out + told.err
    told = invoke("merge", *made, "--sweep", "0,1", "-o", f"s3://{BUCKET}/cli/sweep")
    assert told.code == 0, told.err
    assert f"s3://{BUCKET}/cli/sweep/0" in told.out
    assert str(tmp_path / "cache") not in told.out
    told = invoke("plan", "--base", "s3://u:hunter2@models/base", "-m", "average", *experts)
    assert told.code == 2
    assert "hunter2" not in told.err
    told = invoke("plan", "--base", f"s3://{BUCKET}/cli/none", "-m", "average", *experts)
    assert told.code == 2
    assert f"s3://{BUCKET}/cli/none: there is nothing of that name" in told.err


def test_an_upper_room_that_writes_beside_its_input_is_not_misled(
    tmp_path: Path, store: Any
) -> None:
    """A large file of unknown kind goes along whole, not as what stands for it here."""
    folder = save(tmp_path / "base", make_base())
    (folder / "table.csv").write_text("a,b\n" * 1000)
    save(tmp_path / "a", make_expert(make_base(), 1))
    for name in ("base", "a"):
        upload(store, tmp_path / name, f"aside/{name}")
    url = f"s3://{BUCKET}/aside"
    eutectic.merge(
        base=f"{url}/base",
        experts={"a": f"{url}/a"},
        method="task_arithmetic",
        output=tmp_path / "out",
    )
    assert (tmp_path / "out" / "table.csv").read_text() == "a,b\n" * 1000


def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, store: Any) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    index = {"weight_map": {"w": "../../other/x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    upload(store, folder, "bad/base")
    with pytest.raises(RecipeError, match="not a plain name"):
        eutectic.plan(
            base=f"s3://{BUCKET}/bad/base",
            experts={"a": f"s3://{BUCKET}/bad/base"},
            method="task_arithmetic",
        )


def test_a_file_that_is_named_says_nothing_of_the_folders_beside_it(
    tmp_path: Path, store: Any
) -> None:
    upload(store, save(tmp_path / "base", make_base()), "beside/base")
    file = tmp_path / "base" / "model.safetensors"
    upload(store, file, "beside/a.safetensors")
    folder = view(f"s3://{BUCKET}/beside/base")
    assert view(f"s3://{BUCKET}/beside/a.safetensors").exists()
    assert (folder / "config.json").exists()
    assert (folder / "model.safetensors").exists()
    store.put_object(Bucket=BUCKET, Key="beside/b.yaml", Body=b"x")
    view(f"s3://{BUCKET}/beside/b.yaml")
    store.delete_object(Bucket=BUCKET, Key="beside/b.yaml")
    assert not view(f"s3://{BUCKET}/beside/b.yaml").exists()
    assert (folder / "config.json").exists()
    store.delete_object(Bucket=BUCKET, Key="beside/a.safetensors")
    assert not view(f"s3://{BUCKET}/beside/a.safetensors").exists()


@pytest.mark.parametrize("key", ["merge.yaml", "plain", "folder/plain"])
def test_a_recipe_at_the_top_of_a_bucket_or_without_an_ending(
    tmp_path: Path, store: Any, key: str
) -> None:
    base = make_base()
    paths = [save(tmp_path / n, make_expert(base, i)) for i, n in enumerate(("base", "a"))]
    recipe = f"base: {paths[0]}\nexperts: {{a: {paths[1]}}}\nmethod: task_arithmetic\n"
    store.put_object(Bucket=BUCKET, Key=key, Body=recipe.encode())
    eutectic.merge(f"s3://{BUCKET}/{key}", output=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
