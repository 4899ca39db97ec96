"""The memory and FLOPs that a run needs, estimated before a weight is allocated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from plmtune.io.safetensors_writer import FILE_BYTES
from plmtune.modules.checkpointing import Checkpointing, of_layer
from plmtune.modules.quantized import Quantized
from plmtune.optim.optimizers import optimizer_bytes
from plmtune.parallel.elements import of_process, parts
from plmtune.parallel.layout import Layout
from plmtune.training.activations import activation_bytes
from plmtune.training.machine import available_memory, process_memory, resident_memory
from plmtune.training.runtime import Runtime
from plmtune.units import show_bytes, show_count

_NF4_BYTES = 0.5 + 1 / 64

# Temporary tensors, and memory that the allocator keeps: a share of the memory that a step allocates and frees.
# Measured on CPUs (benchmarks/memory_estimate.py); that a GPU's fragments and workspaces take as much is an assumption.
_SLACK = 0.2


@dataclass(frozen=True)
class Estimate:
    """Memory of one process in bytes, and forward and backward FLOPs a token.

    Attributes:
        parameters: of the whole model; a tied matrix once.
        trained: parameters that get gradients.
        non_embedding_parameters: without embeddings and the vocabulary projection.
        weights: including what FSDP2 gathers from other processes, and the average of them that is kept.
        teacher: weights of a distillation's teacher.
        gradients: including what FSDP2 holds until it is reduced.
        activations: what autograd keeps between forward and backward, per micro-batch.
        logits: the loss's chunk of logits and the gradients it holds until its backward.
        save: this process's part of the copy that is written in the background; of a run on a GPU it is on the host,
            and not counted.
        process: libraries and compiled kernels; of a run on a GPU they are on the host, and not counted.
        available: memory for this process: what is free now, and what it holds already.
        flops_6n: 6 N, with N the parameters that are multiplied (not an untied input table and value embeddings).
        flops_per_token: 6 N + 6 s sum over layers of heads (qk + v), attention counted in full although half
            is masked: PaLM's convention (arXiv 2204.02311, appendix B), as nanoGPT and torchtitan. For MFU.
    """

    parameters: int
    trained: int
    non_embedding_parameters: int
    weights: int
    teacher: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    save: int
    process: int
    available: int
    flops_6n: float
    flops_per_token: float

    @property
    def tensors(self) -> int:
        """Memory of training itself."""
        return (
            self.weights + self.teacher + self.gradients + self.optimizer + self.activations + self.logits + self.save
        )

    @property
    def slack(self) -> int:
        """Tensors of single operations, and memory that the allocator keeps: on a GPU an assumption, not measured."""
        return int(_SLACK * (self.gradients + self.activations + self.logits))

    @property
    def total(self) -> int:
        return self.process + self.tensors + self.slack

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    def refusal(self) -> str:
        """A sentence if a run needs more memory than there is, else empty."""
        needed, free = show_bytes(self.total), show_bytes(self.available)
        refusal = f"this run does not fit here: it needs {needed}, and {free} are free. To start it anyway: --force"
        return "" if self.fits else refusal

    def lines(self) -> list[str]:
        """A table to print."""
        teacher = ("teacher",) if self.teacher else ()
        parts = ("process", "weights", *teacher, "gradients", "optimizer", "activations", "logits", "save", "slack")
        verdict = "fits" if self.fits else "does not fit"
        return [
            f"parameters    {self.parameters:,} ({self.non_embedding_parameters:,} without embeddings)"
            + (f", {self.trained:,} of them trained" if self.trained < self.parameters else ""),
            *(f"{name:<13} {show_bytes(getattr(self, name))}" for name in (*parts, "total")),
            f"available     {show_bytes(self.available)}: {verdict}",
            f"FLOPs a token {show_count(self.flops_6n)} (6N), "
            f"{show_count(self.flops_per_token)} with attention, forward and backward",
        ]


def estimate(
    model: nn.Module,
    runtime: Runtime,
    *,
    optimizer: str,
    seq_len: int,
    micro_batch_size: int,
    micro_batches: int = 1,
    masked: bool = False,
    background_saves: bool = False,
    activation_checkpointing: Checkpointing = "none",
    loss_chunk_rows: int = 1024,
    teacher: nn.Module | None = None,
    ema: bool = False,
) -> Estimate:
    """Estimate a training run of `model`, a `Decoder` (best on the meta device: nothing is computed).

    benchmarks/memory_estimate.py compares it with the peaks of processes.

    Args:
        optimizer: its name in the registry.
        seq_len: tokens of a row; all rows are taken to be full.
        micro_batch_size: rows of one forward on one process.
        runtime: where the run would be; its layout divides weights, gradients, optimizer state and activations. The
            estimate is of the process with most parameters.
        micro_batches: of a step, on one process. With more than one, FSDP2 keeps parameters gathered and gradients
            whole between them (`distributed.accumulate`).
        masked: attention has a mask, which each layer keeps.
        background_saves: a save first copies the state.
        loss_chunk_rows: tokens whose logits the loss holds at once; 0: all of them.
        teacher: of a distillation, on the meta device.
        ema: an average of the weights is kept.
    """
    device, compute_dtype, shards = runtime.device, runtime.compute_dtype, runtime.layout.shard_size
    held: Any = model  # a Decoder, whose attributes mypy cannot see on a Module
    parameters = sum(p.numel() for p in model.parameters())
    embedding, head = held.tok_embeddings.weight, held.head_weight
    values = sum(p.numel() for p in held.value_embeddings.parameters()) if held.value_embeddings is not None else 0
    vocabulary = (embedding.numel() if held.tied else embedding.numel() + head.numel()) + values
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # QLoRA's base, which the meta device holds in fp32: 4 bits a number, and a scale for each 64.
    in_nf4: list[Any] = [module for module in model.modules() if getattr(module, "_quantize_base", False)]
    nf4 = sum(module.weight.numel() for module in in_nf4)
    weights -= int(nf4 * (4 - _NF4_BYTES))
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    moments = optimizer_bytes(optimizer, model)
    # FSDP2 gathers in the arithmetic's dtype; what follows is there beside the sharded parameters and gradients.
    gathered = whole_gradients = 0
    if shards > 1 and micro_batches > 1:
        gathered, whole_gradients = parameters * compute_dtype.itemsize, trainable - trainable // shards
    elif shards > 1:
        layer = max(sum(p.numel() for p in layer.parameters()) for layer in held.layers)
        root = parameters - sum(p.numel() for p in held.layers.parameters())
        # The layer at work and the next one; the root's are whole from the forward to the end of the backward.
        gathered = whole_gradients = (root + 2 * layer) * compute_dtype.itemsize
    multiplied = parameters - values - (0 if held.tied else embedding.numel())
    flops_6n = 6.0 * multiplied
    # torch writes a boolean mask as numbers in each call of attention, and keeps them for the backward.
    mask = micro_batch_size * seq_len**2 * compute_dtype.itemsize
    kinds = [of_layer(activation_checkpointing, index) for index in range(len(held.layers))]
    # A layer that is computed again makes its own then.
    masks = mask * min(len(kinds), kinds.count("none") + 1) if masked else 0
    # Files are dealt to the processes one by one, so that one process holds one at least.
    averages = weights if ema else 0
    save = max((weights + moments + averages) // runtime.world_size, int(min(max(weights, moments), FILE_BYTES)))
    resident = resident_memory() if device.type == "cpu" else 0
    whole = Estimate(
        parameters=parameters,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        non_embedding_parameters=parameters - vocabulary,
        weights=(weights + averages) // shards + gathered,
        teacher=stored_bytes(teacher, compute_dtype) // shards if teacher else 0,
        gradients=trainable // shards + whole_gradients,
        optimizer=moments // shards,
        activations=activation_bytes(
            model, micro_batch_size, seq_len, compute_dtype, activation_checkpointing, casts=shards == 1
        )
        + masks,
        logits=_loss_bytes(micro_batch_size * seq_len, head.shape, loss_chunk_rows, compute_dtype, teacher),
        save=save if background_saves and device.type == "cpu" else 0,
        process=process_memory(resident, compute_dtype) if device.type == "cpu" else 0,
        available=available_memory(device) + resident,
        flops_6n=flops_6n,
        flops_per_token=flops_6n + attention_flops(model, seq_len),
    )
    layout = runtime.layout
    if layout.tp * layout.pp * layout.cp == 1:
        return whole
    inputs = len(kinds) - kinds.count("full")
    inputs *= 2 * micro_batch_size * seq_len * held.embed_dim * compute_dtype.itemsize
    return _of_process(whole, model, layout, inputs, micro_batches)


def _of_process(whole: Estimate, model: nn.Module, layout: Layout, inputs: int, micro_batches: int) -> Estimate:
    """An estimate of the process with most parameters under tensor, pipeline or context parallelism.

    Args:
        whole: of a process that has whole layers and whole rows; FSDP2 has divided its weights.
        inputs: bytes of the inputs of attention and FFN that layers keep, which tensor parallelism gathers.
    """
    found = parts(model, layout)
    most = max(sum(part.numel for part in of_process(found, layout, rank)) for rank in range(layout.pp))
    share = most / whole.parameters
    kept = whole.activations / layout.tp + inputs * (1 - 1 / layout.tp)
    # Micro-batches in flight, times the share of the layers: 1F1B's first process holds pp of a pp-th of the layers;
    # interleaved stages hold more (arXiv 2104.04473, section 2.2).
    in_flight = 1 + (layout.pp - 1) / (2 * layout.pp) if layout.schedule == "interleaved_1f1b" else 1.0
    if layout.pp > 1:
        in_flight = min(in_flight, micro_batches / layout.pp)
    return replace(
        whole,
        weights=int(whole.weights * share),
        gradients=int(whole.gradients * share),
        optimizer=int(whole.optimizer * share),
        activations=int(kept * in_flight / layout.cp),
        logits=int(whole.logits / layout.tp),
    )


def attention_flops(model: nn.Module, seq_len: int) -> float:
    """Forward and backward FLOPs a token of q k^T and of weights times values, masked half included.

    Forward takes 2 s (qk + v) a head and token, backward twice that.
    """
    widths = 0
    for module in model.modules():
        shapes: Any = getattr(module, "head_shapes", None)
        if shapes is not None:
            (heads, key), _, (_, value) = shapes()
            widths += heads * (key + value)
    return 6.0 * seq_len * widths


def stored_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a model whose floating-point numbers are loaded in `dtype`; integers of a quantized one stay."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in tensors)


def _loss_bytes(tokens: int, head: torch.Size, chunk_rows: int, compute_dtype: torch.dtype, teacher: Any = None) -> int:
    vocab_size, embed_dim = head
    rows = min(chunk_rows, tokens) if chunk_rows else tokens
    if compute_dtype == torch.float32:
        logits, weight, hidden = 4, 4, 4
    else:  # logits and their logarithms; the weight's fp32 gradient, one chunk's and the weight cast
        logits, weight, hidden = 2 + 4, 4 + 2 + 2, 2
    if teacher is not None:
        weight = 4 if compute_dtype == torch.float32 else 4 + 2 + 2
        logits = 6 * 4  # of both models, their logarithms, and the gradients by them, in fp32
        hidden += compute_dtype.itemsize * teacher.embed_dim / embed_dim
        theirs = teacher.tok_embeddings if teacher.tied else teacher.output
        if isinstance(theirs, Quantized):  # which the loss writes out
            weight += compute_dtype.itemsize * teacher.embed_dim / embed_dim
    return int(logits * rows * vocab_size + weight * vocab_size * embed_dim + hidden * tokens * embed_dim)
