"""The main job on a classifier: train, retrain without the forget set, unlearn, compare."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Digits, DigitSplit, load_digits
from ..data.digits import CLASSES
from ..data.shuffled import ShuffledBatches
from ..errors import InputError
from ..evaluation import Parts, distance, knowledge, predict
from ..methods import SFRon
from ..run import checkpoint
from ..run.result import Progress, Result
from ..run.unlearner import Unlearner
from ..tasks import Classification
from ..utils.files import atomic_path, writable_directory
from .network import SmallResNet
from .settings import BATCH_SIZE, method_for
from .training import train_classifier

__all__ = ["ClassifierDemo", "DemoOptions"]

_TEST_SIZE = 1000
_LARGEST = 5000 - _TEST_SIZE  # training set


@dataclass(frozen=True)
class DemoOptions:
    """What the command line offers; ``unlearn-ext demo --help`` explains each."""

    scenario: str = "class"
    forget_class: int = 3
    forget_fraction: float = 0.1
    train_size: int = 4000
    update: str = "sequential"
    seed: int = 0
    device: str = "cpu"
    mixed_precision: str = "no"
    allow_duplicates: bool = False

    def __post_init__(self) -> None:
        if self.scenario not in ("class", "random"):
            raise InputError(f"--scenario: expected class or random, got {self.scenario!r}")
        if self.scenario == "class" and not 0 <= self.forget_class <= 9:
            raise InputError(f"--forget-class: expected a digit from 0 to 9, got {self.forget_class}")
        if not 0.0 < self.forget_fraction < 1.0:
            raise InputError(
                f"--forget-fraction: expected a fraction between 0 and 1, got {self.forget_fraction}: something must "
                "be forgotten and something kept"
            )
        if self.train_size < CLASSES:
            raise InputError(
                f"--train-size: expected at least {CLASSES}, one digit of each class, got {self.train_size}"
            )
        if self.train_size > _LARGEST:
            raise InputError(
                f"--train-size: expected at most {_LARGEST}, which leaves {_TEST_SIZE} of the digits for the test, got "
                f"{self.train_size}"
            )
        if self.scenario == "random" and not 0 < self.forget_size < self.train_size:
            raise InputError(
                f"--forget-fraction {self.forget_fraction} of {self.train_size} samples is {self.forget_size}: "
                "something must be forgotten and something kept"
            )
        if self.mixed_precision == "fp16" and torch.device(self.device).type == "cpu":
            raise InputError("--mixed-precision: fp16 needs a GPU; use no or bf16 on the CPU")

    @property
    def forget_size(self) -> int:
        """Samples to forget in the scenario random."""
        return round(self.forget_fraction * self.train_size)


class ClassifierDemo:
    """One run of the demo. ``report()`` gives what ``--json`` writes."""

    def __init__(self, options: DemoOptions, progress: Progress | None = None):
        self.options = options
        self.progress = progress or (lambda stage, done, total: None)
        self.digits: Digits = load_digits()
        self.split: DigitSplit = self.digits.split(options.train_size, _TEST_SIZE, seed=options.seed)
        self.forget = self._choose_forget_set()
        self.models: dict[str, nn.Module] = {}
        self.seconds: dict[str, float] = {}
        self.result: Result | None = None
        self.method: SFRon = method_for(options.scenario, options.update)

    def _choose_forget_set(self) -> Tensor:
        """Bool over the training set."""
        labels, options = self.split.train_labels, self.options
        if options.scenario == "class":
            return labels == options.forget_class
        chosen = torch.zeros(len(labels), dtype=torch.bool)
        generator = torch.Generator().manual_seed(options.seed)
        chosen[torch.randperm(len(labels), generator=generator)[: options.forget_size]] = True
        return chosen

    # --- The three models -----------------------------------------------------------------------------------

    def adopt(self, other: ClassifierDemo, *names: str) -> None:
        """Takes trained models over from another run instead of training them again."""
        for name in names:
            self.models[name], self.seconds[name] = other.models[name], other.seconds[name]

    def run(self) -> ClassifierDemo:
        options, images, labels = self.options, self.split.train_images, self.split.train_labels
        self._train("original", images, labels, options.seed)
        # The gold standard never sees the forget set; its own seed keeps it from being the original by luck.
        self._train("retrained", images[~self.forget], labels[~self.forget], options.seed + 1000)
        self._unlearn()
        return self

    def _train(self, name: str, images: Tensor, labels: Tensor, seed: int) -> None:
        if name in self.models:
            return
        started = time.perf_counter()
        epochs = max(6, min(24, 24_000 // self.options.train_size))
        self.models[name] = train_classifier(
            SmallResNet(seed=seed),
            images,
            labels,
            epochs=epochs,
            seed=seed,
            mixed_precision=self.options.mixed_precision,
            device=self.options.device,
            progress=lambda done, total: self.progress(f"training the {name} model", done, total),
        )
        self.seconds[name] = time.perf_counter() - started

    def _unlearn(self) -> None:
        options, split = self.options, self.split
        started = time.perf_counter()
        model = copy.deepcopy(self.models["original"])
        sets = {
            name: ShuffledBatches(
                split.train_images[chosen], split.train_labels[chosen], BATCH_SIZE, options.seed + offset
            )
            for name, chosen, offset in (("forget", self.forget, 17), ("retain", ~self.forget, 29))
        }
        unlearner = Unlearner(
            model,
            Classification(),
            self.method,
            device=options.device,
            mixed_precision=options.mixed_precision,
        )
        self.result = unlearner.run(**sets, allow_duplicates=options.allow_duplicates, progress=self.progress)
        self.models["unlearned"] = model.eval()
        self.seconds["unlearned"] = time.perf_counter() - started

    # --- What became of them --------------------------------------------------------------------------------

    def metrics(self) -> dict[str, dict[str, float]]:
        """Fractions by model: FA, UA, RA, TA, TA_retained, MIA_entropy, KL, JS, gap; and seconds.

        In the class scenario the MIA's test set and the gap use the retained classes only: a retrained model gives
        the forgotten class no chance, so its test samples say nothing about membership.
        """
        split, device = self.split, self.options.device
        kept = torch.ones_like(split.test_labels, dtype=torch.bool)
        if self.options.scenario == "class":
            kept = split.test_labels != self.options.forget_class
        labels = Parts(split.train_labels[self.forget], split.train_labels[~self.forget], split.test_labels)
        metrics, logits = {}, {}
        for name, model in self.models.items():
            train, _ = predict(model, [(split.train_images, split.train_labels)], device=device)
            test, _ = predict(model, [(split.test_images, split.test_labels)], device=device)
            logits[name] = Parts(train[self.forget], train[~self.forget], test)
            metrics[name] = knowledge(logits[name], labels, kept)
        for name, values in metrics.items():
            values.update(distance(values, logits[name].forget, metrics["retrained"], logits["retrained"].forget))
            values["seconds"] = self.seconds[name]
        return metrics

    def report(self) -> dict[str, Any]:
        options, result, mask = self.options, self.result, self.result.mask
        return {
            "models": self.metrics(),
            "scenario": options.scenario,
            "forget_class": options.forget_class if options.scenario == "class" else None,
            "forget_size": int(self.forget.sum()),
            "train_size": len(self.split.train_labels),
            "test_size": len(self.split.test_labels),
            "seed": options.seed,
            "method": {"name": self.method.name, "batch_size": BATCH_SIZE, **self.method.settings()},
            "update": result.update,
            "mask_density": mask.density if mask else None,
            "protection": result.protection,
            "timings": result.timings,
            "counts": result.counts,
            "warnings": result.warnings,
            "backend": result.backend,
            "device": options.device,
            "mixed_precision": options.mixed_precision,
            "threads": torch.get_num_threads(),
            "data_sha256": self.digits.sha256,
        }

    def save(self, directory: str | Path) -> None:
        """Writes ``unlearned.safetensors`` and ``mask.safetensors``."""
        from safetensors.torch import save_file

        directory = writable_directory(directory)
        tensors = {name: t.contiguous().cpu() for name, t in checkpoint.model_tensors(self.models["unlearned"]).items()}
        with atomic_path(directory / "unlearned.safetensors") as partial:
            save_file(tensors, partial)
        if self.result.mask is not None:
            self.result.mask.save(directory / "mask.safetensors")
