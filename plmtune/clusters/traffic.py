"""What processes send over the links of a cluster, by rings.

An all-gather or a reduce-scatter of B bytes over n processes sends B (n - 1) / n from each of them, an all-reduce twice
that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from plmtune.clusters.cluster import Cluster
from plmtune.parallel.layout import DIMENSIONS, Layout


@dataclass(frozen=True)
class Sent:
    """What one collective, or several of a kind, send from one process.

    Attributes:
        dimension: tp, cp, fsdp, dp_replicate or pp.
        node, network: bytes inside a node and between nodes.
        operations: whose latency counts.
    """

    dimension: str
    node: float
    network: float
    operations: float

    def __add__(self, other: Sent) -> Sent:
        return Sent(
            self.dimension, self.node + other.node, self.network + other.network, self.operations + other.operations
        )

    def __mul__(self, factor: float) -> Sent:
        return Sent(self.dimension, self.node * factor, self.network * factor, self.operations * factor)

    def seconds(self, cluster: Cluster) -> float:
        """Both links work at once; the slower one counts."""
        if not self.node and not self.network:
            return 0.0
        times = [cluster.node.seconds(self.node, self.operations)] if self.node else []
        if self.network:
            assert cluster.network is not None
            times.append(cluster.network.seconds(self.network, self.operations))
        return max(times)


def stride_and_size(layout: Layout, dimension: str) -> tuple[int, int]:
    """How far apart neighbours of a group are in the order of ranks, and how many it has.

    fsdp is the group of dp_shard and cp together.
    """
    inner, found = 1, {}
    for name in reversed(DIMENSIONS):
        found[name] = (inner, getattr(layout, name))
        inner *= getattr(layout, name)
    if dimension == "fsdp":
        return found["cp"][0], layout.shard_size
    return found[dimension]


def in_one_node(layout: Layout, dimension: str, devices: int) -> int:
    """Processes of the first rank's group that are in its node."""
    stride, size = stride_and_size(layout, dimension)
    return max(1, min(size, -(-devices // stride)))


@lru_cache(maxsize=4096)
def _group(layout: Layout, dimension: str, devices: int) -> tuple[int, int]:
    """The size of a dimension's group, and how many of it are in one node."""
    return stride_and_size(layout, dimension)[1], in_one_node(layout, dimension, devices)


def ring(layout: Layout, cluster: Cluster, dimension: str, total: float, *, operations: float = 1) -> Sent:
    """An all-gather or a reduce-scatter of `total` bytes over a dimension's group.

    In a ring through g processes of each node, one of g sends to another node.
    """
    size, near = _group(layout, dimension, cluster.devices_per_node)
    if size == 1:
        return Sent(dimension, 0.0, 0.0, 0.0)
    sent = total * (size - 1) / size
    crossing = 0.0 if near == size else 1 / near
    # The latency of a ring grows with its length; NCCL's trees and chunks grow slower (ours: with the logarithm).
    return Sent(dimension, sent * (1 - crossing), sent * crossing, operations * max(1, (size - 1).bit_length()))


def to_next_stage(layout: Layout, cluster: Cluster, total: float) -> Sent:
    """A message of `total` bytes to the next stage's process."""
    near = in_one_node(layout, "pp", cluster.devices_per_node)
    across = 0.0 if near == layout.pp else 1 / near
    return Sent("pp", total * (1 - across), total * across, 1)
