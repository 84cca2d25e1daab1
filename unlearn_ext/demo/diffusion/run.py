"""The main job on diffusion: a digit forgotten in 50 iterations, sampled before and after from the same noise."""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.digits import CLASSES, Digits, load_digits
from ...data.shuffled import ShuffledBatches
from ...errors import InputError
from ...methods import SFRon
from ...models.grid import write_grid
from ...models.sampling import draw_noise
from ...models.weights import tie_embeddings, untie_embeddings
from ...run.result import Progress, Result
from ...run.unlearner import Unlearner
from ...tasks import ClassConditionalDiffusion, Task, TextConditionalDiffusion
from ...utils.clock import timed
from ...utils.files import writable_directory
from .judging import GUIDANCE, STEPS, judge_samples, sample
from .networks import CAPTIONS, DENOISERS, NULL_LABEL, SIZE, Denoiser, noise_scheduler
from .pretraining import TEST_SIZE, TRAIN_SIZE, Trained
from .settings import BATCH_SIZE, method_for
from .weights import load, load_samples

__all__ = ["DiffusionDemo", "DiffusionOptions"]

FEATURES = 64  # of the judge


@dataclass(frozen=True)
class DiffusionOptions:
    """What the command line offers; ``unlearn-ext demo --help`` explains each."""

    task: str = "ddpm"
    forget_class: int = 3
    samples: int = 50
    seed: int = 0
    retrain: bool = False
    device: str = "cpu"
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        if self.task not in DENOISERS:
            raise InputError(f"expected a task of {', '.join(DENOISERS)}, got {self.task!r}")
        if not 0 <= self.forget_class < CLASSES:
            raise InputError(f"--forget-class: expected a digit from 0 to 9, got {self.forget_class}")
        least = FEATURES // (CLASSES - 1) + 1
        if self.samples < least:
            raise InputError(
                f"--samples: expected at least {least} of each digit, for the Fréchet distance in {FEATURES} "
                f"features, got {self.samples}"
            )
        if self.mixed_precision == "fp16" and torch.device(self.device).type == "cpu":
            raise InputError("--mixed-precision: fp16 needs a GPU; use no or bf16 on the CPU")


class _WithStandIns:
    """Forget batches of which half the samples are of the digit that shall be shown instead, under the forgotten label.

    Between noise and that digit the sampler meets what no noisy picture of the forgotten digit looks like; there, too,
    the label must have come to mean the other.
    """

    def __init__(self, forgotten: ShuffledBatches, shown: ShuffledBatches):
        self.forgotten, self.shown = forgotten, shown
        self.generator = shown.generator = forgotten.generator  # one for both: a run finds one in each set

    def __len__(self) -> int:
        return min(len(self.forgotten), len(self.shown))

    def __iter__(self):
        for (images, labels), (stand_ins, _) in zip(self.forgotten, self.shown, strict=False):
            yield torch.cat([images, stand_ins]), labels[:1].expand(len(images) + len(stand_ins))


class _Captioned:
    """Batches with captions in place of labels; with the caption of ``replacement``, if there is to be one."""

    def __init__(self, batches: ShuffledBatches | _WithStandIns, replacement: int | None):
        self.batches, self.generator, self.replacement = batches, batches.generator, replacement

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        for images, labels in self.batches:
            batch = {"pixel_values": images, "prompts": [CAPTIONS[label] for label in labels]}
            if self.replacement is not None:
                batch["replace_prompts"] = [CAPTIONS[self.replacement]] * len(labels)
            yield batch


