"""The keys of a recipe's config that training reads, as protocols: a schema of a user's own has them too."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from plmtune.config.schema import CheckpointConfig, RuntimeConfig
from plmtune.registry import Component


class RunConfig(Protocol):
    """Keys of every recipe whose runs have a directory."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    recipe: str
    name: str
    run_dir: str | None
    resume: bool
    allow_data_change: bool
    force: bool
    data: Component | None


class TrainingConfig(RunConfig, Protocol):
    """Keys of every recipe that trains."""

    init_from: str | None
    seed: int
    micro_batch_size: int
    runtime: RuntimeConfig
    checkpoint: CheckpointConfig
    model: Component | None
    tokenizer: Component | None
    loss: Component | None
    optimizer: Component | None
    scheduler: Component | None
    logger: Component | None


class FinetuningConfig(TrainingConfig, Protocol):
    """Keys of every recipe that trains a given model further."""

    seq_len: int | None
    peft: Component | None
    quantization: Component | None
