"""The model that a run fine-tunes: filled from its origin, with adapters where they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plmtune.config import build
from plmtune.data.tokenizers import Tokenizer
from plmtune.errors import UserError
from plmtune.models import adapters
from plmtune.models.hf import hf_state, write_config
from plmtune.modules.decoder import Decoder
from plmtune.modules.peft import adapter_parameters, disabled, init_adapters
from plmtune.origins import Origin
from plmtune.training.checkpoint import Checkpoints
from plmtune.training.runtime import Runtime


@dataclass
class Student:
    """A model under training; `trained` is what is called, perhaps a wrapper of `model`."""

    cfg: Any
    model: Decoder
    trained: nn.Module
    tokenizer: Tokenizer
    dtype: torch.dtype  # of what is saved; in a step FSDP2 shows another
    adapters: dict[str, Any] = field(default_factory=dict)  # adapter_config.json; empty: all weights are trained

    def checkpoints(self, directory: Path) -> Checkpoints:
        """The checkpoints of a run of this model: of its adapters alone, where it has them."""
        how = self.cfg.checkpoint
        return Checkpoints(
            directory,
            keep=how.keep,
            best=how.best,
            best_is=how.best_is,
            background=how.background,
            named=adapters.adapter_state if self.adapters else hf_state,
            stem=adapters.ADAPTERS if self.adapters else "model",
            describe=self._describe,
        )

    @property
    def adapter_names(self) -> set[str]:
        """Parameters that `base` does without."""
        return set(adapter_parameters(self.model)) if self.adapters else set()

    @contextmanager
    def base(self) -> Iterator[None]:
        """Let the model be what its adapters stand beside for a while; without adapters, what it is."""
        with disabled(self.model):
            yield

    def _describe(self, directory: Path) -> None:
        if self.adapters:
            adapters.write_adapter_config(directory, self.adapters)
        else:
            write_config(self.model.config, self.dtype, directory, score_head=hasattr(self.model, "score"))
        self.tokenizer.save(directory)


def wake(
    cfg: Any,
    model: Decoder,
    tokenizer: Tokenizer,
    runtime: Runtime,
    origin: Origin | None,
    whole: Path | None,
    *,
    score_head: bool = False,
) -> Student:
    """Fill a model from its origin (None: a checkpoint will follow), add adapters, and spread it over the processes.

    Args:
        model: on the meta device.
        whole: the checkpoint that the run goes on from, if there is one.
        score_head: a reward model's head is added, where the origin has none.

    Raises:
        UserError: if origin or adapters do not fit it.
    """
    if cfg.peft and runtime.strategy in ("fsdp", "hsdp"):
        raise UserError(f"key peft: adapters are trained on whole models, not under {runtime.strategy}: strategy=ddp.")
    generator = torch.Generator().manual_seed(cfg.seed)
    if score_head:
        model.add_score_head(generator)
    model = model.to_empty(device=runtime.device)
    model.activation_checkpointing = cfg.runtime.activation_checkpointing
    model.init_weights(generator)  # also what no file holds, such as RoPE's tables
    if origin:
        adapters.load_state(model, origin.directory)
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
    return Student(cfg, model, trained, tokenizer, model.dtype, described)


def first_model(runtime: Runtime, origin: Origin) -> Decoder:
    """A second model, with the weights that a run began with; for numbers only, not for training."""
    model: Decoder = adapters.load_model(origin.directory, runtime.device, torch.float32)
    return model.eval().requires_grad_(False)
