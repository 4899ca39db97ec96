"""plmtune plan --cluster: layouts ranked with their terms, reasons for the others, and mistakes in sentences."""

import json
from pathlib import Path

import pytest
from in_process import run

BASE = ("plan", "demo", "model=plm_tiny", "--cluster", "h100")


class TestPlanCluster:
    def test_layouts_are_ranked_with_terms_and_reasons(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        code, out, _ = run(
            monkeypatch, capsys, *BASE, "--layout", "tp=2,pp=2,dp_shard=2", "--json", "plan.json", "--plot", "plan.png"
        )
        assert code == 0
        text = " ".join(out.split())
        for words in (
            "Predicted from the cluster's figures; nothing here is measured",
            "Seconds of a step",
            "bubble",
            "between nodes",
            "Keys of the first: parallel.pp=",
            "pp=2 dp_shard=2 tp=2 1f1b is number",
            "parallel.tp: 8 does not divide the 4 heads of layer 0",
            "parallel.pp: 2 layers cannot fill 4 stages: each needs one",
            "Simulated event by event",
        ):
            assert words in text, words
        found = json.loads(Path("plan.json").read_text())
        speeds = [layout["tokens_per_second"] for layout in found["layouts"]]
        assert speeds == sorted(speeds, reverse=True)
        assert found["cluster"]["node"]["bandwidth"]["source"]
        for layout in found["layouts"]:
            assert sum(layout["seconds"].values()) == pytest.approx(layout["step_seconds"])
        assert Path("plan.png").read_bytes().startswith(b"\x89PNG")

    def test_overrides_fix_keys(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = run(
            monkeypatch, capsys, *BASE, "micro_batch_size=1", "parallel.tp=2", "runtime.activation_checkpointing=full"
        )
        assert code == 0
        ranked = [
            line for line in out.splitlines() if (line.strip()[:2] in ("1 ", "2 ") and "GiB" in line) or "MiB" in line
        ]
        assert ranked
        assert all(" tp=2" in line and " full " in line for line in ranked if " x " in line)

    def test_a_part_of_a_node(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = run(monkeypatch, capsys, *BASE, "--processes", "2")
        assert code == 0
        assert "1 node, 2 devices" in out

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("--processes", "12"), "--processes 12: is no multiple of the 8 devices of a node of h100"),
            (("--layout", "tp=3"), "tp 3 is 3 processes, and the cluster has 8 devices"),
            (("--device", "pi5"), "--device is of a plan for one device"),
            (("--sweep",), "--sweep is of a plan for one device"),
            (("seq_len=4096",), "seq_len"),
            (("parallel.tp=3",), "parallel.tp=3: no layout of the cluster's 8 devices has these sizes"),
        ],
    )
    def test_mistakes_are_sentences(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        arguments: tuple[str, ...],
        says: str,
    ) -> None:
        code, _, err = run(monkeypatch, capsys, *BASE, *arguments)
        assert code == 2
        assert says in " ".join(err.split())

    @pytest.mark.parametrize("option", [("--processes", "2"), ("--layout", "tp=2")])
    def test_options_of_clusters_need_one(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: tuple[str, str]
    ) -> None:
        code, _, err = run(monkeypatch, capsys, "plan", "demo", *option)
        assert code == 2
        assert f"{option[0]} counts with --cluster" in err

    def test_a_model_that_no_layout_holds_says_why(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, err = run(monkeypatch, capsys, "plan", "plm_1.8b", "--cluster", "gloo", "parallel.tp=2")
        assert code == 2
        assert "too much" in out
        assert "no layout of 8 devices trains plm_1.8b" in err

    def test_clusters_are_listed(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = run(monkeypatch, capsys, "ls", "clusters")
        assert code == 0
        assert "256 x 8" in out and "42 GB/s" in out
