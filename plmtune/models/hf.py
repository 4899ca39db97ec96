"""Hugging Face's names and files: safetensors and config.json, written so that others can read them.

A directory has `model.safetensors`, or shards and `model.safetensors.index.json`, and `config.json`. The
latter's key `plmtune` describes the model by registered components, so that any combination comes back; a
directory without it is read as the PLM or Llama checkpoint that its other keys tell of.

A quantized matrix is three tensors: NAME.weight (integers), NAME.scales and, where its format has them, NAME.zeros;
config.json's key `quantization_config` says which modules are held in which format.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plmtune import dtypes
from plmtune.errors import NotFinite, UserError
from plmtune.io import hub, safetensors_writer
from plmtune.io.atomic import atomic_write
from plmtune.models.assemble import component_from_config
from plmtune.models.checkpoint_files import CONFIG, INDEX, WEIGHTS, locate, opened_weights, read_json, write_json
from plmtune.modules.decoder import Decoder
from plmtune.modules.gqa import default_kv_heads
from plmtune.modules.quantized import Format, Quantized, install
from plmtune.modules.sharding import full_tensor, is_sharded, shard_like

_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.kv_a_proj": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention": "self_attn",
    "ffn": "mlp",
}
_HF_NAMES = {theirs: ours for ours, theirs in _NAMES.items()}
_SHARD_BYTES = 5e9  # of a file of weights, as Hugging Face's libraries have it
_METHOD, _VERSION = "plmtune", 1  # of quantization_config
SCORE = "score.weight"  # of a reward model, as in transformers' models for sequence classification
# Far above any real model's, far below what would hurt.
_MAX_POSITIONS = 2**24
_MAX_LAYERS = 1000  # where no weights say how many there are


def hf_name(name: str) -> str:
    """`layers.0.ffn.up_proj.weight` -> `model.layers.0.mlp.up_proj.weight`."""
    return _rename(name, "layers.", "model.layers.", _NAMES)


def our_name(name: str) -> str:
    """The inverse of `hf_name`."""
    return _rename(name, "model.layers.", "layers.", _HF_NAMES)


def _rename(name: str, prefix: str, new_prefix: str, names: Mapping[str, str]) -> str:
    head, rest = "", name
    if name.startswith(prefix):
        number, _, rest = name.removeprefix(prefix).partition(".")
        head = f"{new_prefix}{number}."
    parts = rest.split(".")
    for length in range(len(parts), 0, -1):  # the longest part of the name that is known
        known = names.get(".".join(parts[:length]))
        if known is not None:
            return head + ".".join((known, *parts[length:]))
    return head + rest


def hf_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's own tensors, sharded or not, under Hugging Face's names."""
    return {hf_name(name): tensor for name, tensor in model.state_dict().items()}


def to_hf(model: Decoder) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors under Hugging Face's names, config.json) of a model.

    Sharded parameters are gathered, so every process must call it.
    """
    state = {name: full_tensor(tensor) for name, tensor in hf_state(model).items()}
    config = hf_config(model.config, model.dtype, score_head=SCORE in state)
    formats: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            if module.prepacked:
                raise ValueError(
                    "a model that is prepacked for this machine's kernels cannot be saved: load it with prepare=False"
                )
            formats.setdefault(module.format.name, []).append(hf_name(name))
            # A scale is a bf16 number in whatever dtype the model computes.
            state[hf_name(f"{name}.scales")] = state[hf_name(f"{name}.scales")].to(torch.bfloat16)
    if formats:
        # transformers leaves out a quant_method that it does not know and would read the integers as weights; a
        # model_type that it does not know it refuses.
        config |= {"architectures": ["PlmtuneForCausalLM"], "model_type": "plmtune"}
        config["quantization_config"] = {
            "quant_method": _METHOD,
            "version": _VERSION,
            "scheme": dict(model.quantization),
            "formats": formats,
        }
    return state, config


def hf_config(config: Mapping[str, Any], dtype: torch.dtype, *, score_head: bool = False) -> dict[str, Any]:
    """Return config.json for a model's `config`: Hugging Face's keys where it has such a model, and ours.

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


def num_bytes(model: Decoder) -> int:
    """The bytes of the weights' files that `save_model` writes of a model, which may be on the meta device."""
    return sum(safetensors_writer.num_bytes(shard) for shard in _split(to_hf(model)[0], _SHARD_BYTES))


