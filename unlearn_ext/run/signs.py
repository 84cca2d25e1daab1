"""Signs that a run did not do what was asked of it, from what the run has at hand: one sentence for each."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..distributed.hashing import as_integers
from ..distributed.shards import local
from ..utils.warn import warn

if TYPE_CHECKING:
    from ..methods import Method
    from ..tasks import Task

__all__ = ["IDLE_FORGETTING", "IDLE_MOMENTUM", "KEYS", "MISSED", "Losses", "announce", "bit_sums", "drawing", "growth"]
__all__ += ["hidden", "in_nats", "missed", "note_idle", "start_batches", "unmet", "unmoved", "unseen_classes"]

# Keys of the warnings that say that what was asked did not happen; the others are about settings and data.
MISSED = ("target", "unmoved", "retain", "batch_norm")
KEYS = (*MISSED, "momentum", "strength", "unseen", "workers")

_GROWN = 3.0  # times its start: retain loss that tells of damage
_FLOOR = 0.3  # nats that a cross-entropy has to rise by as well: below that nearly all predictions stay
_LOOKS = {True: 2, False: 5}  # losses that the start is the largest of; squared errors of noise vary more
_LAST = 5  # of which the end is the median
_NO_TERM = "the forget term was 0 in every step, so choose a method whose term is not 0 for such a task and such data"
_APART = 3.0  # times: two losses of the same batch
_KNOWN = 0.5  # accuracy from which on a batch counts as known
_AT_ONCE = 3 << 21  # weights whose bits are summed at once; of 2 and 3 a multiple


def missed(found: Iterable[str]) -> bool:
    """Whether keys of :attr:`Result.warnings` say that what was asked did not happen: a command's exit code 3."""
    return any(key in MISSED for key in found)


def announce(found: Mapping[str, str], said: set[str]) -> None:
    """Warns of what was not said before."""
    for key, sentence in found.items():
        if key not in said:
            said.add(key)
            warn(sentence)


# --- What is known before the first step --------------------------------------------------------------------------


IDLE_MOMENTUM = (
    "rule='momentum' with momentum=0 is plain gradient descent, whose steps add up to about a tenth of those with 0.9: "
    "leave momentum out (it is 0.9 then), or set rule='sgd' if that is meant"
)


IDLE_FORGETTING = (
    "forget_alpha, forget_lr or forget_weight is 0, so no step forgets and the run only trains on what is kept: set it "
    "above 0, or take the method finetune if that is meant"
)


def note_idle(warnings: dict[str, str], method: Method) -> None:
    """What a method's settings leave undone, by key."""
    if method.has_idle_momentum:
        warnings["momentum"] = IDLE_MOMENTUM
    if method.has_idle_forgetting:
        warnings["strength"] = IDLE_FORGETTING


def drawing(names: Sequence[str], resumed: bool) -> str:
    """Of loaders whose workers live on from pass to pass."""
    when = (
        "was not restored: where it draws any, the run is another than without a stop"
        if resumed
        else "is not restored when the run resumes"
    )
    return (
        f"the workers of the {' and '.join(names)} loader live on from pass to pass, and what they draw (augmentation) "
        f"{when}; with persistent_workers=False it is"
    )


def unseen_classes(labels: Mapping[str, set[int]], whole: bool = True) -> str | None:
    """Of classes that are forgotten as a whole: no retained sample is of them.

    Args:
        labels: of the forget, retain and unseen samples.
        whole: of all of them.
    """
    forgotten, retained = labels.get("forget", set()), labels.get("retain", set())
    if forgotten & retained or (len(forgotten) > 1 and not (retained and whole)):
        return None
    both = sorted(forgotten & labels.get("unseen", set()))
    if not both:
        return None
    named = ", ".join(map(str, both[:5])) + (" ..." if len(both) > 5 else "")
    return (
        f"the unseen data hold samples of what is to be forgotten as a class (label {named}): no network retrained "
        "without it would know them, so leave them out of unseen="
    )


# --- What the losses tell -----------------------------------------------------------------------------------------


class Losses:
    """The last few of a run's losses, and whether all are equal, as tensors that nobody waits for."""

    def __init__(self, saved: Mapping[str, Any] | None = None):
        saved = saved or {}
        self.last: deque[Tensor | float] = deque(saved.get("last", ()), maxlen=_LAST)
        self.bounds: list[Tensor | float] = list(saved.get("bounds", ()))
        self.count: int = saved.get("count", 0)

    def add(self, loss: Tensor) -> None:
        self.last.append(loss)
        low, high = self.bounds or (loss, loss)
        self.bounds = [torch.clamp(loss, max=low), torch.clamp(loss, min=high)]
        self.count += 1

    def state(self) -> dict[str, Any]:
        named = {"last": self.last, "bounds": self.bounds}
        return {**{name: [float(x) for x in losses] for name, losses in named.items()}, "count": self.count}

    def end(self, part: int = _LAST) -> float:
        """The median of the last ones, ``part`` at most, or the very last if that is smaller."""
        last = [float(x) for x in self.last][-part:]
        return min(median(last), last[-1])

    @property
    def constant(self) -> bool:
        """Whether there are several, all equal."""
        return self.count > 1 and float(self.bounds[0]) == float(self.bounds[1])


