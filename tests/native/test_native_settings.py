"""Each setting of each component, alone: decoding natively says what the modules say, or does not take the model."""

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from plmtune import native
from plmtune.models.assemble import assemble
from plmtune.modules.decoder import Decoder
from plmtune.native.decoder import NativeDecoder
from plmtune.registry import component, describe_components, keys_of

pytestmark = pytest.mark.skipif(native.unavailable_reason() is not None, reason="decoding is eager here")

_DIVISORS = [1.0, 1.5, 2.0, 3.0]
# Component -> its settings -> a value that is not the default; (value, other settings) where it needs them.
_GQA: dict[str, Any] = {
    "num_kv_heads": 6,
    "head_dim": 20,
    "rope_theta": 50.0,
    "rope_interleaved": True,
    "bias": True,
    "output_bias": (False, {"bias": True}),
    "qk_norm": True,
    "rope": False,
    "rope_dim": 4,
    "rope_scaling": component("rope_scaling", "linear", factor=3.0),
    "window": 7,
    "soft_cap": 2.0,
    "scale": 0.9,
    "value_embed": 1,
    "shortcut": component("shortcut", "augmented", reduction=8),
}
_MLA: dict[str, Any] = {
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 12,
    "v_head_dim": 10,
    "rope_theta": 50.0,
    "rope_interleaved": False,
    "rope_scaling": component("rope_scaling", "linear", factor=3.0),
    "q_lora_rank": 24,
    "latent_eps": 0.5,
    "shortcut": component("shortcut", "augmented", reduction=8),
}
_YARN = {"factor": 4.0, "original_max_seq_len": 16}
_LONG = {"short_factor": _DIVISORS, "long_factor": [9.0, 5.0, 3.0, 2.0], "original_max_seq_len": 8}
SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("attention", "gqa"): _GQA,
    ("attention", "mha"): {key: _GQA[key] for key in ("head_dim", "rope_theta", "rope_interleaved", "bias")},
    ("attention", "mla"): _MLA,
    ("ffn", "squared_relu"): {"hidden_dim": 100},
    ("ffn", "swiglu"): {"hidden_dim": 100},
    ("ffn", "geglu"): {"hidden_dim": 100},
    ("ffn", "gelu"): {"hidden_dim": 100, "bias": False, "approximate": "none"},
    ("ffn", "siaf"): {"hidden_dim": 100, "num_terms": 3, "base": "squared_relu"},
    ("norm", "rms_norm"): {"eps": 0.5, "unit_offset": True},
    ("norm", "layer_norm"): {"eps": 0.5},
    ("rope_scaling", "none"): {},
    ("rope_scaling", "linear"): {"factor": 2.0},
    ("rope_scaling", "dynamic"): {"factor": 2.0, "original_max_seq_len": 8},
    ("rope_scaling", "llama3"): {
        "factor": 3.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0, "original_max_seq_len": 16,
    },
    ("rope_scaling", "yarn"): {
        "factor": 3.0, "original_max_seq_len": 16, "beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.5,
        "mscale": (1.0, {"mscale_all_dim": 0.5, **_YARN}), "mscale_all_dim": (0.8, _YARN), "truncate": (False, _YARN),
    },
    ("rope_scaling", "longrope"): {
        "short_factor": (_DIVISORS, _LONG), "long_factor": (_DIVISORS, _LONG), "original_max_seq_len": (16, _LONG),
        "factor": (3.0, _LONG), "attention_factor": (1.5, _LONG),
    },
}  # fmt: skip
# Small sizes in place of a component's defaults.
BASE: dict[str, dict[str, Any]] = {
    "mla": {"kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 12},
    **{name: {"hidden_dim": 96} for group, name in SETTINGS if group == "ffn"},
}
# Arguments of the decoder that are no component's.
DECODER: dict[str, Any] = {
    "tie_embeddings": True,
    "post_norms": True,
    "residual_scale": 0.3,
    "learned_positions": True,
    "query_layer": True,
    "embed_scale": 3.0,
    "logit_scale": 0.25,
    "logit_soft_cap": 0.5,
    "layers": ["local", "nope"],
    "local_rope_theta": 50.0,
}
# What decode.c does not compute; all else it must compute.
NOT_NATIVE = {
    *(
        f"attention.gqa.{key}"
        for key in ("qk_norm", "rope", "rope_dim", "window", "soft_cap", "value_embed", "shortcut")
    ),
    "attention.mla.q_lora_rank",
    "attention.mla.shortcut",
    *("ffn.geglu", "ffn.geglu.hidden_dim", "ffn.gelu", "ffn.gelu.hidden_dim", "ffn.gelu.bias", "ffn.gelu.approximate"),
    *("ffn.siaf", "ffn.siaf.hidden_dim", "ffn.siaf.num_terms", "ffn.siaf.base"),
    *("norm.rms_norm.unit_offset", "norm.layer_norm", "norm.layer_norm.eps"),
    *("rope_scaling.dynamic", "rope_scaling.dynamic.factor", "rope_scaling.dynamic.original_max_seq_len"),
    *(f"rope_scaling.longrope.{key}" for key in SETTINGS["rope_scaling", "longrope"]),
    *(f"decoder.{key}" for key in ("post_norms", "residual_scale", "learned_positions", "embed_scale", "logit_scale")),
    *("decoder.query_layer", "decoder.layers", "decoder.local_rope_theta"),
}


def build(*, group: str = "", part: Any = None, **decoder: Any) -> Decoder:
    """A decoder with random weights: GQA or MLA, and one part of another kind."""
    torch.manual_seed(0)
    attention = component("attention", "gqa", num_kv_heads=2)
    if group == "rope_scaling":
        attention.settings["rope_scaling"] = part
    if "layers" in decoder:
        attention.settings["window"] = 7
    parts = {
        "attention": attention,
        "ffn": component("ffn", "swiglu", hidden_dim=96),
        "norm": component("norm", "rms_norm"),
    }
    settings = {"vocab_size": 61, "embed_dim": 48, "num_layers": 2, "num_heads": 6, "max_seq_len": 64, "init_std": 0.2}
    settings |= parts | ({group: part} if group in parts else {})
    settings["tie_embeddings"] = decoder.pop("tie_embeddings", False)
    model = assemble("llama", settings, **decoder).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def parts() -> Iterator[Any]:
    for (group, name), settings in SETTINGS.items():
        if (group, name) != ("rope_scaling", "longrope"):  # which has no defaults of use
            yield pytest.param(
                partial(build, group=group, part=component(group, name, **BASE.get(name, {}))), id=f"{group}.{name}"
            )
        for key, value in settings.items():
            own, others = value if isinstance(value, tuple) else (value, {})
            made = component(group, name, **BASE.get(name, {}) | others | {key: own})
            yield pytest.param(partial(build, group=group, part=made), id=f"{group}.{name}.{key}")
    for key, value in DECODER.items():
        others = {"layers": ["local", "global"]} if key == "local_rope_theta" else {}
        yield pytest.param(partial(build, **others | {key: value}), id=f"decoder.{key}")


@pytest.mark.parametrize("make", parts())
@torch.no_grad()
def test_native_decoding_agrees_or_leaves_the_model_to_the_modules(make: Any, request: pytest.FixtureRequest) -> None:
    model, found = make(), []
    for decoder in (None, NativeDecoder()):
        model.native = decoder
        cache = model.new_cache(1, 40)
        model(torch.arange(3, 24)[None], cache=cache)
        found.append(torch.cat([model(torch.tensor([[token]]), cache=cache) for token in (7, 60, 7)]))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
    name = request.node.callspec.id
    assert (NativeDecoder().bind(model) is None) == (name in NOT_NATIVE)


def test_every_setting_of_every_component_is_tried() -> None:
    components = describe_components()
    for group in ("attention", "ffn", "norm", "rope_scaling"):
        assert {name for key, name in SETTINGS if key == group} == {
            name for name, described in components[group].items() if described.module.startswith("plmtune.")
        }
    for (group, name), settings in SETTINGS.items():
        assert settings.keys() == keys_of(group, name).keys(), (group, name)
    sizes = {"vocab_size", "embed_dim", "num_layers", "max_seq_len", "attention", "ffn", "norm", "init_std"}
    arguments = inspect.signature(Decoder.__init__).parameters.keys() - {"self"} - sizes
    arguments |= inspect.signature(assemble).parameters.keys() - {"name", "settings", "decoder"}
    assert DECODER.keys() == arguments
