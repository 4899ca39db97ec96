"""The list of thorough tests names tests that exist, and every class of tests is collected."""

import ast
from pathlib import Path


def test_every_listed_test_exists() -> None:
    root = Path(__file__).parent
    lines = root.joinpath("thorough.txt").read_text(encoding="utf-8").splitlines()
    gone = []
    for line in lines:
        file, *_, name = line.partition("[")[0].split("::")
        path = root.parent / file
        if not path.is_file() or f"def {name}(" not in path.read_text(encoding="utf-8"):
            gone.append(line)
    assert gone == []
    assert lines == sorted(set(lines))


def test_no_decorator_makes_something_else_of_a_class_of_tests() -> None:
    """As torch.no_grad does, which returns a function: pytest then collects nothing of it and says nothing."""
    for path in Path(__file__).parent.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                other = [ast.unparse(each) for each in node.decorator_list]
                assert not [text for text in other if text.startswith("torch.")], (path.name, node.name, other)
