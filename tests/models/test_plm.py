"""PLM against three witnesses: the fact sheet's numbers, a naive forward, and transformers' DeepSeek code."""

import math

import pytest
import torch
from torch import Tensor

from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.registry import component

TINY_MLA = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}


def small_plm(**changes: object) -> Decoder:
    torch.manual_seed(0)
    settings = {
        "attention": component("attention", "mla", **TINY_MLA),
        "ffn": component("ffn", "squared_relu", hidden_dim=96),
        "embed_dim": 48,
        "num_layers": 2,
        "num_heads": 4,
        "max_seq_len": 64,
        "init_std": 0.15,
    }
    model = plm(101, **(settings | changes))
    with torch.no_grad():  # norms off 1, or a test would not see them
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def naive_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean() + eps).sqrt() * weight


def naive_turn(x: Tensor, position: int, theta: float) -> Tensor:
    """Turn neighbouring pairs: (a, b) -> (a cos - b sin, a sin + b cos)."""
    out = x.clone()
    for pair in range(len(x) // 2):
        angle = position * theta ** (-2 * pair / len(x))
        a, b = x[2 * pair], x[2 * pair + 1]
        out[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def naive_logits(model: Decoder, tokens: list[int]) -> Tensor:
    """The forward pass as the fact sheet writes it, in float64, a token and a head at a time."""
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    config = model.config
    mla, heads, eps = config["attention"], config["num_heads"], config["norm"]["eps"]
    n, r, v = mla["qk_nope_head_dim"], mla["qk_rope_head_dim"], mla["v_head_dim"]
    c, theta = mla["kv_lora_rank"], mla["rope_theta"]
    stream = [w["tok_embeddings.weight"][token] for token in tokens]
    for i in range(config["num_layers"]):
        at = f"layers.{i}."
        queries, keys, values = [], [], []
        for position, x in enumerate(stream):
            xh = naive_norm(x, w[at + "attention_norm.weight"], eps)
            q = (w[at + "attention.q_proj.weight"] @ xh).view(heads, n + r)
            a = w[at + "attention.kv_a_proj.weight"] @ xh
            latent = naive_norm(a[:c], w[at + "attention.kv_a_norm.weight"], eps)
            kv = (w[at + "attention.kv_b_proj.weight"] @ latent).view(heads, n + v)
            k_rope = naive_turn(a[c:], position, theta)
            queries.append([torch.cat((q[h, :n], naive_turn(q[h, n:], position, theta))) for h in range(heads)])
            keys.append([torch.cat((kv[h, :n], k_rope)) for h in range(heads)])
            values.append([kv[h, n:] for h in range(heads)])
        after = []
        for t, x in enumerate(stream):
            out = []
            for h in range(heads):
                scores = torch.stack([queries[t][h] @ keys[s][h] / math.sqrt(n + r) for s in range(t + 1)])
                weights = scores.softmax(0)
                out.append(sum(weights[s] * values[s][h] for s in range(t + 1)))
            h = x + w[at + "attention.o_proj.weight"] @ torch.cat(out)
            up = w[at + "ffn.up_proj.weight"] @ naive_norm(h, w[at + "ffn_norm.weight"], eps)
            after.append(h + w[at + "ffn.down_proj.weight"] @ up.clamp_min(0) ** 2)
        stream = after
    head = w["tok_embeddings.weight"] if model.tied else w["output.weight"]
    return torch.stack([head @ naive_norm(x, w["norm.weight"], eps) for x in stream])


class TestPlm1B8:
    def test_has_the_papers_parameters_and_tensors(self) -> None:
        with torch.device("meta"):
            model = plm(151936)
        sizes = [p.numel() for p in model.parameters()]
        assert (sum(sizes), len(sizes)) == (1_825_458_176, 290)

    def test_a_layer_has_the_papers_parts(self) -> None:
        with torch.device("meta"):
            layer = plm(10, num_layers=1).layers[0]
        sizes = {name: p.numel() for name, p in layer.named_parameters()}
        assert sizes["attention.q_proj.weight"] == 6_291_456
        assert sizes["attention.kv_a_proj.weight"] == 1_179_648
        assert sizes["attention.kv_b_proj.weight"] == 2_097_152
        assert sizes["attention.o_proj.weight"] == 4_194_304
        assert sum(sizes.values()) == 47_321_600

    def test_one_layer_equals_the_naive_forward(self) -> None:
        torch.manual_seed(0)
        model = plm(50, num_layers=1)
        tokens = torch.randint(50, (1, 6))
        with torch.no_grad():
            logits = model(tokens)[0].double()
        torch.testing.assert_close(logits, naive_logits(model, tokens[0].tolist()), atol=1e-5, rtol=1e-5)

    def test_cache_holds_576_numbers_a_token_and_layer(self) -> None:
        with torch.device("meta"):
            cache = plm(10, num_layers=2).new_cache(1, 100)
        assert cache.nbytes == 2 * 100 * 576 * 4


class TestLogits:
    @pytest.mark.parametrize("tied", [True, False])
    def test_equal_the_naive_forward(self, tied: bool) -> None:
        model = small_plm(tie_embeddings=tied)
        tokens = torch.randint(101, (2, 11))
        with torch.no_grad():
            logits = model(tokens).double()
        for row in range(2):
            expected = naive_logits(model, tokens[row].tolist())
            torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)

    def test_equal_transformers_deepseek_with_the_gate_equal_to_up(self) -> None:
        transformers = pytest.importorskip("transformers")
        from plmtune.models.hf import to_hf

        model = small_plm()
        config = transformers.DeepseekV3Config(
            vocab_size=101,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=None,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=12,
            first_k_dense_replace=2,  # no layer is a mixture of experts
            hidden_act="relu",
            rope_interleave=True,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            rms_norm_eps=1e-6,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            attn_implementation="eager",
        )
        theirs = transformers.DeepseekV3ForCausalLM(config).eval()
        state, _ = to_hf(model)
        state |= {name.replace("up_proj", "gate_proj"): t for name, t in state.items() if "up_proj" in name}
        missing, unexpected = theirs.load_state_dict(state, strict=False)
        assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
        tokens = torch.randint(101, (2, 40))
        with torch.no_grad():
            expected = theirs(tokens).logits
            torch.testing.assert_close(model(tokens), expected, atol=1e-5, rtol=1e-5)


class TestConfig:
    def test_tells_every_setting_even_those_left_at_their_default(self) -> None:
        with torch.device("meta"):
            config = plm(10, num_layers=1).config
        assert config["attention"] == {
            "component": "mla",
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "rope_theta": 100000.0,
            "rope_interleaved": True,
            "rope_scaling": {"component": "none"},
            "q_lora_rank": None,
            "latent_eps": None,
            "shortcut": {"component": "none"},
        }
        assert config["norm"] == {"component": "rms_norm", "eps": 1e-6, "unit_offset": False}

    def test_impossible_sizes_are_refused_with_their_values(self) -> None:
        with pytest.raises(ValueError, match=r"num_layers \(0\) must be at least 1"):
            small_plm(num_layers=0)
        with pytest.raises(ValueError, match=r"num_layers \(20000\) must be at least 1 and at most 1,024"):
            small_plm(num_layers=20_000)
        with pytest.raises(ValueError, match="width must be even and at least 2, not 7"):
            small_plm(attention=component("attention", "mla", **(TINY_MLA | {"qk_rope_head_dim": 7})))
        with pytest.raises(ValueError, match=r"v_head_dim \(99\) exceeds the width of queries and keys \(24\)"):
            small_plm(attention=component("attention", "mla", **(TINY_MLA | {"v_head_dim": 99})))
        with pytest.raises(ValueError, match=r"num_heads \(4\) is not a multiple of num_kv_heads \(3\)"):
            small_plm(attention=component("attention", "gqa", num_kv_heads=3))
