"""Rollouts: answers are refined turn by turn and journaled, and a kill changes no chain."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rule_engine import RuleEngine, prompt

from plmtune.config.sections import GenerationConfig
from plmtune.data.preferences import Prompt
from plmtune.errors import UserError
from plmtune.inference.batching import Answer, BatchedGenerator
from plmtune.models.llama import llama
from plmtune.preference.refinement import Refinement
from plmtune.preference.rounds.chains import Chain
from plmtune.preference.rounds.rollout import Requests, generate_chains
from plmtune.registry import component
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.training import distributed

PROMPTS = [prompt("a" * (n + 1), gold="g", tests=["x\u2028y"]) for n in range(7)]


def say(text: str, seed: int) -> str:
    return f"{text.count('Earlier')}.{text.count('a')}.{seed % 1000}"


class Killed(Exception):
    pass


class Round:
    """A round's settings in one place; `write` runs it with an engine of its own."""

    def __init__(self, directory: Path, template: ChatTemplate, refinement: Refinement) -> None:
        self.directory, self.template, self.refinement = directory, template, refinement
        self.engine: Any = None

    def write(
        self, prompts: list[Prompt] = PROMPTS, directory: str = "round", engine: Any = None, **changed: Any
    ) -> list[Chain] | None:
        self.engine = engine or RuleEngine(self.template, say)
        given: dict[str, Any] = {"max_len": 200, "seed": 1, "number": 1, "max_new_tokens": 16, "model": "m", **changed}
        rest = {name: given.pop(name) for name in ("model", "progress", "stop") if name in given}
        numbers = {name: given.pop(name) for name in ("max_len", "seed", "number")}
        given["stop"] = given.pop("until", [])
        asked = Requests(prompts, self.template, self.refinement, GenerationConfig(**given), **numbers)
        return generate_chains(self.directory / directory, asked, self.engine, **rest)

    def write_until(self, count: int, **changed: Any) -> None:
        """Killed after `count` answers, the next one torn."""

        def progress(done: int, total: int, rate: float) -> None:
            if self.engine.asked and len(self.engine.asked) == count:
                raise Killed

        with pytest.raises(Killed):
            self.write(progress=progress, **changed)
        with (self.directory / "round" / "answers-00000.jsonl").open("ab") as file:
            file.write(b'{"prompt": 0, "turn": 0, "te')


@pytest.fixture
def round_(tmp_path: Path, template: ChatTemplate, refinement: Refinement) -> Round:
    return Round(tmp_path, template, refinement)


class TestChain:
    def test_each_answer_is_asked_for_with_the_one_before(self, round_: Round) -> None:
        seen: list[str] = []

        def listen(text: str, seed: int) -> str:
            seen.append(text)
            return f"answer {len(seen)}"

        chains = round_.write([prompt("Why?")], engine=RuleEngine(round_.template, listen))
        assert chains is not None
        assert [turn.text for turn in chains[0].answers] == ["answer 1", "answer 2", "answer 3"]
        assert "Earlier" not in seen[0]
        assert "Why?\nEarlier: answer 1" in seen[1]
        assert "Why?\nEarlier: answer 2" in seen[2]

    def test_samples_all_answer_the_prompt_itself_by_other_seeds(self, round_: Round) -> None:
        chains = round_.write(mode="samples")
        assert chains is not None
        for chain in chains:
            assert {turn.text.split(".")[0] for turn in chain.answers} == {"0"}
            assert len({turn.text for turn in chain.answers}) == 3

    def test_order_is_that_of_the_prompts_and_rows_keep_what_they_held(self, round_: Round) -> None:
        chains = round_.write()
        assert chains is not None
        assert [chain.prompt for chain in chains] == [p.messages for p in PROMPTS]
        assert [(chain.place, chain.gold, chain.extra) for chain in chains] == [
            (p.place, p.gold, p.extra) for p in PROMPTS
        ]

    def test_an_answer_that_ran_out_of_tokens_is_not_ended(self, round_: Round) -> None:
        long = "one two three four five six"
        engine = RuleEngine(round_.template, lambda text, seed: long if "Earlier" in text else "short")
        chains = round_.write([prompt("Why?")], engine=engine, max_new_tokens=4)
        assert chains is not None
        assert [turn.ended for turn in chains[0].answers] == [True, False, False]

    def test_an_answer_ends_before_a_stop_string(self, round_: Round, monkeypatch: pytest.MonkeyPatch) -> None:
        engine, asked = RuleEngine(round_.template, lambda text, seed: "kept. STOP dropped"), []
        submit = engine.submit
        monkeypatch.setattr(engine, "submit", lambda request: asked.append(request.until) or submit(request))
        chains = round_.write([prompt("Why?")], engine=engine, until=["STOP", "never"], turns=2, max_new_tokens=40)
        assert chains is not None
        assert [turn.text for turn in chains[0].answers] == ["kept. "] * 2
        assert asked == [(b"STOP", b"never")] * 2

    def test_rounds_and_seeds_draw_differently(self, round_: Round) -> None:
        texts = [
            round_.write(directory=f"{seed}-{number}", seed=seed, number=number)
            for seed, number in ((1, 1), (1, 2), (2, 1))
        ]
        assert texts[0] != texts[1] != texts[2] != texts[0]


