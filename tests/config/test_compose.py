"""Composing: values, groups, overlays; and every mistake names its file, its key and the nearest right name."""

import itertools
import random
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest

from plmtune.config import compose, override_checks, typed_config
from plmtune.config.builtin import builtin_folder
from plmtune.config.overrides import quote_override
from plmtune.errors import UserError
from plmtune.registry import Component


@cache
def composed(*overrides: str) -> Any:
    """A config to compare others with."""
    return compose.compose("pretrain", (), overrides)


def message(name: str = "pretrain", *overrides: str, overlays: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as caught:
        compose.compose(name, overlays, overrides)
    return str(caught.value)


class TestCompose:
    def test_values_and_groups_are_overridden(self) -> None:
        cfg = compose.compose(
            "pretrain", (), ["model=plm_20m", "model/ffn=swiglu", "scheduler=cosine", "optimizer.lr=3e-4"]
        )
        assert cfg.model.settings["num_layers"] == 22
        assert cfg.model.settings["ffn"].name == "swiglu"
        assert cfg.scheduler.name == "cosine"
        assert cfg.optimizer.settings["lr"] == 3e-4

    def test_a_preset_keeps_the_schema_of_its_component(self) -> None:
        tiny = compose.compose("pretrain", (), ["model=plm_tiny"]).model
        assert tiny.name == "plm"
        assert tiny.settings["attention"].settings["kv_lora_rank"] == 32
        assert "kv_lora_rank" in message("pretrain", "model=plm_tiny", "model.attention.kv_lora_rnk=3")

    def test_ablating_attention_leaves_nothing_of_the_preset_behind(self) -> None:
        cfg = compose.compose("pretrain", (), ["model=plm_20m", "model/attention=gqa"])
        assert cfg.model.settings["attention"].name == "gqa"
        assert "kv_lora_rank" not in cfg.model.settings["attention"].settings

    def test_defaults_of_a_nested_component_are_those_of_its_owner(self) -> None:
        llama = compose.compose("pretrain", (), ["model=llama"]).model
        assert llama.settings["attention"].settings["num_kv_heads"] == 3
        assert llama.settings["norm"].settings["eps"] == 1e-5

    def test_an_overlay_chooses_components_and_the_command_line_wins(self, tmp_path: Path) -> None:
        overlay = tmp_path / "mine.yaml"
        overlay.write_text("defaults:\n  - override /model: plm_tiny\nseed: 7\nseq_len: 64\n")
        cfg = compose.compose("pretrain", [str(overlay)], ["seq_len=32"])
        assert (cfg.model.settings["embed_dim"], cfg.seed, cfg.seq_len) == (64, 7, 32)

    def test_a_config_that_is_an_overlay_runs_by_its_name_alone(self) -> None:
        assert compose.compose("plm_1.8b") == compose.compose("pretrain", ["conf/plm_1.8b.yaml"])

    def test_sources_are_named_on_the_command_line(self) -> None:
        cfg = compose.compose("pretrain", (), ["data=mix", "data.sources={a: {component: files, paths: [x.txt]}}"])
        source = cfg.data.settings["sources"]["a"]
        assert source == Component("data", "files", source.settings)
        assert list(source.settings["paths"]) == ["x.txt"]

    def test_yaml_round_trip_is_exact(self, tmp_path: Path) -> None:
        cfg = compose.compose("plm_1.8b", (), ["optimizer.lr=1.2345678901234567e-4"])
        (tmp_path / "config.yaml").write_text(typed_config.to_yaml(cfg))
        assert typed_config.load_config(tmp_path / "config.yaml") == cfg

    def test_composing_twice_gives_the_same(self) -> None:
        assert compose.compose("pretrain") == compose.compose("pretrain")


class TestChoices:
    """A name where a component belongs chooses it, as a defaults list does."""

    @pytest.mark.parametrize(
        ("text", "defaults"),
        [
            ("model: plm_tiny", "[override /model: plm_tiny]"),
            ("optimizer: muon", "[override /optimizer: muon]"),
            ("model: {ffn: swiglu}", "[override /model/ffn: swiglu]"),
            ("model: {component: llama, ffn: squared_relu}",
             "[override /model: llama, override /model/ffn: squared_relu]"),
            ("model: {ffn: {component: swiglu}}\nlogger: jsonl",
             "[override /model/ffn: swiglu, override /logger: jsonl]"),
            ("model: plm_tiny\ndefaults: [override /model: plm_tiny]", "[override /model: plm_tiny]"),
        ],
    )  # fmt: skip
    def test_in_a_file_it_means_the_same_as_a_defaults_list(self, text: str, defaults: str, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text(text)
        (tmp_path / "b.yaml").write_text(f"defaults: {defaults}")
        ours, theirs = (compose.compose("pretrain", [str(tmp_path / name)]) for name in ("a.yaml", "b.yaml"))
        assert ours == theirs != composed()

    @pytest.mark.parametrize(
        ("override", "same"),
        [
            ("model.ffn=swiglu", ["model/ffn=swiglu"]),
            ("model={ffn: swiglu}", ["model/ffn=swiglu"]),
            ("model={component: llama, num_layers: 3}", ["model=llama", "model.num_layers=3"]),
            ("logger=[jsonl]", ["logger=jsonl"]),
            ("logger=null", ["~logger"]),
        ],
    )
    def test_so_it_does_on_the_command_line(self, override: str, same: list[str]) -> None:
        assert compose.compose("pretrain", (), [override]) == composed(*same)

    def test_settings_beside_the_name_belong_to_it(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text("optimizer: {component: adamw, betas: [0.8, 0.9]}")
        optimizer = compose.compose("pretrain", [str(tmp_path / "mine.yaml")], ["optimizer.eps=1e-6"]).optimizer
        assert (optimizer.name, optimizer.settings["betas"], optimizer.settings["eps"]) == ("adamw", (0.8, 0.9), 1e-6)

    def test_the_config_of_a_run_is_an_overlay(self, tmp_path: Path) -> None:
        cfg = compose.compose("pretrain", (), ["model=plm_tiny", "model/ffn=swiglu", "logger=[jsonl,tensorboard]"])
        (tmp_path / "config.yaml").write_text(typed_config.to_yaml(cfg))
        assert compose.compose("pretrain", [str(tmp_path / "config.yaml")]) == cfg

    def test_the_config_of_a_run_made_before_is_read(self, tmp_path: Path) -> None:
        text = typed_config.to_yaml(compose.compose("pretrain"))
        assert "logger:\n  component: tensorboard\n" in text  # as it was before several were possible
        (tmp_path / "config.yaml").write_text(text)
        assert typed_config.load_config(tmp_path / "config.yaml") == compose.compose("pretrain")


class TestReplacing:
    """A choice takes the place of an earlier one, with the settings that stand beside its name."""

    FILES: ClassVar = {
        "two.yaml": "logger: [jsonl, {component: wandb, project: x}]",
        "one.yaml": "logger: [tensorboard]",
        "other.yaml": "logger: [jsonl, tensorboard]",
        "none.yaml": "logger: []",
        "muon.yaml": "optimizer: {component: muon, ns_steps: 3, lr: 0.01}",
        "adamw.yaml": "optimizer: {component: adamw, eps: 1.0e-7}",
        "lr.yaml": "optimizer: {lr: 0.5}",
        "hydra.yaml": "defaults: [override /optimizer: adamw]",
        "ffn.yaml": "model: {component: plm_tiny, num_layers: 3, ffn: {component: swiglu, hidden_dim: 40}}",
    }

    @pytest.mark.parametrize(
        ("files", "overrides", "same"),
        [
            ("two one", [], ["logger=tensorboard"]),
            ("two other", [], ["logger=[jsonl,tensorboard]"]),
            ("two none", [], ["logger=null"]),
            ("none two", [], ["logger=[jsonl,{component: wandb, project: x}]"]),
            ("none", [], ["logger=null"]),
            ("two", ["logger=[tensorboard]"], ["logger=tensorboard"]),
            ("two", ["logger=[jsonl,tensorboard]"], ["logger=[jsonl,tensorboard]"]),
            ("two", ["logger=[]"], ["logger=null"]),
            ("two", ["logger=null"], ["logger=null"]),
            ("one", ["logger=[]"], ["logger=null"]),
            ("none", ["logger=[jsonl]"], ["logger=jsonl"]),
            ("", ["logger=[jsonl,tensorboard]", "logger=[tensorboard]"], ["logger=tensorboard"]),
            ("", ["logger=[jsonl,wandb]", "logger=[tensorboard,jsonl]"], ["logger=[tensorboard,jsonl]"]),
            ("", ["logger=[jsonl,wandb]", "logger=null"], ["logger=null"]),
            ("", ["optimizer={component: muon, ns_steps: 3}", "optimizer=adamw"], ["optimizer=adamw"]),
            ("", ["optimizer={component: adamw, lr: 0.5}", "optimizer=adamw"], ["optimizer=adamw", "optimizer.lr=0.5"]),
            ("", ["optimizer.lr=0.5", "optimizer=adamw"], ["optimizer=adamw", "optimizer.lr=0.5"]),
            ("muon adamw", [], ["optimizer=adamw", "optimizer.eps=1e-7"]),
            ("muon hydra", [], ["optimizer=adamw"]),
            ("muon", ["optimizer=adamw"], ["optimizer=adamw"]),
            ("muon lr", [], ["optimizer=muon", "optimizer.ns_steps=3", "optimizer.lr=0.5"]),
            ("lr adamw", [], ["optimizer=adamw", "optimizer.eps=1e-7", "optimizer.lr=0.5"]),  # of no one component
            ("muon", ["optimizer=muon"], ["optimizer=muon", "optimizer.ns_steps=3", "optimizer.lr=0.01"]),
            ("ffn", ["model/ffn=squared_relu"], ["model=plm_tiny", "model.num_layers=3", "model/ffn=squared_relu"]),
            ("ffn", ["model=plm_20m"], ["model=plm_20m"]),
        ],
    )
    def test_leaves_nothing_of_it_behind(
        self, files: str, overrides: list[str], same: list[str], tmp_path: Path
    ) -> None:
        for name, text in self.FILES.items():
            (tmp_path / name).write_text(text)
        overlays = [str(tmp_path / f"{name}.yaml") for name in files.split()]
        assert compose.compose("pretrain", overlays, overrides) == composed(*same)


class TestOneForAList:
    """One text where a list of texts belongs is a list of one."""

    @pytest.mark.parametrize(
        ("typed", "paths"),
        [("a.txt", ["a.txt"]), ("my text.txt", ["my text.txt"]), ("[]", []), ("[a.txt]", ["a.txt"]), ("'1'", ["1"])],
    )
    def test_on_the_command_line_and_in_a_file(self, typed: str, paths: list[str], tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text(f"data: {{component: files, paths: {typed}}}")
        for cfg in (
            compose.compose("pretrain", (), [f"data.paths={typed}"]),
            compose.compose("pretrain", [str(tmp_path / "mine.yaml")]),
            typed_config.override(composed(), [f"data.paths={typed}"]),
        ):
            assert list(cfg.data.settings["paths"]) == paths
        assert compose.compose("pretrain", (), [f"eval.tasks={typed}"]).eval.tasks == paths

    def test_in_a_source_of_several(self) -> None:
        cfg = compose.compose(
            "pretrain", (), ["data=mix", "data.sources={a: {component: files, paths: a.txt}, b: stdlib}"]
        )
        a, b = cfg.data.settings["sources"].values()
        assert list(a.settings["paths"]) == ["a.txt"] and b == Component("data", "stdlib")


class TestSeveralLoggers:
    @pytest.mark.parametrize(
        "text",
        ["logger: [jsonl, {component: wandb, project: mine}]", "logger:\n- jsonl\n- component: wandb\n  project: mine"],
    )
    def test_are_a_list_in_a_file_and_on_the_command_line(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text(text)
        ours = compose.compose("pretrain", [str(tmp_path / "mine.yaml")])
        assert ours == composed("logger=[jsonl,{component: wandb, project: mine}]")
        assert ours == composed("logger=[jsonl,wandb]", "logger.loggers.wandb.project=mine")
        (tmp_path / "config.yaml").write_text(typed_config.to_yaml(ours))
        assert typed_config.load_config(tmp_path / "config.yaml") == ours

    def test_can_be_chosen_when_a_run_is_resumed(self) -> None:
        cfg = typed_config.override(composed(), ["logger=[jsonl,tensorboard]"])
        assert cfg.logger == compose.compose("pretrain", (), ["logger=[jsonl,tensorboard]"]).logger
        assert typed_config.override(cfg, ["logger=jsonl"]).logger == Component("logger", "jsonl")

    def test_are_all_built(self, tmp_path: Path) -> None:
        cfg = compose.compose("pretrain", (), ["logger=[jsonl,tensorboard]"])
        built = compose.build("logger", cfg.logger, directory=tmp_path, config={})
        assert [type(logger).__name__ for logger in built] == ["JsonLines", "TensorBoard"]


class TestPresetsInFiles:
    def test_are_options_of_their_group(self, tmp_path: Path) -> None:
        path = tmp_path / "my model.yaml"
        path.write_text("defaults: [plm, override attention: mla_20m, _self_]\nnum_layers: 7\nffn: swiglu\n")
        model = compose.compose("pretrain", (), [f'model="{path}"', "model.embed_dim=96"]).model
        assert (model.settings["num_layers"], model.settings["embed_dim"]) == (7, 96)
        assert model.settings["ffn"].name == "swiglu"
        assert model.settings["attention"].settings["kv_lora_rank"] == 256

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("defaults: [adamw, _self_]", "is a preset of the group optimizer"),
            ("num_layers: 3", "is no preset of the group model"),
            ("defaults: [plm, _self_]\nnum_layer: 3", "mine.yaml, key model.num_layer: unknown. Did you mean model."),
            ("defaults: [plm, _self_]\nnum_layers: x", "mine.yaml, key model.num_layers: x is not a whole number"),
            ("defaults: [plm, ../../x, _self_]", "is no choice"),
            ("defaults: [plm, _self_]\n_target_: os.system", "not allowed"),
        ],
    )  # fmt: skip
    def test_with_a_mistake_are_named(
        self, text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("mine.yaml").write_text(text)
        assert said in message("pretrain", "model=mine.yaml")


class TestQuoting:
    @pytest.mark.parametrize("value", ["a=b", "a(1).txt", "über/x", 'say "a"', "it's(", "a=\\", "{a", "日本/語=(1)"])
    def test_the_form_that_is_shown_is_understood_by_the_shell_and_by_hydra(self, value: str) -> None:
        said = message("pretrain", f"run_dir={value}")
        assert said.startswith(
            f"override run_dir={value}: cannot be understood. Quote it for the shell and for Hydra: "
        )
        typed = said.partition("for Hydra: ")[2]
        (word,) = subprocess.run(["sh", "-c", f"printf %s {typed}"], capture_output=True, text=True).stdout.split("\n")
        assert compose.compose("pretrain", (), [word]).run_dir == value

    def test_any_text_can_be_typed(self) -> None:
        rng = random.Random(0)
        for _ in range(300):
            value = "".join(rng.choices("ab \"'\\$`()[]{}=,:#é\n~!*", k=rng.randrange(12)))
            (word,) = shlex.split(quote_override("name", value))
            assert override_checks.parse(word).value() == value

    def test_words_that_the_shell_cut_are_joined(self) -> None:
        assert "'data.paths=[my file.txt]'" in message("pretrain", "data.paths=[my", "file.txt]")
        assert "'sample.prompt=\"Hello world\"'" in message("pretrain", "sample.prompt=Hello", "world")


class TestNull:
    @pytest.mark.parametrize("group", ["peft", "logger", "quantization"])
    def test_in_a_file_gives_way_to_a_later_choice(self, tmp_path: Path, group: str) -> None:
        chosen = {"peft": "lora", "logger": "jsonl", "quantization": "int8"}[group]
        first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
        first.write_text(f"recipe: sft\n{group}: null\n")
        second.write_text(f"{group}: {chosen}\n")
        assert getattr(compose.compose("sft", [str(first)]), group) is None
        assert getattr(compose.compose("sft", [str(first)], [f"{group}={chosen}"]), group).name == chosen
        assert getattr(compose.compose("sft", [str(first), str(second)]), group).name == chosen

    def test_in_the_defaults_list_of_a_copy_gives_way_to_a_name_below(self, tmp_path: Path) -> None:
        copy = tmp_path / "mine.yaml"
        copy.write_text((builtin_folder("conf") / "sft.yaml").read_text() + "\npeft: lora\n")
        assert compose.compose(str(copy)).peft.name == "lora"

    def test_a_slash_in_front_of_a_group_changes_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text("defaults: [{/model: plm_tiny}]\nrecipe: pretrain\n")
        assert compose.compose(str(tmp_path / "mine.yaml")).model.settings["num_layers"] == 2


class TestMistakes:
    @pytest.mark.parametrize(
        ("override", "parts"),
        [
            ("optimizer.lerning_rate=1", ["optimizer.lerning_rate", "Did you mean optimizer.lr?"]),
            ("lr=1", ["key lr", "Did you mean optimizer.lr?"]),
            ("optimizer.lr=fast", ["override optimizer.lr=fast, key optimizer.lr: fast is not a number"]),
            ("model=plm_tinny", ["plm_tinny", "Did you mean plm_tiny?"]),
            ("modle=plm", ["modle", "Did you mean model?"]),
            ("runtime.precision=fp8", ["runtime.precision", "fp8", "auto, bf16, fp32"]),
            ("scheduler.decay_shape=round", ["scheduler.decay_shape", "round", "cosine"]),
            ("optimizer.lr=1,2", ["several values", "-m"]),
            ("model.attention.component=gqa", ["model/attention=gqa"]),
            ("phases=[{name: a, tokenz: 3}]", ["tokenz", "Did you mean tokens?"]),
            ("seq_len=${nothing}", ["nothing"]),
            ("just words", ["key=value"]),
            ("scheduler=wscd", ["Did you mean wsd or wsdc?"]),
            ("optimizer={lr: fast}", ["override optimizer={lr: fast}, key optimizer.lr: fast is not a number"]),
            ("guard={spike: 3}", ["override guard={spike: 3}, key guard.spike", "Did you mean guard.spike_factor?"]),
            ("guard=3", ["override guard=3, key guard: needs a table"]),
            ("phases={a: b}", ["override phases={a: b}, key phases: needs a list"]),
            ("phases=3", ["key phases: needs a list. Write 'phases=[3]'"]),
            ("optimizer.lr=0,001", ["As one number: optimizer.lr=0.001.", "as a list: 'optimizer.lr=[0,001]'"]),
            ("optimizer.lr='0,001'", ["0,001 is not a number: write 0.001"]),
            ("eval.tasks=null", ["key eval.tasks: needs a list of texts, not null"]),
            ("eval.tasks=[1]", ["key eval.tasks: 1 is no text. Put it in quotes, inside of the shell's: '[\"1\"]'."]),
            ("eval.tasks={a: b}", ["key eval.tasks: needs a list."]),
            ("data=[jsonl]", ["takes the name of one component", "'data.sources={NAME: {component: files, paths: ["]),
            ("logger=[3,jsonl]", ["3 is no logger. Write 'logger=[tensorboard, {component: wandb, project: x}]'"]),
            ("name=[a]", ["override name=[a], key name: needs a text, not a list"]),
            ("seq_len=1.5", ["1.5 is not a whole number"]),
            ("runtime.compile=maybe", ["maybe is not true or false"]),
            ("peft=lora", ["override peft=lora, pretrain has no key peft (it belongs to sft, preference)"]),
            ("model/ffn=null", ["takes the name of a component"]),
            ("loss=[cross_entropy,dpo]", ["key loss: takes the name of one component, not a list"]),
            ("data=[stdlib,files]", ["data=mix"]),
            ("logger=[jsonl,jsonl]", ["names jsonl twice"]),
            ("logger=[jsonl,nosuch]", ["logger has no component nosuch"]),
            ("recipe=sft", ["plmtune run NAME"]),
            ("=3", ["has no key"]),
            ("sample.prompt=a, b", ["several values", "'sample.prompt=\"a, b\"'"]),
        ],
    )
    def test_each_names_the_key_and_what_to_do(self, override: str, parts: list[str]) -> None:
        said = message("pretrain", override)
        assert "\n" not in said
        for part in parts:
            assert part in said

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("optimizer.betas=[0.9]", "needs 2 values, not 1"),
            ("optimizer.betas=[0.9,0.95,0.5]", "needs 2 values, not 3"),
            ("optimizer.betas=[0.9,a]", "key optimizer.betas[1]: a is not a number"),
            ("optimizer.betas=[0.9,[0.5]]", "key optimizer.betas[1]"),
            ("data.paths=[{path: docs.txt}]", "key data.paths[0]: a table where one value is needed (a text)"),
            ("data.paths=[[docs.txt]]", "key data.paths[0]: a list where one value is needed (a text)"),
            ("phases=[{name: a, tokens: [1]}]", "key phases[].tokens: [1] is not a text or a whole number"),
            ("phases=[{name: a, tokens: 1M, mix: {a: [1]}}]", "phases[0].mix"),
        ],
    )
    def test_lists_hold_as_many_values_of_the_kind_as_their_key_needs(self, override: str, said: str) -> None:
        found = message("pretrain", "optimizer=adamw", "data=files", override)
        assert found.startswith(f"override {override}, ") and said in found

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ("optimizer: {lr: 1.0e-4}\nseed: 1\noptimizer: {weight_decay: 0.0}\n", 3),
            ("seed: 1\nseed: 1\n", 2),
            ("phases:\n- name: a\n  steps: 1\n  steps: 2\n", 4),
            ("guard: {patience: 1, patience: 2}\n", 1),
        ],
    )
    def test_a_key_that_is_there_twice_is_refused_with_its_line(self, text: str, line: int, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text(text)
        said = message(overlays=(str(tmp_path / "mine.yaml"),))
        assert f"mine.yaml, line {line}: " in said and "is there twice" in said

    def test_a_value_of_an_alias_or_a_merge_is_not_twice_there(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text(
            "validation: &a {every: 7, tokens: 9}\nphases:\n- {name: a, steps: 1}\n- {name: b, steps: 1}\n"
        )
        assert compose.compose("pretrain", [str(tmp_path / "mine.yaml")]).validation.every == 7

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
            ("model: {component: llamma}", ["key model", "llamma", "Did you mean llama?"]),
            ("model: plm_tinny", ["key model", "Did you mean plm_tiny?"]),
            ("model: mine.yaml", ["key model: mine.yaml is a file", "model=mine.yaml"]),
            ("model: [plm, llama]", ["key model: takes the name of one component"]),
            ("model: 3", ["key model: 3 is no name of a component"]),
            ("model: plm\ndefaults: [override /model: llama]", ["key model: plm is chosen here, and llama in"]),
            ("guard: 3", ["key guard: needs a table of its keys"]),
            ("name: [a]", ["key name: needs a text, not a list"]),
            ("recipe: sft", ["plmtune run sft "]),
            ("defaults: [plm, _self_]\nnum_layers: 3", ["a preset of the group model", "plmtune run pretrain model="]),
            ("defaults: [mla, _self_]", ["a preset of the group attention", "pretrain model/attention="]),
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
            ("dpo", "phases=[{name: a, tokens: 3}]", "dpo has no key phases (it belongs to pretrain, sft)."),
            ("pretrain", "rounds=2", "pretrain has no key rounds (it belongs to preference). Did you mean "
             "multi_round.rounds?"),
            ("pretrain", "epochs=2", "pretrain has no key epochs (it belongs to sft, preference)."),
            ("pretrain", "data.sources.a=1", "key data.sources: data is files, which has no key sources; components "),
            ("dpo", "loss.z_loss=1e-4", "loss is dpo, which has no key z_loss; components of loss that have it: "),
            ("aries", "loss.z_loss=1e-4", "loss is aries, which has no key z_loss; components of loss that have it: "),
            ("quantize", "optimizer.no_decay=[norm]", "quantize has no key optimizer (it belongs to "),
        ],
    )  # fmt: skip
    def test_a_key_that_stands_elsewhere_is_told_where(self, recipe: str, override: str, said: str) -> None:
        assert message(recipe, override).startswith(f"override {override}, {said}")

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        (tmp_path / "latin.yaml").write_bytes("name: \xe9".encode("latin-1"))
        assert "UTF-8" in message(overlays=(str(tmp_path / "latin.yaml"),))
        assert "no such file" in message(overlays=(str(tmp_path / "none.yaml"),))
        assert "Did you mean pretrain?" in message("pretrian")

    def test_a_typed_config_with_a_stranger_in_it_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "config.yaml"
        good = typed_config.to_yaml(compose.compose("pretrain"))
        path.write_text(good.replace("component: plm\n", "component: plmm\n"))
        with pytest.raises(UserError, match=r"config.yaml, key model: .*plmm.*Did you mean plm\?"):
            typed_config.load_config(path)

    def test_build_puts_the_key_before_impossible_numbers(self) -> None:
        chosen = Component("attention", "gqa", {"num_kv_heads": 5})
        with pytest.raises(UserError, match=r"key model: .*12.*5"):
            compose.build("model", Component("model", "llama", {"num_heads": 12, "attention": chosen}), vocab_size=8)


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


