"""Clusters: equal nodes of accelerators, and links. A YAML file each, whose figures name their source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plmtune.config.names import name_hint
from plmtune.config.rules import read_yaml
from plmtune.devices.device import Figure
from plmtune.errors import UserError, did_you_mean
from plmtune.ranges import NOT_NEGATIVE, Range

_ABOVE_0 = Range(above=0)
_SHARE = Range(above=0, most=1)
# key -> (field of Cluster, its unit in SI, its range)
_FIGURES = {
    "memory_gib": ("memory", 2.0**30, _ABOVE_0),
    "system_gib": ("system", 2.0**30, NOT_NEGATIVE),
    "compute_gflop_s": ("compute", 1e9, _ABOVE_0),
    "product_share": ("product_share", 1.0, _SHARE),
    "memory_gb_s": ("bandwidth", 1e9, _ABOVE_0),
    "memory_share": ("memory_share", 1.0, _SHARE),
    "layer_us": ("launches", 1e-6, NOT_NEGATIVE),
}
_LINK = {"gb_s": ("bandwidth", 1e9, _ABOVE_0), "latency_us": ("latency", 1e-6, NOT_NEGATIVE)}
_KEYS = ("name", "nodes", "devices_per_node", "shared", *_FIGURES, "links")


@dataclass(frozen=True)
class Link:
    """What one device sends, in one direction.

    Attributes:
        bandwidth: bytes/s that collectives reach.
        latency: seconds before the first byte of an operation.
    """

    bandwidth: Figure
    latency: Figure

    def seconds(self, sent: float, operations: float = 1) -> float:
        """To send so many bytes in so many operations."""
        return sent / self.bandwidth.value + operations * self.latency.value


@dataclass(frozen=True)
class Cluster:
    """Equal nodes; ranks are dealt to them in order.

    Attributes:
        key: the name it is asked for by.
        nodes, devices_per_node: their product is the number of ranks.
        shared: the figures of memory, compute, bandwidth and launches are a node's, which its processes share (CPUs).
        memory, system: bytes of a device, and those that its system keeps.
        compute: FLOP/s of its data sheet, for MFU, and the share of them that products reach.
        bandwidth: bytes/s of its memory's data sheet, and the share of them that element-wise kernels reach.
        launches: seconds in which the host launches the kernels of one layer's forward.
        node, network: links inside a node and between nodes; a single node needs no network.
    """

    key: str
    name: str
    nodes: int
    devices_per_node: int
    memory: Figure
    system: Figure
    compute: Figure
    product_share: Figure
    bandwidth: Figure
    memory_share: Figure
    launches: Figure
    node: Link
    network: Link | None = None
    shared: bool = False

    @property
    def num_devices(self) -> int:
        return self.nodes * self.devices_per_node

    @property
    def _sharing(self) -> int:
        return self.devices_per_node if self.shared else 1

    @property
    def available(self) -> float:
        """Bytes that one process may take."""
        return (self.memory.value - self.system.value) / self._sharing

    @property
    def peak(self) -> float:
        """FLOP/s of one process by the data sheet."""
        return self.compute.value / self._sharing

    @property
    def products(self) -> float:
        """FLOP/s that matrix products reach in one process."""
        return self.peak * self.product_share.value

    @property
    def elements(self) -> float:
        """Bytes/s that element-wise kernels reach in one process."""
        return self.bandwidth.value * self.memory_share.value / self._sharing

    @property
    def launching(self) -> float:
        """Seconds in which the kernels of a layer's forward are launched."""
        return self.launches.value * self._sharing

    def of_processes(self, number: int) -> Cluster:
        """The same with another number of processes: a part of one node, or whole nodes.

        Raises:
            UserError: for a number that nodes do not give, or for several nodes if the file has no network.
        """
        nodes, left = divmod(number, self.devices_per_node)
        if number <= self.devices_per_node:
            return replace(self, nodes=1, devices_per_node=number)
        if left:
            raise UserError(
                f"--processes {number}: is no multiple of the {self.devices_per_node} devices of a node of {self.key}."
            )
        return _checked(replace(self, nodes=nodes), f"--processes {number}")


def builtin_clusters() -> list[str]:
    """Names of the clusters that come with plmtune."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def load_cluster(name: str) -> Cluster:
    """Read a cluster by name (``h100``) or from a file (``mine.yaml``).

    Raises:
        UserError: for an unknown name, or a file that does not describe a cluster.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{name}: no such file. plmtune ls clusters shows one to start from.")
    else:
        path = Path(__file__).parent / f"{name}.yaml"
        if name not in builtin_clusters():
            near = name_hint(name, builtin_clusters())
            raise UserError(f"There is no cluster {name}; a file of your own is given as FILE.yaml.{near}")
    return _parse(read_yaml(path), path)


