"""A result in a few lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .unlearner import Result

__all__ = ["summary"]

_LONGEST = 960  # characters
_SENTENCE = 120  # of a warning


def summary(result: Result) -> str:
    """Iterations, first and last losses, mask, timings and warnings; no tensor is looked at."""
    counts = result.counts
    lines = [f"{counts.get('iterations', 0)} iterations ({result.update}, {result.backend or 'not run'})"]
    if result.stopped_at is not None:
        lines[0] += f", stopped at {result.stopped_at}"
    for name in ("forget_loss", "retain_loss", "learn_loss"):
        losses = [entry[name] for entry in result.history if entry.get(name) is not None]
        if losses:
            lines.append(f"{name}: {_number(losses[0])} -> {_number(losses[-1])}")
    if result.forget_eval is not None:
        lines.append("forget batch in eval mode: " + _pairs(result.forget_eval))
    if result.mask is not None and counts.get("trainable_weights"):
        total = counts["trainable_weights"]
        lines.append(f"mask: {100 * counts['salient_weights'] / total:.3g} % of {total} weights")
    if result.moved_protected is not None:
        lines.append(f"moved_protected: {result.moved_protected}")
    if result.calibration is not None:
        lines.append("calibration: " + _pairs({k: v for k, v in result.calibration.items() if k != "path"}))
    if result.ema is not None:
        lines.append(f"ema: {len(result.ema)} tensors")
    lines.append("seconds: " + (_pairs(result.timings) or "none"))
    lines += [f"warning, {key}: {_cut(sentence, _SENTENCE)}" for key, sentence in result.warnings.items()]
    return _cut("Result(" + "\n  ".join(lines), _LONGEST) + ")"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_number(value)}" for key, value in values.items())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3].rstrip() + "..."
