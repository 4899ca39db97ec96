"""Imports point one way, and the commands that only read answer without torch."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from import_graph import ROOT, SOURCES, draw, find_cycle, imports, module_of, package_imports, package_of

# What a package may import, bottom up: each row names only packages of the rows above it. A file beside the packages
# counts as a package; FREE may be imported from everywhere. An entry that nothing uses fails the test too.
FREE = {"dtypes", "errors", "extras", "ranges", "units"}
ALLOWED: dict[str, str] = {
    "errors": "",
    "ranges": "",
    "units": "",
    "extras": "",
    "dtypes": "",
    "io": "",
    "launch": "io",
    "registry": "io",
    "config": "io registry",
    "sandbox": "io",
    "modules": "registry",
    "losses": "registry modules",
    "parallel": "config modules",
    "optim": "registry modules",
    "tokenizers": "io registry",
    "native": "io modules",
    "models": "io registry config modules tokenizers",
    "data": "io registry modules parallel tokenizers",
    "quantization": "io registry modules models",
    "pruning": "io losses modules models",
    "inference": "io modules native tokenizers",
    "plmtune": "registry modules tokenizers models inference",  # plmtune/__init__.py
    "training": "io registry config losses optim modules parallel tokenizers models data quantization",
    "preference": "io registry config losses sandbox modules tokenizers models data inference training",
    "evaluation": "io config sandbox modules tokenizers models data inference training",
    "export": "io registry modules tokenizers models plmtune quantization",
    "devices": "io registry config modules tokenizers models quantization inference plmtune training export",
    "clusters": "io config modules parallel optim training devices",
    "recipes": "io registry config modules tokenizers models plmtune data quantization pruning inference training "
    "preference evaluation",
    "cli": "io launch registry config modules tokenizers native models plmtune data inference training evaluation "
    "export devices clusters parallel",
    "__main__": "cli",
}


def importers(package: str) -> set[str]:
    """Files that import a package or a module of it."""
    return {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(name == package or name.startswith(package + ".") for name in imports(path))
    }


def test_an_installed_package_has_every_folder() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "plmtune").rglob("*.py")}
    assert listed == {".".join(folder.parts) for folder in folders} | {"plmtune.recipes", "plmtune.conf"}


class TestDirections:
    def test_a_row_names_only_rows_above_it(self) -> None:
        rows = list(ALLOWED)
        for number, (package, allowed) in enumerate(ALLOWED.items()):
            assert set(allowed.split()) <= set(rows[:number]), package

    def test_packages_import_what_the_table_allows_and_all_of_it(self) -> None:
        assert {package: others - FREE for package, others in package_imports().items()} == {
            package: set(allowed.split()) for package, allowed in ALLOWED.items()
        }

    def test_no_modules_of_a_package_import_each_other(self) -> None:
        modules = {module_of(path): imports(path) for path in SOURCES}
        for package in ALLOWED:
            inside = {name for name in modules if package_of(name) == package and name.count(".") > 1}
            assert not find_cycle({name: (modules[name] & inside) - {name} for name in inside}), package

    def test_the_picture_in_the_documentation_shows_them(self) -> None:
        shown = (ROOT / "docs" / "packages.svg").read_text(encoding="utf-8")
        assert shown == draw(package_imports()), "run python docs/import_graph.py"

    def test_only_config_imports_hydra(self) -> None:
        names = ("compose", "messages", "override_checks", "primary", "signatures")
        assert importers("hydra") <= {f"plmtune/config/{name}.py" for name in names}

    def test_only_cli_imports_click(self) -> None:
        assert all(path.startswith("plmtune/cli/") for path in importers("click"))

    def test_only_evaluation_imports_lm_eval_and_only_where_it_must(self) -> None:
        names = ("language_model", "evaluate", "task_building", "tasks")
        assert importers("lm_eval") == {f"plmtune/evaluation/{name}.py" for name in names}

    def test_only_quantization_imports_torchao_but_for_an_optimizer(self) -> None:
        others = {path for path in importers("torchao") if not path.startswith("plmtune/quantization/")}
        assert others == {"plmtune/optim/optimizers.py"}

    @pytest.mark.parametrize("package", ["gguf", "llama_cpp", "xllamacpp", "executorch", "transformers"])
    def test_only_export_imports_the_programs_that_it_writes_for(self, package: str) -> None:
        others = {path for path in importers(package) if not path.startswith("plmtune/export/")}
        assert others == ({"plmtune/models/gguf_file.py"} if package == "gguf" else set())  # which reads

    @pytest.mark.parametrize("package", ["llama_cpp", "xllamacpp", "executorch", "transformers"])
    def test_programs_are_imported_where_they_are_used(self, package: str) -> None:
        for path in importers(package):
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            names = {alias.name for node in tree.body for alias in node.names}
            names |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
            assert not [name for name in names if name.split(".")[0] == package], path

    def test_only_launch_imports_submitit(self) -> None:
        assert importers("submitit") == {f"plmtune/launch/{name}.py" for name in ("slurm", "slurm_task")}

    def test_only_one_module_imports_jieba(self) -> None:
        assert importers("jieba") == {"plmtune/tokenizers/jieba_sentencepiece.py"}

    def test_no_pickle_is_read_or_written(self) -> None:
        assert not importers("pickle")
        calls = ("torch.load(", "torch.save(", "trust_remote_code=True", "allow_pickle=True", "instantiate(")
        for path in SOURCES:
            text = path.read_text(encoding="utf-8")
            assert not [call for call in calls if call in text], path


# What the check of a config must not import.
TO_CHECK = ("torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy", "torch.distributed.tensor",
            "torch.distributed.fsdp", "torch.utils.tensorboard", "lm_eval", "transformers", "torchao", "torchtune",
            "datasets", "tokenizers", "matplotlib", "pandas", "scipy")  # fmt: skip
# How many modules of other packages a check may import beyond those of torch itself (with numpy): now 235 to 250.
MOST_TO_CHECK = 260


# Runs every program of its standard input in a fork of a process that has imported some modules, and prints what those
# are, then for each program what it prints and what is imported at its end.
FORKS = """
import contextlib, importlib, io, json, os, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
found = [[None, list(sys.modules)]]
for program in json.load(sys.stdin):
    reading, writing = os.pipe()
    if not os.fork():
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(program, {"__name__": "__main__"})
        with open(writing, "w") as pipe:
            json.dump([printed.getvalue(), list(sys.modules)], pipe)
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        found.append(json.load(pipe))
    os.wait()
