"""A copy says how it is used, and that works."""

import re
import shlex
from pathlib import Path

import pytest
from in_process import run

from plmtune.config import compose
from plmtune.config.builtin import builtin_folder

CONF = builtin_folder("conf")


class TestCp:
    @pytest.mark.parametrize(
        "name", sorted(str(path.relative_to(CONF).with_suffix("")) for path in CONF.rglob("*.yaml"))
    )
    def test_the_command_that_it_prints_is_the_same_config(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        code, out, _ = run(monkeypatch, capsys, "cp", name, "mine.yaml")
        assert code == 0
        words = shlex.split(re.search(r"Use it with: plmtune run (.*)", out)[1])
        place = name.rpartition("/")[0]
        base = ["pretrain", (), [f"{place}={Path(name).name}"]] if place else [name]
        assert compose.compose(words[0], (), words[1:]) == compose.compose(*base)

    def test_a_changed_copy_of_a_config_runs_alone_and_over_another(self, tmp_path: Path) -> None:
        text = (CONF / "aries.yaml").read_text().replace("scheduler: cosine_finetune", "scheduler: wsd")
        (tmp_path / "mine.yaml").write_text(text.replace("name: aries", "name: mine"))
        for cfg in (
            compose.compose(str(tmp_path / "mine.yaml")),
            compose.compose("dpo", [str(tmp_path / "mine.yaml")]),
        ):
            assert (cfg.scheduler.name, cfg.loss.name, cfg.reward.name, cfg.name) == ("wsd", "aries", "overlap", "mine")

    def test_a_recipe_is_run_by_its_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert "Use it with: plmtune run mine.py" in run(monkeypatch, capsys, "cp", "recipes/pretrain", "mine.py")[1]
