"""Merges from files to files: every method and architecture, every key of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from case import Case, World
from command import invoke
from inputs import ALL_DEMO_EXPERTS, ARCHITECTURES, DEMO_EXPERTS

WITH_DATA = ("esm", "fisher", "iso_a", "mats", "regmean")
# For three experts; the method's own scale everywhere else.
SCALED = {"task_arithmetic": 0.4, "ties": 0.7, "iso_c": 0.8}

PARAMETERS: dict[str, dict[str, Any]] = {
    "linear-sum": {"method": "linear", "parameters": {"normalize": False}},
    "dare_linear-sparse": {"method": "dare_linear", "parameters": {"density": 0.2}, "seed": 3},
    "dare_linear-plain": {"method": "dare_linear", "parameters": {"rescale": False}},
    "dare_ties-sum": {"method": "dare_ties", "parameters": {"aggregate": "sum"}, "seed": 5},
    "ties-sum": {"method": "ties", "parameters": {"density": 0.7, "aggregate": "sum"}},
    "ties-model": {"method": "ties", "parameters": {"scope": "model"}},
    "tsv_m-rank": {"method": "tsv_m", "parameters": {"rank_fraction": 0.1}},
    "tsv_m-exact": {"method": "tsv_m", "precision": "exact"},
    "iso_c-full": {"method": "iso_c", "parameters": {"support": "full"}},
    "iso_c-tolerance": {"method": "iso_c", "parameters": {"rank_tolerance": 0.1}},
    "iso_c-exact": {"method": "iso_c", "precision": "exact"},
    "iso_cts-half": {"method": "iso_cts", "parameters": {"common_fraction": 0.5}},
    "iso_cts-full": {"method": "iso_cts", "parameters": {"support": "full"}},
    "iso_cts-exact": {"method": "iso_cts", "precision": "exact"},
    "iso_a-ridge": {"method": "iso_a", "parameters": {"ridge": 0.01}},
    "iso_a-full": {"method": "iso_a", "parameters": {"support": "full"}},
    "iso_a-exact": {"method": "iso_a", "precision": "exact"},
    "regmean-diagonal": {"method": "regmean", "parameters": {"off_diagonal": 0.0}},
    "regmean-ridge": {"method": "regmean", "parameters": {"ridge": 0.1, "off_diagonal": 1.0}},
    "regmean-weight": {"method": "regmean", "parameters": {"space": "weight"}},
    "regmean-sums": {"method": "regmean", "parameters": {"normalize_counts": False}},
    "fisher-floor": {"method": "fisher", "parameters": {"floor": 1e-3}},
    "fisher-sums": {"method": "fisher", "parameters": {"normalize_counts": False}},
    "esm-roberta": {"method": "esm", "parameters": {"preset": "roberta"}},
    "esm-none": {"method": "esm", "parameters": {"preset": None}},
    "esm-own": {"method": "esm", "parameters": {"task_power": 1, "layer_power": 0.5, "factor": 3}},
    "esm-rank": {"method": "esm", "parameters": {"rank_fraction": 0.1, "rank_tolerance": 0.01}},
    "esm-exact": {"method": "esm", "precision": "exact"},
}  # fmt: skip

OPERATORS = ("gram", "kfac", "diagonal_fisher", "block", "task_gram", "identity")
INITS = ("zero", "average", "task_arithmetic", "iso_c", "tsv_m", "regmean", "esm", "ties")
MATS: dict[str, dict[str, Any]] = {
    **{f"operator-{o}": {"operator": o, "iterations": 12} for o in OPERATORS},
    **{
        f"operator-{o}-{p}": {"operator": o, "iterations": 4, "preconditioner": p, "damping": 0.0}
        for o, p in product(OPERATORS, ("jacobi", "kronecker"))
    },
    **{
        f"direct-{o}": {"operator": o, "solver": "direct", "damping": 0.01}
        for o in OPERATORS
        if o != "kfac"
    },
    "direct-kfac": {"operator": "kfac", "solver": "direct"},
    **{f"init-{i}": {"init": i, "iterations": 2} for i in INITS},
    "init-scaled": {"init": "iso_c", "init_scale": 0.5, "iterations": 3, "operator": "kfac"},
    "weight": {"space": "weight", "iterations": 20},
    "weight-kfac": {"space": "weight", "operator": "kfac", "damping": 0.05},
    "damped": {"damping": 0.1, "preconditioner": "kronecker"},
    "off-diagonal": {"off_diagonal": 0.7, "operator": "kfac"},
    "sums": {"normalize_counts": False, "tolerance": 1e-2},
    "rest-init": {"rest": "init", "init": "iso_c", "iterations": 3},
    "start": {"iterations": 0},
    "long": {"iterations": 300, "operator": "kfac", "tolerance": 1e-9},
}


def merge_cases(world: World) -> Iterator[Case]:
    """Yield all cases of this file."""
    yield from _methods(world)
    yield from _parameters(world)
    yield from _mats(world)
    yield from _recipes(world)
    yield from _adapters(world)
    yield from _statistics(world)
    yield from _scales(world)
    yield from _sweeps(world)
    yield from _demo(world)
    yield from _commands(world)
    yield from _plans(world)


def _recipe(world: World, kind: str, method: str, form: str = "f32") -> dict[str, Any]:
    names = ("a", "b") if method == "slerp" else ("a", "b", "c")
    recipe = world.family(kind, form, names, statistics=method in WITH_DATA)
    recipe["method"] = method
    if method in SCALED:
        recipe["scale"] = SCALED[method]
    if form == "bf16":
        recipe["statistics_of"] = "any"  # they are of the float32 fine-tunes
    if kind == "vit":
        # Its classifier has one shape and the same classes everywhere: an ordinary tensor.
        recipe["side_files"] = "a"
    return recipe


def _methods(world: World) -> Iterator[Case]:
    import eutectic

    for kind, method in product(ARCHITECTURES, eutectic.methods()):
        yield Case(f"method/{kind}/{method}", world.merge(_recipe(world, kind, method)))
        recipe = _recipe(world, kind, method, "bf16")
        yield Case(f"bf16/{kind}/{method}", world.merge(recipe))


def _parameters(world: World) -> Iterator[Case]:
    for kind, (name, options) in product(("bert", "llama"), PARAMETERS.items()):
        recipe = {**_recipe(world, kind, options["method"]), **options}
        yield Case(f"parameters/{kind}/{name}", world.merge(recipe))
    for name, weights in {"uneven": (0.5, 1.0, 2.0), "none": (1.0, 0.0, 1.0)}.items():
        for method in ("linear", "dare_ties", "iso_c", "tsv_m", "esm", "mats", "regmean", "fisher"):
            recipe = _recipe(world, "llama", method)
            for expert, weight in zip(recipe["experts"].values(), weights, strict=True):
                expert["weight"] = weight
            yield Case(f"weights/{name}/{method}", world.merge(recipe))
    for t in (0.0, 0.3):
        recipe = {**_recipe(world, "llama", "slerp"), "parameters": {"t": t}}
        yield Case(f"parameters/llama/slerp-{t}", world.merge(recipe))


def _mats(world: World) -> Iterator[Case]:
    for name, parameters in MATS.items():
        for kind in ("bert", "gpt2"):
            recipe = {**_recipe(world, kind, "mats"), "parameters": parameters}
            # One thread where it is refused: the message names the tensor that was first.
            limits = {"threads": 1} if name == "direct-kfac" else {}
            yield Case(f"mats/{kind}/{name}", world.merge(recipe, **limits))
    merged = str(world.inputs / "merged" / "t5")
    for operator in ("gram", "kfac", "diagonal_fisher"):
        recipe = _recipe(world, "t5", "mats")
        recipe["parameters"] = {"operator": operator, "init": merged, "iterations": 5}
        yield Case(f"mats/t5/checkpoint-{operator}", world.merge(recipe))
    recipe = {**_recipe(world, "bert", "mats"), "precision": "exact"}
    yield Case("mats/bert/exact", world.merge(recipe))


def _recipes(world: World) -> Iterator[Case]:
    bert = {**world.family("bert"), "method": "iso_c", "scale": 0.7}
    for heads in ("per_expert", "base", "drop"):
        yield Case(f"heads/{heads}", world.merge({**bert, "heads": heads}))
        sharded = {**world.family("bert", "bf16"), "method": "average", "heads": heads}
        yield Case(f"heads/bf16-{heads}", world.merge(sharded))
    yield Case("heads/side-files", world.merge({**bert, "side_files": "b"}))
    ruled = {"tensors": [{"match": "*classifier*", "treatment": "head"}]}
    for kind in ("per_expert", "drop"):
        vit = {**world.family("vit"), "method": "tsv_m", "heads": kind, **ruled}
        yield Case(f"heads/ruled-{kind}", world.merge(vit))
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        for form in ("f32", "bf16"):
            recipe = {**world.family("llama", form), "method": "iso_c", "dtype": dtype}
            yield Case(f"dtype/{form}-{dtype}", world.merge(recipe))
        yield Case(f"dtype/odd-{dtype}", world.merge(_odd(world, "ties", dtype=dtype)))
    rules: dict[str, list[dict[str, Any]]] = {
        "treatments": [
            {"match": "*embed_tokens*", "treatment": "matrix"},
            {"match": "*norm*", "treatment": "copy"},
            {"match": "*mlp*", "treatment": "vector"},
            {"match": "lm_head*", "treatment": "embedding"},
        ],
        "scales": [
            {"match": "*layers.0.*", "scale": 0.2},
            {"match": "*norm*", "scale": 0.0},
            {"match": "*o_proj*", "treatment": "copy", "scale": 2.0},
        ],
        "splits": [
            {"match": "*q_proj*", "split": 4},
            {"match": "*gate_proj*", "split": [16, 48]},
            {"match": "*down_proj*", "split": 2, "scale": 0.5},
        ],
    }  # fmt: skip
    for name, tensors in rules.items():
        for method in ("iso_c", "esm", "mats", "regmean", "ties", "tsv_m", "iso_a"):
            recipe = {**_recipe(world, "llama", method), "tensors": tensors}
            yield Case(f"rules/{name}/{method}", world.merge(recipe))
    conv1d = [{"match": "*c_attn.weight", "split": 3}, {"match": "*c_fc*", "split": [32, 96]}]
    for method in ("iso_cts", "esm", "mats", "iso_a"):
        recipe = {**_recipe(world, "gpt2", method), "tensors": conv1d}
        yield Case(f"rules/conv1d/{method}", world.merge(recipe))
    for method in ("iso_c", "task_arithmetic"):
        recipe = {**_recipe(world, "clip", method), "scale": 0.3, "scale_tensors": "matrix"}
        yield Case(f"rules/scale-matrix/{method}", world.merge(recipe))
    yield from _odd_recipes(world)


def _odd(world: World, method: str, names: tuple[str, ...] = ("a", "b", "c"), **more: Any) -> Any:
    return {**world.odd(names), "method": method, **more}


def _odd_recipes(world: World) -> Iterator[Case]:
    for method in ("average", "dare_ties", "ties", "iso_c", "iso_cts", "tsv_m", "task_arithmetic"):
        yield Case(f"odd/plain/{method}", world.merge(_odd(world, method, scale=0.5)))
        kernels = [
            {"match": "conv.weight", "treatment": "matrix"},
            {"match": "conv1d.weight", "treatment": "matrix"},
            {"match": "*in_proj_weight", "split": 3},
            {"match": "*.qkv.weight", "split": [48, 24, 24]},
            {"match": "*experts.weight", "split": 2},
        ]
        ruled = _odd(world, method, scale=0.5, tensors=kernels)
        yield Case(f"odd/ruled/{method}", world.merge(ruled))
    for missing in ("error", "base", "available"):
        for method in ("average", "ties", "iso_c", "task_arithmetic", "dare_linear"):
            recipe = _odd(world, method, ("a", "lacking", "c"), missing=missing)
            yield Case(f"missing/{missing}/{method}", world.merge(recipe))
    for nonfinite in ("error", "allow"):
        for method in ("average", "ties", "iso_c", "slerp"):
            recipe = _odd(world, method, ("a", "broken"), nonfinite=nonfinite)
            yield Case(f"nonfinite/{nonfinite}/{method}", world.merge(recipe, threads=1))
    for method in ("iso_c", "tsv_m", "iso_cts", "ties", "slerp"):
        recipe = _odd(world, method, ("a", "zero"))
        yield Case(f"odd/zero/{method}", world.merge(recipe))
    yield Case("odd/single", world.merge(_odd(world, "iso_c", ("b",))))
    folder = world.inputs / "odd"
    pickled = {"p": str(folder / "pickled"), "b": str(folder / "b" / "model.safetensors")}
    yield Case("odd/pickled", world.merge({**_odd(world, "tsv_m"), "experts": pickled}))
    onto = {**_odd(world, "average", ("a", "b")), "base": str(folder / "pickled")}
    yield Case("odd/pickled-base", world.merge(onto))
    small = _odd(world, "mats", parameters={"operator": "task_gram", "preconditioner": "jacobi"})
    yield Case("odd/task-gram", world.merge(small, threads=2))
    unknown = {**_odd(world, "average"), "tensors": [{"match": "nothing*", "treatment": "copy"}]}
    yield Case("odd/idle-rule", world.merge(unknown))


def _adapters(world: World) -> Iterator[Case]:
    for kind in ("bert", "gpt2"):
        for method in ("average", "ties", "dare_linear", "iso_c", "iso_cts", "tsv_m"):
            recipe = {**world.adapters(kind), "method": method}
            yield Case(f"lora/{kind}/{method}", world.merge(recipe))
    for method in ("mats", "esm", "regmean", "iso_a"):
        recipe = {**world.adapters("gpt2", statistics=True), "method": method}
        yield Case(f"lora/gpt2/{method}", world.merge(recipe))
    mixed = world.adapters("bert")
    mixed["experts"]["full"] = world.family("bert")["experts"]["c"]
    yield Case("lora/mixed", world.merge({**mixed, "method": "iso_c"}))
    ia3 = world.adapters("t5", statistics=True)
    for method in ("average", "task_arithmetic", "ties", "fisher", "iso_c"):
        yield Case(f"ia3/{method}", world.merge({**ia3, "method": method}))
    for operator in ("block", "diagonal_fisher", "identity"):
        for init in ("average", "zero"):
            parameters = {"operator": operator, "init": init}
            recipe = {**ia3, "method": "mats", "parameters": parameters}
            yield Case(f"ia3/mats-{operator}-{init}", world.merge(recipe))
    direct = {"operator": "block", "solver": "direct", "damping": 1e-3}
    yield Case("ia3/mats-direct", world.merge({**ia3, "method": "mats", "parameters": direct}))


def _statistics(world: World) -> Iterator[Case]:
    """Yield merges with statistics that are another's, of other layers, or lacking."""

    def lacking(kind: str, method: str, **files: Any) -> dict[str, Any]:
        recipe = _recipe(world, kind, method)
        for name, file in files.items():
            recipe["experts"][name]["statistics"] = file
        return recipe

    other = str(world.stats("bert", "b"))
    for method in ("esm", "mats"):
        swapped = lacking("bert", method, a=other)
        yield Case(f"statistics/swapped/{method}", world.merge(swapped))
        taken = {**swapped, "statistics_of": "any"}
        yield Case(f"statistics/any/{method}", world.merge(taken))
    for method in WITH_DATA:
        yield Case(f"statistics/lacking/{method}", world.merge(lacking("bert", method, b=None)))
        idle = lacking("bert", method, c=None)
        idle["experts"]["c"]["weight"] = 0.0
        yield Case(f"statistics/idle/{method}", world.merge(idle))
        alien = lacking("bert", method, a=str(world.stats("llama", "a")))
        yield Case(f"statistics/alien/{method}", world.merge(alien))
    half = {**lacking("bert", "esm", a=None), "scale": "auto"}
    yield Case("statistics/lacking/auto", world.merge(half))


