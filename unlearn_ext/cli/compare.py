"""``unlearn-ext compare``: methods side by side, judged against retraining."""

from __future__ import annotations

import contextlib
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .demo import Scenario, check_scenario
from .device import checked_device
from .ending import end
from .folder import check_output, hold_output
from .report import check_file, plain_console, write_report

__all__ = ["compare"]


class Settings(str, Enum):
    tuned = "tuned"
    published = "published"


def compare(
    context: typer.Context,
    methods: Annotated[
        str, typer.Option(help="With commas: name, or name:setting=value,setting=value; all of them unless given.")
    ] = "all",
    settings: Annotated[
        Settings,
        typer.Option(help="A method's tuned settings where it has some, or its published ones; else its defaults."),
    ] = Settings.tuned,
    scenario: Annotated[Scenario, typer.Option(help="Forget random samples, or a whole class.")] = Scenario.random,
    forget_class: Annotated[int, typer.Option(help="The digit to forget (scenario class).")] = 3,
    forget_fraction: Annotated[float, typer.Option(help="Of the training set (scenario random).")] = 0.2,
    train_size: Annotated[int, typer.Option(help="Training digits.")] = 1000,
    held_out_size: Annotated[int, typer.Option(help="Digits that nobody trains on, for methods that ask.")] = 2000,
    test_size: Annotated[int, typer.Option(help="Digits for the evaluation alone.")] = 2000,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    seeds: Annotated[int, typer.Option(help="How many; each has its own split, forget set and models.")] = 5,
    epochs: Annotated[int | None, typer.Option(help="Of training; 24 for 1,000 digits, fewer for more.")] = None,
    batch_size: Annotated[int, typer.Option(help="Of training, forgetting and retaining.")] = 64,
    output_dir: Annotated[
        Path, typer.Option(help="Gets result.json and each finished run; a killed comparison goes on from there.")
    ] = Path("unlearn-ext-compare"),
    cache_dir: Annotated[
        Path | None, typer.Option(help="Keeps the trained models; the package's cache directory unless given.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train and run again what is there already.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
) -> int:
    """Compare methods of unlearning with retraining, on real digits.

    Each seed trains an original network and two that never saw the forget set;
    every method starts from the original. The table has accuracy on the forget
    set (FA), retain set (RA) and test set (TA), membership inference (MIA), the
    mean distance to the retrained network over these (gap), and the seconds of
    the unlearning alone (RTE). Where a comparison was cut, the same command
    goes on; what the same version with the same settings has trained and run
    is used again, unless with --fresh. Exit code 3: a method failed on every
    seed.
    """
    from ..comparison.choosing import choose, split_list
    from ..comparison.run import Comparison
    from ..comparison.table import show
    from ..data import load_digits
    from ..demo.digits_comparison import DigitsProtocol, digits_workload
    from .backend import load_backend
    from .progress import two_bars

    check_scenario(context, scenario)
    protocol = DigitsProtocol(
        scenario=scenario.value,
        forget_class=forget_class,
        forget_fraction=forget_fraction,
        train_size=train_size,
        held_out_size=held_out_size,
        test_size=test_size,
        epochs=epochs,
        batch_size=batch_size,
        device=checked_device(device),
    )
    runners = choose(split_list(methods), settings.value, scenario.value)
    check_file("--json", json_file, output_dir)
    check_output(output_dir, "compare")
    comparison = Comparison(
        digits_workload(load_digits(), protocol),
        runners,
        seed=seed,
        count=seeds,
        output_dir=output_dir,
        models_dir=cache_dir or _models_dir(output_dir),
        fresh=fresh,
    )
    errors = plain_console(stderr=True)
    with hold_output(output_dir, "compare"):
        errors.print(f"backend: {load_backend(errors)}", style="dim")
        with two_bars(errors, "runs", seeds * len(runners)) as (progress, advance):

            def finished(seed: int, label: str, record: dict[str, Any], found_again: bool) -> None:
                advance()
                errors.print(f"seed {seed}: {label}: {_outcome(record)}{', found' * found_again}", style="dim")

            comparison.progress, comparison.finished = progress, finished
            comparison.tell = lambda sentence: errors.print(sentence)
            result = comparison.run()
        report = write_report(result, output_dir / "result.json", json_file)
    console = plain_console(json_file=json_file)
    show(report, console)
    console.print(f"all numbers: {output_dir / 'result.json'}", style="dim", soft_wrap=True)
    return end(
        {
            f"failed {name}": f"{name} failed on every seed: {next(iter(row['failed'].values()))}"
            for name, row in report["methods"].items()
            if len(row["failed"]) == seeds
        }
    )


def _models_dir(output_dir: Path) -> Path:
    """Beside the built libraries, in the cache directory of the package; in the output where there is none."""
    from ..native.building import cache_directory
    from ..native.library_cache import make_private

    cache = cache_directory()
    if cache is not None:
        with contextlib.suppress(OSError):  # the folder below it says which
            make_private(cache)
    return (cache or output_dir) / "compare"


def _outcome(record: dict[str, Any]) -> str:
    if "failed" in record:
        return f"failed: {record['failed']}"
    return f"gap {100 * record['metrics']['gap']:.2f}, {record['metrics']['RTE']:.2f} s"
