"""Zero-shot tasks: the classes' texts through CLIP's text tower are the head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import eutectic
from eutectic.errors import CheckpointError, EutecticError
from eutectic.evaluation import load_model, load_tasks, outputs, prepare
from eutectic.models.zero_shot import completed
from eutectic.routed import find_heads, load_routed, routing
from evaluation.world import hf, tasks, tokenizer
from helpers.cli import invoke
from helpers.configs import tiny_model

pytestmark = [
    pytest.mark.transformers_versions,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
CLASSES = ("w1", "w2", "w3")
PROMPTS = ["w9 {} w4", "{} w5"]


def pictures(folder: Path, count: int = 9, shift: int = 0) -> Path:
    draw = np.random.default_rng(shift)
    for i in range(count):
        target = folder / CLASSES[i % 3]
        target.mkdir(parents=True, exist_ok=True)
        low = 120 * (i % 3 > 0) * bool(shift)
        pixels = draw.integers(low, low + 120, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(target / f"{i:03d}.png")
    return folder


def clip(seed: int, base: Any = None) -> Any:
    torch.manual_seed(seed)
    model = tiny_model("CLIPModel") if base is None else base
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.4 if base is None else 0.1) * torch.randn(parameter.shape))
    return model.eval()


def save(model: Any, folder: Path, *, texts: bool = True) -> Path:
    model.save_pretrained(folder)
    hf.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    if texts:
        tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero-shot")
    model = clip(0)
    model.config.text_config.eos_token_id = 1
    save(model, folder / "base")
    for t, name in enumerate("ab"):
        save(clip(1 + t, hf.CLIPModel.from_pretrained(folder / "base")), folder / name)
        pictures(folder / f"data-{name}", shift=1 + t)
    return folder


def spec(data: Path, **more: Any) -> dict[str, Any]:
    return {"kind": "zero-shot-image-classification", "data": str(data), **more}


def reference(folder: Path, data: Path, prompts: list[str]) -> tuple[torch.Tensor, list[int]]:
    """Logits by transformers' own forward, one prompt at a time, averaged as embeddings."""
    model = hf.CLIPModel.from_pretrained(folder).eval()
    processor = hf.AutoImageProcessor.from_pretrained(folder)
    paths = sorted(data.rglob("*.png"))
    pixels = processor(images=[Image.open(p).convert("RGB") for p in paths], return_tensors="pt")
    embedded = []
    with torch.no_grad():
        for name in CLASSES:
            found = []
            for prompt in prompts:
                ids = tokenizer()([prompt.replace("{}", name)], return_tensors="pt")["input_ids"]
                out = model(input_ids=ids, pixel_values=pixels["pixel_values"])
                found.append(out.text_embeds[0])  # of length 1 already
            embedded.append(torch.stack(found).mean(0))
        head = torch.nn.functional.normalize(torch.stack(embedded), dim=-1)
        logits = model.logit_scale.exp() * out.image_embeds @ head.T
    return logits, [CLASSES.index(path.parent.name) for path in paths]


@pytest.mark.parametrize("prompts", [["{}"], PROMPTS])
def test_the_head_is_that_of_clip(world: Path, tmp_path: Path, prompts: list[str]):
    file = tasks(tmp_path / "t.yaml", a=spec(world / "data-a", prompts=prompts))
    task = load_tasks(file)["a"]
    expected, right = reference(world / "a", world / "data-a", prompts)
    ready = prepare(task, "test", world / "a", batch_size=4)
    assert ready.classes == CLASSES and list(ready.references) == right
    found = outputs(load_model(world / "a", task), ready)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    results = eutectic.evaluate(file, base=world / "base", experts={"a": world / "a"})
    accuracy = float((expected.argmax(1) == torch.tensor(right)).double().mean())
    assert [r.value for r in results.results if r.checkpoint == "a"] == [accuracy]