def _scales(world: World) -> Iterator[Case]:
    """Yield merges whose scale is searched for; the searches alone are with the other data."""
    for kind in ("bert", "llama", "gpt2", "t5"):
        for method in ("iso_c", "task_arithmetic", "esm", "mats"):
            recipe = {**world.family(kind, statistics=True), "method": method, "scale": "auto"}
            yield Case(f"auto/{kind}/{method}", world.merge(recipe))
    split = [{"match": "*q_proj*", "split": 4}, {"match": "*norm*", "scale": 0.5}]
    recipe = {**_recipe(world, "llama", "iso_a"), "scale": "auto", "tensors": split}
    yield Case("auto/llama/ruled", world.merge(recipe))
    short = {"points": 3, "tolerance": 0.4, "range": [0.1, 1.5]}
    for kind, method in (("bert", "iso_c"), ("heads", "tsv_m"), ("gpt2", "esm"), ("vit", "iso_c")):
        family = world.family("bert" if kind == "heads" else kind, statistics=True)
        search = {"search": "divergence", "tasks": world.tasks(kind), **short}
        recipe = {**family, "method": method, "scale": search}
        yield Case(f"divergence/{kind}/{method}", world.merge(recipe))
    search = {"search": "divergence", "tasks": world.tasks("bert"), "compare": "features", **short}
    recipe = {**world.family("bert", "bf16"), "method": "ties", "scale": search}
    yield Case("divergence/bf16/features", world.merge(recipe))
    search = {"search": "validation", "tasks": world.tasks("bert"), **short}
    recipe = {**world.family("bert"), "method": "iso_cts", "scale": search}
    yield Case("validation/bert/iso_cts", world.merge(recipe))