class TestMultirun:
    def jobs(self, *overrides: str) -> list[int]:
        """Run jobs that leave a file, of which seed 2 is refused; returns the seeds that ran."""
        ran = []

        def task(cfg: Any) -> None:
            if cfg.seed == 2:
                raise UserError("key seed: not this one.")
            ran.append(cfg.seed)
            if cfg.seed != 3:
                (Path(cfg.run_dir) / "file").touch()

        try:
            compose.multirun("demo", (), overrides, task, Path("runs/multirun/now"))
        finally:
            self.ran = ran
        return ran

    def test_a_refused_job_is_named_and_the_others_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=r"^job 1 \(seed=2\): key seed: not this one\.$"):
            self.jobs("seed=1,2,4", "log_every=7")
        assert self.ran == [1, 4]
        assert sorted(path.name for path in Path("runs/multirun/now").iterdir()) == ["0", "2", "multirun.yaml"]
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize("place", ["", "hydra.sweep.dir=elsewhere/there"])
    def test_of_jobs_that_begin_no_run_nothing_is_left(
        self, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert self.jobs("seed=3,5", *filter(None, [place])) == [3, 5]
        assert len([*tmp_path.glob("*/**/multirun.yaml")]) == 1
        with pytest.raises(UserError, match="job 0"):
            self.jobs("seed=2,3", *filter(None, [place and f"{place}2"]))
        left = {path.name for path in tmp_path.glob("*/**/*") if "now" in str(path) or "there2" in str(path)}
        assert left == ({"now", "1", "file", "multirun.yaml"} if not place else set())

    def test_an_error_that_is_no_users_is_raised_as_it_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)

        def task(cfg: Any) -> None:
            raise KeyError("x")

        with pytest.raises(KeyError):
            compose.multirun("demo", (), ["seed=1,2"], task, Path("runs/multirun/now"))
        assert not [*tmp_path.iterdir()]


