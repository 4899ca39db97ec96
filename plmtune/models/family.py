"""What a family's file says: how its config.json and the names of its tensors relate to a registered model.

A family's file in this folder registers a model and holds a `Family`; `families` lists the files. Everything in a
config.json that changes the result is read by `Keys`, or refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plmtune.errors import UserError
from plmtune.models.hf_names import STANDARD, Names

if TYPE_CHECKING:  # `plmtune ls model` imports this file, and no torch
    from plmtune.models.assemble import LayerType

# Keys of every config.json that do not change what a model computes: of the tokenizer and of generation, of training
# alone, and of the library that wrote the file.
HARMLESS = frozenset({
    "_name_or_path", "_attn_implementation_autoset", "architectures", "attention_dropout", "attn_pdrop",
    "bos_token_id", "chunk_size_feed_forward", "classifier_dropout", "dtype", "embd_pdrop", "embedding_dropout",
    "eos_token_id", "hidden_dropout", "id2label", "is_encoder_decoder", "label2id", "model_type", "output_attentions",
    "output_hidden_states", "pad_token_id", "plmtune", "pretraining_tp", "problem_type", "quantization_config",
    "resid_pdrop", "residual_dropout", "return_dict", "torch_dtype", "transformers_version", "unk_token_id",
    "use_cache",
})  # fmt: skip
# What plmtune does not compute, in any family. A key of another name that transformers' class of the family does not
# have changes nothing there either.
_NOT_COMPUTED = (
    "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "vision_config", "audio_config",
    "encoder", "altup_num_inputs", "hidden_size_per_layer_input", "cross_attention_layers", "ssm_cfg",
    "mup_width_scale", "use_mrope", "vision_tower", "mm_vision_tower",
)  # fmt: skip


class Keys:
    """The keys of a config.json, null counting as missing, and which of them were read.

    Args:
        keys: the JSON object.
        path: for messages.
    """

    def __init__(self, keys: Mapping[str, Any], path: Path | str) -> None:
        self.path = path
        self.model_type = str(keys.get("model_type"))
        self._keys = {name: value for name, value in keys.items() if value is not None}
        self._nulls = {name for name, value in keys.items() if value is None}
        self._read = set(HARMLESS)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key, or the default of transformers."""
        self._read.add(name)
        return self._keys.get(name, default)

    def is_null(self, name: str) -> bool:
        """Whether a key is there and null, where that says something else than a missing one."""
        return name in self._nulls

    def need(self, name: str) -> Any:
        """The value of a key without a default.

        Raises:
            UserError: if it is missing.
        """
        if name not in self._keys:
            raise UserError(f"{self.path}: key {name} is missing.")
        return self.get(name)

    def whole(self, name: str, default: int | None = None) -> int:
        """As `get` or, without a default, `need`: a whole number above 0."""
        value = self.need(name) if default is None else self.get(name, default)
        if type(value) is not int or value < 1:
            raise UserError(f"{self.path}: key {name} must be a whole number above 0, not {value!r:.80}.")
        return value

    def demand(self, name: str, *allowed: Any) -> None:
        """Refuse a value other than those allowed, of which the first is transformers' default."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise UserError(f"{self.path}: {name} is {value!r:.80}; only {allowed[0]!r} is supported.")

    def error(self, name: str, problem: str) -> UserError:
        """An error about a key."""
        return UserError(f"{self.path}: key {name}: {problem}.")

    def ignore(self, *names: str) -> None:
        """Keys that change nothing, given the others."""
        self._read.update(names)

    def unread(self, names: Iterable[str]) -> set[str]:
        """Those of the names that no call has asked for."""
        return set(names) - self._read

    @property
    def num_absent(self) -> int:
        """How many keys were asked for that the file lacks."""
        return len(self._read - HARMLESS - self._keys.keys() - self._nulls)

    def refuse_rest(self) -> None:
        """Refuse what no family computes.

        Raises:
            UserError: naming the key.
        """
        for name in _NOT_COMPUTED:
            if name not in self._read and self._keys.get(name):
                raise UserError(
                    f"{self.path}: {name} is {self._keys[name]!r:.80}: plmtune computes no such model. It loads dense "
                    "text models (plmtune ls model)."
                )


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        component: the registered model.
        architectures: the class of transformers for each `model_type`; the first is written.
        read: keys of config.json -> settings of the component, without vocab_size.
        write: a model's `config` -> keys of config.json; KeyError or ValueError where it has no such model.
        names: of its tensors.
        in_transformers: whether transformers has the class itself; else the authors' code has it.
    """

    component: str
    architectures: Mapping[str, str]
    read: Callable[[Keys], dict[str, Any]]
    write: Callable[[Mapping[str, Any]], dict[str, Any]]
    names: Names = field(default=STANDARD)
    in_transformers: bool = True


