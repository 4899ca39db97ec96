"""A model in Hugging Face's form, for programs that know nothing of plmtune.

Two forms:

* its family's: names, keys and fused matrices of the authors' checkpoints. A model that was read from such a checkpoint
  keeps its keys. transformers has a class of each family but plm and minicpm, which the authors' code loads, and
  llama.cpp's converter;
* `deepseek`: a PLM as a dense DeepseekV3ForCausalLM, which transformers, vLLM and SGLang load with no custom code, the
  latter two with a cache of latents. vLLM and SGLang refuse any gate but silu ("Only silu is supported for now",
  DeepseekV2MLP of both), so with k = 4096, gate = k * up and up' = up / k,

    silu(k h) * h / k = h^2 * sigmoid(k h) = relu(h)^2, off by less than 0.5 / k^2 = 3e-8 a hidden unit,

and multiplying by a power of two is exact in fp32 and bf16 (fp16 has not the range: it is refused).

Keys of config.json and who reads them: `first_k_dense_replace` = layers (all three: no layer has experts),
`n_routed_experts` and the rest of the experts' keys (whole numbers, or vLLM's loader and SGLang's constructor fail),
`moe_layer_freq` (SGLang), `topk_method` and `scoring_func` (SGLang, older transformers), `rope_interleave`
(transformers; the others always turn neighbours), `rope_parameters` (transformers 5, new vLLM), `rope_theta` and
`rope_scaling` (older ones, SGLang), `num_nextn_predict_layers` 0 (all: no further layers for speculation).
`tie_word_embeddings` is false and the embedding is written twice, because neither vLLM nor SGLang ties the head of a
DeepSeek. vLLM's and SGLang's code was read, transformers' was run.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from plmtune.errors import UserError
from plmtune.io import safetensors_writer
from plmtune.io.atomic import atomic_write, check_room
from plmtune.models.adapter_names import OWN_TYPE, fused
from plmtune.models.adapters import ADAPTERS, find_base, holds_adapters, read_model_config
from plmtune.models.assemble import meta_model
from plmtune.models.checkpoint_files import ADAPTER_CONFIG, CONFIG, Stored, locate, read_json, write_json
from plmtune.models.directory import new_directory
from plmtune.models.families import names_of
from plmtune.models.hf import hf_state, save_model
from plmtune.models.hf_config import hf_config
from plmtune.models.hf_names import SCORE, STANDARD
from plmtune.modules.decoder import Decoder
from plmtune.modules.peft import effective_weight
from plmtune.modules.quantized import Quantized, is_quantized
from plmtune.tokenizers.chat_template import find_template
from plmtune.tokenizers.jieba_sentencepiece import JiebaPieces
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import TOKENIZER_FILES
from plmtune.units import show_bytes

GENERATION = "generation_config.json"
GATE = 4096.0  # a power of two: silu(GATE * h) / GATE is relu(h) but for 3e-8
_LATENT_EPS = 1e-6
_EXPERTS_IN_PEFT = ("deepseek_v2", "deepseek_v3")  # dense layers or not: convert_peft_config_for_transformers


def export_hf(
    model: Decoder,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    as_: Literal["deepseek"] | None = None,
    dtype: torch.dtype | None = None,
    generation: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write a model and its tokenizer as a directory that other programs load; return notes for the user.

    Args:
        model: of parts that `lint` lets pass; a quantized one is written out in floating-point numbers.
        tokenizer: its files, chat template and end tokens are written, too.
        directory: a new one.
        as_: None: under its own names; else see above.
        dtype: of all numbers; None: the model's.
        generation: the checkpoint's generation_config.json, whose sampling is kept; token ids are the tokenizer's.

    Raises:
        UserError: if the form has no such parts or numbers, something is there already, or the disk has no room.
    """
    dtype = dtype or model.dtype
    # A PLM's own keys are what a DeepSeek's are made of.
    source = model.source_keys if as_ is None else {}
    keys = hf_config(model.config, dtype, score_head=hasattr(model, "score"), source=source or None)
    keys.pop("plmtune", None)  # it would describe other tensors than a DeepSeek's, and the others need it not
    notes = []
    if as_ is not None:
        keys = _deepseek_keys(model, keys, dtype)
    assert keys["model_type"] != "plmtune", "lint refuses what has no name"
    ends = end_ids(tokenizer)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    ids["pad_token_id"] = tokenizer.eos_id
    if is_quantized(model):
        notes.append("The integers are written out as floating-point numbers: the model is the same, its size is not.")
    state = hf_state(_float_state(model, dtype), STANDARD if as_ is not None else names_of(keys))
    if as_ is not None:
        before = sum(tensor.nbytes for tensor in state.values())
        state = _deepseek_state(state)
        extra = sum(tensor.nbytes for tensor in state.values()) - before
        notes.append(
            f"{show_bytes(extra)} of {show_bytes(before + extra)} are copies that the form wants: each layer's up "
            "projection as its gate" + (", and the embedding as the head." if model.tied else ".")
        )
        if keys["rms_norm_eps"] != _LATENT_EPS:
            notes.append(
                f"The model's norms have eps {keys['rms_norm_eps']}; transformers norms a DeepSeek's latent with "
                f"{_LATENT_EPS} whatever config.json says, so its numbers differ. vLLM and SGLang use the model's."
            )
    if isinstance(tokenizer.vocabulary, JiebaPieces):
        notes.append(
            "tokenizer.json holds PanGu-alpha's tokenizer in plmtune's form, which transformers refuses, since it "
            "has no jieba. The ids are those of the SentencePiece model that it was made of, with jieba before it."
        )
    check_room(directory, sum(tensor.nbytes for tensor in state.values()))
    with new_directory(directory) as temporary:
        # transformers' class of Youtu zeroes the row of a pad token after loading it, and ours is one that ends texts.
        no_pad = {"pad_token_id": None} if keys["model_type"] == "youtu" else {}
        save_model(state, keys | ids | no_pad, temporary)
        tokenizer.save(temporary)
        write_json(temporary / GENERATION, {**(generation or {}), **ids})
    return notes


