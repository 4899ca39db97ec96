"""What a run under tensor, pipeline or context parallelism cannot do yet, refused by key."""

from __future__ import annotations

from typing import Any

from plmtune.config.schema import PreferenceConfig, PretrainConfig, SftConfig, TrainingConfig
from plmtune.errors import UserError
from plmtune.parallel.checks import refusals
from plmtune.parallel.layout import Layout
from plmtune.training.runtime import Runtime


def check_layout(cfg: TrainingConfig, runtime: Runtime, model: Any) -> None:
    """Refuse a layout that does not fit the model, its batches, or what else the config asks for.

    Args:
        model: on the meta device; None where a run that does not exist yet determines it.

    Raises:
        UserError: with the key.
    """
    layout = runtime.layout
    _check_checkpointing(cfg, layout)
    used = [key for key in ("tp", "pp", "cp") if getattr(layout, key) > 1]
    if not used:
        return
    key = f"parallel.{used[0]}={getattr(layout, used[0])}"
    if isinstance(cfg, PreferenceConfig):
        raise UserError(f"key {key}: preference losses are of whole sequences on one process. Use dp_shard or ddp.")
    if isinstance(cfg, SftConfig) and layout.pp > 1:
        raise UserError(
            f"key parallel.pp={layout.pp}: sft makes micro-batches whose stages have no schedule yet. Use tp, cp or "
            "dp_shard."
        )
    if isinstance(cfg, PretrainConfig):
        whole = {
            "multi_round.rounds": cfg.multi_round.rounds > 1 and "losses of its sequences are measured",
            "validation.effective_dimension": cfg.validation.effective_dimension and "layers' outputs are compared",
        }
        for name, what in whole.items():
            if what:
                raise UserError(f"key {name}: {what} on whole models, not under {layout}. Leave it out.")
    if isinstance(cfg, PretrainConfig | SftConfig) and cfg.distillation.teacher:
        raise UserError(f"key distillation.teacher: a teacher is a whole model, not under {layout}. Leave it out.")
    if cfg.runtime.compile:
        raise UserError(f"key runtime.compile: layers are not compiled under {layout}. Set runtime.compile=false.")
    assert isinstance(cfg, PretrainConfig | SftConfig)
    sizes = {"global_batch_size": cfg.global_batch_size, "micro_batch_size": cfg.micro_batch_size}
    seq_len = getattr(cfg, "seq_len", None)
    if model is not None and seq_len is not None and (found := refusals(layout, model, seq_len=seq_len, **sizes)):
        raise UserError("\n".join(f"key {sentence}." for sentence in found))


def _check_checkpointing(cfg: TrainingConfig, layout: Layout) -> None:
    if cfg.runtime.activation_checkpointing != "selective":
        return
    key = "key runtime.activation_checkpointing: selective"
    if layout.pp > 1 and layout.schedule == "zbv":
        raise UserError(
            f"{key} keeps results for one backward, and parallel.schedule=zbv goes through each stage twice. Choose "
            "full, or parallel.schedule=1f1b."
        )
    packed = cfg.document_mask if isinstance(cfg, PretrainConfig) else isinstance(cfg, SftConfig)
    if cfg.runtime.compile and packed:
        rows = "document_mask" if isinstance(cfg, PretrainConfig) else "packed rows"
        raise UserError(
            f"{key} is compiled with its layer, and attention of {rows} is not compiled. Choose full, or set "
            "runtime.compile=false."
        )
