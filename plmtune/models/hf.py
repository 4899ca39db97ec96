"""Weights in Hugging Face's form: safetensors and config.json, written so that others can read them.

A directory has `model.safetensors`, or shards and `model.safetensors.index.json`, and `config.json` (`hf_config`). A
quantized matrix is three tensors: NAME.weight (integers), NAME.scales and, where its format has them, NAME.zeros.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plmtune import dtypes
from plmtune.errors import UserError, WeightsNotFinite
from plmtune.io import safetensors_writer
from plmtune.io.atomic import atomic_write
from plmtune.models.checkpoint_files import CONFIG, INDEX, WEIGHTS, locate, opened_weights, read_json, write_json
from plmtune.models.families import names_of
from plmtune.models.hf_config import METHOD, VERSION, build_on_meta, hf_config
from plmtune.models.hf_names import SCORE, STANDARD, Names, hf_name
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import Quantized, is_quantized
from plmtune.modules.sharding import full_tensor, is_sharded, shard_like

_SHARD_BYTES = 5e9  # of a file of weights, as in Hugging Face's libraries


def run_state(model: Decoder) -> dict[str, Tensor]:
    """A model's own tensors, sharded or not, under the names that `write_config` beside them means."""
    names = names_of(hf_config(model.config, model.dtype, one_to_one=True))
    return {names.hf(name): tensor for name, tensor in model.state_dict().items()}


