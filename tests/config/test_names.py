"""A name in the wrong place is answered with what it is and which command takes it."""

import re
from pathlib import Path

import pytest

from plmtune.config.names import check_model_path, name_hint
from plmtune.devices.device import load_device
from plmtune.errors import UserError


class TestNames:
    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("plm_20m", "preset of the group model: plmtune run pretrain model=plm_20m"),
            ("mla_20m", "preset of the group attention: plmtune run pretrain model/attention=mla_20m"),
            ("llama", "component of the group model: plmtune run pretrain model=llama"),
            ("swiglu", "component of the group ffn: plmtune run pretrain model/ffn=swiglu"),
            ("bundled", "component of the group tokenizer: plmtune run pretrain tokenizer=bundled"),
            ("not_empty", "component of the group rule: plmtune run aries selection.rules=not_empty"),
            ("attention", "group: plmtune ls attention"),
            ("pi5", "device: plmtune plan CONFIG --device pi5"),
            ("sft", "config: plmtune run sft"),
            ("plm_1.8b", "config: plmtune run plm_1.8b"),
            ("preference", "recipe, which the configs aries, demo_aries, demo_dpo, dpo run: plmtune run aries"),
        ],
    )
    def test_a_name_is_said_to_be_what_it_is(self, name: str, said: str) -> None:
        found = name_hint(name)
        assert found.startswith(f" {name} is a") and said in found

    @pytest.mark.parametrize("name", ["", "no_such_name", "../pretrain"])
    def test_of_other_names_nothing_is_said(self, name: str) -> None:
        assert name_hint(name) == ""

    @pytest.mark.parametrize(
        ("path", "near"),
        [
            ("runs/stf/latest", "runs/sft/latest"),
            ("run/sft/latest", "runs/sft/latest"),
            ("models/smol", "models/smollm"),
        ],
    )
    def test_a_path_with_one_wrong_name_is_told_the_right_one(
        self, path: str, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "runs" / "sft" / "latest").mkdir(parents=True)
        (tmp_path / "runs" / "dpo").mkdir()
        (tmp_path / "models" / "smollm").mkdir(parents=True)
        with pytest.raises(UserError, match=re.escape(f"Did you mean {tmp_path / near}?")):
            check_model_path(tmp_path / path)
        monkeypatch.chdir(tmp_path / "runs")
        with pytest.raises(UserError, match=re.escape("Did you mean sft/latest?")):
            check_model_path("./sfd/latest")

    def test_a_preset_is_no_device(self) -> None:
        with pytest.raises(UserError, match="plm_20m is a preset of the group model"):
            load_device("plm_20m")
