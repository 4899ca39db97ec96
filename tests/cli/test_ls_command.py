"""`plmtune ls`: what loads, and one component or preset of a group."""

import re
from collections.abc import Callable

import pytest
from in_process import run

from plmtune.config.builtin import builtin_folder
from plmtune.models.families import by_model_type, model_types
from plmtune.registry import describe_components

Listed = Callable[..., tuple[int, str]]


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Listed:
    def ls(*words: str) -> tuple[int, str]:
        code, out, err = run(monkeypatch, capsys, "ls", *words)
        return code, out + err

    return ls


def test_model_types_read_from_the_source_are_those_of_the_families() -> None:
    families = by_model_type()
    assert model_types() == {model_type: family.component for model_type, family in families.items()}


def test_models_are_a_table_of_what_loads_on_one_screen(listed: Listed) -> None:
    code, text = listed("model")
    rows = {tuple(line.split()[:2]) for line in text.splitlines()}
    assert code == 0 and rows >= set(model_types().items())
    assert "smollm2_135m (135M)" in text and "gemma3_1b (1B)" in text and "Mistral-7B" in text
    assert len(text.splitlines()) <= 28  # at 120 columns two more


@pytest.mark.parametrize("name", ["gemma3", "gemma3_text"])
def test_a_model_is_shown_by_its_name_or_a_model_type(name: str, listed: Listed) -> None:
    code, text = listed("model", name)
    assert code == 0 and text.startswith("gemma3  Gemma-3-270M by default")
    assert re.search(r"local_rope_theta +float", text) and "gemma3_1b" in text and "smollm" not in text


@pytest.mark.parametrize(("group", "path"), [("attention", "model/attention/mla_tiny"), ("model", "model/plm_demo")])
def test_a_preset_is_shown_as_its_file(group: str, path: str, listed: Listed) -> None:
    held = (builtin_folder("conf") / f"{path}.yaml").read_text(encoding="utf-8")
    assert listed(group, path.rpartition("/")[2]) == (0, held.rstrip() + "\n")


@pytest.mark.parametrize("group", sorted(describe_components()))
def test_every_component_can_be_shown(group: str, listed: Listed) -> None:
    for name in describe_components()[group]:
        code, text = listed(group, name)
        assert code == 0 and text.startswith(f"{name}  ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model", "gemma4"), "Group model has no gemma4. Did you mean gemma3 or gemma2?"),
        (("devices", "pi5"), "plmtune plan CONFIG --device pi5"),
        (("modle", "llama"), "There is no group modle. Did you mean model?"),
    ],
)
def test_names_that_do_not_exist(words: tuple[str, ...], message: str, listed: Listed) -> None:
    code, text = listed(*words)
    assert code == 2 and message in text