class TestRoom:
    def test_a_prompt_without_room_has_no_answers_and_says_why(self, round_: Round) -> None:
        chains = round_.write([prompt("word " * 300), prompt("Why?")])
        assert chains is not None
        assert (chains[0].answers, chains[0].short) == ((), "has a prompt of more than 184 tokens")
        assert len(chains[1].answers) == 3

    def test_an_earlier_answer_is_shortened_to_make_room(self, round_: Round) -> None:
        seen: list[str] = []

        def listen(text: str, seed: int) -> str:
            seen.append(text)
            return "one two three four five six seven eight nine ten"

        asked = len(round_.template.encode_prompt(round_.refinement.fill(prompt("Why?").messages, "one two three")))
        chains = round_.write(
            [prompt("Why?")], engine=RuleEngine(round_.template, listen), max_new_tokens=50, max_len=asked + 50
        )
        assert chains is not None
        assert len(chains[0].answers) == 3
        assert "Earlier: one two three<" in seen[1]

    def test_an_answer_with_a_special_token_ends_its_chain(self, round_: Round) -> None:
        engine = RuleEngine(round_.template, lambda text, seed: "so <|im_end|> it is")
        chains = round_.write([prompt("Why?")], engine=engine)
        assert chains is not None
        assert len(chains[0].answers) == 1
        assert "special token <|im_end|>" in str(chains[0].short)

    def test_impossible_numbers_are_refused(self, round_: Round) -> None:
        with pytest.raises(ValueError, match=r"max_new_tokens \(200\) leaves no room for a prompt in 200 tokens"):
            round_.write(max_new_tokens=200)


