"""`plmtune validate`, `run --dry-run` and `run` refuse the same configs, in the same words."""

import copy
import dataclasses
import importlib
import sys
import typing
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_runs import SMALL
from tuning import PREFERENCE, SFT, compose

from plmtune.cli.validate import check
from plmtune.config.schema import SCHEMAS
from plmtune.config.typed_config import from_plain, to_plain
from plmtune.errors import UserError
from plmtune.registry import Component, describe_components, keys_of
from plmtune.tokenizers import tokenizer_files
from plmtune.training.estimate import estimate
from plmtune.training.preflight import check_loss_settings
from plmtune.training.runtime import Runtime

CONFIGS = {
    "pretrain": ("pretrain", [text.replace("[corpus]", "[talk.jsonl]") for text in SMALL]),
    "sft": ("sft", SFT),
    "preference": ("dpo", PREFERENCE),
    "quantize": ("quantize", ["checkpoint=base", "data=files", "data.paths=[talk.jsonl]", "seq_len=16"]),
    "prune": (
        "prune",
        ["checkpoint=base", "data=files", "data.paths=[talk.jsonl]", "seq_len=16", "model.ffn.hidden_dim=8"],
    ),
}
TINY = {
    "embed_dim": 8,
    "num_layers": 1,
    "num_heads": 2,
    "max_seq_len": 16,
    "attention": Component("attention", "mha", {}),
    "ffn": Component("ffn", "swiglu", {"hidden_dim": 8}),
}
# Components are tried where they are at home; a recipe's own are its first.
GROUPS = {
    "pretrain": ("model", "tokenizer", "optimizer", "scheduler", "logger", "data"),
    "sft": ("peft", "quantization", "data", "loss"),
    "preference": ("reward", "data", "loss"),
    "quantize": ("quantization", "data"),
    "prune": ("data",),
}
MAKERS = {"pretrain": "Pretrain", "sft": "Sft", "preference": "Preference", "quantize": "Quantize", "prune": "Prune"}


class Begun(Exception):
    """A run got as far as allocating its model."""


