"""The model that a run fine-tunes: its initial weights, its adapters, and fake quantization of its matrices."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plmtune.config.compose import build
from plmtune.config.schema import FinetuningConfig
from plmtune.config.sections import CheckpointConfig
from plmtune.errors import UserError
from plmtune.models import adapters
from plmtune.models.hf import run_state
from plmtune.models.hf_config import write_config
from plmtune.modules.decoder import Decoder
from plmtune.modules.peft import init_adapters
from plmtune.registry import Component
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.training.checkpoint import Checkpoints
from plmtune.training.init_from import InitCheckpoint, find_init_checkpoint
from plmtune.training.runtime import Runtime
from plmtune.units import show_bytes


@dataclass
class FinetuneModel:
    """A model under training.

    Attributes:
        trained: what to call in a step: the model, or a wrapper of it.
        dtype: of the saved weights; in a step FSDP2 shows another.
        adapter_config: adapter_config.json; empty: all weights are trained.
        scheme: of quantization-aware training; empty without it.
        notes: a line each, to print when the run starts.
    """

    model: Decoder
    trained: nn.Module
    tokenizer: Tokenizer
    dtype: torch.dtype
    adapter_config: dict[str, Any] = field(default_factory=dict)
    scheme: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def open_checkpoints(self, directory: Path, settings: CheckpointConfig) -> Checkpoints:
        """The checkpoints of a run of this model: of its adapters alone, where it has them."""
        return Checkpoints(
            directory,
            **vars(settings),
            state_dict=adapters.adapter_state if self.adapter_config else run_state,
            stem=adapters.ADAPTERS if self.adapter_config else "model",
            write_metadata=self._write_metadata,
        )

    def fake_quant_disabled(self) -> AbstractContextManager[None]:
        """Compute with unrounded weights inside the block."""
        return _qat().fake_quant_disabled(self.model) if self.scheme else nullcontext()

    def fake_quant_frozen(self) -> AbstractContextManager[None]:
        """Round each weight once for the whole block, in which weights must not change."""
        return _qat().fake_quant_frozen(self.model) if self.scheme else nullcontext()

    def _write_metadata(self, directory: Path) -> None:
        if self.adapter_config:
            adapters.write_adapter_config(directory, self.adapter_config)
        else:
            score_head = hasattr(self.model, "score")
            write_config(self.model.config, self.dtype, directory, score_head=score_head, tokenizer=self.tokenizer)
            if self.scheme:
                _qat().write_scheme(directory, self.scheme)
        self.tokenizer.save(directory)


def _qat() -> Any:
    from plmtune.quantization import qat  # torchao takes a second to import

    return qat


def setup_model(
    model: Decoder,
    cfg: FinetuningConfig,
    runtime: Runtime,
    tokenizer: Tokenizer,
    init: InitCheckpoint | None,
    resumed: Path | None,
    *,
    score_head: bool = False,
) -> FinetuneModel:
    """Allocate a model, load its initial weights, add adapters or fake quantization, and distribute it.

    Args:
        model: on the meta device.
        init: what the run starts from; None: the weights come from the checkpoint that the run resumes from.
        resumed: the checkpoint that the run resumes from, if there is one.
        score_head: add a reward model's head, where the initial checkpoint has none.
    """
    generator = torch.Generator().manual_seed(cfg.seed)
    if score_head:
        model.add_score_head(generator)
    scheme, notes = _insert_fake_quantize(cfg.quantization, model)
    model = model.to_empty(device=runtime.device)
    model.activation_checkpointing = cfg.runtime.activation_checkpointing
    model.init_weights(generator)  # also what no file holds, such as RoPE's tables
    if init:
        init.load(model)
        notes += init.notes
    adapter_config: dict[str, Any] = {}
    if cfg.peft:
        assert init is not None
        build("peft", cfg.peft, model=model)
        init_adapters(model, generator)
        adapter_config = adapters.adapter_config(model, init.directory)
        if resumed and adapters.base_digest(resumed) != adapter_config["plmtune"]["base"]:
            raise UserError(
                f"init_from={init.name} no longer holds the base weights of the adapters in {resumed}. Put them back."
            )
    trained = runtime.distribute(model, compile=cfg.runtime.compile)
    return FinetuneModel(model, trained, tokenizer, model.dtype, adapter_config, scheme, notes)


def check_finetuning(model: Decoder, peft: Component | None, quantization: Component | None, strategy: str) -> None:
    """Refuse adapters and schemes that do not fit each other, the model, or the strategy.

    Args:
        model: on the meta device; fake quantization is inserted into it, if the scheme asks for it.
    """
    qat = _is_qat(quantization)
    sharded = strategy not in ("none", "ddp")
    if peft and sharded:
        raise UserError(f"key peft: adapters are trained on whole models, not under {strategy}: strategy=ddp.")
    if qat and peft:
        raise UserError(
            "key quantization.qat: the weights that would be rounded are frozen under adapters. Train all weights "
            "(peft=null), or leave quantization.qat out and quantize what plmtune merge gives."
        )
    if qat and sharded:
        raise UserError(
            f"key quantization.qat: {strategy} shows a layer its weights in the arithmetic's dtype, and what "
            "will be stored is rounded from fp32: strategy=ddp."
        )
    if qat:
        _insert_fake_quantize(quantization, model)
    elif quantization:
        build("quantization", quantization, model=model)


def _is_qat(chosen: Component | None) -> bool:
    return chosen is not None and bool(chosen.settings.get("qat"))


def _insert_fake_quantize(chosen: Component | None, model: Decoder) -> tuple[dict[str, Any], list[str]]:
    """Insert the fake quantization of a scheme with qat=true; returns the scheme and notes on it."""
    if chosen is None or not _is_qat(chosen):
        return {}, []
    formats = build("quantization", chosen, model=model)
    try:
        _qat().insert_fake_quantize(model, formats)
    except ValueError as error:
        raise UserError(f"key quantization: {error}") from error
    numbers = sum(p.numel() for name in formats for p in model.get_submodule(name).parameters() if p.ndim == 2)
    note = (
        f"quantization: {len(formats)} matrices are rounded in the forward as {chosen.name} stores them "
        f"({show_bytes(4 * numbers)} more memory); checkpoints hold them unrounded, for plmtune run quantize"
    )
    return _qat().scheme_settings(chosen), [note, *getattr(formats, "notes", [])]


def load_init_model(cfg: FinetuningConfig, model: Decoder, tokenizer: Tokenizer, runtime: Runtime) -> Decoder:
    """Load the weights that a run began with as a second model, for numbers only, not for training."""
    init = find_init_checkpoint(cfg.init_from, model, tokenizer, cfg.scheduler)
    assert init is not None
    loaded: Decoder = adapters.load_model(init.directory, runtime.device, torch.float32)
    return loaded.eval().requires_grad_(False)
