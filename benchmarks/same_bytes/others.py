"""What is no merge of files: state dicts, matrices, collections, routes, evaluations, searches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from case import Case, World
from command import invoke
from inputs import NAMES, batches, load, load_adapted
from merges import MATS, PARAMETERS, WITH_DATA
from safetensors.torch import load_file
from torch import Tensor


def other_cases(world: World) -> Iterator[Case]:
    """Yield all cases of this file."""
    yield from _state_dicts(world)
    yield from _known_rows(world)
    yield from _matrices()
    yield from _collections(world)
    yield from _routes(world)
    yield from _torch_encoder(world)
    yield from _evaluations(world)
    yield from _inspections(world)
    yield from _searches(world)


def _state_dicts(world: World) -> Iterator[Case]:
    import eutectic

    def tensors(kind: str, name: str) -> dict[str, Tensor]:
        return load_file(world.inputs / kind / name / "model.safetensors")

    def merged(kind: str, method: str, **options: Any) -> Case:
        def run(out: Path) -> dict[str, Tensor]:
            names = ("a", "b") if method == "slerp" else NAMES
            if method in WITH_DATA:
                architecture = kind.partition("-")[0]
                options["statistics"] = {
                    n: eutectic.load_statistics(world.stats(architecture, n)) for n in names
                }
            return eutectic.merge_state_dicts(
                tensors(kind, "base"),
                {n: tensors(kind, n) for n in names},
                method=method,
                threads=world.threads,
                **options,
            )

        label = "-".join([method, *(str(k) for k in options)])
        return Case(f"state-dicts/{kind}/{label}", run)

    for method in eutectic.methods():
        yield merged("llama-f32", method)
        yield merged("gpt2-f32", method, config={"model_type": "gpt2"})
    for method in ("ties", "iso_c", "dare_linear"):
        yield merged("odd", method, scale=0.5, weights={"a": 2.0, "c": 0.5})
        yield merged("odd", method, dtype="bfloat16", tensors=[{"match": "*qkv*", "split": 3}])
    rules = [{"match": "*q_proj*", "treatment": "copy"}, {"match": "*up_proj*", "split": 2}]
    yield merged("llama-f32", "esm", tensors=rules)


def _known_rows(world: World) -> Iterator[Case]:
    """Yield state dicts with statistics for kernels, fused rows and packed in-projections."""
    import eutectic

    def tensors(name: str) -> dict[str, Tensor]:
        return load_file(world.inputs / "odd" / name / "model.safetensors")

    def entry(out: int, width: int, seed: int, shape: tuple[int, ...]) -> Any:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(50, width, generator=generator, dtype=torch.float64)
        y = torch.randn(50, out, generator=generator, dtype=torch.float64)
        return eutectic.LayerStatistics(
            gram=x.T @ x,
            count=50,
            output_gradient_gram=y.T @ y,
            fisher_diagonal=(y.square().T @ x.square()).reshape(shape),
            sample_count=10,
        )

    def statistics(seed: int, apart: bool) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for number, (name, tensor) in enumerate(tensors("base").items()):
            if tensor.ndim < 2 or not tensor.numel() or not tensor.is_floating_point():
                continue
            shape = tuple(tensor.shape)
            out, width = shape[0], tensor[0].numel()
            if not apart or "in_proj" not in name:
                found[name] = entry(out, width, 100 * seed + number, shape)
                continue
            for part, label in enumerate(("[q]", "[k]", "[v]")):
                rows = (out // 3, width)
                found[name + label] = entry(*rows, 100 * seed + number + part, rows)
        return found

    rules = [
        {"match": "conv.weight", "treatment": "matrix"},
        {"match": "*in_proj_weight", "split": 3},
        {"match": "*.qkv.weight", "split": [48, 24, 24]},
        {"match": "wide.weight", "split": 2, "scale": 0.3},
    ]
    settings: dict[str, dict[str, Any]] = {m: {"method": m} for m in WITH_DATA}
    settings["esm-roberta"] = {"method": "esm", "preset": "roberta"}
    settings["mats-kfac"] = {"method": "mats", "operator": "kfac", "iterations": 6}
    settings["mats-fisher"] = {"method": "mats", "operator": "diagonal_fisher", "space": "weight"}
    for (name, options), apart in product(settings.items(), (False, True)):

        def run(out: Path, options: dict[str, Any] = options, apart: bool = apart) -> Any:
            known = {n: statistics(i, apart) for i, n in enumerate(NAMES)}
            experts = {n: tensors(n) for n in NAMES}
            return eutectic.merge_state_dicts(
                tensors("base"),
                experts,
                statistics=known,
                threads=world.threads,
                tensors=rules,
                **options,
            )

        yield Case(f"state-dicts/known-{'apart' if apart else 'whole'}/{name}", run)


def _matrices() -> Iterator[Case]:
    import eutectic

    def stack(shape: tuple[int, ...], experts: int, rank: int | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape) + experts)
        if rank is None:
            return torch.randn(experts, *shape, generator=generator)
        left = torch.randn(experts, shape[0], rank, generator=generator)
        return left @ torch.randn(experts, rank, shape[1], generator=generator)

    def statistics(out: int, width: int, experts: int, tokens: int) -> list[Any]:
        generator = torch.Generator().manual_seed(out + width + tokens)
        found: list[Any] = []
        for _ in range(experts):
            x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
            y = torch.randn(tokens, out, generator=generator, dtype=torch.float64)
            found.append(
                eutectic.LayerStatistics(
                    gram=x.T @ x,
                    count=tokens,
                    output_gradient_gram=y.T @ y,
                    fisher_diagonal=(y.square().T @ x.square()),
                    input_sum=x.sum(0),
                    sample_count=tokens,
                )
            )
        return found

    shapes: dict[str, tuple[tuple[int, ...], int, int | None]] = {
        "wide": ((24, 40), 3, None),
        "tall": ((48, 16), 3, None),
        "thin": ((32, 32), 3, 3),
        "one": ((12, 20), 1, None),
        "many": ((16, 24), 9, 2),
    }
    settings: dict[str, dict[str, Any]] = {m: {"method": m} for m in eutectic.methods()}
    settings |= PARAMETERS
    settings |= {
        f"mats-{name}": {"method": "mats", "parameters": parameters}
        for name, parameters in MATS.items()
        if parameters.get("operator") != "block"
    }

    def run_all(kind: str, precision: str, double: bool) -> dict[str, Any]:
        shape, experts, rank = shapes[kind]
        results: dict[str, Any] = {}
        for name, options in settings.items():
            count = 2 if options["method"] == "slerp" else experts
            deltas = stack(shape, count, rank)
            generator = torch.Generator().manual_seed(3)
            base = torch.randn(shape, generator=generator)
            try:
                results[name] = eutectic.merge_matrices(
                    options["method"],
                    deltas.double() if double else deltas,
                    base=base.double() if double else base,
                    statistics=statistics(*shape, count, 30),
                    seed=options.get("seed", 0),
                    precision=options.get("precision", precision),
                    full_output=True,
                    **options.get("parameters", {}),
                )
            except eutectic.EutecticError as error:
                results[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return results

    for kind, precision, double in product(shapes, ("fast", "exact"), (False, True)):
        name = f"matrices/{kind}/{precision}-{'float64' if double else 'float32'}"
        yield Case(name, lambda out, k=kind, p=precision, d=double: run_all(k, p, d))


def _collections(world: World) -> Iterator[Case]:
    import eutectic

    all_of_it = {"output_gradients": True, "fisher": True, "block_fisher": True}
    drawn = {**all_of_it, "labels": "sample", "seed": 4}

    def collected(name: str, kind: str, memory_only: bool = False, **options: Any) -> Case:
        def run(out: Path) -> Any:
            model = load(world.inputs / f"{kind}-f32" / "b")
            target = None if memory_only else out / "stats.safetensors"
            found = eutectic.collect(model, batches(kind, 1), target, **options)
            return found.provenance, dict(found)

        return Case(f"collect/{name}", run)

    for kind in ("bert", "t5", "gpt2", "llama", "clip", "vit", "mixtral"):
        yield collected(f"{kind}/grams", kind)
        if kind != "clip":
            yield collected(f"{kind}/gradients", kind, **all_of_it)
            yield collected(f"{kind}/sampled", kind, **drawn)
    yield collected("memory", "bert", True, fisher=True)
    yield collected("rank", "llama", rank=8)
    yield collected("float64", "gpt2", dtype=torch.float64)
    yield collected("passes", "bert", layers_per_pass=3, output_gradients=True)
    yield collected("unshared", "bert", share_inputs=False)
    yield collected("layers", "t5", layers=["*.q.weight", "*.wo.weight"], max_examples=7)
    yield collected("convolutions", "vit", convolutions=True)
    yield collected("no-grams", "gpt2", grams=False, output_gradients=True, objective="causal_lm")
    yield collected("limits", "llama", output_gradient_limit=40, block_fisher=True, block_limit=8)

    def adapter(out: Path) -> Any:
        model = load_adapted(world.inputs, "gpt2", "a")
        found = eutectic.collect(model, batches("gpt2", 0), out / "stats.safetensors", fisher=True)
        return found.provenance

    yield Case("collect/adapter", adapter)
    data = world.inputs / "data"
    bert = world.inputs / "bert-f32"
    rows = data / "a.proxy.jsonl"

    def command(name: str, *words: object) -> Case:
        def run(out: Path) -> None:
            invoke("collect", *words, "-o", out / "stats.safetensors")

        return Case(f"collect/command-{name}", run)

    yield command("grams", bert / "a", "--data", rows, "--batch-size", 5)
    yield command("gradients", bert / "a", "--data", rows, "--output-gradients", "--fisher")
    head = ("--head", data / "a.head.safetensors", "--fisher", "--labels")
    yield command("head", bert / "base", "--data", rows, *head, "data", "--pooling", "cls")
    yield command("head-sampled", bert / "base", "--data", rows, *head, "sample", "--seed", 2)
    seq2seq = ("--data", data / "b.proxy.pairs.jsonl", "--output-gradients")
    yield command("seq2seq", world.inputs / "t5-f32" / "b", *seq2seq)
    pictures = ("--data", data / "c.proxy.pictures", "--block-fisher", "--memory", "200kB")
    yield command("pictures", world.inputs / "vit-f32" / "c", *pictures)

    def added(*options: object) -> Any:
        def run(out: Path) -> None:
            for part in ("proxy", "validation"):
                file = data / f"a.{part}.jsonl"
                invoke("collect", bert / "a", "--data", file, *options, "-o", out / f"{part}.st")
            parts = ("--add", out / "proxy.st", "--add", out / "validation.st")
            invoke("collect", *parts, "-o", out / "both.safetensors")
            for part in ("proxy", "validation"):
                (out / f"{part}.st").unlink()

        return run

    yield Case("collect/add", added())
    yield Case("collect/add-gradients", added("--fisher", "--output-gradients", "--block-fisher"))


def _routes(world: World) -> Iterator[Case]:
    import eutectic

    def files(kind: str, folder: Path | None) -> dict[str, Any]:
        path = world.inputs / "stats" / kind if folder is None else folder
        prefix = "" if folder is None else f"{kind}."
        return {n: eutectic.load_statistics(path / f"{prefix}{n}.safetensors") for n in NAMES}

    def routed(kind: str, name: str, on_merged: bool = True, **options: Any) -> Case:
        def run(out: Path) -> Any:
            folder = world.inputs / "merged"
            model: Any = eutectic.build_routed(
                load(folder / kind),
                {n: world.inputs / f"{kind}-f32" / n for n in NAMES},
                files(kind, None),
                files(kind, folder) if on_merged else None,
                **options,
            )
            model.save_pretrained(out / "routed")
            read = eutectic.load_routed(out / "routed")
            answers: list[Any] = []
            for mode in ("route", "soft", "vote", "base"):
                with torch.no_grad(), eutectic.routing(read, mode=mode, record=True) as chosen:
                    outputs = read(**batches(kind, 2)[0])
                answers.append([outputs[key] for key in ("logits", "last_hidden_state", "loss")
                                if key in outputs])  # fmt: skip
                answers.append(dict(chosen or {}))
            return model.routing.short, model.routing.left_out, answers

        return Case(f"routed/{kind}/{name}", run)

    for kind in ("bert", "gpt2", "t5", "vit"):
        yield routed(kind, "discriminant", rank=8)
        yield routed(kind, "prototype", router="prototype", rank=4)
    yield routed("bert", "own-statistics", on_merged=False, rank=4)
    yield routed("bert", "shrunk", rank=64, shrinkage=0.3, accumulate=False)
    yield routed("gpt2", "layers", rank=2, layers=["*c_fc.weight"])

    def command(name: str, kind: str, router: str, *words: object) -> Case:
        data = world.inputs / "data"

        def run(out: Path) -> str:
            experts = [f"{n}={world.inputs / f'{kind}-f32' / n}" for n in NAMES]
            options: list[object] = ["--rank", 6, "--router", router, *words]
            for n in NAMES:
                file = {"t5": f"{n}.proxy.pairs.jsonl"}.get(kind, f"{n}.proxy.jsonl")
                options += ["-s", f"{n}={world.stats(kind, n)}"]
                options += ["--router-data", f"{n}={data / file}"]
            merged = world.inputs / "merged" / kind
            folders = ("-o", out / "routed", "--export", out / "export")
            first = invoke("route", merged, *experts, *options, *folders, "--json")
            return first + invoke("route", out / "routed", "--json")

        return Case(f"routed/command/{name}", run)

    yield command("bert-discriminant", "bert", "discriminant")
    yield command("bert-prototype", "bert", "prototype", "--accumulate")
    yield command("gpt2", "gpt2", "discriminant")
    yield command("t5", "t5", "prototype", "--layers", "*.q.weight")


def _torch_encoder(world: World) -> Iterator[Case]:
    """Yield what is done with torch's own packed attention, in memory alone."""
    import eutectic

    def model(seed: int) -> torch.nn.Module:
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True)
        made = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return made

    def data(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(50 + seed)
        return [torch.randn(5, 7, 24, generator=generator) + seed for _ in range(3)]

    def statistics() -> dict[str, Any]:
        return {n: eutectic.collect(model(i), data(i)) for i, n in enumerate(NAMES, 1)}

    def merged(method: str) -> Any:
        experts = {n: model(i).state_dict() for i, n in enumerate(NAMES, 1)}
        known = statistics() if method in WITH_DATA else None
        return eutectic.merge_state_dicts(
            model(0).state_dict(),
            experts,
            method=method,
            statistics=known,
            threads=world.threads,
            tensors=[{"match": "*in_proj_weight", "split": 3}],
        )

    def routed(out: Path) -> Any:
        experts = {n: model(i).state_dict() for i, n in enumerate(NAMES, 1)}
        made = eutectic.build_routed(
            model(0), experts, statistics(), {n: eutectic.collect(model(0), data(i))
                                              for i, n in enumerate(NAMES, 1)}, rank=4
        )  # fmt: skip
        made.save_pretrained(out / "routed")  # type: ignore[operator]
        with torch.no_grad(), eutectic.routing(made, record=True) as chosen:
            answer = made(data(2)[0])
        return answer, dict(chosen)

    yield Case("torch/collect", lambda out: {n: (s.provenance, dict(s))
                                             for n, s in statistics().items()})  # fmt: skip
    for method in ("iso_c", "iso_a", "mats", "esm", "regmean"):
        yield Case(f"torch/merge-{method}", lambda out, m=method: merged(m))
    yield Case("torch/routed", routed)


def _evaluations(world: World) -> Iterator[Case]:
    import eutectic

    def evaluated(kind: str, name: str, family: str | None = None, **options: Any) -> Case:
        def run(out: Path) -> Any:
            folder = world.inputs / f"{family or kind}-f32"
            return eutectic.evaluate(
                world.tasks(kind),
                base=folder / "base",
                experts={n: folder / n for n in NAMES},
                models={"merged": world.inputs / "merged" / (family or kind)},
                output=out / "results.json",
                resamples=50,
                **options,
            )

        return Case(f"evaluate/{kind}/{name}", run)

    yield evaluated("bert", "test")
    yield evaluated("bert", "validation", split="validation", limit=9, seed=2)
    yield evaluated("bert", "bfloat16", dtype="bfloat16", batch_size=5)
    yield evaluated("heads", "test", family="bert")
    for kind in ("gpt2", "t5", "vit"):
        yield evaluated(kind, "test")

    def routes(out: Path) -> Any:
        folder = world.inputs / "bert-f32"
        routed: Any = eutectic.build_routed(
            load(world.inputs / "merged" / "bert"),
            {n: folder / n for n in NAMES},
            {n: eutectic.load_statistics(world.stats("bert", n)) for n in NAMES},
            rank=8,
        )
        routed.save_pretrained(out / "routed")
        copy_tokenizer(folder / "base", out / "routed")
        return [
            eutectic.evaluate(
                world.tasks("heads"), models={"routed": out / "routed"}, routing=mode, resamples=20
            )
            for mode in ("route", "oracle", "base")
        ]

    yield Case("evaluate/routed", routes)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer beside a model that was saved without one."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((source / name).read_bytes())


def _inspections(world: World) -> Iterator[Case]:
    import eutectic

    def inspected(name: str, recipe: dict[str, Any], **options: Any) -> Case:
        def run(out: Path) -> Any:
            return eutectic.inspect(recipe, output=out / "inspection.json", **options)

        return Case(f"inspect/{name}", run)

    def recipe(family: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {**family, "method": "average", **more}

    merged = world.inputs / "merged"
    for kind in ("bert", "gpt2", "t5", "vit"):
        known = recipe(world.family(kind, statistics=True))
        yield inspected(kind, known, merged={"iso": merged / kind})
    split = [{"match": "*q_proj*", "split": 2}]
    yield inspected("split", recipe(world.family("llama"), tensors=split), rank=3)
    yield inspected("lora", recipe(world.adapters("gpt2")), error=0.2)
    yield inspected("odd", recipe(world.odd()), layers="layers.*")
    yield inspected("mixtral", recipe(world.family("mixtral", "bf16")), layers="*layers.0*")


def _searches(world: World) -> Iterator[Case]:
    import eutectic

    def tuned(name: str, recipe: dict[str, Any], search: Any, written: bool = False) -> Case:
        def run(out: Path) -> Any:
            target = {"output": out / "merged"} if written else {}
            return eutectic.tune(recipe, search=search, threads=world.threads, **target)

        return Case(f"tune/{name}", run)

    short = {"points": 4, "tolerance": 0.3, "range": [0.1, 2.0]}
    bert = world.family("bert", statistics=True)
    for method in ("iso_c", "mats", "esm"):
        yield tuned(f"auto-{method}", {**bert, "method": method}, "auto")
    for search, kind in product(("divergence", "validation"), ("bert", "heads")):
        asked = {"search": search, "tasks": world.tasks(kind), **short}
        yield tuned(f"{search}-{kind}", {**bert, "method": "tsv_m"}, asked)
    asked = {"search": "divergence", "tasks": world.tasks("t5"), **short}
    yield tuned("divergence-t5", {**world.family("t5"), "method": "iso_c"}, asked, True)
    asked = {"search": "validation", "tasks": world.tasks("vit"), **short}
    yield tuned("validation-vit", {**world.family("vit"), "method": "ties"}, asked, True)
    demo = world.inputs / "demo"
    asked = {"search": "divergence", "tasks": str(demo / "tasks.yaml"), "points": 3,
             "tolerance": 0.9, "range": [0.3, 1.0]}  # fmt: skip
    recipe = {**world.demo(), "method": "tsv_m"}
    yield tuned("demo", recipe, asked)