@pytest.fixture
def place(base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model and data, in which no run gets beyond its preflight."""

    def begin(*arguments: Any) -> None:
        raise Begun

    for recipe, name in MAKERS.items():
        monkeypatch.setattr(importlib.import_module(f"plmtune.recipes.{recipe}"), name, begin)
    # What takes time, or depends on what else this machine does.
    monkeypatch.setattr("plmtune.training.runtime.seed_everything", lambda seed: None)
    monkeypatch.setattr("plmtune.tokenizers.tokenizer_files._read", cache(tokenizer_files._read))
    model, here = Component("model", "plm", TINY)(vocab_size=8), Runtime(torch.device("cpu"), torch.float32)
    estimated = estimate(model, here, optimizer="adamw", seq_len=8, micro_batch_size=1)
    monkeypatch.setattr("plmtune.training.preflight.estimate", lambda *arguments, **keywords: estimated)
    return base


def verdict(act: Callable[[], object]) -> str:
    """The sentence of a refusal, empty if there is none. Any other error is the test's failure."""
    try:
        act()
    except UserError as error:
        return str(error).splitlines()[0]
    except Begun:
        pass
    finally:
        torch.use_deterministic_algorithms(False)
    return ""


def verdicts(cfg: Any) -> dict[str, str]:
    """What each road says of a config."""
    recipe = importlib.import_module(f"plmtune.recipes.{cfg.recipe}")
    return {
        "validate": verdict(lambda: check(recipe, copy.deepcopy(cfg))),
        "dry run": verdict(lambda: recipe.main(copy.deepcopy(cfg), dry_run=True)),
        "run": verdict(lambda: recipe.main(copy.deepcopy(cfg))),
    }


def composed(recipe: str, *overrides: str) -> Any:
    name, settings = CONFIGS[recipe]
    return compose(name, *settings, *overrides)


# --- every key, found by introspection ---------------------------------------------------------------------------


def keys(schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full name and type of each key of a schema that is no section and no component."""
    hints = typing.get_type_hints(schema, include_extras=True)
    for item in dataclasses.fields(schema):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            yield from keys(kind, f"{prefix}{item.name}.")
        elif Component not in (kind, *typing.get_args(kind)) and item.name != "recipe":
            yield prefix + item.name, kind


NEEDED = {
    ("data", "files"): {"paths": ["talk.jsonl"]},
    ("data", "conversations"): {"paths": ["talk.jsonl"]},
    ("data", "preferences"): {"paths": ["pairs.jsonl"]},
    ("data", "hub"): {"name": "a/b"},
    ("data", "mix"): {"sources": {"a": {"component": "files", "paths": ["talk.jsonl"]}}},
    ("quantization", "mixed"): {"rules": {"*.ffn.*": "int8"}},
}


def components(recipe: str) -> Iterator[tuple[str, Component]]:
    """Each registered component that a key of a recipe can choose with that key, those nested in it included."""

    def of(key: str, group: str) -> Iterator[tuple[str, Component]]:
        for name in describe_components()[group]:
            yield key, Component(group, name, TINY if group == "model" else NEEDED.get((group, name), {}))
            for nested, held in keys_of(group, name).items():
                if isinstance(held.default, Component) and name == "plm":  # llama has the same ones
                    yield from of(f"{key}.{nested}", held.default.group)

    for group in GROUPS[recipe]:
        yield from of(group, group)


def kinds(annotation: Any) -> set[Any]:
    """The plain types inside an annotation."""
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return {typing.Literal}
    return set().union(*map(kinds, inner)) if inner else {annotation}


def broken(annotation: Any) -> list[Any]:
    """Values of which most are impossible for a key of this type."""
    found = kinds(annotation)
    values: list[Any] = []
    if found & {int, float}:
        values += [-1, float("nan"), float("inf"), 0]
    if str in found or typing.Literal in found:
        values += ["", "nosuch", "-5%"]
    if bool in found:
        values += ["perhaps"]
    origin = typing.get_origin(annotation)
    if origin in (list, tuple):
        values = [[], ["nosuch"], [""], [-1], [0.1, 0.2, 0.3], "nosuch"]
    elif origin is dict:
        values = [{"nosuch": "nosuch"}, {"nosuch": -1}, "nosuch"]
    return [*values, {"nosuch": 1}]


def replaced(plain: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(plain)
    *above, last = key.split(".")
    section = changed
    for name in above:
        section[name] = section[name] or {}
        section = section[name]
    section[last] = value
    return changed


# Keys whose tasks, tokenizers or packages take seconds to look up have tests of their own.
SLOW: set[str] = set()


def agree(plain: dict[str, Any], key: str, value: Any) -> str:
    """The sentence with which all roads refuse a value, empty if all accept it."""
    try:
        cfg = from_plain(replaced(plain, key, value))
    except UserError as error:  # every road composes first
        return str(error)
    said = verdicts(cfg)
    assert len(set(said.values())) == 1, (key, value, said)
    return said["run"]


def drawn(annotation: Any, index: int, every: bool) -> list[Any]:
    """All broken values of a type, or one of them, another one for each key."""
    values = broken(annotation)
    return values if every else [values[index % len(values)]]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one_value", "all_values"])
@pytest.mark.parametrize("recipe", SCHEMAS)
class TestEveryKey:
    def test_of_a_schema_is_judged_equally_by_all_commands(self, recipe: str, every: bool, place: Path) -> None:
        plain = to_plain(composed(recipe))
        assert set(verdicts(from_plain(plain)).values()) == {""}
        earlier = {key for name in [*SCHEMAS][: [*SCHEMAS].index(recipe)] for key, _ in keys(SCHEMAS[name])}
        for index, (key, annotation) in enumerate(keys(SCHEMAS[recipe])):
            if key in SLOW or (key in earlier and not every):
                continue
            for value in drawn(annotation, index, every):
                said = agree(plain, key, value)
                assert said or not isinstance(value, int | float) or value == 0, (key, value)
        assert not (place / "runs").exists()

    def test_of_a_component_is_judged_equally_by_all_commands(self, recipe: str, every: bool, place: Path) -> None:
        plain = to_plain(composed(recipe))
        for at, chosen in components(recipe):
            start = replaced(plain, at, to_plain(chosen))
            for index, (key, held) in enumerate(keys_of(chosen.group, chosen.name).items()):
                for value in drawn(held.type, index, every) if not isinstance(held.default, Component) else ():
                    said = agree(start, f"{at}.{key}", value)
                    assert said or not isinstance(value, int | float) or value == 0, (chosen, key, value)


class TestMistakes:
    """What a person gets wrong, and beside it what is right."""

    @pytest.mark.parametrize(
        ("recipe", "key", "value", "right", "said"),
        [
            ("sft", "optimizer.lr", -1.0, 1e-4, "lr (-1.0) must be at least 0"),
            ("sft", "optimizer.lr", float("inf"), 1.0, "must be a finite number"),
            ("sft", "optimizer.betas", [0.9, 0.9, 0.9], [0.9, 0.9], "needs 2 values, not 3"),
            ("sft", "guard.patience", 0, 1, "guard.patience: must be at least 1"),
            ("sft", "loss", {"component": "dpo"}, {"component": "cross_entropy"}, "dpo is not for this recipe"),
            ("sft", "peft", {"component": "lora", "rank": 0}, {"component": "lora", "rank": 1}, "rank (0)"),
            ("sft", "runtime.device", "tpu", "cpu", "device=tpu"),
            ("sft", "init_from", "nowhere", "base", "There is no nowhere"),
            ("sft", "chat.template", "nosuch", "chatml", "neither a chat template's name"),
            ("sft", "scheduler", {"component": "wsd", "warmup": "90%", "decay": "90%"}, {"component": "wsd"}, "exceed"),
            ("sft", "data", {"component": "stdlib"}, {"component": "docstrings"}, "holds plain text"),
            ("sft", "logger", {"component": "trackio"}, {"component": "jsonl"}, "needs the package trackio"),
            ("sft", "phases", [{"steps": 1, "mix": {"a": 1.0}}], [{"steps": 1}], "names a, which is no source"),
            ("sft", "run_dir", "talk.jsonl", "new/run", "cannot be used as a run directory"),
            ("preference", "loss", {"component": "cross_entropy"}, {"component": "ipo"}, "is not for this recipe"),
            ("preference", "loss", {"component": "dpo", "beta": -1.0}, {"component": "dpo"}, "beta (-1.0)"),
            ("preference", "selection.rules", ["nosuchrule"], ["not_empty"], "selection.rules"),
            ("preference", "reward", {"component": "reward_model"}, {"component": "overlap"}, "path is empty"),
            ("preference", "scheduler.warmup", "120%", "100%", "is not a length"),
            ("pretrain", "data.paths", [], ["talk.jsonl"], "paths is empty"),
            ("pretrain", "data", {"component": "docstrings"}, {"component": "stdlib"}, "holds conversations"),
            ("pretrain", "phases", [], [{"steps": 2}], "nothing says how long"),
            ("quantize", "seq_len", 0, 2, "seq_len: must be at least 2"),
            ("quantize", "seq_len", 10**6, 16, "exceeds the model's max_seq_len"),
            ("quantize", "sensitivity.budget", "much", "99%", "must be bytes"),
            ("quantize", "checkpoint", "nowhere", "base", "There is no nowhere"),
            ("prune", "checkpoint", "nowhere", "base", "There is no nowhere"),
            ("prune", "model.embed_dim", 10**6, 60, "exceeds the checkpoint's"),
            ("prune", "depth.layers", [0, 9], [0], "there is no layer 9"),
        ],
    )
    def test_are_refused_by_all_roads(
        self, recipe: str, key: str, value: Any, right: Any, said: str, place: Path
    ) -> None:
        plain = to_plain(composed(recipe))
        assert said in agree(plain, key, value)
        assert agree(plain, key, right) == ""

    def test_an_init_of_weights_that_are_given_is_refused_by_all_roads(self, place: Path) -> None:
        plain = to_plain(composed("pretrain", "init=depth"))
        assert "key init: the weights are those of init_from=base" in agree(plain, "init_from", "base")
        assert agree(plain, "init_from", None) == ""

    @pytest.mark.parametrize(
        ("key", "value", "right"),
        [("runtime.compile", True, False), ("optimizer", {"component": "adamw_8bit"}, {"component": "adamw"})],
    )
    @pytest.mark.parametrize("recipe", ["pretrain", "sft", "preference"])
    def test_what_is_compiled_needs_a_compiler_on_all_roads(
        self, recipe: str, key: str, value: Any, right: Any, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = to_plain(composed(recipe, "runtime.device=cpu"))
        monkeypatch.setenv("CXX", "no-such-compiler")
        assert "a C++ compiler, and no-such-compiler is not on the PATH" in agree(plain, key, value)
        assert agree(plain, key, right) == ""

    @pytest.mark.parametrize(
        ("recipe", "setting"),
        [
            ("pretrain", {"component": "hub", "name": "a/b"}),
            ("sft", {"component": "conversations", "hub": "a/b"}),
            ("preference", {"component": "preferences", "hub": "a/b"}),
            ("quantize", {"component": "hub", "name": "a/b"}),
        ],
    )
    def test_a_dataset_of_the_hub_needs_its_package_on_all_roads(
        self, recipe: str, setting: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = to_plain(composed(recipe))
        monkeypatch.setitem(sys.modules, "datasets", None)
        assert "data hub: a/b needs the package datasets (extra hub)" in agree(plain, "data", setting)


class TestLossSettings:
    def test_a_loss_that_cannot_cap_logits_is_refused_for_a_model_that_does(self) -> None:
        model = SimpleNamespace(loss_settings={"soft_cap": 30.0})
        with pytest.raises(UserError, match="key loss: mine has no keyword soft_cap, which this model's logits need"):
            check_loss_settings("mine", lambda hidden, weight, targets: 0, model)
        check_loss_settings("mine", lambda hidden, weight, targets: 0, SimpleNamespace(loss_settings={}))
        check_loss_settings("mine", lambda hidden, weight, targets, **settings: 0, model)

    @pytest.mark.parametrize("name", sorted(describe_components()["loss"]))
    def test_all_of_ours_fit(self, name: str) -> None:
        check_loss_settings(name, Component("loss", name, {})(), SimpleNamespace(loss_settings={"soft_cap": 30.0}))
