"""One name, one thing; what is listed is what can be built."""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest

from plmtune import registry
from plmtune.errors import UserError


class TestRegistry:
    def test_every_described_component_loads_and_has_the_described_signature(self) -> None:
        for group, entries in registry.describe_components().items():
            for name, entry in entries.items():
                signature = inspect.signature(registry.load(group, name))
                assert [p.name for p in entry.parameters] == list(signature.parameters), (group, name)

    def test_keys_read_from_the_source_are_those_of_the_imported_object(self) -> None:
        for group, entries in registry.describe_components().items():
            for name, entry in entries.items():
                target = registry.load(group, name)
                hints = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
                imported = {
                    p.name: registry.Key(p.name, hints[p.name], p.default)
                    for p in inspect.signature(target).parameters.values()
                    if p.default is not inspect.Parameter.empty
                }
                assert registry.keys_in_source(entry) == imported, (group, name)

    def test_every_component_says_in_one_line_what_it_is(self) -> None:
        for group, entries in registry.describe_components().items():
            for name, entry in entries.items():
                assert entry.doc.strip(), f"{group} {name} has no docstring"

    def test_a_second_object_under_a_name_is_refused(self) -> None:
        registry.load("ffn", "swiglu")
        with pytest.raises(ValueError, match="swiglu' is registered twice"):
            registry.register("ffn", "swiglu")(lambda: None)

    def test_unknown_names_get_the_nearest_one(self) -> None:
        with pytest.raises(UserError, match="Did you mean swiglu"):
            registry.load("ffn", "swigluu")
        with pytest.raises(UserError, match="Did you mean attention"):
            registry.find("atention", "mla")

    def test_a_component_is_called_with_its_settings_and_what_run_time_gives(self) -> None:
        chosen = registry.component("norm", "rms_norm", eps=0.5)
        assert chosen(dim=3).eps == 0.5

    def test_a_users_module_counts_once_imported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "my_parts.py").write_text(
            "from plmtune.registry import register\n"
            '@register("norm", "mine")\n'
            "def mine(dim: int, *, power: float = 2.0) -> None:\n"
            '    """My own norm."""\n'
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        try:
            registry.import_module("my_parts")
            assert registry.find("norm", "mine").parameters[1].default == "2.0"
            assert registry.load("norm", "mine").__module__ == "my_parts"
        finally:
            registry._objects.pop(("norm", "mine"), None)

    def test_a_module_that_is_not_there_is_a_sentence(self) -> None:
        with pytest.raises(UserError, match="--import no_such_module"):
            registry.import_module("no_such_module")


FFN = (
    'def mine(embed_dim: int, *, power: "float" = 2.0, norm: Component = component("norm", "rms_norm")) -> None:\n'
    '    """Mine."""\n'
)
MODULES = {
    "a name that is a constant": 'from plmtune.registry import *\nNAME = "mine"\n@register("ffn", NAME)\n' + FFN,
    "of the registry": "from plmtune import registry\nfrom plmtune.registry import Component, component\n"
    '@registry.register("ffn", "mine")\n' + FFN,
    "of plmtune": "import plmtune\nfrom plmtune.registry import Component, component\n"
    '@plmtune.register("ffn", "mine")\n' + FFN,
    "a call": "from plmtune.registry import *\n" + FFN + 'register("ffn", "mine")(mine)\n',
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory on the path; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    objects, modules = dict(registry._objects), set(sys.modules)
    yield tmp_path
    registry._objects.clear()
    registry._objects.update(objects)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


class TestUsersModules:
    @pytest.mark.parametrize("how", MODULES)
    @pytest.mark.parametrize("package", [False, True])
    def test_components_are_found_however_they_are_registered(self, how: str, package: bool, place: Path) -> None:
        name = f"parts_{list(MODULES).index(how)}{package}"
        if package:
            (place / name).mkdir()
            (place / name / "__init__.py").write_text(f"from {name}.inner import mine as mine\n")
        (place / (f"{name}/inner.py" if package else f"{name}.py")).write_text(MODULES[how])
        registry.import_module(name)
        entry = registry.describe_components()["ffn"]["mine"]
        assert [(p.name, p.default) for p in entry.parameters] == [
            ("embed_dim", None), ("power", "2.0"), ("norm", "component('norm', 'rms_norm')"),
        ]  # fmt: skip
        assert entry.doc == "Mine."
        keys = registry._keys_of_object("ffn", "mine")
        assert {key.name: key.type for key in keys.values()} == {"power": float, "norm": registry.Component}

    @pytest.mark.parametrize(
        ("name", "text", "said"),
        [
            ("./x.py", "", r"takes the name of a Python module.* Write --import x"),
            ("", "", "takes the name of a Python module"),
            ("a-b", "", "takes the name of a Python module"),
            ("builtins", "", "registers no component"),
            ("nothing_in_it", "x = 1", "registers no component"),
            ("no_such_module", "", "there is no module no_such_module"),
            ("no_such_package.parts", "", "there is no module no_such_package"),
            ("raising", "x = 1\nraise KeyError('y')", r"raising.py, line 2 raises KeyError \('y'\)"),
            ("unfinished", "x = (", r"unfinished.py, line 1 raises SyntaxError"),
            ("needing", "import no_such_library", r"needing.py, line 1 raises ModuleNotFoundError"),
            ("leaving", "raise SystemExit('bye')", r"raises SystemExit \(bye\)"),
            ("taking", "from plmtune.registry import *\n@register('ffn', 'swiglu')\ndef f(): ...",
             "taking: registers ffn swiglu, which is a component of plmtune.modules.feed_forward"),
        ],
    )  # fmt: skip
    def test_a_mistake_is_a_sentence(self, name: str, text: str, said: str, place: Path) -> None:
        (place / "x.py").write_text("")
        if text:
            (place / f"{name}.py").write_text(text)
        registry._objects.pop(("ffn", "swiglu"), None)
        with pytest.raises(UserError, match=said):
            registry.import_module(name)
        assert registry.describe_components()["ffn"]["swiglu"].module == "plmtune.modules.feed_forward"
