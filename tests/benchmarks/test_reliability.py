"""The trials of benchmarks/reliability.py, each a few times; and they notice what they look for."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from trials import damage, disks, saves, stops  # noqa: E402
from trials.place import Place, differing, outcome, torn  # noqa: E402
from trials.tally import Tally, table  # noqa: E402


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    yield Place(tmp_path_factory.mktemp("reliability") / "place")


@pytest.fixture
def generator() -> random.Random:
    return random.Random(1)


def passed(tally: Tally) -> bool:
    assert tally.failures == []
    return tally.tried == tally.passed > 0


class TestRuns:
    @pytest.mark.slow
    def test_killed_and_resumed_equal_an_undisturbed_one(self, place, generator):
        assert passed(stops.killed(place, 1, generator, fork=True))

    @pytest.mark.slow
    def test_lose_no_step_to_a_signal(self, place, generator, monkeypatch):
        monkeypatch.setattr(stops, "SIGNALS", stops.SIGNALS[1:2])
        assert passed(stops.signalled(place, 1, generator))

    @pytest.mark.slow
    def test_share_no_directory(self, place, generator):
        assert passed(stops.locked(place, 1, generator, fork=True))

    @pytest.mark.slow
    def test_survive_a_limit_on_files(self, place, generator):
        assert passed(disks.limited(place, 1, generator))

    @pytest.mark.skipif(not disks.can_mount(), reason="no small disk can be mounted here")
    @pytest.mark.slow
    def test_survive_a_full_disk(self, place, generator):
        assert passed(disks.full(place, 1, generator))


class TestSaves:
    @pytest.mark.slow
    def test_that_are_killed_leave_no_torn_checkpoint(self, place, generator):
        tally = saves.killed_while_saving(place, 6, generator)
        assert passed(tally)
        assert sum(tally.where.values()) == 6

    def test_of_another_step_are_told_apart(self, tmp_path):
        saver = saves.Saver(tmp_path, background=False)
        saver.save(3)
        assert saver.restore() == 3
        assert saver.torn(3) == []
        with saves.torch.no_grad():
            saver.tensors()[4][0] = 0
        assert saver.torn(3) == ["1 of 12 tensors are not of step 3"]
        assert len(saver.torn(2)) == 3


class TestDamage:
    def test_is_found_in_every_kind_of_file(self, place, generator):
        assert passed(damage.flipped(place, 4, generator))

    def test_is_undone_after_each_trial(self, tmp_path, generator):
        path = tmp_path / "file"
        path.write_bytes(bytes(100))
        for number, size in ((0, 100), (1, None)):
            with damage.damaged(path, generator, number):
                changed = path.read_bytes()
                assert changed != bytes(100)
                assert size is None or len(changed) == size
            assert path.read_bytes() == bytes(100)


class TestComparison:
    def test_names_what_differs_and_what_was_left(self, place, tmp_path):
        run = place.whole()
        expected = outcome(run)
        assert differing(run, expected) == []
        (run / ".half").touch()
        assert differing(run, {**expected, "moments": "others"}) == ["moments differ", ".half was left behind"]
        (run / ".half").unlink()

    def test_knows_a_torn_checkpoint(self, tmp_path):
        saves.Saver(tmp_path, background=False).save(1)
        assert torn(tmp_path) == []
        (tmp_path / "step-00000001" / "config.json").write_text("{}")
        assert "config.json" in torn(tmp_path)[0]

    def test_the_table_tells_failures(self):
        tally = Tally("kills", "hashes")
        tally.add("one", [])
        tally.add("two", ["it is torn"])
        assert not tally.all_passed
        assert "| kills | 2 | 1 |" in table([tally]) and "**kills failed.** two: it is torn" in table([tally])


@pytest.mark.slow
def test_everything_survives_in_full(tmp_path):
    script = [sys.executable, str(BENCHMARKS / "reliability.py"), "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert all(bar["tried"] == bar["passed"] for bar in json.loads((tmp_path / "figures.json").read_text())["bars"])
