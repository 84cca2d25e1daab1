"""Does the demo really forget? The tables of docs/results/classifier.md, written to results/digits.json.

    python benchmarks/digits.py            # both scenarios, about 10 minutes on one core
    python benchmarks/digits.py --show     # prints the tables from the file again

Class scenario: digit 3 at seeds 0 to 4 and every digit at seed 0. Random scenario: 1,000 training digits, 20 % of them
forgotten, seeds 0 to 4; the settings were chosen on seeds from 100 up. Runs of one scenario and seed share their
original model, and the two updates their retrained one. One thread, so that every machine rounds alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path

import torch

from unlearn_ext import __version__
from unlearn_ext.demo.classifier import ClassifierDemo, DemoOptions

RESULTS = Path(__file__).parent / "results" / "digits.json"
SEEDS = range(5)


def configurations() -> list[dict]:
    """What is forgotten, run after run; runs of one scenario and seed share their original model."""
    found = [{"forget_class": 3, "seed": seed} for seed in reversed(SEEDS)]
    found += [{"forget_class": digit, "seed": 0} for digit in range(10) if digit != 3]
    return found + [{"scenario": "random", "train_size": 1000, "forget_fraction": 0.2, "seed": seed} for seed in SEEDS]


def measure() -> dict:
    torch.set_num_threads(1)
    rows, before = [], None
    for options in configurations():
        sequential = ClassifierDemo(DemoOptions(**options, update="sequential"))
        if before is not None and (before.options.scenario, before.options.seed) == (
            sequential.options.scenario,
            sequential.options.seed,
        ):
            sequential.adopt(before, "original")
        before = sequential.run()
        joint = ClassifierDemo(DemoOptions(**options, update="joint"))
        joint.adopt(sequential, "original", "retrained")
        for run in (sequential, joint.run()):
            report = run.report()
            kept = {key: report[key] for key in ("models", "mask_density", "timings", "method", "data_sha256")}
            rows.append({"options": {**options, "update": report["update"]}, **kept})
            gaps = {name: round(values["gap"], 4) for name, values in report["models"].items()}
            print(rows[-1]["options"], gaps, flush=True)
    versions = {"unlearn_ext": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"rows": rows, "versions": versions, "threads": torch.get_num_threads(), "machine": platform.machine()}


def spread(values: list[float], digits: int = 2) -> str:
    """Mean ± standard deviation, in percent."""
    percent = [100 * value for value in values]
    return f"{statistics.mean(percent):.{digits}f} ± {statistics.stdev(percent):.{digits}f}"


def show(document: dict) -> None:
    for update in ("sequential", "joint"):
        rows = [row for row in document["rows"] if row["options"]["update"] == update]
        classes = [row for row in rows if "forget_class" in row["options"]]
        print(f"\nClass scenario, {update}\n")
        print("| digit | seed | FA % | TA % before | TA % after | gap % | gap % of doing nothing |")
        print("|---|---|---|---|---|---|---|")
        for row in sorted(classes, key=lambda row: (row["options"]["forget_class"], row["options"]["seed"])):
            before, after = row["models"]["original"], row["models"]["unlearned"]
            print(
                f"| {row['options']['forget_class']} | {row['options']['seed']} | {100 * after['FA']:.2f} "
                f"| {100 * before['TA_retained']:.2f} | {100 * after['TA_retained']:.2f} | {100 * after['gap']:.2f} "
                f"| {100 * before['gap']:.2f} |"
            )
        digits = [row["models"] for row in classes if row["options"]["seed"] == 0]
        seeds = [row["models"] for row in classes if row["options"]["forget_class"] == 3]
        for what, models in (("ten digits, seed 0", digits), ("digit 3, five seeds", seeds)):
            lost = [m["original"]["TA_retained"] - m["unlearned"]["TA_retained"] for m in models]
            gaps = spread([m["unlearned"]["gap"] for m in models])
            forgotten = spread([m["unlearned"]["FA"] for m in models])
            print(f"\n{what}: FA {forgotten}, TA lost {spread(lost)} (worst {100 * max(lost):.2f}), gap {gaps}")
        print(f"\nRandom scenario, {update}: mean ± standard deviation over {len(SEEDS)} seeds\n")
        random = [row["models"] for row in rows if "scenario" in row["options"]]
        print("| model | FA % | RA % | TA % | MIA % | gap % | KL | seconds |")
        print("|---|---|---|---|---|---|---|---|")
        for name in ("original", "retrained", "unlearned"):
            cells = [spread([m[name][key] for m in random]) for key in ("FA", "RA", "TA", "MIA_entropy", "gap")]
            kl = statistics.mean(m[name]["KL"] for m in random)
            seconds = statistics.mean(m[name]["seconds"] for m in random)
            print(f"| {name} | {' | '.join(cells)} | {kl:.3f} | {seconds:.1f} |")
        cut = [m["original"]["gap"] - m["unlearned"]["gap"] for m in random]
        share = statistics.mean(cut) / statistics.mean(m["original"]["gap"] for m in random)
        error = statistics.stdev(cut) / len(cut) ** 0.5
        print(
            f"\nThe gap is cut by {100 * statistics.mean(cut):.2f} points ({100 * share:.0f} %), standard error "
            f"{100 * error:.2f}: {statistics.mean(cut) / error:.1f} standard errors."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--show", action="store_true", help="print the tables from the results file, measure nothing")
    if not parser.parse_args().show:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    show(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
