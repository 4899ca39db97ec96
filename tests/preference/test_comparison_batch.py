import numpy as np
import pytest
import torch
from made_comparisons import batches, comparisons

from plmtune.losses.preference import DIRECT, GIVEN_CHOSEN, MISMATCHED
from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.preference.comparison_batch import make_batch
from plmtune.preference.comparisons import Comparison
from plmtune.registry import component


class TestMakeBatch:
    def test_equals_a_naive_loop(self):
        data = comparisons(4, (DIRECT, GIVEN_CHOSEN, MISMATCHED))
        data[3] = Comparison(DIRECT, data[3].prompt, None, data[3].rejected, 1, "")
        rows = [[0, 3, 5], [7], [2, 1]]
        batch = make_batch(data, rows)
        s = batch.tokens.shape[1]
        seen, n = 0, 0
        for r, row in enumerate(rows):
            cells = []  # (comparison, part, position, id)
            for index in row:
                held = data[index]
                cells += [(n, "p", i, t) for i, t in enumerate(held.prompt)]
                last_of_prompt = r * s + len(cells) - 1
                for side, (name, answer) in enumerate((("c", held.chosen), ("r", held.rejected))):
                    ids = [] if answer is None else answer
                    for i, t in enumerate(ids):
                        place = last_of_prompt if i == 0 else r * s + len(cells) - 1
                        assert batch.positions[seen] == place
                        assert batch.targets[seen] == t
                        assert batch.completion[seen] == 2 * n + side
                        seen += 1
                        cells.append((n, name, held.prompt.size + i, t))
                    assert batch.lengths[2 * n + side] == len(ids)
                    end = r * s + len(cells) - 1 if len(ids) else last_of_prompt
                    assert batch.ends[2 * n + side] == end
                assert batch.kind[n] == held.kind
                assert batch.index[n] == index
                n += 1
            for i in range(s):
                inside = i < len(cells)
                assert batch.tokens[r, i] == (cells[i][3] if inside else 0)
                assert batch.input_pos[r, i] == (cells[i][2] if inside else 0)
                for j in range(s):
                    if i >= len(cells) or j >= len(cells):
                        sees = i == j
                    else:
                        sees = j <= i and cells[i][0] == cells[j][0] and cells[j][1] in ("p", cells[i][1])
                    assert batch.mask[r, i, j] == sees, (r, i, j)
        assert seen == batch.targets.numel() == batch.positions.numel()
        assert batch.num_pairs == sum(data[i].kind == DIRECT for row in rows for i in row)
        assert batch.num_tokens == sum(data[i].num_tokens for row in rows for i in row)
        assert max(data[i].num_tokens for i in (7,)) < s == max(sum(data[i].num_tokens for i in row) for row in rows)

    def test_a_batch_of_nothing_can_go_through_a_model(self):
        batch = make_batch([], [])
        assert batch.tokens.shape == batch.input_pos.shape == (1, 1)
        assert batch.mask.tolist() == [[[True]]]
        assert batch.num_pairs == batch.num_tokens == batch.targets.numel() == batch.lengths.numel() == 0

    def test_moves_as_a_whole(self):
        moved = make_batch(comparisons(2), [[0, 1]]).to("meta")
        assert {getattr(moved, name).device.type for name in ("tokens", "mask", "ends", "index")} == {"meta"}
        assert moved.num_pairs == 1


MODELS = {
    "plm": lambda: plm(
        50,
        attention=component("attention", "mla", kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
        ffn=component("ffn", "squared_relu", hidden_dim=32),
        embed_dim=16,
        num_layers=2,
        num_heads=2,
        max_seq_len=32,
        init_std=0.3,
    ),
    "llama": lambda: llama(
        50,
        attention=component("attention", "gqa", num_kv_heads=1),
        ffn=component("ffn", "swiglu", hidden_dim=32),
        embed_dim=16,
        num_layers=2,
        num_heads=2,
        max_seq_len=32,
        init_std=0.3,
    ),
}


class TestLogProbabilities:
    @pytest.mark.parametrize("name", MODELS)
    def test_packed_equal_those_of_each_sequence_alone(self, name):
        torch.manual_seed(0)
        model = MODELS[name]()
        data = [*comparisons(4, (DIRECT, GIVEN_CHOSEN, MISMATCHED)), *comparisons(1, (DIRECT,), seed=9)]
        data[-1] = Comparison(DIRECT, data[-1].prompt, None, data[-1].rejected, 4, "")
        found = torch.full((len(data), 2), torch.nan)
        with torch.no_grad():
            for batch in batches(data).all():
                assert batch.tokens.shape[1] > 32, "rows are longer than any sequence"
                hidden = model(batch.tokens, mask=batch.mask, input_pos=batch.input_pos, hidden=True).flatten(0, 1)
                logits = (hidden[batch.positions] @ model.head_weight.T).log_softmax(-1)
                each = logits.gather(1, batch.targets[:, None]).squeeze(1)
                sums = torch.zeros(batch.lengths.numel()).index_add(0, batch.completion, each)
                found[batch.index] = sums.view(-1, 2)
                for index, ends in zip(batch.index.tolist(), batch.ends.view(-1, 2), strict=True):
                    for side, answer in enumerate((data[index].chosen, data[index].rejected)):
                        ids = data[index].prompt if answer is None else np.concatenate([data[index].prompt, answer])
                        alone = model(torch.from_numpy(ids).long()[None], hidden=True)[0, -1]
                        torch.testing.assert_close(hidden[ends[side]], alone, atol=1e-5, rtol=1e-5)
            for index, held in enumerate(data):
                for side, answer in enumerate((held.chosen, held.rejected)):
                    expected = 0.0
                    if answer is not None:
                        ids = torch.from_numpy(np.concatenate([held.prompt, answer])).long()
                        logits = model(ids[None, :-1])[0].log_softmax(-1)
                        expected = logits.gather(1, ids[1:, None])[held.prompt.size - 1 :].sum().item()
                    assert found[index, side].item() == pytest.approx(expected, abs=1e-5, rel=1e-5)