def _parse(content: Mapping[str, Any], path: Path) -> Cluster:
    for key in content:
        if key not in _KEYS:
            raise UserError(f"{path}, key {key}: a cluster has no such key.{did_you_mean(str(key), _KEYS)}")
    title = content.get("name")
    if not isinstance(title, str) or not title.strip():
        raise UserError(f"{path}, key name: must be the cluster's name, not {title!r:.80}.")
    shared = content.get("shared", False)
    if not isinstance(shared, bool):
        raise UserError(f"{path}, key shared: must be true or false, not {shared!r:.80}.")
    nodes = _count(content.get("nodes", 1), f"{path}, key nodes")
    figures = {}
    for key, (field, unit, rule) in _FIGURES.items():
        if key not in content:
            raise UserError(f"{path}: the key {key} is missing. Write {key}: {{value: NUMBER, source: WHERE}}.")
        figures[field] = _figure(content[key], unit, rule, f"{path}, key {key}")
    if figures["system"].value >= figures["memory"].value:
        raise UserError(f"{path}, key system_gib: the system keeps all of memory_gib, so nothing is left for a model.")
    links = content.get("links")
    if not isinstance(links, dict) or "node" not in links:
        raise UserError(
            f"{path}, key links: has no link inside a node. Write node: {{gb_s: FIGURE, latency_us: FIGURE}} there, "
            "and network likewise for several nodes."
        )
    for key in links:
        if key not in ("node", "network"):
            known = did_you_mean(str(key), ("node", "network"))
            raise UserError(f"{path}, key links.{key}: a cluster has no such link.{known}")
    cluster = Cluster(
        key=path.stem,
        name=title,
        nodes=nodes,
        devices_per_node=_devices(content, nodes, path),
        shared=shared,
        node=_link(links["node"], f"{path}, key links.node"),
        network=_link(links["network"], f"{path}, key links.network") if "network" in links else None,
        **figures,
    )
    return _checked(cluster, f"{path}, key nodes")


def _checked(cluster: Cluster, where: str) -> Cluster:
    if cluster.nodes > 1 and cluster.network is None:
        raise UserError(
            f"{where}: {cluster.nodes} nodes need a link between them, and {cluster.key} has none. Write "
            "links.network: {gb_s: FIGURE, latency_us: FIGURE}."
        )
    return cluster


def _devices(content: Mapping[str, Any], nodes: int, path: Path) -> int:
    """The devices of each node; a list has one number for each node."""
    found, where = content.get("devices_per_node"), f"{path}, key devices_per_node"
    if not isinstance(found, list):
        return _count(found, where)
    counts = [_count(each, where) for each in found]
    if len(counts) != nodes:
        raise UserError(f"{where}: has {len(counts)} numbers for {nodes} nodes.")
    if len(set(counts)) > 1:
        shown = ", ".join(map(str, counts))
        raise UserError(
            f"{where}: nodes of {shown} devices are unequal, and a device mesh needs equal ones. Plan for those that "
            "are, or for as many devices of each."
        )
    return counts[0]


def _count(found: Any, where: str) -> int:
    if type(found) is not int or not 1 <= found <= 2**20:
        raise UserError(f"{where}: must be a count of at least 1, not {found!r:.80}.")
    return found


def _link(found: Any, where: str) -> Link:
    if not isinstance(found, dict):
        raise UserError(f"{where}: must be {{gb_s: FIGURE, latency_us: FIGURE}}, not {found!r:.80}.")
    for key in found:
        if key not in _LINK:
            raise UserError(f"{where}.{key}: a link has no such key.{did_you_mean(str(key), _LINK)}")
    if missing := [key for key in _LINK if key not in found]:
        raise UserError(
            f"{where}: the key {missing[0]} is missing. Write {missing[0]}: {{value: NUMBER, source: WHERE}}."
        )
    figures = {field: _figure(found[key], unit, rule, f"{where}.{key}") for key, (field, unit, rule) in _LINK.items()}
    return Link(**figures)


def _figure(found: Any, unit: float, rule: Range, where: str) -> Figure:
    if not isinstance(found, dict) or set(found) != {"value", "source"}:
        raise UserError(f"{where}: must be {{value: NUMBER, source: WHERE IT IS FROM}}, not {found!r:.80}.")
    value, source = found["value"], found["source"]
    if not isinstance(source, str) or not source.strip():
        raise UserError(f"{where}: says no source. Name the page, the data sheet or the measurement.")
    if type(value) not in (int, float):
        raise UserError(f"{where}: must be a number, not {value!r:.80}.")
    if not rule.allows(value):
        raise UserError(f"{where}: {rule}, not {value:g}.")
    return Figure(float(value) * unit, source)
