"""Which settings suit each method? Random search under an equal budget, on seeds that no comparison reports.

    python benchmarks/tune_methods.py                                      # scenario random, every method
    python benchmarks/tune_methods.py --scenario class --methods sfron,salun --trials 8
    python benchmarks/tune_methods.py --show                               # prints from the results file again

Every method gets the published settings as its first trial and --trials draws from its space below, each run on the
same --seeds seeds from 100 up. The best trial is that of the smallest mean gap among those that take no more of
retraining's processor time than --cpu-limit; for a class, among those of them that forget it (FA at most 2 %) and keep
the other classes' test accuracy within a point of retraining's, where there are any. A killed search goes on where it
was; more trials go on from fewer. The winners are written to results/tuning-<scenario>.json, and printed as what
unlearn_ext/methods/presets/digits-<scenario>.json holds; every trial stays in --work-dir.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from unlearn_ext.cli.progress import two_bars
from unlearn_ext.cli.report import versions
from unlearn_ext.comparison.choosing import choose, complete, split_list
from unlearn_ext.comparison.run import Comparison
from unlearn_ext.data import load_digits
from unlearn_ext.demo.digits_comparison import DigitsProtocol, digits_workload
from unlearn_ext.errors import InputError, UnlearnError
from unlearn_ext.methods import METHODS
from unlearn_ext.native.building import cache_directory
from unlearn_ext.utils.files import atomic_path

RESULTS = Path(__file__).parent / "results"
FIRST_SEED = 100
KEPT = ("gap", "FA", "RA", "TA", "TA_retained", "MIA_entropy", "CPU_share")
_FORGOTTEN, _RETAINED = 0.02, 0.01  # of a class: FA at most, and the distance to retraining's TA at most


# What is drawn for a setting: ("log", low, high), a number even in its logarithm, an integer if both ends are;
# ("choice", ...), one of these; ("together", {...}, {...}), one of these sets of settings; anything else is fixed.
# The ends of "iterations" are such that the longest runs take about 25 % of retraining's 300 steps, Fisher passes and
# teachers included.
def space(iterations: tuple[int, int] | None, **settings: Any) -> dict[str, Any]:
    """What all methods but those with settings to the contrary have in common: the optimizer that trained the model."""
    steps = {} if iterations is None else {"epochs": None, "iterations": ("log", *iterations)}
    optimizer = {"rule": "momentum", "momentum": 0.9, "weight_decay": 5e-4, "lr": ("log", 1e-3, 1e-1)}
    return {**optimizer, "lr_schedule": "cosine", **steps, **settings}


_CLIPPED = {"forget_alpha": ("log", 1e-2, 3.0), "max_norm": ("log", 0.1, 10.0)}
_RELABELLED = {"forget_alpha": ("log", 0.1, 3.0), "forget_freq": ("choice", 1, 2, 4, 9)}
# Narrowed after a first search on the same seeds, where weak forgetting (forget_alpha below 10) did nothing.
_SFRON = {
    "lr": ("log", 3e-3, 6e-2),
    "forget_freq": ("choice", 1, 2),
    "forget_schedule": ("choice", "constant", "cosine"),
    "max_norm": ("log", 0.5, 8.0),
    "adaptive_eps": ("choice", 1e-15, 1e-2),
}
_TEMPERATURE = ("choice", 1.0, 2.0, 4.0)
SPACES: dict[str, dict[str, Any]] = {
    "finetune": space((10, 70), lr=("log", 3e-3, 3e-1)),
    "gradient_ascent": space((2, 60), lr=("log", 1e-4, 1e-1), max_norm=("log", 0.1, 10.0)),
    "negative_gradient_plus": space((6, 35), **_CLIPPED),
    "projected": space((6, 35), **_CLIPPED),
    "random_label": space((8, 45), **_RELABELLED),
    "salun": space((8, 45), **_RELABELLED, mask_fraction=("choice", 0.1, 0.2, 0.5, 0.8)),
    "scrub": space(
        None,
        passes=("together", *({"epochs": e, "msteps": m} for e in (1, 2, 3) for m in (1, 2, 3) if m <= e)),
        retain_loss_weight=("choice", 0.99, 1.0),
        distance_weight=("choice", 1e-3, 1e-1, 0.5),
        temperature=_TEMPERATURE,
    ),
    "bad_teacher": space((4, 28), forget_alpha=("log", 1e-2, 3.0), temperature=_TEMPERATURE),
    "nabla_tau": space((6, 26), rule="adamw", momentum=0.0, lr=("log", 1e-4, 1e-2), forget_alpha=("log", 0.03, 1.0)),
    "ssd": {"alpha": ("log", 1.05, 4.2), "lambd": ("log", 0.03, 3.0), "per_sample": ("choice", False, True)},
    "sfron": space((15, 45), **_SFRON, forget_alpha=("log", 10.0, 3000.0)),
    # DualOptim: forget steps by Adam, with moments of their own.
    "sfron:dual_state=true,forget_rule=adam": space(
        (15, 45), **_SFRON, forget_alpha=("log", 1.0, 1000.0), forget_lr=("log", 1e-5, 1e-2)
    ),
    # Looks at the held-out set cost time as well.
    "sfron:forget_alpha=auto": space(
        (20, 30),
        lr=("log", 5e-3, 6e-2),
        max_norm=("log", 0.5, 8.0),
        gamma=("choice", None, 0.5, 1.0),
        forget_freq=1,
        calibrate_every=10,  # a look more than by default, where Fisher passes do not count
    ),
}

# What differs where the forget set is a class: whose batches move batch normalisation's statistics is drawn as well,
# and some bounds are other ones, after free draws on seeds 100 to 102: 56 for sfron, 16 for calibrated sfron, 20 and a
# search within other bounds for SalUn, whose bounds random_label has too.
_RELABELLED_CLASS = {
    "lr": ("log", 5e-2, 1.5e-1),
    "iterations": ("log", 40, 75),
    "forget_alpha": ("log", 0.3, 1.5),
    "forget_freq": ("choice", 2, 3, 4),
}
CLASS_SPACES: dict[str, dict[str, Any]] = {
    "nabla_tau": {"batch_norm_statistics": "all"},  # with the choice none of its draws did as well
    "random_label": _RELABELLED_CLASS,
    "salun": {**_RELABELLED_CLASS, "mask_fraction": ("choice", 0.2, 0.5, 0.8)},
    "sfron": {
        "lr": ("log", 4e-3, 6e-2),
        "max_norm": ("log", 1.0, 6.0),
        "gamma": ("choice", 1.0, 3.0, 5.0),
        "iterations": ("log", 18, 40),
    },
    "sfron:forget_alpha=auto": {"lr": ("log", 2e-2, 1.2e-1)},
}


def space_of(name: str, scenario: str) -> dict[str, Any]:
    """What a method's trials are drawn from."""
    if scenario != "class":
        return SPACES[name]
    space = SPACES[name] | CLASS_SPACES.get(name, {})
    method = METHODS.get(name.partition(":")[0])  # ssd is none
    if method is not None and method.forgets and method.retains:
        space.setdefault("batch_norm_statistics", ("choice", "all", "retain"))
    return space


