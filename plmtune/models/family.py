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

    def optional(self, name: str, default: Any) -> Any:
        """As `get`, of a key for which null says something else than missing: None."""
        return self.get(name, None if name in self._nulls else default)

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
    **rope_how: Any,
) -> dict[str, Any]:
    """Settings of a model with grouped-query attention and RMSNorm, from the keys that most families share.

    Args:
        ffn: component of the feed-forward layer.
        tie, eps, theta, head_dim, kv_heads, positions: transformers' defaults of the family.
        rope_table: as `read_rope`'s table.
        rope_how: further arguments of `read_rope`.
    """
    if ffn == "swiglu":
        keys.demand("hidden_act", "silu", "swish")
    heads = keys.whole("num_attention_heads")
    if keys.optional("num_key_value_heads", kv_heads) is None:  # as many as query heads, whatever the class's default
        kv_heads = heads
    rope = read_rope(keys, theta, positions=positions, table=rope_table, **rope_how)
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


def need_whole_heads(config: Mapping[str, Any]) -> None:
    """Refuse a width that is no multiple of the heads, for a family whose class in transformers refuses it.

    Raises:
        ValueError: naming both.
    """
    if config["embed_dim"] % config["num_heads"]:
        raise ValueError(f"embed_dim ({config['embed_dim']}) is no multiple of num_heads ({config['num_heads']})")


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
    keys: Keys,
    theta: float,
    *,
    positions: int | None = None,
    table: Any = None,
    kinds: tuple[str, ...] = tuple(_ROPE),
    share: float | None = None,
    original: int | None = None,
) -> dict[str, Any]:
    """The attention's settings of RoPE, and max_seq_len, from any spelling: of transformers 4 and 5.

    Args:
        theta: transformers' default base.
        positions: transformers' default of max_position_embeddings.
        table: of this kind of layer, where kinds have tables of their own.
        kinds: the types of scaling that the class computes.
        share: its default of partial_rotary_factor, where it turns a part of each head.
        original: its default of original_max_position_embeddings, a key of the class.
    """
    longest = keys.whole("max_position_embeddings", positions)
    # Beside the table it counts more than in it.
    original = keys.get("original_max_position_embeddings", original)
    held = _rope_table(keys, table)
    where = f"{keys.path}: RoPE scaling"
    kind = held.get("rope_type", held.get("type", "default"))
    if kind == "su" or (kind == "yarn" and "yarn" not in kinds):  # old names in files of Phi-3
        kind = "longrope"
    if kind in ("linear", "dynamic") and held.get("factor") == 1:
        kind = "default"
    if kind not in kinds:
        raise UserError(f"{where} of type {kind!r:.80} is not supported. Known are {', '.join(kinds)}.")
    # A key of another type is left over from an edit; transformers does not read it.
    known = {*_ROPE_COMMON, *(name for names in _ROPE.values() for name in names)}
    if unknown := [name for name in held if name not in known]:
        raise UserError(f"{where} of type {kind}: key {unknown[0]} is not supported.")
    base = held.get("rope_theta", keys.get("rope_theta", theta))
    scaling: dict[str, Any] = {ours: held[name] for name, ours in _ROPE[kind].items() if name in held}
    if "original_max_position_embeddings" in _ROPE[kind]:
        scaling["original_max_seq_len"] = original or scaling.get("original_max_seq_len", longest)
    if kind in ("yarn", "longrope"):
        scaling.setdefault("factor", longest / scaling["original_max_seq_len"])
    if "factor" in _ROPE[kind] and "factor" not in scaling:
        raise UserError(f"{where} of type {kind} lacks the key factor.")
    if kind == "dynamic":
        scaling["original_max_seq_len"] = longest
        longest = int(longest * scaling["factor"])
    if kind == "yarn":
        longest = max(longest, int(scaling["original_max_seq_len"] * scaling["factor"]))
    found = {
        "rope_theta": base,
        "rope_scaling": {"component": "none" if kind == "default" else kind} | scaling,
        "max_seq_len": longest,
    }
    turned = held.get("partial_rotary_factor", keys.get("partial_rotary_factor", share or 1))
    if turned != 1:
        if share is None:
            raise keys.error("partial_rotary_factor", f"is {turned!r:.80}, and model_type {keys.model_type} turns all")
        width = keys.get("head_dim") or keys.need("hidden_size") // keys.need("num_attention_heads")
        found["rope_dim"] = int(width * turned)
    return found


def _rope_table(keys: Keys, table: Any) -> dict[str, Any]:
    """The table that describes RoPE, without nulls: the one given, rope_scaling or rope_parameters."""
    names = ("rope_scaling", "rope_parameters")
    tables = []
    for held in [keys.get(name) for name in names] if table is None else [table]:
        if not held:
            continue
        if not isinstance(held, dict):
            raise UserError(f"{keys.path}: RoPE scaling must be a table, not {held!r:.80}.")
        tables.append({key: value for key, value in held.items() if value is not None})
    if len(tables) == 2 and _described(tables[0], keys) != _described(tables[1], keys):
        raise keys.error("rope_scaling", "differs from rope_parameters: remove one of them, or make them equal")
    return tables[-1] if tables else {}


def _described(table: Mapping[str, Any], keys: Keys) -> dict[str, Any]:
    """A table of RoPE with what stands beside it in old files."""
    held = {"rope_type": table.get("type", "default")} | {key: value for key, value in table.items() if key != "type"}
    beside = {name: keys.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    return {name: value for name, value in beside.items() if value is not None} | held


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
