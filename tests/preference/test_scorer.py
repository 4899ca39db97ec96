"""What a batch of comparisons tells a loss and a person."""

import pytest
import torch

from plmtune.losses.dpo import Dpo
from plmtune.losses.preference import DIRECT, GIVEN_CHOSEN, GIVEN_REJECTED, Comparisons
from plmtune.preference.scorer import PreferenceMetrics
from plmtune.training.runtime import Runtime


def compared(kind: list[int], chosen: list[float], rejected: list[float], rejected_tokens: list[int]) -> Comparisons:
    n = len(kind)
    return Comparisons(
        chosen=torch.tensor(chosen),
        rejected=torch.tensor(rejected),
        reference_chosen=torch.zeros(n),
        reference_rejected=torch.zeros(n),
        chosen_tokens=torch.ones(n, dtype=torch.long),
        rejected_tokens=torch.tensor(rejected_tokens),
        kind=torch.tensor(kind),
        kl=torch.zeros(()),
    )


class TestTally:
    def test_means_are_of_each_context_apart_and_over_batches(self) -> None:
        tally, loss = PreferenceMetrics(torch.device("cpu")), Dpo(beta=0.5)
        tally.add(compared([DIRECT, GIVEN_REJECTED], [3.0, 1.0], [1.0, 4.0], [1, 1]), loss)
        tally.add(compared([DIRECT], [0.0], [4.0], [1]), loss)
        with Runtime.choose(device="cpu").start() as runtime:
            means = tally.means(runtime)
        assert means["logratio_margin"] == pytest.approx((2 - 4) / 2)
        assert means["accuracy"] == 0.5
        assert means["margin"] == pytest.approx(0.5 * (2 - 4) / 2)
        assert means["given_rejected/logratio_margin"] == pytest.approx(-3)
        assert means["given_rejected/accuracy"] == 0
        assert not [name for name in means if name.startswith("given_chosen")]

    def test_rewards_and_log_probabilities_are_means_over_the_answers_that_there_are(self) -> None:
        tally = PreferenceMetrics(torch.device("cpu"))
        tally.add(compared([DIRECT, DIRECT], [3.0, 1.0], [1.0, 0.0], [1, 0]), Dpo(beta=0.5))
        with Runtime.choose(device="cpu").start() as runtime:
            means, scores = tally.means(runtime), tally.means(runtime, scores=True)
        assert means["log_probs/chosen"] == 2.0 and means["log_probs/rejected"] == 1.0
        assert means["rewards/chosen"] == 1.0 and means["rewards/rejected"] == 0.5
        assert means["margin"] == 1.0  # of the one comparison with two answers
        assert set(means) - set(scores) == {"log_probs/chosen", "log_probs/rejected"}

    def test_a_row_with_one_answer_has_nothing_to_compare(self) -> None:
        tally = PreferenceMetrics(torch.device("cpu"))
        tally.add(compared([DIRECT, GIVEN_CHOSEN], [3.0, 1.0], [0.0, 0.0], [0, 1]), Dpo())
        with Runtime.choose(device="cpu").start() as runtime:
            means = tally.means(runtime)
        answers = {"rewards/chosen", "log_probs/chosen"}
        both = {"logratio_margin", "accuracy", "margin", "rewards/rejected", "log_probs/rejected"}
        assert set(means) == answers | {f"given_chosen/{name}" for name in answers | both}
