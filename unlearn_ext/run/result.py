"""What a run did, and how it tells of its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..saliency import SaliencyMask

__all__ = ["Progress", "Result", "silent"]

Progress = Callable[[str, int, "int | None"], None]

_LONGEST = 960  # characters
_SENTENCE = 120  # of a warning


def silent(stage: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""


@dataclass(repr=False)
class Result:
    """What a run did.

    Attributes:
        mask: the saliency mask, or None.
        history: one dict per logged iteration: ``iteration`` (from 0), ``forget_loss`` and ``retain_loss`` (batch
            means; forget entries are None where the iteration did not forget), ``lr`` (of the first parameter group),
            ``alpha`` (strength; None where it is calibrated), ``clip`` (factor of the forget gradient),
            ``largest_share`` (of one sample in the forget gradient), ``evaluation`` where an evaluation returned
            something (NaN and infinities in it as None), and, in fp16, ``forget_skipped`` or ``retain_skipped``: True
            where a scaled gradient overflowed and the step was not made, ``clip`` then being None. A method may add
            ``learn_loss``, ``unseen_loss`` (where it was measured), ``calibration`` (a look of the path below) and
            ``projection`` (:attr:`UnlearnOptimizer.last_projection`).
        timings: seconds of ``fisher`` or ``gradients``, ``mask`` and ``unlearning`` (evaluations and checkpoints not
            included).
        counts: iterations, forget_steps and retain_steps that were made, trainable and salient weights.
        moved_protected: protected weights that changed: 0, proven by hash, when every update was masked and
            protected; None when protection was not asked of the whole run.
        protection: the same in words.
        backend: ``native`` or ``python``.
        update: ``sequential`` or ``joint``.
        stopped_at: the iteration after which an evaluation stopped the run, or a calibration met its target; or None.
        calibration: with ``forget_alpha="auto"``: ``path``, the looks at forget and unseen data
            (:class:`~unlearn_ext.methods.calibration.Calibration`), ``ended_at``, the iterations whose weights the
            model has, ``went_back``, whether later ones were given up, and ``met``; else None.
        ema: moving averages of the trained weights by name, where ``ema_decay`` was given; the model itself holds the
            weights of the last iteration. Both are those of an earlier one where a calibration went back to it.
        warnings: one sentence for each thing that was asked and did not happen, or that makes that likely; each is also
            an :class:`~unlearn_ext.UnlearningWarning`. Keys: ``target`` (a calibration's was not met), ``unmoved`` (no
            weight has moved, or forgetting moved nothing), ``retain`` (the retain loss is several times that of the
            starting weights), ``batch_norm`` (a forget batch that seems forgotten in train mode is known in eval mode),
            ``momentum`` (``rule="momentum"`` with 0), ``strength`` (a forget strength of 0), ``unseen`` (unseen data
            hold a class that is to be forgotten) and ``workers`` (what the persistent workers of a loader draw is not
            restored where the run resumes).
        forget_eval: of a model with batch normalisation in train mode, the last forget batch in eval mode after the
            run: ``samples``, mean ``loss`` as in the history's ``forget_loss``, and ``accuracy`` (None where the task
            has none). None for other models, and where a calibration has looked or there are several ranks.
    """

    mask: SaliencyMask | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    moved_protected: int | None = None
    protection: str = ""
    backend: str = ""
    update: str = "sequential"
    stopped_at: int | None = None
    ema: dict[str, Tensor] | None = None
    calibration: dict[str, Any] | None = None
    warnings: dict[str, str] = field(default_factory=dict)
    forget_eval: dict[str, Any] | None = None

    def __repr__(self) -> str:
        """What a notebook's last line shows: a summary of a few lines."""
        return _summary(self)


def _summary(result: Result) -> str:
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
