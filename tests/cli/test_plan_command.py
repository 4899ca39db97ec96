"""plmtune plan: from a config or a checkpoint to memory, speed and hours, and mistakes in sentences."""

import json
import shlex
from pathlib import Path

import pytest
from in_process import run, save_small

from plmtune.config import compose, override_checks

BASE = ("plan", "demo", "model=plm_tiny")


class TestPlan:
    def test_a_config_is_planned_without_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        code, out, _ = run(
            monkeypatch, capsys, *BASE, "--device", "pi5,h200", "--json", "plan.json", "--context", "128,9000"
        )
        assert code == 0
        for words in ("parameters", "q4_k_m", "Raspberry Pi 5", "phase main", "device-seconds", "9,000"):
            assert words in out, words
        found = json.loads(Path("plan.json").read_text())
        assert {p["device"] for p in found["predictions"]} == {"pi5", "h200"}
        assert {p["context"] for p in found["predictions"]} == {128}
        assert all(
            p["memory"] == p["weights"] + p["cache"] + p["workspace"] + p["program"] for p in found["predictions"]
        )
        assert found["devices"]["pi5"]["bandwidth"]["source"]
        assert found["training"]["phases"][0]["flops"] > 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]

    def test_a_checkpoint_is_planned_as_it_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        save_small(tmp_path / "model")
        code, out, _ = run(monkeypatch, capsys, "plan", tmp_path / "model", "--scheme", "int8,q8_0")
        assert code == 0
        assert "1 layer of width 16, a vocabulary of" in out and "int8" in out and "q8_0" in out
        # Its latent of 20 numbers is half as wide as 2 heads of 12 + 8.
        assert "--as deepseek2, in q8_0: a cache of 2.50 KiB instead of 5.00 KiB at 64 tokens" in " ".join(out.split())
        assert "Training" not in out

    def test_without_a_budget_the_model_is_planned_and_its_training_is_not(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, _ = run(monkeypatch, capsys, "plan", "pretrain", "model=plm_tiny", "--device", "pi5")
        assert code == 0
        assert "Raspberry Pi 5" in out and "key phases is empty" in out

    def test_what_does_not_fit_gets_no_speed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        figure = "{value: %s, source: a test}"
        keys = ("memory_gib", "system_gib", "bandwidth_gb_s", "compute_gflop_s", "layer_us", "error")
        values = (0.3, 0.2, 10, 10, 1, 0.1)
        lines = [f"{key}: {figure % value}" for key, value in zip(keys, values, strict=True)]
        (tmp_path / "small.yaml").write_text("\n".join(["name: small", *lines]))
        device = tmp_path / "small.yaml"
        code, out, _ = run(monkeypatch, capsys, *BASE, "--device", device, "--scheme", "bf16", "--runtime", "plmtune")
        assert code == 0
        assert "does not fit" in out and "±" not in out

    def test_a_sweep_shows_its_front_and_what_is_impossible(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, _ = run(
            monkeypatch,
            capsys,
            *BASE,
            "model.embed_dim=32,64",
            "model.num_heads=2,0",
            "--sweep",
            "--context",
            "128",
            "--json",
            tmp_path / "sweep.json",
            "--plot",
            tmp_path / "sweep.png",
        )
        assert code == 0
        assert out.startswith("demo on Raspberry Pi 5")
        assert "4 architectures" in out and "2 are impossible" in out and "num_heads (0) must be at least 1" in out
        assert len(json.loads((tmp_path / "sweep.json").read_text())["points"]) == 2
        assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")

    def test_shapes_at_equal_parameters_come_with_the_command_that_trains_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sizes = "model={num_layers: 4, embed_dim: 128, max_seq_len: 1024}"
        given = ("plan", "demo", "tokenizer=byte", sizes, "--sweep", "--shapes", "3", "--scheme", "int8")
        written = ("--json", tmp_path / "shapes.json", "--plot", tmp_path / "shapes.png")
        code, out, _ = run(monkeypatch, capsys, *given, *written)
        assert code == 0
        assert "3 of 19 shapes with 927,488 parameters, 2% more or less" in out and "1,024 tokens of context" in out
        found = json.loads((tmp_path / "shapes.json").read_text())
        assert f"\n    {found['command']}\n" in out
        assert (tmp_path / "shapes.png").read_bytes().startswith(b"\x89PNG")
        assert len(found["found"]) == 19 and [point["base"] for point in found["points"]].count(True) == 1
        words = shlex.split(found["command"])
        assert words[:6] == ["plmtune", "run", "-m", "demo", "tokenizer=byte", "model={max_seq_len: 1024}"]
        plain, swept = override_checks.split_sweeps(words[4:])
        for text, point in zip(swept["model"], found["points"], strict=True):
            cfg = compose.compose("demo", (), [*plain, text])
            parameters = compose.build("model", cfg.model, vocab_size=found["vocabulary"]).parameters()
            assert sum(one.numel() for one in parameters) == point["parameters"]

    def test_values_with_a_tolerance_are_the_only_ones(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ("plan", "demo", "tokenizer=byte", "--sweep", "--tolerance", "0.05", "model.num_layers=2,8")
        code, out, _ = run(monkeypatch, capsys, *words)
        rows = [line.lstrip("* ").split() for line in out.splitlines() if " latent " in line]
        assert code == 0 and {row[0] for row in rows} == {"2", "4", "8"}

    def test_a_preset_of_a_published_model_has_its_vocabulary(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ("plan", "smollm2_135m", "model.num_layers=1", "--scheme", "int8")
        assert "a vocabulary of 49,152" in run(monkeypatch, capsys, *words)[1]
        assert "a vocabulary of 257" in run(monkeypatch, capsys, *words, "tokenizer=byte")[1]

    def test_a_sweep_of_a_preset_bears_its_name(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, _ = run(
            monkeypatch, capsys, "plan", "plm_tiny", "--sweep", "model.num_layers=1,2", "--context", "128"
        )
        assert code == 0
        assert out.startswith("plm_tiny on Raspberry Pi 5") and "pretrain" not in out

    def test_later_rounds_and_their_losses_take_time(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, _ = run(monkeypatch, capsys, "plan", "demo", "--train-on", "h200", "multi_round.rounds=3")
        assert code == 0
        assert "phase round 3" in out and "losses between rounds: 2.6M tokens" in out and "(forward only)" in out

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (("plan", "pretrain", "--device", "pi6"), "There is no device pi6; a file of your own"),
            (("plan", "pretrain", "--scheme", "int9"), "no scheme int9"),
            (("plan", "pretrain", "--context", "many"), "must be numbers of tokens"),
            (("plan", "demo", "--context", "99999"), "takes 1,024 tokens at most"),
            (("plan", "demo", "--train-on", "pi5"), "says no training_gflop_s"),
            (("plan", "pretrain", "--json", "no/where.json"), "a folder that is there"),
            (("plan", "sft"), "model=plm"),
            (("plan", "pretrain", "--sweep", "--device", "pi5,h200", "model.embed_dim=1,2"), "at one, not 2"),
            (("plan", "demo", "--sweep", "--device", "pi5,h200"), "at one, not 2"),
            (("plan", "demo", "--shapes", "3"), "--shapes counts with --sweep"),
            (("plan", "demo", "--sweep", "--multiple", "3", "model.num_layers=1,2"), "give --tolerance"),
            (("plan", "demo", "--sweep", "--tolerance", "150%"), "must be a share"),
            (("plan", "demo", "--sweep", "--tolerance", "0%"), "above 0 and below 1"),
            (("plan", "demo", "--sweep", "--tolerance", "1e-9"), "The nearest has 1,4"),
            (("plan", "demo", "--sweep", "--tolerance", "2%", "model.num_heads=2,4"), "these can have them: model.num"),
            (("plan", "demo", "--sweep", "--tolerance", "2%", "model.num_layers=2.5,4"), "2.5 is not a whole number"),
            (("plan", "demo", "--sweep", "--context", "99999"), "takes 1,024 tokens at most"),
            (("plan", "sft", "--sweep"), "names no model to sweep over"),
        ],
    )
    def test_mistakes_are_sentences(
        self,
        words: tuple[str, ...],
        says: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        code, _, err = run(monkeypatch, capsys, *words)
        assert code == 2
        assert says in err and "Traceback" not in err
