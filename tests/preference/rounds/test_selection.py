"""From chains to pairs, and from chains to means."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from plmtune.data.preferences import preferences
from plmtune.preference.rounds.chains import Chain, Turn
from plmtune.preference.rounds.rewards import Item
from plmtune.preference.rounds.rules import find_rules
from plmtune.preference.rounds.selection import evaluate, save_pairs, score, select
from plmtune.tokenizers.message import Message


def chain(*texts: str, rewards: Sequence[float | None] = (), place: str = "x, row 1") -> Chain:
    given = rewards or [None] * len(texts)
    turns = tuple(Turn(text, True, reward) for text, reward in zip(texts, given, strict=True))
    return Chain((Message("user", "?"),), turns, place, {"id": 7})


class TestByReward:
    def test_best_is_preferred_to_worst(self) -> None:
        (pair,), refused = select([chain("a", "b", "c", rewards=[0.5, 0.9, 0.1])], [], by_reward=True)
        assert (pair.chosen, pair.rejected, pair.place, pair.extra) == ("b", "c", "x, row 1", {"id": 7})
        assert not refused.counts

    def test_of_equals_the_later_is_best_and_the_earlier_is_worst(self) -> None:
        (pair,), _ = select([chain("a", "b", "c", "d", rewards=[0, 0, 1, 1])], [], by_reward=True)
        assert (pair.chosen, pair.rejected) == ("d", "a")

    def test_small_differences_give_no_pair(self) -> None:
        chains = [chain("a", "b", rewards=[0.0, d], place=f"row {d}") for d in (0.0, 0.25, 0.5)]
        pairs, refused = select(chains, [], margin=0.25, by_reward=True)
        assert [pair.place for pair in pairs] == ["row 0.5"]
        assert refused.counts == {"has answers whose rewards differ by no more than 0.25": 2}

    def test_each_answer_gets_its_own_reward(self) -> None:
        class Length:
            def score(self, items: Sequence[Item]) -> list[float]:
                return [float(len(text)) for _, text in items]

        scored = score([chain("a", "bbb"), replace(chain("cc"), answers=()), chain("dd", "")], Length())
        assert [[turn.reward for turn in c.answers] for c in scored] == [[1.0, 3.0], [], [2.0, 0.0]]

    @pytest.mark.parametrize("texts", [(" ", "b"), ("a", "\n")])
    def test_an_empty_answer_is_in_no_pair_without_rules_too(self, texts: tuple[str, str]) -> None:
        pairs, refused = select([chain(*texts, rewards=[0, 1])], [], by_reward=True)
        assert (pairs, refused.counts) == ([], {"has an empty answer": 1})


class TestByRules:
    def test_last_refinement_is_preferred_to_first_answer(self) -> None:
        (pair,), _ = select([chain("a", "b", "c")], [], by_reward=False)
        assert (pair.chosen, pair.rejected) == ("c", "a")

    def test_each_reason_is_counted_with_its_first_place(self) -> None:
        chains = [
            chain("a", "b", "c", place="row 1"),
            chain("a", "b", " a", place="row 2"),
            chain("a", place="row 3"),
            replace(chain("a", place="row 4"), short="has no room"),
            chain("a", "b", "", place="row 5"),
            chain("", "a", place="row 6"),
        ]
        pairs, refused = select(chains, find_rules(["not_empty", "not_truncated"]), by_reward=False)
        assert [pair.place for pair in pairs] == ["row 1"]
        assert refused.counts == {
            "has a chosen answer that equals the rejected one": 1,
            "has fewer than two answers": 1,
            "has no room": 1,
            "has an empty answer": 2,
        }
        assert refused.first["has an empty answer"] == "row 5"


class TestEvaluate:
    def test_direct_and_refined_are_told_apart(self) -> None:
        chains = [chain("a", "b", "c", rewards=[0, 0.5, 1]), chain("a", "b", "c", rewards=[0.5, 0, 0.5])]
        expected = {
            "direct": 0.25,
            "refined": 0.75,
            "turn/1": 0.25,
            "turn/2": 0.25,
            "turn/3": 0.75,
            "num": 2,
            "answered": 2,
        }
        assert evaluate(chains) == expected

    def test_all_means_are_of_the_same_prompts(self) -> None:
        means = evaluate([chain("a", "b", rewards=[0, 1]), chain("a", rewards=[1])])
        assert means == {"direct": 0, "refined": 1, "turn/1": 0, "turn/2": 1, "num": 2, "answered": 1}

    def test_nothing_has_no_mean(self) -> None:
        assert evaluate([]) == {"num": 0, "answered": 0}
        assert evaluate([chain()]) == {"num": 1, "answered": 0}


class TestFile:
    def test_pairs_are_read_back_as_preferences(self, tmp_path: Path) -> None:
        talk = (Message("system", "Be brief."), Message("user", "?"), Message("assistant", "!"), Message("user", "为?"))
        pairs, _ = select([replace(chain("a", "b\u2028c"), prompt=talk), chain("d", "e")], [], by_reward=False)
        save_pairs(tmp_path / "pairs.jsonl", pairs)
        back = list(preferences((str(tmp_path / "pairs.jsonl"),)).pairs())
        assert [replace(pair, place="") for pair in back] == [replace(pair, place="") for pair in pairs]

    def test_a_write_that_fails_leaves_what_was_there(self, tmp_path: Path) -> None:
        path = tmp_path / "pairs.jsonl"
        pairs, _ = select([chain("a", "b")], [], by_reward=False)
        save_pairs(path, pairs)
        before = path.read_bytes()
        with pytest.raises(TypeError):
            save_pairs(path, [pairs[0], replace(pairs[0], extra={"id": object()})])
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["pairs.jsonl"]
