"""Messages about missing packages name extras that exist, and the interpreter in use."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from plmtune import extras
from plmtune.errors import UserError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = [*(ROOT / "plmtune").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *SOURCES]


def package(requirement: str) -> str:
    return re.split(r"[<>=~!\[ ;]", requirement)[0].lower().replace("-", "_")


class TestNames:
    def test_every_extra_brings_its_packages(self) -> None:
        known = {"llama_cpp": "llama_cpp_python"}
        for module, extra in extras.EXTRAS.items():
            brought = {package(one) for one in PROJECT["optional-dependencies"][extra]}
            assert known.get(module, module) in brought, module

    def test_every_extra_named_in_the_source_or_the_documents_exists(self) -> None:
        for path in DOCUMENTS:
            for name in re.findall(r"plmtune\[([a-z-]+)\]", path.read_text(encoding="utf-8")):
                assert name in PROJECT["optional-dependencies"], f"{path}: {name}"

    def test_every_optional_import_is_covered(self) -> None:
        always = {package(one) for one in PROJECT["dependencies"]} | {"typing_extensions", "tqdm"}  # which they bring
        renamed = {"hydra": "hydra_core", "yaml": "pyyaml", "lm_eval": "lm_eval", "google": "protobuf"}
        for path in SOURCES:
            found = set()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module.split(".")[0])
            found -= {*sys.stdlib_module_names, "plmtune", *extras.EXTRAS}
            assert {renamed.get(name, name).lower() for name in found} <= always, path

    def test_one_function_says_how_to_install(self) -> None:
        for path in SOURCES:
            if path.name not in ("extras.py", "task_index.py"):
                assert "pip install" not in path.read_text(encoding="utf-8"), path


class TestCommand:
    def test_of_a_checkout_names_the_interpreter_and_the_checkout(self) -> None:
        assert extras.install_command("datasets") == f"{sys.executable} -m pip install -e '{ROOT}[hub]'"

    def test_of_an_installed_package_names_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(extras, "_checkout", lambda: None)
        assert extras.install_command("datasets") == f'{sys.executable} -m pip install "plmtune[hub]"'

    def test_a_path_with_a_space_is_quoted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(extras, "_checkout", lambda: Path("/my code/plmtune"))
        assert extras.install_command("datasets").endswith("pip install -e '/my code/plmtune[hub]'")

    def test_a_missing_package_is_a_sentence_with_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "wandb", None)
        assert not extras.installed("wandb")
        error = extras.missing("wandb", "logger=wandb", "logger=jsonl needs no package.")
        assert isinstance(error, UserError)
        assert str(error).startswith(
            "logger=jsonl needs no package. logger=wandb needs the package wandb (extra wandb), which is not installed."
        )


def test_a_system_without_fcntl_gets_a_sentence() -> None:
    code = (
        "import sys; sys.modules['fcntl'] = None; sys.argv = ['plmtune', 'ls']; import plmtune.cli; plmtune.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("plmtune: This system has no fcntl") and "Traceback" not in done.stderr


def test_the_license_is_the_one_that_the_project_names() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0" and PROJECT["license-files"] == ["LICENSE"]
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "the plmtune authors" in text
