"""What the report says of numbers whose meaning is known."""

from __future__ import annotations

import json

import pytest

import eutectic
from helpers.reports import curve, results, routed

EXPERTS = {"a": 0.8, "b": 0.5}
BASE = {"a": 0.6, "b": 0.4}


def kinds(report, level=None):
    return [f.kind for f in report.verdict if level in (None, f.level)]


def finding(report, kind):
    (found,) = [f for f in report.verdict if f.kind == kind]
    return found


def test_the_best_model_and_what_is_level_with_it():
    models = {
        "low": {"a": 0.64, "b": 0.40},
        "near": {"a": 0.76, "b": 0.46},
        "top": {"a": 0.76, "b": 0.476},
    }
    told = results(
        models, EXPERTS, BASE,
        differences=[("near", "top", -0.01, 0.02), ("low", "top", -0.15, 0.02),
                     ("top", "near", 0.01, 0.02), ("base", "top", -0.2, 0.01)],
    )  # fmt: skip
    report = eutectic.report(told)
    (scores,) = report.scores
    assert [m.name for m in scores.models] == ["base", "experts", "top", "near", "low"]
    assert scores.best == "top" and scores.by == "share"
    best = next(m for m in scores.models if m.name == "top")
    assert best.share.value == pytest.approx((0.76 / 0.8 + 0.476 / 0.5) / 2)
    assert {m.name: m.level for m in scores.models if m.role == "model"} == {
        "top": False, "near": True, "low": False,
    }  # fmt: skip
    headline = finding(report, "best").text
    assert headline.startswith("top is the best of 3 models with 95.1 % [93.1, 97.1] of the")
    assert "61.8 % [59.8, 63.8] (base 50.0 %, experts 65.0 %), on 2 tasks" in headline
    assert finding(report, "level").subject == ("near",)
    worst = finding(report, "worst_task")
    assert worst.numbers["share"] == pytest.approx(0.95)
    assert worst.text.startswith("The weakest task of top is a, with 95.0 %")


def test_sentences_of_several_results_name_their_model_and_none_stands_twice():
    one = results({"x": {"a": 0.7, "b": 0.39}, "w": {"a": 0.5, "b": 0.2}}, EXPERTS, BASE)
    other = results({"y": {"a": 0.81, "b": 0.3}}, EXPERTS, BASE)
    report = eutectic.report(one, other)
    assert len(report.scores) == 2
    told = [f.text for f in report.verdict]
    assert len(set(told)) == len(told)
    assert not [text for text in told if text.startswith("It") or " it is" in text]
    first, second = (scores.name for scores in report.scores)
    ahead = f"x is ahead of every other model of {first}; the closest, w"
    assert any(t.startswith(ahead) for t in told)
    assert told[0].startswith(f"{first}: x is the best of 2 models with")
    assert told[1].startswith(f"{second}: y reaches")
    assert any(t.startswith("On b, y is below the base itself") for t in told)
    assert "y is above the task's own expert on one task (a)." in told
    assert {f.text[:9] for f in report.verdict if f.kind == "worst_task"} == {"The weake"}
    assert kinds(report).count("collect") == 1
    advice = [f.text for f in report.verdict if f.kind == "route"]
    assert [text.partition(":")[0] for text in advice] == [
        "x lost more than 10 % of the expert on a, b",
        "y lost more than 10 % of the expert on b",
    ]


def test_warnings_of_merges_are_in_the_verdict(tmp_path):
    for name, more in (("iso", []), ("ties", ["warning: b", "warning: c", "warning: d"])):
        made = {"notes": ["plain", "warning: a stranger", *more]}
        made |= {"eutectic": "0", "method": name, "tensors": {}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "eutectic.json").write_text(json.dumps(made))
    report = eutectic.report(tmp_path / "iso", tmp_path / "ties")
    told = [f for f in report.verdict if f.kind == "warning"]
    assert [f.text for f in told] == ["iso, ties: a stranger", "ties: b", "ties: c"]
    assert {f.level for f in told} == {"bad"}
    assert finding(report, "more_warnings").text == (
        "1 more warning stands under “Where it comes from”."
    )


