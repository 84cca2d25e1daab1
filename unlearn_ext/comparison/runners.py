"""What a comparison runs: a method of the registry, or anything else that makes a model forget."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from torch import nn

from ..errors import InputError, UnlearningWarning
from ..methods import Method
from ..methods.calibration import LEAST_SAMPLES
from ..methods.ssd import SSD
from ..run.unlearner import Unlearner
from ..tasks import Classification

__all__ = ["DampeningRunner", "MethodRunner", "Runner"]

Batches = Iterable[Any]


class Runner(ABC):
    """Makes a model forget, in place. All of a call is timed, so all that the method needs belongs into it.

    Attributes:
        label: its name in the table and the JSON.
        origin: where its settings are from: ``tuned``, ``published``, ``defaults`` or a preset's name, and which were
            given instead: ``tuned, with lr=10``.
        needs_held_out: whether it looks at samples that nobody trained on.
        least_held_out: how many of them it needs.
    """

    label: str
    origin: str = "published"

    @property
    def needs_held_out(self) -> bool:
        return False

    @property
    def least_held_out(self) -> int:
        return int(self.needs_held_out)

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What its result depends on, as JSON has it."""

    def check(self, model: nn.Module) -> None:  # noqa: B027 - optional
        """Raises InputError if it cannot run on such a model; changes nothing."""

    @abstractmethod
    def __call__(
        self, model: nn.Module, forget: Batches, retain: Batches, held_out: Batches | None, seed: int
    ) -> dict[str, Any]:
        """Runs, and returns what is to be kept of it, as JSON has it.

        Args:
            model: the trained network.
            forget, retain: re-iterables of ``(images, labels)``.
            held_out: the same, of samples that are in neither, to look at and never to train on.
            seed: of everything random in it.
        """


class MethodRunner(Runner):
    """A gradient method, through :class:`~unlearn_ext.Unlearner`.

    Args:
        own_seed: a method with a ``seed`` keeps its own, and does not get that of each run.
    """

    def __init__(self, label: str, method: Method, origin: str = "published", *, own_seed: bool = False):
        self.label, self.method, self.origin = label, method, origin
        self._seeds = not own_seed and any(field.name == "seed" for field in fields(method))

    @property
    def needs_held_out(self) -> bool:
        return self.method.needs_unseen

    @property
    def least_held_out(self) -> int:
        return super().least_held_out if self.method.calibration is None else LEAST_SAMPLES

    def settings(self) -> dict[str, Any]:
        seed = {"seed": "the run's"} if self._seeds else {}
        return {"method": self.method.name, **self.method.settings(), **seed}

    def check(self, model: nn.Module) -> None:
        if self.method.learns:
            raise InputError(f"{self.label} learns new data while it forgets, and a comparison has none: leave it out")
        Unlearner(model, Classification(), self.method)

    def __call__(self, model, forget, retain, held_out, seed) -> dict[str, Any]:
        # A copy: a run may tell its method the number of iterations, or the loss on unseen data.
        method = copy.deepcopy(self.method)
        if self._seeds:
            method.seed = seed
        unlearner = Unlearner(model, Classification(seed=seed), method)
        unseen = {"unseen": held_out} if self.needs_held_out else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnlearningWarning)  # the record has them, and the table shows them
            result = unlearner.run(forget, retain, **unseen)
        return {
            "update": result.update,
            "timings": result.timings,
            "counts": result.counts,
            "mask_density": result.mask.density if result.mask is not None else None,
            "moved_protected": result.moved_protected,
            "protection": result.protection,
            "backend": result.backend,
            "calibration": result.calibration,
            "warnings": result.warnings,
        }


class DampeningRunner(Runner):
    """Selective synaptic dampening, which makes no gradient step."""

    def __init__(self, label: str, method: SSD, origin: str = "published"):
        self.label, self.method, self.origin = label, method, origin

    def settings(self) -> dict[str, Any]:
        return {"method": self.method.name, **vars(self.method)}

    def __call__(self, model, forget, retain, held_out, seed) -> dict[str, Any]:
        result = self.method.run(model, Classification(seed=seed), forget, retain)
        return {
            "timings": result.timings,
            "counts": result.counts,
            "mask_density": result.mask.density,
            "mean_factor": result.mean_factor,
            "backend": result.backend,
        }
