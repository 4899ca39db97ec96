"""Composing: values, groups, overlays; and every mistake names its file, its key and the nearest right name."""

from pathlib import Path

import pytest

from plmtune import config
from plmtune.errors import UserError
from plmtune.registry import Component


def message(name: str = "pretrain", *overrides: str, overlays: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as caught:
        config.compose(name, overlays, overrides)
    return str(caught.value)


class TestCompose:
    def test_values_and_groups_are_overridden(self) -> None:
        cfg = config.compose(
            "pretrain", (), ["model=plm_20m", "model/ffn=swiglu", "scheduler=cosine", "optimizer.lr=3e-4"]
        )
        assert cfg.model.settings["num_layers"] == 22
        assert cfg.model.settings["ffn"].name == "swiglu"
        assert cfg.scheduler.name == "cosine"
        assert cfg.optimizer.settings["lr"] == 3e-4

    def test_a_preset_keeps_the_schema_of_its_component(self) -> None:
        tiny = config.compose("pretrain", (), ["model=plm_tiny"]).model
        assert tiny.name == "plm"
        assert tiny.settings["attention"].settings["kv_lora_rank"] == 32
        assert "kv_lora_rank" in message("pretrain", "model=plm_tiny", "model.attention.kv_lora_rnk=3")

    def test_ablating_attention_leaves_nothing_of_the_preset_behind(self) -> None:
        cfg = config.compose("pretrain", (), ["model=plm_20m", "model/attention=gqa"])
        assert cfg.model.settings["attention"].name == "gqa"
        assert "kv_lora_rank" not in cfg.model.settings["attention"].settings

    def test_defaults_of_a_nested_component_are_those_of_its_owner(self) -> None:
        llama = config.compose("pretrain", (), ["model=llama"]).model
        assert llama.settings["attention"].settings["num_kv_heads"] == 3
        assert llama.settings["norm"].settings["eps"] == 1e-5

    def test_an_overlay_chooses_components_and_the_command_line_wins(self, tmp_path: Path) -> None:
        overlay = tmp_path / "mine.yaml"
        overlay.write_text("defaults:\n  - override /model: plm_tiny\nseed: 7\nseq_len: 64\n")
        cfg = config.compose("pretrain", [str(overlay)], ["seq_len=32"])
        assert (cfg.model.settings["embed_dim"], cfg.seed, cfg.seq_len) == (64, 7, 32)

    def test_a_config_that_is_an_overlay_runs_by_its_name_alone(self) -> None:
        assert config.compose("plm_1.8b") == config.compose("pretrain", ["conf/plm_1.8b.yaml"])

    def test_sources_are_named_on_the_command_line(self) -> None:
        cfg = config.compose("pretrain", (), ["data=mix", "data.sources={a: {component: files, paths: [x.txt]}}"])
        source = cfg.data.settings["sources"]["a"]
        assert source == Component("data", "files", source.settings)
        assert list(source.settings["paths"]) == ["x.txt"]

    def test_yaml_round_trip_is_exact(self, tmp_path: Path) -> None:
        cfg = config.compose("plm_1.8b", (), ["optimizer.lr=1.2345678901234567e-4"])
        (tmp_path / "config.yaml").write_text(config.to_yaml(cfg))
        assert config.load_config(tmp_path / "config.yaml") == cfg

    def test_composing_twice_gives_the_same(self) -> None:
        assert config.compose("pretrain") == config.compose("pretrain")


class TestMistakes:
    @pytest.mark.parametrize(
        ("override", "parts"),
        [
            ("optimizer.lerning_rate=1", ["optimizer.lerning_rate", "Did you mean optimizer.lr?"]),
            ("lr=1", ["key lr", "Did you mean optimizer.lr?"]),
            ("optimizer.lr=fast", ["optimizer.lr", "'fast'", "Float"]),
            ("model=plm_tinny", ["plm_tinny", "Did you mean plm_tiny?"]),
            ("modle=plm", ["modle", "Did you mean model?"]),
            ("runtime.precision=fp8", ["runtime.precision", "fp8", "auto, bf16, fp32"]),
            ("scheduler.decay_shape=round", ["scheduler.decay_shape", "round", "cosine"]),
            ("data.paths=a.txt", ["data.paths"]),
            ("optimizer.lr=1,2", ["several values", "-m"]),
            ("model.attention.component=gqa", ["model/attention=gqa"]),
            ("phases=[{name: a, tokenz: 3}]", ["tokenz", "Did you mean tokens?"]),
            ("seq_len=${nothing}", ["nothing"]),
            ("just words", ["key=value"]),
        ],
    )
    def test_each_names_the_key_and_what_to_do(self, override: str, parts: list[str]) -> None:
        said = message("pretrain", override)
        assert "\n" not in said
        for part in parts:
            assert part in said

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("optimizer: {lerning_rate: 1}", ["key optimizer.lerning_rate", "Did you mean optimizer.lr?"]),
            ("defaults:\n  - override /model: plmm", ["key model", "plmm", "Did you mean plm?"]),
            ("defaults:\n  - override /modl: plm", ["modl"]),
            ("a: [", ["line"]),
            ("", ["empty"]),
            ("- 1", ["list"]),
            ("seq_len: abc", ["key seq_len", "abc"]),
            ("model: {component: llama}", ["override /model: llama"]),
            ("data: {sources: {a: {component: filez}}}", ["data.sources"]),
        ],
    )
    def test_in_a_file_the_file_is_named(self, text: str, parts: list[str], tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        said = message(overlays=(str(path),))
        assert str(path) in said or "key data.sources" in said
        for part in parts:
            assert part in said

    @pytest.mark.parametrize(
        ("recipe", "override", "said"),
        [
            ("demo_sft", "data.paths=[a.jsonl]", "data is docstrings, which has no key paths; components of data that "
             "have it: conversations, files, preferences (data=conversations data.paths=...)"),
            ("demo_dpo", "data.paths=[a.jsonl]", "data is docstring_pairs, which has no key paths; components of data "
             "that have it: preferences, conversations, files (data=preferences data.paths=...)"),
            ("pretrain", "model.ffn.num_experts=3", "key model.ffn.num_experts: unknown"),
            ("dpo", "phases=[{name: a, tokens: 3}]", "preference has no key phases (it belongs to pretrain, sft)."),
            ("pretrain", "epochs=2", "pretrain has no key epochs (it belongs to sft, preference)."),
        ],
    )  # fmt: skip
    def test_a_key_that_stands_elsewhere_is_told_where(self, recipe: str, override: str, said: str) -> None:
        assert message(recipe, override).startswith(f"override {override}, {said}")

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        (tmp_path / "latin.yaml").write_bytes("name: \xe9".encode("latin-1"))
        assert "UTF-8" in message(overlays=(str(tmp_path / "latin.yaml"),))
        assert "no such file" in message(overlays=(str(tmp_path / "none.yaml"),))
        assert "Did you mean pretrain?" in message("pretrian")

    def test_a_saved_config_with_a_stranger_in_it_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "config.yaml"
        good = config.to_yaml(config.compose("pretrain"))
        path.write_text(good.replace("component: plm\n", "component: plmm\n"))
        with pytest.raises(UserError, match=r"config.yaml, key model: .*plmm.*Did you mean plm\?"):
            config.load_config(path)

    def test_build_puts_the_key_before_impossible_numbers(self) -> None:
        chosen = Component("attention", "gqa", {"num_kv_heads": 5})
        with pytest.raises(UserError, match=r"key model: .*12.*5"):
            config.build("model", Component("model", "llama", {"num_heads": 12, "attention": chosen}), vocab_size=8)


class TestNothingIsEverCalled:
    @pytest.mark.parametrize(
        "text",
        [
            "optimizer: {_target_: os.system, command: touch OWNED}",
            "hydra: {callbacks: {a: {_target_: os.system}}}",
            "defaults:\n  - override /hydra/launcher: joblib",
            "defaults:\n  - /hydra/job_logging: x",
            "model: {attention: {_partial_: true}}",
            "data: {sources: {a: {_target_: builtins.exec}}}",
            "data: {sources: {a: {component: os.system}}}",
            "recipe: os",
            "recipe: ../evil",
            "tokenizer: !!python/object/apply:os.system ['touch OWNED']",
        ],
    )
    def test_hostile_overlays_are_refused(self, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "evil.yaml").write_text(text)
        message(overlays=("evil.yaml",))
        assert not (tmp_path / "OWNED").exists()

    @pytest.mark.parametrize(
        "override",
        ["optimizer._target_=os.system", "+hydra.callbacks.a._target_=os.system", "hydra/job_logging=evil"],
    )
    def test_hostile_overrides_are_refused(self, override: str) -> None:
        assert "not allowed" in message("pretrain", override)
