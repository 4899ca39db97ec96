"""Links and paths in the documents exist, their tables are complete, and their words are the field's."""

from __future__ import annotations

import pydoc
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import documented
import pytest

from plmtune.config.builtin import builtin_folder
from plmtune.config.rules import read_yaml
from plmtune.config.schema import PretrainConfig
from plmtune.models.families import model_types
from plmtune.models.gguf_architectures import BY_NAME
from plmtune.registry import describe_components

PAGES = [*documented.PAGES, documented.ROOT / "benchmarks" / "README.md"]


def headings(page: Path) -> set[str]:
    """Anchors as the usual renderers make them of headings."""
    found = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for name, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)]*))?\)", text):
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not anchor or anchor in headings(target), f"{name}#{anchor}"


def test_the_config_page_names_every_key_of_pretrain() -> None:
    page = (documented.ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", page.partition("## Keys of pretrain")[2], re.MULTILINE)
    named: set[str] = set()
    for row in rows:
        section = ""
        for key in re.findall(r"`([\w.]+)`", row):  # `guard.window`, `patience`: the section holds for those behind it
            section = key.rpartition(".")[0] or section
            named.add(key if "." in key else f"{section}.{key}".strip("."))
    for field in fields(PretrainConfig):
        value = getattr(PretrainConfig(), field.name)
        keys = [f"{field.name}.{inner.name}" for inner in fields(value)] if is_dataclass(value) else [field.name]
        if field.name != "runtime":  # described in words
            assert named.issuperset(keys), set(keys) - named


def test_the_models_page_names_every_family_and_preset_with_its_parameters() -> None:
    page = (documented.ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    table = page.partition("## Families\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")][1:]
    named = [
        (model_type, model.strip("`")) for types, model, *_ in rows for model_type in re.findall(r"`(\w+)`", types)
    ]
    assert sorted(named) == sorted(model_types().items())
    shown = {
        preset: (row[1].strip("`"), count) for row in rows for preset, count in re.findall(r"`(\S+)` \((.*?)\)", row[3])
    }
    exact = {}
    for path in (builtin_folder("conf") / "model").glob("*.yaml"):
        count = re.match(r"# .*, exact: ([\d,]+) parameters", path.read_text(encoding="utf-8"))
        model = read_yaml(path)["defaults"][0]
        if count and model != "plm":  # whose presets have a table of their own
            exact[path.stem] = model, count[1]
    assert {preset: row for preset, row in shown.items() if preset != row[0]} == exact


def test_the_models_page_names_every_architecture_of_gguf() -> None:
    page = (documented.ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    table = page.partition("| architecture | model |")[2].partition("\n\n")[0]
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(BY_NAME)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_of_the_repository_exist(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
    named = {
        word
        for span in spans
        for word in re.findall(r"(?:^|(?<= ))(?:plmtune|recipes|conf|tests|docs|benchmarks)/[\w./-]*", span)
    }
    missing = [name for name in sorted(named) if not list(documented.ROOT.glob(f"{name}*"))]
    assert [name for name in missing if "focal" not in name] == []  # the loss that CONTRIBUTING.md adds


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_the_package_exist(page: Path) -> None:
    for name in set(re.findall(r"`(plmtune(?:\.\w+)+)[`(]", page.read_text(encoding="utf-8"))):
        if name != "plmtune.components":  # the group of entry points
            assert pydoc.locate(name) is not None, name


@pytest.mark.parametrize(
    ("name", "heading"), [("CONTRIBUTING.md", "## The tour"), ("docs/design.md", "## The house")], ids=["tour", "house"]
)
def test_the_maps_of_the_repository_name_every_package(name: str, heading: str) -> None:
    section = (documented.ROOT / name).read_text(encoding="utf-8").partition(f"{heading}\n")[2].partition("\n## ")[0]
    assert section.count("\n") <= 60 and (heading != "## The tour" or section.count("\n") <= 40)  # a screen
    packages = {path.parent.name for path in (documented.ROOT / "plmtune").glob("*/__init__.py")} | {"recipes"}
    assert [each for each in sorted(packages) if f"{each}/" not in section] == []
    if name == "docs/design.md":
        modules = {path.stem for path in (documented.ROOT / "plmtune").glob("[!_]*.py")}
        assert [each for each in sorted(modules) if f" {each} " not in section] == []


def test_the_design_page_names_every_group_of_the_registry() -> None:
    text = (documented.ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert [group for group in describe_components() if f"\n| `{group}` |" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_use_the_terms_of_the_field(page: Path) -> None:
    odd = r"told|tells?|alike|go(?:es)? on|mends?|strangers?|bears?|of what|let it be|who is to|shipped|anew"
    assert re.findall(rf"\b(?:{odd})\b", page.read_text(encoding="utf-8"), re.IGNORECASE) == []
