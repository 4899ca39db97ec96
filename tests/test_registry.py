"""One name, one thing; what is listed is what can be built."""

import inspect
from pathlib import Path
from typing import get_type_hints

import pytest

from plmtune import registry
from plmtune.errors import UserError


class TestRegistry:
    def test_every_described_component_loads_and_has_the_described_signature(self) -> None:
        for group, entries in registry.describe().items():
            for name, entry in entries.items():
                signature = inspect.signature(registry.load(group, name))
                assert [p.name for p in entry.parameters] == list(signature.parameters), (group, name)

    def test_keys_read_from_the_source_are_those_of_the_imported_object(self) -> None:
        for group, entries in registry.describe().items():
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
        for group, entries in registry.describe().items():
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
            registry._extra_modules.remove("my_parts")
            registry._objects.pop(("norm", "mine"), None)

    def test_a_module_that_is_not_there_is_a_sentence(self) -> None:
        with pytest.raises(UserError, match="--import no_such_module"):
            registry.import_module("no_such_module")