def test_a_tower_of_pictures_is_completed_by_the_base(world: Path, tmp_path: Path):
    """As experts are published: keys with or without `vision_model.`, no projection, no texts."""
    whole = hf.CLIPModel.from_pretrained(world / "base")
    whole.vision_model.load_state_dict(
        hf.CLIPModel.from_pretrained(world / "a").vision_model.state_dict()
    )
    save(whole, tmp_path / "whole")
    tower = hf.CLIPVisionModel(whole.config.vision_config)
    state = {k: v for k, v in whole.state_dict().items() if k.startswith("vision_model.")}
    own = next(iter(tower.state_dict())).startswith("vision_model.")
    tower.load_state_dict(
        {k if own else k.removeprefix("vision_model."): v for k, v in state.items()}
    )
    save(tower, tmp_path / "tower", texts=False)
    expected, _ = reference(tmp_path / "whole", world / "data-a", PROMPTS)
    file = tasks(tmp_path / "t.yaml", a=spec(world / "data-a", prompts=PROMPTS))
    task = load_tasks(file)["a"]
    ready = prepare(task, "test", tmp_path / "tower", base=world / "base")
    model = load_model(tmp_path / "tower", task, base=world / "base")
    torch.testing.assert_close(outputs(model, ready), expected, atol=1e-4, rtol=1e-4)
    found = eutectic.evaluate(file, models=[tmp_path / "tower"], base=world / "base")
    right = torch.tensor(ready.references)
    value = float((expected.argmax(1) == right).double().mean())
    assert found.results[-1].value == value
    named = tasks(
        tmp_path / "n.yaml",
        a=spec(world / "data-a", prompts=PROMPTS, text_model=str(world / "base")),
    )
    assert eutectic.evaluate(named, models=[tmp_path / "tower"]).results[0].value == value
    with pytest.raises(CheckpointError, match="text_model"):
        eutectic.evaluate(file, models=[tmp_path / "tower"])
    prefixed = completed(state, whole.state_dict())
    assert all(torch.equal(prefixed[k], v) for k, v in whole.state_dict().items())
    with pytest.raises(CheckpointError, match="text_model"):
        completed({"other.weight": torch.ones(2)}, whole.state_dict())


def test_a_search_for_the_scale_runs_zero_shot_tasks(world: Path, tmp_path: Path):
    specs = {
        n: {
            **spec(world / f"data-{n}", prompts=PROMPTS),
            "data": {"proxy": str(world / f"data-{n}")},
        }
        for n in "ab"
    }
    file = tasks(tmp_path / "t.yaml", **specs)
    recipe = {"base": str(world / "base"), "experts": {n: str(world / n) for n in "ab"}}
    report = eutectic.tune(
        {**recipe, "method": "task_arithmetic"},
        search={"search": "divergence", "tasks": str(file), "points": 3, "tolerance": 0.5},
        output=tmp_path / "merged",
    )
    # The divergence at the chosen α, computed anew from the written model.
    point = next(p for p in report.search["points"] if p["scale"] == report.scale)
    for name in "ab":
        log = [
            reference(folder, world / f"data-{name}", PROMPTS)[0].double().log_softmax(-1)
            for folder in (world / name, tmp_path / "merged")
        ]
        expected = float((log[0].exp() * (log[0] - log[1])).sum(1).mean())
        assert point["parts"][name] == pytest.approx(expected, rel=1e-3)


