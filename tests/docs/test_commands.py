"""Every command and every piece of Python in README.md, docs/ and the help texts is one that exists."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import documented
import pytest
from documented import Code, Command

from plmtune.cli import cli
from plmtune.cli.plan_report import with_preset
from plmtune.config import compose, override_checks, typed_config
from plmtune.config.builtin import builtin_folder
from plmtune.devices.device import load_device
from plmtune.registry import describe_components

COMMANDS = [command for page in documented.PAGES for command in documented.commands(page)]
# One of each wording: a page repeats another's.
DISTINCT = list(
    {command.text.removeprefix(".venv/bin/"): command for command in [*COMMANDS, *documented.help_commands()]}.values()
)
PYTHON = documented.code("python")


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the documents speak of, as the working directory."""
    where = tmp_path_factory.mktemp("documented")
    documented.make_place(where)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        yield where


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Let click parse ``plmtune WORDS``; the command's name and parameters."""
    context, command, name, rest = click.Context(cli, info_name="plmtune"), cli, "", words
    while isinstance(command, click.Group):
        found, command, rest = command.resolve_command(context, rest)  # type: ignore[assignment]
        name = f"{name} {found}".strip()
        context = command.make_context(found, rest, parent=context)
        rest = [*getattr(context, "_protected_args", []), *context.args]
    return name, context.params


@cache
def composed(name: str, *arguments: str) -> Any:
    overlays = [text for text in arguments if text.endswith(".yaml") and "=" not in text]
    plain, swept = override_checks.split_sweeps([text for text in arguments if text not in overlays])
    return compose.compose(name, overlays, [*plain, *(values[0] for values in swept.values())])


def check(command: Command) -> None:
    """Fail if the command names what is not there."""
    words = documented.placed(command.words)
    if "--import" in words:  # a component that this process has not got
        words = words[: words.index("--import")] + words[words.index("--import") + 2 :]
        words = [word.replace("=my_ffn", "=swiglu") for word in words]
    if command.inline and all(word.startswith("-") for word in words[2 if words[0] in ("data", "tokenizer") else 1 :]):
        assert_is_command(words)
        return
    name, given = parse(words)
    if name in ("run", "validate") or (name == "plan" and not given["name"].startswith("runs/")):
        Path("mine.yaml").write_text(documented.own_file(command.page), encoding="utf-8")
        arguments = given.get("arguments", given.get("overrides", ()))
        if "loss=focal" not in arguments:  # the component that CONTRIBUTING.md adds
            config, arguments = "demo" if given["name"] == "mine.py" else given["name"], list(arguments)
            if name == "plan" and given["cluster"]:  # of a model, too
                config, _, arguments = with_preset(config, [], arguments)
            cfg = composed(config, *arguments)
            assert not (name == "run" and cfg.recipe == "pretrain") or cfg.phases or not command.is_whole
            if name == "run" and "paths" in cfg.data.settings and command.is_whole and not command.inline:
                compose.build("data", cfg.data)
    if name == "plan":
        for device in given["devices"].split(","):
            if device != "mine.yaml":
                load_device(device)
    elif name == "resume":
        typed_config.override(composed("demo"), [word for word in words[1:] if "=" in word])
    elif name == "ls" and given["group"]:
        assert given["group"].rpartition("/")[2] in {*describe_components(), "devices", "clusters"}
    elif name == "cp" and command.is_whole:
        where = builtin_folder("recipes") if given["name"].startswith("recipes/") else builtin_folder("conf")
        assert list(where.rglob(given["name"].removeprefix("recipes/") + ".*"))


def assert_is_command(words: list[str]) -> None:
    context = click.Context(cli)
    command = cli.resolve_command(context, words)[1]
    if isinstance(command, click.Group):
        command = command.commands[words[1]]
    assert command is not None
    known = {option for parameter in command.params for option in parameter.opts}
    assert known.issuperset(word for word in words if word.startswith("-"))


@pytest.mark.parametrize("command", DISTINCT, ids=str)
def test_a_documented_command_exists_with_all_its_options_and_keys(command: Command) -> None:
    check(command)


@pytest.mark.parametrize("command", [c for c in DISTINCT if " run " in c.text], ids=str)
def test_brackets_are_quoted_as_every_shell_needs_them(command: Command) -> None:
    bare = "".join(command.text.split("'")[::2])  # outside of single quotes
    assert not set("[]{}()") & set(bare), command.text


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page.name}:{block.line}")
def test_documented_python_imports_what_is_there(block: Code) -> None:
    for node in ast.walk(ast.parse(block.text if not block.text.startswith(" ") else "if True:\n" + block.text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("block", [b for b in documented.code("yaml") if b.text.startswith("# mine.yaml")], ids=str)
def test_a_documented_config_composes(block: Code) -> None:
    Path("mine.yaml").write_text(block.text, encoding="utf-8")
    assert compose.compose(re.findall(r"(?:plmtune run|recipe:) (\w+)\b(?! *\.yaml)", block.text)[0], ["mine.yaml"])


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--killed"]], ids=["fresh", "after a killed run"])
def test_documented_commands_end_well_in_the_order_of_the_documents(tmp_path: Path, options: list[str]) -> None:
    script = [sys.executable, str(Path(__file__).with_name("run_documented.py")), str(tmp_path / "place"), *options]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:]
