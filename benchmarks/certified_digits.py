"""Deletions with a proof on real digits: what they cost in accuracy and time, and how close to retraining they stay.

    python benchmarks/certified_digits.py            # measures, about a minute on one idle core
    python benchmarks/certified_digits.py --show     # prints the table from results/certified_digits.json again

scikit-learn's 1,797 digits of 8 × 8 pixels: 1,437 to train, 360 held out, in five splits. From each model 20 random
samples are deleted one by one and then 100 at once. After each, the secret weights are compared with those of training
anew on what is left, by the same number of steps as at the start. Noise is the system's: accuracies differ a little
from run to run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from unlearn_ext import __version__
from unlearn_ext.certified import Publication, SoftmaxRegression, certify, unit_rows

RESULTS = Path(__file__).parent / "results" / "certified_digits.json"
SPLITS = range(5)
DELTA = 1e-5
DRAWS = 20
# l2, epsilon, iterations for each deletion
ROWS = [(0.05, 1.0, 25), (0.05, 1.0, 50), (0.05, 0.1, 50), (0.01, 1.0, 200)]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(dim=1) == labels).double().mean())


def measure_one(split: int, l2: float, epsilon: float, iterations: int) -> dict:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, digits = load_digits(return_X_y=True)
    parts = train_test_split(pixels, digits, test_size=360, stratify=digits, random_state=split)
    x, held_out, y, labels = map(torch.from_numpy, parts)
    x, held_out = unit_rows(x), unit_rows(held_out)
    model = SoftmaxRegression(features=x.shape[1], classes=10, l2=l2)
    learner = certify(model, x, y, epsilon=epsilon, delta=DELTA, iterations=iterations)
    c = learner.constants
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(split)).tolist()
    worst, seconds = 0.0, {"deletion": [], "training": []}
    for batch in [[i] for i in order[:20]] + [order[20:120]]:
        started = time.perf_counter()
        learner.delete(batch)
        if len(batch) == 1:
            seconds["deletion"].append(time.perf_counter() - started)
        left = torch.tensor(learner.remaining)
        started = time.perf_counter()
        anew = model.descend(
            torch.zeros(x.shape[1], 10, dtype=torch.float64),
            x[left],
            y[left],
            steps=c.training_iterations,
            eta=c.eta,
            radius=c.radius,
        )
        seconds["training"].append(time.perf_counter() - started)
        worst = max(worst, float((learner._secret.weights - anew).norm()))
    published: list[Publication] = [learner.publish() for _ in range(DRAWS)]
    assert all(publication.certificate["certified"] for publication in published)
    return {
        "split": split,
        "constants": c.to_dict(),
        "deleted": learner.deleted,
        "steps_for_100_deletions": c.iterations_for(100),
        "worst_distance": worst,
        "accuracy_retrained": accuracy(held_out @ anew, labels),
        "accuracy_published": [accuracy(publication.logits(held_out), labels) for publication in published],
        "seconds_deletion": statistics.median(seconds["deletion"]),
        "seconds_training": statistics.median(seconds["training"]),
    }


def measure() -> dict:
    torch.set_num_threads(1)
    runs = []
    for row in ROWS:
        for split in SPLITS:
            runs.append(measure_one(split, *row))
            found = runs[-1]
            print(row, split, f"{found['worst_distance']:.2e} of {found['constants']['distance']:.2e}", flush=True)
    versions = {"unlearn_ext": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"runs": runs, "draws": DRAWS, "versions": versions, "threads": 1, "machine": platform.machine()}


def percent(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f}±{100 * statistics.stdev(values):.1f}"


def short(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-")


def show(document: dict) -> None:
    """Markdown, at most 80 columns."""
    print("| l2 | ε | steps | anew | σ | Δ | worst | retrained % | published % | time |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for l2, epsilon, iterations in ROWS:
        runs = [
            run
            for run in document["runs"]
            if tuple(run["constants"][k] for k in ("l2", "epsilon", "iterations")) == (l2, epsilon, iterations)
        ]
        c = runs[0]["constants"]
        worst = max(run["worst_distance"] for run in runs)
        share = statistics.median(run["seconds_deletion"] / run["seconds_training"] for run in runs)
        published = percent([value for run in runs for value in run["accuracy_published"]])
        retrained = percent([run["accuracy_retrained"] for run in runs])
        print(
            f"| {l2} | {epsilon:g} | {iterations} | {c['training_iterations']} | {short(c['sigma'])} "
            f"| {short(c['distance'])} | {short(worst)} | {retrained} | {published} | {share:.2f} |"
        )
    print(
        f"\nδ = {DELTA:g}; {len(SPLITS)} splits, 120 deletions each; published: {document['draws']} draws a split.\n"
        "steps: of a deletion; anew: of training; time: the first's over the second's.\n"
        "Δ: the proven bound on the distance to retraining; worst: the largest measured."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--show", action="store_true", help="print the table from the results file, measure nothing")
    if not parser.parse_args().show:
        document = measure()
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    show(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
