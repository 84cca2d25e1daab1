"""One seed: its split and models, what each method makes of the original, and how far that is from retraining."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import ops
from ..errors import InputError, NonFiniteError
from ..evaluation import Parts, distance, knowledge, predict
from .keys import machine
from .records import Records
from .references import ROLES, References
from .runners import Runner
from .splits import Samples
from .stopwatch import Seconds, stopwatch
from .workload import Workload

__all__ = ["OneSeed"]

_FORGET, _RETAIN, _HELD_OUT = 17, 29, 41  # added to the seed: the orders of the samples


class OneSeed:
    """Runs methods on one seed's data. A record is ``{"metrics": {...}, "summary": {...}}``, or says how it failed.

    Args:
        workload: data, network and training.
        models_dir: where the trained models are kept.
        records: where finished runs are kept.
        progress, tell: as in :class:`~unlearn_ext.comparison.run.Comparison`.
    """

    def __init__(
        self,
        workload: Workload,
        seed: int,
        models_dir: Path,
        records: Records,
        *,
        progress: Callable[[str, int, int | None], None] = lambda stage, done, total: None,
        tell: Callable[[str], None] = lambda sentence: None,
    ):
        self.workload, self.seed, self.records, self.progress = workload, seed, records, progress
        self.split = workload.split(seed)
        self.models = References(
            models_dir, workload, self.split, seed, progress=progress, tell=tell, fresh=records.fresh
        )

    @property
    def sizes(self) -> dict[str, int]:
        split = self.split
        return {name: len(getattr(split, name)) for name in ("forget", "retain", "held_out", "test")} | {
            "test_retained": int(split.kept.sum())
        }

    # --- The models that methods stand between ---------------------------------------------------------------

    def references(self) -> dict[str, dict[str, Any]]:
        """The record of each role: the original model, which is what doing nothing gives, and two retrained ones."""
        records = self.records.read(self.seed, "references", self._ingredients)
        if records is None:
            records = {role: {"metrics": self._judge(self._logits(self.models[role].model))} for role in ROLES}
            for role, record in records.items():
                trained = self.models[role].seconds
                seconds = Seconds() if role == "original" else trained
                record["metrics"] |= seconds.metrics(self.models["retrained"].seconds)
                record["training_seconds"] = trained.clock
            self.records.write(self.seed, "references", self._ingredients, records)
        return records

    @cached_property
    def _retrained(self) -> tuple[dict[str, float], Parts]:
        logits = self._logits(self.models["retrained"].model)
        return knowledge(logits, self.split.labels, self.split.kept), logits

    @cached_property
    def _ingredients(self) -> dict[str, Any]:
        """What every result of this seed depends on."""
        return {
            "protocol": dict(self.workload.protocol),
            "seed": self.seed,
            "models": {role: self.models.key(role) for role in ROLES},
            "backend": ops.backend(self.workload.device),
            **machine(self.workload.device),
        }

    # --- One method ------------------------------------------------------------------------------------------

    def run(self, runner: Runner) -> tuple[dict[str, Any], bool]:
        """The runner's record, and whether it was there already."""
        ingredients = {**self._ingredients, "runner": runner.settings()}
        kept = self.records.read(self.seed, runner.label, ingredients)
        if kept is not None:
            return kept, True
        record = self._measure(runner)
        self.records.write(self.seed, runner.label, ingredients, record)
        return record, False

    def _measure(self, runner: Runner) -> dict[str, Any]:
        workload, seed, split, device = self.workload, self.seed, self.split, self.workload.device
        self.progress(f"seed {seed}: {runner.label}", 0, None)
        model = copy.deepcopy(self.models["original"].model)

        def batches(samples: Samples, offset: int):
            return samples.to(device).batches(workload.batch_size, seed + offset)

        forget, retain = batches(split.forget, _FORGET), batches(split.retain, _RETAIN)
        held_out = batches(split.held_out, _HELD_OUT) if len(split.held_out) else None
        workload.warm_up()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                with stopwatch(device) as seconds:
                    summary = runner(model, forget, retain, held_out, seed)
            except (InputError, NonFiniteError) as error:  # settings may not suit a seed: that is a result, too
                return {"failed": str(error), "metrics": {}}
        if not all(torch.isfinite(tensor).all() for tensor in model.state_dict().values()):
            return {"failed": "weights are inf or NaN after the run", "metrics": {}}
        logits = self._logits(model)
        if not all(torch.isfinite(part).all() for part in (logits.forget, logits.retain, logits.test)):
            return {"failed": "predictions are inf or NaN after the run", "metrics": {}}
        metrics = self._judge(logits) | seconds.metrics(self.models["retrained"].seconds)
        return {"metrics": metrics, "summary": summary}

    # --- Judging ---------------------------------------------------------------------------------------------

    def _judge(self, logits: Parts) -> dict[str, float]:
        reference, retrained = self._retrained
        metrics = knowledge(logits, self.split.labels, self.split.kept)
        return metrics | distance(metrics, logits.forget, reference, retrained.forget)

    def _logits(self, model: nn.Module) -> Parts:
        parts = (self.split.forget, self.split.retain, self.split.test)
        return Parts(*(predict(model, [(part.images, part.labels)])[0] for part in parts))
