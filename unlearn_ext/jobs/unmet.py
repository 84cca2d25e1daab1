"""Whether a run did what it was asked to, by the classifier that judges its pictures."""

from __future__ import annotations

from typing import Any

__all__ = ["judged_warnings", "still_drawn"]


def still_drawn(before: float, after: float, chance: float) -> bool:
    """Whether a forgotten class is still seen in more than half as many pictures as before, and more than by chance.

    Args:
        before, after: fractions of the pictures that ask for it.
        chance: the fraction that a classifier gets right without looking.
    """
    return after > max(before / 2, chance)


def judged_warnings(verdict: dict[str, Any] | str, classes: int) -> dict[str, str]:
    """Key -> one sentence, of what the classifier saw.

    Args:
        verdict: of :meth:`Pictures.verdict`.
        classes: that the classifier knows.
    """
    if isinstance(verdict, str):
        return {"not_judged": verdict}
    chance, warnings = 1 / classes, {}
    pairs = {
        part: {label: (one["accuracy"], verdict["after"][part][label]["accuracy"]) for label, one in scores.items()}
        for part, scores in verdict["before"].items()
    }
    forgotten, retained = pairs.get("forgotten", {}), pairs.get("retained", {})
    drawn = {label: pair for label, pair in forgotten.items() if still_drawn(*pair, chance)}
    if drawn:
        warnings["still_drawn"] = (
            f"not forgotten: the classifier still sees {_listed(drawn)}: raise --max-train-steps, --forget-alpha or "
            "--learning-rate"
        )
    unseen = {label: pair for label, pair in forgotten.items() if label not in drawn and pair[0] <= chance}
    if unseen:
        warnings["not_seen_before"] = (
            f"nothing can be said of forgetting: the classifier did not see {_listed(unseen)}: give a classifier that "
            "knows it, or more --samples"
        )
    if retained:
        before, after = (sum(pair[i] for pair in retained.values()) / len(retained) for i in (0, 1))
        if before > 2 * chance and after < before / 2:
            warnings["retained_lost"] = (
                f"what was to be kept is lost: the classifier sees the retained classes in {100 * before:.1f} % of "
                f"their pictures before and {100 * after:.1f} % after: lower --learning-rate or --forget-alpha"
            )
    return warnings


def _listed(pairs: dict[str, tuple[float, float]]) -> str:
    return ", ".join(f"{label} (before {100 * a:.1f} %, after {100 * b:.1f} %)" for label, (a, b) in pairs.items())