def in_nats(task: Task) -> bool:
    """Whether its losses are cross-entropies."""
    return task.kind == "classification" and getattr(task, "loss", None) is None


def start_batches(task: Task) -> int:
    """Number of retain batches whose loss is measured before the first step."""
    return _LOOKS[in_nats(task)]


def growth(before: Sequence[Tensor | float], losses: Losses, nats: bool) -> str | None:
    """Of the retain loss.

    Args:
        before: losses of the starting weights, on as many batches as :func:`start_batches` says.
        losses: of the steps.
        nats: they are cross-entropies.
    """
    if not before or losses.count < (1 if nats else 2 * _LOOKS[nats]):
        return None
    start, end = max(map(float, before)), losses.end(max(1, losses.count // 3))
    if not end > _GROWN * start + 1e-12 or (nats and end - start < _FLOOR):
        return None
    return (
        f"the retain loss went from {start:.3g} to {end:.3g}, so what was to be kept is damaged: lower forget_alpha or "
        "lr, clip with max_norm, or start from a preset"
    )


def hidden(
    forget: float, now: float, accuracy: float | None, *, retain: float | None, replaces: bool = False
) -> str | None:
    """Of a forget batch that seems forgotten in train mode and is known in eval mode.

    Args:
        forget: its loss in train mode.
        now, accuracy: in eval mode.
        retain: loss in train mode of what is kept: where it is as large, dropout is the reason.
        replaces: losses are under wrong labels, so that small ones seem forgotten.
    """
    if accuracy is None or accuracy < _KNOWN:
        return None
    large, small = (now, forget) if replaces else (forget, now)
    if large < max(_APART * small, math.log(2.0)) or (not replaces and retain is not None and forget < _APART * retain):
        return None
    return (
        f"in train mode the last forget batch has a loss of {forget:.3g}, but in eval mode {100 * accuracy:.0f} % of "
        "it is still got right: batch normalisation sees the forgotten samples alone in training, so set "
        "freeze_batch_norm=True or raise iterations or forget_alpha, and judge by evaluation.predict"
    )


def unmet(calibration: Mapping[str, Any], target: float | None) -> str | None:
    """Of :attr:`Result.calibration`; ``target``: accuracy, or None where losses go to those of unseen data."""
    if calibration["met"]:
        return None
    if calibration["ended_at"] == 0:
        return (
            "calibration found nothing better than the starting weights, so nothing was forgotten: change lr, raise "
            "iterations, or pass more unseen samples"
        )
    look = next(look for look in calibration["path"] if look["iteration"] == calibration["ended_at"])
    if target is None:
        what = f"the forget set's losses stand {look['distance']:.2f} from those of unseen data (Kolmogorov-Smirnov)"
    else:
        lost = calibration["path"][0]["unseen_accuracy"] - look["unseen_accuracy"]
        what = (
            f"the forget set's accuracy is {look['accuracy']:.3f} where {target:g} was asked for, and unseen data lost "
            f"{100 * lost:.1f} points"
        )
    return (
        f"the calibration's target was not met: after {look['iteration']} iterations {what}; raise lr or iterations, "
        "or change max_norm"
    )


# --- What the weights tell ----------------------------------------------------------------------------------------


@torch.no_grad()
def bit_sums(weights: Sequence[Tensor]) -> list[list[int]]:
    """Sums of each tensor's bit patterns: all, every second and every third, of this rank's part. Equal before and
    after means that nothing has moved, but for a chance that no run meets."""
    sums = []
    for weight in weights:
        bits = as_integers(local(weight).detach().reshape(-1))
        total = torch.zeros(3, dtype=torch.int64, device=bits.device)
        for part in bits.split(_AT_ONCE):  # a sum of other integers is made over a copy in int64
            total += torch.stack([part[::step].sum(dtype=torch.int64) for step in (1, 2, 3)])
        sums.append(total.tolist())
    return sums


def unmoved(
    iterations: int, *, still: bool, steps: int, lr: float, half: bool, pull: float | None, same: bool
) -> str | None:
    """Sentence on a run whose weights or forgetting did not move, or None.

    Args:
        iterations: that were made.
        still: every weight has the bits that it had at the start.
        steps: that were made.
        lr: the largest.
        half: the weights are bfloat16 or float16 without stochastic rounding.
        pull: the largest value that the forget term had; None where that tells nothing.
        same: every forget batch had the same loss.
    """
    if not iterations:
        return None
    if still:
        if not steps:
            why = "every step was left out because a scaled gradient overflowed: set mixed_precision to bf16 or no"
        elif lr == 0.0:
            why = "lr is 0"
        elif pull == 0.0:
            why = _NO_TERM
        elif half:
            why = "steps may be smaller than half a unit in the weights' last place: set stochastic_rounding=True"
        else:
            why = "raise lr, or look whether the losses depend on the weights"
        return f"no weight has moved in {iterations} iterations, so nothing was forgotten: {why}"
    if pull == 0.0:
        return f"forgetting moved nothing: {_NO_TERM}"
    if same:
        return (
            "the forget loss is to the last digit what it was at the start, so nothing was forgotten: raise lr or "
            "forget_alpha, or train the weights that the forget loss depends on"
        )
    return None