def hf_state(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Tensors under our names, whole, as tensors of Hugging Face's names and form."""
    found = {}
    for theirs, ours in names.groups(state).items():
        tensor = state[ours[0]] if len(ours) == 1 else torch.cat([state[name] for name in ours])
        found[theirs] = tensor.t().contiguous() if names.is_transposed(theirs) else tensor
    return found


def to_hf(model: Decoder) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors under Hugging Face's names, config.json) of a model.

    Sharded parameters are gathered, so every process must call it.
    """
    state = {name: full_tensor(tensor) for name, tensor in model.state_dict().items()}
    config = hf_config(
        model.config,
        model.dtype,
        score_head=SCORE in state,
        one_to_one=is_quantized(model),
        source=model.source_keys or None,
    )
    state = hf_state(state, STANDARD if is_quantized(model) else names_of(config))
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
            "quant_method": METHOD,
            "version": VERSION,
            "scheme": dict(model.quantization),
            "formats": formats,
        }
    return state, config


def num_bytes(model: Decoder) -> int:
    """The bytes of the weights' files that `save_model` writes of a model, which may be on the meta device."""
    state = to_hf(model)[0]
    files = safetensors_writer.deal({name: tensor.nbytes for name, tensor in state.items()}, "model", _SHARD_BYTES)
    return sum(safetensors_writer.num_bytes({name: state[name] for name in held}) for held in files.values())


def save_model(
    model_or_state: Decoder | Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    directory: str | Path,
    *,
    max_shard_bytes: float = _SHARD_BYTES,
) -> None:
    """Write weights and config.json into `directory`, each file whole or not at all.

    Args:
        model_or_state: a model, or its tensors: under our names with a model's `config`, else under Hugging Face's.
        config: a model's `config` or what `to_hf` returned; None for a model's own.
        max_shard_bytes: larger weights are split, with an index.

    Raises:
        WeightsNotFinite: if a number is NaN or infinite.
        ValueError: if a state comes without a config, integers without what they stand for, a model was prepacked for
            this machine's kernels, or max_shard_bytes is not above 0.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be above 0, not {max_shard_bytes}")
    if isinstance(model_or_state, Decoder):
        state, keys = to_hf(model_or_state)
        config = keys if config is None or "component" in config else config
    else:
        state = {name: full_tensor(tensor) for name, tensor in model_or_state.items()}
        if config is not None and "component" in config:
            config = hf_config(config, next(iter(state.values())).dtype, score_head=SCORE in state)
            state = hf_state(state, names_of(config))
    if config is None:
        raise ValueError("tensors without a config cannot be saved: give the model's config")
    if "quantization_config" not in config and any(name.endswith(".scales") for name in state):
        raise ValueError("the tensors of a quantized model need the config that to_hf gives: save the model itself")
    directory = Path(directory)
    if names := safetensors_writer.not_finite(state):
        fp16 = " (fp16 holds no number above 65,504: bf16 does)" if state[names[0]].dtype == torch.float16 else ""
        raise WeightsNotFinite(
            f"weights are not finite{fp16}: {safetensors_writer.listed(names)}. Nothing is written to {directory}."
        )
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {name: tensor.nbytes for name, tensor in state.items()}
    files = safetensors_writer.deal(sizes, "model", max_shard_bytes)
    for file, held in files.items():
        with atomic_write(directory / file) as temporary:
            safetensors_writer.write(temporary, {name: state[name].cpu() for name in held})
    if len(files) > 1:
        write_json(directory / INDEX, safetensors_writer.index(files, sizes))
    write_json(directory / CONFIG, config)
    # Weights of an earlier save in another number of files would contradict these.
    for path in (directory / WEIGHTS, directory / INDEX, *directory.glob("model-*-of-*.safetensors")):
        if path.name not in files and (path.name != INDEX or len(files) == 1):
            path.unlink(missing_ok=True)


def load_model(directory: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Decoder:
    """Build the model that a directory describes and fill it with the directory's weights.

    Args:
        dtype: None keeps the file's.

    Raises:
        UserError: if config or weights are missing, damaged, or do not fit each other.
    """
    directory = Path(directory)
    locations, names = _locate(directory)
    model = build_on_meta(directory, num_tensors=len(locations))
    if SCORE in locations:
        with torch.device("meta"):
            model.add_score_head()
    _check(model, directory, locations, names)
    if dtype is None:
        # The dtype of a quantized embedding is not that of the computation.
        ours = "norm.weight" if isinstance(model.tok_embeddings, Quantized) else "tok_embeddings.weight"
        theirs = names.hf(ours)
        found = locations[theirs]
        with opened_weights(found.file) as opened:
            dtype = dtypes.from_code(opened.get_slice(found.name).get_dtype())
    model.to(dtype).to_empty(device=device)
    _fill(model, locations, names)
    return model


def load_state(model: Decoder, directory: str | Path, *, added: Collection[str] = ()) -> None:
    """Copy a directory's weights into a model, sharded or not, keeping the model's dtype and device.

    A score head of the model keeps its numbers where the directory has none: a reward model begins with a language
    model's weights.

    Args:
        added: names of the model's tensors that the directory must lack; they keep their numbers.

    Raises:
        UserError: if they do not fit the model, or are quantized, which cannot be trained.
    """
    directory = Path(directory)
    locations, names = _locate(directory)
    if any(name.endswith(".scales") for name in locations):
        raise UserError(
            f"{directory} holds a quantized model, whose integers cannot be trained. Start from the checkpoint that "
            "was quantized, and quantize what comes of it."
        )
    # A pipeline's process has a part of the model, and its whole on the meta device.
    _check(getattr(model, "whole", [model])[0], directory, locations, names, added)
    _fill(model, locations, names, added)


class _Place(NamedTuple):
    """Where a tensor is stored."""

    file: Path
    name: str


def _locate(directory: Path) -> tuple[dict[str, _Place], Names]:
    """Where each tensor is, and what names mean; files of a model without its head lack the names' first part."""
    found = {name: _Place(file, name) for name, file in locate(directory).items()}
    names = names_of(read_json(directory, CONFIG))
    prefix = names.layers.partition(".")[0] + "."
    if any(name.startswith(prefix) for name in found):
        return found, names
    heads = ("lm_head.", SCORE)
    return {name if name.startswith(heads) else prefix + name: place for name, place in found.items()}, names


def _fill(model: Decoder, locations: Mapping[str, _Place], names: Names, added: Collection[str] = ()) -> None:
    parameters = {name: tensor for name, tensor in model.state_dict().items() if name not in added}
    if SCORE not in locations:
        parameters.pop(SCORE, None)
    groups = names.groups(parameters)
    with torch.no_grad():
        for name, tensor in _tensors(locations, groups):
            if name.endswith(".scales") and not tensor.isfinite().all():
                raise UserError(f"{locations[name].file}: {name} holds numbers that are not finite.")
            if name.endswith(".zeros") and not ((tensor >= 0) & (tensor < 16)).all():
                raise UserError(f"{locations[name].file}: {name} must lie from 0 to 15.")
            if names.is_transposed(name):
                tensor = tensor.t()
            held = [parameters[ours] for ours in groups[name]]
            for parameter, part in zip(held, tensor.split([len(parameter) for parameter in held]), strict=True):
                # Of a sharded parameter each process reads the file.
                parameter.copy_(shard_like(part, parameter) if is_sharded(parameter) else part)


def _tensors(locations: Mapping[str, _Place], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor), one at a time, opening each file once."""
    files: dict[Path, list[str]] = {}
    for name in names:
        files.setdefault(locations[name].file, []).append(name)
    for file, held in files.items():
        with opened_weights(file) as opened:
            for name in held:
                yield name, opened.get_tensor(locations[name].name)


def _check(
    model: Decoder, directory: Path, locations: Mapping[str, _Place], names: Names, added: Collection[str] = ()
) -> None:
    """Compare every name, shape and dtype with the model, reading headers only."""
    own = {name: tensor.to("meta") for name, tensor in model.state_dict().items() if name not in added}
    state = hf_state(own, names)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    missing = [name for name in shapes if name not in locations and name != SCORE]
    foreign = [
        name for name in locations if name not in shapes and not name.endswith((*names.buffers, "lm_head.weight"))
    ]
    if missing:
        files = {place.file for place in locations.values()}
        where = files.pop() if len(files) == 1 else directory / INDEX
        said = f"{where} misses the tensor {missing[0]}{_more(missing)} that {CONFIG} describes"
        if foreign:
            held = f"{locations[foreign[0]].name}{_more(foreign)}"
            raise UserError(f"{said}, and holds {held} instead. The two are of different models: take both from one.")
        if missing == ["lm_head.weight"]:
            raise UserError(f"{said}. If the head is the embedding, set tie_word_embeddings to true there.")
        raise UserError(f"{said}. Take both from one model.")
    # Older files carry RoPE's table; some write a tied head twice.
    if model.tied and "lm_head.weight" in locations:
        _check_tied(directory, locations, names)
    extra = [
        name
        for name in locations
        if name not in shapes and not name.endswith(names.buffers) and not (model.tied and name == "lm_head.weight")
    ]
    if extra:
        more = _more(extra)
        raise UserError(f"{locations[extra[0]].file} holds the tensor {extra[0]}{more} that {CONFIG} lacks.")
    for file in sorted({place.file for place in locations.values()}):
        with opened_weights(file) as opened:
            for name in sorted(name for name in shapes if name in locations and locations[name].file == file):
                header = opened.get_slice(locations[name].name)
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


def _check_tied(directory: Path, locations: Mapping[str, _Place], names: Names) -> None:
    """Refuse a head of another matrix than the embedding where config.json says that they are one."""
    embedding = names.hf("tok_embeddings.weight")
    pair = [tensor for _, tensor in _tensors(locations, (embedding, "lm_head.weight"))]
    if pair[0].data_ptr() != pair[1].data_ptr() and not torch.equal(*pair):
        raise UserError(
            f"{directory}: {CONFIG} ties head and embedding (tie_word_embeddings), but lm_head.weight is another "
            f"matrix than {embedding}. Set tie_word_embeddings to false there to use the head of the file."
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
