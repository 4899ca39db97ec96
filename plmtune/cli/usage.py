"""What is wrong with a command's words, in one sentence: click finds it, and this says it."""

from __future__ import annotations

import re

import click
from click.types import FloatParamType, IntParamType

from plmtune.config.renamed import new_key
from plmtune.errors import did_you_mean, either, near_names
from plmtune.ranges import Range
from plmtune.units import with_point

_QUOTED = re.compile(r"(['\"])(.*?)\1(?=\W)", re.DOTALL)  # the value, with which click's messages begin


def sentence(error: click.ClickException) -> str:
    """Say what click found, with up to three near names, or with what belongs there."""
    ctx = getattr(error, "ctx", None)
    if ctx is None:
        return f"plmtune: {error.format_message()}"
    return f"{ctx.command_path}: {_said(error, ctx)}"


def _said(error: click.ClickException, ctx: click.Context) -> str:
    options = {name: one for one in ctx.command.get_params(ctx) for name in _names(one)}
    if isinstance(error, click.NoSuchOption):
        return f"there is no option {error.option_name}.{_instead(error.option_name, list(options), ctx)}"
    if isinstance(error, click.BadOptionUsage):
        takes_none = getattr(options.get(error.option_name), "is_flag", False)
        return f"{error.option_name} {'takes no value' if takes_none else 'needs a value'}. {_usage(ctx)}"
    if isinstance(error, click.MissingParameter) and error.param is not None:
        kind = error.param.type
        one_of = f" It is {either([str(choice) for choice in kind.choices])}." if isinstance(kind, click.Choice) else ""
        listed = " plmtune ls lists the configs." if ctx.info_name in ("run", "validate", "plan") else ""
        titles = [_title(error.param, ctx)]
        if error.param.nargs == -1:  # click gives a single word to the argument after it
            rest = [one for one in ctx.command.params if isinstance(one, click.Argument) and one is not error.param]
            titles += [_title(one, ctx) for one in rest if one.required]
        return f"{either(titles)} is missing.{one_of}{listed} {_usage(ctx)}"
    if isinstance(error, click.BadParameter) and error.param is not None:
        return f"{_title(error.param, ctx)}: {_bad_value(error.param.type, error.message)}"
    found = _QUOTED.search(error.message)
    if isinstance(ctx.command, click.Group) and found:
        return f"there is no command {found[2]}.{did_you_mean(found[2], ctx.command.list_commands(ctx))}"
    if extra := re.search(r"\((.*)\)", error.message, re.DOTALL):
        return f"too many arguments: {extra[1]}. {_usage(ctx)}"
    return error.format_message()


def _bad_value(kind: click.ParamType, message: str) -> str:
    value = _QUOTED.match(message)
    if isinstance(kind, click.Choice) and value:
        known = [str(choice) for choice in kind.choices]
        near = near_names(value[2], known)
        return f"{value[2]:.80} is none of {', '.join(known)}." + (f" Did you mean {either(near)}?" if near else "")
    if isinstance(kind, IntParamType | FloatParamType):
        if value:
            point = with_point(value[2]) if isinstance(kind, FloatParamType) else None
            number = "a whole number" if isinstance(kind, IntParamType) else "a number"
            return f"{value[2]:.80} is not {number}" + (f": write {point}." if point else ".")
        if isinstance(kind, click.IntRange | click.FloatRange) and (given := re.match(r"-?[\d.]\S*", message)):
            low, high = "above" if kind.min_open else "least", "below" if kind.max_open else "most"
            return f"{Range(**{low: kind.min, high: kind.max})}, not {given[0]}."
    return message


def _instead(name: str, options: list[str], ctx: click.Context) -> str:
    """What can be given in the place of an unknown option."""
    of_word = {option.lstrip("-"): option for option in options if option.startswith("--")}
    renamed = (new_key(name.lstrip("-").replace("-", "_")) or "").replace("_", "-")
    if near := [renamed] if renamed in of_word else near_names(name.lstrip("-"), of_word):
        return f" Did you mean {either([of_word[word] for word in near])}?"
    keys = any("KEY=VALUE" in (one.metavar or "") for one in ctx.command.get_params(ctx))
    return (
        f"{' Keys of the config are given as KEY=VALUE.' if keys else ''} Known: {', '.join(sorted(of_word.values()))}."
    )


def _names(parameter: click.Parameter) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts] if isinstance(parameter, click.Option) else []


def _title(parameter: click.Parameter, ctx: click.Context) -> str:
    """An option's longest name, or what stands for an argument in the usage."""
    return max(_names(parameter), key=len) if isinstance(parameter, click.Option) else parameter.make_metavar(ctx)


def _usage(ctx: click.Context) -> str:
    return f"Usage: {ctx.command_path} {' '.join(ctx.command.collect_usage_pieces(ctx))}"
