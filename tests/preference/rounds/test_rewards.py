"""Numbers that say how good an answer is."""

from pathlib import Path

import pytest
import torch

from plmtune.errors import UserError
from plmtune.models.hf import save_model
from plmtune.models.llama import llama
from plmtune.preference.rounds.chains import Chain
from plmtune.preference.rounds.rewards import overlap
from plmtune.registry import component, load
from plmtune.tokenizers.message import Message
from plmtune.tokenizers.tokenizer_files import bundled


def chain(gold: str | None = None, **extra: object) -> Chain:
    return Chain((Message("user", "How many?"),), (), "x.jsonl, line 3", extra, gold)


class TestFinalNumber:
    def test_right_is_one_and_wrong_is_zero(self) -> None:
        known = chain("so\n#### 1,000")
        items = [(known, "#### 1000."), (known, "#### 100"), (known, "1000")]
        assert load("reward", "final_number")().score(items) == [1.0, 0.0, 0.0]

    def test_a_prompt_without_known_number_is_named(self) -> None:
        with pytest.raises(UserError, match=r"x.jsonl, line 3 has no known answer that ends in ####"):
            load("reward", "final_number")().score([(chain("18"), "#### 18")])


class TestOverlap:
    def test_equals_f1_of_words_written_out(self) -> None:
        ours, gold = "The cat sat on the mat", "the cat ate the rat"  # common: the, the, cat
        precision, recall = 3 / 6, 3 / 5
        assert overlap(ours, gold) == pytest.approx(2 * precision * recall / (precision + recall))
        assert load("reward", "overlap")().score([(chain(gold), ours), (chain(gold), "")]) == [overlap(ours, gold), 0.0]

    def test_signs_of_chinese_count_one_by_one(self) -> None:
        assert overlap("你好", "你们") == 0.5

    def test_a_prompt_without_known_answer_is_named(self) -> None:
        with pytest.raises(UserError, match=r"x.jsonl, line 3 has no known answer"):
            load("reward", "overlap")().score([(chain(), "a")])


class TestTestsPass:
    @pytest.mark.usefixtures("sandbox")
    def test_code_that_passes_is_one(self) -> None:
        row = chain(tests=["assert f() == 1"])
        items = [(row, "def f(): return 1"), (row, "def f(): return 2"), (row, "```py\nf = lambda: 1\n```"), (row, "?")]
        assert load("reward", "tests_pass")().score(items) == [1.0, 0.0, 1.0, 0.0]

    def test_a_row_without_tests_is_named(self) -> None:
        with pytest.raises(UserError, match=r"x.jsonl, line 3 has no tests"):
            load("reward", "tests_pass")().score([(chain(), "a")])
        never = chain(tests="def check(f):\n    assert f(2) == 4\n")
        with pytest.raises(UserError, match=r"line 3 has tests that never run: they define check and call nothing"):
            load("reward", "tests_pass")().score([(never, "a")])

    def test_no_time_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"seconds \(0\) must be above 0"):
            load("reward", "tests_pass")(seconds=0)


class TestRewardModel:
    @pytest.fixture(scope="class")
    def saved(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        directory = tmp_path_factory.mktemp("reward")
        torch.manual_seed(0)
        tokenizer = bundled()
        model = llama(
            tokenizer.vocab_size,
            attention=component("attention", "gqa", num_kv_heads=1),
            ffn=component("ffn", "swiglu", hidden_dim=32),
            embed_dim=16,
            num_layers=1,
            num_heads=2,
            max_seq_len=64,
        )
        model.add_score_head()
        torch.nn.init.normal_(model.score.weight)
        save_model(model, model.config, directory)
        tokenizer.save(directory)
        return directory

    def test_scores_are_those_of_each_text_alone(self, saved: Path) -> None:
        texts = ["Three.", "I think that there may be four or five of them.", "", "Three."]
        items = [(chain(), text) for text in texts]
        judge = load("reward", "reward_model")(str(saved), batch_size=3, template="chatml")
        together = judge.score(items)
        assert together == pytest.approx([judge.score([item])[0] for item in items], rel=1e-5)
        assert together[0] == pytest.approx(together[3], rel=1e-5)
        assert len({round(score, 4) for score in together}) == 3

    def test_an_answer_with_a_special_token_counts_as_empty(self, saved: Path) -> None:
        judge = load("reward", "reward_model")(str(saved))
        scores = judge.score([(chain(), "a <|im_end|> b"), (chain(), "")])
        assert scores[0] == pytest.approx(scores[1])

    def test_a_text_that_is_too_long_is_named(self, saved: Path) -> None:
        with pytest.raises(UserError, match=r"x.jsonl, line 3 with an answer has .* tokens, and .* reads 64"):
            load("reward", "reward_model")(str(saved)).score([(chain(), "word " * 99)])

    def test_no_path_is_refused(self) -> None:
        with pytest.raises(ValueError, match="path is empty"):
            load("reward", "reward_model")()