def _sweeps(world: World) -> Iterator[Case]:
    def swept(kind: str, method: str, mixtures: str, *words: str) -> Case:
        recipe = world.family(kind, names=("a", "b"))
        experts = [f"{name}={spec['path']}" for name, spec in recipe["experts"].items()]
        if method in WITH_DATA:
            experts += [w for n in ("a", "b") for w in ("-s", f"{n}={world.stats(kind, n)}")]

        def run(out: Path) -> None:
            invoke(
                "merge", "--base", recipe["base"], "-m", method, "--sweep", mixtures, *words,
                "--threads", world.threads, "-o", out / "mixed", *experts,
            )  # fmt: skip

        return Case(f"sweep/{kind}/{method}", run)

    yield swept("bert", "linear", "0:1:3")
    yield swept("llama", "mats", "0,0.3,1", "-p", "operator=kfac", "-p", "iterations=5")
    yield swept("gpt2", "slerp", "0.2,0.9")
    yield swept("bert", "esm", "0.3333,0.5", "--scale", "0.7", "--set", "heads=base")


def _demo(world: World) -> Iterator[Case]:
    own = {"average": 1.0, "task_arithmetic": 0.2, "ties": 0.4, "tsv_m": 0.25, "iso_c": 0.8,
           "iso_cts": 0.7}  # fmt: skip
    for method, scale in own.items():
        recipe = {**world.demo(), "method": method, "scale": scale}
        yield Case(f"demo/{method}", world.merge(recipe))
    for method in ("dare_linear", "dare_ties", "linear"):
        yield Case(f"demo/{method}", world.merge({**world.demo(), "method": method}))
    two = world.demo(DEMO_EXPERTS[:2])
    yield Case("demo/slerp", world.merge({**two, "method": "slerp", "heads": "base"}))
    known = world.demo(statistics=True)
    for method in ("esm", "fisher", "iso_a", "regmean"):
        yield Case(f"demo/{method}", world.merge({**known, "method": method}))
    for operator, more in {
        "gram": {},
        "kfac": {"preconditioner": "kronecker", "damping": 0.0},
    }.items():
        parameters = {"operator": operator, "iterations": 2, "init": "iso_c", **more}
        recipe = {**known, "method": "mats", "parameters": parameters}
        yield Case(f"demo/mats-{operator}", world.merge(recipe))
    for method in ("iso_c", "ties", "tsv_m"):
        recipe = {**world.demo(ALL_DEMO_EXPERTS), "method": method, "scale": 0.5}
        yield Case(f"demo/all-{method}", world.merge(recipe))
    yield Case("demo/auto", world.merge({**known, "method": "iso_c", "scale": "auto"}))
    little = {
        **world.demo(),
        "method": "ties",
        "dtype": "bfloat16",
        "parameters": {"scope": "model"},
    }
    yield Case("demo/little-memory", world.merge(little, memory="800MB", threads=2))


