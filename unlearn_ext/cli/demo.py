"""``unlearn-ext demo``: the main job on embedded data."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .arguments import check_heeded
from .device import Precision, checked_device
from .ending import demo_warnings, end, show_warnings
from .folder import check_output, hold_output
from .report import check_file, plain_console, write_report

__all__ = ["demo"]


class TaskName(str, Enum):
    classifier = "classifier"
    ddpm = "ddpm"
    dit = "dit"
    text = "text"


class Scenario(str, Enum):
    """What is forgotten."""

    klass = "class"
    random = "random"


def check_scenario(context: typer.Context, scenario: Scenario) -> None:
    """An option of the other scenario is an error."""
    name, other = ("forget_class", "class") if scenario is Scenario.random else ("forget_fraction", "random")
    check_heeded(context, [name], f"--scenario {other}", f"--scenario {scenario.value}")


class Update(str, Enum):
    sequential = "sequential"
    joint = "joint"


def demo(
    context: typer.Context,
    task: Annotated[TaskName, typer.Argument(help="What forgets.")] = TaskName.classifier,
    scenario: Annotated[Scenario, typer.Option(help="Forget a whole class, or random samples.")] = Scenario.klass,
    forget_class: Annotated[int, typer.Option(help="The digit to forget.")] = 3,
    forget_fraction: Annotated[float, typer.Option(help="Of the training set (scenario random).")] = 0.1,
    train_size: Annotated[int, typer.Option(help="Training digits, at most 4,000.")] = 4000,
    update: Annotated[Update, typer.Option(help="Forget then retain, or both in one pass.")] = Update.sequential,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Of split, training and unlearning.")] = 0,
    samples: Annotated[
        int, typer.Option(max=10_000, help="Pictures of each digit, before and after (diffusion).")
    ] = 50,
    pretrain: Annotated[
        bool,
        typer.Option(
            "--pretrain", help="Train the starting weights and the classifier anew, for this run (diffusion)."
        ),
    ] = False,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Also train a network without the digit, to compare (diffusion).")
    ] = False,
    output_dir: Annotated[Path, typer.Option(help="Gets weights, mask, pictures and result.json.")] = Path(
        "unlearn-ext-demo"
    ),
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    mixed_precision: Annotated[Precision, typer.Option(help="Autocast of forward and backward.")] = Precision.no,
    allow_duplicates: Annotated[
        bool, typer.Option("--allow-duplicates", help="Go on if a sample is in both sets.")
    ] = False,
) -> int:
    """Make a small network forget real digits, and judge what became of it.

    classifier: trains a residual network on 4,000 MNIST digits, retrains one
    without the forget set, unlearns with SFR-on, and prints accuracy on the
    forget set (FA), retain set (RA) and test set (TA), membership inference
    (MIA), the average gap to the retrained model, and the seconds each took.

    ddpm, dit, text: a class-conditional UNet, a DiT, and a UNet told captions
    forget a digit in 50 iterations; pictures before and after from the same
    noise, judged by a classifier.
    """
    if task is TaskName.classifier:
        check_heeded(context, _OF_DIFFUSION, "demo ddpm, dit and text", "demo classifier")
        check_scenario(context, scenario)
    else:
        check_heeded(context, _OF_THE_CLASSIFIER, "demo classifier", f"demo {task.value}")
    if task is not TaskName.classifier:
        from ..demo.diffusion.run import DiffusionOptions
        from . import demo_diffusion

        options = DiffusionOptions(
            task=task.value,
            forget_class=forget_class,
            samples=samples,
            seed=seed,
            retrain=retrain,
            device=checked_device(device),
            mixed_precision=mixed_precision.value,
        )
        return demo_diffusion.run(options, output_dir, json_file, pretrain)
    from ..demo.classifier import ClassifierDemo, DemoOptions
    from .backend import load_backend
    from .progress import stages

    options = DemoOptions(
        scenario=scenario.value,
        forget_class=forget_class,
        forget_fraction=forget_fraction,
        train_size=train_size,
        update=update.value,
        seed=seed,
        device=checked_device(device),
        mixed_precision=mixed_precision.value,
        allow_duplicates=allow_duplicates,
    )
    check_file("--json", json_file, output_dir)
    check_output(output_dir, "demo")
    run = ClassifierDemo(options)
    console = plain_console(stderr=True)
    with hold_output(output_dir, "demo"):
        backend = load_backend(console)
        console.print(f"backend: {backend}", style="dim")
        with stages(console) as progress:
            run.progress = progress
            run.run()
        with console.status("evaluating"):
            document = run.report()
        before, after = (document["models"][name]["FA"] for name in ("original", "unlearned"))
        what = f"the digit {forget_class}" if scenario is Scenario.klass else None
        document["warnings"] = demo_warnings(what, before, after, document["warnings"])
        run.save(output_dir)
        report = write_report(document, output_dir / "result.json", json_file)
    _show(report, output_dir, plain_console(json_file=json_file))
    return end(document["warnings"])


_OF_THE_CLASSIFIER = ("scenario", "forget_fraction", "train_size", "update", "allow_duplicates")
_OF_DIFFUSION = ("samples", "pretrain", "retrain")


def _show(report: dict[str, Any], output_dir: Path, console: Console) -> None:
    """One table of at most 80 columns, and a sentence."""
    classes = report["scenario"] == "class"
    what = f"the digit {report['forget_class']}" if classes else f"{report['forget_size']} random digits"
    table = Table(title=f"Forgetting {what} of {report['train_size']} training digits, seed {report['seed']}")
    table.add_column("model")
    for name in ("FA", "RA", "TA", "MIA", "gap"):
        table.add_column(f"{name} %", justify="right")
    table.add_column("seconds", justify="right")
    test = "TA_retained" if classes else "TA"
    for name, values in report["models"].items():
        cells = [f"{100 * values[key]:.2f}" for key in ("FA", "RA", test, "MIA_entropy", "gap")]
        table.add_row(name, *cells, f"{values['seconds']:.1f}")
    console.print(table)
    if classes:
        console.print("TA, MIA and gap: over the nine retained classes.", style="dim")
    models = report["models"]
    gap, nothing = (100 * models[name]["gap"] for name in ("unlearned", "original"))
    seconds, retraining = (models[name]["seconds"] for name in ("unlearned", "retrained"))
    console.print(
        f"SFR-on ({report['update']}) came within {gap:.2f} points of retraining on average (doing nothing: "
        f"{nothing:.2f}) in {seconds:.1f} s; retraining took {retraining:.1f} s."
    )
    show_warnings(report["warnings"], console)
    console.print(f"weights, mask and result.json: {output_dir}", style="dim", soft_wrap=True)