TABLES = "model={num_layers: 1, embed_dim: 64},{num_layers: 3, embed_dim: 48}"


class TestTablesOfAMultirun:
    """Several keys that change together: ``model={num_layers: 2, embed_dim: 64},{num_layers: 4, embed_dim: 48}``."""

    @staticmethod
    def models(*overrides: str) -> list[Any]:
        found: list[Any] = []
        with tempfile.TemporaryDirectory() as directory:
            compose.multirun("demo", (), overrides, lambda cfg: found.append((cfg.model, cfg.seed)), Path(directory))
        return found

    def test_each_is_one_value_and_others_multiply(self) -> None:
        tables = "model={num_layers: 2, ffn: {hidden_dim: 64}},{num_layers: 3, ffn: {hidden_dim: 48}}"
        found = [
            (model.settings["num_layers"], model.settings["ffn"].settings["hidden_dim"], seed)
            for model, seed in self.models("model.num_layers=7", tables, "seed=1,2")
        ]
        assert found == [(2, 64, 1), (2, 64, 2), (3, 48, 1), (3, 48, 2)]

    def test_a_table_chooses_components_with_their_own_defaults(self) -> None:
        found = self.models("model=plm_tiny", "model={component: llama, num_layers: 2},{component: plm, num_layers: 3}")
        assert [(m.name, m.settings["num_layers"], m.settings["embed_dim"]) for m, _ in found] == [
            ("llama", 2, 576),
            ("plm", 3, 2048),
        ]

    def test_of_a_nested_component_and_one_alone(self) -> None:
        found = self.models("model.ffn={hidden_dim: 2},{hidden_dim: 4}")
        assert [model.settings["ffn"].settings["hidden_dim"] for model, _ in found] == [2, 4]
        ((model, _),) = self.models("model=choice({ffn: {component: swiglu, hidden_dim: 2}})")
        assert model.settings["ffn"].name == "swiglu"

    @pytest.mark.parametrize(
        ("overrides", "left"),
        [
            (["model={num_layers: 5, max_seq_len: 64}", TABLES], ["model.max_seq_len=64", TABLES]),
            (["model={num_layers: 5}", TABLES], [TABLES]),
            (["model.num_layers=2,4", TABLES], [TABLES]),
            (["model.ffn={hidden_dim: 9}", "model={ffn: {hidden_dim: 6}},{ffn: {hidden_dim: 4}}"], None),
            (["model.num_layers=2,4", "model.num_layers=3"], None),
            (["model.num_layers=2,4", "model={num_layers: 3}"], None),
            (["model.num_layers=3", "model={num_layers: 5}", "model.num_layers=2,6"], None),
            (["model={ffn: {hidden_dim: 4}}", "model.ffn={hidden_dim: 3}"], None),
            (["model={num_layers: 5}", "model={embed_dim: 64}"], ["model={num_layers: 5}", "model={embed_dim: 64}"]),
            (["model=plm,llama", "model=llama"], None),
        ],
    )
    def test_each_key_keeps_the_last_override_that_gives_it(self, overrides: list[str], left: list[str] | None) -> None:
        plain, swept = override_checks.split_sweeps(overrides)
        assert (plain, swept) == override_checks.split_sweeps(left or overrides[-1:])
        named = [text.partition("=")[0] for text in override_checks.check_overrides(overrides, multirun=True)]
        assert len({*named}) == len(named)  # of two a sweeper keeps the last value in the first's place

    @pytest.mark.parametrize(
        ("overrides", "wanted"),
        [
            (["model={num_layers: 5, max_seq_len: 64}", TABLES], [(1, 64, 64), (3, 48, 64)]),
            (["model=llama", "model={num_layers: 2}", "model={max_seq_len: 32}"], [(2, 576, 32)]),
        ],
    )
    def test_what_a_multirun_trains_is_what_plan_shows(
        self, overrides: list[str], wanted: list[tuple[int, ...]]
    ) -> None:
        def sizes(model: Any) -> tuple[int, ...]:
            return tuple(model.settings[key] for key in ("num_layers", "embed_dim", "max_seq_len"))

        assert [sizes(model) for model, _ in self.models(*overrides)] == wanted
        plain, swept = override_checks.split_sweeps(overrides)
        planned = [compose.compose("demo", (), [*plain, *texts]).model for texts in itertools.product(*swept.values())]
        assert [sizes(model) for model in planned] == wanted

    def test_what_is_added_to_a_dictionary_is_joined(self) -> None:
        sources = [f"data.sources={{{name}: {{component: stdlib}}}}" for name in "ab"]
        joined = "++data.sources={a: {component: stdlib}, b: {component: stdlib}}"
        assert override_checks.check_overrides(["data=mix", *sources], multirun=True) == ["data=mix", joined]
        assert override_checks.split_sweeps(sources)[0] == [joined]
        assert override_checks.check_overrides(sources) == [f"++{text}" for text in sources]

    def test_a_refused_job_is_named_by_its_table(self) -> None:
        def task(cfg: Any) -> None:
            raise UserError("not this one.")

        with tempfile.TemporaryDirectory() as directory, pytest.raises(UserError) as said:
            compose.multirun("demo", (), ["model={num_layers: 2},{num_layers: 4}"], task, Path(directory))
        assert str(said.value) == "job 0 (model={num_layers: 2}): not this one."

    @pytest.mark.parametrize(
        ("overrides", "says"),
        [
            (["model={num_layers: 2},{num_layers: 4}", "model.num_layers=3"], "give this key, too. Keep one of them"),
            (
                ["model={num_layers: 2},{num_layers: 4}", "model={num_layers: 3, embed_dim: 32}"],
                "give model.num_layers, too",
            ),
            (
                ["model={ffn: {hidden_dim: 2}},{ffn: {hidden_dim: 4}}", "model.ffn={hidden_dim: 3}"],
                "give model.ffn.hid",
            ),
            (["model={num_layers: 2},{num_layers: 4}", "model.num_layers=1,3"], "give this key, too"),
            (["model={num_layers: 2},{num_layers: 4}"] * 2, "gives model.num_layers, as override model="),
            (["model={num_layers: 2},{embed_dim: 64}"], "must give the same keys, and not all of them give model.em"),
            (["model={num_layer: 2},{num_layer: 4}"], "Did you mean model.num_layers?"),
            (["model={ffn: swigluu},{ffn: swiglu}"], "model/ffn has no option swigluu. Did you mean swiglu?"),
            (["model={_target_: a.b},{_target_: c.d}"], "not allowed. Components are named"),
            (["+model={num_layers: 2},{num_layers: 4}"], "write it without +"),
            (["model={defaults: [a]},{defaults: [b]}"], "has a key defaults, which tables cannot have"),
            (["model={num_layers: 2},{}"], "has a table without keys. Write model={KEY: VALUE}"),
        ],
    )
    def test_mistakes_are_sentences(self, overrides: list[str], says: str) -> None:
        with pytest.raises(UserError) as said:
            self.models(*overrides)
        assert says in str(said.value) and overrides[0][:20] in str(said.value)

    def test_outside_of_a_multirun_they_are_several_values(self) -> None:
        with pytest.raises(UserError, match="To run them all: plmtune run -m"):
            compose.compose("demo", (), ["model={num_layers: 2},{num_layers: 4}"])


def test_keys_of_a_file_under_a_component_that_is_null_are_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {max_seq_len: 128}\n")
    with pytest.raises(UserError, match=r"key model: has no component, and model.max_seq_len needs one: take it out"):
        compose.compose("pretrain", (str(tmp_path / "mine.yaml"),), ["model=null", "init_from=x"])
