"""Llama against transformers and torchtune."""

import importlib.util
import sys

import pytest
import torch

from plmtune.models.hf import to_hf
from plmtune.models.llama import llama
from plmtune.modules.decoder import Decoder
from plmtune.registry import component


def small_llama(**changes: object) -> Decoder:
    torch.manual_seed(0)
    settings = {
        "attention": component("attention", "gqa", num_kv_heads=2),
        "ffn": component("ffn", "swiglu", hidden_dim=96),
        "embed_dim": 64,
        "num_layers": 2,
        "num_heads": 4,
        "max_seq_len": 64,
        "init_std": 0.15,
    }
    return llama(101, **(settings | changes))


class TestLlama:
    def test_default_is_smollm2_135m(self) -> None:
        with torch.device("meta"):
            model = llama(49152)
        assert sum(p.numel() for p in model.parameters()) == 134_515_008
        _, config = to_hf(model)
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert (config["num_key_value_heads"], config["head_dim"], config["rms_norm_eps"]) == (3, 64, 1e-5)

    @pytest.mark.parametrize("tied", [True, False])
    def test_logits_equal_transformers(self, tied: bool) -> None:
        transformers = pytest.importorskip("transformers")
        model = small_llama(tie_embeddings=tied)
        state, keys = to_hf(model)
        config = transformers.LlamaConfig(
            **{k: v for k, v in keys.items() if k not in ("plmtune", "architectures", "model_type", "torch_dtype")},
            attn_implementation="eager",
        )
        theirs = transformers.LlamaForCausalLM(config).eval()
        missing, unexpected = theirs.load_state_dict(state, strict=False)
        assert (missing, unexpected) == (["lm_head.weight"] if tied else [], [])
        tokens = torch.randint(101, (2, 40))
        with torch.no_grad():
            torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)

    def test_logits_equal_torchtune_with_neighbouring_pairs(self) -> None:
        if importlib.util.find_spec("torchtune") is None:
            pytest.skip("torchtune is not installed")
        # torchtune 0.6.1 imports one module of torchao from where it stood before.
        moved = importlib.import_module("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
        sys.modules.setdefault("torchao.dtypes.nf4tensor", moved)
        from torchtune.models.llama2 import llama2

        model = small_llama(
            attention=component("attention", "gqa", num_kv_heads=2, rope_theta=10000.0, rope_interleaved=True),
            tie_embeddings=False,
        )
        theirs = llama2(
            vocab_size=101,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            embed_dim=64,
            max_seq_len=64,
            intermediate_dim=96,
            norm_eps=1e-5,
        )
        names = {
            "attention_norm.weight": "sa_norm.scale",
            "ffn_norm.weight": "mlp_norm.scale",
            "attention.o_proj": "attn.output_proj",
            "attention.": "attn.",
            "ffn.gate_proj": "mlp.w1",
            "ffn.down_proj": "mlp.w2",
            "ffn.up_proj": "mlp.w3",
        }
        state = {}
        for name, tensor in model.state_dict().items():
            for ours, other in names.items():
                name = name.replace(ours, other)
            state["norm.scale" if name == "norm.weight" else name] = tensor
        theirs.load_state_dict(state)
        tokens = torch.randint(101, (2, 40))
        with torch.no_grad():
            torch.testing.assert_close(model(tokens), theirs(tokens).float(), atol=1e-5, rtol=1e-5)