def decoder_settings(
    keys: Keys,
    *,
    ffn: str = "swiglu",
    tie: bool = False,
    eps: float = 1e-6,
    theta: float = 10000.0,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    positions: int | None = None,
    rope_table: Any = None,
    share: float = 1,
) -> dict[str, Any]:
    """Settings of a model with grouped-query attention and RMSNorm, from the keys that most families share.

    Args:
        ffn: component of the feed-forward layer.
        tie, eps, theta, head_dim, kv_heads, positions: transformers' defaults of the family.
        rope_table: as `read_rope`'s table.
        share: as `read_rope`'s.
    """
    if ffn == "swiglu":
        keys.demand("hidden_act", "silu", "swish")
    heads = keys.whole("num_attention_heads")
    if keys.is_null("num_key_value_heads"):  # as many as query heads, whatever the class's default
        kv_heads = heads
    rope = read_rope(keys, theta, positions=positions, table=rope_table, share=share)
    longest = rope.pop("max_seq_len")
    return {
        "attention": {
            "component": "gqa",
            "num_kv_heads": keys.get("num_key_value_heads", kv_heads or heads),
            "head_dim": keys.get("head_dim", head_dim),
            "rope_interleaved": False,
        }
        | rope,
        "ffn": {"component": ffn, "hidden_dim": keys.whole("intermediate_size")},
        "norm": {"component": "rms_norm", "eps": keys.get("rms_norm_eps", eps)},
        "num_heads": heads,
    } | sizes(keys, longest, tie=tie)


def sizes(keys: Keys, max_seq_len: int, *, tie: bool) -> dict[str, Any]:
    """The settings of a decoder besides its parts."""
    return {
        "embed_dim": keys.whole("hidden_size"),
        "num_layers": keys.whole("num_hidden_layers"),
        "max_seq_len": max_seq_len,
        "tie_embeddings": keys.get("tie_word_embeddings", tie),
        "init_std": keys.get("initializer_range", 0.02),
    }


def decoder_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that most families share, of a model with grouped-query attention; the inverse of `decoder_settings`."""
    attention, heads = config["attention"], config["num_heads"]
    kv_heads = heads if attention["component"] == "mha" else attention["num_kv_heads"]
    if kv_heads is None:
        from plmtune.modules.gqa import default_kv_heads

        kv_heads = default_kv_heads(heads)
    return (
        size_keys(config)
        | {
            "num_key_value_heads": kv_heads,
            "head_dim": attention["head_dim"] or config["embed_dim"] // heads,
            "hidden_act": "silu",
            "intermediate_size": config["ffn"]["hidden_dim"],
            "rms_norm_eps": config["norm"]["eps"],
            "attention_dropout": 0.0,
        }
        | write_rope(attention, config)
    )


def size_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `sizes`."""
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["embed_dim"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_heads"],
        "max_position_embeddings": config["max_seq_len"],
        "tie_word_embeddings": config["tie_embeddings"],
        "initializer_range": config["init_std"],
        "use_cache": True,
    }


# Keys of a RoPE table, theirs -> ours, of each type.
_ROPE = {
    kind: {name: {"original_max_position_embeddings": "original_max_seq_len"}.get(name, name) for name in names.split()}
    for kind, names in {
        "default": "",
        "linear": "factor",
        "dynamic": "factor",
        "llama3": "factor low_freq_factor high_freq_factor original_max_position_embeddings",
        "yarn": "factor original_max_position_embeddings beta_fast beta_slow attention_factor mscale mscale_all_dim "
        "truncate",
        "longrope": "factor short_factor long_factor original_max_position_embeddings attention_factor",
    }.items()
}
_ROPE_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "max_position_embeddings", "finetuned")