def draw(space: dict[str, Any], seed: str) -> dict[str, Any]:
    """One trial's settings; floats have three digits, so that text and number are the same."""
    source, settings = random.Random(seed), {}
    for name, kind in space.items():
        match kind:
            case ("log", int() as low, int() as high):
                settings[name] = round(math.exp(source.uniform(math.log(low), math.log(high))))
            case ("log", low, high):
                settings[name] = float(f"{math.exp(source.uniform(math.log(low), math.log(high))):.3g}")
            case ("choice", *options):
                settings[name] = source.choice(options)
            case ("together", *options):
                settings |= source.choice(options)
            case fixed:
                settings[name] = fixed
    return settings


def draws(name: str, scenario: str, count: int) -> list[dict[str, Any]]:
    """A method's trials, the same ones every time."""
    space = space_of(name, scenario)
    return [draw(space, f"{scenario} {name} {trial}") for trial in range(count)]


def tune(options: argparse.Namespace, errors: Console, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """The document of all methods; what an earlier search found of others stays.

    Raises:
        InputError: the earlier one had another budget or protocol.
    """
    protocol = DigitsProtocol(
        scenario=options.scenario,
        train_size=options.train_size,
        held_out_size=options.held_out_size,
        test_size=options.test_size,
        epochs=options.epochs,
    )
    budget = {"trials": options.trials, "seeds": options.seeds, "cpu_limit": options.cpu_limit}
    kept = earlier or {"budget": budget, "protocol": protocol.describe(), "methods": {}}
    same = {name: kept["protocol"].get(name) for name in protocol.describe()}
    if (kept["budget"], same) != (budget, protocol.describe()):
        raise InputError("--json holds a search of another budget or protocol: choose another file")
    workload, document = digits_workload(load_digits(), protocol), {}
    names = split_list(options.methods) if options.methods else list(SPACES)
    for name in names:
        if name not in SPACES:
            raise InputError(f"--methods: {name} has no space to draw from: choose from {', '.join(SPACES)}")
    first = [] if options.without_published else [{}]
    trials = {name: [*first, *draws(name, options.scenario, options.trials)] for name in names}
    searches = {name: _search(name, drawn, workload, options) for name, drawn in trials.items()}
    runs = options.seeds * sum(len(drawn) for drawn in trials.values())
    with two_bars(errors, "runs", runs) as (progress, advance):
        for name, search in searches.items():
            search.progress, search.tell = progress, errors.print
            search.finished = lambda seed, label, record, found_again: advance()
            result = search.run()
            document[name] = summary(result, trials[name], options.cpu_limit, options.scenario)
            errors.print(f"{name}: {_in_words(document[name])}")
    return {
        "scenario": options.scenario,
        "budget": budget,
        "protocol": result["protocol"],
        "versions": versions(),
        "command": shlex.join(["python", "benchmarks/tune_methods.py", *sys.argv[1:]]),
        "methods": {**kept["methods"], **document},
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError:
        raise InputError(f"{file} is no JSON: choose another file, or delete it") from None


def _search(name, drawn, workload, options) -> Comparison:
    labels = [complete(name, settings) for settings in drawn]
    return Comparison(
        workload,
        choose(labels, "published", options.scenario),
        seed=FIRST_SEED,
        count=options.seeds,
        output_dir=options.work_dir / options.scenario,
        models_dir=options.cache_dir,
    )


def summary(document: dict[str, Any], drawn: list[dict[str, Any]], cpu_limit: float, scenario: str) -> dict[str, Any]:
    """Settings and metrics of the best trial and of the published settings, and what they are measured by."""
    trials = []
    for settings, row in zip(drawn, document["methods"].values(), strict=True):
        trials.append({"settings": settings, **{metric: brief(row[metric]) for metric in KEPT}})
    retrained = brief(document["references"]["retrained"]["TA_retained"])
    fits = [trial for trial in trials if trial["gap"]["mean"] is not None and trial["CPU_share"]["mean"] <= cpu_limit]
    if scenario == "class":
        fits = [trial for trial in fits if _forgets_and_keeps(trial, retrained["mean"])] or fits
    best = min(fits, key=lambda trial: trial["gap"]["mean"], default=None)
    return {
        "best": best,
        "published": None if drawn[0] else trials[0],
        "nothing": brief(document["references"]["original"]["gap"]),
        "retrained": {"TA_retained": retrained},
        "floor": brief(document["noise_floor"]),
    }


def brief(spread: dict[str, Any]) -> dict[str, float | None]:
    return {"mean": spread["mean"], "std": spread["std"]}


def _forgets_and_keeps(trial: dict[str, Any], retrained: float) -> bool:
    distance = abs(trial["TA_retained"]["mean"] - retrained)
    return trial["FA"]["mean"] <= _FORGOTTEN + 1e-12 and distance <= _RETAINED + 1e-12  # means of a few fractions round


def _in_words(row: dict[str, Any]) -> str:
    return "no trial within the time" if row["best"] is None else f"gap {_gap(row['best'])}"


def _gap(trial: dict[str, Any]) -> str:
    mean, std = trial["gap"]["mean"], trial["gap"]["std"]
    if mean is None:
        return "failed"
    return f"{100 * mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")


def show(document: dict[str, Any], console: Console) -> None:
    budget = document["budget"]
    title = f"{budget['trials']} trials, {budget['seeds']} seeds from {FIRST_SEED} up"
    table = Table(title=f"{title}: gap in points")
    for heading in ("method", "published", "CPU", "best", "CPU"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, row in document["methods"].items():
        cells = []
        for trial in (row["published"], row["best"]):
            share = trial and trial["CPU_share"]["mean"]
            cells += ["none", ""] if trial is None else [_gap(trial), "" if share is None else f"{100 * share:.0f} %"]
        table.add_row(name, *cells)
    console.print(table)
    first = next(iter(document["methods"].values()))
    console.print(
        f"Doing nothing: {_gap({'gap': first['nothing']})}; two retrained models: {_gap({'gap': first['floor']})}. "
        f"CPU: share of retraining's time, at most {100 * budget['cpu_limit']:.0f} % for the best."
    )
    best = {name: row["best"]["settings"] for name, row in document["methods"].items() if row["best"]}
    console.print(f"\n{json.dumps(best, indent=1)}", soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=("random", "class"), default="random")
    parser.add_argument("--methods", help="with commas; all that have a space unless given")
    parser.add_argument("--trials", type=int, default=24, help="of each method, beside its published settings")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cpu-limit", type=float, default=0.25, help="of retraining's time, for the best trial")
    parser.add_argument("--without-published", action="store_true", help="leave the published settings out")
    parser.add_argument("--train-size", type=int, default=1000)
    parser.add_argument("--held-out-size", type=int, default=2000)
    parser.add_argument("--test-size", type=int, default=2000)
    parser.add_argument("--epochs", type=int)
    cache = (cache_directory() or Path.cwd()) / "compare"
    parser.add_argument("--cache-dir", type=Path, default=cache, help="keeps the trained models")
    parser.add_argument("--work-dir", type=Path, default=cache / "tuning", help="keeps each finished run")
    parser.add_argument("--json", type=Path, help="default: results/tuning-<scenario>.json")
    parser.add_argument("--show", action="store_true", help="print the results file, run nothing")
    options = parser.parse_args()
    file = options.json or RESULTS / f"tuning-{options.scenario}.json"
    console, errors = Console(highlight=False, markup=False), Console(stderr=True, highlight=False, markup=False)
    try:
        if not options.show:
            document = tune(options, errors, _read(file) if file.is_file() else None)
            with atomic_path(file) as partial:
                partial.write_text(json.dumps(document, indent=1) + "\n")
        show(_read(file), console)
    except (UnlearnError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