class TestKilled:
    @pytest.mark.parametrize("mode", ["chain", "samples"])
    @pytest.mark.parametrize("count", [1, 8, 20])
    def test_resumes_to_the_same_chains_and_repeats_no_answer(self, round_: Round, mode: str, count: int) -> None:
        whole = round_.write(directory="unkilled", mode=mode)
        asked = set(round_.engine.asked)
        round_.write_until(count, mode=mode)
        before = set(round_.engine.asked)
        chains = round_.write(mode=mode)
        assert chains == whole
        assert not before & set(round_.engine.asked)
        assert before | set(round_.engine.asked) == asked
        unkilled = (round_.directory / "unkilled" / "chains.jsonl").read_bytes()
        assert (round_.directory / "round" / "chains.jsonl").read_bytes() == unkilled

    def test_killed_again_and_again(self, round_: Round) -> None:
        whole = round_.write(directory="unkilled")
        for _ in range(6):
            round_.write_until(3)
        assert round_.write() == whole
        assert len(round_.engine.asked) == 21 - 18

    def test_a_round_that_is_whole_asks_nothing(self, round_: Round) -> None:
        whole = round_.write()
        assert round_.write() == whole
        assert not round_.engine.asked
        names = sorted(path.name for path in (round_.directory / "round").iterdir())
        assert names == ["chains.jsonl", "settings.json"]

    def test_chains_of_other_settings_are_refused_as_answers_are(self, round_: Round) -> None:
        round_.write()
        with pytest.raises(UserError, match=r"chains.jsonl holds answers of another round: its model is 'm', not 'n'"):
            round_.write(model="n")
        (round_.directory / "round" / "settings.json").write_text("{}")
        with pytest.raises(UserError, match=r"settings.json, .* cannot be read: it has no checksum"):
            round_.write()

    def test_answers_of_other_settings_are_refused(self, round_: Round) -> None:
        round_.write_until(3)
        with pytest.raises(UserError, match="answers of another round: its model is 'm', not 'n'"):
            round_.write(model="n")
        with pytest.raises(UserError, match="its prompts is"):
            round_.write(PROMPTS[:3])

    def test_a_damaged_answer_is_named(self, round_: Round) -> None:
        round_.write_until(3)
        path = round_.directory / "round" / "answers-00000.jsonl"
        lines = path.read_text().split("\n")
        path.write_text("\n".join([lines[0], "{", *lines[2:]]))
        with pytest.raises(UserError, match=r"answers-00000.jsonl, row 2: damaged .* Remove this row"):
            round_.write()

    def test_resumes_after_a_stop(self, round_: Round, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("plmtune.preference.rounds.rollout.POLL_SECONDS", 0.0)
        asked: list[bool] = []

        def stop() -> bool:
            asked.append(True)
            return len(asked) == 5

        assert round_.write(stop=stop) is None
        assert len(round_.engine.asked) == 5
        assert round_.write() == round_.write(directory="unkilled")

    def test_more_processes_resume_the_round_of_one(self, round_: Round, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = round_.write(directory="unkilled")
        round_.write_until(9)
        before = set(round_.engine.asked)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        for rank in (1, 0):  # rank 0 puts together what all wrote
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            if rank:
                with pytest.raises(FileNotFoundError):
                    round_.write()  # nobody has put it together
            else:
                assert round_.write() == whole
            assert {int(key.split("/")[0]) % 2 for key in round_.engine.asked} <= {rank}
            assert not before & set(round_.engine.asked)
            before |= set(round_.engine.asked)
        assert len(before) == 21


class TestProgress:
    def test_counts_this_run_and_what_was_there(self, round_: Round) -> None:
        round_.write_until(5)
        seen: list[tuple[int, int]] = []
        round_.write(progress=lambda done, total, rate: seen.append((done, total)))
        assert seen[0] == (6, 21)
        assert seen[-1] == (21, 21)


class TestRealEngine:
    def test_a_killed_round_of_a_model_ends_as_an_unkilled_one(self, round_: Round) -> None:
        torch.manual_seed(0)
        model = llama(
            round_.template.tokenizer.vocab_size,
            attention=component("attention", "gqa", num_kv_heads=1),
            ffn=component("ffn", "swiglu", hidden_dim=32),
            embed_dim=16,
            num_layers=1,
            num_heads=2,
            max_seq_len=200,
        )

        class Counting(BatchedGenerator):
            def __init__(self) -> None:
                super().__init__(
                    model,
                    batch_size=3,
                    end_ids=[round_.template.end_id],
                    num_tokens=round_.template.tokenizer.num_tokens,
                )
                self.asked: list[str] = []

            def run(self) -> Iterator[Answer]:
                for answer in super().run():
                    self.asked.append(answer.key)
                    yield answer

        whole = round_.write(directory="unkilled", engine=Counting(), max_new_tokens=8)
        round_.write_until(7, engine=Counting(), max_new_tokens=8)
        before = set(round_.engine.asked)
        assert round_.write(engine=Counting(), max_new_tokens=8) == whole
        assert not before & set(round_.engine.asked)