class DiffusionDemo:
    """One run of the demo. ``report()`` gives what ``--json`` writes.

    Args:
        pretrained: a network to start from, instead of the one that comes with the package.
        judge: the classifier, likewise.
        method: settings other than the demo's own.
    """

    def __init__(
        self,
        options: DiffusionOptions,
        progress: Progress | None = None,
        *,
        pretrained: Trained | None = None,
        judge: Trained | None = None,
        method: SFRon | None = None,
    ):
        self.options = options
        self.progress = progress or (lambda stage, done, total: None)
        self.digits: Digits = load_digits()
        self.seconds: dict[str, float] = {}
        self.samples: dict[str, Tensor] = {}  # before, after, retrained: [10 · samples, 1, 16, 16], digit by digit
        self.with_old_row: Tensor | None = None  # samples of the forgotten label
        self.pretrained, self.judge = pretrained, judge
        self.result: Result | None = None
        self.method = method or method_for(options.task)
        self.labels = torch.arange(CLASSES).repeat_interleave(options.samples)

    @property
    def replacement(self) -> int | None:
        """What a method that replaces shows in place of the forgotten digit: the next one, as SalUn does (arXiv
        2310.12508), or the one before where captions are told: "three" becomes "two"."""
        if not self.method.replaces:
            return None
        return (self.options.forget_class + (-1 if self.options.task == "text" else 1)) % CLASSES

    def run(self) -> DiffusionDemo:
        options = self.options
        with timed(self.seconds, "loading"):
            self.pretrained = self.pretrained or load(options.task, progress=self.progress)
            self.judge = self.judge or load("judge", progress=self.progress)
            self.network = copy.deepcopy(self.pretrained.network)
            for module in self.network.modules.values():
                module.to(options.device)
        noise = draw_noise(len(self.labels), (1, SIZE, SIZE), options.seed)
        if "before" not in self.samples:
            self._sample("before", noise)
        self._unlearn()
        self._sample("after", noise)
        if options.task != "text":
            self._sample_with_the_old_row(noise)
        if options.retrain:
            self._retrain(noise)
        return self

    def adopt(self, other: DiffusionDemo) -> None:
        """Takes over the starting network and its samples from another run of the same task, seed and number."""
        self.pretrained, self.judge = other.pretrained, other.judge
        self.samples["before"] = other.samples["before"]
        self.seconds["sampling_before"] = other.seconds["sampling_before"]

    # --- Stages ---------------------------------------------------------------------------------------------

    def _retrain(self, noise: Tensor) -> None:
        """What forgetting is measured against: a network that never saw the digit, by the same recipe and seed."""
        seed = self.pretrained.metadata.get("seed", 0)
        with timed(self.seconds, "retraining"):
            retrained = load(self.options.task, seed=seed, without=self.options.forget_class, progress=self.progress)
        for module in retrained.network.modules.values():
            module.to(self.options.device)
        self._sample("retrained", noise, retrained.network)

    def _sample(self, when: str, noise: Tensor, network: Denoiser | None = None) -> None:
        with timed(self.seconds, f"sampling_{when}"):
            self.samples[when] = sample(
                network or self.network,
                self.labels,
                noise,
                mixed_precision=self.options.mixed_precision,
                progress=lambda done, total: self.progress(f"sampling {when}", done, total),
            )

    def _sample_with_the_old_row(self, noise: Tensor) -> None:
        """The forgotten label once more, its row of the embedding table put back: was anything else forgotten?"""
        network, forgotten = copy.deepcopy(self.network), self.options.forget_class
        before = self.pretrained.network.model.state_dict()
        tables = {
            name: p
            for name, p in network.model.named_parameters()
            if "class_embed" in name and len(p) == NULL_LABEL + 1  # diffusers' names: class_embedding, class_embedder
        }
        if not tables:
            raise InputError("the network has no table of label embeddings: its old row cannot be put back")
        with torch.no_grad():
            for name, p in tables.items():
                p[forgotten] = before[name][forgotten].to(p)
        asked = self.labels == forgotten
        with timed(self.seconds, "sampling_with_the_old_row"):
            self.with_old_row = sample(
                network,
                self.labels[asked],
                noise[asked],
                mixed_precision=self.options.mixed_precision,
                progress=lambda done, total: self.progress("sampling with the label's old row", done, total),
            )

    def _unlearn(self) -> None:
        options, network = self.options, self.network
        split = self.digits.split(TRAIN_SIZE, TEST_SIZE)  # the one of the training: its seed is not the run's
        images, labels = self.digits.pixels(SIZE)[split.train_indices], split.train_labels
        forgotten, replacement, seed = labels == options.forget_class, self.replacement, options.seed

        def batches(chosen: Tensor, size: int, offset: int) -> ShuffledBatches:
            return ShuffledBatches(images[chosen], labels[chosen], size, seed + offset)

        forget: Any = batches(forgotten, BATCH_SIZE, 17)
        if replacement is not None:
            half = BATCH_SIZE // 2
            forget = _WithStandIns(batches(forgotten, half, 17), batches(labels == replacement, half, 17))
        retain: Any = batches(~forgotten, BATCH_SIZE, 29)
        if network.name == "text":
            forget, retain = _Captioned(forget, replacement), _Captioned(retain, None)
        if network.name == "dit":
            tie_embeddings(network.model)
        task = self._task()
        if network.text_encoder is not None:
            network.text_encoder.requires_grad_(False)
        self.result = Unlearner(
            network.model, task, self.method, device=options.device, mixed_precision=options.mixed_precision
        ).run(
            forget,
            retain,
            allow_duplicates=replacement is not None,  # stand-ins are kept under their own label
            progress=self.progress,
        )
        if network.name == "dit":
            untie_embeddings(network.model)
        self.seconds.update(
            fisher=self.result.timings.get("fisher", 0.0),
            mask=self.result.timings.get("mask", 0.0),
            unlearning=self.result.timings["unlearning"],
        )

    def _task(self) -> Task:
        network, seed = self.network, self.options.seed
        if network.name == "text":
            return TextConditionalDiffusion(noise_scheduler(), network.text_encoder, network.tokenizer, seed=seed)
        return ClassConditionalDiffusion(
            noise_scheduler(), null_label=NULL_LABEL, replace_label=self.replacement, seed=seed
        )

    # --- What became of it ----------------------------------------------------------------------------------

    def measures(self) -> dict[str, Any]:
        """Scores of every digit, Fréchet distance of the retained ones, and how much the forgotten label's samples
        differ among themselves; before and after, and of a retrained network if there is one."""
        forgotten = self.options.forget_class
        judge, labels = self.judge.network, self.labels[self.labels == forgotten]
        judged = {
            when: judge_samples(judge, self.samples[when], self.labels, without=forgotten) for when in self.samples
        }
        scores: dict[str, Any] = {
            "digits": {str(d): {when: report["digits"][d] for when, report in judged.items()} for d in range(CLASSES)},
            "frechet": {when: report["frechet"] for when, report in judged.items()},
            "diversity": {when: report["digits"][forgotten]["distance"] for when, report in judged.items()},
            "forgotten": {when: report["digits"][forgotten]["accuracy"] for when, report in judged.items()},
        }
        if self.with_old_row is not None:
            restored = judge_samples(judge, self.with_old_row, labels)
            scores["forgotten"]["row_put_back"] = restored["digits"][forgotten]["accuracy"]
        others = [d for d in range(CLASSES) if d != forgotten]
        scores["retained"] = {
            when: statistics.mean(report["digits"][d]["accuracy"] for d in others) for when, report in judged.items()
        }
        if self.replacement is not None:  # how often the forgotten label shows it
            scores["replaced"] = {
                when: float((report["found"][self.labels == forgotten] == self.replacement).double().mean())
                for when, report in judged.items()
            }
        return scores

    def settings(self) -> dict[str, Any]:
        method = {"name": self.method.name, "batch_size": BATCH_SIZE, **self.method.settings()}
        return {**method, "replacement": self.replacement, "steps": STEPS, "guidance": GUIDANCE[self.options.task]}

    def report(self) -> dict[str, Any]:
        options, result, mask = self.options, self.result, self.result.mask
        return {
            **self.measures(),
            "task": options.task,
            "forget_class": options.forget_class,
            "replacement": self.replacement,
            "seed": options.seed,
            "seconds": self.seconds,
            "protocol": {
                "sampler": "DDIM, eta 0, trailing timesteps",
                "steps": STEPS,
                "guidance": GUIDANCE[options.task],
                "samples_per_digit": options.samples,
                "size": SIZE,
                "classifier": "trained on the 4,000 training digits",
                "classifier_held_out_accuracy": self.judge.metadata["held_out_accuracy"],
                "features": f"{FEATURES}, the classifier's last layer",
                "frechet": "retained digits of the held-out 1,000 against samples of the retained labels",
                "diversity": "mean pairwise Euclidean distance of samples of the forgotten label",
            },
            "method": self.settings(),
            "mask_density": mask.density if mask else None,
            "history": result.history,
            "counts": result.counts,
            "warnings": result.warnings,
            "backend": result.backend,
            "device": options.device,
            "mixed_precision": options.mixed_precision,
            "threads": torch.get_num_threads(),
            "pretrained": self.pretrained.metadata,
            "data_sha256": self.digits.sha256,
        }

    def write_grid(self, path: Path, columns: int = 3) -> None:
        """Before and after, ``columns`` of each digit from the same noise; and, for the digit of which there are any,
        pictures of a network that was trained without it."""
        chosen = torch.cat([d * self.options.samples + torch.arange(columns) for d in range(CLASSES)])
        rows = {when: self.samples[when][chosen] for when in ("before", "after")}
        shipped = load_samples(self.options.task, self.options.forget_class)
        if "retrained" in self.samples:
            rows["retrained"] = self.samples["retrained"][chosen]
        elif shipped is not None:
            images, labels, _ = shipped
            rows["retrained"] = torch.cat([images[labels == d][:columns] for d in range(CLASSES)])
        write_grid(path, rows, [str(d) for d in range(CLASSES) for _ in range(columns)])

    def save(self, directory: str | Path) -> None:
        """Writes ``before-after.png``, the denoiser as diffusers' folder, and the mask."""
        directory = writable_directory(directory)
        self.write_grid(directory / "before-after.png")
        for name, module in self.network.modules.items():
            module.save_pretrained(directory / name)
        noise_scheduler().save_pretrained(directory / "scheduler")
        if self.network.tokenizer is not None:
            self.network.tokenizer.save_pretrained(directory / "tokenizer")
        if self.result.mask is not None:
            self.result.mask.save(directory / "mask.safetensors")
