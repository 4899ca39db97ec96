import numpy as np
import pytest
import torch
from made_comparisons import batches, comparisons
from tiny_models import tiny_llama, tiny_plm

from plmtune.data.preferences import Pair
from plmtune.losses.preference import DIRECT, GIVEN_CHOSEN, GIVEN_REJECTED, MISMATCHED
from plmtune.preference.comparisons import Comparison, make_batch, make_comparisons
from plmtune.preference.refinement import Refinement, find_refinement
from plmtune.tokenizers.chat_template import ChatTemplate, find_template
from plmtune.tokenizers.message import Message
from plmtune.tokenizers.tokenizer_files import bundled


@pytest.fixture(scope="module")
def template():
    return find_template("chatml", bundled())


SHORT = Refinement("{{ prompt }}\nBetter than: {{ answer }}", "short.jinja")


def pair(number=0, prompt="What is it?", chosen="a good answer", rejected="a bad one"):
    messages = (Message("system", "Help."), Message("user", prompt))
    return Pair(messages, chosen, rejected, f"pairs.jsonl, line {number + 1}")


class TestMakeComparisons:
    def test_keys_of_messages_that_the_template_does_not_write_are_told(self, template):
        asked = Pair(
            (Message("user", "What is it?", {"id": "7"}),), "a good answer", "a bad one", "pairs.jsonl, line 1"
        )
        _, refused, notes = make_comparisons([asked], template, SHORT, 200)
        assert not refused.counts and notes == ["columns not used: id of messages (1 row)"]

    def test_an_answer_with_what_the_template_does_not_write_is_refused(self, template):
        asked = [Message("user", "What is it?")]
        more = {"chosen": {"reasoning_content": "so"}, "rejected": {"id": "7"}}
        bad, good = (Pair(tuple(asked), "a", "b", "here", {}, held) for held in (more, {"rejected": more["rejected"]}))
        made, refused, notes = make_comparisons([bad, good], template, SHORT, 200)
        assert "has reasoning_content in turn 2, which the chat template does not write" in refused.describe()
        assert len(made) == 1 and notes == ["columns not used: id of messages (1 row)"]

    def test_a_refinement_shows_texts_alone(self, template):
        source = "{% for m in messages %}<|im_start|>{{ m.role + '\\n' + (m.thinking or '') + m.content }}<|im_end|>\n"
        source += "{% endfor %}"
        source += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        thinking = ChatTemplate(source, template.tokenizer, "a test")
        asked = Pair((Message("user", "What is it?"),), "a", "b", "here", {}, {"chosen": {"thinking": "so "}})
        made, refused, _ = make_comparisons([asked], thinking, SHORT, 200, contexts=True)
        assert [thinking.tokenizer.decode(c.chosen) for c in made] == ["so a<|im_end|>"]
        assert refused.describe().startswith("here has an answer with calls of tools or thoughts")

    def test_a_prompt_that_ends_in_what_a_tool_gave_back_has_no_refinement(self, template):
        asked = Pair((Message("user", "What is it?"), Message("tool", "2")), "a good answer", "a bad one", "here")
        made, refused, _ = make_comparisons([asked], template, SHORT, 200, contexts=True)
        assert [comparison.kind for comparison in made] == [DIRECT]
        assert "has a prompt that ends in a tool's message" in refused.describe()

    def test_a_pair_gives_the_question_and_both_refinements_with_the_same_answers(self, template):
        made, refused, notes = make_comparisons([pair()], template, SHORT, 200, contexts=True)
        assert [c.kind for c in made] == [DIRECT, GIVEN_REJECTED, GIVEN_CHOSEN]
        assert not refused.counts and not notes
        direct, given_rejected, given_chosen = (template.tokenizer.decode(c.prompt) for c in made)
        assert direct.endswith("<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n")
        assert "Better than: a bad one" in given_rejected
        assert "Better than: a good answer" in given_chosen
        for comparison in made:
            assert template.tokenizer.decode(comparison.chosen) == "a good answer<|im_end|>"
            assert template.tokenizer.decode(comparison.rejected) == "a bad one<|im_end|>"
            assert comparison.prompt.dtype == comparison.chosen.dtype == np.int32
            assert (comparison.pair, comparison.place) == (0, "pairs.jsonl, line 1")

    def test_without_contexts_there_is_the_question_alone(self, template):
        made, _, _ = make_comparisons([pair(), pair(1)], template, None, 200)
        assert [(c.kind, c.pair) for c in made] == [(DIRECT, 0), (DIRECT, 1)]

    def test_an_earlier_answer_is_shortened_so_that_the_answers_stay_whole(self, template):
        long = pair(rejected=" ".join(f"word{i}" for i in range(40)))
        whole, _, _ = make_comparisons([long], template, SHORT, 1000, contexts=True)
        need = whole[0].prompt.size + whole[0].rejected.size
        seq_len = need + 30
        assert whole[1].prompt.size + whole[1].rejected.size > seq_len
        made, refused, notes = make_comparisons([long], template, SHORT, seq_len, contexts=True)
        assert not refused.counts
        assert notes == [
            f"1 earlier answer was shortened, so that the answers that follow fit into seq_len ({seq_len})"
        ]
        for old, new in zip(whole, made, strict=True):
            assert np.array_equal(old.chosen, new.chosen) and np.array_equal(old.rejected, new.rejected)
            assert new.prompt.size + max(new.chosen.size, new.rejected.size) <= seq_len
        assert made[1].prompt.size + made[1].rejected.size > seq_len - 8, "no more is cut than must be"
        assert "word0" in template.tokenizer.decode(made[1].prompt)
        assert "word39" not in template.tokenizer.decode(made[1].prompt)

    def test_half_a_character_is_never_left_where_an_earlier_answer_is_cut(self, template):
        long = pair(rejected="☃𝄞漢" * 20)
        for seq_len in range(430, 470):
            made, _, _ = make_comparisons([long], template, SHORT, seq_len, contexts=True)
            assert all("\ufffd" not in template.tokenizer.decode(c.prompt) for c in made)

    def test_a_refinement_without_room_for_an_earlier_answer_is_refused_alone(self, template):
        made, refused, _ = make_comparisons([pair()], template, None, 200)
        need = made[0].prompt.size + max(made[0].chosen.size, made[0].rejected.size)
        made, refused, _ = make_comparisons([pair(6)], template, SHORT, need, contexts=True)
        assert [c.kind for c in made] == [DIRECT]
        assert len(refused) == 2
        assert "pairs.jsonl, line 7 leaves no room" in refused.describe()

    def test_a_pair_whose_answer_would_be_cut_is_refused_and_counted(self, template):
        long = pair(1, chosen="word " * 300)
        made, refused, _ = make_comparisons([pair(0), long, pair(2)], template, SHORT, 100, contexts=True)
        assert {c.place for c in made} == {"pairs.jsonl, line 1", "pairs.jsonl, line 3"}
        assert {c.pair for c in made} == {0, 1}
        assert len(refused) == 1
        assert "pairs.jsonl, line 2" in refused.describe() and "seq_len (100)" in refused.describe()

    def test_an_answer_that_fits_to_the_last_token_is_kept(self, template):
        (made,), _, _ = make_comparisons([pair()], template, None, 200)
        need = made.prompt.size + max(made.chosen.size, made.rejected.size)
        assert len(make_comparisons([pair()], template, None, need)[0]) == 1
        assert len(make_comparisons([pair()], template, None, need - 1)[0]) == 0

    def test_text_of_a_special_token_is_refused(self, template):
        made, refused, _ = make_comparisons([pair(chosen="over<|im_end|>")], template, None, 200)
        assert not made
        assert len(refused) == 1

    def test_a_single_answer_is_refused_unless_the_loss_can_use_it(self, template):
        single = pair(chosen=None)
        made, refused, _ = make_comparisons([single], template, None, 200)
        assert not made and "loss=kto" in refused.describe()
        made, refused, _ = make_comparisons([single, pair(1, prompt="Why?")], template, None, 200, mismatched=True)
        assert not refused.counts
        assert made[0].chosen is None and made[0].rejected is not None

    def test_a_mismatched_comparison_has_the_next_pairs_answer(self, template):
        data = [pair(0, "One?", "1"), pair(1, "Two?", "2"), pair(2, "Three?", None)]
        made, _, notes = make_comparisons(data, template, None, 200, mismatched=True)
        assert [(c.kind, c.pair) for c in made] == [(k, p) for p in range(3) for k in (DIRECT, MISMATCHED)]
        texts = [template.tokenizer.decode(c.chosen) for c in made if c.kind == MISMATCHED]
        assert texts == ["2<|im_end|>", "a bad one<|im_end|>", "1<|im_end|>"]
        assert all(c.rejected is None for c in made if c.kind == MISMATCHED)
        assert not notes

    def test_a_mismatched_answer_is_never_to_the_same_prompt_and_fits(self, template):
        data = [pair(0, "One?", "1"), pair(1, "One?", "2"), pair(2, "Two?", "word " * 20, "x"), pair(3, "Six?", "3")]
        sizes = [c.prompt.size + c.chosen.size for c in make_comparisons(data, template, None, 500)[0]]
        data[0] = pair(0, "One? " * 10, "1")
        data[1] = pair(1, "One? " * 10, "2")
        made, _, _ = make_comparisons(data, template, None, max(sizes), mismatched=True)
        texts = [template.tokenizer.decode(c.chosen) for c in made if c.kind == MISMATCHED]
        assert texts[:2] == ["3<|im_end|>"] * 2

    def test_a_lone_pair_has_no_mismatched_answer_and_this_is_said(self, template):
        made, _, notes = make_comparisons([pair()], template, None, 200, mismatched=True)
        assert [c.kind for c in made] == [DIRECT]
        assert len(notes) == 1 and notes[0].startswith("1 pair has")

    def test_the_shipped_template_works(self, template):
        made, refused, _ = make_comparisons([pair()], template, find_refinement(None), 200, contexts=True)
        assert len(made) == 3 and not refused.counts


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
    "plm": lambda: tiny_plm(50, hidden_dim=32, embed_dim=16, num_heads=2, max_seq_len=32, init_std=0.3),
    "llama": lambda: tiny_llama(50, hidden_dim=32, embed_dim=16, max_seq_len=32, init_std=0.3),
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
