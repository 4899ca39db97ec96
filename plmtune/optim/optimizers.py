"""Optimizers, built from a model: which parameters decay, which go through Muon, what each keeps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plmtune.modules.sharding import full_tensor, is_sharded, shard_like
from plmtune.ranges import RATE, SHARE, TINY, WEIGHT, Range, check
from plmtune.registry import register

# Bytes of state a parameter: AdamW keeps two moments in fp32; 8-bit AdamW keeps each moment as a byte with an
# fp32 scale per block of 256; Muon keeps one momentum for hidden matrices and AdamW's two for the rest.
STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 8 / 256}
MUON_MATRIX_BYTES = 4.0
COMPILED = ("adamw_8bit",)  # whose step goes through torch.compile


def optimizer_bytes(name: str, model: nn.Module) -> int:
    """Bytes of optimizer state that `name` keeps for the model's fp32 parameters (on the meta device too)."""
    matrices, others = _split_for_muon(model) if name == "muon" else ([], _trainable(model))
    # A user's own optimizer is taken for AdamW's size: an estimate must not refuse what the registry knows.
    each = STATE_BYTES.get(name, STATE_BYTES["adamw"])
    return int(sum(MUON_MATRIX_BYTES * p.numel() for p in matrices) + sum(each * p.numel() for p in others))


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]  # a tied weight comes once


def _decay_groups(
    model: nn.Module,
    select: Callable[[nn.Module], list[nn.Parameter]],
    weight_decay: float,
    no_decay: Sequence[str],
) -> list[dict[str, Any]]:
    """Matrices decay, except those that `no_decay` names; norms and biases do not.

    Embeddings decay too: PLM ties them to the output projection, a matrix in use like any other. A process of a
    pipeline has the groups of the whole model, some perhaps empty: a checkpoint and a schedule number them.
    """
    whole = getattr(model, "whole", [model])[0]
    named = dict(whole.named_parameters(remove_duplicate=False))
    exempt: set[int] = set()
    for part in no_decay:
        found = {id(p) for name, p in named.items() if f".{part}." in f".{name}."}
        if not found:
            known = dict.fromkeys(part for name in named for part in name.split(".") if not part.isdigit())
            raise ValueError(f"no_decay: the model has no {part!r}; it has {', '.join(known)}")
        exempt |= found
    parameters = select(whole)
    decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in exempt]
    chosen = {id(p) for p in decayed}
    both = ((decayed, weight_decay), ([p for p in parameters if id(p) not in chosen], 0.0))
    names, own = {id(p): name for name, p in whole.named_parameters()}, dict(model.named_parameters())
    return [
        {"params": [own[names[id(p)]] for p in params if names[id(p)] in own], "weight_decay": decay}
        for params, decay in both
        if params
    ]


def _fused(parameters: list[nn.Parameter]) -> bool:
    """Whether the fused kernel exists where the parameters live (FSDP's sharded ones included)."""
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)


def _check(betas: Sequence[float], lr: float, weight_decay: float, **eps: float) -> tuple[float, float]:
    """The betas as a pair, once they and the other settings are known to be possible."""
    check(RATE, lr=lr, weight_decay=weight_decay)
    check(TINY, **eps)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas ({', '.join(map(str, betas))}) must be two numbers in [0, 1)")
    return betas[0], betas[1]


@register("optimizer", "adamw")
def adamw(
    model: nn.Module,
    *,
    lr: float = 3e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    no_decay: tuple[str, ...] = (),
) -> Optimizer:
    """AdamW (arXiv 1711.05101), fused; matrices and embeddings decay, norms and biases do not.

    Args:
        no_decay: parameters that do not decay either, by parts of their names: tok_embeddings (as SmolLM3 and OLMo 2
            train, arXiv 2501.00656), attention.o_proj.

    Raises:
        ValueError: for a setting that is out of its range, or a name that the model lacks.
    """
    betas = _check(betas, lr=lr, weight_decay=weight_decay, eps=eps)
    parameters = _trainable(model)
    groups = _decay_groups(model, _trainable, weight_decay, no_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=_fused(parameters))


