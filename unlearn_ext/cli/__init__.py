"""The unlearn-ext command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]

_GOES_ON = "the same command goes on from the runs that are finished"
_UNTOUCHED = "nothing was changed; the same command starts again"
_STARTS_ANEW = "nothing goes on from here; the same command starts anew"


def _version(show: bool) -> None:
    if show:
        from ..version import __version__

        print(f"unlearn-ext {__version__}")
        raise SystemExit(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code. What the user can mend is one line on stderr, no traceback."""
    from ..utils.streams import escape_unprintable, outlive_readers

    with outlive_readers(), escape_unprintable():
        try:
            return _run(sys.argv[1:] if arguments is None else arguments)
        except KeyboardInterrupt:  # before a command has begun
            print("interrupted", file=sys.stderr)
            return 130


def _run(arguments: Sequence[str]) -> int:
    from rich.text import Text
    from safetensors import SafetensorError

    from ..errors import UnlearnError, first_line, is_out_of_memory
    from ..native.toolchain import BuildError, ToolchainError
    from .arguments import hyphens
    from .ending import plain_warnings
    from .report import plain_console

    errors, label = plain_console(stderr=True), Text("error:", "red")
    try:
        with plain_warnings(errors):
            _app()(hyphens(arguments))
    except SystemExit as end:  # how typer ends, also after a usage error, which it has printed
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    except (UnlearnError, BuildError, ToolchainError, ImportError) as error:
        errors.print(label, str(error), soft_wrap=True)
        return 1
    except (OSError, SafetensorError) as error:  # a full disk, say
        what = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        errors.print(label, f"{what}; check the disk's space and permissions", soft_wrap=True)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or is_out_of_memory(error)):
            raise
        errors.print(label, f"there is not enough memory ({first_line(error)}): lower the sizes", soft_wrap=True)
        return 1
    return 0


def _app():
    import typer

    from . import compare, demo, forget, profile
    from .arguments import OnceCommand, checked
    from .ending import EXIT_CODES
    from .running import as_command

    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,  # rich cuts long option names at 80 columns
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        help="Make trained PyTorch networks forget, fast and verifiably.",
        epilog=EXIT_CODES,
    )

    @app.callback()
    def options(
        version: bool = typer.Option(False, "--version", is_eager=True, callback=_version, help="Print the version."),
    ) -> None:
        pass

    for name, function, advice in (
        ("demo", demo.demo, _STARTS_ANEW),
        ("forget", forget.forget, _UNTOUCHED),
        ("compare", compare.compare, _GOES_ON),
        ("profile", profile.profile, _STARTS_ANEW),
    ):
        app.command(name, cls=OnceCommand, epilog=EXIT_CODES)(as_command(checked(function), advice))
    return app
