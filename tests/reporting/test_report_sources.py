"""A report of real merges, plans, inspections and statistics: right numbers, from every source."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import eutectic
from eutectic.errors import MissingExtraError, RequestError
from eutectic.reporting.page.layer_maps import in_order, place_of
from eutectic.reporting.page.page_record import Report, schema_text
from helpers.cli import invoke
from helpers.folders import load, make_base, make_expert
from helpers.merging import save_inputs
from helpers.reports import HOSTILE, curve, hostile_sources, results, routed

SCHEMA = Path(__file__).parents[2] / "docs" / "schemas" / "report-1.json"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, two experts, a merge by iso_c, its inspection and a plan."""
    folder = tmp_path_factory.mktemp("world")
    base = make_base()
    experts = {"a": make_expert(base, 1), "b": make_expert(base, 2)}
    inputs = save_inputs(folder, base, experts)
    eutectic.merge(**inputs, method="iso_c", scale=0.7, output=folder / "merged")
    found = eutectic.inspect(
        **inputs, merged={"iso_c": folder / "merged"}, output=folder / "inspection.json"
    )
    return {"folder": folder, "inputs": inputs, "inspection": found}


def test_the_schema_is_published():
    assert SCHEMA.read_text(encoding="utf-8") == schema_text()


def test_a_merged_folder(world):
    merged = world["folder"] / "merged"
    report = eutectic.report(merged)
    made = json.loads((merged / "eutectic.json").read_text(encoding="utf-8"))
    (merge,) = report.merges
    assert (merge.method, merge.scale, merge.planned) == ("iso_c", 0.7, False)
    assert merge.growth == made["norms"]["ratio"]
    assert [p.role for p in merge.parents] == ["base", "a", "b"]
    assert {t.name: (t.treatment, t.method, t.sha256) for t in report.tensors} == {
        n: (t["treatment"], t["method"], t["sha256"]) for n, t in made["tensors"].items()
    }
    assert "scale: 0.7" in merge.recipe and str(world["folder"]) not in report.json_text()
    size = sum(p.stat().st_size for p in merged.rglob("*") if p.is_file())
    assert [c.value for c in report.costs] == [size]
    assert "evaluate" in [f.kind for f in report.verdict]


def test_maps_and_spectra_are_those_of_the_inspection(world):
    found = world["inspection"]
    report = eutectic.report(world["folder"] / "inspection.json")
    assert report.maps == eutectic.report(found).maps  # the object says the same
    (layers,) = report.maps
    assert (layers.rows, layers.columns) == (["layers.0", "layers.1"], ["proj"])
    measures = {m.key: m for m in layers.measures}
    base, merged = load(world["folder"] / "base"), load(world["folder"] / "merged")
    experts = [load(world["folder"] / n) for n in "ab"]
    for i, own in enumerate(found.layers):
        name = own.name
        deltas = [e[name] - base[name] for e in experts]
        growth = float((merged[name] - base[name]).norm()) / (
            sum(float(d.norm()) for d in deltas) / 2
        )
        assert measures["growth iso_c"].values[i][0] == pytest.approx(growth, rel=1e-3)
        cosine = float(torch.nn.functional.cosine_similarity(*map(torch.flatten, deltas), dim=0))
        assert measures["cosine"].values[i][0] == pytest.approx(cosine, abs=1e-4)
        ratio = sum(own.alignment["iso_c"].ratio.values()) / 2
        assert measures["sar iso_c"].values[i][0] == pytest.approx(ratio, rel=1e-3)
    first = report.spectra[0]
    line = next(li for li in first.lines if li.name == "a")
    singular = torch.linalg.svdvals(experts[0][first.layer] - base[first.layer])
    assert line.values == pytest.approx([float(singular[p - 1]) for p in line.positions], rel=1e-3)
    table = next(p for p in report.pairs if p.key == "cosine")
    assert table.values[0][0] is None  # an expert with itself says nothing
    assert table.values[0][1] == pytest.approx(found.summary.interference.cosine[0][1], rel=1e-3)


def test_plans_as_files_objects_and_recipes(world):
    inputs = world["inputs"]
    plan = eutectic.plan(**inputs, method="iso_c", scale=2.0)
    recipe = world["folder"] / "plan-me.yaml"
    experts = "".join(f"  {n}: {p}\n" for n, p in inputs["experts"].items())
    recipe.write_text(f"base: {inputs['base']}\nmethod: iso_c\nscale: 2.0\nexperts:\n{experts}")
    answer = invoke("plan", recipe, "--json")
    kept = world["folder"] / "plan.json"
    kept.write_text(json.dumps(json.loads(answer.out)))
    for source in (plan, recipe, kept):
        report = eutectic.report(source)
        (merge,) = report.merges
        assert merge.planned and merge.scale == 2.0
        assert len(report.tensors) == len(plan.tensors)
        assert report.tensors[0].shape is not None
        assert {c.unit for c in report.costs} == {"bytes", "s"}
        assert "merge" in [f.kind for f in report.verdict if f.level == "next"]


