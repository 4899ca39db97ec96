"""plmtune plan --simulate: a layout of many processes tried on one, and mistakes in sentences."""

import pytest
from in_process import run

BASE = ("plan", "demo", "model=plm_tiny", "micro_batch_size=1")


class TestPlanSimulate:
    def test_a_layout_is_tried_and_reported(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, _ = run(monkeypatch, capsys, *BASE, "--simulate", "16", "runtime.strategy=ddp")
        assert code == 0
        for words in ("on 16 processes: dp_replicate=16", "ranks tried    0, 15", "a rank holds", "plans are right"):
            assert words in out, words

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (("12", "parallel.tp=8"), "key parallel: tp=8 needs a multiple of 8 processes, and 12 run"),
            (("1",), "--simulate 1: give the number of processes, 2 or more"),
            (("16", "parallel.tp=16"), "key parallel.tp: 16 does not divide the 4 heads of layer 0"),
            (("2", "parallel.tp=2", "runtime.compile=true"), "key runtime.compile: layers are not compiled under tp=2"),
        ],
    )
    def test_mistakes_are_sentences(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        arguments: tuple[str, ...],
        sentence: str,
    ) -> None:
        code, _, err = run(monkeypatch, capsys, *BASE, "--simulate", *arguments)
        assert code == 2
        assert sentence in " ".join(err.split())
