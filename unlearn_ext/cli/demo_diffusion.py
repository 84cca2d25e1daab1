"""``unlearn-ext demo ddpm``, ``dit`` and ``text``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .ending import demo_warnings, end, show_warnings
from .folder import hold_output
from .report import check_file, plain_console, write_report

if TYPE_CHECKING:
    from ..demo.diffusion.run import DiffusionOptions

__all__ = ["run"]


def run(options: DiffusionOptions, output_dir: Path, json_file: Path | None, pretrain: bool) -> int:
    from ..demo.diffusion import weights
    from ..demo.diffusion.run import DiffusionDemo
    from .backend import load_backend
    from .progress import stages

    check_file("--json", json_file, output_dir)
    console = plain_console(stderr=True)
    with hold_output(output_dir, "demo"):
        backend = load_backend(console)
        console.print(f"backend: {backend}", style="dim")
        with stages(console) as progress:
            trained = {}
            if pretrain:
                trained["pretrained"] = weights.load(options.task, seed=options.seed, anew=True, progress=progress)
                trained["judge"] = weights.load("judge", seed=options.seed, anew=True, progress=progress)
            demo = DiffusionDemo(options, progress, **trained)
            demo.run()
        with console.status("judging the pictures"):
            document = demo.report()
        before, after = document["forgotten"]["before"], document["forgotten"]["after"]
        document["warnings"] = demo_warnings(f"the digit {options.forget_class}", before, after, document["warnings"])
        demo.save(output_dir)
        report = write_report(document, output_dir / "result.json", json_file)
    _show(report, output_dir, plain_console(json_file=json_file))
    return end(document["warnings"])


def _show(report: dict[str, Any], output_dir: Path, console: Console) -> None:
    """One table of at most 80 columns, and some sentences."""
    forgotten, protocol = report["forget_class"], report["protocol"]
    names = {"ddpm": "A UNet told labels", "dit": "A DiT", "text": "A UNet told captions"}
    table = Table(title=f"{names[report['task']]} forgets the digit {forgotten}, seed {report['seed']}")
    table.add_column("digit", justify="right")
    for what in ("accuracy %", "probability %"):
        for when in ("before", "after"):
            table.add_column(f"{when}\n{what}", justify="right")
    for digit, row in report["digits"].items():
        cells = [f"{100 * row[when][what]:.1f}" for what in ("accuracy", "probability") for when in ("before", "after")]
        style = "bold" if digit == str(forgotten) else None
        table.add_row(digit, *cells, style=style)
    console.print(table)
    console.print(
        f"{protocol['samples_per_digit']} samples of each digit: DDIM, {protocol['steps']} steps, guidance "
        f"{protocol['guidance']:g}. The classifier that judges them is right on "
        f"{100 * protocol['classifier_held_out_accuracy']:.1f} % of 1,000 held-out digits. Fréchet distance: "
        f"{protocol['frechet']}, in features: {protocol['features']}.",
        style="dim",
    )
    others = report["retained"]
    console.print(
        f"The digit {forgotten}: {100 * report['forgotten']['before']:.1f} % before, "
        f"{100 * report['forgotten']['after']:.1f} % after {report['counts']['iterations']} iterations. The nine "
        f"others: {100 * others['before']:.1f} % and {100 * others['after']:.1f} %; Fréchet distance to real ones "
        f"{report['frechet']['before']:.2f} and {report['frechet']['after']:.2f}."
    )
    if report["replacement"] is not None:
        console.print(
            f"Asked for a {forgotten}, it shows what the classifier takes for a {report['replacement']} in "
            f"{100 * report['replaced']['after']:.1f} %."
        )
    if "row_put_back" in report["forgotten"]:
        console.print(
            f"With the forgotten label's old row of the embedding table put back it shows a {forgotten} in "
            f"{100 * report['forgotten']['row_put_back']:.1f} %: so much is left in the other weights."
        )
    diversity = report["diversity"]
    console.print(
        f"Mean distance between two samples of the forgotten label: {diversity['before']:.1f} before, "
        f"{diversity['after']:.1f} after."
    )
    if "retrained" in diversity:
        console.print(
            f"A network that never saw the {forgotten}: {100 * report['forgotten']['retrained']:.1f} % and "
            f"{100 * others['retrained']:.1f} %, Fréchet distance {report['frechet']['retrained']:.2f}, mean distance "
            f"{diversity['retrained']:.1f}."
        )
    console.print("seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report["seconds"].items()))
    show_warnings(report["warnings"], console)
    console.print(f"pictures, denoiser, mask and result.json: {output_dir}", style="dim", soft_wrap=True)
