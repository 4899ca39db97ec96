"""A plan's step as a program for each process, for `simulation.simulate`.

Processes of equal data, tensor and context coordinates do the same, so one of each pipeline stage is enough to see the
pipeline. With all processes, groups meet at their collectives and transfers share each device's two ports.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from plmtune.clusters.cluster import Cluster
from plmtune.clusters.costs import Costs, Pass
from plmtune.clusters.job import Job
from plmtune.clusters.memory import Plan
from plmtune.clusters.orders import Action, Kind, pipeline_order
from plmtune.clusters.simulation import Op, Simulated, simulate
from plmtune.clusters.traffic import Sent
from plmtune.parallel.layout import Layout

MOST_PROCESSES = 64  # that are simulated one by one


def simulate_plan(job: Job, cluster: Cluster, plan: Plan, *, all_processes: bool | None = None) -> Simulated:
    """Simulate one step.

    Args:
        all_processes: None: up to `MOST_PROCESSES`; else one for each pipeline stage.
    """
    costs = Costs(job, cluster, plan)
    layout = plan.layout
    if all_processes is None:
        all_processes = layout.num_processes <= MOST_PROCESSES
    every = layout.num_processes // layout.pp  # ranks of one place in the pipeline are neighbours
    ranks = range(layout.num_processes) if all_processes else range(0, layout.num_processes, every)
    return simulate([_Program(costs, rank, grouped=all_processes).ops() for rank in ranks])


def owner(layout: Layout, stage: int) -> int:
    """The process of the pipeline that has a stage."""
    return next(rank for rank in range(layout.pp) if stage in layout.stages_of(rank))


@dataclass(frozen=True)
class _Program:
    """Makes one process's program.

    Attributes:
        grouped: the other members of its groups have programs, too.
    """

    costs: Costs
    rank: int
    grouped: bool

    def ops(self) -> list[Op]:
        costs, layout = self.costs, self.costs.layout
        place = layout.coordinates(self.rank)["pp"]
        gather, (scatter, reduce) = costs.gathered(place), costs.reduced(place)
        # Without a pipeline reductions, and a second gather, run beside the last backward.
        beside = layout.pp == 1 and not costs.cluster.shared
        again = beside and costs.number == 1 and layout.reshard_after_forward
        found = self._start("gather weights", gather * 0.5 if again else gather, 0)
        actions = pipeline_order(layout.schedule, layout.pp, costs.number)[place]
        for index, action in enumerate(actions):
            found += self._receive(action)
            if beside and index == len(actions) - 1:
                found += self._start("gather weights", gather * 0.5, 1) if again else []
                found += [*self._start("reduce gradients", scatter, 0), *self._start("all-reduce gradients", reduce, 0)]
            found += self._work(action, index)
            if index == 0 and found and found[0].do == "start":
                found.append(Op("wait", "gather weights", key=self._key("fsdp", "gather weights", 0)))
            found += self._send(action)
        if beside:
            for name, sent in (("reduce gradients", scatter), ("all-reduce gradients", reduce)):
                if sent.operations:
                    found.append(Op("wait", name, key=self._key(sent.dimension, name, 0)))
        else:
            found += self._collective("reduce gradients", scatter, 0)
            found += self._collective("all-reduce gradients", reduce, 0)
        if costs.tied().operations and place in (0, layout.pp - 1):
            found += self._tied(place)
        return [*found, Op("compute", "optimizer", costs.optimizer())]

    def _work(self, action: Action, index: int) -> list[Op]:
        """Computation and the collectives inside it."""
        done, share = self._pass(action)
        found = [Op("compute", action.kind, share * done.computing)]
        if action.kind != "backward_weight":
            for name, seconds in (("tp", done.tp), ("cp", done.cp)):
                if seconds:
                    found += self._meet(name, f"{name} collectives", seconds, ("work", index))
        return found

    def _pass(self, action: Action) -> tuple[Pass, float]:
        """The costs of an action, and its share of their computation."""
        if action.kind == "forward":
            return self.costs.forward(action.stage), 1.0
        return self.costs.backward(action.stage), 1.0 if action.kind == "backward" else 0.5

    # --- messages

    def _neighbour(self, action: Action, *, incoming: bool) -> int | None:
        """The stage that an action's input comes from, or its result goes to; None: none, or on this process."""
        forward = action.kind == "forward"
        if action.kind == "backward_weight":
            return None
        stage = action.stage + (1 if forward != incoming else -1)
        layout = self.costs.layout
        if not 0 <= stage < layout.num_stages or owner(layout, stage) == owner(layout, action.stage):
            return None
        return stage

    def _message(self, kind: Kind, stage: int, micro_batch: int) -> Hashable:
        every = self.costs.layout.num_processes // self.costs.layout.pp
        return ("forward" if kind == "forward" else "backward", stage, micro_batch, self.rank % every)

    def _receive(self, action: Action) -> list[Op]:
        if self._neighbour(action, incoming=True) is None:
            return []
        return [Op("receive", action.kind, key=self._message(action.kind, action.stage, action.micro_batch))]

    def _send(self, action: Action) -> list[Op]:
        stage = self._neighbour(action, incoming=False)
        if stage is None:
            return []
        sent = self.costs.message()
        key = self._message(action.kind, stage, action.micro_batch)
        return [Op("send", action.kind, sent.seconds(self.costs.cluster), key, self._ports(sent))]

    def _tied(self, place: int) -> list[Op]:
        """The two ends of the pipeline add up the gradients of a tied embedding."""
        sent, layout = self.costs.tied(), self.costs.layout
        key = ("tied", self.rank % (layout.num_processes // layout.pp))
        seconds = sent.seconds(self.costs.cluster)
        return [Op("collective", "tied embedding", seconds, key, self._ports(sent), members=2)]

    # --- collectives

    def _start(self, name: str, sent: Sent, index: int) -> list[Op]:
        if not sent.operations:
            return []
        if self.costs.cluster.shared:  # its own cores copy the bytes
            return self._collective(name, sent, index)
        seconds, key = sent.seconds(self.costs.cluster), self._key(sent.dimension, name, index)
        return [Op("start", name, seconds, key, self._ports(sent), self._members(sent.dimension))]

    def _collective(self, name: str, sent: Sent, index: int) -> list[Op]:
        if not sent.operations:
            return []
        seconds, key = sent.seconds(self.costs.cluster), self._key(sent.dimension, name, index)
        return [Op("collective", name, seconds, key, self._ports(sent), self._members(sent.dimension))]

    def _meet(self, dimension: str, name: str, seconds: float, index: Hashable) -> list[Op]:
        key = self._key(dimension, name, index)
        ports = (("node", self.rank),)
        return [Op("collective", name, seconds, key, ports, self._members(dimension))]

    def _members(self, dimension: str) -> int:
        layout = self.costs.layout
        return 1 if not self.grouped else layout.shard_size if dimension == "fsdp" else getattr(layout, dimension)

    def _key(self, dimension: str, name: str, index: Hashable) -> Hashable:
        """Equal on the members of this process's group."""
        if not self.grouped:
            return (name, index, self.rank)
        own = ("dp_shard", "cp") if dimension == "fsdp" else (dimension,)
        others = tuple(sorted(item for item in self.costs.layout.coordinates(self.rank).items() if item[0] not in own))
        return (name, index, others)

    def _ports(self, sent: Sent) -> tuple[Hashable, ...]:
        return (*([("node", self.rank)] if sent.node else []), *([("network", self.rank)] if sent.network else []))
