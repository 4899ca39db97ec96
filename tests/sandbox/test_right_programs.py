"""Programs that are right pass, whatever their style; and without their code their tests fail."""

from pathlib import Path

import pytest

from plmtune.evaluation.code_eval import CodeRunner, missing
from plmtune.sandbox import Result


def read_programs() -> dict[str, tuple[str, str]]:
    """{name: (code, tests)}."""
    text = Path(__file__).with_name("right_programs.txt").read_text(encoding="utf-8")
    found = {}
    for part in text.split("\n=== ")[1:]:
        name, _, program = part.partition("\n")
        code, _, tests = program.partition("\n--- tests\n")
        found[name] = (code, tests)
    return found


RIGHT = read_programs()


@pytest.fixture(scope="module")
def runner() -> CodeRunner:
    if lacking := missing():
        pytest.skip(f"there is no sandbox here: {lacking}")
    return CodeRunner(seconds=30)


@pytest.fixture(scope="module")
def ended(runner: CodeRunner) -> dict[str, Result]:
    return dict(zip(RIGHT, runner.run(list(RIGHT.values())), strict=True))


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_program_passes(ended: dict[str, Result], name: str) -> None:
    assert ended[name].passed, f"{ended[name].reason}\n{ended[name].output}"


@pytest.mark.slow
def test_without_its_code_none_passes(runner: CodeRunner) -> None:
    results = runner.run([("", tests) for _, tests in RIGHT.values()])
    assert [name for name, result in zip(RIGHT, results, strict=True) if result.passed] == []
