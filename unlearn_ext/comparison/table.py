"""A comparison in 80 columns: a table, and the sentences that belong to it."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..evaluation import RETAINED_GAP_KEYS
from ..methods.spec import split_commas

__all__ = ["show"]

_BEST = "bold"
_SHORT = {"FA": "FA", "RA": "RA", "TA_retained": "TA", "MIA_entropy": "MIA"}
# What stands above the methods: a model, and what it is.
_REFERENCES = {"original": "do nothing", "retrained": "retrained", "retrained_again": "retrained again"}


def show(document: dict[str, Any], console: Console) -> None:
    """Prints what :func:`~unlearn_ext.comparison.run.document` made. Methods are in the order of their gap."""
    protocol, methods = document["protocol"], document["methods"]
    retrained = document["references"]["retrained"]
    table = Table(title=_title(protocol))
    table.add_column("method", overflow="fold")
    classes = protocol["scenario"] == "class"
    for name in (*_SHORT.values(), "gap"):
        heading = f"retained\n{name} %" if classes and name == "TA" else f"{name} %"
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("RTE s", justify="right", no_wrap=True)
    for role, name in _REFERENCES.items():
        row = document["references"][role]
        table.add_row(name, *(_percent(row[key]) for key in RETAINED_GAP_KEYS), _gap(row), _seconds(row))
    table.add_section()
    best = _best(methods, retrained)
    for name in sorted(methods, key=lambda name: methods[name]["rank"]["gap_mean"] or len(methods) + 1):
        row = methods[name]
        cells = [*(_percent(row[key]) for key in RETAINED_GAP_KEYS), _gap(row), _seconds(row)]
        table.add_row(
            _label(name),
            *(
                Text(cell, _BEST if name in best[key] else "")
                for key, cell in zip((*RETAINED_GAP_KEYS, "gap", "RTE"), cells, strict=True)
            ),
        )
    console.print(table)
    for sentence in _sentences(document, best):
        console.print(sentence)
    console.print(_legend(protocol), style="dim")


def _title(protocol: dict[str, Any]) -> str:
    sizes, seeds = protocol["sizes"], protocol["seeds"]
    what = f"{sizes['forget']} random" if protocol["scenario"] == "random" else f"class {protocol['forget_class']}"
    seeds = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    return f"Forgetting {what} of {protocol['train_size']} training samples, {seeds}"


def _label(name: str) -> str:
    """Each setting on a line of its own."""
    method, colon, settings = name.partition(":")
    return method + colon + "".join(f"\n {piece}" for piece in split_commas(settings))


def _percent(values: dict[str, Any]) -> str:
    return "–" if values["mean"] is None else f"{100 * values['mean']:.1f}"


def _gap(row: dict[str, Any]) -> str:
    mean, std = row["gap"]["mean"], row["gap"]["std"]
    if mean is None:
        return "failed"
    return f"{100 * mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")


def _seconds(row: dict[str, Any]) -> str:
    mean = row["RTE"]["mean"]
    return "–" if mean is None else f"{mean:.1f}" if mean >= 0.1 or not mean else f"{mean:.2f}"


def _best(methods: dict[str, Any], retrained: dict[str, Any]) -> dict[str, set[str]]:
    """By column: closest to each seed's retrained model, of the smallest gap, the fastest."""
    distances: dict[str, dict[str, float]] = {}
    for name, row in methods.items():
        if row["gap"]["mean"] is None:
            continue
        for key in RETAINED_GAP_KEYS:
            pairs = zip(row[key]["values"], retrained[key]["values"], strict=True)
            distances.setdefault(key, {})[name] = fmean(abs(value - reference) for value, reference in pairs)
        for key in ("gap", "RTE"):
            distances.setdefault(key, {})[name] = row[key]["mean"]
    best = {}
    for key in (*RETAINED_GAP_KEYS, "gap", "RTE"):
        values = distances.get(key, {})
        least = min(values.values(), default=0.0)
        best[key] = {name for name, value in values.items() if value <= least + 1e-12}
    return best


def _sentences(document: dict[str, Any], best: dict[str, set[str]]) -> list[str]:
    methods, floor, short = document["methods"], document["noise_floor"], _short_names(document["methods"])
    nothing = document["references"]["original"]["gap"]["mean"]
    sentences = [
        f"Two retrained models differ by {100 * floor['mean']:.2f} points, the noise floor; doing nothing is "
        f"{100 * nothing:.2f} points from retraining."
    ]
    if len(methods) > 1:
        sentences += [
            f"Smallest gap: {short[name]}, {_gap(methods[name])}, in {100 * methods[name]['RTE_share']['mean']:.0f} % "
            "of retraining's time."
            for name in sorted(best["gap"])
        ]
    for kind in ("under", "over"):
        named = [
            f"{short[name]} ({', '.join(marks)})"
            for name, row in methods.items()
            if (marks := [_mark(one) for one in row["warnings"] if one["kind"] == kind])
        ]
        if named:
            sentences.append(f"Warning, {kind}-forgetting: {'; '.join(named)}.")
    for name, row in methods.items():
        sentences += _of_runs(short[name], row["runs"], document["protocol"]["seeds"])
        if row["failed"]:
            seeds, reason = ", ".join(row["failed"]), next(iter(row["failed"].values()))
            sentences.append(f"Warning: {short[name]} has no mean, because it failed (seeds {seeds}): {reason}")
    return sentences


def _of_runs(name: str, runs: list[dict[str, Any] | None], seeds: list[int]) -> list[str]:
    """What the runs themselves warned of: each kind once, with the first seed's sentence."""
    seen: dict[str, list[tuple[int, str]]] = {}
    for seed, run in zip(seeds, runs, strict=True):
        for key, sentence in ((run or {}).get("warnings") or {}).items():
            seen.setdefault(key, []).append((seed, sentence))
    return [
        f"Warning: {name} (seed{'s' * (len(of_seeds) > 1)} {', '.join(str(seed) for seed, _ in of_seeds)}): "
        f"{of_seeds[0][1]}."
        for of_seeds in seen.values()
    ]


def _short_names(names: Iterable[str]) -> dict[str, str]:
    """A method's name without its settings, where it stands in the table once."""
    heads = {name: name.partition(":")[0] for name in names}
    return {name: head if list(heads.values()).count(head) == 1 else name for name, head in heads.items()}


def _mark(one: dict[str, Any]) -> str:
    return f"{_SHORT[one['metric']]} {100 * one['mean']:+.1f}"


def _legend(protocol: dict[str, Any]) -> str:
    count, classes = len(protocol["seeds"]), protocol["scenario"] == "class"
    return (
        f"{'One seed' if count == 1 else f'Means over {count} seeds'}. Gap: mean distance in FA, RA, TA and MIA to the "
        f"same seed's retrained model{'' if count == 1 else ', ± standard deviation'}. "
        f"{'MIA and gap: over the retained classes. ' if classes else ''}RTE: seconds of the unlearning alone; "
        "of retrained models, of training, taken when they were trained. Bold: closest to retraining, or fastest. "
        f"Warned of: {protocol['warnings']}."
    )