def export_adapter(source: Path, directory: Path, *, base: Path | None = None) -> list[str]:
    """Write adapters, and their tokenizer where there is one, as the `peft` package reads them; return notes.

    Args:
        source: what training saved.
        directory: a new one, or one of adapters, which are replaced.
        base: directory of the weights that they stand beside; None: what they name.

    Raises:
        UserError: if `directory` holds something else, or the disk has no room.
    """
    config, given = read_json(source, ADAPTER_CONFIG), base
    if directory.resolve() == source.resolve():
        raise UserError(f"{directory} is where the adapters are. Name another place.")
    others = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    if others and not holds_adapters(directory):
        raise UserError(f"{directory} is there already, and holds something else than adapters. Name another place.")
    names = {path.name for path in locate(source, ADAPTERS).values()}
    if len(names) != 1:
        raise UserError(f"{source} holds its adapters in {len(names)} files; one is expected.")
    check_room(directory, sum((source / name).stat().st_size for name in names))
    directory.mkdir(parents=True, exist_ok=True)
    files = [*TOKENIZER_FILES]
    named = config["base_model_name_or_path"]
    notes = [f"They stand beside {named}, which is not in the export."]
    base = base or Path(named)
    model_type = read_json(base, CONFIG).get("model_type") if (base / CONFIG).is_file() else None
    if model_type in _EXPERTS_IN_PEFT and any(".mlp." in name for name in locate(source, ADAPTERS)):
        notes.append(
            f"PEFT takes the FFN of every {model_type} for experts and does not load its adapters. Merge them, or "
            "train adapters of attention alone."
        )
    if config.get("peft_type") == OWN_TYPE:
        model = meta_model(read_model_config(find_base(source, given)), f"{source}, its base")
        state, made = fused(Stored(locate(source, ADAPTERS)), config, model, source)
        with atomic_write(directory / f"{ADAPTERS}.safetensors") as temporary:
            safetensors_writer.write(temporary, state)
        write_json(directory / ADAPTER_CONFIG, made)
        names = set()
        notes.append(
            f"The base holds several matrices in one, for which PEFT has one adapter: of rank {made['r']} instead of "
            f"{config['r']}, with the same product."
        )
    else:
        files.append(ADAPTER_CONFIG)
    for name in sorted(names | {name for name in files if (source / name).is_file()}):
        with atomic_write(directory / name) as temporary:
            shutil.copyfile(source / name, temporary)
    return notes


def read_generation(source: Path) -> dict[str, Any]:
    """The keys of a checkpoint's generation_config.json."""
    return dict(read_json(source, GENERATION)) if (source / GENERATION).is_file() else {}


def end_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids at which a text ends: the tokenizer's own, and what the chat template ends an answer with."""
    return list(dict.fromkeys((*tokenizer.end_ids, answer_end(tokenizer))))


def answer_end(tokenizer: Tokenizer) -> int:
    """The id that the chat template ends an answer with, or the tokenizer's eos."""
    if tokenizer.chat_template is None:
        return tokenizer.eos_id
    try:
        return find_template(None, tokenizer).end_id
    except UserError:  # one that cannot be trained with may still be rendered by others
        return tokenizer.eos_id


def _parts(model: Decoder) -> str:
    config = model.config
    return ", ".join(config[part]["component"] for part in ("attention", "ffn", "norm"))


def _float_state(model: Decoder, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors, quantized ones written out."""
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}
    state = {f"{name}.weight": effective_weight(module) for name, module in quantized.items()}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner not in quantized or leaf == "bias":
            state[name] = tensor
    return {name: state.pop(name).detach().to("cpu", dtype) for name in list(state)}


def _deepseek_keys(model: Decoder, keys: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the dense DeepSeek-V3 that a PLM is."""
    if keys["model_type"] != "plm" or SCORE in model.state_dict():
        head = " with a score head" if hasattr(model, "score") else ""
        raise UserError(
            f"A DeepSeek-V3 has no model of these parts{head}: {_parts(model)}. Only mla with squared_relu and "
            "rms_norm is one; leave out --as for a GQA model, which is a Llama."
        )
    if dtype == torch.float16:
        raise UserError("float16 has too small a range for the form deepseek. Export in bfloat16 or float32.")
    theta, layers = keys["rope_theta"], keys["num_hidden_layers"]
    return keys | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_interleave": True,
        "rope_parameters": {"rope_type": "default"} | (keys["rope_scaling"] or {}) | {"rope_theta": theta},
        # No layer has experts; their keys are the least that all readers take.
        "first_k_dense_replace": layers,
        "moe_layer_freq": 1,
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": keys["intermediate_size"],
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
    }


def _deepseek_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    written: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(".mlp.up_proj.weight"):
            written[name.replace("up_proj", "gate_proj")] = tensor * GATE
            tensor = tensor / GATE
        written[name] = tensor
    written.setdefault("lm_head.weight", state["model.embed_tokens.weight"].clone())
    return written