def save_model(
    model_or_state: Decoder | Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    directory: str | Path,
    *,
    max_shard_bytes: float = _SHARD_BYTES,
) -> None:
    """Write weights and config.json into `directory`, each file whole or not at all.

    Args:
        model_or_state: a model, or its tensors under our names or Hugging Face's.
        config: a model's `config` or what `to_hf` returned; None for a model's own.
        max_shard_bytes: larger weights are split, with an index.

    Raises:
        NotFinite: if a number is NaN or infinite.
        ValueError: if a state comes without a config, integers without what they stand for, a model was prepacked for
            this machine's kernels, or max_shard_bytes is not above 0.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be above 0, not {max_shard_bytes}")
    if isinstance(model_or_state, Decoder):
        state, keys = to_hf(model_or_state)
        config = config or keys
    else:
        state = {
            name if name.startswith(("model.", "lm_head.")) else hf_name(name): full_tensor(tensor)
            for name, tensor in model_or_state.items()
        }
    if config is None:
        raise ValueError("tensors without a config cannot be saved: give the model's config")
    if "quantization_config" not in config and any(name.endswith(".scales") for name in state):
        raise ValueError("the tensors of a quantized model need the config that to_hf gives: save the model itself")
    directory = Path(directory)
    if names := safetensors_writer.not_finite(state):
        fp16 = " (fp16 holds no number above 65,504: bf16 does)" if state[names[0]].dtype == torch.float16 else ""
        raise NotFinite(
            f"weights are not finite{fp16}: {safetensors_writer.listed(names)}. Nothing is written to {directory}."
        )
    if "component" in config:
        config = hf_config(config, next(iter(state.values())).dtype, score_head=SCORE in state)
    directory.mkdir(parents=True, exist_ok=True)
    shards = _split(state, max_shard_bytes)
    names = (
        [WEIGHTS]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        with atomic_write(directory / name) as temporary:
            safetensors_writer.write(temporary, {key: tensor.cpu() for key, tensor in shard.items()})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        write_json(directory / INDEX, index)
    write_json(directory / CONFIG, config)
    # Weights of an earlier save in another number of files would contradict these.
    for path in (directory / WEIGHTS, directory / INDEX, *directory.glob("model-*-of-*.safetensors")):
        if path.name not in (*names, INDEX if len(shards) > 1 else WEIGHTS):
            path.unlink(missing_ok=True)


def _split(state: Mapping[str, Tensor], max_bytes: float) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def load_model(directory: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Decoder:
    """Build the model that a directory describes and fill it with the directory's weights.

    Args:
        dtype: None keeps the file's.

    Raises:
        UserError: if config or weights are missing, damaged, or do not fit each other.
    """
    directory = Path(directory)
    locations = locate(directory)
    model = _build(directory, num_tensors=len(locations))
    if SCORE in locations:
        with torch.device("meta"):
            model.add_score_head()
    _check(model, directory, locations)
    if dtype is None:
        # A quantized embedding says nothing of what is computed in.
        theirs = hf_name("norm.weight" if isinstance(model.tok_embeddings, Quantized) else "tok_embeddings.weight")
        with opened_weights(locations[theirs]) as opened:
            dtype = dtypes.from_code(opened.get_slice(theirs).get_dtype())
    model.to(dtype).to_empty(device=device)
    _fill(model, locations)
    return model


def load_state(model: Decoder, directory: str | Path) -> None:
    """Copy a directory's weights into a model, sharded or not, keeping the model's dtype and device.

    A score head of the model keeps its numbers where the directory has none: a reward model begins with a language
    model's weights.

    Raises:
        UserError: if they do not fit the model, or are integers, which no training goes on from.
    """
    directory = Path(directory)
    locations = locate(directory)
    if any(name.endswith(".scales") for name in locations):
        raise UserError(
            f"{directory} holds a quantized model, whose integers cannot be trained. Start from the checkpoint that "
            "was quantized, and quantize what comes of it."
        )
    _check(model, directory, locations)
    _fill(model, locations)


def _fill(model: Decoder, locations: Mapping[str, Path]) -> None:
    parameters = hf_state(model)
    if SCORE not in locations:
        parameters.pop(SCORE, None)
    with torch.no_grad():
        for name, tensor in _tensors(locations, parameters):
            parameter = parameters[name]
            if name.endswith(".scales") and not tensor.isfinite().all():
                raise UserError(f"{locations[name]}: {name} holds numbers that are not finite.")
            if name.endswith(".zeros") and not ((tensor >= 0) & (tensor < 16)).all():
                raise UserError(f"{locations[name]}: {name} must lie from 0 to 15.")
            if is_sharded(parameter):
                tensor = shard_like(tensor, parameter)  # each process reads the file
            parameter.copy_(tensor)


def _tensors(locations: Mapping[str, Path], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor), one at a time, opening each file once."""
    files: dict[Path, list[str]] = {}
    for name in names:
        files.setdefault(locations[name], []).append(name)
    for file, held in files.items():
        with opened_weights(file) as opened:
            for name in held:
                yield name, opened.get_tensor(name)