def test_a_model_that_is_ahead_of_all_others():
    models = {"x": {"a": 0.5, "b": 0.3}, "y": {"a": 0.8, "b": 0.55}}
    told = results(models, EXPERTS, BASE, differences=[("x", "y", -0.4, 0.05)])
    report = eutectic.report(told)
    assert finding(report, "ahead").text == (
        "It is ahead of every other model; the closest, x, is 40.0 points [35.0, 45.0] behind."
    )
    assert finding(report, "above_expert").subject == ("b",)
    assert "below_base" not in kinds(report)
    # A lead that one digit would show as none has digits of its own.
    told = results(models, EXPERTS, BASE, differences=[("x", "y", -0.0002, 0.0001)])
    text = finding(eutectic.report(told), "ahead").text
    assert text.endswith("x, is 0.02 points [0.01, 0.03] behind.")


def test_a_model_that_lacks_nothing_has_no_weakest_task():
    report = eutectic.report(results({"x": {"a": 0.8, "b": 0.55}}, EXPERTS, BASE))
    assert "worst_task" not in kinds(report)


def test_a_loss_below_the_base_and_a_poor_task_are_told():
    report = eutectic.report(results({"x": {"a": 0.7, "b": 0.3}}, EXPERTS, BASE))
    assert finding(report, "below_base").subject == ("b",)
    worst = finding(report, "worst_task")
    assert worst.subject == ("b",) and worst.level == "bad"
    assert {"route", "collect", "tune_best"} == set(kinds(report, "next"))


def test_a_loss_within_the_interval_is_no_loss_below_the_base():
    report = eutectic.report(results({"x": {"a": 0.7, "b": 0.39}}, EXPERTS, BASE))
    assert finding(report, "perhaps_below_base").subject == ("b",)
    assert "below_base" not in kinds(report)


def test_a_searched_alpha_is_not_searched_again():
    told = results({"x": {"a": 0.79, "b": 0.5}}, EXPERTS, BASE)
    assert "tune_best" in kinds(eutectic.report(told))
    searched = curve({0.1: 0.2, 0.5: 0.4, 1.0: 0.3}, 0.5, method="x")
    assert "tune_best" not in kinds(eutectic.report(told, searched))


def test_without_paired_differences_the_intervals_decide():
    # Half widths of 0.02 each: a difference of 0.02 holds 0 and one of 0.2 does not.
    models = {"x": {"a": 0.8, "b": 0.5}, "y": {"a": 0.784, "b": 0.49}, "z": {"a": 0.64, "b": 0.4}}
    (scores,) = eutectic.report(results(models, EXPERTS, BASE)).scores
    by_name = {m.name: m for m in scores.models}
    assert by_name["y"].level and not by_name["z"].level
    assert not by_name["y"].paired
    half = (2 * 0.02**2) ** 0.5
    assert by_name["y"].behind.interval == pytest.approx((-0.02 - half, -0.02 + half))


def test_where_lower_is_better_the_lowest_is_best():
    models = {"x": {"a": 12.0, "b": 9.0}, "y": {"a": 10.5, "b": 8.5}}
    told = results(models, {"a": 10.0, "b": 8.0}, {"a": 20.0, "b": 15.0}, metric="perplexity",
                   higher=False)  # fmt: skip
    report = eutectic.report(told)
    assert report.scores[0].best == "y"
    assert "lower is better" in finding(report, "best").text
    assert "below_base" not in kinds(report)


def test_without_experts_models_are_ranked_by_their_mean():
    told = results({"x": {"a": 0.5, "b": 0.3}, "y": {"a": 0.8, "b": 0.5}}, EXPERTS, BASE)
    for row in [*told["results"], *told["means"]]:
        row |= {"normalized": None, "normalized_interval": None, "nai": None, "nai_interval": None}
    (scores,) = eutectic.report(told).scores
    assert (scores.by, scores.best) == ("mean", "y")


def test_results_of_base_and_experts_alone():
    report = eutectic.report(results({}, EXPERTS, BASE))
    assert kinds(report, "headline") == ["no_model"]
    assert "compare" in kinds(report, "next")


