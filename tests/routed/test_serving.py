"""A router in front of peft: requests of several tasks in one batch, each with its own adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eutectic.errors import CheckpointError, RequestError
from eutectic.routed import build_routed, export_lora, routing
from eutectic.serving import RequestRouter

from .world import World, bert, llama, output

pytestmark = pytest.mark.filterwarnings("ignore")
peft: Any = pytest.importorskip("peft")


def exported(make: Any, folder: Path, **options: Any) -> tuple[World, Any, Any]:
    """Export a routed model; return its world, the routed model and a PEFT model of the export."""
    made = make()
    routed = build_routed(
        made.merged, made.state_dicts(), made.statistics(), made.statistics(True), rank=4, **options
    )
    export_lora(routed, folder)
    base = type(made.merged).from_pretrained(folder / "merged")
    first, *others = routed.routing.experts
    served = peft.PeftModel.from_pretrained(base, folder / "experts" / first, adapter_name=first)
    for name in others:
        served.load_adapter(folder / "experts" / name, adapter_name=name)
    return made, routed, served.eval()


@pytest.mark.parametrize("router", ["discriminant", "prototype"])
@pytest.mark.parametrize("make", [llama, bert])
def test_mixed_batches_get_their_adapters(make: Any, router: str, tmp_path: Path) -> None:
    """The choices are those of the routed model's vote, and so are the answers."""
    made, routed, served = exported(make, tmp_path / "adapters", router=router)
    choose = RequestRouter(tmp_path / "adapters", served)
    batch = made.mixed(3)
    names = choose(**batch)
    with routing(routed, mode="vote", record=True) as decisions:
        expected = output(routed, batch)
    votes = next(iter(decisions.values())).tolist()
    assert names == [routed.routing.experts[t] for t in votes]
    assert len(set(names)) > 1
    with torch.no_grad():
        answers = served(**batch, adapter_names=names)
    found = answers.logits if "logits" in answers else answers.last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    layer = list(decisions)[-1]
    with routing(routed, mode="vote", layer=layer, record=True) as decisions:
        routed(**batch)
    alone = RequestRouter(tmp_path / "adapters", served, layer=layer)(**batch)
    assert alone == [routed.routing.experts[t] for t in decisions[layer].tolist()]
    bare = RequestRouter(tmp_path / "adapters", served.get_base_model(), layer=layer)
    assert isinstance(bare(**batch), list)


def test_what_is_no_router(tmp_path: Path) -> None:
    _, routed, served = exported(llama, tmp_path / "a")
    description = json.loads((tmp_path / "a" / "router.json").read_text())
    assert description["adapters"] == {n: f"experts/{n}" for n in routed.routing.experts}
    with pytest.raises(RequestError, match="no routed layer"):
        RequestRouter(tmp_path / "a", served, layer="x")
    with pytest.raises(RequestError, match="has no layer"):
        RequestRouter(tmp_path / "a", torch.nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="route --export"):
        RequestRouter(tmp_path, served)
    (tmp_path / "a" / "router.json").write_text(json.dumps({**description, "format": 9}))
    with pytest.raises(CheckpointError, match="format 9"):
        RequestRouter(tmp_path / "a", served)