print(json.dumps(found))
"""
COMMAND = """
from plmtune.cli import cli
from plmtune.errors import UserError
try:
    cli.main({!r}, standalone_mode=False)
except UserError as error:
    print("refused:", error)
"""
MISTAKES = [
    *("run pretran", "run pretrain modle=plm", "run pretrain optimizer.lrr=1", "run dpo model/ffn=swigluu"),
    *("run pretrain optimizer.lr=fast --dry-run", "run sft loss.beta=1", "run pretrain nonsense"),
    *("validate pretran", "validate dpo loss.betaa=1", "validate pretrain scheduler.decay_shape=round"),
]
CHECKS = ["validate demo", "run demo --dry-run", "validate demo_dpo"]
READING = [
    *(
        "--help",
        "ls",
        "ls clusters",
        "ls attention",
        "ls model",
        "ls model gemma3",
        "cp pretrain mine.yaml",
        "data prepare --help",
    ),
    *("eval --help", "chat --help", "perplexity --help", "launch --help", "launch slurm --help"),
    *("export --help", "verify --help", "bench --help", "plan --help"),
]
BUILD = """
import torch
from plmtune.registry import component
with torch.device("meta"):
    model = component("model", "plm", embed_dim=8, num_layers=1)(vocab_size=8)
model.to_empty(device="cpu").init_weights()
print(len(model.state_dict()))
"""

Answers = dict[str, tuple[str, set[str]]]  # of each command: (what it printed, what a process has imported after it)


def answers(directory: Path, commands: list[str], *imported: str) -> Answers:
    """Answers of commands that start from a process with some imports, under "" those imports themselves."""
    programs = [BUILD if command == BUILD else COMMAND.format(command.split()) for command in commands]
    command = [sys.executable, "-c", FORKS, *imported]
    done = subprocess.run(
        command, cwd=directory, input=json.dumps(programs), stdout=subprocess.PIPE, text=True, check=True
    )
    found = [(printed, set(modules)) for printed, modules in json.loads(done.stdout)]
    return dict(zip(["", *commands], found, strict=True))


@pytest.fixture(scope="module")
def after_torch(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return answers(tmp_path_factory.mktemp("torch"), [*CHECKS, BUILD], "torch")


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return answers(tmp_path_factory.mktemp("mistakes"), MISTAKES, "plmtune.config.compose")


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return answers(tmp_path_factory.mktemp("reading"), READING)


class TestStartUp:
    @pytest.mark.parametrize("command", MISTAKES)
    def test_a_mistake_in_a_name_or_key_costs_no_torch(self, command: str, mistakes: Answers) -> None:
        printed, modules = mistakes[command]
        assert printed.startswith("refused: ") and "torch" not in modules, printed

    @pytest.mark.parametrize("command", CHECKS)
    def test_a_config_is_checked_without_what_only_training_needs(self, command: str, after_torch: Answers) -> None:
        printed, modules = after_torch[command]
        assert "valid" in printed or "fits" in printed, printed
        assert not modules & set(TO_CHECK)
        others = {name for name in modules - after_torch[""][1] if name.partition(".")[0] != "plmtune"}
        assert len(others) < MOST_TO_CHECK

    def test_a_model_is_built_and_allocated_without_dynamo_and_sympy(self, after_torch: Answers) -> None:
        printed, modules = after_torch[BUILD]
        assert int(printed) > 5
        assert not {"torch._dynamo", "sympy"} & modules


class TestWithoutTorch:
    @pytest.mark.parametrize("command", READING)
    def test_commands_that_read_do_not_import_torch(self, command: str, reading: Answers) -> None:
        printed, modules = reading[command]
        assert not printed.startswith("refused")
        assert not {"torch", "hydra"} & modules
