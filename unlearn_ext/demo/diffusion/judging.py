"""What a denoiser's pictures are worth: ``python -m unlearn_ext.demo.diffusion.judging ddpm`` prints it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data import load_digits
from ...data.digits import CLASSES
from .networks import DENOISERS, NULL_LABEL, SIZE, Denoiser, Judge, sampling_scheduler
from .pretraining import TEST_SIZE, TRAIN_SIZE, Trained

__all__ = ["GUIDANCE", "STEPS", "comparison_samples", "frechet_distance", "judge_samples", "sample"]

STEPS = 25
GUIDANCE = {"ddpm": 2.0, "dit": 3.0, "text": 2.0}


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    labels: Tensor,
    *,
    seed: int = 0,
    steps: int = STEPS,
    guidance: float | None = None,
    batch_size: int = 128,
    mixed_precision: str = "no",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Pictures ``[N, 1, 16, 16]`` in [−1, 1] by DDIM, from noise that ``seed`` alone decides.

    The prediction is e_u + guidance · (e_c − e_u), e_u that without a label; ``GUIDANCE`` says how much by default.
    """
    guidance = GUIDANCE[denoiser.name] if guidance is None else guidance
    noise = torch.randn(len(labels), 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    scheduler = sampling_scheduler()
    scheduler.set_timesteps(steps)
    denoiser.eval()
    parts = []
    for images, wanted in zip(noise.split(batch_size), labels.split(batch_size), strict=True):
        both = torch.cat([wanted, torch.full_like(wanted, NULL_LABEL)])
        for timestep in scheduler.timesteps:
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
                predicted = denoiser(images.repeat(2, 1, 1, 1), timestep.expand(len(both)), both).float()
            conditional, unconditional = predicted.chunk(2)
            predicted = unconditional + guidance * (conditional - unconditional)
            images = scheduler.step(predicted, timestep, images).prev_sample
        parts.append(images.clamp(-1, 1))
        if progress is not None:
            progress(sum(map(len, parts)), len(labels))
    return torch.cat(parts)


@torch.no_grad()
def judge_samples(judge: Judge, images: Tensor, labels: Tensor, without: int | None = None) -> dict[str, Any]:
    """What the judge makes of pictures.

    Returns:
        ``digits.<d>``: ``accuracy``, mean ``probability`` of the digit asked for, and ``distance``, the mean Euclidean
        distance between two of its pictures; ``frechet``: between the judge's 64 features of the pictures and of the
        1,000 held-out real digits, both without the digit ``without``.
    """
    digits = load_digits()
    split = digits.split(TRAIN_SIZE, TEST_SIZE)
    real = digits.pixels(SIZE)[split.test_indices]
    features = judge.eval().features(images)
    probabilities = judge.head(features).softmax(1)
    report: dict[str, Any] = {"digits": {}}
    for digit in labels.unique().tolist():
        own = labels == digit
        report["digits"][digit] = {
            "accuracy": (probabilities[own].argmax(1) == digit).float().mean().item(),
            "probability": probabilities[own, digit].mean().item(),
            "distance": torch.pdist(images[own].flatten(1)).mean().item(),
        }
    none = -1 if without is None else without
    kept, real_kept = labels != none, split.test_labels != none
    report["frechet"] = frechet_distance(features[kept], judge.features(real[real_kept]))
    return report


def comparison_samples(trained: Trained, per_digit: int = 32, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """What ``weights.save_samples`` takes: pictures of a trained denoiser, as the package ships them of one that never
    saw a digit. That digit's label is asked for as well."""
    labels = torch.arange(CLASSES).repeat(per_digit)
    sampling = {"sampler": "DDIM", "steps": STEPS, "guidance": GUIDANCE[trained.name], "seed": seed}
    return sample(trained.network, labels, seed=seed), labels, {**trained.metadata, "sampling": sampling}


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Between normal distributions of the features' means and covariances (arXiv 1706.08500), in float64."""
    first, second = first.double(), second.double()
    shift = (first.mean(0) - second.mean(0)).square().sum()
    a, b = torch.cov(first.T), torch.cov(second.T)
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    return (shift + a.trace() + b.trace() - 2 * overlap).item()


def picture(images: Tensor, labels: Tensor, columns: int = 16) -> Tensor:
    """A grid of bytes ``[rows · 16, columns · 16]``, a row for each digit."""
    rows = [torch.cat(list(images[labels == digit][:columns, 0]), 1) for digit in labels.unique().tolist()]
    return ((torch.cat(rows) + 1) * 127.5).round().to(torch.uint8)


def _main() -> None:
    from PIL import Image

    from .weights import SHIPPED, load, load_file

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", help=f"{', '.join(DENOISERS)}, or a file of weights")
    parser.add_argument("--samples", type=int, default=200, help="pictures of each digit")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed-precision", default="no", choices=("no", "bf16"))
    parser.add_argument("--judge", type=Path, default=SHIPPED / "judge.safetensors")
    parser.add_argument("--grid", type=Path, help="a PNG file to write")
    options = parser.parse_args()
    trained = load(options.network) if options.network in DENOISERS else load_file(options.network)
    judge = load_file(options.judge).network
    labels = torch.arange(CLASSES).repeat(options.samples)
    started = time.perf_counter()
    images = sample(
        trained.network,
        labels,
        seed=options.seed,
        steps=options.steps,
        guidance=options.guidance,
        mixed_precision=options.mixed_precision,
    )
    seconds = time.perf_counter() - started
    report = judge_samples(judge, images, labels, trained.metadata.get("without"))
    print(json.dumps(trained.metadata))
    for digit, found in report["digits"].items():
        print(f"{digit}  " + "  ".join(f"{name} {value:.3f}" for name, value in found.items()))
    print(f"Fréchet distance {report['frechet']:.3f}; {len(labels)} pictures in {seconds:.0f} s")
    if options.grid:
        grid = picture(images, labels).numpy()
        Image.fromarray(grid).resize((3 * grid.shape[1], 3 * grid.shape[0]), 0).save(options.grid)


if __name__ == "__main__":
    _main()