def read_formats(directory: str | Path) -> tuple[dict[str, Format], dict[str, Any]]:
    """Return how a directory's weights are quantized: (our module name -> format, the scheme that gave it).

    Both are empty for weights that are plain numbers.

    Raises:
        UserError: if config.json does not say it as `save_model` does, or names another way of quantizing.
    """
    path = Path(directory) / CONFIG
    found = read_json(Path(directory), CONFIG).get("quantization_config")
    if found is None:
        return {}, {}
    where = f"{path}, key quantization_config"
    if not isinstance(found, dict):
        raise UserError(f"{where}: must be a table, not {found!r:.80}.")
    if found.get("quant_method") != _METHOD:
        raise UserError(
            f"{where}: a checkpoint quantized by {found.get('quant_method')!r:.80} cannot be read. Get the original "
            "weights and quantize them with plmtune run quantize."
        )
    version, scheme, named = found.get("version"), found.get("scheme", {}), found.get("formats")
    if type(version) is not int or version != _VERSION:
        raise UserError(f"{where}: version is {version!r:.80}, and this plmtune reads {_VERSION}. Get a newer one.")
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
    return _build(directory, _MAX_LAYERS if hub.lacks_weights(directory) else len(locate(directory))).config


def _build(directory: Path, num_tensors: int) -> Decoder:
    """Build on the meta device what config.json describes; nothing is allocated."""
    path = directory / CONFIG
    keys = read_json(directory, CONFIG)
    formats, scheme = read_formats(directory)
    description = keys["plmtune"] if "plmtune" in keys else _from_hf_keys(keys, path)
    part = component_from_config("model", description, f"{path}, key plmtune")
    vocab_size = description.get("vocab_size")
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool):
        raise UserError(f"{path}, key vocab_size: must be a whole number, not {vocab_size!r:.80}")
    num_layers, positions = part.settings.get("num_layers", 0), part.settings.get("max_seq_len", 0)
    # A layer is an object even on the meta device, so a number without tensors behind it is refused first.
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
    """The description of a published PLM or Llama checkpoint; a key of null is one that is not there."""
    keys = {name: value for name, value in keys.items() if value is not None}

    def get(name: str, *default: Any) -> Any:
        if name not in keys and not default:
            raise UserError(f"{path}: key {name} is missing.")
        return keys.get(name, *default)

    model_type = keys.get("model_type")
    if model_type not in ("plm", "llama"):
        raise UserError(f"{path}: model_type is {model_type!r:.80}; only plm and llama can be read.")
    # transformers 5 moved RoPE's keys into a table of their own.
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


def _check(model: Decoder, directory: Path, locations: Mapping[str, Path]) -> None:
    """Compare every name, shape and dtype with the model, reading headers only."""
    state = hf_state(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    missing = [name for name in shapes if name not in locations and name != SCORE]
    if missing:
        raise UserError(f"{directory} misses the tensor {missing[0]}{_more(missing)}. Is the copy complete?")
    # Older files carry RoPE's table; some write a tied head twice.
    if model.tied and "lm_head.weight" in locations:
        _check_tied(directory, locations)
    extra = [
        name
        for name in locations
        if name not in shapes
        and not name.endswith("rotary_emb.inv_freq")
        and not (model.tied and name == "lm_head.weight")
    ]
    if extra:
        more = _more(extra)
        raise UserError(f"{locations[extra[0]]} holds the tensor {extra[0]}{more} that {CONFIG} lacks.")
    for file in sorted(set(locations.values())):
        with opened_weights(file) as opened:
            for name in sorted(name for name in shapes if locations.get(name) == file):
                header = opened.get_slice(name)
                shape = tuple(header.get_shape())
                if shape != shapes[name]:
                    raise UserError(f"{file}: {name} has shape {list(shape)}, the model needs {list(shapes[name])}.")
                stored = "BF16" if name.endswith(".scales") else dtypes.code_of(state[name].dtype)
                quantized = name.endswith(".scales") or not state[name].dtype.is_floating_point
                if quantized and header.get_dtype() != stored:
                    raise UserError(f"{file}: {name} is of type {header.get_dtype()}, its format needs {stored}.")
                if not quantized and header.get_dtype() not in dtypes.FLOAT_CODES:
                    known = ", ".join(dtypes.FLOAT_CODES)
                    raise UserError(f"{file}: {name} is of type {header.get_dtype()}; known are {known}.")


def _check_tied(directory: Path, locations: Mapping[str, Path]) -> None:
    """Refuse a head of another matrix than the embedding where config.json says that they are one."""
    pair = [tensor for _, tensor in _tensors(locations, ("model.embed_tokens.weight", "lm_head.weight"))]
    if pair[0].data_ptr() != pair[1].data_ptr() and not torch.equal(*pair):
        raise UserError(
            f"{directory}: {CONFIG} ties head and embedding (tie_word_embeddings), but lm_head.weight is another "
            "matrix than model.embed_tokens.weight. Set tie_word_embeddings to false there to use the head of the file."
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
