"""The diffusion presets on small float64 models against plain transcriptions of the released loops."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import denoisers
from helpers.diffusion_oracle import Diffusion, Draws, sfron
from torch import Tensor, nn

from unlearn_ext import Result, Unlearner
from unlearn_ext.methods import DOMAINS, SFRon
from unlearn_ext.models.weights import tie_embeddings
from unlearn_ext.tasks import ClassConditionalDiffusion, Task, TextConditionalDiffusion

ITERATIONS = 20
SEED = 7


def run(model: nn.Module, task: Task, preset: str, forget: list, retain: list) -> tuple[list[Tensor], Result]:
    path: list[Tensor] = []

    def record(model: nn.Module, iteration: int) -> None:
        path.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))

    method = SFRon.preset(preset, iterations=ITERATIONS)
    return path, Unlearner(model, task, method).run(forget, retain, evaluate=record, evaluate_every=1)


def compare(expected: list[Tensor], mask: dict[str, Tensor], path: list[Tensor], result: Result) -> None:
    assert len(path) == ITERATIONS
    assert max((a - b).abs().max().item() for a, b in zip(expected, path, strict=True)) <= 1e-9
    unpacked = result.mask.unpack()
    assert unpacked.keys() == mask.keys() and all(torch.equal(unpacked[name], mask[name]) for name in mask)
    assert 0.05 < result.mask.density < 0.95
    assert (expected[0] - expected[-1]).abs().max() > 1e-5, "the weights must have moved for this to mean anything"


def test_ddpm() -> None:
    """Squared errors summed, antithetic timesteps; Fisher with guidance and clipping; mask, adaptive weights, clip."""
    scheduler = denoisers.scheduler()
    forget = [(denoisers.images(n, seed=n), torch.full((n,), 2)) for n in (6, 5)]
    retain = [(denoisers.images(6, seed=10 + i), denoisers.labels(6, seed=i) % 2) for i in range(3)]
    model = denoisers.unet().double()
    own = copy.deepcopy(model)

    diffusion, null = Diffusion(scheduler.betas), denoisers.CLASSES
    draws = Draws(SEED, diffusion.steps)

    def draw(batch):
        x, labels = batch
        t = draws.antithetic(len(x))
        noise = draws.normal(x)
        dropped = draws.dropped(len(x), 0.1)
        told = torch.tensor([null if drop else label for drop, label in zip(dropped, labels.tolist(), strict=True)])
        return diffusion.noisy(x, noise, t), t, noise, labels, told

    def losses(batch):
        noisy, t, noise, _, told = draw(batch)
        return ((noise - model(noisy, t, told).sample) ** 2).sum((1, 2, 3))

    def fisher(batch):
        noisy, t, noise, labels, _ = draw(batch)
        with_it, without = model(noisy, t, labels).sample, model(noisy, t, torch.full_like(labels, null)).sample
        return ((noise - ((1 + 2.0) * with_it - 2.0 * without)) ** 2).sum((1, 2, 3))

    expected, mask = sfron(
        model,
        forget,
        retain,
        losses,
        fisher=fisher,
        fisher_max_norm=1.0,
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, foreach=False),
        iterations=ITERATIONS,
        alpha=lambda t: 10 * (1 + math.cos(math.pi * t / ITERATIONS)) / 2,
        adaptive=(0.5, 1e-8),
        max_norm=1.0,
        retain_max_norm=1.0,
    )
    task = ClassConditionalDiffusion(scheduler, seed=SEED, **DOMAINS["ddpm-cifar10"]["task"])
    compare(expected, mask, *run(own, task, "ddpm-cifar10", forget, retain))


def test_dit() -> None:
    """MSE and variational bound of a learned variance, plain ascent, clip on the forget step; embedders shared.

    The transcription keeps diffusers' copies and adds their gradients; the run shares the weights.
    """
    scheduler = denoisers.scheduler()

    def batch(seed: int, label: int | None = None) -> dict[str, Tensor]:
        labels = denoisers.labels(3, seed=seed) % 2 if label is None else torch.full((3,), label)
        mean = denoisers.normal(3, 2, 4, 4, seed=seed)
        mean[0, 0, 0] = torch.tensor([5.0, -5.0, 1.2, -1.2])  # far and near outside of the discretized range
        return {"latent_mean": mean, "latent_std": 0.3 + mean.abs() / 5, "labels": labels}

    forget, retain = [batch(i, 3) for i in range(3)], [batch(10 + i) for i in range(4)]
    model = denoisers.dit().double()
    own = copy.deepcopy(model)

    diffusion = Diffusion(scheduler.betas)
    draws = Draws(SEED, diffusion.steps)
    seen: set[int] = set()
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0

    def losses(batch, dropout=0.1):
        x = 0.18215 * (batch["latent_mean"] + batch["latent_std"] * draws.normal(batch["latent_mean"]))
        t = draws.timesteps(len(x))
        noise = draws.normal(x)
        labels = batch["labels"].clone()
        dropped = draws.dropped(len(x), 0.1)
        if dropout:
            labels[dropped] = denoisers.CLASSES
        noisy = diffusion.noisy(x, noise, t)
        output = model(noisy, t, labels).sample
        result = []
        for i, k in enumerate(t.tolist()):
            epsilon, values = output[i, :2], output[i, 2:]
            bits = diffusion.bound(x[i], noisy[i], epsilon, values, k)
            result.append(((noise[i] - epsilon) ** 2).mean() + bits.mean())
        seen.update(t.tolist())
        return torch.stack(result)

    embedders = [list(block.norm1.emb.parameters()) for block in model.transformer_blocks]
    expected, mask = sfron(
        model,
        forget,
        retain,
        losses,
        fisher=lambda batch: losses(batch, dropout=0.0),  # in eval mode, where the released model drops none
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.0, foreach=False),
        iterations=ITERATIONS,
        alpha=lambda t: 1e-3,
        max_norm=1.0,
        shared=zip(*embedders, strict=True),
    )
    assert seen == set(range(10)), "every step, the first too"
    assert tie_embeddings(own) == sum(p.numel() for p in embedders[0])
    settings = DOMAINS["dit-xl-2-256"]["task"]
    task = ClassConditionalDiffusion(scheduler, scaling_factor=0.18215, seed=SEED, **settings)
    compare(expected, mask, *run(own, task, "dit-xl-2-256", forget, retain))


@pytest.mark.slow
def test_stable_diffusion() -> None:
    """A pseudo-target at the same t and noise; retain with prompts; Fisher with guidance on the forget images."""
    scheduler = denoisers.scheduler()
    null = denoisers.normal(3, 8, seed=99)

    def batch(seed: int, replaced: bool) -> dict[str, Tensor]:
        values = {
            "latent_mean": denoisers.normal(3, 2, 8, 8, seed=seed),
            "latent_std": denoisers.normal(3, 2, 8, 8, seed=seed + 1).abs(),
            "prompt_embeds": denoisers.normal(3, 3, 8, seed=seed + 2),
        }
        if replaced:
            values["replace_latent_mean"] = denoisers.normal(3, 2, 8, 8, seed=seed + 3)
            values["replace_latent_std"] = denoisers.normal(3, 2, 8, 8, seed=seed + 4).abs()
            values["replace_prompt_embeds"] = denoisers.normal(3, 3, 8, seed=seed + 5)
        return values

    forget, retain = [batch(10 * i, True) for i in range(2)], [batch(100 + 10 * i, False) for i in range(3)]
    model = denoisers.text_unet().double()
    own = copy.deepcopy(model)

    diffusion = Diffusion(scheduler.betas)
    draws = Draws(SEED, diffusion.steps)

    def latents(batch, prefix=""):
        mean, std = batch[prefix + "latent_mean"], batch[prefix + "latent_std"]
        return (mean + std * draws.normal(mean)) * 0.5

    def draw(batch):
        x = latents(batch)
        instead = latents(batch, "replace_") if "replace_latent_mean" in batch else None
        t = draws.timesteps(len(x))
        return x, instead, t, draws.normal(x)

    def losses(batch):
        x, _, t, noise = draw(batch)
        return ((noise - model(diffusion.noisy(x, noise, t), t, batch["prompt_embeds"]).sample) ** 2).mean((1, 2, 3))

    def fisher(batch):
        x, _, t, noise = draw(batch)
        noisy = diffusion.noisy(x, noise, t)
        with_it, without = model(noisy, t, batch["prompt_embeds"]).sample, model(noisy, t, null.expand(3, 3, 8)).sample
        return ((noise - ((1 + 7.5) * with_it - 7.5 * without)) ** 2).mean((1, 2, 3))

    def replace(batch):
        x, instead, t, noise = draw(batch)
        target = model(diffusion.noisy(instead, noise, t), t, batch["replace_prompt_embeds"]).sample.detach()
        prediction = model(diffusion.noisy(x, noise, t), t, batch["prompt_embeds"]).sample
        return ((prediction - target) ** 2).mean((1, 2, 3))

    expected, mask = sfron(
        model,
        forget,
        retain,
        losses,
        fisher=fisher,
        replace=replace,
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-5, foreach=False),
        iterations=ITERATIONS,
        alpha=lambda t: 1.0,
    )
    settings = DOMAINS["sd-nudity"]["task"]
    task = TextConditionalDiffusion(scheduler, null_embeds=null, scaling_factor=0.5, seed=SEED, **settings)
    compare(expected, mask, *run(own, task, "sd-nudity", forget, retain))
