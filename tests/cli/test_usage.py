"""Wrong options, values and arguments of every command: one sentence, exit code 2, near names."""

from collections.abc import Iterator

import click
import pytest
from in_process import run

from plmtune.cli import cli


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with the words that name it."""
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


COMMANDS = dict(commands(cli))


def options(command: click.Command) -> list[click.Option]:
    return [one for one in command.params if isinstance(one, click.Option) and one.name != "help"]


def bad_value(kind: click.ParamType) -> tuple[str, str] | None:
    """A value that a type refuses, and what is said of it."""
    if isinstance(kind, click.Choice):
        return next(iter(kind.choices))[:-1] + "x", "is none of"
    if isinstance(kind, click.IntRange | click.FloatRange) and kind.min is not None:
        return str(kind.min - 1), "must be "
    if isinstance(kind, click.types.IntParamType):
        return "1.5", "1.5 is not a whole number."
    if isinstance(kind, click.types.FloatParamType):
        return "0,5", "0,5 is not a number: write 0.5."
    return None


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
class TestEveryCommand:
    @pytest.fixture(autouse=True)
    def run_here(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def said(self, words: tuple[str, ...], *more: str) -> str:
        code, out, err = run(self.monkeypatch, self.capsys, *words, *more)
        assert (code, out) == (2, ""), (words, more, err)
        assert err.startswith(f"plmtune {' '.join(words)}: ") and err.count("\n") == 1, (words, more, err)
        return err

    def test_an_option_with_a_slip_is_told_by_its_name(self, words: tuple[str, ...]) -> None:
        for option in options(COMMANDS[words]):
            for name in [*option.opts, *option.secondary_opts]:
                if len(name) > 5:
                    slip = name[:4] + name[5:]
                    said = self.said(words, slip)
                    assert f"there is no option {slip}. Did you mean " in said and name in said

    def test_another_option_is_told_which_there_are(self, words: tuple[str, ...]) -> None:
        said = self.said(words, "--qqqq")
        assert "there is no option --qqqq." in said and "--help" in said

    def test_a_value_of_the_wrong_kind_is_told_what_belongs_there(self, words: tuple[str, ...]) -> None:
        for option in options(COMMANDS[words]):
            if not option.is_flag and (bad := bad_value(option.type)):
                name, (value, expected) = max(option.opts, key=len), bad
                said = self.said(words, f"{name}={value}")
                assert f"{name}: " in said and expected in said
                if isinstance(option.type, click.Choice) and len(value) > 3:
                    assert "Did you mean " in said

    def test_a_value_too_few_or_too_many_is_told(self, words: tuple[str, ...]) -> None:
        for option in options(COMMANDS[words]):
            name = max(option.opts, key=len)
            wrong, expected = (f"{name}=1", "takes no value") if option.is_flag else (name, "needs a value")
            if not option.is_eager:
                assert f"{name} {expected}. Usage: plmtune " in self.said(words, wrong)

    def test_what_is_missing_is_named(self, words: tuple[str, ...]) -> None:
        needed = [one for one in COMMANDS[words].params if one.required]
        if needed:
            said = self.said(words)
            assert " is missing. " in said and "Usage: plmtune " in said

    def test_arguments_too_many_are_named(self, words: tuple[str, ...]) -> None:
        command = COMMANDS[words]
        arguments = [one for one in command.params if isinstance(one, click.Argument)]
        if isinstance(command, click.Group):
            assert "there is no command nonsuch. Known: " in self.said(words, "nonsuch")
        elif all(one.nargs > 0 for one in arguments):
            needed = [word for one in options(command) if one.required for word in (one.opts[0], value_of(one))]
            names = [f"x{number}" for number in range(len(arguments))]
            assert "too many arguments: too-many. Usage: " in self.said(words, *needed, *names, "too-many")


def value_of(option: click.Option) -> str:
    """A value that the option's type takes."""
    kind = option.type
    if isinstance(kind, click.Choice):
        return str(next(iter(kind.choices)))
    return "1000" if isinstance(kind, click.types.IntParamType) else "x"
