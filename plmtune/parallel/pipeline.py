"""Pipeline parallelism: a model's layers as stages on several processes, run by torch's schedules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plmtune.modules.decoder import Decoder
from plmtune.modules.initial_weights import Init, draw_weights
from plmtune.modules.sharding import to_local
from plmtune.parallel.gradients import add_up_parts
from plmtune.parallel.layout import layers_of_stages
from plmtune.parallel.mesh import Processes

LossOf = Callable[[Any, Tensor], Tensor]  # (batch, hidden states) -> summed loss


def part_of(model: Decoder, layers: range) -> Decoder:
    """Some layers of a Decoder on the meta device, as a Decoder whose parameters have the names of the whole.

    The part with the first layer has the embedding, that with the last one the final norm and the head. A tied head is
    a copy of the embedding.
    """
    part = copy.deepcopy(model)
    first, last = layers.start == 0, layers.stop == len(model.layers)
    held = nn.ModuleList()
    for index in layers:
        held.add_module(str(index), part.layers[index])
    part.layers = held
    if not first:
        part.pos_embeddings = None
        if not (last and part.tied):
            part.tok_embeddings = cast(Any, None)
    if part.value_embeddings is not None:
        kept = {index: table for index, table in part.value_embeddings.items() if int(index) in layers}
        part.value_embeddings = nn.ModuleDict(kept) if kept else None
    if not last:
        part.query_embeddings = None
        part.norm = cast(Any, None)
        if not part.tied:
            del part.output
    return part


class Stage(nn.Module):
    """The forward of one stage, as torch's schedules call it: hidden states in, hidden states out.

    Tokens, masks and positions are not sent: each process has its own copy of `batches`, and the schedule passes an
    index into them.
    """

    def __init__(self, part: Decoder, *, first: bool, last: bool) -> None:
        super().__init__()
        self.part = part
        self.first, self.last = first, last
        self.batches: Sequence[Any] = ()
        self.autocast: Callable[[], AbstractContextManager[object]] = nullcontext

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        batch = self.batches[int(index)]
        with self.autocast():
            if self.first:
                x = self.part.embed(batch.tokens, batch.input_pos)
            x = self.part.run_layers(x, batch.tokens, mask=batch.mask, input_pos=batch.input_pos)
            return self.part.finish(x) if self.last else x


class Pipeline(nn.Module):
    """The stages of a Decoder that this process holds; its parameters have the names that they have in the whole model.

    Attributes:
        whole: the model on the meta device.
        stages: of this process, by their numbers.
    """

    def __init__(self, model: Decoder, processes: Processes, hidden_dtype: torch.dtype) -> None:
        super().__init__()
        self.hidden_dtype = hidden_dtype  # of what stages send
        layout = processes.layout
        mesh = processes.part("pp")
        assert mesh is not None
        self.layout, self.group, self.pp_rank = layout, mesh.get_group(), mesh.get_local_rank()
        self.num_stages = layout.num_stages
        self.stage_size = layout.num_processes // layout.pp  # processes with the same stages
        self.whole = [model]  # in a list: its parameters are none of this module's
        parts = layers_of_stages(len(model.layers), self.num_stages)
        self.held: dict[int, Any] = {
            number: Stage(part_of(model, parts[number]), first=number == 0, last=number == self.num_stages - 1)
            for number in layout.stages_of(self.pp_rank)
        }
        self.stages = nn.ModuleDict({str(number): stage for number, stage in self.held.items()})
        self.config, self.source_keys, self.tied = model.config, model.source_keys, model.tied
        self.vocab_size, self.embed_dim, self.max_seq_len = model.vocab_size, model.embed_dim, model.max_seq_len
        self.loss_settings = model.loss_settings
        self._loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None  # of the step that runs
        self._schedules: dict[tuple[int, tuple[int, int], bool], Any] = {}

    @property
    def parts(self) -> list[Decoder]:
        return [stage.part for stage in self.held.values()]

    @property
    def layers(self) -> list[nn.Module]:
        return [layer for part in self.parts for layer in part.layers]

    @property
    def numbered_layers(self) -> dict[int, Any]:
        """The layers of this process by their numbers in the whole model."""
        return {number: layer for part in self.parts for number, layer in part.numbered_layers.items()}

    @property
    def num_layers(self) -> int:
        return len(self.whole[0].layers)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def head_weight(self) -> Tensor:
        """The vocabulary projection, on processes with the last stage."""
        return self.held[self.num_stages - 1].part.head_weight

    @property
    def output(self) -> nn.Module | None:
        """The head of an untied model, on processes with the last stage."""
        return next((m for part in self.parts if (m := getattr(part, "output", None)) is not None), None)

    @property
    def copies(self) -> set[int]:
        """The ids of parameters that an earlier stage, on another process, has too."""
        last = self.held.get(self.num_stages - 1)
        return {id(last.part.tok_embeddings.weight)} if self.tied and 0 not in self.held and last is not None else set()

    @property
    def activation_checkpointing(self) -> Any:
        return self.parts[0].activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, value: Any) -> None:
        for part in self.parts:
            part.activation_checkpointing = value

    def autocast(self, dtype: torch.dtype) -> None:
        """Let the stages compute under autocast in `dtype`."""
        for stage in self.held.values():
            stage.autocast = lambda: torch.autocast(self.device.type, dtype=dtype)

    # --- names and numbers

    def _copy_here(self) -> nn.Parameter | None:
        """The tied head's weight, if the first stage, whose embedding it copies, is on this process too."""
        last = self.held.get(self.num_stages - 1)
        found: nn.Parameter | None = last.part.tok_embeddings.weight if self.tied and 0 in self.held and last else None
        return found

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Names of the whole model. A copy of a parameter that this process holds is not among them."""
        here = self._copy_here()
        for part in self.parts:
            for name, parameter in part.named_parameters(prefix, recurse, remove_duplicate):
                if parameter is not here:
                    yield name, parameter

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The tensors of this process's stages by the names of the whole model."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Pipeline:
        for part in self.parts:
            part.to_empty(device=device, recurse=recurse)
        return self

    def init_weights(self, generator: torch.Generator | None = None, init: Init | None = None) -> None:
        """Draw the numbers that one process draws for the whole model, and keep those of this process's stages."""
        whole = self.whole[0]
        held = dict(self.named_parameters())
        draw_weights(whole, whole.init_std, generator, init, self.num_layers, into=held)

    # --- forward and backward

    def backward(self, batches: Sequence[Any], loss_of: LossOf, scale: float) -> list[Tensor]:
        """Run forward and backward of a step's micro-batches, in the order of the schedule.

        Args:
            batches: this process's, equal on all processes of the pipeline; of one shape.
            loss_of: called on the last stage with a batch and its normed hidden states, [b, s, d].
            scale: of each loss before its backward.

        Returns:
            The loss of each micro-batch, unscaled; equal on all processes of the pipeline.
        """
        self._refresh_copy()
        found = self._run(batches, lambda batch, hidden: loss_of(batch, hidden) * scale)
        self._add_up_tied()
        return [loss / scale for loss in found]

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Any], loss_of: LossOf) -> list[Tensor]:
        """The losses of some batches without a backward, equal on all processes of the pipeline."""
        self._refresh_copy()
        found = self._run(batches, loss_of)
        for module in self.modules():  # no backward frees gathered weights, and they must not be saved
            reshard = getattr(module, "reshard", None)
            if reshard is not None:
                reshard()
        return found

    def _run(self, batches: Sequence[Any], loss_of: LossOf) -> list[Tensor]:
        first = next(iter(batches))
        if any(batch.tokens.shape != first.tokens.shape for batch in batches):
            raise AssertionError("micro-batches of a pipeline have one shape")
        for stage in self.held.values():
            stage.batches = batches
        schedule = self._schedule(len(batches), tuple(first.tokens.shape))
        device = first.tokens.device

        def loss_fn(hidden: Tensor, index: Tensor) -> Tensor:
            batch = batches[int(index)]
            if self.layout.schedule == "zbv" and torch.is_grad_enabled():
                return _with_gradient(hidden, lambda hidden: loss_of(batch, hidden))
            return loss_of(batch, hidden)

        self._loss_fn = loss_fn
        index, losses = torch.arange(len(batches), device="cpu"), list[Tensor]()
        run = schedule.step if torch.is_grad_enabled() else schedule.eval
        args = (index,) if 0 in self.held else ()
        last = self.num_stages - 1 in self.held
        run(*args, index=index, **({"target": index, "losses": losses} if last else {}), return_outputs=False)
        for stage in self.held.values():
            stage.batches = ()
        held = (
            torch.stack([loss.detach().float() for loss in losses])
            if last
            else torch.zeros(len(batches), device=device)
        )
        # Only the last stage has them; zeros of the others change nothing.
        dist.all_reduce(held, group=self.group)
        return list(held)

    def _schedule(self, num: int, shape: tuple[int, int]) -> Any:
        key = (num, shape, torch.is_grad_enabled())
        if key not in self._schedules:
            self._schedules[key] = self._make_schedule(num, shape)
        return self._schedules[key]

    def _make_schedule(self, num: int, shape: tuple[int, int]) -> Any:
        from torch.distributed import pipelining

        b, s = shape
        rows = s // self.layout.tp  # sequence parallelism: each process sends its tokens
        dtype = self.hidden_dtype
        stages: list[Any] = []
        for number, stage in self.held.items():
            hidden = torch.empty(b, rows, self.embed_dim, dtype=dtype, device="meta", requires_grad=True)
            index = torch.empty(1, dtype=torch.long, device="meta")
            whole = torch.empty(b, s, self.embed_dim, dtype=dtype, device="meta", requires_grad=True)
            stages.append(
                pipelining.PipelineStage(
                    stage,
                    number,
                    self.num_stages,
                    self.device,
                    input_args=index if stage.first else hidden,
                    output_args=whole if stage.last else hidden,
                    group=self.group,
                )
            )

        def loss_fn(hidden: Tensor, index: Tensor) -> Tensor:
            assert self._loss_fn is not None
            return self._loss_fn(hidden, index)

        # Gradients are scaled by their losses, not by the number of micro-batches.
        options: dict[str, Any] = {"n_microbatches": num, "loss_fn": loss_fn, "scale_grads": False}
        if self.layout.schedule == "1f1b":
            kind = pipelining.Schedule1F1B if torch.is_grad_enabled() else pipelining.ScheduleGPipe
            return kind(stages[0], **options)
        if self.layout.schedule == "interleaved_1f1b":
            schedule: Any = pipelining.ScheduleInterleaved1F1B(stages, **options)
        else:
            schedule = pipelining.ScheduleZBVZeroBubble(stages, **options)
        if not torch.is_grad_enabled():
            # torch leaves backward actions in the order of a schedule without a backward.
            kept = ("FORWARD", "SEND_F", "RECV_F", "UNSHARD", "RESHARD")
            for rank, actions in schedule.pipeline_order_with_comms.items():
                schedule.pipeline_order_with_comms[rank] = [a for a in actions if a.computation_type.name in kept]
        return schedule

    # --- the tied head

    @torch.no_grad()
    def _refresh_copy(self) -> None:
        here = self._copy_here()
        if here is not None:
            to_local(here).copy_(to_local(self.held[0].part.tok_embeddings.weight))

    @torch.no_grad()
    def _add_up_tied(self) -> None:
        """Add the gradients of a tied weight up: of the embedding, on the first stage, and of the head's copy."""
        if not self.tied:
            return
        here = self._copy_here()
        if here is not None:
            own = self.held[0].part.tok_embeddings.weight
            add_up_parts([own, here])
            assert own.grad is not None and here.grad is not None
            own.grad += here.grad
            here.grad = None
            return
        last = self.layout.pp - 1
        if self.layout.schedule == "zbv" or self.pp_rank not in (0, last):
            return  # both ends of a V are on one process
        weight = (self.parts[0] if self.pp_rank == 0 else self.parts[-1]).tok_embeddings.weight
        add_up_parts([weight])
        gradient = to_local(cast(Tensor, weight.grad)).contiguous()
        other = torch.empty_like(gradient)
        peer = dist.get_global_rank(self.group, last if self.pp_rank == 0 else 0)
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, gradient, peer, self.group), dist.P2POp(dist.irecv, other, peer, self.group)]
        )
        for work in works:
            work.wait()
        to_local(cast(Tensor, weight.grad)).add_(other)


def whole_of(model: nn.Module) -> Decoder | None:
    """The whole of a model of which this process holds stages, on the meta device; None for another model."""
    return model.whole[0] if isinstance(model, Pipeline) else None


def _with_gradient(hidden: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    """A loss whose backward has run, and that has its gradient by `hidden` (Tensor).

    ZBV goes through a stage's graph twice, for inputs and for weights, which losses that make their gradients in the
    forward do not allow.
    """
    own = hidden.detach().requires_grad_()
    loss = loss_of(own)
    loss.backward()
    assert own.grad is not None
    linear = (hidden * own.grad).sum()
    return linear + (loss.detach() - linear.detach())
