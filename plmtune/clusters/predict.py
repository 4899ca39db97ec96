"""How long a step takes under a plan, by a formula whose terms are shown. `programs` simulates the same step."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

from plmtune.clusters.cluster import Cluster
from plmtune.clusters.costs import Costs
from plmtune.clusters.job import Job
from plmtune.clusters.memory import Memory, Plan, memory_of
from plmtune.clusters.orders import pipeline_order
from plmtune.clusters.simulation import Op, simulate
from plmtune.clusters.traffic import Sent


@dataclass(frozen=True)
class Terms:
    """Seconds of a step of the slowest process of the pipeline.

    Attributes:
        products, elements: matrix products with attention, and element-wise kernels, recomputed ones included.
        launches: what the host takes to launch them beyond that.
        tp, cp: collectives of tensor and context parallelism, which a process waits for.
        bubble: waiting for other stages; messages: for what they send, while the pipeline fills and drains.
        fsdp, dp_replicate: what the collectives of weights and gradients take beyond the computation beside them.
        optimizer: AdamW's step.
    """

    products: float
    elements: float
    launches: float
    tp: float
    cp: float
    bubble: float
    messages: float
    fsdp: float
    dp_replicate: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(getattr(self, term.name) for term in fields(self))


@dataclass(frozen=True)
class Prediction:
    """A plan's step on a cluster. Nothing of it is measured."""

    plan: Plan
    memory: Memory
    terms: Terms
    costs: Costs
    tokens_per_second: float
    mfu: float
    micro_batches: int

    @property
    def seconds(self) -> float:
        return self.terms.total

    @cached_property
    def traffic(self) -> list[Sent]:
        """Of the busiest process, by dimension."""
        return self.costs.traffic()

    @property
    def bubble(self) -> float:
        """The share of the step."""
        return self.terms.bubble / self.seconds


def predict(job: Job, cluster: Cluster, plan: Plan, memory: Memory | None = None) -> Prediction:
    """Predict a step of a layout that `parallel.checks.refusals` allows; memory is computed where it is not given."""
    costs = Costs(job, cluster, plan)
    terms = _terms(costs)
    per_second = job.tokens / terms.total
    return Prediction(
        plan,
        memory or memory_of(job, plan),
        terms,
        costs,
        per_second,
        mfu=per_second * job.flops_per_token / (cluster.num_devices * cluster.peak),
        micro_batches=costs.number,
    )


def _terms(costs: Costs) -> Terms:
    layout, number = costs.layout, costs.number
    passes = [(costs.forward(stage), costs.backward(stage)) for stage in range(layout.num_stages)]
    totals = [forward.total + backward.total for forward, backward in passes]
    work = [sum(totals[stage] for stage in layout.stages_of(rank)) for rank in range(layout.pp)]
    slowest = max(range(layout.pp), key=lambda rank: work[rank])
    mine = [each for stage in layout.stages_of(slowest) for each in passes[stage]]
    message = costs.message().seconds(costs.cluster)
    forward = sum(passes[stage][0].total for stage in layout.stages_of(slowest))
    backward = sum(passes[stage][1].total for stage in layout.stages_of(slowest))
    fsdp, replicate = exposed(costs, slowest, forward, backward)
    return Terms(
        products=number * sum(each.products for each in mine),
        elements=number * sum(each.elements for each in mine),
        launches=number * sum(each.launches for each in mine),
        tp=number * sum(each.tp for each in mine),
        cp=number * sum(each.cp for each in mine),
        bubble=_bubble(costs, totals, work, work[slowest]),
        messages=2 * (layout.num_stages - 1) * message + costs.tied().seconds(costs.cluster),
        fsdp=fsdp,
        dp_replicate=replicate,
        optimizer=costs.optimizer(),
    )


def _bubble(costs: Costs, totals: list[float], work: list[float], slowest: float) -> float:
    """Seconds in which the slowest process waits for others.

    1F1B waits for one micro-batch on each other stage: (pp - 1) / (m + pp - 1) of a step with m equal ones (arXiv
    2104.04473, section 2.2.1). Interleaved stages divide that by the stages of a process (section 2.2.2). ZB-V's is
    taken from its order with forward, backward by inputs and backward by weights of equal length.
    """
    layout = costs.layout
    if layout.pp == 1:
        return 0.0
    others = sum(work) - slowest
    if layout.schedule == "zbv":
        return _bubble_of_v(layout.pp, costs.number) * others / (layout.pp - 1) / 6
    return others / layout.stages_per_rank


@lru_cache(maxsize=256)
def _bubble_of_v(pp: int, micro_batches: int) -> float:
    """Units that a process waits in ZB-V, where each of its two stages takes three units a micro-batch."""
    number = min(micro_batches, 3 * pp)  # beyond, more of them only add work
    layout_ranks = {stage: min(stage, 2 * pp - 1 - stage) for stage in range(2 * pp)}
    programs = []
    for rank, actions in enumerate(pipeline_order("zbv", pp, number)):
        program: list[Op] = []
        for action in actions:
            stage, i = action.stage, action.micro_batch
            if action.kind == "forward" and stage > 0 and layout_ranks[stage - 1] != rank:
                program.append(Op("receive", "", key=("f", stage, i)))
            if action.kind == "backward_input" and stage < 2 * pp - 1 and layout_ranks[stage + 1] != rank:
                program.append(Op("receive", "", key=("b", stage, i)))
            program.append(Op("compute", "", 1.0))
            if action.kind == "forward" and stage < 2 * pp - 1 and layout_ranks[stage + 1] != rank:
                program.append(Op("send", "", key=("f", stage + 1, i)))
            if action.kind == "backward_input" and stage > 0 and layout_ranks[stage - 1] != rank:
                program.append(Op("send", "", key=("b", stage - 1, i)))
        programs.append(program)
    return simulate(programs).makespan - 6 * number


def exposed(costs: Costs, pp_rank: int, forward: float, backward: float) -> tuple[float, float]:
    """Seconds of FSDP2's and of the copies' collectives that no computation hides.

    Gathers run beside the first micro-batch's forward, without a pipeline also beside the last one's backward, as
    reductions do. The first gather and the last reduction have nothing beside them. A pipeline reduces when its
    last backward is done. Processes that share their machine's cores hide nothing.
    """
    layout, cluster = costs.layout, costs.cluster
    gather = costs.gathered(pp_rank)
    scattered, reduced = costs.reduced(pp_rank)
    layers = max(1, sum(costs.stages[stage].layers for stage in layout.stages_of(pp_rank)))
    times = [gather.seconds(cluster), scattered.seconds(cluster), reduced.seconds(cluster)]
    if cluster.shared:
        return times[0] + times[1], times[2]
    if layout.pp > 1:
        return max(times[0] / layers, times[0] - forward) + times[1], times[2]
    again = 0.5 if costs.number == 1 and layout.reshard_after_forward else 0.0
    ahead, behind = times[0] * (1 - again), times[0] * again
    before = max(ahead / layers, ahead - forward)
    beside = behind + times[1] + times[2]
    after = max((times[1] + times[2]) / layers, beside - backward)
    share = times[2] / beside if beside else 0.0
    return before + after * (1 - share), after * share
