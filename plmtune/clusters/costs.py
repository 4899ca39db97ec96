"""What a layout costs a process in a step: seconds of each part, and bytes that it sends over each link.

The arithmetic is Megatron-LM's for tensor, sequence and pipeline parallelism (arXiv 2104.04473, 2205.05198) and ZeRO's
for sharded data (arXiv 1910.02054).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from plmtune.clusters.cluster import Cluster
from plmtune.clusters.job import Job, StageSizes
from plmtune.clusters.memory import Plan, kept_share
from plmtune.clusters.traffic import Sent, ring, to_next_stage

# Passes over a layer's saved activations by element-wise kernels: written and read once in the forward; read, and
# gradients of the same size written and read in the backward. Ours.
_FORWARD_PASSES, _BACKWARD_PASSES = 2, 4
# Bytes an AdamW step reads and writes for a number: weight, gradient and two moments in fp32, three of them written.
_OPTIMIZER_BYTES = 28


@dataclass(frozen=True)
class Pass:
    """One forward or backward of a stage on a micro-batch, in seconds.

    Attributes:
        products: matrix products and attention; elements: element-wise kernels.
        launches: what the host takes to launch their kernels beyond that.
        tp, cp: their collectives.
    """

    products: float
    elements: float
    launches: float
    tp: float
    cp: float

    @property
    def computing(self) -> float:
        return self.products + self.elements + self.launches

    @property
    def total(self) -> float:
        return self.computing + self.tp + self.cp


class Costs:
    """The costs of one plan for a job on a cluster."""

    def __init__(self, job: Job, cluster: Cluster, plan: Plan) -> None:
        self.job, self.cluster, self.plan, self.layout = job, cluster, plan, plan.layout
        self.number = plan.micro_batches(job)
        self.tokens = plan.tokens(job)
        self.stages = job.sizes(self.layout)
        self._passes: dict[tuple[bool, StageSizes], Pass] = {}  # most stages are equal
        self.whole = job.activations("none")
        kinds = job.kinds(plan.checkpointing)
        # Shares of the layers that are computed again, and whose matrix products are.
        self.again, self.products_again = 1 - kinds.count("none") / len(kinds), kinds.count("full") / len(kinds)

    # --- time of a stage

    def forward(self, stage: int) -> Pass:
        """One micro-batch."""
        key = (False, self.stages[stage])
        if key not in self._passes:
            self._passes[key] = self._pass(self.stages[stage], 1, _FORWARD_PASSES)
        return self._passes[key]

    def backward(self, stage: int) -> Pass:
        """One micro-batch; with activation checkpointing the layers' forward again."""
        key = (True, self.stages[stage])
        if key not in self._passes:
            self._passes[key] = self._backward(self.stages[stage])
        return self._passes[key]

    def _backward(self, stage: StageSizes) -> Pass:
        found = self._pass(stage, 2, _BACKWARD_PASSES)
        again = self._layers(stage, 1, _FORWARD_PASSES)
        return Pass(
            found.products + self.products_again * again.products,
            found.elements + self.again * again.elements,
            found.launches + self.again * again.launches,
            found.tp + self.again * again.tp,
            found.cp + self.again * again.cp,
        )

    def _layers(self, stage: StageSizes, products: int, passes: int) -> Pass:
        job, layout, cluster = self.job, self.layout, self.cluster
        # Context parallelism expands an MLA's latents of all tokens on each process.
        expanded = (layout.cp - 1) * stage.layers * job.expansion / layout.tp
        flops = 2.0 * products * self.tokens * (stage.multiplied + expanded)
        flops += products * self.tokens * stage.layers * job.attention / layout.tp
        elements = passes * stage.layers * self.tokens * kept_share(job, layout, self.whole.kept)
        tp = sum((each.seconds(cluster) for each in self._tp_of_layers(stage, backward=products > 1)), 0.0)
        computing = flops / cluster.products, elements / cluster.elements
        launches = max(0.0, products * stage.layers * cluster.launching - sum(computing))
        return Pass(*computing, launches, tp, self._cp_of_layers(stage).seconds(cluster))

    def _pass(self, stage: StageSizes, products: int, passes: int) -> Pass:
        found = self._layers(stage, products, passes)
        flops = 2.0 * products * self.tokens * stage.head
        tables = passes * self.tokens * self.job.itemsize * self.job.model.embed_dim * (stage.first + stage.last)
        if stage.last:  # fp32 logits and their gradients, in one pass with the loss
            tables += passes * 4 * self.tokens * self.job.model.vocab_size / self.layout.tp
        return Pass(
            found.products + flops / self.cluster.products,
            found.elements + tables / self.cluster.elements,
            found.launches,
            found.tp + self._tp_of_ends(stage).seconds(self.cluster),
            found.cp,
        )

    # --- what is sent for a micro-batch

    def _hidden(self) -> float:
        """Bytes of hidden states of a micro-batch before tensor parallelism divides them."""
        return self.tokens * self.job.model.embed_dim * self.job.itemsize

    def _tp_of_layers(self, stage: StageSizes, *, backward: bool) -> Iterator[Sent]:
        """Attention and FFN gather their input and reduce-scatter their output, and the other way back."""
        yield ring(self.layout, self.cluster, "tp", self._hidden(), operations=1) * (4 * stage.layers)
        latent = self.job.key_values[0]
        if latent and backward:  # gradients by an MLA's latents, of which each process has a part: an all-reduce
            total = 2 * self.tokens * latent * self.job.itemsize
            yield ring(self.layout, self.cluster, "tp", total, operations=2) * stage.layers

    def _tp_of_ends(self, stage: StageSizes) -> Sent:
        ends = int(stage.first) + int(stage.last)
        return ring(self.layout, self.cluster, "tp", self._hidden()) * ends

    def _cp_of_layers(self, stage: StageSizes) -> Sent:
        """Keys and values are gathered, and their gradients reduce-scattered."""
        whole, divided, _ = self.job.key_values
        a_token = (whole + divided / self.layout.tp) * self.job.itemsize
        return ring(self.layout, self.cluster, "cp", self.layout.cp * self.tokens * a_token) * stage.layers

    def message(self) -> Sent:
        """Hidden states to the next stage, or their gradients back."""
        if self.layout.pp == 1:
            return Sent("pp", 0.0, 0.0, 0.0)
        return to_next_stage(self.layout, self.cluster, self._hidden() / self.layout.tp)

    # --- once a step

    def gathered(self, pp_rank: int) -> Sent:
        """FSDP2 gathers weights: once, or again for the backward."""
        again = self.layout.pp == 1 and self.number == 1 and self.layout.reshard_after_forward
        numel, layers = self._mine(pp_rank)
        total = numel * self.job.itemsize * (2 if again else 1)
        return ring(self.layout, self.cluster, "fsdp", total, operations=layers * (2 if again else 1))

    def reduced(self, pp_rank: int) -> tuple[Sent, Sent]:
        """Gradients in fp32: reduce-scattered over the shards, all-reduced over the copies."""
        numel, layers = self._mine(pp_rank)
        scattered = ring(self.layout, self.cluster, "fsdp", 4.0 * numel, operations=layers)
        held = 4.0 * sum(self.stages[stage].held for stage in self.layout.stages_of(pp_rank))
        return scattered, ring(self.layout, self.cluster, "dp_replicate", 2 * held, operations=2 * layers)

    def tied(self) -> Sent:
        """Gradients of the two copies of a tied embedding, added up between the first and the last stage."""
        if self.layout.pp == 1 or not self.job.model.tied or self.layout.schedule == "zbv":
            return Sent("pp", 0.0, 0.0, 0.0)
        head = next(s.head for s in self.stages if s.last)
        return to_next_stage(self.layout, self.cluster, 4.0 * head / self.layout.shard_size)

    def optimizer(self) -> float:
        """Seconds of AdamW's step, by the bytes it reads and writes."""
        held = max(sum(self.stages[s].held for s in self.layout.stages_of(rank)) for rank in range(self.layout.pp))
        return _OPTIMIZER_BYTES * held / self.cluster.elements

    def _mine(self, pp_rank: int) -> tuple[int, int]:
        mine = [self.stages[stage] for stage in self.layout.stages_of(pp_rank)]
        return sum(s.numel for s in mine), sum(s.layers + s.first + s.last for s in mine)

    # --- bytes of a step

    def traffic(self) -> list[Sent]:
        """What the busiest process of the pipeline sends in a step, by dimension."""
        return max((self._traffic_of(rank) for rank in range(self.layout.pp)), key=_bytes_of)

    def _traffic_of(self, pp_rank: int) -> list[Sent]:
        layout, number = self.layout, self.number
        found = {name: Sent(name, 0.0, 0.0, 0.0) for name in ("tp", "cp", "fsdp", "dp_replicate", "pp")}

        def add(sent: Sent, factor: float = 1) -> None:
            found[sent.dimension] += sent * factor

        for index in layout.stages_of(pp_rank):
            stage = self.stages[index]
            for backward, times in ((False, 1 + self.again), (True, 1)):
                for sent in self._tp_of_layers(stage, backward=backward):
                    add(sent, number * times)
            add(self._tp_of_ends(stage), 2 * number)
            add(self._cp_of_layers(stage), number * (2 + self.again))
            add(self.message(), number * ((not stage.last) + (not stage.first)))
        add(self.gathered(pp_rank))
        for sent in self.reduced(pp_rank):
            add(sent)
        if any(self.stages[index].first or self.stages[index].last for index in layout.stages_of(pp_rank)):
            add(self.tied())
        return list(found.values())


def _bytes_of(traffic: list[Sent]) -> float:
    return sum(sent.node + sent.network for sent in traffic)
