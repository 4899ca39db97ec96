"""Files that run ``plmtune run`` elsewhere: a task of SkyPilot, and a PyTorchJob of Kubeflow. Nothing is submitted.

Both start torchrun once a node. The command has `resume=true` and its `run_dir`: a job that the cluster starts again
resumes its run, if the runs are on storage that outlives the machine.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from plmtune.errors import UserError
from plmtune.extras import install_here
from plmtune.io.atomic import write_atomically

_PORT = 29500
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def skypilot_task(
    command: Sequence[str],
    *,
    name: str,
    nodes: int,
    processes_per_node: int,
    accelerators: str | None = None,
    infra: str | None = None,
    storage: str | None = None,
    spot: bool = False,
) -> dict[str, Any]:
    """A task of SkyPilot (docs.skypilot.co/en/latest/reference/yaml-spec.html) that runs ``plmtune COMMAND``.

    Args:
        command: the words behind plmtune.
        accelerators: a kind, one for each process; None: CPUs.
        infra: a cloud, region or Kubernetes context.
        storage: the address of a bucket, mounted as runs/.
        spot: use spot instances.

    Raises:
        UserError: if `storage` is no bucket, or `accelerators` counts them.
    """
    if accelerators and not re.fullmatch(r"[\w.-]+", accelerators):
        raise UserError(f"--accelerators {accelerators:.80}: name the kind alone, such as H100, one a process.")
    if storage and not re.fullmatch(r"[a-z0-9]+://[^\s/]+(/\S*)?", storage):
        raise UserError(f"--storage {storage:.80}: must be the address of a bucket, such as s3://my-runs.")
    resources: dict[str, Any] = {"infra": infra} if infra else {}
    if accelerators:
        resources["accelerators"] = f"{accelerators}:{processes_per_node}"
    if spot:
        resources["use_spot"] = True
    # SkyPilot itself recovers a preempted job. torchrun ends with 1 also after a run that was stopped and has saved.
    resources["job_recovery"] = {"max_restarts_on_errors": 3}
    run = _torchrun(
        command,
        nodes="$SKYPILOT_NUM_NODES",
        processes_per_node=processes_per_node,
        rank="$SKYPILOT_NODE_RANK",
        address='$(echo "$SKYPILOT_NODE_IPS" | head -n 1)',
        port=str(_PORT),
    )
    task: dict[str, Any] = {
        "name": _kubernetes_name(name),
        "num_nodes": nodes,
        "workdir": ".",
        "resources": resources,
        "setup": f"{install_here()}\n",
        "run": run,
    }
    if storage:
        task["file_mounts"] = {"~/sky_workdir/runs": {"source": storage, "mode": "MOUNT"}}
    return task


def pytorch_job(
    command: Sequence[str],
    *,
    name: str,
    nodes: int,
    processes_per_node: int,
    image: str,
    volume: str,
    namespace: str | None = None,
    gpus: bool = False,
    cpus: int | None = None,
    memory_gb: float | None = None,
) -> dict[str, Any]:
    """A PyTorchJob (kubeflow.org/v1, training operator 1.x) that runs ``plmtune COMMAND``.

    Args:
        command: the words behind plmtune.
        image: a container image that has plmtune.
        volume: a persistent volume claim, mounted as /workspace/runs; /workspace is the working directory.
        gpus: request a GPU for each process.
        cpus: CPU cores of each process.
        memory_gb: memory of each node.
    """
    requested: dict[str, Any] = {"nvidia.com/gpu": processes_per_node} if gpus else {}
    requested |= {"cpu": cpus * processes_per_node} if cpus else {}
    requested |= {"memory": f"{round(memory_gb * 1024)}Mi"} if memory_gb else {}
    # The operator sets MASTER_ADDR and MASTER_PORT, and RANK as the number of the pod. torchrun replaces RANK.
    script = _torchrun(
        command,
        nodes=str(nodes),
        processes_per_node=processes_per_node,
        rank="$RANK",
        address="$MASTER_ADDR",
        port="$MASTER_PORT",
    )
    container = {
        "name": "pytorch",  # the operator looks for this name
        "image": image,
        "command": ["sh", "-c", script],
        "workingDir": "/workspace",
        "volumeMounts": [
            {"name": "runs", "mountPath": "/workspace/runs"},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
        **({"resources": {"limits": requested, "requests": dict(requested)}} if requested else {}),
    }
    pod = {
        "containers": [container],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": volume}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},  # NCCL needs more than Docker's 64 MiB
        ],
        # A preempted run finishes its step and saves within this time.
        "terminationGracePeriodSeconds": 600,
    }

    def replica(count: int) -> dict[str, Any]:
        return {"replicas": count, "restartPolicy": "OnFailure", "template": {"spec": pod}}

    replicas = {"Master": replica(1), **({"Worker": replica(nodes - 1)} if nodes > 1 else {})}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": _kubernetes_name(name), **({"namespace": namespace} if namespace else {})},
        "spec": {
            "runPolicy": {"backoffLimit": 10, "cleanPodPolicy": "None"},
            "pytorchReplicaSpecs": replicas,
        },
    }


def write_manifest(path: Path, content: dict[str, Any], way: str) -> None:
    """Write a file as YAML, with the command that submits it; one that is there is kept, and refused."""
    if path.exists():
        raise UserError(f"--write {path}: the file is there already. Remove it, or name another.")
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=1000)
    write_atomically(path, f"# Written by plmtune launch. Submit it: {way} {path.name}\n{text}", user_error=True)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as they are, and every value in full where it appears twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _torchrun(
    command: Sequence[str], *, nodes: str, processes_per_node: int, rank: str, address: str, port: str
) -> str:
    """A shell script that starts this node's processes; the arguments may be variables of the shell."""
    return (
        f"torchrun --nnodes {nodes} --nproc-per-node {processes_per_node} --node-rank {rank} \\\n"
        f'  --master-addr "{address}" --master-port {port} \\\n'
        f"  --signals-to-handle {_SIGNALS} \\\n"
        f"  -m plmtune {shlex.join(command)}\n"
    )


def _kubernetes_name(name: str) -> str:
    """The name of a run as DNS writes names: lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:50] or "plmtune"
