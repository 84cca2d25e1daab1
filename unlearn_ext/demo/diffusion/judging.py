"""What a denoiser's pictures are worth: ``python -m unlearn_ext.demo.diffusion.judging ddpm`` prints it."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data import load_digits
from ...data.digits import CLASSES
from ...distributed.modes import PRECISIONS
from ...evaluation.generated import class_scores, frechet_distance, pairwise_distance
from ...models.grid import write_grid
from ...models.sampling import draw_noise, sample_classes, sample_prompts
from .networks import CAPTIONS, DENOISERS, NULL_LABEL, SIZE, Denoiser, Judge, sampling_scheduler
from .pretraining import TEST_SIZE, TRAIN_SIZE

__all__ = ["GUIDANCE", "STEPS", "judge_samples", "sample"]

STEPS = 25
GUIDANCE = {"ddpm": 2.0, "dit": 3.0, "text": 2.0}


def sample(
    denoiser: Denoiser,
    labels: Tensor,
    noise: Tensor | None = None,
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 100,
    mixed_precision: str = "no",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Pictures ``[N, 1, 16, 16]`` in [−1, 1], by DDIM with guidance (:mod:`unlearn_ext.models.sampling`).

    Args:
        labels: ``[N]``; of the text-conditional network, their captions.
        noise: ``[N, 1, 16, 16]``; drawn from ``seed`` unless given.
        steps, guidance: ``STEPS`` and ``GUIDANCE`` unless given.
    """
    noise = draw_noise(len(labels), (1, SIZE, SIZE), seed) if noise is None else noise
    dtype = PRECISIONS[mixed_precision]
    settings = {"steps": steps or STEPS, "guidance": GUIDANCE[denoiser.name] if guidance is None else guidance}
    settings.update(batch_size=batch_size, progress=progress)
    denoiser.eval()
    device = next(denoiser.parameters()).device.type
    with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        if denoiser.name == "text":
            states = denoiser.embed(list(CAPTIONS))
            pictures = sample_prompts(
                denoiser.model, sampling_scheduler(), states[labels], noise, null_embeds=states[NULL_LABEL], **settings
            )
        else:
            pictures = sample_classes(
                denoiser.model, sampling_scheduler(), labels, noise, null_label=NULL_LABEL, **settings
            )
    return pictures.clamp(-1, 1)


@torch.no_grad()
def judge_samples(judge: Judge, images: Tensor, labels: Tensor, without: int | None = None) -> dict[str, Any]:
    """What the judge makes of pictures.

    Returns:
        ``digits.<d>``: ``accuracy``, mean ``probability`` of the digit asked for, and ``distance``, the mean Euclidean
        distance between two of its pictures; ``frechet``: between the judge's 64 features of the pictures and of the
        1,000 held-out real digits, both without the digit ``without``, if there are more pictures than features;
        ``found``: what it takes each picture for.
    """
    digits = load_digits()
    split = digits.split(TRAIN_SIZE, TEST_SIZE)
    real = digits.pixels(SIZE)[split.test_indices]
    judge.eval()
    features, real_features = (torch.cat([judge.features(p) for p in group.split(250)]) for group in (images, real))
    probabilities = judge.head(features).softmax(1)
    report: dict[str, Any] = {"digits": class_scores(probabilities, labels), "found": probabilities.argmax(1)}
    for digit, scores in report["digits"].items():
        scores["distance"] = pairwise_distance(images[labels == digit])
    none = -1 if without is None else without
    kept = features[labels != none]
    if len(kept) > kept.shape[1]:
        report["frechet"] = frechet_distance(real_features[split.test_labels != none], kept)
    return report


def _main() -> None:
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
        print(f"{digit}  " + "  ".join(f"{name} {found[name]:.3f}" for name in ("accuracy", "probability", "distance")))
    print(f"Fréchet distance {report.get('frechet', math.nan):.3f}; {len(labels)} pictures in {seconds:.0f} s")
    if options.grid:
        write_grid(options.grid, {str(d): images[labels == d][:16] for d in range(CLASSES)})


if __name__ == "__main__":
    _main()