def _commands(world: World) -> Iterator[Case]:
    """Yield merges and searches by recipe files and options of the command line."""
    import yaml

    def by_recipe(name: str, recipe: dict[str, Any], *words: object, verb: str = "merge") -> Case:
        def run(out: Path) -> None:
            file = out / "recipe.yaml"
            file.write_text(yaml.safe_dump(recipe))
            target = ("-o", out / "merged", "--threads", world.threads)
            invoke(verb, file, *target, *words)

        return Case(f"command/{name}", run)

    llama = _recipe(world, "llama", "mats")
    yield by_recipe("recipe", llama, "-p", "operator=kfac", "-p", "iterations=3")
    yield by_recipe("options", _recipe(world, "bert", "iso_c"), "--scale", "auto", "--set",
                    "statistics_of=any", "-s", f"a={world.stats('bert', 'a')}",
                    f"a={world.inputs / 'bert-f32' / 'a'}")  # fmt: skip
    yield by_recipe("weights", _recipe(world, "bert", "ties"), "--set", "dtype=bfloat16",
                    "-w", "a=0.5", f"a={world.inputs / 'bert-f32' / 'a'}",
                    f"b={world.inputs / 'bert-f32' / 'b'}")  # fmt: skip
    yield by_recipe("tune", _recipe(world, "bert", "iso_cts"), "--search", "divergence", "--tasks",
                    world.tasks("heads"), "--points", 3, "--range", "0.2:1", "--tolerance", 0.5,
                    verb="tune")  # fmt: skip
    yield by_recipe("tune-gram", _recipe(world, "t5", "iso_a"), "--search", "gram", verb="tune")


def _plans(world: World) -> Iterator[Case]:
    """Yield what `plan` tells: shown, not judged."""
    import yaml

    recipes = {
        "bert": _recipe(world, "bert", "iso_c"),
        "llama": _recipe(world, "llama", "esm"),
        "gpt2": _recipe(world, "gpt2", "mats"),
        "mixtral": _recipe(world, "mixtral", "ties", "bf16"),
        "t5-ia3": {**world.adapters("t5"), "method": "average"},
        "demo": {**world.demo(), "method": "iso_cts"},
    }
    for name, recipe in recipes.items():

        def run(out: Path, recipe: dict[str, Any] = recipe) -> str:
            file = out / "recipe.yaml"
            file.write_text(yaml.safe_dump(recipe))
            return invoke(
                "plan", file, "--json", "--explain", "--threads", 1, "--memory", "2GB"
            )  # fmt: skip

        yield Case(f"plan/{name}", run)