def test_an_alpha_at_the_edge_is_told_and_a_wider_range_named():
    report = eutectic.report(curve({0.1: 0.5, 0.5: 0.7, 1.0: 0.8}, 1.0))
    assert report.curves[0].at_edge
    assert finding(report, "widen").command == "eutectic tune recipe.yaml --range 1:10"
    report = eutectic.report(curve({0.1: 0.5, 0.5: 0.9, 1.0: 0.8}, 0.5))
    assert not report.curves[0].at_edge and "edge" not in kinds(report)


def test_many_searches_are_told_together(tmp_path):
    """Of each kind up to three are told one by one; the same advice is given once."""
    inside, edge = {0.1: 0.5, 0.5: 0.9, 1.0: 0.8}, {0.1: 0.5, 0.5: 0.7, 1.0: 0.8}
    closed = {"search": "norm", "scale": 0.4, "method": "iso_c", "objective": "", "points": []}
    for count, wanted in ((3, ["edge", "scale", "closed_form"]), (4, ["edges", "scales"])):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            for name, made in (("e", curve(edge, 1.0)), ("i", curve(inside, 0.5)), ("c", closed)):
                (folder / f"{name}{number}.json").write_text(json.dumps(made))
        report = eutectic.report(folder)
        found = kinds(report)
        wanted = wanted if count == 3 else [*wanted, "closed_forms"]
        assert [found.count(kind) for kind in wanted] == [3 if count == 3 else 1] * 3
        assert found.count("widen") == 1
        assert all(name in finding(report, "widen").text for name in ("e0", "e1", "e2"))
    told = finding(report, "edges")
    assert told.numbers["count"] == 4 and "e3 α = 1" in told.text
    assert "i3 α = 0.5" in finding(report, "scales").text
    assert "c3 α = 0.4 (norm)" in finding(report, "closed_forms").text


def test_a_searched_parameter_is_not_called_alpha():
    made = {**curve({0.1: 0.5, 0.5: 0.7, 1.0: 0.8}, 1.0), "over": "tau"}
    report = eutectic.report(made)
    assert "tau = 1 is the largest" in finding(report, "edge").text
    assert finding(report, "widen").command == "eutectic tune recipe.yaml --over tau --range 1:10"
    assert "Search tau of" in finding(report, "widen").text
    assert "α = " not in report.html() and "tau = 1" in report.html()
    assert "(tau)" in report.markdown()


def test_weak_routers_are_told(tmp_path):
    import json

    folder = tmp_path / "routed"
    folder.mkdir()
    weak = routed(["a", "b", "c", "d"], decisions={"a": 0.9, "b": 0.9, "c": 0.9, "d": 0.3})
    (folder / "routed.json").write_text(json.dumps(weak))
    report = eutectic.report(folder)
    told = finding(report, "routing")
    assert told.level == "bad" and told.subject == ("routed", "d")
    assert told.numbers["mean"] == pytest.approx(0.75)
    # They were measured on data of theirs: to ask for such data again would be of no use.
    assert kinds(report, "next") == ["oracle"]
    (folder / "routed.json").write_text(
        json.dumps(weak | {"quality": {**weak["quality"], "measured": False}})
    )
    assert kinds(eutectic.report(folder), "next") == ["router"]
    (own,) = report.routing
    assert [d.block for d in own.depth] == [f"encoder.layer.{i}" for i in range(4)]
    assert own.depth[3].shares["a"] == pytest.approx(0.8)
    (layers,) = report.maps
    assert layers.measures[0].values[0] == [50.0]


def test_who_has_data_is_told_to_calibrate_and_not_to_collect():
    told = results({"regmean@default": {"a": 0.7, "b": 0.45}}, EXPERTS, BASE)
    following = kinds(eutectic.report(told), "next")
    assert "calibrate" in following and "collect" not in following
    told = results({"iso_c@default": {"a": 0.7, "b": 0.45}}, EXPERTS, BASE)
    following = kinds(eutectic.report(told), "next")
    assert "collect" in following and "calibrate" not in following