def test_clip_is_routed_by_its_pictures(world: Path, tmp_path: Path):
    experts = {n: world / n for n in "ab"}
    eutectic.merge(base=world / "base", experts=experts, method="average", output=tmp_path / "m")
    kind = ["--task", "zero-shot-image-classification"]
    words: list[Any] = ["route", tmp_path / "m", *(f"{n}={world / n}" for n in "ab")]
    for name in "ab":
        stats = tmp_path / f"{name}.stats"
        data = world / f"data-{name}"
        assert invoke("collect", world / name, "--data", data, "-o", stats, *kind).code == 0
        held = eutectic.load_statistics(stats)
        assert held and all(key.startswith("vis") for key in held if held[key].count)
        words += ["-s", f"{name}={stats}", "--router-data", f"{name}={data}"]
    answer = invoke(*words, *kind, "--rank", 16, "-o", tmp_path / "routed")
    assert answer.code == 0, answer.err
    assert "Samples sent to their own expert, on its own data" in answer.out
    assert "a tower of which no statistics saw anything" in answer.out
    routed = load_routed(tmp_path / "routed")
    assert len(routed.routing.left_out) == 10
    assert all(name.startswith("text_model.") for name in routed.routing.left_out)
    specs = {n: spec(world / f"data-{n}", prompts=PROMPTS) for n in "ab"}
    file = tasks(tmp_path / "t.yaml", **specs)
    found = eutectic.evaluate(file, models={"r": tmp_path / "routed"}, routing="oracle")
    assert {r.task: 0 <= r.value <= 1 for r in found.results} == {"a": True, "b": True}
    # What it says of a task is what the routed tower of pictures and its own texts give.
    task = load_tasks(file)["a"]
    from eutectic.evaluation.checkpoints import named_checkpoints

    asked = named_checkpoints({"a": task}, None, {}, {"r": tmp_path / "routed"}, "oracle")
    ready = prepare(task, "test", tmp_path / "m")
    model = asked.load(asked.all[0], task)
    with asked.routed_as_asked(model, asked.all[0], task):
        said = outputs(model, ready)
    batch = torch.cat([b["pixel_values"] for b in ready.batches])
    with torch.no_grad(), routing(routed, mode="oracle", expert="a"):
        features = routed.visual_projection(routed.vision_model(pixel_values=batch).pooler_output)
    merged, _ = reference(tmp_path / "m", world / "data-a", PROMPTS)
    assert not torch.allclose(said, merged, atol=1e-3)
    from eutectic.models.zero_shot import class_embeddings

    head = class_embeddings(load_model(tmp_path / "m", task), ready.texts, 3)
    scale = routed.logit_scale.exp()
    expected = scale * torch.nn.functional.normalize(features, dim=-1) @ head.T
    torch.testing.assert_close(said, expected.detach(), atol=1e-4, rtol=1e-4)
    assert find_heads(tmp_path / "m", experts) == {}


def test_a_routed_tower_of_pictures_is_completed_too(world: Path, tmp_path: Path):
    """Built of towers alone, it says what the whole routed model says."""
    from eutectic.routed import build_routed
    from eutectic.statistics import collect

    whole = {n: hf.CLIPModel.from_pretrained(world / n).eval() for n in ("base", "a", "b")}
    pixels = {t: torch.randn(8, 3, 8, 8) + t for t in range(2)}
    for model in whole.values():  # the base completes them: other parts are its own
        for part in ("text_model", "visual_projection"):
            getattr(model, part).load_state_dict(getattr(whole["base"], part).state_dict())
        model.logit_scale.data.copy_(whole["base"].logit_scale.data)
    towers = {}
    for name, model in whole.items():
        tower = hf.CLIPVisionModel(model.config.vision_config).eval()
        inner = getattr(tower, "vision_model", tower)
        inner.load_state_dict(model.vision_model.state_dict())
        towers[name] = tower
    statistics = {n: collect(towers[n], [{"pixel_values": pixels[t]}]) for t, n in enumerate("ab")}
    routed = build_routed(
        towers["base"], {n: towers[n].state_dict() for n in "ab"}, statistics, rank=4
    )
    routed.save_pretrained(tmp_path / "routed")
    save_processor = hf.ViTImageProcessor(size={"height": 8, "width": 8})
    save_processor.save_pretrained(tmp_path / "routed")
    task = load_tasks(tasks(tmp_path / "t.yaml", a=spec(world / "data-a", prompts=PROMPTS)))["a"]
    from eutectic.evaluation.checkpoints import named_checkpoints
    from eutectic.models.zero_shot import class_embeddings

    folders = {"r": tmp_path / "routed"}
    asked = named_checkpoints({"a": task}, world / "base", {}, folders, "oracle")
    ready = prepare(task, "test", world / "base")
    with asked.routed_as_asked(model := asked.load(asked.all[1], task), asked.all[1], task):
        said = outputs(model, ready)
    batch = torch.cat([b["pixel_values"] for b in ready.batches])
    with torch.no_grad(), routing(routed, mode="oracle", expert="a"):
        features = whole["base"].visual_projection(routed(pixel_values=batch).pooler_output)
    head = class_embeddings(load_model(world / "base", task), ready.texts, 3)
    scale = whole["base"].logit_scale.exp().detach()
    expected = scale * torch.nn.functional.normalize(features, dim=-1) @ head.T
    torch.testing.assert_close(said, expected, atol=1e-4, rtol=1e-4)
    found = eutectic.evaluate({"a": task}, models=folders, base=world / "base")
    assert found.results[-1].n == 9


