"""Does a diffusion model really forget a digit in 50 iterations? Tables of docs/results/, in results/diffusion.json.

    python benchmarks/diffusion.py                  # hours of sampling on two cores; what is there is kept
    python benchmarks/diffusion.py --tasks dit      # one demo; several at once may write to the same file
    python benchmarks/diffusion.py --show           # prints the tables from the file again

By the demos' own settings, before and after from the same noise: every digit, and three captions, at seed 0 with the
demo's 50 samples of each digit; three digits at seeds 0 to 2 with 200. Runs of one seed and number share their samples
from before. A run that the file has, of the same settings and starting weights, is not made again. Seconds are not
kept: with several processes side by side they would mean little.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

from unlearn_ext import __version__
from unlearn_ext.demo.diffusion.run import DiffusionDemo, DiffusionOptions
from unlearn_ext.demo.diffusion.weights import SHIPPED
from unlearn_ext.utils.files import atomic_path

RESULTS = Path(__file__).parent / "results" / "diffusion.json"
TASKS = ("ddpm", "dit", "text")
SEEDS, REPEATED, CAPTIONED = range(3), (3, 5, 8), (3, 7, 8)
MANY, FEW = 200, 50  # samples of each digit


def configurations(task: str) -> list[tuple[int, int, int]]:
    """(digit, seed, samples), those beside each other that share their samples from before."""
    if task == "text":
        return [(digit, 0, FEW) for digit in CAPTIONED]
    every = [(digit, 0, FEW) for digit in range(10)]
    return every + [(digit, seed, MANY) for seed in SEEDS for digit in REPEATED]


def measure(tasks: list[str], precision: str) -> None:
    for task in tasks:
        before: DiffusionDemo | None = None
        for digit, seed, samples in configurations(task):
            options = DiffusionOptions(
                task=task, forget_class=digit, samples=samples, seed=seed, mixed_precision=precision
            )
            demo = DiffusionDemo(options)
            key = {"task": task, "digit": digit, "seed": seed, "samples": samples, "precision": precision}
            key["weights_sha256"] = hashlib.sha256((SHIPPED / f"{task}.safetensors").read_bytes()).hexdigest()
            key["settings"] = json.loads(json.dumps(demo.settings()))
            if any(row["key"] == key for row in _document()["rows"]):
                continue
            if before is not None and (before.options.seed, before.options.samples) == (seed, samples):
                demo.adopt(before)
            started = time.perf_counter()
            report = demo.run().report()
            before = demo
            kept = ("digits", "frechet", "diversity", "forgotten", "retained", "replaced", "protocol")
            kept += ("mask_density", "pretrained", "data_sha256")
            _write({"key": key, **{name: report[name] for name in kept if name in report}})
            print(
                f"{task} {digit} seed {seed}: forgotten {report['forgotten']}, retained {report['retained']}, "
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )


def _document() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": []}


def _write(row: dict) -> None:
    """In place of a row of other settings or starting weights."""
    row["made_by"] = {
        "unlearn_ext": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    same = ("task", "digit", "seed", "samples", "precision")
    RESULTS.parent.mkdir(exist_ok=True)
    folder = os.open(RESULTS.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # other demos may be measured beside this one
        rows = [r for r in _document()["rows"] if any(r["key"][name] != row["key"][name] for name in same)]
        rows = sorted([*rows, row], key=lambda r: [r["key"][name] for name in same])
        with atomic_path(RESULTS) as partial:
            partial.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    finally:
        os.close(folder)


def show(document: dict) -> None:
    """Tables for docs/results/, networks told labels side by side, and how far the worst row is from each bar."""
    for tasks in (("ddpm", "dit"), ("text",)):
        rows = [row for row in document["rows"] if row["key"]["task"] in tasks]
        for samples in sorted({row["key"]["samples"] for row in rows}):
            _show_table(tasks, samples, [row for row in rows if row["key"]["samples"] == samples])
    for task in TASKS:
        if rows := [row for row in document["rows"] if row["key"]["task"] == task]:
            _show_bars(task, rows)


def _show_table(tasks: tuple[str, ...], samples: int, rows: list[dict]) -> None:
    found = {(row["key"]["digit"], row["key"]["seed"], row["key"]["task"]): _cells(row) for row in rows}
    measures = ("forgotten %", "nine others %", "Fréchet", "diversity", "old row back %")
    if tasks == ("text",):
        measures = measures[:-1]  # it has no such row
    heads = [f"{measure} ({task})" for task in tasks for measure in measures]
    print(f"\n{samples} samples of each digit\n\n| digit | seed | {' | '.join(heads)} |\n|{'---|' * (2 + len(heads))}")
    for digit, seed in sorted({key[:2] for key in found}):
        cells = [cell for task in tasks for cell in found.get((digit, seed, task), ["–"] * len(measures))]
        print(f"| {digit} | {seed} | {' | '.join(cells)} |")


def _cells(row: dict) -> list[str]:
    kept = row["diversity"]["after"] / row["diversity"]["before"]
    cells = [*(_change(row[name], scale) for name, scale in _COLUMNS), f"{kept:.2f}"]
    restored = row["forgotten"].get("row_put_back")
    return cells if restored is None else [*cells, f"{100 * restored:.1f}"]


def _show_bars(task: str, rows: list[dict]) -> None:
    protocol = rows[0]["protocol"]
    bars = {
        "forgotten digit, before, least": min(row["forgotten"]["before"] for row in rows),
        "forgotten digit, after, most": max(row["forgotten"]["after"] for row in rows),
        "nine others, most that is lost": max(r["retained"]["before"] - r["retained"]["after"] for r in rows),
        "Fréchet distance, largest ratio": max(r["frechet"]["after"] / r["frechet"]["before"] for r in rows),
        "diversity kept, least": min(r["diversity"]["after"] / r["diversity"]["before"] for r in rows),
    }
    repeated = [row for row in rows if row["key"]["samples"] == MANY]
    if len({row["key"]["seed"] for row in repeated}) > 1:
        bars["a retained digit's mean over seeds, most that is lost"] = max(_lost(repeated))
    if restored := [r["forgotten"]["row_put_back"] for r in rows if "row_put_back" in r["forgotten"]]:
        bars["forgotten digit with its old row put back, least"] = min(restored)
        bars["forgotten digit with its old row put back, most"] = max(restored)
    print(
        f"\n{task}, {len(rows)} runs: {protocol['sampler']}, {protocol['steps']} steps, guidance {protocol['guidance']}"
    )
    for what, value in bars.items():
        print(f"{what}: {value:.3f}")


_COLUMNS = (("forgotten", 100), ("retained", 100), ("frechet", 1))


def _change(values: dict[str, float], scale: float) -> str:
    digits = 1 if scale == 100 else 2
    return f"{scale * values['before']:.{digits}f} → {scale * values['after']:.{digits}f}"


def _lost(rows: list[dict]) -> list[float]:
    """Of every retained digit, for every forgotten one: the mean over seeds of what its accuracy lost."""
    lost = []
    for forgotten in REPEATED:
        own = [row["digits"] for row in rows if row["key"]["digit"] == forgotten]
        for digit in range(10):
            if digit != forgotten and own:
                drops = [found[str(digit)] for found in own]
                lost.append(statistics.mean(d["before"]["accuracy"] - d["after"]["accuracy"] for d in drops))
    return lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--show", action="store_true", help="print the tables from the results file, measure nothing")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--threads", type=int, help="PyTorch's own choice unless given")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if not options.show:
        measure(options.tasks, options.mixed_precision)
    show(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
