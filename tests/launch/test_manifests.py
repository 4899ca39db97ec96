"""Files for SkyPilot and Kubernetes are what their schemas allow, and start the run that was asked for."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from plmtune.errors import UserError
from plmtune.launch.manifests import pytorch_job, skypilot_task, write_manifest

COMMAND = ["run", "demo", "phases=[{name: main, steps: 9}]", "run_dir=runs/demo/1", "resume=true"]

# What is allowed, as far as the files use it. A type, a list of values, [type] of a list's items, a dict of keys, where
# "*" is any other key and a key with "!" is required; a pattern of texts. Other keys are refused.
Schema = Any

# SkyPilot: get_task_schema and _get_single_resources_schema in sky/utils/schemas.py, and get_storage_schema of mounts.
SKYPILOT: Schema = {
    "name": re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9_.-]*[a-zA-Z0-9])?"),
    "num_nodes": int,
    "workdir": str,
    "resources": {
        "infra": re.compile(r"(\*|[a-z0-9]+)(/[^/]+(/[^/]+)?)?"),
        "accelerators": re.compile(r"[\w.-]+:\d+"),
        "use_spot": bool,
        "job_recovery": {"strategy": str, "max_restarts_on_errors": int, "recover_on_exit_codes": [int]},
    },
    "setup": str,
    "run": str,
    "envs": {"*": str},
    "file_mounts": {"*": {"name": str, "source": str, "mode": ["MOUNT", "COPY", "MOUNT_CACHED"]}},
}

# Kubeflow's training operator, release 1.9: manifests/base/crds/kubeflow.org_pytorchjobs.yaml, an OpenAPI schema.
QUANTITY = re.compile(r"[0-9]+(\.[0-9]*)?([KMGTPE]i|[numkMGTPE])?")  # or a whole number
POD: Schema = {
    "containers!": [
        {
            "name!": str,
            "image": str,
            "command": [str],
            "workingDir": str,
            "volumeMounts": [{"name!": str, "mountPath!": str}],
            "resources": {"limits": {"*": (int, QUANTITY)}, "requests": {"*": (int, QUANTITY)}},
        }
    ],
    "volumes": [
        {
            "name!": str,
            "persistentVolumeClaim": {"claimName!": str, "readOnly": bool},
            "emptyDir": {"medium": ["", "Memory"]},
        }
    ],
    "terminationGracePeriodSeconds": int,
}
REPLICA: Schema = {
    "replicas": int,
    "restartPolicy": ["Always", "OnFailure", "Never", "ExitCode"],
    "template": {"spec": POD},
}
PYTORCH_JOB: Schema = {
    "apiVersion!": ["kubeflow.org/v1"],
    "kind!": ["PyTorchJob"],
    "metadata!": {"name!": re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"), "namespace": str},
    "spec!": {
        "nprocPerNode": str,
        "pytorchReplicaSpecs!": {"Master": REPLICA, "Worker": REPLICA},
        "runPolicy": {"backoffLimit": int, "cleanPodPolicy": ["All", "Running", "None"]},
    },
}


def differences(value: Any, schema: Schema, place: str = "") -> list[str]:
    """Where a value is not what a schema allows."""
    if isinstance(schema, tuple):
        return [] if any(not differences(value, one) for one in schema) else [f"{place}: {value!r}"]
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{place}: {value!r} is no {schema.__name__}"]
    if isinstance(schema, re.Pattern):
        return [] if isinstance(value, str) and schema.fullmatch(value) else [f"{place}: {value!r}"]
    if isinstance(schema, list) and all(isinstance(one, str) for one in schema):
        return [] if value in schema else [f"{place}: {value!r} is none of {schema}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{place}: no list"]
        return [line for n, one in enumerate(value) for line in differences(one, schema[0], f"{place}[{n}]")]
    if not isinstance(value, dict):
        return [f"{place}: no table"]
    known = {key.rstrip("!"): child for key, child in schema.items()}
    found = [f"{place}.{key[:-1]}: missing" for key in schema if key.endswith("!") and key[:-1] not in value]
    for key, child in value.items():
        allowed = known.get(key, known.get("*"))
        found += [f"{place}.{key}: unknown"] if allowed is None else differences(child, allowed, f"{place}.{key}")
    return found


def started(script: str) -> list[str]:
    """The words of a script of one command, as a shell divides them, without expanding variables."""
    return shlex.split(script.replace("\\\n", " "))


class TestTheSchemasOfThisTest:
    @pytest.mark.parametrize(
        ("value", "schema"),
        [({"b": 1}, {"a": int}), ({"a": "1"}, {"a": int}), ({}, {"a!": int}), ([1], [str]), ("c", ["a", "b"])],
    )
    def test_refuse_what_is_not_allowed(self, value: Any, schema: Schema) -> None:
        assert differences(value, schema)


class TestSkyPilot:
    def task(self, **settings: Any) -> dict[str, Any]:
        return skypilot_task(COMMAND, name="demo_sft", nodes=2, processes_per_node=8, **settings)

    @pytest.mark.parametrize(
        "settings", [{}, {"accelerators": "H100", "infra": "aws/us-east-1", "storage": "s3://mine", "spot": True}]
    )
    def test_a_task_is_what_the_schema_allows(self, settings: dict[str, Any]) -> None:
        assert differences(self.task(**settings), SKYPILOT) == []

    def test_each_node_starts_its_processes_of_the_run(self) -> None:
        words = started(self.task()["run"])
        assert words[0] == "torchrun" and words[-len(COMMAND) - 2 :] == ["-m", "plmtune", *COMMAND]
        assert words[words.index("--nproc-per-node") + 1] == "8"

    def test_there_is_an_accelerator_a_process(self) -> None:
        assert self.task(accelerators="H100")["resources"]["accelerators"] == "H100:8"

    def test_runs_are_kept_in_the_bucket(self) -> None:
        assert self.task(storage="s3://mine")["file_mounts"]["~/sky_workdir/runs"]["source"] == "s3://mine"

    @pytest.mark.parametrize("settings", [{"accelerators": "H100:8"}, {"storage": "mine"}])
    def test_what_is_no_kind_and_no_bucket_is_refused(self, settings: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=r"H100|mine"):
            self.task(**settings)


class TestKubernetes:
    def job(self, nodes: int = 2, **settings: Any) -> dict[str, Any]:
        return pytorch_job(
            COMMAND, name="demo_sft", nodes=nodes, processes_per_node=8, image="me/plmtune:1", volume="runs", **settings
        )

    @pytest.mark.parametrize("settings", [{}, {"gpus": True, "cpus": 4, "memory_gb": 1.5, "namespace": "lab"}])
    def test_a_job_is_what_the_schema_allows(self, settings: dict[str, Any]) -> None:
        assert differences(self.job(**settings), PYTORCH_JOB) == []

    def test_one_node_is_the_master_and_the_others_are_workers(self) -> None:
        assert list(self.job(1)["spec"]["pytorchReplicaSpecs"]) == ["Master"]
        replicas = self.job(4)["spec"]["pytorchReplicaSpecs"]
        assert (replicas["Master"]["replicas"], replicas["Worker"]["replicas"]) == (1, 3)

    def test_each_pod_starts_its_processes_of_the_run(self) -> None:
        (container,) = self.job()["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
        words = started(container["command"][2])
        assert words[-len(COMMAND) - 2 :] == ["-m", "plmtune", *COMMAND]
        assert words[words.index("--node-rank") + 1] == "$RANK" and words[words.index("--nnodes") + 1] == "2"

    def test_resources_are_those_of_a_node(self) -> None:
        job = self.job(gpus=True, cpus=4, memory_gb=2)
        (container,) = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 8, "cpu": 32, "memory": "2048Mi"}


class TestFile:
    def test_yaml_reads_what_was_written(self, tmp_path: Path) -> None:
        task = skypilot_task(COMMAND, name="demo", nodes=1, processes_per_node=2)
        write_manifest(tmp_path / "task.yaml", task, "sky jobs launch")
        text = (tmp_path / "task.yaml").read_text()
        assert yaml.safe_load(text) == task
        assert "sky jobs launch task.yaml" in text.splitlines()[0] and "\nrun: |\n" in text

    def test_a_file_that_is_there_is_kept(self, tmp_path: Path) -> None:
        (tmp_path / "job.yaml").write_text("mine")
        with pytest.raises(UserError, match="there already"):
            write_manifest(tmp_path / "job.yaml", {}, "kubectl create -f")
        assert (tmp_path / "job.yaml").read_text() == "mine"
