"""Sizes that are asked for: what does not divide, grow or exist is refused with numbers."""

import pytest
from small import small_llama, small_plm

from plmtune.errors import UserError
from plmtune.pruning.sizes import refuse_too_much, resolve, sizes_of

LLAMA, PLM = sizes_of(small_llama()), sizes_of(small_plm())  # 4 heads over 2 KV heads; 4 heads over a latent


class TestResolve:
    def test_what_is_not_asked_for_stays(self) -> None:
        assert resolve(PLM, {"ffn.hidden_dim": 64, "num_layers": None}).named() == {
            "num_layers": 2, "embed_dim": 64, "ffn.hidden_dim": 64, "num_heads": 4, "attention.kv_lora_rank": 32,
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("asked", "heads"),
        [
            ({"num_heads": 2}, (2, 1)),
            ({"attention.num_kv_heads": 1}, (2, 1)),
            ({"num_heads": 2, "attention.num_kv_heads": 2}, (2, 2)),
            ({"num_heads": 1, "attention.num_kv_heads": 1}, (1, 1)),
        ],
    )
    def test_heads_stay_grouped(self, asked: dict[str, int], heads: tuple[int, int]) -> None:
        found = resolve(LLAMA, asked)
        assert (found.heads, found.kv_heads) == heads

    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            ({"num_heads": 3}, r"num_heads: 3 is no multiple of 2, the query heads that share a KV head \(4 / 2\)"),
            ({"num_heads": 3, "attention.num_kv_heads": 2}, "3 query heads over 2 KV heads"),
            ({"num_heads": 4, "attention.num_kv_heads": 1}, "4 query heads over 1 KV heads, and each .* serves 2"),
            ({"embed_dim": 65}, "embed_dim: 65 exceeds the checkpoint's 64. Pruning only removes"),
            ({"attention.kv_lora_rank": 8}, "kv_lora_rank: this model has no such setting.*attention.num_kv_heads=2"),
            ({"embed_dim": 64}, "nothing is to be pruned.*num_layers=2, embed_dim=64, ffn.hidden_dim=96"),
            ({}, "nothing is to be pruned"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, asked: dict[str, int | None], said: str) -> None:
        with pytest.raises(UserError, match=said):
            resolve(LLAMA, asked)

    def test_layers_of_several_sizes_are_refused(self) -> None:
        model = small_llama()
        model.layers[1].ffn = small_plm().layers[0].ffn
        assert sizes_of(model).neurons == 96
        model.layers[1].ffn.down_proj.in_features = 90
        with pytest.raises(UserError, match="layer 1 has 90 neurons and layer 0 has 96"):
            sizes_of(model)


class TestAThird:
    def test_more_is_refused_with_the_reason_unless_forced(self) -> None:
        assert refuse_too_much(900, 600, force=False) == ""
        with pytest.raises(
            UserError, match=r"removes 33.4% of the parameters \(900 -> 599\), more than a third.*force"
        ):
            refuse_too_much(900, 599, force=False)
        assert "33.4%" in refuse_too_much(900, 599, force=True)
