"""The memory and FLOPs that a run needs, estimated before a weight is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from plmtune.io.safetensors_writer import FILE_BYTES
from plmtune.modules.quantized import Quantized
from plmtune.optim.optimizers import optimizer_bytes
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
    activation_checkpointing: bool = False,
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
        runtime: where the run would be; the `shard_size` of its layout divides weights, gradients and optimizer state.
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
    masks = mask * (1 if activation_checkpointing else len(held.layers)) if masked else 0
    # Files are dealt to the processes one by one, so that one process holds one at least.
    averages = weights if ema else 0
    save = max((weights + moments + averages) // runtime.world_size, int(min(max(weights, moments), FILE_BYTES)))
    resident = resident_memory() if device.type == "cpu" else 0
    return Estimate(
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


def activation_bytes(
    model: nn.Module,
    micro_batch_size: int,
    seq_len: int,
    compute_dtype: torch.dtype = torch.float32,
    activation_checkpointing: bool = False,
    *,
    casts: bool = True,
) -> int:
    """Bytes that autograd keeps for the backward of the hidden states, found by forwards of a few tokens.

    Args:
        model: a Decoder on any device; its weights are not touched.
        activation_checkpointing: each layer keeps its input; one layer at a time holds the rest again.
        casts: autocast keeps a copy of each matrix in `compute_dtype`; FSDP2, which gathers in it, does not.
    """
    held: Any = model
    training = model.training
    model.eval()  # a Decoder checkpoints only in training; here both costs are taken apart
    device, tokens = _trial_device(held), micro_batch_size * seq_len
    ids = torch.zeros(2, _TRIED, dtype=torch.long, device=device)
    hidden = torch.empty(2, _TRIED, held.embed_dim, dtype=compute_dtype, device=device)
    try:
        whole = _saved_bytes(model, ids, tokens, compute_dtype, casts, hidden=True)
        if not activation_checkpointing:
            return whole
        layers = []
        for index, layer in enumerate(held.layers):
            given = held.of_tokens(index, ids.to(held.device))
            given = {name: hidden.new_empty(x.shape) for name, x in given.items()}
            layers.append(_saved_bytes(layer, hidden, tokens, compute_dtype, casts, **given))
        inputs = len(layers) * tokens * held.embed_dim * compute_dtype.itemsize
        return whole - sum(layers) + inputs + max(layers)
    finally:
        model.train(training)


_TRIED = 2  # tokens of a row; one alone is computed another way


def _trial_device(model: Any) -> torch.device:
    """The CPU, where a few tokens through layers of ours take no memory; the meta device, which imports sympy (half a
    CPU second), for models of enormous width and for modules that may compute with a whole matrix.
    """
    ours = all(type(m).__module__.startswith(("plmtune.modules.", "torch.nn.")) for m in model.modules())
    numbers = sum(sum(p.shape) for p in model.parameters())  # of a token, about
    return torch.device("cpu" if ours and numbers < 2**22 and model.max_seq_len <= 2**17 else "meta")


def _saved_bytes(
    module: nn.Module, inputs: Tensor, tokens: int, dtype: torch.dtype, casts: bool, **settings: Any
) -> int:
    """Bytes that a forward of so many tokens saves: a line through those of one row of `inputs` and of both."""
    # Autocast does not know the meta device: parameters in its dtype give the same activations, and the
    # copies that it would make of the matrices are added.
    ends = (
        "tok_embeddings.",
        "value_embeddings.",
        "query_embeddings.",
        "output.",
    )  # some are only read, and the head's is the loss's
    matrices = sum(p.numel() for name, p in module.named_parameters() if p.ndim > 1 and not name.startswith(ends))
    copies = dtype.itemsize * matrices if casts and dtype != torch.float32 else 0

    def first(x: Any, rows: int) -> Any:
        return x[:rows].clone().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x

    tried = [(first(inputs, rows), {key: first(x, rows) for key, x in settings.items()}) for rows in (1, 2)]
    one, two = (_saved_by_forward(module, x, dtype, given) for x, given in tried)
    return int(one + (tokens / _TRIED - 1) * (two - one)) + copies


def _saved_by_forward(module: nn.Module, x: Tensor, dtype: torch.dtype, settings: dict[str, Any]) -> int:
    """Bytes of the distinct storages that a forward saves; parameters and inputs left out."""
    state = {  # each of one number, shown in the parameter's shape
        name: torch.empty_strided(p.shape, [0] * p.ndim, dtype=dtype, device=x.device, requires_grad=p.requires_grad)
        for name, p in module.named_parameters()
    }
    given = [held for held in settings.values() if isinstance(held, Tensor)]
    own = {t.untyped_storage()._cdata for t in (*state.values(), x, *given)}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no storage's address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor), _WithoutProducts():
        pack(functional_call(module, state, (x,), settings, tie_weights=True))  # the output is kept too
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)


class _WithoutProducts(TorchFunctionMode):
    """Linear layers and attention without their work: what they save, and an output of the right shape.

    So weights need no memory, and attention keeps what the fused kernels do. On the meta device torch would keep all
    scores instead.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return _product(*args, **(kwargs or {}))
        if func is nn.functional.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


def _product(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _Product.apply(input, weight, bias)  # which takes no names


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return x.new_empty(*x.shape[:-1], weight.shape[0])


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, s, _ = q.shape
        out = q.new_empty(b, s, h, v.shape[3]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(b, h, s, dtype=torch.float32))  # log-sum-exp of rows
        return out
