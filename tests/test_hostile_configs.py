"""Configs made to do harm: nothing they name is imported or called, by whatever road they come in.

Hydra's `instantiate` imports and calls what its keys name, and its own block list is no boundary. Each case here goes
in as an overlay, in a multirun, to ``validate`` and as the saved config of a run that is resumed. The proof is a
module on the path that would leave a file behind, and the interpreter's own audit events.
"""

import importlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from plmtune.cli import cli
from plmtune.config import compose, messages, typed_config
from plmtune.errors import UserError

CALLS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "socket.connect",
         "shutil.rmtree", "ctypes.dlopen")  # fmt: skip

RECIPES = ("pretrain", "sft", "preference")

CANARY = """
from pathlib import Path
Path({owned!r}).touch()
def call(*args, **kwargs):
    Path({owned!r}).touch()
"""


class Audit:
    """What the interpreter was asked to do while `on`; a hook cannot be taken away again."""

    on = False
    seen: list[str] = []  # noqa: RUF012  (one for all)

    @classmethod
    def hook(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if cls.on and (event in CALLS or (event == "import" and "canary" in str(arguments[0]))):
            cls.seen.append(f"{event} {arguments[:2]!r:.200}")


@pytest.fixture(scope="module")
def saved() -> str:
    """A good config as a run saves it; everything that a config may import is imported by now."""
    sys.addaudithook(Audit.hook)
    for recipe in RECIPES:
        importlib.import_module(f"plmtune.recipes.{recipe}")

    return typed_config.to_yaml(compose.compose("pretrain", (), ["data=mix", "data.sources={a: {component: stdlib}}"]))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: str) -> Iterator[Path]:
    """An empty working directory, a canary on the path beside it, and an alarm for what would never end."""
    where, traps = tmp_path / "place", tmp_path / "traps"
    where.mkdir()
    traps.mkdir()
    (traps / "canary.py").write_text(CANARY.format(owned=str(tmp_path / "OWNED")))
    (traps / "evil.yaml").write_text(
        "# @package _global_\nhydra:\n  callbacks: {a: {_target_: canary.call}}\n"
        "  job_logging: {version: 1, handlers: {h: {(): canary.call}}}\n"
    )
    monkeypatch.syspath_prepend(str(traps))
    monkeypatch.chdir(where)
    monkeypatch.setenv("SECRET", "hunter2")
    for recipe in RECIPES:
        for entry in ("main", "preflight"):
            monkeypatch.setattr(f"plmtune.recipes.{recipe}.{entry}", never)

    def too_long(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError("it did not end")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(120)
    yield where
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refusal(place: Path, action: Callable[[], Any]) -> str:
    """The one sentence that `action` ends with, when it did nothing else."""
    modules, files = set(sys.modules), sorted(place.rglob("*"))
    Audit.seen, Audit.on = [], True
    try:
        with pytest.raises(UserError) as caught:
            action()
    finally:
        Audit.on = False
    said = str(caught.value)
    assert not Audit.seen
    assert not [name for name in set(sys.modules) - modules if not name.startswith(("plmtune.", "hydra."))]
    assert not (place.parent / "OWNED").exists()
    assert sorted(place.rglob("*")) == files, "something was written"
    assert "hunter2" not in said
    assert 10 < len(said) < 1000 and "Traceback" not in said, said
    return said


def run(*arguments: str) -> Callable[[], Any]:
    return lambda: cli.main([*arguments], prog_name="plmtune", standalone_mode=False)


def laughs(first: str, item: str) -> str:
    """Ten levels of which each names the one before ten times: 10^10 values in a kilobyte."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} {item.format(','.join([f'*a{i - 1}'] * 10))}" for i in range(1, 11)]
    return "\n".join(lines)


ROADS = {
    "overlay": ("run", "pretrain", "evil.yaml"),
    "alone": ("run", "evil.yaml"),
    "multirun": ("run", "-m", "pretrain", "evil.yaml", "log_every=1,2"),
    "validate": ("validate", "evil.yaml"),
    "resume": ("resume", "run"),
}

FILES = {
    # what Hydra's instantiate would call
    "target_at_the_top": "_target_: canary.call",
    "target_in_a_component": "optimizer: {_target_: canary.call}",
    "target_in_a_nested_component": "model: {attention: {_target_: canary.call}}",
    "target_in_a_list": "phases: [{_target_: canary.call}]",
    "target_in_a_source": "data: {sources: {a: {_target_: canary.call}}}",
    "target_in_a_setting_of_a_source": "data: {sources: {a: {component: files, paths: [{_target_: canary.call}]}}}",
    "target_as_a_dotted_key": "optimizer._target_: canary.call",
    "target_in_the_logger": "logger: {component: jsonl, _target_: canary.call}",
    "target_in_adapters": "recipe: sft\npeft: {_target_: canary.call}",
    "target_in_a_chat": "recipe: sft\nchat: {_target_: canary.call}",
    "target_in_a_reward": "recipe: preference\nreward: {_target_: canary.call}",
    "target_in_a_rule": "recipe: preference\nselection: {rules: [{_target_: canary.call}]}",
    "os_system": "optimizer: {_target_: os.system, command: touch ../OWNED}",
    "subprocess": "optimizer: {_target_: subprocess.check_call, args: [touch, ../OWNED]}",
    "eval": "optimizer: {_target_: builtins.eval, _args_: ['__import__(\"canary\")']}",
    "exec": "optimizer: {_target_: builtins.exec, _args_: ['import canary']}",
    "joblib_load": "optimizer: {_target_: joblib.load, filename: evil.pkl}",
    "torch_load": "optimizer: {_target_: torch.load, f: evil.pt, weights_only: false}",
    "pathlib_write_text": "optimizer: {_target_: pathlib.Path.write_text, self: ../OWNED, data: x}",
    "chain_of_partials": "optimizer: {_target_: functools.partial, _args_: [{_target_: canary.call, _partial_: true}]}",
    "partial": "model: {attention: {_partial_: true}}",
    "call": "optimizer: {_call_: true}",
    "args": "optimizer: {_args_: [1]}",
    "recursive": "model: {_recursive_: true}",
    "convert": "model: {_convert_: all}",
    # Hydra's own settings
    "hydra_callbacks": "hydra: {callbacks: {a: {_target_: canary.call}}}",
    "hydra_job_logging_factory": "hydra: {job_logging: {version: 1, handlers: {h: {(): canary.call}}}}",
    "hydra_dotted": "hydra.callbacks: {a: {_target_: canary.call}}",
    "hydra_sweeper": "hydra: {sweeper: {_target_: canary.call}}",
    "hydra_sweeper_params": "hydra: {sweeper: {params: {model: ../../evil}}}",
    "hydra_chdir": "hydra: {job: {chdir: true}}",
    "hydra_run_dir": "hydra: {run: {dir: ../OWNED}}",
    "hydra_output_subdir": "hydra: {output_subdir: ../OWNED}",
    "hydra_searchpath_file": "hydra: {searchpath: ['file://{traps}']}",
    "hydra_searchpath_package": "hydra: {searchpath: ['pkg://canary']}",
    "hydra_launcher_in_defaults": "defaults: [override /hydra/launcher: joblib]",
    "hydra_launcher_in_defaults_relative": "defaults: [override hydra/launcher: joblib]",
    "hydra_job_logging_in_defaults": "defaults: [/hydra/job_logging: x]",
    "hydra_as_text_in_defaults": "defaults: [hydra/job_logging/default]",
    # defaults lists that climb out, or put things where they do not belong
    "defaults_climb": "defaults: [../../../../../../../../{traps}/evil]",
    "defaults_climb_from_the_root": "defaults: [/../../../../../../../../{traps}/evil]",
    "defaults_absolute": "defaults: ['{traps}/evil']",
    "defaults_file_scheme": "defaults: ['file://{traps}/evil']",
    "defaults_package_scheme": "defaults: ['pkg://canary/evil']",
    "defaults_climb_in_a_group": "defaults: [override /model: ../../../../../../../..{traps}/evil]",
    "defaults_climb_in_a_group_list": "defaults: [{/model: [plm, ../../../../../../../..{traps}/evil]}]",
    "defaults_package_global": "defaults: ['../../../../../../../..{traps}/evil@_global_']",
    "defaults_package_hydra": "defaults: ['pretrain_schema@hydra']",
    "defaults_group_into_callbacks": "defaults: ['/model@hydra.callbacks.a: plm', {'/model@hydra.callbacks.a': plm}]",
    "defaults_reference": "defaults: [{override /model: '${oc.env:SECRET}'}]",
    "defaults_no_list": "defaults: {a: b}",
    "defaults_number": "defaults: 5",
    "defaults_nested": "defaults: [[_self_]]",
    # OmegaConf's resolvers and references
    "secret": "name: ${oc.env:SECRET}",
    "secret_in_a_text": "sample: {prompt: 'tell ${oc.env:SECRET}'}",
    "secret_in_a_chat_template": "recipe: sft\nchat: {template: '${oc.env:SECRET}'}",
    "secret_in_a_refinement": "recipe: preference\nrefinement: {template: '${oc.env:SECRET}'}",
    "secret_with_a_default": "name: ${oc.env:SECRET,none}",
    "secret_by_a_nested_reference": "name: SECRET\nrun_dir: ${oc.env:${name}}",
    "decode": "optimizer: ${oc.decode:'{_target_: canary.call}'}",
    "create": "optimizer: ${oc.create:{_target_: canary.call}}",
    "dict_values": "name: ${oc.dict.values:optimizer}",
    "unknown_resolver": "name: ${canary:call}",
    "hydra_resolver": "name: ${hydra:runtime.cwd}",
    "reference_escaped": "name: '\\${name}'",
    "reference_unfinished": "name: ${seed",
    "reference_deep": "name: '" + "${" * 300 + "}" * 300 + "'",
    # YAML
    "tag_python_apply": "tokenizer: !!python/object/apply:canary.call []",
    "tag_python_new": "tokenizer: !!python/object/new:canary.call {}",
    "tag_python_name": "tokenizer: !!python/name:canary.call",
    "tag_python_module": "tokenizer: !!python/module:canary",
    "tag_own": "tokenizer: !canary x",
    "laughs_in_lists": laughs("[x]", "[{}]"),
    "laughs_in_tables": laughs("{x: 1}", "{{<<: [{}]}}"),
    "alias_of_itself": "phases: &a [*a]",
    "aliases_deep": "a0: &a0 [x]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 300)),
    "lists_deep": "phases: " + "[" * 5000 + "]" * 5000,
    "tables_deep": "phases: " + "{a: " * 5000,
    "many_values": "phases: [" + "1," * 10_000 + "]",
    "large": "name: " + "x" * (1 << 20),
    "number_of_many_digits": "seq_len: " + "9" * 5000,
    "number_beyond_64_bits": "seed: 123456789012345678901234567890",
    "date": "name: 2001-01-01",
    "date_that_is_none": "name: 2001-99-99",
    "set": "name: !!set {a}",
    "bytes": "name: !!binary aGVsbG8=",
    "key_none": "null: 1",
    "key_number": "phases: [{1: 2}]",
    "key_of_a_table": "? {a: b}\n: c",
    "nul": 'run_dir: "a\\0b"',
    "half_a_surrogate_pair": 'run_dir: "\\ud800"',
    "value_missing": "seq_len: '???'",
    # names
    "component_null_byte": 'data: {sources: {a: {component: "files\\0"}}}',
    "recipe_path": "recipe: ../../canary",
    "recipe_file": "recipe: '{traps}/canary.py'",
    "recipe_module": "recipe: canary",
    "recipe_dunder": "recipe: __init__",
    "recipe_list": "recipe: [canary]",
    "recipe_table": "recipe: {canary: 1}",
}  # fmt: skip

# What only the composed config shows.
COMPOSED = {
    "reference_in_a_key": "optimizer: {'${name}': 1}",
    "reference_to_itself": "name: ${name}",
    "reference_to_a_table": "name: ${optimizer}",
    "references_that_double": "phases:\n- {name: xxxxxxxxxx, steps: 1}\n"
    + "".join(f"- {{name: '${{phases[{i}].name}}${{phases[{i}].name}}', steps: 1}}\n" for i in range(40)),
    "references_that_double_nothing": "phases:\n- {name: '', steps: 1}\n"
    + "".join(f"- {{name: '${{phases[{i}].name}}${{phases[{i}].name}}', steps: 1}}\n" for i in range(40)),
    "number_of_many_digits_in_a_text": "seq_len: '" + "9" * 5000 + "'",
    "number_beyond_64_bits_in_a_text": "seed: '123456789012345678901234567890'",
    "infinite": "seq_len: .inf",
    "component_dotted": "data: {sources: {a: {component: canary.call}}}",
    "component_path": "data: {sources: {a: {component: ../canary}}}",
    "component_slash": "data: {sources: {a: {component: canary/call}}}",
    "component_dunder": "data: {sources: {a: {component: __class__}}}",
    "component_entry_point": "data: {sources: {a: {component: 'canary:call'}}}",
    "component_list": "data: {sources: {a: {component: [canary]}}}",
    "component_look_alike": "data: {sources: {a: {component: \u0441anary}}}",
    "component_full_width": "data: {sources: {a: {component: \uff46\uff49\uff4c\uff45\uff53}}}",
    "component_of_another_group": "data: {sources: {a: {component: adamw}}}",
    "key_look_alike": "\u043eptimizer: {lr: 1}",
    "key_dunder": "optimizer: {__class__: canary}",
}


def never(*_arguments: object, **_named: object) -> None:
    raise AssertionError("reached")


def write(place: Path, saved: str, text: str) -> None:
    text = text.replace("{traps}", str(place.parent / "traps"))
    (place / "evil.yaml").write_text(text)
    (place / "run").mkdir()
    # A good config in which one key is hostile.
    keys = "|".join(re.findall(r"^([a-z_]+):", text, re.MULTILINE)) or "none"
    kept = re.sub(rf"^(?:{keys}):.*\n(?:[ -].*\n)*", "", saved, flags=re.MULTILINE)
    (place / "run/config.yaml").write_text(f"{kept}\n{text}\n")


# These read a file by the code of "overlay": by default every eighth case takes them.
ROADS_OF_AN_OVERLAY = ("alone", "multirun", "validate")


def files_and_roads() -> list[Any]:
    """Cases of FILES with ROADS."""
    return [
        pytest.param(case, road, marks=pytest.mark.slow if number % 8 and road in ROADS_OF_AN_OVERLAY else ())
        for number, case in enumerate(FILES)
        for road in ROADS
    ]


class TestFiles:
    @pytest.mark.parametrize(("case", "road"), files_and_roads())
    def test_are_refused_before_hydra_sees_them(
        self, case: str, road: str, place: Path, saved: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(compose, "hydra_compose", never)
        monkeypatch.setattr(messages, "hydra_compose", never)
        monkeypatch.setattr(compose, "hydra_main", never)
        write(place, saved, FILES[case])
        refusal(place, run(*ROADS[road]))

    @pytest.mark.parametrize("road", ["overlay", "resume"])
    @pytest.mark.parametrize("case", COMPOSED)
    def test_name_nothing_that_is_not_registered(self, case: str, road: str, place: Path, saved: str) -> None:
        write(place, saved, COMPOSED[case])
        refusal(place, run(*ROADS[road]))

    @pytest.mark.parametrize(
        ("recipe", "text"),
        [
            ("sft", "peft: {component: canary.call}"),
            ("dpo", "loss: {component: canary.call}"),
            ("aries", "reward: {component: canary.call}"),
        ],
    )
    def test_name_nothing_in_fine_tuning_either(self, recipe: str, text: str, place: Path, saved: str) -> None:
        write(place, saved, text)
        assert "canary" in refusal(place, run("run", recipe, "evil.yaml"))

    def test_a_multirun_checks_what_it_composes(self, place: Path, saved: str) -> None:
        write(place, saved, COMPOSED["component_dotted"])
        refusal(place, run(*ROADS["multirun"]))

    def test_the_same_roads_take_a_good_file(self, place: Path, saved: str) -> None:
        (place / "good.yaml").write_text(
            "recipe: pretrain\ndefaults: [override /optimizer: adamw]\nseed: 5\nname: a${seed}"
        )
        assert compose.compose("good.yaml").name == compose.compose("pretrain", ["good.yaml"]).name == "a5"
        (place / "config.yaml").write_text(saved)
        assert typed_config.to_yaml(typed_config.load_config(place / "config.yaml")) == saved

    @pytest.mark.parametrize("name", ["evil.yaml", "run/config.yaml"])
    def test_that_are_no_files_are_not_opened(self, name: str, place: Path) -> None:
        (place / "run").mkdir()
        os.mkfifo(place / name)
        refusal(place, run(*ROADS["resume" if "run" in name else "overlay"]))

    def test_that_link_to_a_device_are_not_read(self, place: Path) -> None:
        (place / "evil.yaml").symlink_to("/dev/zero")
        refusal(place, run(*ROADS["overlay"]))


OVERRIDES = {
    "target": "optimizer._target_=canary.call",
    "target_added": "++optimizer._target_=canary.call",
    "target_in_a_table": "optimizer={_target_: canary.call}",
    "target_quoted": "optimizer={'_target_': canary.call}",
    "target_in_a_source": "data.sources={a: {_target_: canary.call}}",
    "target_swept": "optimizer.lr=choice({_target_: canary.call})",
    "partial": "+model.attention._partial_=true",
    "callbacks": "+hydra.callbacks={a: {_target_: canary.call}}",
    "callbacks_quoted": "+hydra.callbacks={a: {'_target_': canary.call}}",
    "callbacks_decoded": "+hydra.callbacks=${oc.decode:'{a: {_target_: canary.call}}'}",
    "job_logging": "hydra.job_logging={version: 1, handlers: {h: {'()': canary.call}}}",
    "job_logging_option": "hydra/job_logging=../../../../../../..{traps}/evil",
    "launcher_target": "hydra.launcher._target_=canary.call",
    "launcher_table": "hydra.launcher={_target_: canary.call}",
    "launcher_climbs": "hydra/launcher=../../../../../../../..{traps}/evil",
    "sweeper_target": "hydra.sweeper._target_=canary.call",
    "sweeper_params": "hydra.sweeper.params={hydra.callbacks.a: x}",
    "sweeper_params_climb": "+hydra.sweeper.params.model=../../../../../../../..{traps}/evil",
    "sweep_dir_resolver": "hydra.sweep.dir=${oc.env:SECRET}",
    "searchpath_file": "hydra.searchpath=['file://{traps}']",
    "searchpath_package": "hydra.searchpath=['pkg://canary']",
    "chdir": "hydra.job.chdir=true",
    "run_dir": "hydra.run.dir=../OWNED",
    "output_subdir": "hydra.output_subdir=../OWNED",
    "mode": "hydra.mode=RUN",
    "package_global": "+model@_global_=plm",
    "package_callbacks": "+model@hydra.callbacks.a=plm",
    "group_climbs": "model=../../../../../../../..{traps}/evil",
    "nested_group_climbs": "model/ffn=../../../../../../../../..{traps}/evil",
    "group_absolute": "model={traps}/evil",
    "group_climbs_swept": "model=plm,../../../../../../../..{traps}/evil",
    "unpickles": "--experimental-rerun={traps}/evil.pkl",
    "config_dir": "--config-dir={traps}",
    "secret": "name=${oc.env:SECRET}",
    "decode": "name=${oc.decode:'1'}",
    "deep": "name=" + "[" * 1000 + "]" * 1000,
    "deep_choices": "name=" + "choice(" * 300 + ")" * 300,
    "number_of_many_digits": "seed=" + "9" * 5000,
    "recipe": "recipe=../../canary",
    "component": "+data.sources={a: {component: canary.call}}",
}


class TestOverrides:
    @pytest.mark.parametrize("road", ["run", "multirun", "validate"])
    @pytest.mark.parametrize("case", OVERRIDES)
    def test_ends_with_a_sentence_and_nothing_else(self, case: str, road: str, place: Path) -> None:
        override = OVERRIDES[case].replace("{traps}", str(place.parent / "traps"))
        before = {"run": ("run",), "multirun": ("run", "-m"), "validate": ("validate",)}[road]
        refusal(place, run(*before, "pretrain", "--", "data=mix", override))

    def test_hydras_launchers_and_sweepers_can_be_set_for_a_multirun(self, place: Path) -> None:
        seeds: list[int] = []
        compose.multirun(
            "pretrain",
            (),
            ["seed=1,2", "hydra/launcher=basic", "hydra.sweep.dir=sweep", "hydra.sweep.subdir='s${hydra.job.num}'"],
            lambda cfg: seeds.append(cfg.seed) or 0,
            place / "jobs",
        )
        assert seeds == [1, 2]


class TestEnvironment:
    def test_variables_meant_for_plmtune_are_read(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PLMTUNE_LENGTH", "64")
        (place / "mine.yaml").write_text("seq_len: ${oc.env:PLMTUNE_LENGTH}\nname: '${oc.env:PLMTUNE_NO,a b}'")
        cfg = compose.compose("pretrain", ["mine.yaml"])
        assert (cfg.seq_len, cfg.name) == (64, "a b")

    def test_what_a_variable_holds_is_text_and_no_reference(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PLMTUNE_NAME", "${oc.env:SECRET}")
        assert "PLMTUNE_NAME" in refusal(place, run("run", "pretrain", "name=${oc.env:PLMTUNE_NAME}"))

    def test_a_variable_that_is_not_set_is_named(self, place: Path) -> None:
        assert "PLMTUNE_NO" in refusal(place, run("run", "pretrain", "name=${oc.env:PLMTUNE_NO}"))


DEVICES = {
    "data_zero": ("data", ["data=files", "data.paths=[/dev/zero]"]),
    "data_random": ("data", ["data=files", "data.paths=[/dev/urandom]", "data.format=jsonl"]),
    "data_fifo": ("data", ["data=files", "data.paths=[fifo]"]),
    "data_link_to_a_fifo": ("data", ["data=files", "data.paths=[link]"]),
    "data_glob_of_fifos": ("data", ["data=files", "data.paths=[f*o]"]),
    "data_shards_in_a_device": ("data", ["data=shards", "data.path=/dev/zero"]),
    "tokenizer_zero": ("tokenizer", ["tokenizer=file", "tokenizer.path=/dev/zero"]),
    "tokenizer_fifo": ("tokenizer", ["tokenizer=file", "tokenizer.path=fifo"]),
    "tokenizer_qwen2_fifo": ("tokenizer", ["tokenizer=qwen2", "tokenizer.path=fifo"]),
}


class TestDevices:
    @pytest.mark.parametrize("case", DEVICES)
    def test_are_refused_and_not_waited_for(self, case: str, place: Path) -> None:
        os.mkfifo(place / "fifo")
        (place / "link").symlink_to("fifo")
        group, overrides = DEVICES[case]
        cfg = compose.compose("pretrain", (), overrides)
        refusal(place, lambda: compose.build(group, getattr(cfg, group)))


class TestCommandLine:
    @pytest.mark.parametrize("road", ["overlay", "resume"])
    def test_exit_code_is_2_with_one_sentence(self, road: str, place: Path, saved: str) -> None:
        write(place, saved, "optimizer: {_target_: canary.call}")
        done = subprocess.run(
            [sys.executable, "-m", "plmtune", *ROADS[road]],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(place.parent / "traps")},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.startswith("plmtune: ") and done.stderr.count("\n") == 1 and not done.stdout
        assert not (place.parent / "OWNED").exists()
