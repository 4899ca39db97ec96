"""A run's rounds: which prompts they take, and what they leave on the disk, with many processes too."""

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rule_engine import prompt

from plmtune.config.sections import ChatConfig, SelectionConfig
from plmtune.data.preferences import InMemory, Pair, Prompt
from plmtune.errors import UserError
from plmtune.preference.rounds import rounds as module
from plmtune.preference.rounds import selection
from plmtune.preference.rounds.chains import Chain, Turn
from plmtune.preference.rounds.rewards import Item
from plmtune.preference.rounds.rounds import Rounds, open_rounds
from plmtune.preference.rounds.rules import find_rules
from plmtune.tokenizers.message import Message
from plmtune.training import distributed


class Length:
    def score(self, items: Sequence[Item]) -> list[float]:
        return [float(len(text)) for _, text in items]


def rounds_of(prompts: Sequence[Prompt], *, holdout: float = 0.0, per_round: int = 0, reward: Any = None) -> Rounds:
    reward = reward or Length()
    return Rounds(prompts, holdout=holdout, per_round=per_round, reward=reward, rules=[], margin=0.0, seed=1)


def writing(*texts: str) -> Callable[..., list[Chain]]:
    """All prompts get the same answers, with their own text at the end."""

    def write(place: Path, prompts: Sequence[Prompt], number: int) -> list[Chain]:
        place.mkdir(parents=True, exist_ok=True)
        turns = [tuple(Turn(text and text + p.messages[-1].content, True) for text in texts) for p in prompts]
        return [Chain(p.messages, t, p.place, p.extra, p.gold) for p, t in zip(prompts, turns, strict=True)]

    return write


PROMPTS = [prompt("a" * (n + 1)) for n in range(7)]


class TestPrompts:
    def test_one_that_sources_share_is_there_once(self) -> None:
        pairs = [Pair((Message("user", "?" * (n + 1)),), "yes", "no", f"row {n}") for n in range(8)]
        sources = {"one": InMemory(pairs[:6], "one"), "two": InMemory(pairs[2:], "two")}
        found, notes = open_rounds(sources, ChatConfig(holdout=0.5), SelectionConfig([]), None, per_round=0, seed=1)
        assert not notes
        taken = [p.messages for p in found.prompts]
        assert len(taken) == len(set(taken)) == 4
        assert not {p.messages for p in found.held_out} & set(taken)

    def test_few_of_those_held_out_are_answered(self) -> None:
        prompts = [prompt("a" * (n + 1)) for n in range(200)]
        assert len(rounds_of(prompts, holdout=0.5).held_out) == 64
        assert len(rounds_of(prompts, holdout=0.5, per_round=10).held_out) == 10
        assert len(rounds_of(prompts, holdout=0.5).prompts) == 100


class TestPairs:
    def test_come_back_whatever_they_say(self, tmp_path: Path) -> None:
        prompts = [Prompt(p.messages, None, p.place, {"system": "of old", "question": "?"}) for p in PROMPTS]
        rounds = rounds_of(prompts)
        assert rounds.make_pairs(tmp_path, 1, writing("a", "Human: b\n\nHuman: c"), print)
        pairs = rounds.pairs(tmp_path, 1)
        assert len(pairs) == 7
        assert all(pair.chosen is not None and pair.chosen.startswith("Human: b\n\nHuman: c") for pair in pairs)

    def test_empty_answers_give_none_even_without_rules(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="has an empty answer"):
            rounds_of(PROMPTS).make_pairs(tmp_path, 1, writing("", "b"), print)

    def test_where_answers_were_cut_more_tokens_are_the_first_advice(self, tmp_path: Path) -> None:
        def cut(place: Path, prompts: Sequence[Prompt], number: int) -> list[Chain]:
            place.mkdir(parents=True, exist_ok=True)
            turns = (Turn("a", False), Turn("bb", False))
            return [Chain(p.messages, turns, p.place, p.extra, p.gold) for p in prompts]

        rounds = rounds_of(PROMPTS)
        rounds.rules = find_rules(["not_truncated"])
        advice = r"cut at generation.max_new_tokens.*\nA larger generation.max_new_tokens, other selection.rules"
        with pytest.raises(UserError, match=advice):
            rounds.make_pairs(tmp_path, 1, cut, print)


class TestEvaluation:
    def test_is_announced_and_says_of_how_many_it_is(self, tmp_path: Path) -> None:
        logged: list[str] = []
        rounds = rounds_of(PROMPTS, holdout=0.3)
        measured = rounds.evaluate(tmp_path, 1, writing("a", "bcd"), logged.append)
        assert measured is not None
        assert (measured["num"], measured["answered"]) == (2, 2)
        assert measured["refined"] == measured["direct"] + 2
        assert rounds.evaluate(tmp_path, 1, writing("changed"), logged.append) == measured
        rounds.evaluate(tmp_path, 0, writing("a"), logged.append)
        announced = [line for line in logged if line.startswith("evaluation")]
        assert announced == [
            "evaluation after round 1: 2 held-out prompts",
            "evaluation before round 1: 2 held-out prompts",
        ]

    def test_without_any_answer_is_empty(self, tmp_path: Path) -> None:
        logged: list[str] = []
        assert rounds_of(PROMPTS, holdout=0.3).evaluate(tmp_path, 1, writing(), logged.append) == {}
        assert logged[-1] == "evaluation: none of 2 held-out prompts could be answered"