@register("optimizer", "adamw_8bit")
def adamw_8bit(
    model: nn.Module,
    *,
    lr: float = 3e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    no_decay: tuple[str, ...] = (),
) -> Optimizer:
    """AdamW with moments in 8 bits (torchao; arXiv 2110.02861): about 2 bytes a parameter instead of 8.

    torchao compiles its step, so it needs a C++ compiler on a CPU and Triton on a GPU. Tensors of fewer than
    4096 elements keep fp32 moments.

    Args:
        no_decay: as for adamw.

    Raises:
        ValueError: for a setting that is out of its range, or a name that the model lacks.
    """
    from torchao.optim import AdamW8bit

    betas = _check(betas, lr=lr, weight_decay=weight_decay, eps=eps)
    groups = _decay_groups(model, _trainable, weight_decay, no_decay)
    optimizer: Optimizer = AdamW8bit(groups, lr=lr, betas=betas, eps=eps)
    return optimizer


@register("optimizer", "muon")
def muon(
    model: nn.Module,
    *,
    lr: float = 3e-4,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    ns_steps: int = 5,
    adamw_lr_factor: float = 1.0,
    adamw_betas: tuple[float, float] = (0.9, 0.95),
    adamw_eps: float = 1e-8,
    no_decay: tuple[str, ...] = (),
    normuon_beta2: float | None = None,
    cautious: bool = False,
) -> Optimizer:
    """Muon for the hidden matrices (arXiv 2502.16982), AdamW for embeddings, head, norms and biases; `lr` scales both.

    Updates are scaled by 0.2 sqrt(max(rows, columns)), which gives them AdamW's usual size: a learning rate
    and weight decay tuned for AdamW carry over. torch.optim.Muon, but on a CPU and with the options below
    with a step of ours (`BatchedMuon`).

    NorMuon (arXiv 2510.05491, algorithm 1) divides each row of the orthogonalised momentum O by the root of its mean
    square over the steps, so that all neurons move equally far; the update keeps its size:

        v <- beta2 v + (1 - beta2) mean over columns of O^2,   O' = O / (sqrt(v) + eps)
        W <- W - lr weight_decay W - 0.2 lr sqrt(rows columns) / ||O'|| O'

    Cautious weight decay (arXiv 2510.12402) decays the numbers whose update shrinks them, too:

        W <- W - lr (u + weight_decay [u W >= 0] W)

    Args:
        lr: rate of the hidden matrices.
        adamw_lr_factor: rate of the rest as a multiple of lr. A scheduler scales both.
        no_decay: as for adamw.
        normuon_beta2: NorMuon's beta2, 0.95 in the paper; None: plain Muon.
        cautious: cautious weight decay of the hidden matrices.

    Raises:
        ValueError: for a setting that is out of its range, a name that the model lacks, or a model without hidden
            matrices.
    """
    adamw_betas = _check(adamw_betas, lr=lr, weight_decay=weight_decay, adamw_eps=adamw_eps)
    check(WEIGHT, adamw_lr_factor=adamw_lr_factor)
    check(SHARE, momentum=momentum, normuon_beta2=normuon_beta2)
    check(Range(least=1, most=99), ns_steps=ns_steps)
    matrices, others = _split_for_muon(model)
    if not others:
        raise ValueError(
            f"muon finds {len(matrices)} matrices to train and nothing else. It trains whole models; adapters (peft) "
            "train with optimizer=adamw"
        )
    if not matrices:
        raise ValueError(f"muon finds no hidden matrix among {len(others)} trained parameters: use optimizer=adamw")
    on_cpu = all(p.device.type == "cpu" and (type(p.data) is torch.Tensor or is_sharded(p)) for p in matrices)
    # Settings of a group only where they are on: a checkpoint then resumes with the step that wrote it.
    options: dict[str, Any] = {} if normuon_beta2 is None else {"normuon_beta2": normuon_beta2}
    options |= {"cautious": True} if cautious else {}
    kind = BatchedMuon if on_cpu or options else torch.optim.Muon
    return MuonWithAdamW(
        kind(
            [{**group, **options} for group in _decay_groups(model, _hidden, weight_decay, no_decay)],
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            ns_steps=ns_steps,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            # The name is for what is logged.
            [{**group, "name": "adamw"} for group in _decay_groups(model, _others, weight_decay, no_decay)],
            lr=lr * adamw_lr_factor,
            betas=adamw_betas,
            eps=adamw_eps,
            fused=_fused(others),
        ),
    )


