"""What a run starts from: the checkpoint that `init_from` names, or a default where it names none."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from plmtune.config.schema import TrainingConfig
from plmtune.config.typed_config import load_config
from plmtune.errors import UserError, WeightsNotFinite
from plmtune.io import hub, manifest
from plmtune.io.run_directory import CONFIG
from plmtune.io.run_summary import finished_runs
from plmtune.models import adapters
from plmtune.models.adapters import holds_adapters, load_model_tokenizer, read_model_config
from plmtune.models.added_parts import changed, with_added_parts
from plmtune.models.assemble import component_config, component_from_config, meta_model
from plmtune.models.checkpoint_files import checkpoint_directory, warn_if_interrupted
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.training.distributed import broadcast_from_rank0, once_per_machine
from plmtune.training.guard import not_finite
from plmtune.training.trainer_state import latest_valid, read_trainer_state

# Where init_from is empty, a run of a recipe starts from the newest finished run of the first recipe that has one.
DEFAULT_INIT_RECIPES = {"sft": ("pretrain",), "preference": ("sft", "pretrain")}
# Without such a run, from what the authors of PLM published (arXiv 2503.12167).
PUBLISHED = {"sft": "PLM-Team/PLM-1.8B-Base", "preference": "PLM-Team/PLM-1.8B-Instruct"}
# Keys in which a checkpoint may differ from the run's model: a shorter context computes the same, and the
# initialisation no longer matters.
_IGNORED_KEYS = ("max_seq_len", "init_std", "vocab_size")


def choose_init_checkpoint(cfg: TrainingConfig, *, allow_missing: bool = False) -> str:
    """Fill in `init_from`, `model` and `tokenizer` of a new run where they are empty; returns what was chosen.

    Args:
        allow_missing: if there is nothing to start from, leave all three empty, and ask no hub.
    """
    # Rank 0 decides for all: the newest run may be another one a moment later.
    found, message = broadcast_from_rank0(lambda: _find_init_checkpoint(cfg, allow_missing))
    if not found:
        return str(message)
    cfg.init_from = found
    directory = init_checkpoint_directory(found, weights=False)
    if cfg.model is None:
        config = read_model_config(directory)
        if cfg.init_changes:
            config = changed(config, cfg.init_changes, "key init_changes")
            message, cfg.init_changes = f"{message}, with init_changes", {}  # `model` now holds them
        cfg.model = component_from_config("model", config, "key init_changes")
    if cfg.tokenizer is None:
        path = _path_on_any_machine(found, directory)
        cfg.tokenizer = Component("tokenizer", "file", {"path": path, "pattern": "qwen2"})
    return str(message)


def check_init_changes(cfg: TrainingConfig) -> None:
    """Refuse `init_changes` where no model is taken from a checkpoint."""
    if not cfg.init_changes or cfg.resume:
        return
    if cfg.model is not None:
        raise UserError(
            "key init_changes: changes the model of init_from, and model names another one. Give model=null "
            "tokenizer=null, or set the model's own keys (model.ffn=siaf)."
        )
    if not cfg.init_from and cfg.recipe not in DEFAULT_INIT_RECIPES:
        raise UserError("key init_changes: there is no model to change. Give it: init_from=DIR")


def pin_revisions(cfg: TrainingConfig, *, weights: bool = False) -> None:
    """Replace the hub's models that a config names by their present commits, and fetch what is read of them.

    Every rank calls it. With `weights` the weights of a reward model that a round needs are fetched, too.
    """
    # Rank 0 decides for all: on another machine a directory may have that name.
    if cfg.init_from and not cfg.resume:
        cfg.init_from = broadcast_from_rank0(partial(hub.pin, cfg.init_from))
    distillation = getattr(cfg, "distillation", None)
    if distillation and distillation.teacher and not cfg.resume:
        distillation.teacher = broadcast_from_rank0(partial(hub.pin, distillation.teacher))
    for group in ("tokenizer", "reward"):
        chosen: Component | None = getattr(cfg, group, None)
        if chosen is None or not isinstance(chosen.settings.get("path"), str):
            continue
        path = chosen.settings["path"]
        if pinned := broadcast_from_rank0(partial(lambda path: hub.pin(path) if hub.parse(path) else None, path)):
            whole = group == "reward" and weights and getattr(cfg, "rounds", 0) > 0
            once_per_machine(partial(hub.fetch, hub.HubModel(*pinned.split("@")), weights=whole))
            setattr(cfg, group, replace(chosen, settings={**chosen.settings, "path": pinned}))


def _path_on_any_machine(name: str, directory: Path) -> str:
    """The name of a model of the hub, whose cache is elsewhere on other machines; else its directory."""
    return name if hub.parse(name) else str(directory)


def _find_init_checkpoint(cfg: TrainingConfig, allow_missing: bool) -> tuple[str, str]:
    """(init_from, a message for the user)"""
    if cfg.init_from:
        return cfg.init_from, f"starting from {cfg.init_from}"
    recipes = DEFAULT_INIT_RECIPES[cfg.recipe]
    other = ""
    for recipe in recipes:
        for run in finished_runs():
            with contextlib.suppress(UserError):  # another user's, a damaged one, or one that needs --import
                saved = load_config(run / CONFIG)
                if saved.recipe != recipe:
                    continue
                if _is_same_model(cfg.model, saved.model):
                    found = f"{run}, the newest finished {recipe} run ({_size(saved.model)})"
                    return str(run), f"starting from {found}; init_from=DIR for another"
                other = other or (
                    f" The newest finished {recipe} run is of another model ({_size(saved.model)}): to start "
                    f"from it, leave the model out (plmtune run {cfg.name}), or give init_from={run}."
                )
    wanted = f" with this model ({cfg.model.name})" if cfg.model else ""
    nothing = f"there is no finished {' or '.join(recipes)} run{wanted} under runs/ to start from"
    if allow_missing:
        return "", f"{nothing}; what follows from its model and tokenizer is not checked"
    if _is_same_model(cfg.model, Component("model", "plm", {})):
        repository = PUBLISHED[cfg.recipe]
        try:
            return hub.pin(repository), f"{nothing}: starting from the published {repository}"
        except UserError as error:
            nothing = f"{nothing}. {str(error).rstrip('.')}"
    if other:
        raise UserError(f"{nothing}.{other}")
    raise UserError(
        f"{nothing}. Train one first (plmtune run demo), or name a run or a model directory with init_from=DIR "
        "(plmtune convert FILE.gguf DIR makes one of a GGUF file)."
    )


def _size(model: Component) -> str:
    settings = component_config(model)
    return f"{model.name} with {settings['num_layers']} layers of {settings['embed_dim']:,}"


def _is_same_model(wanted: Component | None, saved: Component | None) -> bool:
    """Whether a saved model computes what is wanted; every model does where none is wanted."""
    if wanted is None or saved is None:
        return wanted is None
    return _difference(component_config(saved), component_config(wanted), ignored=_IGNORED_KEYS) is None


@dataclass
class InitCheckpoint:
    """The checkpoint that `init_from` names.

    Attributes:
        name: the value of `init_from`.
        continue_schedule: the run enters its schedule after the warmup, with this checkpoint's optimizer state.
        samples_seen: sequences of each source that were trained on, which the run then skips.
        added: the model's tensors that the checkpoint lacks, of parts that change nothing at their start.
        notes: a line that says so, to print when the run starts.
    """

    name: str
    directory: Path
    continue_schedule: bool
    samples_seen: dict[str, int]
    added: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def load(self, model: Decoder) -> None:
        """Copy the weights into a model, which keeps the numbers that it drew for what is added."""
        adapters.load_state(model, self.directory, added=self.added)
        for name, parameter in model.named_parameters():
            if name in self.added and name.startswith("value_embeddings."):
                torch.nn.init.zeros_(parameter)  # from scratch they are drawn; here they must change nothing
        check_finite(model, f"init_from={self.name}")


def find_init_checkpoint(
    init_from: str | None,
    model: Decoder,
    tokenizer: Tokenizer | None,
    scheduler: Component | None,
    *,
    weights: bool = True,
) -> InitCheckpoint | None:
    """Find the checkpoint of `init_from`, verify it, and check that it is of this model and tokenizer.

    Args:
        tokenizer: None where only its size is known.
        weights: False: the configuration is enough, see `checkpoint_directory`.
    """
    if not init_from:
        return None
    directory = init_checkpoint_directory(init_from, weights=weights)
    saved_config = read_model_config(directory)
    expected, parts = with_added_parts(saved_config, model.config)
    if found := _difference(expected, model.config, ignored=_IGNORED_KEYS[:2]):
        key, saved, own = found
        raise UserError(
            f"init_from={init_from}: its model has {key}={saved}, this run {own}. "
            "Use its own: model=null tokenizer=null. init_changes can add to it what changes nothing at its start."
        )
    added = sorted(model.state_dict().keys() - meta_model(saved_config, str(directory)).state_dict().keys())
    named = (directory / "tokenizer.json").is_file() or holds_adapters(directory)
    if named and tokenizer is not None and load_model_tokenizer(directory).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"init_from={init_from}: its tokenizer differs from this run's. Use its own: "
            f"tokenizer=file tokenizer.path={_path_on_any_machine(init_from, directory)}"
        )
    continues = scheduler is not None and scheduler.settings.get("start", "warmup") != "warmup"
    if scheduler is not None and continues and added:
        raise UserError(
            f"init_from={init_from}: it has no optimizer state of the added {', '.join(parts)}, which "
            f"scheduler.start={scheduler.settings['start']} would resume. Leave scheduler.start out."
        )
    state = read_trainer_state(directory).get("state", {}) if continues else {}
    seen = state.get("samples_seen", state.get("drawn", {}))  # "drawn": the key of checkpoints written before
    numbers = sum(tensor.numel() for name, tensor in model.state_dict().items() if name in added)
    note = (
        f"added to the model of {init_from}: {', '.join(parts)}: {len(added):,} tensors of {numbers:,} numbers, which "
        "change nothing until they are trained"
    )
    return InitCheckpoint(init_from, directory, bool(state), dict(seen), added, [note] if added else [])


def check_finite(model: Any, setting: str) -> None:
    """Refuse weights that hold NaN or an infinity, of the checkpoint that a setting names. Every rank calls it."""
    if names := not_finite(dict(model.named_parameters())):
        raise WeightsNotFinite(
            f"{setting}: its weights are not finite ({names}): its training diverged, or it is "
            "damaged. Take an earlier checkpoint or another model."
        )


def init_checkpoint_directory(init_from: str, *, weights: bool = True) -> Path:
    """The directory of the checkpoint that `init_from` names; of a run its newest valid one. Every rank calls it."""
    # A commit of the hub, see `choose_init_checkpoint`: each machine has a cache of its own.
    if broadcast_from_rank0(lambda: bool(hub.parse(init_from))):
        return once_per_machine(lambda: checkpoint_directory(init_from, weights=weights))

    def find() -> tuple[str, str]:
        given = Path(init_from)
        folder = given / "checkpoints" if (given / "checkpoints").is_dir() else given
        if manifest.steps(folder):
            return str(folder), ""
        return "", str(checkpoint_directory(given, weights=weights))

    # Rank 0 decides for all: the newest of a run that is still training may be another one a moment later.
    folder, single = broadcast_from_rank0(find)
    directory = latest_valid(Path(folder), once=True) if folder else Path(single)
    assert directory is not None
    if folder:
        warn_if_interrupted(directory)
    return directory


def _difference(saved: Any, own: Any, key: str = "", *, ignored: tuple[str, ...]) -> tuple[str, Any, Any] | None:
    """The first key in which two descriptions of a model differ, with both values."""
    if not isinstance(own, dict) or not isinstance(saved, dict):
        return None if own == saved else (key, saved, own)
    for name in sorted(own, key=lambda name: isinstance(own[name], dict)):  # plain values first: they say more
        inner = f"{key}.{name}" if key else name
        if name not in ignored and (found := _difference(saved.get(name), own[name], inner, ignored=ignored)):
            return found
    return None
