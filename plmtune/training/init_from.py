"""What a run starts from: the checkpoint of `init_from`, or the one that fits where none is named."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from plmtune.config.compose import load_config
from plmtune.errors import UserError
from plmtune.io import hub, manifest
from plmtune.io.run_directory import CONFIG
from plmtune.io.run_summary import finished_runs
from plmtune.models.adapters import holds_adapters, load_model_tokenizer, read_model_config
from plmtune.models.assemble import component_config, component_from_config
from plmtune.models.checkpoint_files import checkpoint_directory, say_if_interrupted
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.training.checkpoint import latest_valid, read_trainer_state
from plmtune.training.distributed import broadcast_from_rank0, once_per_machine
from plmtune.training.guard import check_weights

# What a recipe goes on from where nothing is named: the newest finished run of the first kind that has one.
DEFAULT_INIT_RECIPES = {"sft": ("pretrain",), "preference": ("sft", "pretrain")}
# With none, what the authors of PLM published (arXiv 2503.12167).
PUBLISHED = {"sft": "PLM-Team/PLM-1.8B-Base", "preference": "PLM-Team/PLM-1.8B-Instruct"}
# Alike in these, two models compute alike: a context may be shorter, and an initialisation is over.
_IGNORED_KEYS = ("max_seq_len", "init_std", "vocab_size")


def choose_init_checkpoint(cfg: Any, *, allow_missing: bool = False) -> str:
    """Fill in `init_from`, `model` and `tokenizer` of a new run where they are left out; returns what was chosen.

    Args:
        allow_missing: where nothing is there to start from, leave all three as they are, and look at no hub.

    Raises:
        UserError: if there is nothing to start from, saying what to run or pass.
    """
    # Rank 0 looks and tells: the newest run may be another one a moment later.
    found, why = broadcast_from_rank0(lambda: _find_init_checkpoint(cfg, allow_missing))
    if not found:
        return str(why)
    cfg.init_from = found
    directory = init_checkpoint_directory(found, weights=False)
    if cfg.model is None:
        description = read_model_config(directory)
        cfg.model = component_from_config("model", description, str(directory))
    if cfg.tokenizer is None:
        path = _portable(found, directory)
        cfg.tokenizer = Component("tokenizer", "file", {"path": path, "pattern": "qwen2"})
    return str(why)


def pin_revisions(cfg: Any, *, weights: bool = False) -> None:
    """Have a config's tokenizer and reward model name their commits on the hub, whose branches move on.

    What they name is then in the cache of each machine. Every rank calls it.

    Args:
        weights: fetch also those of a reward model that a round will ask.

    Raises:
        UserError: see `hub.fetch`.
    """
    for group in ("tokenizer", "reward"):
        chosen: Component | None = getattr(cfg, group, None)
        if chosen is None or not isinstance(chosen.settings.get("path"), str):
            continue
        # Rank 0 looks and tells: on another machine a directory may have that name.
        pinned = broadcast_from_rank0(partial(_pinned_revision, chosen.settings["path"]))
        if pinned:
            model, whole = hub.HubModel(*pinned.split("@")), group == "reward" and weights and cfg.rounds > 0
            once_per_machine(partial(hub.fetch, model, weights=whole))
            setattr(cfg, group, replace(chosen, settings={**chosen.settings, "path": pinned}))


def _pinned_revision(path: str) -> str | None:
    return hub.pin(path) if hub.parse(path) else None


def _portable(named: str, directory: Path) -> str:
    """Return the name of a model of the hub, whose cache is elsewhere on other machines; else its directory."""
    return named if hub.parse(named) else str(directory)


def _find_init_checkpoint(cfg: Any, allow_missing: bool) -> tuple[str, str]:
    """(where it is, what to say of it)"""
    if cfg.init_from:
        cfg.init_from = hub.pin(cfg.init_from)
        return cfg.init_from, f"starting from {cfg.init_from}"
    other = ""
    for kind in DEFAULT_INIT_RECIPES[cfg.recipe]:
        for run in finished_runs():
            with contextlib.suppress(UserError):  # a stranger's, a damaged one, or one that needs --import
                theirs = load_config(run / CONFIG)
                if theirs.recipe == kind and _fits(cfg.model, theirs.model):
                    found = f"{run}, the newest finished {kind} run ({_size(theirs.model)})"
                    return str(run), f"starting from {found}; init_from=DIR for another"
                if theirs.recipe == kind and not other:
                    other = (
                        f" The newest finished {kind} run is of another model ({_size(theirs.model)}): to start "
                        f"from it, leave the model out (plmtune run {cfg.name}), or give init_from={run}."
                    )
    wanted = f" with this model ({cfg.model.name})" if cfg.model else ""
    nothing = (
        f"there is no finished {' or '.join(DEFAULT_INIT_RECIPES[cfg.recipe])} run{wanted} under runs/ to start from"
    )
    if allow_missing:
        return "", f"{nothing}; what follows from its model and tokenizer is not checked"
    if _fits(cfg.model, Component("model", "plm", {})):
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


def _fits(wanted: Component | None, theirs: Component | None) -> bool:
    """Whether two models compute alike; all fit where none is wanted."""
    if wanted is None or theirs is None:
        return wanted is None
    ours, others = component_config(wanted), component_config(theirs)
    return all(ours[key] == others.get(key) for key in ours if key not in _IGNORED_KEYS)


@dataclass
class InitCheckpoint:
    """The checkpoint that `init_from` names; a run that enters the schedule after its warmup goes on from there."""

    directory: Path
    continue_schedule: bool
    samples_seen: dict[str, int]  # sequences of each source that it has seen


def find_init_checkpoint(
    cfg: Any, model: Decoder, tokenizer: Tokenizer | None, *, weights: bool = True
) -> InitCheckpoint | None:
    """Find the checkpoint of `init_from`, whole, and check that it is this model with this tokenizer.

    Args:
        tokenizer: None where only its size is known.
        weights: False: the configuration is enough, see `checkpoint_directory`.

    Raises:
        UserError: naming what differs or is damaged.
    """
    if not cfg.init_from:
        return None
    # A branch of the hub may move on; the run keeps the commit that it starts from.
    cfg.init_from = broadcast_from_rank0(lambda: hub.pin(cfg.init_from))
    directory = init_checkpoint_directory(cfg.init_from, weights=weights)
    theirs, ours = read_model_config(directory), model.config
    if found := _difference(theirs, ours):
        key, their, our = found
        raise UserError(f"init_from={cfg.init_from}: its model has {key}={their}, this run {our}.")
    named = (directory / "tokenizer.json").is_file() or holds_adapters(directory)
    if named and tokenizer is not None and load_model_tokenizer(directory).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"init_from={cfg.init_from}: its tokenizer is another one than this run's. Use its own: "
            f"tokenizer=file tokenizer.path={_portable(cfg.init_from, directory)}"
        )
    # A branched decay anneals that very run: it keeps the optimizer's moments and reads on where the other stopped.
    continue_schedule = cfg.scheduler.settings.get("start", "warmup") != "warmup"
    state = read_trainer_state(directory).get("state", {}) if continue_schedule else {}
    return InitCheckpoint(directory, bool(state), dict(state.get("samples_seen", state.get("drawn", {}))))


def check_finite(model: Any, init_from: str) -> None:
    """Refuse to start from weights that hold NaN or an infinity. Every rank calls it.

    Raises:
        UserError: naming them.
    """
    check_weights(
        dict(model.named_parameters()),
        lambda names: (
            f"init_from={init_from}: its weights are not finite ({names}): its training diverged, or it is "
            "damaged. Start from an earlier checkpoint or another model."
        ),
    )


def init_checkpoint_directory(init_from: str, *, weights: bool = True) -> Path:
    """The checkpoint that `init_from` names; of a run the newest one that is whole. Every rank calls it.

    Args:
        weights: False: the configuration is enough, see `checkpoint_directory`.

    Raises:
        UserError: if there is none.
    """

    # A commit of the hub, see `choose_init_checkpoint`: each machine has a cache of its own.
    if broadcast_from_rank0(lambda: bool(hub.parse(init_from))):
        return once_per_machine(lambda: checkpoint_directory(init_from, weights=weights))

    def find() -> tuple[str, str]:
        given = Path(init_from)
        folder = given / "checkpoints" if (given / "checkpoints").is_dir() else given
        if manifest.steps(folder):
            return str(folder), ""
        return "", str(checkpoint_directory(given, weights=weights))

    # Rank 0 looks and tells: the newest of a run that is still training may be another a moment later.
    folder, single = broadcast_from_rank0(find)
    directory = latest_valid(Path(folder), once=True) if folder else Path(single)
    assert directory is not None
    if folder:
        say_if_interrupted(directory)
    return directory


def _difference(theirs: Any, ours: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key in which two models compute otherwise, with both values."""
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return None if ours == theirs else (key, theirs, ours)
    for name in sorted(ours, key=lambda name: isinstance(ours[name], dict)):  # plain ones first: they say more
        if name in _IGNORED_KEYS and name != "vocab_size":
            continue
        if found := _difference(theirs.get(name), ours[name], f"{key}.{name}" if key else name):
            return found
    return None
