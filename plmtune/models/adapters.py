"""Adapters on disk, as the `peft` package has them: adapter_model.safetensors and adapter_config.json, and no base.

adapter_config.json names the base; its key `plmtune` says which component the adapters are and what the base's files
hashed to, so that another base is refused. A base may itself be a directory of adapters, and has a base then.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from plmtune import dtypes
from plmtune.errors import UserError
from plmtune.io import hub
from plmtune.models import hf, hf_config
from plmtune.models.adapter_names import (
    OWN_TYPE,
    choose_modules,
    family_names,
    held_modules,
    own_names,
    stored_parts,
    target_modules,
)
from plmtune.models.checkpoint_files import (
    ADAPTER_CONFIG,
    CONFIG,
    checkpoint_directory,
    locate,
    opened_weights,
    read_json,
    write_json,
)
from plmtune.models.hf_names import STANDARD
from plmtune.modules.decoder import Decoder
from plmtune.modules.peft import adapted, merge
from plmtune.modules.quantized import is_quantized
from plmtune.registry import load
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import load_tokenizer

ADAPTERS = "adapter_model"  # the stem of the file of tensors

_CODES = ("F32", "F16", "BF16")  # of the tensors in a file of adapters
# Keys of adapter_config.json that are read, and those that do not change what the tensors mean; any other is refused
# where it is not empty or false.
_READ = (
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "plmtune", "r", "lora_alpha", "lora_dropout"),
    *("target_modules", "modules_to_save", "use_dora", "bias", "init_lora_weights"),
    *("exclude_modules", "layers_to_transform", "layers_pattern"),
)
_WITHOUT_EFFECT = (
    *("auto_mapping", "peft_version", "inference_mode", "ensure_weight_tying"),
    "fan_in_fan_out",  # PEFT sets it by the base's class of layers
    *("megatron_config", "megatron_core", "runtime_config", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of `init_lora_weights`
)
# The beginnings that leave the base's weights as they are. The others (pissa, olora, corda, loftq, lora_ga) take a part
# out of them, so that the adapters are of weights that no file holds.
_PLAIN_BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica")
_CHUNK_BYTES = 1 << 24
_MAX_DEPTH = 16


def holds_adapters(directory: Path) -> bool:
    """Whether a directory holds adapters and no whole model."""
    return (directory / ADAPTER_CONFIG).exists() and not (directory / CONFIG).exists()


def adapter_state(model: Decoder) -> dict[str, Tensor]:
    """All that is trained of a model with adapters, under PEFT's names (see `adapter_names` for families with fused
    matrices): what a checkpoint saves, and restores into."""
    return {name: parts[0] for name, parts in stored_parts(model, own_names(model)).items()}


def adapter_config(model: Decoder, base: Path) -> dict[str, Any]:
    """Return adapter_config.json for a model's adapters: PEFT's keys, and ours.

    Reads the base's files to hash them, so make it once a run.

    Args:
        model: with adapters.
        base: directory of the weights that they stand beside.

    Raises:
        UserError: if there are no weights in `base`.
    """
    layers, names = adapted(model), own_names(model)
    one = next(iter(layers.values()))
    modules = held_modules(model, names)
    dora = hasattr(one, "magnitude")
    alpha = float(one.scaling * one.lora_a.out_features if dora else one.alpha)
    kind = "dora" if dora else "qlora" if one._quantize_base else "lora"
    score = hasattr(model, "score")
    return {
        "peft_type": "LORA" if family_names(model).one_to_one else OWN_TYPE,
        "task_type": "SEQ_CLS" if score else "CAUSAL_LM",
        **_named(Path(base).resolve()),
        "r": one.lora_a.out_features,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": one.dropout.p if isinstance(one.dropout, torch.nn.Dropout) else 0.0,
        "target_modules": target_modules(modules, [name for name, held in modules.items() if held[0] in layers]),
        "modules_to_save": ["score"] if score else None,
        "use_dora": dora,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "plmtune": {"component": kind, "base": weights_digest(Path(base))},
    }


def write_adapter_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write what `adapter_config` returned beside tensors that others write."""
    write_json(directory / ADAPTER_CONFIG, config)


def weights_digest(directory: Path) -> str:
    """The xxh3-128 of the hashes of a directory's weight files, as hex; with adapters, of their base's too.

    Raises:
        UserError: if it holds no weights.
    """
    stem, digest = "model", xxhash.xxh3_128()
    if holds_adapters(directory):
        stem = ADAPTERS
        digest.update(repr(base_digest(directory)).encode())
    for path in sorted(set(locate(directory, stem).values())):
        held = xxhash.xxh3_128()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                held.update(chunk)
        digest.update(f"{path.name} {held.hexdigest()}\n".encode())
    return digest.hexdigest()


