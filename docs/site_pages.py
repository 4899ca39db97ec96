"""Pages that mkdocs does not find in docs/: README, CONTRIBUTING, benchmarks, and the API reference of each package."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "benchmarks/README.md": "benchmarks.md"}


def packages() -> dict[str, list[str]]:
    """The modules of each package; those of plmtune's top level stand under "plmtune"."""
    found: dict[str, list[str]] = {}
    for path in sorted([*ROOT.glob("plmtune/**/*.py"), *ROOT.glob("recipes/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__main__" and parts[:2] != ("plmtune", "cli"):
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.setdefault(".".join(parts[:2]) if len(parts) > 2 else parts[0], []).append(name)
    return found


def reference(package: str, modules: list[str]) -> str:
    """The page of one package: a table of its modules, then each with what its docstrings describe."""
    described = {name: text for name in modules if (text := ast.get_docstring(ast.parse(source(name))))}
    first_lines = {name: text.partition("\n")[0].replace("|", "\\|") for name, text in described.items()}
    rows = [
        f"| {f'[{name[len(package) + 1 :]}][{name}]' if name != package else package} | {line} |"
        for name, line in first_lines.items()
    ]
    table = "\n".join(["| module | |", "|---|---|", *rows])
    entries = "\n".join(f"::: {name}\n    options: {{heading_level: 2}}\n" for name in described)
    return f"# {package}\n\n{table}\n\n{entries}"


def commands() -> str:
    """The help of every command, as the command line prints it."""
    from click import Command, Context, Group

    from plmtune.cli import cli

    def described(name: str, command: Command, parent: Context) -> str:
        context = Context(command, info_name=name, parent=parent, terminal_width=100)
        text = f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
        inner = command.list_commands(context) if isinstance(command, Group) else []
        return "\n".join([text, *(described(each, command.get_command(context, each), context) for each in inner)])

    return "# Commands\n\n" + described("plmtune", cli, None)


def source(module: str) -> str:
    path = ROOT.joinpath(*module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


def links_of(page: str, text: str) -> str:
    """Relative links of a file of the repository, as they are in the site."""

    def moved(found: re.Match[str]) -> str:
        target = os.path.normpath(Path(page).parent / found[1])
        if target in ELSEWHERE:
            return f"]({ELSEWHERE[target]}{found[2] or ''})"
        return f"]({target.removeprefix('docs/')}{found[2] or ''})" if target.startswith("docs/") else found[0]

    return re.sub(r"\]\((?!\w+:)([^)#\s]+)(#[^)]*)?\)", moved, text)


def on_files(files: Files, config: Any) -> Files:
    for page, name in ELSEWHERE.items():
        text = links_of(page, (ROOT / page).read_text(encoding="utf-8"))
        files.append(File.generated(config, name, content=text))
    for package, modules in packages().items():
        files.append(File.generated(config, f"api/{package}.md", content=reference(package, modules)))
    files.append(File.generated(config, "commands.md", content=commands()))
    return files


def on_config(config: Any) -> Any:
    config.nav.append({"API reference": [f"api/{package}.md" for package in packages()]})
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    uri = page.file.src_uri
    return markdown if uri in ELSEWHERE.values() else links_of(f"docs/{uri}", markdown)
