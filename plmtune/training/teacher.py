"""The teacher of a distillation: a second model whose distribution of the next token the trained model learns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from plmtune.config.compose import build
from plmtune.data.batches import Batch
from plmtune.errors import UserError
from plmtune.losses.distillation import TeacherStates
from plmtune.models import adapters
from plmtune.models.assemble import component_from_config
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, describe_components, load
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.training import distributed
from plmtune.training.init_from import init_checkpoint_directory
from plmtune.training.runtime import Runtime


@dataclass
class Teacher:
    """A frozen model.

    Attributes:
        name: the value of `distillation.teacher`.
        model: on the meta device until `load_weights`.
    """

    name: str
    directory: Path
    model: Decoder

    def load_weights(self, runtime: Runtime) -> None:
        """Load the weights, in the dtype of the arithmetic, and shard them as the trained model is."""
        self.model = adapters.load_model(self.directory, runtime.device, runtime.compute_dtype)
        self.model.eval().requires_grad_(False)
        if runtime.strategy in ("fsdp", "hsdp"):
            distributed.wrap(self.model, runtime.strategy, runtime.mesh, runtime.compute_dtype)

    @torch.no_grad()
    def states(self, batch: Batch) -> TeacherStates:
        """Return what its logits of the tokens that count are computed from."""
        hidden = self.model(batch.tokens, mask=batch.mask, input_pos=batch.input_pos, hidden=True)
        return TeacherStates(batch.counted(hidden)[0], self.model.head_weight, **self.model.loss_settings)


def find_teacher(name: str | None, loss: Component, tokenizer: Tokenizer | None, seq_len: int) -> Teacher | None:
    """Find the teacher that a config names, and check that it fits the loss, the tokenizer and the rows."""
    distils = [each for each in describe_components()["loss"] if getattr(load("loss", each), "needs_teacher", False)]
    if name is None and loss.name in distils:
        raise UserError(f"key loss: {loss.name} learns from a teacher. Give it: distillation.teacher=DIR")
    if name is None:
        return None
    if loss.name not in distils:
        one_of = ", ".join(f"loss={each}" for each in distils)
        raise UserError(f"key distillation.teacher: {loss.name} has no teacher. Choose one of {one_of}.")
    directory = init_checkpoint_directory(name, weights=False)
    if tokenizer is not None and adapters.load_model_tokenizer(directory).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"distillation.teacher={name}: its tokenizer differs from this run's, so their tokens cannot be compared. "
            f"Train with the teacher's: tokenizer=file tokenizer.path={directory}"
        )
    config = adapters.read_model_config(directory)
    with torch.device("meta"):
        chosen = component_from_config("model", config, str(directory))
        model = build("model", chosen, vocab_size=config["vocab_size"])
    if seq_len > model.max_seq_len:
        raise UserError(
            f"distillation.teacher={name}: it reads {model.max_seq_len} tokens at once, and seq_len is {seq_len}. "
            f"Give seq_len={model.max_seq_len} or less."
        )
    return Teacher(name, directory, model)
