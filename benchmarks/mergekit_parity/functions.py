"""Merge methods against mergekit's own, function by function, on random tensors.

Run in an environment that has mergekit (0.1.5), with this package on the path:

    python -m venv mk && mk/bin/pip install mergekit==0.1.5
    PYTHONPATH=src mk/bin/python benchmarks/mergekit_parity/functions.py

What draws at random is compared in distribution: over many draws of one entry, the share that is
kept and the mean. Everything else must agree in every tensor to a relative error of 1e-5.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
from mergekit.merge_methods import merge_tensors

from eutectic.methods import get_method
from eutectic.methods.matrices import run_method
from eutectic.methods.registry import Context
from eutectic.recipes.mergekit_methods import METHODS, Translated, translate

SHAPES = [(), (1,), (7,), (64,), (1, 5), (5, 1), (33, 20), (64, 128), (4, 6, 5)]
BOUND = 1e-5
DRAWS = 400

THREE = ((0.5, 1.25, 0.25), (1.0, 1.0, 1.0), (0.7, -0.4, 0.9))
DENSITIES = ((0.3, 0.6, 0.9), (1.0, 1.0, 1.0), (0.05, 0.05, 0.0))


def _weights(values, **more):
    each = [{"weight": w} for w in values]
    for name, own in more.items():
        each = [{**e, name: v} for e, v in zip(each, own, strict=True)]
    return each


def cases(name):
    """Yield (shared parameters, each model's parameters, whether there is a base)."""
    if name == "linear":
        for w, normalize in itertools.product(THREE, (True, False)):
            yield {"normalize": normalize}, _weights(w), False
    elif name in ("slerp", "nearswap"):
        for t in (0.0, 0.0001, 0.02, 0.3, 0.5, 1.0):
            yield {"t": t}, [{}], True
    elif name == "arcee_fusion":
        yield {}, [{}], True
    elif name == "passthrough":
        for scale in (None, 1.0, 0.0, -0.7):
            yield {}, [{"scale": scale}], False
    elif name == "nuslerp":
        for flatten, row, base in itertools.product((True, False), (True, False), (True, False)):
            for w in ((0.3, 0.7), (1.0, 1.0), (0.5, -0.5), (2.0, 0.5)):
                shared = {"nuslerp_flatten": flatten, "nuslerp_row_wise": row}
                yield shared, _weights(w), base
    elif name == "multislerp":
        for w, normalize, base in itertools.product(THREE, (True, False), (True, False)):
            yield {"normalize_weights": normalize}, _weights(w), base
        yield {}, _weights((0.3,)), True
    elif name == "karcher":
        for count, iterations in itertools.product((1, 2, 3, 5), (0, 1, 10, 50)):
            yield {"max_iter": iterations}, [{}] * count, False
    elif name == "model_stock":
        for count, rows in itertools.product((2, 3, 5), (True, False)):
            yield {"filter_wise": rows}, [{}] * count, True
    elif name == "sce":
        for count, top in itertools.product((1, 2, 3), (0.0, 0.1, 0.29, 0.5, 1.0)):
            yield {"select_topk": top}, [{}] * count, True
    elif name == "ram":
        for count, epsilon in itertools.product((1, 2, 3), (1e-5, 0.02, 0.05)):
            yield {"epsilon": epsilon}, [{}] * count, True
    elif name == "ramplus_tl":
        for count, epsilon, r in itertools.product((1, 2, 3), (1e-5, 0.02, 0.05), (0.1, 0.7)):
            yield {"epsilon": epsilon, "r": r, "alpha": 0.6}, [{}] * count, True
    elif name == "task_arithmetic":
        for w, normalize, factor in itertools.product(THREE, (True, False), (1.0, 0.4)):
            yield {"normalize": normalize, "lambda": factor}, _weights(w), True
        yield {"normalize": True}, _weights((1.0, -1.0)), True
        yield {}, [], True
    else:
        densities = ((1.0, 1.0, 1.0),) if _random(name) else DENSITIES
        shared = itertools.product((True, False), (True, False), (1.0, 0.4))
        for (normalize, rescale, factor), w, d in itertools.product(shared, THREE, densities):
            values = {"normalize": normalize, "rescale": rescale, "lambda": factor}
            own = {"density": d}
            if "gamma" in METHODS[name].each:
                own["gamma"] = (0.01, 0.1, 0.5)
            yield values, _weights(w, **own), True


def _random(name):
    return "dare" in name or "della" in name


def inputs(shape, count, dtype, seed, spread=0.05):
    """Return a base and models near it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    models = [
        base + spread * torch.randn(shape, generator=generator, dtype=torch.float64)
        for _ in range(count)
    ]
    return base.to(dtype), [m.to(dtype) for m in models]


def ours(name, base, models, shared, each, tensor="w"):
    """Return the merged weight by this package."""
    found = translate(name, shared, each, base is not None)
    if not isinstance(found, Translated):
        raise ValueError("; ".join(map(str, found)))
    if found.method == "copy":
        return base
    if found.base_first:
        models = [base, *models]
    shape = models[0].shape
    models = [m.reshape(shape or (1,)) for m in models]
    origin = base.view_as(models[0]) if found.space == "delta" else torch.zeros_like(models[0])
    context = Context(
        weights=found.weights,
        experts=tuple(f"m{t}" for t in range(len(models))),
        tensor=tensor,
        base=origin,
        own=found.own,
    )
    deltas = torch.stack([m - origin for m in models])
    run = run_method(get_method(found.method), deltas, found.parameters, context)
    return (origin + found.scale * run.delta).view(shape)


def theirs(name, base, models, shared, each):
    """Return the merged weight by mergekit."""
    given = list(models) if base is None else [base, *models]
    per_model = {key for e in each for key in e}
    counted = METHODS[name].base == "unused"
    parameters = dict(shared)
    for key in per_model:
        values = [e.get(key) for e in each]
        start = 0 if base is None or counted else 1
        parameters[key] = {start + t: v for t, v in enumerate(values)}
    return merge_tensors(
        given, name, parameters=parameters, base_index=None if base is None else 0, name="w"
    )


def relative(a, b):
    """Return the relative error of `a` against `b`."""
    scale = float(b.double().norm())
    error = float((a.double() - b.double()).norm())
    return error / scale if scale else error


def compare(name, dtype):
    """Return the largest error, and what could not be compared because mergekit fails."""
    worst, failed, count, outliers = 0.0, [], 0, []
    for number, (shared, each, with_base) in enumerate(cases(name)):
        for shape in SHAPES:
            base, models = inputs(shape, len(each), dtype, seed=number)
            base = base if with_base else None
            try:
                expected = theirs(name, base, models, shared, each)
            except (RuntimeError, ValueError, AssertionError, IndexError) as error:
                failed.append(f"{list(shape)}: {str(error).splitlines()[0][:80]}")
                continue
            count += 1
            if not bool(torch.isfinite(expected).all()):
                failed.append(f"{list(shape)}: not finite")
                continue
            error = relative(ours(name, base, models, shared, each), expected)
            worst = max(worst, error)
            if error > BOUND:
                outliers.append((shared, each, list(shape), error))
    return {
        "method": name,
        "dtype": str(dtype)[6:],
        "compared": count,
        "worst": worst,
        "outliers": outliers,
        "mergekit_fails": sorted(set(failed)),
    }


def distribution(name, density):
    """Return the shares kept and the means of one expert's entries, ours and mergekit's."""
    base, models = inputs((8, 16), 1, torch.float32, seed=3)
    each = [{"weight": 1.0, "density": density}]
    kept = {"ours": 0.0, "mergekit": 0.0}
    mean = {"ours": 0.0, "mergekit": 0.0}
    delta = models[0] - base
    for draw in range(DRAWS):
        results = {
            "ours": ours(name, base, models, {}, each, tensor=f"w{draw}"),
            "mergekit": theirs(name, base, models, {}, each),
        }
        for who, result in results.items():
            change = result - base
            kept[who] = kept[who] + (change.abs() > 1e-7).double() / DRAWS
            mean[who] = mean[who] + change.double() / DRAWS
    deviation = (density * (1 - density) / DRAWS) ** 0.5
    apart = float((kept["ours"] - kept["mergekit"]).abs().max()) / (deviation * 2**0.5)
    return {
        "method": name,
        "density": density,
        "kept": {who: float(k.mean()) for who, k in kept.items()},
        "deviations_apart": apart,  # of 128 entries the largest: about 3
        "mean_over_delta": {
            who: float((m * delta).sum() / delta.double().square().sum()) for who, m in mean.items()
        },
    }


def main():
    """Compare every method; exit code 1 where one is outside the bound."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path)
    output = parser.parse_args().output
    torch.set_num_threads(1)
    rows = [compare(n, dtype) for n in METHODS for dtype in (torch.float32, torch.float64)]
    for row in rows:
        fails = row["mergekit_fails"]
        note = f"; mergekit fails: {'; '.join(fails)}" if fails else ""
        print(
            f"{row['method']:18} {row['dtype']:8} {row['compared']:5} tensors, worst "
            f"{row['worst']:.1e}, {len(row['outliers'])} above {BOUND:g}{note}"
        )
        for outlier in row["outliers"][:4]:
            print("    ", *outlier)
    random = [distribution(n, d) for n in METHODS if _random(n) for d in (0.3, 0.7)]
    for row in random:
        print(row)
    if output:
        output.write_text(json.dumps({"functions": rows, "random": random}, indent=1) + "\n")
    return int(any(r["outliers"] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