def read_rope(
    keys: Keys, theta: float, *, positions: int | None = None, table: Any = None, share: float = 1
) -> dict[str, Any]:
    """The attention's settings of RoPE, and max_seq_len, from any spelling: of transformers 4 and 5.

    Args:
        theta: transformers' default base.
        positions: transformers' default of max_position_embeddings.
        table: of this kind of layer, where kinds have tables of their own.
        share: transformers' default of partial_rotary_factor.
    """
    longest = keys.whole("max_position_embeddings", positions)
    original = keys.get("original_max_position_embeddings")
    for name in ("rope_parameters", "rope_scaling"):
        table = table or keys.get(name)
    held = {} if table is None else table
    where = f"{keys.path}: RoPE scaling"
    if not isinstance(held, dict):
        raise UserError(f"{where} must be a table, not {held!r:.80}.")
    held = {name: value for name, value in held.items() if value is not None}
    kind = held.get("rope_type", held.get("type", "default"))
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in _ROPE:
        raise UserError(f"{where} of type {kind!r:.80} is not supported. Known are {', '.join(_ROPE)}.")
    # A key of another type is left over from an edit; transformers does not read it.
    known = {*_ROPE_COMMON, *(name for names in _ROPE.values() for name in names)}
    if unknown := [name for name in held if name not in known]:
        raise UserError(f"{where} of type {kind}: key {unknown[0]} is not supported.")
    base = held.get("rope_theta", keys.get("rope_theta", theta))
    scaling: dict[str, Any] = {ours: held[name] for name, ours in _ROPE[kind].items() if name in held}
    if "original_max_position_embeddings" in _ROPE[kind]:
        scaling.setdefault("original_max_seq_len", original or longest)
    if kind in ("yarn", "longrope"):
        scaling.setdefault("factor", longest / scaling["original_max_seq_len"])
    if kind in ("linear", "dynamic") and scaling.get("factor", 1) == 1:
        kind, scaling = "default", {}
    if kind == "dynamic":
        scaling["original_max_seq_len"] = longest
        longest = int(longest * scaling["factor"])
    if kind == "yarn":
        longest = max(longest, int(scaling["original_max_seq_len"] * scaling["factor"]))
    share = held.get("partial_rotary_factor", keys.get("partial_rotary_factor", share))
    found = {
        "rope_theta": base,
        "rope_scaling": {"component": "none" if kind == "default" else kind} | scaling,
        "max_seq_len": longest,
    }
    if share != 1:
        width = keys.get("head_dim") or keys.need("hidden_size") // keys.need("num_attention_heads")
        found["rope_dim"] = int(width * share)
    return found


def write_rope(attention: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta, rope_scaling and max_position_embeddings as transformers 4 spells them, which 5 reads, too.

    Args:
        attention: settings of one kind of layer.
        config: the model's.
    """
    held = dict(attention.get("rope_scaling", {"component": "none"}))
    kind = held.pop("component")
    keys: dict[str, Any] = {"rope_theta": attention["rope_theta"], "rope_scaling": None}
    if kind != "none":
        table = {name: held[ours] for name, ours in _ROPE[kind].items() if held.get(ours) is not None}
        if kind == "dynamic":
            keys["max_position_embeddings"] = held["original_max_seq_len"]
        keys["rope_scaling"] = {"rope_type": kind} | table
    width = attention.get("head_dim") or config["embed_dim"] // config["num_heads"]
    if attention.get("rope_dim") not in (None, width):
        keys["partial_rotary_factor"] = attention["rope_dim"] / width
    return keys


def full_attention(keys: Keys) -> None:
    """Refuse sliding windows, in any of their keys."""
    if keys.get("use_sliding_window") or any(kind != "full_attention" for kind in keys.get("layer_types", ())):
        raise UserError(f"{keys.path}: sliding windows are not supported for model_type {keys.model_type}.")
    keys.ignore("sliding_window", "max_window_layers")


_TYPES: dict[str, LayerType] = {"sliding_attention": "local", "full_attention": "global"}


def read_layer_types(keys: Keys, default: list[str]) -> list[LayerType]:
    """The types of layers from the key layer_types.

    Args:
        default: transformers' own, in its words.
    """
    found = keys.get("layer_types", default)
    if unknown := [kind for kind in found if kind not in _TYPES]:
        raise keys.error("layer_types", f"{unknown[0]!r:.80} is not supported. Known are {', '.join(_TYPES)}")
    return [_TYPES[kind] for kind in found]


def write_layer_types(config: Mapping[str, Any]) -> list[str]:
    """The inverse of `read_layer_types`, for all layers."""
    theirs = {ours: kind for kind, ours in _TYPES.items()}
    return [theirs[kind] for kind in each_layer_type(config)]


def each_layer_type(config: Mapping[str, Any]) -> list[LayerType]:
    """The type of each layer: the pattern, repeated."""
    pattern = config["layers"]
    return [pattern[index % len(pattern)] for index in range(config["num_layers"])]
