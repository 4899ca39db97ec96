"""The model that a run fine-tunes: filled from its origin, with adapters where they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plmtune.config.compose import build
from plmtune.errors import UserError
from plmtune.models import adapters
from plmtune.models.hf import hf_state, write_config
from plmtune.modules.decoder import Decoder
from plmtune.modules.peft import adapter_parameters, disabled, init_adapters
from plmtune.registry import Component
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.training.checkpoint import Checkpoints
from plmtune.training.init_from import InitCheckpoint, check_finite
from plmtune.training.runtime import Runtime
from plmtune.units import show_bytes


@dataclass
class FinetuneModel:
    """A model under training; `trained` is what is called, perhaps a wrapper of `model`."""

    cfg: Any
    model: Decoder
    trained: nn.Module
    tokenizer: Tokenizer
    dtype: torch.dtype  # of what is saved; in a step FSDP2 shows another
    adapters: dict[str, Any] = field(default_factory=dict)  # adapter_config.json; empty: all weights are trained
    scheme: dict[str, Any] = field(default_factory=dict)  # of quantization-aware training; empty: it is none
    notes: list[str] = field(default_factory=list)  # what a person should know of it, a line each

    def checkpoints(self, directory: Path) -> Checkpoints:
        """The checkpoints of a run of this model: of its adapters alone, where it has them."""
        how = self.cfg.checkpoint
        return Checkpoints(
            directory,
            keep=how.keep,
            best=how.best,
            mode=how.mode,
            background=how.background,
            named=adapters.adapter_state if self.adapters else hf_state,
            stem=adapters.ADAPTERS if self.adapters else "model",
            describe=self._describe,
        )

    @property
    def adapter_names(self) -> set[str]:
        """Parameters that `adapters_disabled` leaves out."""
        return set(adapter_parameters(self.model)) if self.adapters else set()

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Let the model be what its adapters stand beside for a while; without adapters, what it is."""
        with disabled(self.model):
            yield

    @contextmanager
    def fake_quant_disabled(self) -> Iterator[None]:
        """Let a model that is trained for quantization compute with its weights as they are for a while."""
        with _qat().fake_quant_disabled(self.model) if self.scheme else nullcontext():
            yield

    @contextmanager
    def fake_quant_frozen(self) -> Iterator[None]:
        """Weights that are trained for quantization do not change inside: they are rounded once."""
        with _qat().fake_quant_frozen(self.model) if self.scheme else nullcontext():
            yield

    def _describe(self, directory: Path) -> None:
        if self.adapters:
            adapters.write_adapter_config(directory, self.adapters)
        else:
            write_config(self.model.config, self.dtype, directory, score_head=hasattr(self.model, "score"))
            if self.scheme:
                _qat().write_scheme(directory, self.scheme)
        self.tokenizer.save(directory)


def _qat() -> Any:
    from plmtune.quantization import qat  # torchao takes a second to import

    return qat


def setup_model(
    cfg: Any,
    model: Decoder,
    tokenizer: Tokenizer,
    runtime: Runtime,
    origin: InitCheckpoint | None,
    whole: Path | None,
    *,
    score_head: bool = False,
) -> FinetuneModel:
    """Fill a model from its origin (None: a checkpoint will follow), add adapters, and spread it over the processes.

    Args:
        model: on the meta device.
        whole: the checkpoint that the run goes on from, if there is one.
        score_head: a reward model's head is added, where the origin has none.

    Raises:
        UserError: if origin, adapters or scheme do not fit it.
    """
    generator = torch.Generator().manual_seed(cfg.seed)
    if score_head:
        model.add_score_head(generator)
    scheme, notes = _prepare(cfg.quantization, model)
    model = model.to_empty(device=runtime.device)
    model.activation_checkpointing = cfg.runtime.activation_checkpointing
    model.init_weights(generator)  # also what no file holds, such as RoPE's tables
    if origin:
        adapters.load_state(model, origin.directory)
        check_finite(model, cfg.init_from)
    described: dict[str, Any] = {}
    if cfg.peft:
        assert origin is not None
        build("peft", cfg.peft, model=model)
        init_adapters(model, generator)
        described = adapters.adapter_config(model, origin.directory)
        if whole and adapters.base_digest(whole) != described["plmtune"]["base"]:
            raise UserError(
                f"init_from={cfg.init_from} no longer holds the weights that the adapters in {whole} were trained "
                "beside. Put them back."
            )
    trained = runtime.distribute(model, compile=cfg.runtime.compile)
    return FinetuneModel(cfg, model, trained, tokenizer, model.dtype, described, scheme, notes)


def check_finetuning(cfg: Any, model: Decoder, strategy: str) -> None:
    """Refuse adapters and schemes that do not go together, with the model, or with the way it is spread.

    Args:
        model: on the meta device; a scheme that is trained for is put into it.

    Raises:
        UserError: naming the key.
    """
    qat = _is_qat(cfg.quantization)
    if cfg.peft and strategy in ("fsdp", "hsdp"):
        raise UserError(f"key peft: adapters are trained on whole models, not under {strategy}: strategy=ddp.")
    if qat and cfg.peft:
        raise UserError(
            "key quantization.qat: the weights that would be rounded are frozen under adapters. Train all weights "
            "(peft=null), or leave quantization.qat out and quantize what plmtune merge gives."
        )
    if qat and strategy in ("fsdp", "hsdp"):
        raise UserError(
            f"key quantization.qat: {strategy} shows a layer its weights in the arithmetic's dtype, and what "
            "will be stored is rounded from fp32: strategy=ddp."
        )
    if qat:
        _prepare(cfg.quantization, model)
    elif cfg.quantization:
        build("quantization", cfg.quantization, model=model)


def _is_qat(chosen: Component | None) -> bool:
    return chosen is not None and bool(chosen.settings.get("qat"))


def _prepare(chosen: Component | None, model: Decoder) -> tuple[dict[str, Any], list[str]]:
    """Let the model round as its scheme will, if the config asks for it; returns the scheme and notes on it."""
    if chosen is None or not _is_qat(chosen):
        return {}, []
    plan = build("quantization", chosen, model=model)
    try:
        _qat().insert_fake_quantize(model, plan)
    except ValueError as error:
        raise UserError(f"key quantization: {error}") from error
    numbers = sum(p.numel() for name in plan for p in model.get_submodule(name).parameters() if p.ndim == 2)
    note = (
        f"quantization: {len(plan)} matrices are rounded in the forward as {chosen.name} stores them "
        f"({show_bytes(4 * numbers)} more memory); checkpoints hold them unrounded, for plmtune run quantize"
    )
    return _qat().scheme_settings(chosen), [note, *getattr(plan, "notes", [])]


def load_init_model(runtime: Runtime, origin: InitCheckpoint) -> Decoder:
    """A second model, with the weights that a run began with; for numbers only, not for training."""
    model: Decoder = adapters.load_model(origin.directory, runtime.device, torch.float32)
    return model.eval().requires_grad_(False)