def test_statistics_and_what_they_are_of(tmp_path):
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
    file = tmp_path / "a.stats.safetensors"
    eutectic.collect(layer, [{"input": torch.ones(3, 4)}], output=file)
    report = eutectic.report(tmp_path / "a.stats.safetensors")
    (row,) = report.data
    assert (row.name, row.examples) == ("a", 3)
    assert row.use == ("statistics: gram, pooled_gram, input_sum, pooled_sum of 1 parameter")
    assert report.costs[0].value == (tmp_path / "a.stats.safetensors").stat().st_size


def test_how_statistics_keep_inputs_is_on_every_page(tmp_path):
    layers = torch.nn.Sequential(torch.nn.Linear(40, 3), torch.nn.Linear(3, 3))
    generator = torch.Generator().manual_seed(0)
    rows = [{"input": torch.randn(90, 40, generator=generator)}]
    held = eutectic.collect(layers, rows, output=tmp_path / "a.stats.safetensors", rank=5)
    report = eutectic.report(tmp_path / "a.stats.safetensors")
    wide, small = report.grams
    assert (wide.layers, wide.width, wide.tokens, wide.kept) == (
        ["0.weight"], 40, 90, "5 directions",
    )  # fmt: skip
    read = held["0.weight"]
    rest, F = float(read.gram_diagonal.sum()), float(read.gram_factor.square().sum())
    assert wide.beside == pytest.approx(rest / (rest + F), abs=1e-6)
    assert wide.nbytes == 4 * (5 * 40 + 40)
    assert (small.kept, small.beside) == ("whole", None)
    share = f"{100 * wide.beside:.2g} %"
    markdown = report.markdown()
    assert f"| a | 0.weight | 40 | 90 | 5 directions | {share} |" in markdown
    page = report.html()
    assert "How inputs are kept" in page and share in page and "5 directions" in page


def test_a_folder_of_several_merges_and_files(world, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results({"m": {"a": 1}}, {"a": 1})))
    (tmp_path / "tuned.json").write_text(json.dumps(curve({0.1: 1, 0.2: 2, 0.4: 1}, 0.2)))
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "routed.json").write_text(json.dumps(routed(["a", "b"])))
    report = eutectic.report(tmp_path)
    assert [s.kind for s in report.sources] == ["routed model", "results", "search for α"]
    named = eutectic.report(f"mine={tmp_path / 'tuned.json'}", tmp_path / "tuned.json")
    assert [c.name for c in named.curves] == ["mine", "tuned"]
    twice = eutectic.report(tmp_path / "tuned.json", tmp_path / "tuned.json")
    assert [c.name for c in twice.curves] == ["tuned", "tuned (2)"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{}", "is nothing that a report can be made of"),
        ("[1]", "must hold a JSON object"),
        ("{", "not valid JSON"),
        ('{"results": 1, "tasks": [], "means": []}', "looks like results, but"),
        ('{"points": [{}], "objective": "x", "scale": 1}', "looks like a tuning record, but"),
        ('{"tensors": [], "cost": 1, "merged_by": {}}', "looks like a plan, but"),
        ('{"layers": [], "summary": 1, "experts": {}}', "looks like an inspection, but"),
    ],
)
def test_damaged_sources_are_refused_by_name(tmp_path, content, what):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(RequestError, match=what) as told:
        eutectic.report(path)
    assert "x.json" in str(told.value)


def test_requests_that_make_no_sense(tmp_path):
    with pytest.raises(RequestError, match="nothing to report on"):
        eutectic.report()
    with pytest.raises(RequestError, match="no such file or folder"):
        eutectic.report(tmp_path / "absent")
    with pytest.raises(RequestError, match="holds nothing to report on"):
        eutectic.report(tmp_path)
    with pytest.raises(RequestError, match="no report can be made of int"):
        eutectic.report(3)
    told = results({"m": {"a": 1}}, {"a": 1})
    with pytest.raises(RequestError, match="html, md or json; got 'htlm'. Did you mean 'html'"):
        eutectic.report(told, format="htlm")
    with pytest.raises(RequestError, match="ends like html, and the format asked for is md"):
        eutectic.report(told, output=tmp_path / "a.html", format="md")
    with pytest.raises(RequestError, match="no store of that kind"):
        eutectic.report(told, output="ftp://b/a.html")
    with pytest.raises(RequestError, match="in a folder that exists"):
        eutectic.report(told, output=tmp_path / "absent" / "a.html")


