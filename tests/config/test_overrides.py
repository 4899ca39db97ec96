"""An override as it is printed is what a shell and Hydra read back, and no message prints one in another way."""

import ast
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from plmtune.config import compose, typed_config
from plmtune.config.override_checks import parse, plain_value
from plmtune.config.overrides import quote_override
from plmtune.errors import UserError
from plmtune.training.resume_checks import refuse_other_config

ROOT = Path(__file__).parents[2]
WORDS = ["null", "True", "nan", "-inf", "1e5", "0x1", "a b", "./a.txt", "../x", "a=b", "a,b", "~x", "1_0", ".5", "e1"]
SIGNS = """ab09 "'\\$`()[]{}=,:#%@+-_./?|é日~!*\n"""
# An override with a bracket or a brace, its value in no quotes.
BARE = re.compile(r"(?<![\w'/.\"\[`])[a-z_]+(?:[./][a-z_]+)*=[\[{](?=[a-z{\]])(?!\})")


def drawn(rng: random.Random, depth: int = 2) -> Any:
    """A value that a config can hold."""
    kind = rng.randrange(8 if depth else 6)
    if kind < 2:
        return "".join(rng.choices(SIGNS, k=rng.randrange(12)))
    if kind < 6:
        number = rng.uniform(-1, 1) * 10.0 ** rng.randrange(-9, 9)
        return [rng.choice(WORDS), rng.randrange(-(2**40), 2**40), number, rng.choice([True, False, None])][kind - 2]
    children = [drawn(rng, depth - 1) for _ in range(rng.randrange(4))]
    return children if kind == 6 else dict(zip("abcd", children, strict=False))


class TestAsTyped:
    def test_a_shell_and_hydra_read_the_same_value_back(self) -> None:
        rng = random.Random(0)
        for value in [*(drawn(rng) for _ in range(400)), *WORDS, {"a": {"component": "files", "paths": ["a b.txt"]}}]:
            (word,) = shlex.split(quote_override("a.key", value))
            parsed = parse(word)
            assert parsed.key_or_group == "a.key"
            found = plain_value(parsed._value)
            assert found == value and type(found) is type(value), word

    @pytest.mark.parametrize(
        ("value", "typed"),
        [
            ("a.txt", "key=a.txt"),
            (["a.txt"], "'key=[a.txt]'"),
            (["my text.txt"], "'key=[\"my text.txt\"]'"),
            (0.001, "key=0.001"),
            (None, "key=null"),
        ],
    )
    def test_quotes_what_needs_it(self, value: Any, typed: str) -> None:
        assert quote_override("key", value) == typed


class TestAdvice:
    def test_what_a_run_began_with_is_said_as_an_override(self) -> None:
        began = compose.compose("demo")
        now = typed_config.override(began, ["phases=[{name: b, steps: 3}]"])
        with pytest.raises(UserError) as caught:
            refuse_other_config(Path("r"), began, now)
        said = str(caught.value)
        assert "r was started with phases=[{name: main, tokens: " in said and "not [{name: b, tokens: null" in said

    def test_brackets_and_braces_are_in_the_quotes_of_a_shell(self) -> None:
        """zsh takes a bare [ for a pattern, and every shell takes a brace with a comma for several words."""
        bare = []
        for path in [*ROOT.glob("plmtune/**/*.py"), *ROOT.glob("recipes/*.py")]:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            inner = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]  # docstrings
            if "cli" in path.parts:
                inner = []  # whose docstrings are printed
            texts = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and n not in inner]
            bare += [f"{path}: {n.value}" for n in texts if isinstance(n.value, str) and BARE.search(n.value)]
        assert not bare
