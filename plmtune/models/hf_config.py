"""config.json in Hugging Face's form, written and read.

Its key `plmtune` describes the model by registered components, so that any combination can be loaded; a directory
without that key is read as the checkpoint that its other keys describe (`families`). Its key `quantization_config` says
which modules are stored in which format.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from plmtune.errors import UserError
from plmtune.io import hub
from plmtune.io.untrusted import load_json
from plmtune.models.assemble import component_from_config
from plmtune.models.checkpoint_files import CONFIG, locate, read_json, write_json
from plmtune.models.families import by_component, by_model_type, families, names_of
from plmtune.models.family import HARMLESS, Keys, size_keys
from plmtune.models.hf_names import our_name
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import Format, install
from plmtune.tokenizers.tokenizer import Tokenizer

_OWN = {"architectures": ["PlmtuneForCausalLM"], "model_type": "plmtune"}
# transformers' defaults are tokens of each family's first vocabulary.
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
METHOD, VERSION = "plmtune", 1  # of quantization_config
# Far above any real model's, far below what would hurt.
_MAX_POSITIONS = 2**24
_MAX_LAYERS = 1000  # without weights to compare with


def hf_config(
    config: Mapping[str, Any],
    dtype: torch.dtype,
    *,
    score_head: bool = False,
    one_to_one: bool = False,
    source: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return config.json for a model's `config`: Hugging Face's keys, where it has such a model, and ours.

    Args:
        score_head: the model is one for sequence classification, with one class.
        one_to_one: a family whose tensors hold several of ours, or are transposed, is written as plmtune's own.
        source: config.json of the checkpoint that the model was read from: its keys are kept if they still describe it.
    """
    keys = _family_keys(json.dumps(config), json.dumps(source))
    if one_to_one and not names_of(keys).one_to_one:
        keys = _OWN | size_keys(config)
    keys = keys | {"dtype" if "dtype" in keys else "torch_dtype": str(dtype).removeprefix("torch.")}
    if score_head:
        names = [name.replace("ForCausalLM", "ForSequenceClassification") for name in keys["architectures"]]
        keys |= {"architectures": names, "id2label": {"0": "score"}, "label2id": {"score": 0}}
    return keys | {"plmtune": dict(config)}


@lru_cache(maxsize=16)
def _family_keys(config: str, source: str) -> dict[str, Any]:
    """The first keys that the readers make the same model of: of the source, or what a family writes; else our own."""
    description = load_json(config)
    computation = _build(description, "config").computation()
    own = by_component().get(description["component"])

    def as_read() -> dict[str, Any]:
        keys = load_json(source) or {}
        if family := by_model_type().get(str(keys.get("model_type"))):
            with contextlib.suppress(KeyError):
                family.write(description)  # refuses what transformers' class refuses
        return keys

    writers = [as_read]
    for family in ([own] if own else []) + [other for other in families() if other is not own]:
        model_type, architecture = next(iter(family.architectures.items()))
        keys = {"architectures": [architecture], "model_type": model_type} | _NO_TOKENS
        writers.append(lambda family=family, keys=keys: keys | family.write(description))  # type: ignore[misc]
    for write in writers:
        try:
            keys = write()
            if _build(_from_hf_keys(keys, Path(CONFIG)), CONFIG).computation() == computation:
                return keys
        except (KeyError, ValueError, UserError):
            continue  # it has no such model
    return _OWN | size_keys(description)