def _split_for_muon(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices inside the layers, everything else): embeddings and heads are AdamW's, a reward model's too."""
    ends: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    # By attribute, not `head_weight`: rounded for quantization, that is another tensor.
    ends += [m for name in ("output", "score") if isinstance(m := getattr(model, name, None), nn.Module)]
    excluded = {id(p) for m in ends for p in m.parameters()}
    hidden = [p for p in _trainable(model) if p.ndim == 2 and id(p) not in excluded]
    chosen = {id(p) for p in hidden}
    return hidden, [p for p in _trainable(model) if id(p) not in chosen]


def _hidden(model: nn.Module) -> list[nn.Parameter]:
    return _split_for_muon(model)[0]


def _others(model: nn.Module) -> list[nn.Parameter]:
    return _split_for_muon(model)[1]


class MuonWithAdamW(Optimizer):
    """Two optimizers that look like one: one list of groups, one state, one step.

    The groups and the state are the parts' own objects, so a scheduler, gradient clipping and distributed
    checkpoints see a plain optimizer.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self.muon, self.adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        split = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:split], self.param_groups[split:]
        self.muon.state = self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both. `closure` may compute the loss again, as for any torch optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()  # loading puts new objects in place of the shared ones


def orthogonalize(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz iteration towards U V^T of each matrix's U S V^T (Muon, arXiv 2502.16982, eq. 2).

    X <- a X + (b X X^T + c (X X^T)^2) X, from X / ||X||; singular values end near 1, not at 1.

    Args:
        matrices (Tensor): [k, rows, columns].

    Returns:
        Tensor: [k, rows, columns]
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


class BatchedMuon(torch.optim.Muon):
    """torch's Muon with another step: same settings, same state, same update but for rounding; and its options.

    torch orthogonalises in bf16, matrix by matrix. On a CPU without bf16 units that takes several times as long as
    fp32, and small matrices cost more to call than to compute: benchmarks/muon.py. Each process orthogonalises whole
    matrices and keeps its shards of the updates, so that many processes take the step of one. On other devices than a
    CPU it orthogonalises in bf16, too.

    A group may have `normuon_beta2` and `cautious`, see `muon`. The rows' mean squares are whole on every process.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` may compute the loss again."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                # 0.2 sqrt(max(rows, columns)) gives the update AdamW's usual size (arXiv 2502.16982, eq. 4).
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                updates = torch.stack([full_tensor(self._momentum(parameter, group)) for parameter in parameters])
                exact = updates if updates.device.type == "cpu" else updates.bfloat16()
                exact = orthogonalize(exact, group["ns_coefficients"], group["ns_steps"], group["eps"])
                for parameter, update in zip(parameters, exact.to(updates.dtype), strict=True):
                    if "normuon_beta2" in group:
                        update = self._equal_rows(parameter, update, group)
                    part = shard_like(update, parameter) if is_sharded(parameter) else update
                    decay = group["lr"] * group["weight_decay"]
                    kept = 1 - decay * (part * parameter >= 0) if "cautious" in group else 1 - decay
                    parameter.mul_(kept).add_(part, alpha=-rate)
        return loss

    def _momentum(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(buffer, group["momentum"])  # Nesterov

    def _equal_rows(self, parameter: Tensor, update: Tensor, group: dict[str, Any]) -> Tensor:
        """NorMuon's O' of update (Tensor), [rows, columns], at the norm sqrt(min(rows, columns)) of an exact U V^T."""
        state = self.state[parameter]
        if "row_square" not in state:
            state["row_square"] = torch.zeros(len(update), device=update.device)
        mean: Tensor = state["row_square"]
        mean.lerp_(update.float().square().mean(1), 1 - group["normuon_beta2"])
        scaled = update / (mean.sqrt() + group["eps"])[:, None]
        return (scaled * (min(update.shape) ** 0.5 / scaled.norm().clamp(min=group["eps"]))).to(update.dtype)
