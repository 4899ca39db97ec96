"""Keys of earlier versions: read from the config of a run, refused in a new config."""

import json
from pathlib import Path
from typing import Any

import pytest
import xxhash
import yaml
from plmtune.recipes import preference

from plmtune.config import compose, typed_config
from plmtune.config.renamed import RENAMED, Renamed
from plmtune.errors import UserError
from plmtune.training.preflight import check_best_metric
from plmtune.training.resume_checks import DATA, RESUME_MUTABLE, config_digest

# A config that has each old key, and two values of the key under today's name.
USES: dict[str, tuple[str, list[Any]]] = {
    "other_data": ("pretrain", [True, False]),
    "checkpoint.best_is": ("pretrain", ["min", "max"]),
    "chat.too_long": ("sft", ["drop", "right"]),
    "prompts": ("aries", [7, 0]),
    "generation.strategy": ("aries", ["chain", "samples"]),
}


def at(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The section that holds a full key, and the key's own name."""
    *parents, leaf = key.split(".")
    for parent in parents:
        config = config[parent]
    return config, leaf


def of_earlier_version(renamed: Renamed, plain: dict[str, Any]) -> dict[str, Any]:
    """The plain config as the version wrote it that had the old name."""
    section, leaf = at(plain, renamed.new)
    before = {new: old for old, new in renamed.values.items()}
    value = section.pop(leaf)
    section[at(plain, renamed.old)[1]] = before.get(value, value) if isinstance(value, str) else value
    return plain


CASES = [(renamed, value) for renamed in RENAMED for value in USES[renamed.old][1]]


@pytest.mark.parametrize(("renamed", "value"), CASES)
class TestEveryRenamedKey:
    def test_the_config_of_an_earlier_run_is_read_with_a_notice_of_both_names(
        self, renamed: Renamed, value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cfg = compose.compose(USES[renamed.old][0], (), [f"{renamed.new}={value}"])
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(of_earlier_version(renamed, typed_config.to_plain(cfg))), encoding="utf-8")
        for _ in range(2):
            assert typed_config.load_config(path) == cfg
        assert [record.getMessage() for record in caplog.records] == [
            f"{path}: written by an earlier version: {renamed.old} is now {renamed.new}."
        ]


@pytest.mark.parametrize("name", ["pretrain", "sft", "aries"])
def test_a_digest_is_made_under_the_first_names_and_so_fits_the_checkpoints_of_every_version(name: str) -> None:
    cfg = compose.compose(name)
    plain = {k: v for k, v in typed_config.to_plain(cfg).items() if k not in (*RESUME_MUTABLE, *DATA, "init_from")}
    for renamed in RENAMED:
        if renamed.new.partition(".")[0] in plain:
            plain = of_earlier_version(renamed, plain)
    text = json.dumps(plain, sort_keys=True)
    assert config_digest(cfg) == xxhash.xxh3_128_hexdigest(text.encode())


def test_a_digest_of_what_an_earlier_version_wrote_lacks_the_keys_that_came_later() -> None:
    cfg = compose.compose("pretrain")
    written = typed_config.to_plain(cfg)
    assert config_digest(cfg, written) == config_digest(cfg)
    del written["optimizer"]["no_decay"]
    assert typed_config.from_plain(written, where="config.yaml") == cfg
    assert config_digest(cfg, written) != config_digest(cfg)


@pytest.mark.parametrize("renamed", RENAMED)
class TestNewConfigs:
    def test_an_override_with_the_old_key_is_refused_with_the_new_one(self, renamed: Renamed) -> None:
        with pytest.raises(UserError, match=f"key {renamed.old}: unknown. Did you mean {renamed.new}"):
            compose.compose(USES[renamed.old][0], (), [f"{renamed.old}=1"])

    def test_a_file_with_the_old_key_is_refused_with_the_new_one(self, renamed: Renamed, tmp_path: Path) -> None:
        *parents, leaf = renamed.old.split(".")
        path = tmp_path / "mine.yaml"
        path.write_text(f"{parents[0]}: {{{leaf}: 1}}" if parents else f"{leaf}: 1", encoding="utf-8")
        with pytest.raises(UserError, match=f"mine.yaml, key {renamed.old}: unknown. Did you mean {renamed.new}"):
            compose.compose(USES[renamed.old][0], [str(path)])

    def test_a_change_of_a_typed_config_with_the_old_key_is_refused_with_the_new_one(self, renamed: Renamed) -> None:
        cfg = compose.compose(USES[renamed.old][0])
        with pytest.raises(UserError, match=f"key {renamed.old}: unknown. Did you mean {renamed.new}"):
            typed_config.override(cfg, [f"{renamed.old}=1"])


def test_a_key_of_a_persons_own_that_has_an_old_name_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import dataclass

    from plmtune.config.schema import SCHEMAS, SftConfig

    @dataclass
    class Own(SftConfig):
        prompts: int = 3

    monkeypatch.setitem(SCHEMAS, "sft", Own)
    path = tmp_path / "config.yaml"
    path.write_text("recipe: sft\nprompts: 5\n", encoding="utf-8")
    assert typed_config.load_config(path).prompts == 5


def test_a_metric_of_an_earlier_run_is_read_under_its_new_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = compose.compose("dpo", (), ["checkpoint.best=validation/logratio_margin"])
    plain = typed_config.to_plain(cfg)
    plain["checkpoint"]["best"] = "validation/h"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    assert typed_config.load_config(path) == cfg
    assert "checkpoint.best=validation/h is now checkpoint.best=validation/logratio_margin" in caplog.text


def test_the_old_name_of_a_metric_in_a_new_config_is_refused_with_the_new_one() -> None:
    said = "does not measure validation/h. Did you mean validation/logratio_margin[?]"
    with pytest.raises(UserError, match=said):
        check_best_metric("validation/h", preference.METRICS)


class TestActivationCheckpointing:
    @pytest.mark.parametrize(("before", "now"), [(True, "full"), (False, "none")])
    def test_the_truth_values_of_earlier_runs_are_read_as_words(self, before: bool, now: str, tmp_path: Path) -> None:
        cfg = compose.compose("pretrain", (), [f"runtime.activation_checkpointing={now}"])
        plain = typed_config.to_plain(cfg)
        plain["runtime"]["activation_checkpointing"] = before
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(plain), encoding="utf-8")
        assert typed_config.load_config(path) == cfg
        assert typed_config.to_plain(cfg)["runtime"]["activation_checkpointing"] == now

    @pytest.mark.parametrize("how", ["none", "full", "selective", 2, 12])
    def test_every_form_is_saved_and_read_again(self, how: str | int, tmp_path: Path) -> None:
        cfg = compose.compose("pretrain", (), [f"runtime.activation_checkpointing={how}"])
        assert cfg.runtime.activation_checkpointing == how
        (tmp_path / "config.yaml").write_text(typed_config.to_yaml(cfg), encoding="utf-8")
        assert typed_config.load_config(tmp_path / "config.yaml") == cfg