def write_config(
    config: Mapping[str, Any],
    dtype: torch.dtype,
    directory: Path,
    *,
    score_head: bool = False,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write the config.json of a model's `config` beside weights of `dtype` that others write.

    Args:
        tokenizer: whose begin and end tokens it names, at which other programs stop.
    """
    keys = hf_config(config, dtype, score_head=score_head, one_to_one=True)
    if tokenizer is not None:
        ends = list(tokenizer.end_ids)
        keys["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        keys |= {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.eos_id}
    write_json(directory / CONFIG, keys)


def read_formats(directory: str | Path) -> tuple[dict[str, Format], dict[str, Any]]:
    """Return how a directory's weights are quantized: (our module name -> format, the scheme that gave it).

    Both are empty for weights that are not quantized.

    Raises:
        UserError: if config.json does not have the form that `save_model` writes, or names another method.
    """
    path = Path(directory) / CONFIG
    found = read_json(Path(directory), CONFIG).get("quantization_config")
    if found is None:
        return {}, {}
    where = f"{path}, key quantization_config"
    if not isinstance(found, dict):
        raise UserError(f"{where}: must be a table, not {found!r:.80}.")
    if found.get("quant_method") != METHOD:
        raise UserError(
            f"{where}: a checkpoint quantized by {found.get('quant_method')!r:.80} cannot be read. Get the original "
            "weights and quantize them with plmtune run quantize."
        )
    version, scheme, named = found.get("version"), found.get("scheme", {}), found.get("formats")
    if type(version) is not int or version != VERSION:
        raise UserError(f"{where}: version is {version!r:.80}, and this plmtune reads {VERSION}. Get a newer one.")
    if not isinstance(scheme, dict):
        raise UserError(f"{where}.scheme: must be a table, not {scheme!r:.80}.")
    if not isinstance(named, dict) or not all(isinstance(names, list) for names in named.values()):
        raise UserError(f"{where}.formats: must map formats to lists of modules, not {named!r:.80}.")
    formats: dict[str, Format] = {}
    for format, names in named.items():
        try:
            parsed = Format.parse(format)
        except ValueError as error:
            raise UserError(f"{where}.formats: {error}.") from error
        for name in names:
            if not isinstance(name, str) or our_name(name) in formats:
                raise UserError(f"{where}.formats: {name!r:.200} is named twice or no module.")
            formats[our_name(name)] = parsed
    return formats, scheme


def read_model_config(directory: str | Path) -> dict[str, Any]:
    """Return the `config` of the model that a directory holds: its components and settings.

    Raises:
        UserError: if it is no checkpoint.
    """
    directory = Path(directory)
    return build_on_meta(directory, _MAX_LAYERS if hub.lacks_weights(directory) else len(locate(directory))).config


def build_on_meta(directory: Path, num_tensors: int) -> Decoder:
    """Build the model that config.json describes, on the meta device."""
    path = directory / CONFIG
    keys = read_json(directory, CONFIG)
    formats, scheme = read_formats(directory)
    description = keys["plmtune"] if "plmtune" in keys else _from_hf_keys(keys, path)
    where = f"{path}, key plmtune" if "plmtune" in keys else f"{path}, read as model {description['component']}"
    model = _build(description, where, path, num_tensors)
    own = ("plmtune", "quantization_config")
    model.source_keys = {key: value for key, value in keys.items() if key not in own}
    try:
        install(model, formats)
    except ValueError as error:
        raise UserError(f"{path}, key quantization_config: {error}.") from error
    model.quantization = scheme
    return model


def described_model(keys: Mapping[str, Any], path: Path) -> Decoder:
    """The model that the keys of a config.json describe without `plmtune`, on the meta device.

    Raises:
        UserError: if they describe none that loads.
    """
    return _build(_from_hf_keys(keys, path), str(path), path)


def _build(description: Any, where: str, path: Path | None = None, num_tensors: int = _MAX_LAYERS) -> Decoder:
    """Build the model of a `config` on the meta device."""
    path = Path(where) if path is None else path
    part = component_from_config("model", description, where)
    vocab_size = description.get("vocab_size")
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool):
        raise UserError(f"{path}, key vocab_size: must be a whole number, not {vocab_size!r:.80}")
    num_layers, positions = part.settings.get("num_layers", 0), part.settings.get("max_seq_len", 0)
    # A layer is an object even on the meta device, so a number of layers without tensors is refused first.
    if num_layers > num_tensors:
        raise UserError(f"{path} names {num_layers} layers, but the weights hold {num_tensors} tensors.")
    if positions > _MAX_POSITIONS:
        raise UserError(f"{path} names {positions} positions; at most {_MAX_POSITIONS} can be used.")
    try:
        with torch.device("meta"):
            model = part(vocab_size=vocab_size)
    except (ValueError, RuntimeError, OverflowError, TypeError) as error:
        raise UserError(f"{path} describes no possible model: {str(error).splitlines()[0]}.") from error
    if not isinstance(model, Decoder):
        raise UserError(f"{path}: {description['component']} is not a model that this version can load.")
    return model


def _from_hf_keys(keys: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The `config` of a checkpoint of a known family; a key of null counts as missing."""
    known = by_model_type()
    model_type = keys.get("model_type")
    if model_type is None:
        raise UserError(f"{path} has no model_type. Add the model's, one of {', '.join(known)}.")
    if model_type not in known:
        raise UserError(
            f"{path}: model_type is {model_type!r:.80}, which is none of the families that load: {', '.join(known)}."
            f"{_nearest_family(keys, path)}"
        )
    family, read = known[model_type], Keys(keys, path)
    settings = family.read(read)
    description = {"component": family.component, "vocab_size": read.whole("vocab_size")} | settings
    read.refuse_rest()
    return description


def _nearest_family(keys: Mapping[str, Any], path: Path) -> str:
    """The family whose keys are most like those of a config.json, and the keys that it does not know, as a sentence."""
    text = keys.get("text_config")
    if isinstance(text, dict):  # beside a vision tower
        kind = text.get("model_type")
        loads = "loads" if kind in by_model_type() else "does not load either"
        return f" It is not a model of text alone; its text_config is of model_type {kind!r:.80}, which {loads}."
    found = []
    for model_type, family in by_model_type().items():
        read = Keys({**keys, "model_type": model_type}, path)
        try:
            family.read(read)
        except (UserError, TypeError, ValueError, AttributeError):
            continue
        new = sorted(read.unread(keys) - {"vocab_size"})
        if read.num_absent < len(keys) - len(HARMLESS & keys.keys()) - len(new):  # else it is alike in little
            found.append((model_type, new))
    if not found:
        return " Its keys are like those of none of them."
    model_type, new = min(found, key=lambda one: len(one[1]))
    if not new:
        return (
            f" The nearest is {model_type}, which knows all its keys, but transformers computes other things with them."
        )
    parts = {"expert": "experts (MoE)", "vision": "a vision tower", "audio": "an audio tower"}
    lacks = [f" Models with {part} do not load." for word, part in parts.items() if any(word in key for key in new)]
    return f"{''.join(lacks)} The nearest is {model_type}, which lacks the key{'s' * (len(new) > 1)} {', '.join(new)}."
