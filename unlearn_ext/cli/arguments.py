"""What every command does with its arguments before it runs: spelling, repeats, home folders and numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from ..errors import InputError
from ..utils.files import user_path
from ..utils.text import decoded

__all__ = ["OnceCommand", "check_heeded", "checked", "hyphens"]

_LARGEST = 2**31 - 1  # of counts
_LARGER = ("seed", "weights")  # have bounds of their own
_PATHS_OR_NAMES = ("resume_from_checkpoint", "shapes")


def hyphens(arguments: Sequence[str]) -> list[str]:
    """``--train_size=5`` -> ``--train-size=5``: diffusers' scripts spell options with underscores."""
    spelled = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        spelled.append((name.replace("_", "-") if name.startswith("--") else name) + equals + value)
    return spelled


class OnceCommand(TyperCommand):
    """A command that refuses empty values, and an option given twice unless it takes several; click drops the first."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        values, _, order = self.make_parser(ctx).parse_args(args=list(args))  # a copy: the parser takes it apart
        for parameter in order:
            if values.get(parameter.name) == "":  # a shell's variable that is not set; as a path it would be "."
                raise typer.BadParameter("expected a value, got an empty text", ctx, parameter)
            if order.count(parameter) > 1 and not getattr(parameter, "multiple", False):
                hint = "/".join([*parameter.opts, *parameter.secondary_opts])
                raise typer.BadParameter("given more than once, and it takes one value: give it once", ctx, None, hint)
        return super().parse_args(ctx, args)


def checked(function: Callable[..., int]) -> Callable[..., int]:
    """The command with ``~`` in paths replaced by the home folder, and numbers out of reach refused."""

    @functools.wraps(function)
    def run(**arguments: Any) -> int:
        code = function(**{name: _checked(name, value) for name, value in arguments.items()})
        if code:  # typer takes no heed of what a command returns
            raise typer.Exit(code)
        return code

    return run


def check_heeded(context: typer.Context, names: Iterable[str], whose: str, this: str) -> None:
    """Refuses options that would not be heeded.

    Args:
        names: parameters that must not have been given.
        whose: what they belong to.
        this: what was asked for instead.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(f"{_option(name)} belongs to {whose}: leave it out with {this}")


def _option(name: str) -> str:
    return "--" + name.removesuffix("_file").replace("_", "-")


def _checked(name: str, value: Any) -> Any:
    option = _option(name)
    if name == "json_file" and str(value) == "-":
        return Path("/dev/stdout")
    if isinstance(value, Path):  # as in --option=~/folder, where the shell leaves it
        return user_path(value)
    if isinstance(value, str) and name in _PATHS_OR_NAMES:
        return str(user_path(value))
    if isinstance(value, list):
        return [_checked(name, one) for one in value]
    if type(value) is str:  # and not an Enum's
        return decoded(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{option}: expected a finite number, got {value}")
    if isinstance(value, int) and name not in _LARGER and abs(value) > _LARGEST:
        raise InputError(f"{option}: expected an integer below 2^31, got {value}")
    return value
