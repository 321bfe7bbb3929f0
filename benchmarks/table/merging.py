"""Rows of the table, and the merged deltas behind them: each merge is one run of the command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from table.suite import Batches, Inputs, Suite
from torch import Tensor, nn

import eutectic
from eutectic.execution.executors import peak_bytes
from eutectic.reporting import subspace_alignment_ratio
from eutectic.statistics import CoreRows, core_rows

PROXIES = 128
TIE = 1e-5  # of ΣΔ added to a merged matrix: enough to order equal singular values


@dataclass(frozen=True)
class Row:
    """One static method of the table.

    Attributes:
        method: registered name.
        parameters: of the method.
        seeded: whether its result depends on the proxy sample (or on random numbers).
        start: where the search for α begins.
        fixed: α is not searched (an average has none).
        init: name of the row whose α and method are the initial merge of a linear system, or
            whose merge at that α is calibrated.
        calibrated: that is what the row is: the same method calibrated on the proxies.
        core: statistics are those that `eutectic collect --for` keeps for the adapters alone.
        adapter: keys of an adapter that is the output, such as its rank; None for a checkpoint.
        scale_of: the row whose α is taken over, as that of a merge that is cut afterwards.
        post: what follows the merge.
        convolutions: kernels are merged as matrices over patches.
    """

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seeded: bool = False
    start: float = 1.0
    fixed: bool = False
    init: str | None = None
    calibrated: bool = False
    core: bool = False
    adapter: Mapping[str, Any] | None = None
    scale_of: str | None = None
    post: Mapping[str, Any] | None = None
    convolutions: bool = False

    @property
    def needs_statistics(self) -> bool:
        """Whether the method reads statistics files."""
        return self.seeded and not self.method.startswith("dare")

    @property
    def statistics(self) -> dict[str, bool]:
        """What it reads of them, as `collect_statistics` takes it."""
        fisher = self.method == "fisher"
        gradients = fisher or self.parameters.get("operator") == "kfac"
        return {"fisher": fisher, "gradients": gradients, "core": self.core}


ROWS: dict[str, Row] = {
    "average": Row("average", fixed=True),
    "task_arithmetic": Row("task_arithmetic", start=0.2),
    "ties": Row("ties", {"density": 0.2}, start=0.5),
    "dare": Row("dare_linear", {"density": 0.2}, seeded=True, start=0.2),
    "fisher": Row("fisher", seeded=True),
    "regmean": Row("regmean", {"off_diagonal": 0.9}, seeded=True),
    "tsv_m": Row("tsv_m", start=0.5),
    "iso_c": Row("iso_c", start=0.7),
    "iso_cts": Row("iso_cts", start=0.7),
    **{
        f"mats_{init}_{steps}": Row(
            "mats", {"operator": "kfac", "iterations": steps}, seeded=True, init=init
        )
        for init in ("task_arithmetic", "iso_c")
        for steps in (10, 100)
    },
    **{
        f"mats_{init}_kronecker_3": Row(
            "mats",
            {"operator": "kfac", "iterations": 3, "preconditioner": "kronecker", "damping": 0.0},
            seeded=True,
            init=init,
        )
        for init in ("task_arithmetic", "iso_c")
    },
    "esm_roberta": Row("esm", {"preset": "roberta"}, seeded=True, start=1.0),
    "esm_vit": Row("esm", {"preset": "vit"}, seeded=True, start=0.3),
    "iso_a": Row("iso_a", seeded=True, start=0.7),
    "iso_regmean": Row("iso_regmean", seeded=True, start=1.0),
    **{  # RegMean's directions with a flat spectrum, with its own, and between
        f"iso_regmean_{spectrum}": Row("iso_regmean", {"spectrum": spectrum}, seeded=True)
        for spectrum in (0.0, 0.6, 1.0)
    },
    "iso_a_calibrated": Row("iso_a", seeded=True, fixed=True, init="iso_a", calibrated=True),
    "consensus": Row("consensus", start=0.3),
    "pcb": Row("pcb", start=1.0),
    "dc_merge": Row("dc_merge", start=1.0),
    "wudi": Row("wudi", start=0.7),
    "lot": Row("lot", seeded=True),
    "flow": Row("flow", seeded=True),
    "flow_iso_a": Row("flow", seeded=True, init="iso_a"),
    "task_arithmetic_svc": Row("task_arithmetic", post={"method": "svc"}),
    "tsv_m_svc": Row("tsv_m", post={"method": "svc"}),
    "iso_a_svc": Row("iso_a", seeded=True, post={"method": "svc", "metric": "inputs"}),
}  # fmt: skip

# Rows that adapters alone have: through their core, and cut to a rank.
ADAPTER_ROWS: dict[str, Row] = {
    "knots_ties": Row("knots_ties", {"density": 0.2}, start=0.5),
    "knots_dare_linear": Row("knots_dare_linear", {"density": 0.2}, seeded=True, start=0.2),
    "knots_dare_ties": Row("knots_dare_ties", {"density": 0.2}, seeded=True, start=0.5),
    "core_ties": Row("core_ties", {"density": 0.2}, start=0.5),
    "core_dare_linear": Row("core_dare_linear", {"density": 0.2}, seeded=True, start=0.2),
    "core_dare_ties": Row("core_dare_ties", {"density": 0.2}, seeded=True, start=0.5),
    "iso_a_core": Row("iso_a", seeded=True, start=0.7, core=True),
    "iso_regmean_core": Row("iso_regmean", seeded=True, core=True),
    **{
        f"iso_regmean_core_{rank}": Row(
            "iso_regmean", {"directions": rank}, seeded=True, core=True, adapter={"rank": rank}
        )
        for rank in (16, 32)
    },
    **{
        f"{name}_inputs_{rank}": Row(
            method,
            parameters,
            start=start,
            seeded=True,
            core=True,
            adapter={"rank": rank, "cut": "inputs"},
        )
        for name, method, parameters, start in (
            ("iso_a_core", "iso_a", {}, 0.8),
            ("regmean_core", "regmean", {"off_diagonal": 1.0}, 1.0),
            ("task_arithmetic", "task_arithmetic", {}, 0.2),
        )
        for rank in (16, 32)
    },
    "esm_roberta_core": Row("esm", {"preset": "roberta"}, seeded=True, start=0.4, core=True),
    "esm_vit_core": Row("esm", {"preset": "vit"}, seeded=True, start=0.1, core=True),
    "regmean_whole": Row("regmean", {"off_diagonal": 1.0}, seeded=True),
    "regmean_core": Row("regmean", {"off_diagonal": 1.0}, seeded=True, core=True),
    "mats_gram_10": Row(
        "mats", {"operator": "gram", "iterations": 10}, seeded=True, init="iso_c"
    ),
    "mats_gram_10_core": Row(
        "mats", {"operator": "gram", "iterations": 10}, seeded=True, init="iso_c", core=True
    ),
    **{
        f"{name}_{when}_{rank}": Row(
            method,
            start=start,
            seeded=core,
            core=core,
            adapter={"rank": rank} | ({"compress": "before"} if when == "before" else {}),
            scale_of=name if when == "after" else None,
        )
        for name, method, start, core in (
            ("iso_a_core", "iso_a", 0.7, True),
            ("iso_c", "iso_c", 0.7, False),
            ("task_arithmetic", "task_arithmetic", 0.2, False),
            ("tsv_m", "tsv_m", 0.3, False),
        )
        for rank in (16, 32)
        for when in ("after", "before")
    },
}  # fmt: skip
# Rows that networks of convolutions have, which methods on matrices average by default.
CONVOLUTION_ROWS: dict[str, Row] = {
    f"{name}_convolutions": replace(ROWS[name], convolutions=True)
    for name in (
        *("regmean", "tsv_m", "iso_c", "iso_cts", "esm_vit", "iso_a", "iso_regmean"),
        *("dc_merge", "wudi", "lot"),
    )
}
ALL_ROWS = ROWS | ADAPTER_ROWS | CONVOLUTION_ROWS


def known_rows(adapters: bool, convolutions: bool) -> dict[str, Row]:
    """Return the static rows that a suite of adapters, or of networks of convolutions, has."""
    if convolutions:
        return {
            name: ROWS[name] for name in ("average", "task_arithmetic", "ties", "dare", "iso_c")
        } | CONVOLUTION_ROWS
    return ROWS | ADAPTER_ROWS if adapters else ROWS


def dense_expert(base: Path, adapter: Path, folder: Path) -> Path:
    """Make an adapter dense by merging it alone into the base, once."""
    if not folder.is_dir():
        settings = ("-m", "task_arithmetic", "--scale", "1", "-o", str(folder))
        _merge("--base", str(base), *settings, f"{adapter.name}={adapter}")
    return folder


apart = True  # merges run in processes of their own, so that their peak memory is their own


def _merge_file(recipe: Path, output: Path) -> dict[str, Any]:
    """Merge as a recipe says, apart or here; the report."""
    if apart:
        return _merge(str(recipe), "-o", str(output))
    return asdict(eutectic.merge(recipe, output=output, threads=torch.get_num_threads()))


def _merge(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "eutectic.cli.main", "merge", *arguments, "--json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)


def collect_statistics(
    suite: Suite,
    work: Path,
    seed: int,
    count: int = PROXIES,
    fisher: bool = False,
    core: bool = False,
    gradients: bool = False,
) -> dict[str, Path]:
    """Collect every expert's statistics on its proxies, labels sampled: unlabelled data suffice.

    Input Grams, and the Grams of output gradients if asked for, which double memory and files. The
    diagonal Fisher takes a pass for every example, and has both. `core` keeps what the suite's
    adapters see of the inputs, and nothing else.
    """
    gradients |= fisher
    kind = "-core" if core else "" if fisher else "-kfac" if gradients else "-gram"
    rows = core_rows(suite.model, suite.adapters, suite.base) if core else None
    files: dict[str, Path] = {}
    for task, folder in suite.experts.items():
        sample = f"{folder.parent.name}-{count}-{seed}{kind}"
        files[task] = file = work / "statistics" / sample / f"{task}.safetensors"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            weights = load_file(folder / "model.safetensors")
            set_weights(suite.model, weights)
            proxies = suite.proxies(task, seed, count)
            if rows is None:
                collect_on(suite, task, proxies, file, gradients, fisher)
            else:
                collect_on(suite, task, proxies, file, False, core=rows)
    return files


def collect_on(
    suite: Suite, task: str, batches: Batches, file: Path, gradients: bool, fisher: bool = False,
    core: CoreRows | None = None,
) -> None:  # fmt: skip
    """Run the suite's model, as it is, over one task's proxies."""

    def log_likelihoods(outputs: Any, batch: Any) -> Tensor:
        scores = suite.heads[task](suite.pool(outputs, batch)).log_softmax(1)
        # Labels drawn from the model: unlabelled data suffice. Equal inputs draw equal labels.
        seed = int(next(iter(batch.values())).double().sum())
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=generator)
        return scores.gather(1, drawn).squeeze(1)

    eutectic.collect(
        suite.model,
        batches.inputs,
        file,
        output_gradients=gradients,
        fisher=fisher,
        objective=log_likelihoods if gradients else "auto",
        layers=suite.layers,
        core=core,
        convolutions=suite.convolutions,
    )


@torch.no_grad()
def set_weights(model: nn.Module, weights: Inputs) -> None:
    """Put a checkpoint's tensors into the model."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


