"""Two processes under tensor, pipeline and context parallelism compute what one does; one pair has all cases.

test_many_processes.py has every kind under every layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from group import in_group
from kinds import CASES, chain, differences, files, learn, merged, start

TRAINED = {
    "tp2": ["mla", "gqa", "pangu_alpha"],
    "pp2 1f1b": ["pangu_alpha"],
    "pp2 interleaved_1f1b": ["values, siaf"],
    "pp2 zbv": ["mla"],
    "cp2": ["mla", "pangu_alpha"],
}
ALL = [f"{layout} / {kind}" for layout, kinds in TRAINED.items() for kind in kinds]
SAVED = "values, siaf"
READERS = ["pp2 zbv", "tp2"]
WRITER = "pp2 interleaved_1f1b"


def two(directory: Path) -> dict[str, Any]:
    found = {f"{layout} / {kind}": learn(kind, start(layout)) for layout, kinds in TRAINED.items() for kind in kinds}
    found["chain"] = chain([SAVED], [WRITER, *READERS], directory)
    start("tp2").close()
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def ranks(directory: Path) -> list[dict[str, Any]]:
    return in_group(two, 2, directory)


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return {kind: learn(kind, start(None)) for kind in {kind for kinds in TRAINED.values() for kind in kinds}}


@pytest.fixture(scope="module")
def alone(ranks: list[dict[str, Any]], directory: Path) -> dict[str, Any]:
    """What one process finds in the checkpoint of two."""
    return CASES[SAVED].visit(SAVED, None, directory / f"{SAVED} of {WRITER}", directory / "one")


class TestTraining:
    @pytest.mark.parametrize("case", ALL)
    def test_losses_norms_and_gradients_of_three_steps_are_those_of_one_process(self, ranks, one, case):
        found = differences([rank[case] for rank in ranks], one[case.partition(" / ")[2]])
        assert found["losses"] < 1e-6
        assert found["norms"] < 3e-6
        assert found["gradients"] < 1e-6

    @pytest.mark.parametrize("case", ALL)
    def test_every_gradient_is_on_a_process(self, ranks, one, case):
        held = {name for rank in ranks for name in rank[case]["gradients"]}
        assert held == one[case.partition(" / ")[2]]["gradients"].keys()

    @pytest.mark.parametrize("case", ALL)
    def test_a_process_holds_as_many_numbers_as_predicted(self, ranks, case):
        for rank in ranks:
            held, predicted = rank[case]["held"]
            assert held == predicted


class TestCheckpoints:
    def found(self, ranks, layout):
        return merged([rank["chain"][f"{layout} / {SAVED}"]["digests"] for rank in ranks])

    @pytest.mark.parametrize("reader", READERS)
    def test_weights_moments_and_averages_are_bit_equal_under_another_layout(self, ranks, reader):
        assert self.found(ranks, reader) == self.found(ranks, WRITER)

    def test_and_on_one_process(self, ranks, alone):
        assert alone["digests"] == self.found(ranks, WRITER)

    @pytest.mark.parametrize("reader", READERS)
    def test_saved_again_the_files_are_byte_equal(self, ranks, directory, reader):
        assert files(directory / f"{SAVED} of {reader}") == files(directory / f"{SAVED} of {WRITER}")

    def test_as_are_those_of_one_process(self, alone, directory):
        written = files(directory / f"{SAVED} of {WRITER}")
        assert len(written) > 20
        assert files(directory / "one") == written

    def test_training_goes_on_with_the_losses_of_one_process(self, ranks, alone):
        for layout in (WRITER, *READERS):
            for rank in ranks:
                losses = rank["chain"][f"{layout} / {SAVED}"]["losses"]
                assert losses == pytest.approx(alone["losses"], rel=1e-6)
