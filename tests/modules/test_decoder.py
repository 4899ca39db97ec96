"""The decoder: caches, masks, dtypes, initialisation, gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component

MLA = component("attention", "mla", kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
ATTENTIONS = {
    "mla": MLA,
    "gqa": component("attention", "gqa", num_kv_heads=2),
    "mha": component("attention", "mha", rope_interleaved=True),
    "value_embed": component("attention", "gqa", num_kv_heads=2, value_embed=1),
}


def small(attention: Component = MLA, **changes: Any) -> Decoder:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "ffn": component("ffn", "squared_relu", hidden_dim=96),
        "embed_dim": 64,
        "num_layers": 2,
        "num_heads": 4,
        "max_seq_len": 64,
        "init_std": 0.15,
    }
    return plm(101, attention=attention, **(settings | changes))


def tokens(b: int, s: int) -> Tensor:
    return torch.randint(101, (b, s), generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
class TestCache:
    @torch.no_grad()
    def test_decode_token_by_token_equals_the_full_forward(self, attention: Component) -> None:
        model, ids = small(attention), tokens(2, 30)
        cache = model.new_cache(2, 30)
        parts = [model(ids[:, i : i + 1], cache=cache) for i in range(30)]
        close(torch.cat(parts, 1), model(ids))
        assert cache.length == 30

    @torch.no_grad()
    def test_prefill_in_chunks_equals_the_full_forward(self, attention: Component) -> None:
        model, ids = small(attention), tokens(2, 30)
        cache = model.new_cache(2, 40)
        parts = [model(chunk, cache=cache) for chunk in ids.split((11, 1, 7, 10, 1), dim=1)]
        close(torch.cat(parts, 1), model(ids))

    @torch.no_grad()
    def test_truncated_and_cloned_caches_give_the_same_logits(self, attention: Component) -> None:
        model, ids = small(attention), tokens(2, 30)
        cache = model.new_cache(2, 30)
        model(ids[:, :20], cache=cache)
        other = cache.clone()
        model(tokens(2, 5) * 0, cache=cache)
        cache.truncate(20)
        expected = model(ids)[:, 20:]
        close(model(ids[:, 20:], cache=cache), expected)
        close(model(ids[:, 20:], cache=other), expected)

    @torch.no_grad()
    def test_a_document_mask_keeps_documents_apart(self, attention: Component) -> None:
        model, ids = small(attention), tokens(1, 24)
        document = torch.tensor([[0] * 9 + [1] * 15])
        mask = (document[:, :, None] == document[:, None]) & torch.ones(24, 24, dtype=torch.bool).tril()
        positions = torch.cat((torch.arange(9), torch.arange(15)))[None]
        packed = model(ids, mask=mask, input_pos=positions)
        close(packed, torch.cat((model(ids[:, :9]), model(ids[:, 9:])), 1))

    def test_gradients_equal_finite_differences(self, attention: Component) -> None:
        torch.manual_seed(0)
        model = small(attention, num_layers=1, num_heads=2, embed_dim=8).double()
        x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
        of_tokens = model.of_tokens(0, tokens(1, 5))
        assert torch.autograd.gradcheck(lambda x: model.layers[0](x, **of_tokens), (x,), atol=1e-5, rtol=1e-3)


class TestCacheSize:
    def test_more_tokens_than_it_takes_are_refused_and_it_stays_as_it_was(self) -> None:
        model = small()
        cache = model.new_cache(1, 8)
        model(tokens(1, 6), cache=cache)
        with pytest.raises(ValueError, match=r"a sequence of 9 tokens exceeds the cache's max_seq_len \(8\)"):
            model(tokens(1, 3), cache=cache)
        assert cache.length == 6

    def test_longer_than_the_model_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"65 tokens exceeds the model's max_seq_len \(64\)"):
            small().new_cache(1, 65)

    def test_latent_is_rank_plus_rope_numbers_a_token(self) -> None:
        assert small().new_cache(3, 10).nbytes == 2 * 3 * 10 * (32 + 8) * 4

    def test_cannot_be_truncated_to_more_than_it_holds(self) -> None:
        with pytest.raises(ValueError, match="a cache of 0 tokens cannot be truncated to 5"):
            small().new_cache(1, 8).truncate(5)


class TestForward:
    def test_a_sequence_longer_than_the_model_is_refused_with_both_numbers(self) -> None:
        with pytest.raises(ValueError, match=r"65 tokens exceeds the model's max_seq_len \(64\)"):
            small()(tokens(1, 65))

    @pytest.mark.parametrize("tied", [True, False])
    def test_hidden_times_head_weight_are_the_logits(self, tied: bool) -> None:
        model, ids = small(tie_embeddings=tied), tokens(2, 9)
        close(model(ids, hidden=True) @ model.head_weight.T, model(ids))

    def test_no_token_sees_the_future(self) -> None:
        model, ids = small(), tokens(1, 20)
        changed = ids.clone()
        changed[0, 12:] = 0
        close(model(ids)[:, :12], model(changed)[:, :12])

    def test_autocast_keeps_the_whole_stream_in_bf16_and_logits_in_fp32(self) -> None:
        model, seen = small(), []
        for layer in model.layers:
            layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
            layer.ffn_norm.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            hidden, logits = model(tokens(1, 8), hidden=True), model(tokens(1, 8))
        assert set(seen) == {torch.bfloat16}
        assert (hidden.dtype, logits.dtype) == (torch.bfloat16, torch.float32)

    def test_compiled_layers_give_the_same(self) -> None:
        model, ids = small(num_layers=1), tokens(2, 16)
        expected = model(ids)
        expected.sum().backward()
        gradient = model.head_weight.grad.clone()
        model.zero_grad()
        for layer in model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
        out = model(ids)
        out.sum().backward()
        close(out, expected)
        torch.testing.assert_close(model.head_weight.grad, gradient, atol=1e-3, rtol=1e-4)

    def test_generating_in_inference_mode_does_not_spoil_training(self) -> None:
        model = small(component("attention", "gqa", num_kv_heads=2, rope_theta=777.0))  # tables of its own
        with torch.inference_mode():
            model(tokens(1, 8))
        model(tokens(1, 8)).sum().backward()
        assert model.head_weight.grad is not None


class TestInitialisation:
    def test_follows_the_generator_and_not_the_way_to_it(self) -> None:
        model = small()
        model.init_weights(torch.Generator().manual_seed(7))
        with torch.device("meta"):
            other = small()
        other.to_empty(device="cpu")
        other.init_weights(torch.Generator().manual_seed(7))
        state, other_state = model.state_dict(), other.state_dict()
        assert all(torch.equal(state[name], other_state[name]) for name in state)

    def test_is_normal_for_matrices_and_one_for_norms(self) -> None:
        model = small(init_std=0.05, norm=component("norm", "layer_norm"))
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                assert parameter.std().item() == pytest.approx(0.05, rel=0.1), name
            else:
                assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name

    def test_is_drawn_in_fp32_for_any_dtype(self) -> None:
        model, other = small(), small().to(torch.bfloat16)
        model.init_weights(torch.Generator().manual_seed(7))
        other.init_weights(torch.Generator().manual_seed(7))
        assert torch.equal(model.head_weight.to(torch.bfloat16), other.head_weight)

    def test_names_no_buffers(self) -> None:
        model = small()
        assert model.state_dict().keys() == dict(model.named_parameters()).keys()


class TestShardedModel:
    def test_fully_sharded_equals_plain_with_the_head_used_by_the_loss(self) -> None:
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            plain, sharded = small(), small()
            for layer in sharded.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(sharded, mesh=mesh)
            for model in (plain, sharded):
                model.init_weights(torch.Generator().manual_seed(3))
                hidden = model(tokens(2, 10), hidden=True)
                (hidden @ model.head_weight.T).square().mean().backward()
            for a, b in zip(plain.parameters(), sharded.parameters(), strict=True):
                close(b.full_tensor(), a)
                close(b.grad.full_tensor(), a.grad)
        finally:
            dist.destroy_process_group()
