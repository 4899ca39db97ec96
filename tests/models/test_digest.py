"""Hashes of models: any other weight, name, shape, type or config gives another one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plmtune.models.digest import model_digest
from plmtune.models.llama import llama
from plmtune.modules.decoder import Decoder
from plmtune.registry import component, load


def small(**options: object) -> Decoder:
    sizes = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "max_seq_len": 32, "init_std": 0.3}
    sizes |= {"attention": component("attention", "gqa", num_kv_heads=1)}
    sizes |= {"ffn": component("ffn", "swiglu", hidden_dim=16)}
    return llama(40, **{**sizes, **options})  # type: ignore[arg-type]


class TestModelDigest:
    def test_changes_with_any_bit_of_any_weight(self) -> None:
        model = small()
        before, held = model_digest(model), model.state_dict()
        for tensor in held.values():
            bits = tensor.view(torch.int32).view(-1)
            bits[-1] ^= 1
            assert model_digest(model) != before
            bits[-1] ^= 1
        assert model_digest(model) == before

    def test_changes_with_a_name_a_shape_and_a_type(self) -> None:
        def of(name: str, tensor: Tensor) -> str:
            module = nn.Module()
            module.register_parameter(name, nn.Parameter(tensor))
            return model_digest(module)

        ones = torch.zeros(2, 6)
        others = [of("b", ones), of("a", ones.view(3, 4)), of("a", ones.bfloat16()), of("a", ones.view(12))]
        assert len({of("a", ones), *others}) == 5

    def test_changes_with_what_the_weights_are_used_for(self) -> None:
        digests = set()
        for theta in (1e4, 1e5):
            attention = component("attention", "gqa", num_kv_heads=1, rope_theta=theta)
            made = small(attention=attention)
            made.init_weights(torch.Generator().manual_seed(0))
            digests.add(model_digest(made))
        assert len(digests) == 2

    def test_of_a_base_does_not_depend_on_its_adapters(self) -> None:
        base = small()
        alone = model_digest(base)
        load("peft", "lora")(model=base, rank=2)
        adapters = {name for name in base.state_dict() if ".lora_" in name}
        assert adapters
        assert model_digest(base, without=adapters) == alone != model_digest(base)

    def test_of_quantized_weights_changes_with_their_numbers(self) -> None:
        digests = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            base = small(ffn=component("ffn", "swiglu", hidden_dim=256), embed_dim=64, num_heads=1)
            load("peft", "qlora")(model=base, rank=2, targets=("ffn",))
            for name, parameter in base.named_parameters():
                if name.endswith(("lora_a.weight", "lora_b.weight")):
                    nn.init.ones_(parameter)
                elif "ffn" not in name:
                    nn.init.zeros_(parameter)
            digests.append(model_digest(base))
        assert digests[0] == digests[1] != digests[2]
