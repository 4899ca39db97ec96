"""Importance of units against naive sums, and the choice of heads that share keys."""

import pytest
import torch
from small import IDS, small_llama, small_plm

from plmtune.pruning.groups import CHANNELS, groups_of
from plmtune.pruning.sizes import resolve, sizes_of
from plmtune.pruning.width import choose_units, importance, mean_loss, shares_that_stay


class TestNaive:
    def test_weights_are_summed_over_all_matrices_of_a_unit(self) -> None:
        model = small_llama()
        groups = groups_of(model)
        ffn = model.layers[1].ffn
        l1, l2 = (importance(model, groups, method, []) for method in ("l1", "l2"))  # type: ignore[arg-type]
        rows = torch.cat((ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight.T), dim=1)
        torch.testing.assert_close(l1["layers.1.neurons"], rows.abs().sum(1))
        torch.testing.assert_close(l2["layers.1.neurons"], rows.norm(dim=1))
        attention = model.layers[0].attention  # 4 heads of 16
        head = attention.q_proj.weight[16:32].abs().sum() + attention.o_proj.weight[:, 16:32].abs().sum()
        torch.testing.assert_close(l1["layers.0.heads"][1], head)
        keys = attention.k_proj.weight[16:].abs().sum() + attention.v_proj.weight[16:].abs().sum()
        torch.testing.assert_close(l1["layers.0.kv_heads"][1], keys)
        wide = [t for t in model.state_dict().values() if t.ndim == 2]
        channel = sum(t[:, 5].abs().sum() for t in wide if t.shape[1] == 64)
        channel += sum(layer.attention.o_proj.weight[5].abs().sum() for layer in model.layers)
        channel += sum(layer.ffn.down_proj.weight[5].abs().sum() for layer in model.layers)
        channel -= sum(layer.attention.o_proj.weight[:, 5].abs().sum() for layer in model.layers)  # 64 wide as well
        torch.testing.assert_close(l1[CHANNELS][5], channel)

    def test_taylor_is_the_sum_of_weights_times_gradients_over_batches(self) -> None:
        model = small_plm()
        found = importance(model, groups_of(model), "taylor", IDS.split(2))
        assert all(parameter.grad is None for parameter in model.parameters())
        expected = torch.zeros(32)
        for ids in IDS.split(2):
            model.zero_grad()
            logits = model(ids)[:, :-1].flatten(0, 1)
            torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
            attention = model.layers[1].attention
            for weight, dim in (
                (attention.kv_a_proj.weight, 1), (attention.kv_b_proj.weight, 0), (attention.kv_a_norm.weight, None)
            ):  # fmt: skip
                product = (weight * weight.grad).detach().abs()
                expected += (product if dim is None else product.sum(dim))[:32]
        torch.testing.assert_close(found["layers.1.kv_rank"], expected)

    def test_activations_are_norms_over_the_tokens_of_a_row(self) -> None:
        model = small_plm()
        found = importance(model, groups_of(model), "activation", IDS.split(2))
        with torch.no_grad():
            x = model.tok_embeddings(IDS)
            layer = model.layers[0]
            x = x + layer.attention(layer.attention_norm(x))
            hidden = torch.relu(layer.ffn.up_proj(layer.ffn_norm(x))).square()
        torch.testing.assert_close(found["layers.0.neurons"], hidden.norm(dim=1).sum(0))

    def test_the_loss_is_the_mean_over_tokens(self) -> None:
        model = small_llama()
        logits = model(IDS)[:, :-1].flatten(0, 1)
        naive = torch.nn.functional.cross_entropy(logits, IDS[:, 1:].flatten())
        torch.testing.assert_close(mean_loss(model, IDS), naive)


class TestChoice:
    def test_the_best_units_stay_and_kv_heads_with_the_best_of_their_query_heads(self) -> None:
        model = small_llama(num_layers=1)
        groups = groups_of(model)
        sizes = resolve(sizes_of(model), {"num_heads": 1, "attention.num_kv_heads": 1, "ffn.hidden_dim": 2})
        scores = {"layers.0.heads": torch.tensor([1.0, 2, 5, 0]), "layers.0.kv_heads": torch.tensor([2.0, 0])}
        scores["layers.0.neurons"] = torch.zeros(96).index_fill(0, torch.tensor([7, 90]), 1)
        chosen = choose_units(groups, scores, sizes)
        assert chosen == {"layers.0.heads": (2,), "layers.0.kv_heads": (1,), "layers.0.neurons": (7, 90)}
        shares = shares_that_stay(groups, sizes)
        assert shares == {"layers.0.heads": 0.5, "layers.0.kv_heads": 0.5, "layers.0.neurons": pytest.approx(2 / 96)}

    def test_nothing_goes_where_nothing_shrinks(self) -> None:
        model = small_plm()
        sizes = resolve(sizes_of(model), {"num_layers": 1})
        assert choose_units(groups_of(model), {}, sizes) == {} == shares_that_stay(groups_of(model), sizes)