def test_gradients_are_of_the_texts_as_a_head(world: Path, tmp_path: Path):
    kind = ["--task", "zero-shot-image-classification", "--output-gradients"]
    words = ["collect", world / "a", "--data", world / "data-a", "-o", tmp_path / "s", *kind]
    answer = invoke(*words, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1])
    assert answer.code == 0, answer.err
    found = eutectic.load_statistics(tmp_path / "s")["visual_projection.weight"]
    # By hand: the gradient of the log-likelihood with respect to the projection's output.
    model = hf.CLIPModel.from_pretrained(world / "a").eval()
    task = load_tasks(tasks(tmp_path / "t.yaml", a=spec(world / "data-a", prompts=PROMPTS)))["a"]
    from eutectic.models.zero_shot import class_embeddings

    ready = prepare(task, "test", world / "a")
    head = class_embeddings(load_model(world / "a", task), ready.texts, 3)
    batch = torch.cat([b["pixel_values"] for b in ready.batches])
    with torch.no_grad():
        outputs_of = model.vision_model(pixel_values=batch).pooler_output
        features = model.visual_projection(outputs_of)
    features.requires_grad_(True)
    logits = model.logit_scale.exp().detach() * torch.nn.functional.normalize(features, dim=-1)
    likelihood = (logits @ head.T).log_softmax(-1)[range(9), list(ready.references)].sum()
    (gradient,) = torch.autograd.grad(likelihood, features)
    expected = gradient.double().T @ gradient.double()
    torch.testing.assert_close(found.output_gradient_gram.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompts": ["no place"]}, "one {} for the class name"),
        ({"prompts": ["{} and {}"]}, "one {} for the class name"),
        ({"text_model": "nowhere"}, "nowhere"),
        ({"head": "head.safetensors"}, "`head` is not for the kind"),
        ({"max_length": 8}, "`max_length` is not for the kind"),
    ],
)
def test_faults_of_such_tasks_are_told(
    world: Path, tmp_path: Path, wrong: dict[str, Any], message: str
):
    file = tasks(tmp_path / "t.yaml", a=spec(world / "data-a", **wrong))
    with pytest.raises(EutecticError, match=message.replace("{", r"\{")):
        load_tasks(file)
    other = {"kind": "image-classification", "data": str(world / "data-a"), "prompts": ["{}"]}
    with pytest.raises(EutecticError, match="are for the kind"):
        load_tasks(tasks(tmp_path / "o.yaml", a=other))


def test_labels_that_only_count_need_names(world: Path, tmp_path: Path):
    for i, name in enumerate(CLASSES):
        (tmp_path / "data" / str(i)).mkdir(parents=True)
        source = next((world / "data-a" / name).iterdir())
        (tmp_path / "data" / str(i) / "x.png").write_bytes(source.read_bytes())
    file = tasks(tmp_path / "t.yaml", a=spec(tmp_path / "data"))
    with pytest.raises(EutecticError, match=r"labels: \[cat, dog"):
        eutectic.evaluate(file, models=[world / "a"])
    named = tasks(tmp_path / "n.yaml", a=spec(tmp_path / "data", labels=list(CLASSES)))
    assert eutectic.evaluate(named, models=[world / "a"]).results[0].n == 3
