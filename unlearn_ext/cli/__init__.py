"""The unlearn-ext command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def _hyphens(arguments: Sequence[str]) -> list[str]:
    """``--train_size=5`` -> ``--train-size=5``: diffusers' scripts spell options with underscores."""
    spelled = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        spelled.append((name.replace("_", "-") if name.startswith("--") else name) + equals + value)
    return spelled


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        print(f"unlearn-ext {__version__}")
        raise SystemExit(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code. What the user can mend is one line on stderr, no traceback."""
    import typer
    from rich.text import Text
    from safetensors import SafetensorError

    from .._native import BuildError, ToolchainError
    from ..errors import UnlearnError
    from . import compare, demo, forget, profile
    from .report import plain_console
    from .running import as_command

    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        help="Make trained PyTorch networks forget, fast and verifiably.",
    )

    @app.callback()
    def options(
        version: bool = typer.Option(False, "--version", is_eager=True, callback=_version, help="Print the version."),
    ) -> None:
        pass

    app.command("demo")(as_command(demo.demo))
    app.command("forget")(as_command(forget.forget))
    app.command("compare")(as_command(compare.compare))
    app.command("profile")(as_command(profile.profile))
    errors, label = plain_console(stderr=True), Text("error:", "red")
    try:
        app(_hyphens(sys.argv[1:] if arguments is None else arguments))
    except SystemExit as end:  # how typer ends, also after a usage error, which it has printed
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    except (UnlearnError, BuildError, ToolchainError, ImportError) as error:
        errors.print(label, str(error), soft_wrap=True)
        return 1
    except (OSError, SafetensorError) as error:  # a full disk, say
        what = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        errors.print(label, f"{what}; check the disk's space and permissions", soft_wrap=True)
        return 1
    return 0
