"""The guide's file for KubeRay has fields that the RayJob of KubeRay 1.7.0 has, of their types.

The list below was written down from that version's definition (`ray.io_rayjobs.yaml`), which is 1.4
MB; `*` marks what it, or the operator where nothing scales by itself, asks for.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "cluster.md"
POD = {
    "*spec": {
        "*containers": [
            {
                "*name": str,
                "image": str,
                "resources": {"limits": dict},
                "volumeMounts": [{"*name": str, "*mountPath": str}],
            }
        ],
        "volumes": [{"*name": str, "persistentVolumeClaim": {"*claimName": str}}],
    }
}
WORKERS = {
    "*groupName": str,
    "replicas": int,
    "*minReplicas": int,
    "*maxReplicas": int,
    "rayStartParams": dict,
    "*template": POD,
}
RAY_JOB: Any = {
    "*apiVersion": str,
    "*kind": str,
    "*metadata": {"*name": str},
    "*spec": {
        "entrypoint": str,
        "shutdownAfterJobFinishes": bool,
        "backoffLimit": int,
        "*rayClusterSpec": {
            "rayVersion": str,
            "*headGroupSpec": {"rayStartParams": dict, "*template": POD},
            "workerGroupSpecs": [WORKERS],
        },
    },
}


def faults(value: Any, form: Any, where: str = "") -> list[str]:
    """Return what is unknown, missing or of another type."""
    if isinstance(form, type):
        return [] if type(value) is form else [f"{where}: {value!r}"]
    if isinstance(form, list):
        if not isinstance(value, list):
            return [f"{where}: {value!r}"]
        return [f for i, v in enumerate(value) for f in faults(v, form[0], f"{where}[{i}]")]
    if not isinstance(value, dict):
        return [f"{where}: {value!r}"]
    known = {key.removeprefix("*"): own for key, own in form.items()}
    needed = {key[1:] for key in form if key.startswith("*")}
    found = [f"{where}.{key} is missing" for key in sorted(needed - value.keys())]
    for key, own in value.items():
        found += faults(own, known[key], f"{where}.{key}") if key in known else [f"{where}.{key}?"]
    return found


@pytest.fixture
def job() -> dict[str, Any]:
    blocks = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (found,) = (own for own in map(yaml.safe_load, blocks) if own["kind"] == "RayJob")
    return found


def test_the_job_is_one_of_kuberay(job: dict[str, Any]) -> None:
    assert faults(job, RAY_JOB) == []
    assert job["apiVersion"] == "ray.io/v1"
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        # Ray takes parameters as words of a command line, so that none may be a number.
        assert all(isinstance(own, str) for own in group["rayStartParams"].values())
        volumes = {own["name"] for own in group["template"]["spec"]["volumes"]}
        for container in group["template"]["spec"]["containers"]:
            assert {own["name"] for own in container["volumeMounts"]} <= volumes
            limits = container["resources"]["limits"]
            assert all(re.fullmatch(r"\d+(Mi|Gi)?", own) for own in limits.values())
        low, high = (group.get(key, 0) for key in ("minReplicas", "maxReplicas"))
        assert low <= group.get("replicas", low) <= high


def test_mistakes_are_found(job: dict[str, Any]) -> None:
    bad = copy.deepcopy(job)
    cluster = bad["spec"]["rayClusterSpec"]
    cluster["headGroupSpec"]["template"]["spec"]["container"] = []
    cluster["workerGroupSpecs"][0]["replicas"] = "4"
    del cluster["workerGroupSpecs"][0]["groupName"]
    assert faults(bad, RAY_JOB) == [
        ".spec.rayClusterSpec.headGroupSpec.template.spec.container?",
        ".spec.rayClusterSpec.workerGroupSpecs[0].groupName is missing",
        ".spec.rayClusterSpec.workerGroupSpecs[0].replicas: '4'",
    ]


def test_the_job_names_the_version_of_ray_that_is_tested(job: dict[str, Any]) -> None:
    pins = (GUIDE.parents[2] / "constraints" / "dev.txt").read_text(encoding="utf-8")
    assert f"ray=={job['spec']['rayClusterSpec']['rayVersion']}\n" in pins