@pytest.mark.parametrize("name", ["a.html", "a.md", "a.json", "noending"])
def test_a_report_replaces_reports_only(tmp_path, name):
    told, path = results({"m": {"a": 1}}, {"a": 1}), tmp_path / name
    eutectic.report(told, output=path)
    first = path.read_bytes()
    eutectic.report(told, output=path)
    assert path.read_bytes() == first  # nothing depends on when it was made
    path.write_text("mine")
    with pytest.raises(RequestError, match="something else"):
        eutectic.report(told, output=path)
    assert path.read_text() == "mine"


def test_json_is_the_record(tmp_path):
    report = eutectic.report(results({"m": {"a": 0.5}}, {"a": 1}), output=tmp_path / "r.json")
    assert Report.model_validate_json((tmp_path / "r.json").read_text(encoding="utf-8")) == report


def test_html_needs_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("eutectic.reporting.page.html_page.find_spec", lambda name: None)
    told = results({"m": {"a": 1}}, {"a": 1})
    with pytest.raises(MissingExtraError, match=re.escape("eutectic[report]")):
        eutectic.report(told, output=tmp_path / "r.html")
    assert eutectic.report(told, output=tmp_path / "r.md").title  # needs no template


def test_names_of_layers_and_kinds():
    names = ["lm_head.weight", "l.10.b", "l.9.b", "embed_tokens.weight", "l.9.a"]
    assert in_order(names) == [names[3], "l.9.a", "l.9.b", "l.10.b", "lm_head.weight"]
    assert place_of("model.layers.3.mlp.experts.5.w1.weight") == (
        "model.layers.3", "mlp.experts.*.w1",
    )  # fmt: skip
    assert place_of("h.0.attn.c_attn.weight[1]") == ("h.0", "attn.c_attn[1]")
    assert place_of("h.0.attn.c_attn.weight[1]", whole=False) == ("h.0", "attn.c_attn")


