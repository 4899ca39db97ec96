"""config.json in Hugging Face's form, written and read.

Its key `plmtune` describes the model by registered components, so that any combination can be loaded; a directory
without that key is read as the PLM or Llama checkpoint that its other keys describe. Its key `quantization_config` says
which modules are stored in which format.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from plmtune.errors import UserError
from plmtune.io import hub
from plmtune.models.assemble import component_from_config
from plmtune.models.checkpoint_files import CONFIG, locate, read_json, write_json
from plmtune.models.hf_names import our_name
from plmtune.modules.decoder import Decoder
from plmtune.modules.gqa import default_kv_heads
from plmtune.modules.quantized import Format, install

METHOD, VERSION = "plmtune", 1  # of quantization_config
# Far above any real model's, far below what would hurt.
_MAX_POSITIONS = 2**24
_MAX_LAYERS = 1000  # without weights to compare with


def hf_config(config: Mapping[str, Any], dtype: torch.dtype, *, score_head: bool = False) -> dict[str, Any]:
    """Return config.json for a model's `config`: Hugging Face's keys, where it has such a model, and ours.

    Args:
        score_head: the model is one for sequence classification, with one class.
    """
    attention, ffn, norm = config["attention"], config["ffn"], config["norm"]
    parts = (attention["component"], ffn["component"], norm["component"])
    heads = config["num_heads"]
    keys: dict[str, Any] = {
        "architectures": ["PlmtuneForCausalLM"],
        "model_type": "plmtune",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["embed_dim"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": heads,
        "max_position_embeddings": config["max_seq_len"],
        "tie_word_embeddings": config["tie_embeddings"],
        "initializer_range": config["init_std"],
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }
    common = {
        "intermediate_size": ffn.get("hidden_dim"),
        "rms_norm_eps": norm.get("eps"),
        "rope_theta": attention.get("rope_theta"),
        "rope_scaling": None,
        "attention_dropout": 0.0,
    }
    if parts == ("mla", "squared_relu", "rms_norm"):
        keys |= common | {
            "architectures": ["PLMForCausalLM"],
            "model_type": "plm",
            "num_key_value_heads": heads,
            "hidden_act": "relu2",
            "q_lora_rank": None,
            "kv_lora_rank": attention["kv_lora_rank"],
            "qk_nope_head_dim": attention["qk_nope_head_dim"],
            "qk_rope_head_dim": attention["qk_rope_head_dim"],
            "v_head_dim": attention["v_head_dim"],
            "attention_bias": False,
        }
    elif parts[0] in ("gqa", "mha") and parts[1:] == ("swiglu", "rms_norm") and not attention["rope_interleaved"]:
        keys |= common | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_key_value_heads": heads if parts[0] == "mha" else attention["num_kv_heads"] or default_kv_heads(heads),
            "head_dim": attention["head_dim"] or config["embed_dim"] // heads,
            "hidden_act": "silu",
            "attention_bias": attention["bias"],
            "mlp_bias": False,
        }
    if score_head:
        names = [name.replace("ForCausalLM", "ForSequenceClassification") for name in keys["architectures"]]
        keys |= {"architectures": names, "id2label": {"0": "score"}, "label2id": {"score": 0}}
    return keys | {"plmtune": dict(config)}


def write_config(config: Mapping[str, Any], dtype: torch.dtype, directory: Path, *, score_head: bool = False) -> None:
    """Write the config.json of a model's `config` beside weights of `dtype` that others write."""
    write_json(directory / CONFIG, hf_config(config, dtype, score_head=score_head))


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
    part = component_from_config("model", description, f"{path}, key plmtune")
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
    try:
        install(model, formats)
    except ValueError as error:
        raise UserError(f"{path}, key quantization_config: {error}.") from error
    model.quantization = scheme
    return model


def _from_hf_keys(keys: dict[str, Any], path: Path) -> dict[str, Any]:
    """The `config` of a published PLM or Llama checkpoint; a key of null counts as missing."""
    keys = {name: value for name, value in keys.items() if value is not None}

    def get(name: str, *default: Any) -> Any:
        if name not in keys and not default:
            raise UserError(f"{path}: key {name} is missing.")
        return keys.get(name, *default)

    model_type = keys.get("model_type")
    if model_type not in ("plm", "llama"):
        raise UserError(f"{path}: model_type is {model_type!r:.80}; only plm and llama can be read.")
    # transformers 5 has RoPE's keys in a table of their own.
    rope = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{path}: RoPE scaling ({rope!r:.80}) is not supported.")
    theta = rope.get("rope_theta") or keys.get("rope_theta", 100000.0 if model_type == "plm" else 10000.0)
    heads = get("num_attention_heads")
    attention: dict[str, Any]
    if model_type == "plm":
        _demand(keys, path, q_lora_rank=(None,), hidden_act=("relu2",), attention_bias=(False,))
        attention = {"component": "mla", "rope_theta": theta} | {
            name: get(name) for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        }
    else:
        _demand(keys, path, hidden_act=("silu",), mlp_bias=(False,))
        attention = {
            "component": "gqa",
            "num_kv_heads": get("num_key_value_heads", heads),
            "head_dim": get("head_dim", None),
            "rope_theta": theta,
            "rope_interleaved": False,
            "bias": get("attention_bias", False),
        }
    return {
        "component": model_type,
        "vocab_size": get("vocab_size"),
        "attention": attention,
        "ffn": {
            "component": "squared_relu" if model_type == "plm" else "swiglu",
            "hidden_dim": get("intermediate_size"),
        },
        "norm": {"component": "rms_norm", "eps": get("rms_norm_eps", 1e-6)},
        "embed_dim": get("hidden_size"),
        "num_layers": get("num_hidden_layers"),
        "num_heads": heads,
        "max_seq_len": get("max_position_embeddings"),
        "tie_embeddings": get("tie_word_embeddings", model_type == "plm"),
        "init_std": get("initializer_range", 0.02),
    }


def _demand(keys: dict[str, Any], path: Path, **allowed: tuple[Any, ...]) -> None:
    for name, values in allowed.items():
        if name in keys and keys[name] not in values:
            raise UserError(f"{path}: {name} is {keys[name]!r:.80}; only {values[0]!r} is supported.")