def _ours(directory: Path) -> dict[str, Any]:
    """The key `plmtune` of adapter_config.json; empty for adapters that PEFT itself wrote."""
    ours = read_json(directory, ADAPTER_CONFIG).get("plmtune", {})
    if not isinstance(ours, dict):
        raise UserError(f"{directory / ADAPTER_CONFIG}, key plmtune: must be a table, not {ours!r:.80}.")
    return ours


def _named(base: Path) -> dict[str, str]:
    """What PEFT's file calls a base: a path, or a name of the hub and its commit."""
    model = hub.model_of(base)
    if model is None or model.revision is None:
        return {"base_model_name_or_path": str(base)}
    return {"base_model_name_or_path": model.repository, "revision": model.revision}


def base_digest(directory: Path) -> Any:
    """What the adapters in a directory say that their base's weights hash to; None if they say nothing."""
    return _ours(directory).get("base")


def find_base(directory: Path, base: Path | None = None) -> Path:
    """Return the directory of the weights that adapters stand beside.

    Args:
        directory: of the adapters.
        base: None: what adapter_config.json names, absolute or as seen from here, from `directory`, or from one of
            the directories that it lies in.

    Raises:
        UserError: if it is not there, or holds other weights than the adapters were trained beside.
    """
    where = directory / ADAPTER_CONFIG
    if base is None:
        config = read_json(directory, ADAPTER_CONFIG)
        named, revision = config.get("base_model_name_or_path"), config.get("revision")
        if not isinstance(named, str) or not named:
            raise UserError(f"{where} names no base_model_name_or_path. Give the base's directory with --base.")
        around = [Path(), directory.resolve(), *directory.resolve().parents]
        found = next((place / named for place in around if (place / named).is_dir()), None)
        if found is None and (model := hub.parse(f"{named}@{revision}" if isinstance(revision, str) else named)):
            found = hub.fetch(model)
        if found is None:
            raise UserError(f"{where}: the base {named!r:.200} is not a directory here. Give its place with --base.")
        base = found
    base = checkpoint_directory(base)
    expected = base_digest(directory)
    if expected is not None and (digest := weights_digest(base)) != expected:
        raise UserError(
            f"{directory} was trained beside other weights than those of {base} (digest {digest}, not "
            f"{expected!r:.80}). Give the right base with --base."
        )
    return base


def load_adapter(model: Decoder, directory: Path) -> None:
    """Put a directory's adapters into a model that holds their base's weights, in place; all else is frozen.

    Raises:
        UserError: if they are damaged, of a kind that cannot be represented, or do not fit the model, as no adapters
            fit integers.
    """
    if is_quantized(model):
        raise UserError(
            f"{directory}: its base is quantized, and adapters cannot be put beside integers. Give the checkpoint that "
            "was quantized with --base, merge, and quantize what comes of it."
        )
    where = directory / ADAPTER_CONFIG
    config = read_json(directory, ADAPTER_CONFIG)
    if config.get("peft_type") not in ("LORA", OWN_TYPE) or config.get("bias", "none") != "none":
        raise UserError(f"{where}: peft_type must be LORA and bias none; nothing else can be read.")
    unknown = next((key for key in config if config[key] and key not in _READ + _WITHOUT_EFFECT), None)
    if unknown is not None:
        raise UserError(f"{where}: {unknown} ({config[unknown]!r:.80}) is not supported.")
    beginning = config.get("init_lora_weights")
    if not (beginning in (True, False, None) or f"{beginning}".lower() in _PLAIN_BEGINNINGS):
        raise UserError(
            f"{where}: init_lora_weights is {beginning!r:.80}, with which PEFT may change the base's weights: beside "
            "the plain base these adapters are another model. Save them with path_initial_model_for_weight_conversion "
            "of PEFT's save_pretrained, or merge them there and save the whole model."
        )
    kind = _ours(directory).get("component", "dora" if config.get("use_dora") else "lora")
    if kind not in ("lora", "qlora", "dora"):
        raise UserError(f"{where}, key plmtune.component: {kind!r:.80} is none of lora, qlora, dora.")
    saved = config.get("modules_to_save") or []
    if saved not in ([], ["score"]):
        raise UserError(f"{where}: modules_to_save is {saved!r:.80}; only the score head's can be read.")
    if saved and not hasattr(model, "score"):
        model.add_score_head()
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if type(rank) is not int or not isinstance(alpha, int | float) or not isinstance(dropout, int | float):
        raise UserError(f"{where}: r, lora_alpha or lora_dropout is missing or no number.")
    locations = locate(directory, ADAPTERS)
    widths = (max(module.weight.shape) for module in model.modules() if isinstance(module, torch.nn.Linear))
    if rank > max(model.embed_dim, *widths):
        raise UserError(f"{where}: r is {rank}, more than any layer is wide.")
    names = family_names(model) if config["peft_type"] == "LORA" else STANDARD
    modules = held_modules(model, names)
    targets = tuple(part for name in choose_modules(config, modules, names, locations, where) for part in modules[name])
    try:
        load("peft", kind)(model=model, rank=rank, alpha=float(alpha), dropout=float(dropout), targets=targets)
    except ValueError as error:
        raise UserError(f"{where} does not fit the model: {error}.") from error
    _restore(stored_parts(model, names), locations, directory)