class _Elements(HTMLParser):
    """Names and attributes of all elements, and the texts of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def elements(html: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = _Elements()
    parser.feed(html)
    return parser.found


def test_nothing_of_a_hostile_source_is_markup(tmp_path):
    report = eutectic.report(*hostile_sources(tmp_path), title=HOSTILE[4])
    html = report.html()
    plain = eutectic.report(results({"m": {"a": 1, "b": 1}}, {"a": 1, "b": 1})).html()
    kinds = {name for name, _ in elements(html)}
    assert kinds <= {name for name, _ in elements(plain)} | {
        "article", "dl", "dt", "dd", "pre", "code", "svg", "path", "circle", "details", "summary",
        "figure", "figcaption", "text", "line", "title", "input", "output", "ol", "optgroup", "h4",
        "br", "wbr", "b",
    }  # fmt: skip
    assert "img" not in kinds
    for name, attributes in elements(html):
        assert not any(key.startswith("on") for key in attributes), (name, attributes)
        link = attributes.get("href") or attributes.get("src") or ""
        assert link.startswith(("#", "data:,")) or not link
    assert html.count("<script") == 3  # two of the page's own, and its data
    assert "\u202e" not in html and "\u2066" not in html and "\u2028" not in html
    data = re.search(r'id="page-data">(.*?)</script>', html, re.S)
    assert data is not None and json.loads(data[1]) is not None
    # The recipe stands as it is, between fences that it cannot end; all else is escaped.
    told = re.sub(r"^(`{3,})yaml$.*?^\1$", "", report.markdown(), flags=re.S | re.M)
    assert "<script" not in told and "<img" not in told and "[x](" not in told


def test_the_policy_allows_the_page_alone():
    html = eutectic.report(results({"m": {"a": 1}}, {"a": 1})).html()
    policy = next(a["content"] for n, a in elements(html) if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "http" not in policy
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        import base64
        import hashlib

        allowed = next(part for part in policy.split("; ") if part.startswith(rule))
        for text in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S):
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in allowed
    assert not re.search(r'(src|href)="(https?:)?//', html)


def test_no_private_path_is_published(world, tmp_path):
    report = eutectic.report(
        world["folder"] / "merged", world["folder"] / "inspection.json", world["inputs"]["base"]
        and results({"m": {"a": 1}}, {"a": 1}, notes=[f"read {tmp_path}/x.json, see https://a.b/c"]),
    )  # fmt: skip
    for text in (report.html(), report.markdown(), report.json_text()):
        assert str(world["folder"]) not in text and str(tmp_path) not in text
    assert "read x.json, see https://a.b/c" in report.json_text()


def test_the_command_line(world, tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    answer = invoke("report", world["folder"] / "merged", "-o", page, "--title", "Mine")
    assert answer.code == 0 and f"written {page}" in answer.out
    assert "<title>Mine</title>" in page.read_text(encoding="utf-8")
    answer = invoke("report", world["folder"] / "merged", "-o", tmp_path / "r.json", "--json")
    assert json.loads(answer.out)["merges"][0]["method"] == "iso_c"
    monkeypatch.chdir(tmp_path)
    assert "written report.md" in invoke("report", world["folder"] / "merged", "-f", "md").out
    answer = invoke("report", world["folder"] / "merged", "-f", "pdf")
    assert answer.code == 2 and "got 'pdf'" in answer.err
    assert invoke("report").code == 2
    assert invoke("report", tmp_path / "absent", "-o", page).code == 2


def test_a_merge_writes_its_page(world, tmp_path):
    inputs = world["inputs"]
    experts = [f"{n}={p}" for n, p in inputs["experts"].items()]
    words = ["merge", "--base", inputs["base"], "-m", "iso_c", "-o", tmp_path / "m", *experts]
    answer = invoke(*words, "--report")
    assert answer.code == 0 and f"page {tmp_path / 'm.html'}" in answer.out
    assert "iso_c merged" in (tmp_path / "m.html").read_text(encoding="utf-8")
    (tmp_path / "n.html").write_text("mine")
    words[6] = tmp_path / "n"
    answer = invoke(*words, "--report")
    assert answer.code == 2 and not (tmp_path / "n").exists()
    answer = invoke(*words[:6], tmp_path / "s", *experts, "--sweep", "0,1", "--report")
    assert answer.code == 0
    page = (tmp_path / "s.html").read_text(encoding="utf-8")
    assert "0: iso_c merged" in page and "1: iso_c merged" in page


def test_a_comparison_brings_its_results_curves_and_notes(tmp_path):
    names = ["iso_c@validation", "ties@default"]
    told = results(dict(zip(names, [{"a": 0.7}, {"a": 0.6}], strict=True)), {"a": 0.8})
    rows = [
        {"name": names[0], "method": "iso_c", "search": "validation", "scale": 0.5, "error": None},
        {"name": names[1], "method": "ties", "search": "default", "scale": 1.0, "error": None},
        {"name": "dare@default", "method": "dare", "scale": None, "error": "NaN in its outputs"},
    ]
    table = {"schema_version": 1, "best": names[0], "rows": rows, "notes": ["a note"],
             "left_out": {"esm": "no statistics"}}  # fmt: skip
    folder = tmp_path / "comparison"
    (folder / "candidates").mkdir(parents=True)
    (folder / "comparison.json").write_text(json.dumps(table))
    (folder / "results.json").write_text(json.dumps(told))
    for name, search in zip(names, [curve({0.1: 0.2, 0.5: 0.4, 1.0: 0.3}, 0.5), None], strict=True):
        kept = {"identity": "i", "scale": 0.5, "fingerprint": "f", "search": search}
        (folder / "candidates" / f"{name}.json").write_text(json.dumps(kept))
    report = eutectic.report(folder)
    assert [(c.name, c.chosen) for c in report.curves] == [(names[0], 0.5)]
    (scores,) = report.scores
    assert [m.note for m in scores.models if m.role == "model"] == [
        "α = 0.5, by validation", "α = 1, by default",
    ]  # fmt: skip
    assert scores.notes == [
        "a note", "dare@default has no figures: NaN in its outputs",
        "esm was left out: no statistics",
    ]  # fmt: skip


def test_what_returned_objects_bring(world):
    """A merge's report has its times, a search its curve."""
    from eutectic.tuning.entry import TuneReport

    inputs = world["inputs"]
    made = eutectic.merge(**inputs, method="ties", output=world["folder"] / "object")
    costs = {c.what: c.value for c in eutectic.report(made).costs}
    assert costs["time of the merge"] == made.seconds
    searched = curve({0.1: 0.2, 0.5: 0.4, 1.0: 0.3}, 0.5)
    del searched["method"]
    tuned = TuneReport("ties", 0.5, searched, ())
    (own,) = eutectic.report(tuned).curves
    assert (own.name, own.chosen) == ("ties", 0.5)


def test_a_notebook_shows_the_page():
    report = eutectic.report(results({"m<b>": {"a": 1}}, {"a": 1}))
    shown = report._repr_html_()
    assert shown.startswith("<iframe") and "<b>" not in shown
    assert "m<b> reaches 100.0 %" in repr(report)