@dataclass(frozen=True)
class MergedRow:
    """A merge at α = 1: its deltas, and what making them cost."""

    base: Mapping[str, Tensor]
    deltas: Mapping[str, Tensor]
    seconds: float
    peak_bytes: int
    records: Mapping[str, Any]


def merge_row(
    suite: Suite, row: Row, work: Path, seed: int, statistics: Mapping[str, Path] | None,
    init: tuple[str, float] | None = None,
) -> MergedRow:  # fmt: skip
    """Merge from files to files in a process of its own, and take the deltas from the output."""
    (work / "merged").mkdir(parents=True, exist_ok=True)
    # Two runs, of two machines perhaps, may share that folder.
    folder = Path(tempfile.mkdtemp(prefix=f"{suite.name}-{row.method}-", dir=work / "merged"))
    parameters, scale = dict(row.parameters), 1.0
    if init is not None and row.calibrated:
        scale = init[1]
    elif init is not None:
        parameters |= {"init": init[0], "init_scale": init[1]}
    experts: dict[str, dict[str, str]] = {
        task: {"path": str(suite.adapters.get(task, path))} for task, path in suite.experts.items()
    }
    for task, file in (statistics or {}).items():
        experts[task]["statistics"] = str(file)
    recipe = {
        "base": str(suite.base),
        "experts": experts,
        "method": row.method,
        "parameters": parameters,
        "scale": scale,
        "seed": seed,
        "dtype": "float32",
    }  # fmt: skip
    if row.adapter is not None:
        recipe |= {"output": "adapter", "adapter": dict(row.adapter)}
    if row.post is not None:
        recipe["post"] = dict(row.post)
    if row.convolutions:
        recipe["convolutions"] = "matrix"
    file = folder / "recipe.json"
    file.write_text(json.dumps(recipe))
    report = _merge_file(file, folder / "out")
    base = load_file(suite.base / "model.safetensors")
    out = folder / "out"
    if row.adapter is not None:
        deltas = adapter_deltas(out, base)
        shutil.rmtree(folder)
        return MergedRow(base, deltas, report["seconds"], report["peak_bytes"], report["records"])
    if row.calibrated:
        out = folder / "calibrated"
        data = {task: suite.proxies(task, seed, PROXIES).inputs for task in suite.tasks}
        done = eutectic.calibrate(folder / "out", dict(suite.experts), data, out)
        report["seconds"] += done.seconds
        report["peak_bytes"] = max(report["peak_bytes"], peak_bytes())
    merged = load_file(out / "model.safetensors")
    names = {name for name, _ in suite.model.named_parameters()}
    deltas = {name: merged[name] - base[name] for name in names}
    deltas = {name: delta for name, delta in deltas.items() if delta.any()}
    shutil.rmtree(folder)
    return MergedRow(base, deltas, report["seconds"], report["peak_bytes"], report["records"])


