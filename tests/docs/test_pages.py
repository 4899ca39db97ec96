"""Links between the documents lead somewhere, and tables of keys are complete."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import documented
import pytest

from plmtune.config.schema import PretrainConfig

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
