"""Pictures before and after from the same noise: of what is forgotten, and of some of what is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, first_line
from ..evaluation.generated import class_scores
from ..models.grid import write_grid
from ..models.judge import Judge
from ..models.pretrained import Pretrained
from ..models.sampling import decode, draw_noise, sample_classes, sample_prompts
from ..tasks import Task
from .fid import RetainedFID
from .opening import Opened
from .prompts import Concepts

__all__ = ["Pictures", "make_pictures", "spread"]

JUDGED_SAMPLES = 16  # of each class, unless --samples says otherwise
MOST_RETAINED = 8  # classes that are sampled, shown and judged


def spread(classes: Sequence[int], most: int = MOST_RETAINED) -> list[int]:
    """At most so many of them, evenly over their order."""
    if len(classes) <= most:
        return list(classes)
    return [classes[i * len(classes) // most] for i in range(most)]


@dataclass
class Pictures:
    """What is sampled of a model, and what a classifier says of it.

    Attributes:
        pretrained: its denoiser is sampled as it is at the time.
        names: class -> label text, or prompt.
        forgotten, retained: the classes that are asked for.
        each: pictures of each of them.
        steps, guidance: of DDIM.
        concepts: the prompts, of a model that is told prompts.
        judge: None where nothing is verified.
        fid: None where no distance to real images is measured.
        taken: time, such as ``before`` -> pictures [N, C, H, W] in [-1, 1].
    """

    pretrained: Pretrained
    task: Task
    names: Mapping[int, str]
    forgotten: Sequence[int]
    retained: Sequence[int]
    each: int
    steps: int
    guidance: float | None
    seed: int
    concepts: Concepts | None = None
    judge: Judge | None = None
    fid: RetainedFID | None = None
    taken: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def labels(self) -> Tensor:
        """What each picture is asked to show: int64 [N]."""
        return torch.tensor([*self.forgotten, *self.retained], dtype=torch.int64, device="cpu").repeat_interleave(
            self.each
        )

    @property
    def protocol(self) -> dict[str, Any]:
        """What has to stand beside every number that comes of them."""
        return {
            "sampler": "DDIM, eta 0",
            "steps": self.steps,
            "guidance": self.guidance,
            "samples_per_class": self.each,
            "seed": self.seed,
        }

    def take(self, when: str, progress: Callable[[int, int], None]) -> None:
        samples = self.sample(len(self.labels), self.steps, progress)
        self.taken[when] = samples if self.pretrained.vae is None else decode(self.pretrained.vae, samples)

    def sample(self, count: int, steps: int, progress: Callable[[int, int], None] = lambda done, total: None) -> Tensor:
        """The first ``count``, as the denoiser makes them: latents where there is a VAE."""
        pretrained, labels = self.pretrained, self.labels[:count]
        noise = draw_noise(count, pretrained.latent_shape, seed=self.seed)
        arguments: dict[str, Any] = {"steps": steps, "guidance": self.guidance, "progress": progress}
        if self.concepts is not None:
            encode = self.task.encoder
            states = encode([self.concepts.prompts[i] for i in labels.tolist()])
            arguments["null_embeds"] = encode([""])[0]
            return sample_prompts(pretrained.denoiser, pretrained.scheduler, states, noise, **arguments)
        arguments["null_label"] = pretrained.classes.null_label
        return sample_classes(pretrained.denoiser, pretrained.scheduler, labels, noise, **arguments)

    def write_grid(self, path: Path) -> None:
        """The first picture of each class, by time."""
        firsts = range(0, len(self.labels), self.each)
        columns = [self.names[int(self.labels[i])][:12] for i in firsts]
        write_grid(path, {when: pictures[list(firsts)] for when, pictures in self.taken.items()}, columns)

    def verdict(self) -> dict[str, Any] | str:
        """Accuracy and mean probability of every class by time, forgotten and retained apart."""
        if self.judge is None:
            return "not verified: no classifier was given (--classifier)"
        for when, pictures in self.taken.items():  # as bytes they would pass for black
            broken = int((~pictures.isfinite().flatten(1).all(1)).sum())
            if broken:
                return f"not verified: {broken} of {len(pictures)} pictures {when} hold inf or NaN"
        verdict, columns = {}, self.judge.columns
        for when, pictures in self.taken.items():
            targets = torch.tensor([columns[label] for label in self.labels.tolist()], device="cpu")
            try:
                scores = class_scores(self.judge.probabilities(pictures), targets)
            except (InputError, RuntimeError, ValueError) as error:  # the model is written: its report must not be lost
                return f"not verified: the classifier failed on the pictures {when} ({first_line(error)})"
            verdict[when] = {
                part: {self.names[label]: scores[columns[label]] for label in labels}
                for part, labels in (("forgotten", self.forgotten), ("retained", self.retained))
                if labels
            }
        return verdict

    def distances(self, progress: Callable[[str, int, int], None]) -> dict[str, Any] | None:
        """FID of the retained classes by time, with the protocol beside it; None where it was not asked for."""
        if self.fid is None:
            return None
        retained = torch.isin(self.labels, torch.tensor(list(self.retained), device="cpu"))
        taken = {when: pictures[retained.to(pictures.device)] for when, pictures in self.taken.items()}
        return {**self.fid.measure(taken, self.names, progress), "sampling": self.protocol}


def make_pictures(opened: Opened, task: Task, guidance: float | None) -> Pictures:
    """Those of a run, with what judges them: the forgotten classes that have data, and some of the retained ones."""
    options, names, concepts = opened.options, opened.names, opened.concepts
    with_data = [index for index in names if index in opened.data.counts]
    retained = spread([index for index in with_data if index not in opened.forget_classes])
    judged = options.classifier is not None or options.fid_weights is not None
    each = (options.samples or JUDGED_SAMPLES) if judged else 1
    judge = fid = None
    if options.classifier is not None:
        judge = Judge(options.classifier, names, opened.pretrained.image_shape, options.device)
    if options.fid_weights is not None:
        classes = {index: concepts.of_prompt(index) if concepts else [index] for index in retained}
        fid = RetainedFID(options.fid_weights, opened.data, classes, each, options.seed, options.device)
    return Pictures(
        opened.pretrained,
        task,
        names,
        [index for index in opened.forget_classes if index in with_data],
        retained,
        each=each,
        steps=options.num_inference_steps,
        guidance=guidance,
        seed=options.seed,
        concepts=concepts,
        judge=judge,
        fid=fid,
    )