@torch.no_grad()
def _restore(state: Mapping[str, tuple[Tensor, ...]], locations: Mapping[str, Path], directory: Path) -> None:
    missing = next((name for name in state if name not in locations), None)
    if missing is not None:
        files = set(locations.values())
        where = files.pop() if len(files) == 1 else directory
        raise UserError(
            f"{where} misses the tensor {missing} that {ADAPTER_CONFIG} describes. Take both from one model."
        )
    extra = next((name for name in locations if name not in state), None)
    if extra is not None:
        raise UserError(f"{locations[extra]} holds the tensor {extra!r:.200}, not listed in {ADAPTER_CONFIG}.")
    for path in sorted(set(locations.values())):
        with opened_weights(path) as opened:
            for name in (name for name in state if locations[name] == path):
                header = opened.get_slice(name)
                shape = tuple(header.get_shape())
                parts = state[name]
                common = name.endswith("lora_A.weight")  # all parts of a fused matrix have the same A
                needed = tuple(parts[0].shape)
                if not common:
                    needed = (sum(len(part) for part in parts), *needed[1:])
                if shape != needed or header.get_dtype() not in _CODES:
                    raise UserError(
                        f"{path}: {name} has shape {list(shape)} and type {header.get_dtype()}; the model needs "
                        f"{list(needed)} in one of {', '.join(_CODES)}."
                    )
                whole = opened.get_tensor(name)
                split = [whole] * len(parts) if common else whole.split([len(part) for part in parts])
                for part, held in zip(parts, split, strict=True):
                    part.copy_(held)


def load_state(model: Decoder, directory: Path, base: Path | None = None, *, added: Collection[str] = ()) -> None:
    """Copy a directory's weights into a model, adapters merged: `hf.load_state` for either kind of directory.

    Raises:
        UserError: if they do not fit the model, or the adapters' base is not to be found.
    """
    chain = _chain(directory, base)
    hf.load_state(model, chain[0], added=added)
    for adapters in chain[1:]:
        load_adapter(model, adapters)
        merge(model)


def load_model(
    directory: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, *, base: Path | None = None
) -> Decoder:
    """Load a directory's model, adapters merged: `hf.load_model` for either kind of directory.

    Args:
        dtype: None keeps the file's; of adapters, theirs.
        base: of the adapters; None: what they name.

    Raises:
        UserError: if it cannot be loaded, or the adapters' base is not to be found.
    """
    chain = _chain(directory, base)
    if len(chain) == 1:
        return hf.load_model(directory, device, dtype)
    # In the adapters' dtype, in which they were trained: NF4 of other numbers would be another base.
    model = hf.load_model(chain[0], device, _dtype(chain[1]))
    for adapters in chain[1:]:
        load_adapter(model, adapters)
        merge(model)
    return model.to(dtype) if dtype is not None else model


def read_model_config(directory: Path) -> dict[str, Any]:
    """The `config` of the model that a directory holds, or that its adapters belong to.

    Raises:
        UserError: if it is no checkpoint, or the adapters' base is not to be found.
    """
    return hf_config.read_model_config(_chain(directory, None)[0])


def load_model_tokenizer(directory: Path, base: Path | None = None) -> Tokenizer:
    """The tokenizer of a directory; where adapters came without one, their base's."""
    if holds_adapters(directory) and not (directory / "tokenizer.json").exists():
        return load_tokenizer(_chain(directory, base)[0])
    return load_tokenizer(directory)


def _chain(directory: Path, base: Path | None) -> list[Path]:
    """The directory of a whole model and those of the adapters upon it, this one last."""
    chain = [directory]
    while holds_adapters(chain[0]):
        if len(chain) > _MAX_DEPTH:
            raise UserError(f"{directory} has a base that has a base, {_MAX_DEPTH} times over. Merge one of them.")
        chain.insert(0, find_base(chain[0], base if len(chain) == 1 else None))
    return chain


def _dtype(directory: Path) -> torch.dtype:
    locations = locate(directory, ADAPTERS)
    if not locations:
        raise UserError(f"{directory} holds no tensors.")
    name, path = next(iter(locations.items()))
    with opened_weights(path) as opened:
        code = opened.get_slice(name).get_dtype()
    return dtypes.from_code(code) if code in _CODES else torch.float32
