"""Every kind of model under every layout of two, four and eight processes; checkpoints from eight to four and one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from group import in_group
from kinds import CASES, KINDS, LAYOUTS, chain, differences, files, learn, matrix, merged, start

pytestmark = pytest.mark.slow

EIGHT = ["pp2 x fsdp2 x tp2", "pp2 x fsdp2 x tp2 interleaved_1f1b", "pp2 x fsdp2 x tp2 zbv", "hsdp2x2 x tp2"]
FOUR = ["tp4", "pp4 1f1b", "fsdp2 x tp2"]
TIED = [kind for kind in CASES if kind in ("mla", "pangu_alpha")]  # with as many key heads as tp4 needs


def case_of(layout: str, kinds: list[str]) -> list[str]:
    return [kind for kind in kinds if layout != "tp4" or kind in TIED]


def eight(directory: Path) -> dict[str, Any]:
    found = chain(list(CASES), EIGHT, directory)
    start(EIGHT[0]).close()
    return found


def four(directory: Path) -> dict[str, Any]:
    found = {}
    for layout in FOUR:
        for kind in case_of(layout, list(CASES)):
            reads = directory / f"{kind} of {EIGHT[0]}"
            visited = CASES[kind].visit(kind, layout, reads, directory / f"{kind} of {layout}")
            found[f"{layout} / {kind}"] = visited
    start(FOUR[0]).close()
    return found


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return {kind: learn(kind, start(None)) for kind in KINDS}


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_losses_norms_gradients_and_sizes(processes: int, one: dict[str, Any], tmp_path: Path) -> None:
    ranks = in_group(matrix, processes, tmp_path)
    assert {case.partition(" / ")[0] for case in ranks[0]} == {
        name for name, sizes in LAYOUTS.items() if sizes.asked == processes
    }
    for case in ranks[0]:
        kind = case.partition(" / ")[2]
        found = differences([rank[case] for rank in ranks], one[kind])
        assert found["losses"] < 1e-6, case
        assert found["norms"] < 3e-6, case
        assert found["gradients"] < 1e-6, case
        assert {name for rank in ranks for name in rank[case]["gradients"]} == one[kind]["gradients"].keys(), case
        for rank in ranks:
            held, predicted = rank[case]["held"]
            assert held == predicted, case


class TestCheckpointsOfEight:
    @pytest.fixture(scope="class")
    def directory(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("eight")

    @pytest.fixture(scope="class")
    def visits(self, directory: Path) -> dict[str, list[dict[str, Any]]]:
        """By "layout / kind" what each process found."""
        groups = [in_group(eight, 8, directory), in_group(four, 4, directory)]
        found = {case: [rank[case] for rank in ranks] for ranks in groups for case in ranks[0]}
        for kind in CASES:
            reads = directory / f"{kind} of {EIGHT[0]}"
            found[f"one / {kind}"] = [CASES[kind].visit(kind, None, reads, directory / f"{kind} of one")]
        return found

    @pytest.mark.parametrize("kind", CASES)
    def test_are_bit_equal_under_every_layout_and_go_on_with_equal_losses(self, visits, directory, kind):
        first = merged([rank["digests"] for rank in visits[f"{EIGHT[0]} / {kind}"]])
        losses = pytest.approx(visits[f"one / {kind}"][0]["losses"], rel=1e-6)
        written = files(directory / f"{kind} of {EIGHT[0]}")
        for case, ranks in visits.items():
            layout, _, of = case.partition(" / ")
            if of == kind:
                assert merged([rank["digests"] for rank in ranks]) == first, case
                assert files(directory / f"{kind} of {layout}") == written, case
                assert all(rank["losses"] == losses for rank in ranks), case