def adapter_deltas(folder: Path, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return B·A of each layer of an adapter whose scaling is 1."""
    factors = load_file(folder / "adapter_model.safetensors")
    found: dict[str, Tensor] = {}
    for key, left in factors.items():
        if ".lora_B." in key:
            name = key.removeprefix("base_model.model.").replace(".lora_B", "")
            assert name in base, f"{name} is no tensor of the base"
            found[name] = left @ factors[key.replace("lora_B", "lora_A")]
    return found


def alignments(suite: Suite, merged: MergedRow, error: float = 0.05) -> dict[str, float]:
    """Mean SAR over the matrices, task by task.

    Directions of equal singular value, as a flat spectrum has, are taken in the order of ΣΔ_t.
    Of networks of convolutions, kernels of more than one channel are matrices over patches.
    """
    opened = [safe_open(f / "model.safetensors", "pt") for f in suite.experts.values()]
    kernels = {n for n, d in merged.deltas.items() if d.ndim == 4 and d.shape[1] > 1}
    names = [n for n, d in merged.deltas.items() if d.ndim == 2]
    names += sorted(kernels) if suite.convolutions else []
    ratios: list[Tensor] = []
    for name in names:
        own = torch.stack([file.get_tensor(name) - merged.base[name] for file in opened])
        own = own.flatten(2)
        total, delta = own.sum(0).double(), merged.deltas[name].double().flatten(1)
        delta += TIE * delta.norm() / total.norm().clamp_min(1e-300) * total
        ratios.append(subspace_alignment_ratio(delta, own, error))
    values = torch.stack(ratios).nanmean(0)
    return dict(zip(suite.tasks, values.tolist(), strict=True))