class Group:
    """Threads in the place of processes: what `distributed` offers, between them."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size, self.barrier, self.mine = size, threading.Barrier(size, timeout=20), threading.local()
        self.said = [""] * size
        monkeypatch.setattr(distributed, "rank", lambda: self.mine.rank)
        monkeypatch.setattr(distributed, "world_size", lambda: size)
        monkeypatch.setattr(distributed, "gather_texts", self.gather)
        monkeypatch.setattr(distributed, "any_rank", lambda flag: "yes" in self.gather("yes" if flag else "no"))

    def gather(self, text: str) -> list[str]:
        self.said[self.mine.rank] = text
        self.barrier.wait()
        said = list(self.said)
        self.barrier.wait()
        return said

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What `work(rank)` gives on each, or raises."""
        results: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            self.mine.rank = rank
            try:
                results[rank] = work(rank)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class TestManyProcesses:
    @pytest.fixture
    def group(self, monkeypatch: pytest.MonkeyPatch) -> Group:
        return Group(3, monkeypatch)

    def test_each_judges_its_share_and_all_have_the_pairs_of_one(
        self, tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        judged: list[list[str]] = []

        class Listening(Length):
            def score(self, items: Sequence[Item]) -> list[float]:
                judged.append([text for _, text in items])
                return super().score(items)

        def work(rank: int) -> list[Pair]:
            rounds = rounds_of(PROMPTS, reward=Listening())
            assert rounds.make_pairs(tmp_path / "many", 1, writing("a", "bcd"), print)
            return rounds.pairs(tmp_path / "many", 1)

        found = group.run(work)
        assert sorted(map(len, judged)) == [4, 4, 6]
        monkeypatch.undo()
        alone = rounds_of(PROMPTS)
        alone.make_pairs(tmp_path / "one", 1, writing("a", "bcd"), print)
        for name in ("chains.jsonl", "pairs.jsonl"):
            one, many = (tmp_path / where / "rounds" / "01" / name for where in ("one", "many"))
            assert one.read_text() == many.read_text()
        assert all(len(pairs) == 7 and pairs == found[0] for pairs in found)

    def test_meanwhile_they_exchange_again_and_again(self, group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(selection, "POLL_SECONDS", 0.0)
        exchanges, enough = [0], threading.Event()
        gather = group.gather

        def counting(text: str) -> list[str]:
            exchanges[0] += 1
            if exchanges[0] > 30:
                enough.set()
            return gather(text)

        monkeypatch.setattr(distributed, "any_rank", lambda flag: "yes" in counting("yes" if flag else "no"))

        class Slow(Length):
            def score(self, items: Sequence[Item]) -> list[float]:
                assert enough.wait(20)
                return super().score(items)

        chains = writing("a", "b")(Path(), PROMPTS, 1)
        assert group.run(lambda rank: selection.score(chains, Slow()))[0] == selection_alone(chains)

    def test_what_one_cannot_judge_is_an_error_of_all(self, group: Group) -> None:
        class Picky(Length):
            def score(self, items: Sequence[Item]) -> list[float]:
                if any(chain.place.endswith(" 2") for chain, _ in items):
                    raise UserError("line 2 has no known answer")
                return super().score(items)

        chains = writing("a", "b")(Path(), PROMPTS, 1)
        assert [str(e) for e in group.run(lambda rank: selection.score(chains, Picky()))] == (
            ["line 2 has no known answer"] * 3
        )

    def test_rank_0_decides_what_is_done(self, tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
        place = module.round_directory(tmp_path, 1)
        (place / "evaluation").mkdir(parents=True)
        (place / "evaluation" / "evaluation.json").write_text(json.dumps({"direct": 1.0, "refined": 2.0, "num": 2}))
        (place / "pairs.jsonl").write_text("")
        is_file = Path.is_file
        monkeypatch.setattr(Path, "is_file", lambda path: group.mine.rank == 0 and is_file(path))
        rounds = rounds_of(PROMPTS, holdout=0.3)
        assert group.run(lambda rank: rounds.make_pairs(tmp_path, 1, writing("x"), print)) == [True] * 3
        logged = group.run(lambda rank: rounds.evaluate(tmp_path, 1, writing("x"), print))
        assert logged == [{"direct": 1.0, "refined": 2.0, "num": 2}] * 3


def selection_alone(chains: Sequence[Chain]) -> list[Chain]:
    return [
        Chain(c.prompt, tuple(Turn(t.text, t.ended, float(len(t.text))) for t in c.answers), c.place, c.extra, c.gold)
        for c in chains
    ]
