"""Measures of pictures, sampling and grids."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from unlearn_ext import InputError
from unlearn_ext.evaluation.generated import class_scores, frechet_distance, pairwise_distance
from unlearn_ext.evaluation.inception import inception_fid
from unlearn_ext.models.grid import write_grid
from unlearn_ext.models.sampling import draw_noise, sample_classes, sample_prompts

diffusers = pytest.importorskip("diffusers")


# --- Measures ---------------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.5, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5]])
    scores = class_scores(probabilities, torch.tensor([0, 0, 1, 1]))
    assert scores == {
        0: {"accuracy": 0.5, "probability": pytest.approx(0.55), "count": 2},
        1: {"accuracy": 0.5, "probability": pytest.approx(0.45), "count": 2},
    }


def test_frechet_distance_of_gaussians_that_are_known() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(500, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    white = [(x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T for x in (a, b)]
    scales, shift = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), torch.tensor([1.0, 0.0, -2.0])
    # Diagonal covariances: |shift|^2 + sum (1 - s)^2.
    expected = 5.0 + float(((1 - scales) ** 2).sum())
    assert frechet_distance(white[0], white[1] * scales + shift) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)


def test_pairwise_distance_by_hand() -> None:
    samples = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 4.0]])
    assert pairwise_distance(samples[:, None]) == pytest.approx((5 + 4 + 3) / 3)


def test_measures_refuse_what_they_cannot_judge(tmp_path) -> None:
    features = torch.randn(10, 3)
    with pytest.raises(InputError, match="expected more samples than their 3 features, got 3"):
        frechet_distance(features, features[:3])
    with pytest.raises(InputError, match="not all features are finite"):
        frechet_distance(features, features * torch.nan)
    with pytest.raises(InputError, match=r"expected features of shape \[N, 3\]"):
        frechet_distance(features, torch.randn(10, 4))
    with pytest.raises(InputError, match="at least 2"):
        pairwise_distance(features[:1])
    with pytest.raises(InputError, match="not all are finite"):
        class_scores(torch.full((2, 3), torch.nan), torch.tensor([0, 1]))
    with pytest.raises(InputError, match=r"values in \[0, 3\), got values from 0 to 3"):
        class_scores(torch.rand(2, 3), torch.tensor([0, 3]))
    with pytest.raises(InputError, match=r"there are none at .*: put torch-fidelity's"):
        inception_fid(torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 8, 8), tmp_path / "inception.pth")


# --- Sampling ---------------------------------------------------------------------------------------------------


class _Echo(nn.Module):
    """Predicts a multiple of x_t that depends on the condition, and has a learned variance to be ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.1, 0.4, 0.2]))
        self.seen: list[int] = []

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None, encoder_hidden_states=None):
        assert not self.training and timestep.shape == (len(x),)
        factor = self.weight[class_labels] if class_labels is not None else encoder_hidden_states[:, 0, 0]
        self.seen.append(len(x))
        from types import SimpleNamespace

        return SimpleNamespace(sample=torch.cat([factor.view(-1, 1, 1, 1) * x, torch.full_like(x, 9.0)], dim=1))


def _by_hand(scheduler, factor: Tensor, noise: Tensor, steps: int) -> Tensor:
    """DDIM with eta = 0 of e = factor x, in float64."""
    products = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    spacing = 1000 // steps
    x = noise.double()
    for t in reversed(range(0, 1000, spacing)):
        now, then = products[t], products[t - spacing] if t >= spacing else products[0]
        if t < spacing and scheduler.config.set_alpha_to_one:
            then = torch.tensor(1.0, dtype=torch.float64)
        e = factor.double().view(-1, 1, 1, 1) * x
        x = then.sqrt() * (x - (1 - now).sqrt() * e) / now.sqrt() + (1 - then).sqrt() * e
    return x


@pytest.mark.parametrize("guidance", [None, 1.0, 3.0])
def test_samples_are_those_of_ddim_by_hand(guidance: float | None) -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    model, labels, noise = _Echo().train(), torch.tensor([0, 1, 1, 0, 1]), draw_noise(5, (1, 4, 4), seed=3)
    found = sample_classes(model, scheduler, labels, noise, steps=10, guidance=guidance, null_label=2, batch_size=2)
    factor = model.weight.detach()[labels]
    if guidance is not None:
        factor = 0.2 + guidance * (factor - 0.2)
    torch.testing.assert_close(found.double(), _by_hand(scheduler, factor, noise, 10), rtol=1e-4, atol=1e-5)
    assert model.training and set(model.seen) == ({2, 4} if guidance == 3.0 else {1, 2})
    embeds = model.weight.detach()[labels].view(-1, 1, 1).expand(-1, 3, 2)
    prompted = sample_prompts(
        model, scheduler, embeds, noise, steps=10, guidance=guidance, null_embeds=torch.full((3, 2), 0.2)
    )
    torch.testing.assert_close(prompted, found, rtol=1e-5, atol=1e-6)


def test_a_samples_noise_is_its_own() -> None:
    few, many = draw_noise(2, (1, 3, 3), seed=5), draw_noise(6, (1, 3, 3), seed=5)
    assert torch.equal(few, many[:2]) and not torch.equal(many[0], many[1])
    assert abs(float(many.mean())) < 3 / math.sqrt(many.numel())


def test_sampling_refuses_what_does_not_fit() -> None:
    scheduler, model = diffusers.DDIMScheduler(), _Echo()
    labels, noise = torch.tensor([0, 1]), draw_noise(2, (1, 4, 4), seed=0)
    with pytest.raises(InputError, match="guidance needs a null label"):
        sample_classes(model, scheduler, labels, noise, guidance=2.0)
    with pytest.raises(InputError, match="guidance needs the empty prompt"):
        sample_prompts(model, scheduler, torch.zeros(2, 3, 2), noise, guidance=2.0)
    with pytest.raises(InputError, match="labels: expected 2"):
        sample_classes(model, scheduler, labels[:1], noise)
    with pytest.raises(InputError, match="steps: expected at most 1000"):
        sample_classes(model, scheduler, labels, noise, steps=1001)


# --- Grids ------------------------------------------------------------------------------------------------------


def test_a_grid_holds_every_picture(tmp_path) -> None:
    from PIL import Image

    rows = {"before": torch.linspace(-1, 1, 3).view(3, 1, 1, 1).expand(3, 1, 8, 8), "after": torch.zeros(2, 3, 8, 8)}
    path = tmp_path / "grid.png"
    write_grid(path, rows, ["0", "0", "1"], scale=4, gap=2)
    image = Image.open(path).convert("RGB")
    margin, top = image.width - 3 * 34, image.height - 2 * 34
    for column, value in enumerate((0, 128, 255)):
        assert image.getpixel((margin + column * 34 + 16, top + 16)) == (value,) * 3
    assert image.getpixel((margin + 16, top + 34 + 16)) == (128,) * 3
    assert image.getpixel((margin + 2 * 34 + 16, top + 34 + 16)) == (255,) * 3  # the shorter row's end
    assert {image.getpixel((x, y)) for x in range(margin) for y in range(top, image.height)} > {(255,) * 3}  # names
    with pytest.raises(InputError, match=r"ends in \.png"):
        write_grid(tmp_path / "grid.jpg", rows)
    with pytest.raises(InputError, match="1 or 3"):
        write_grid(path, {"a": torch.zeros(2, 4, 8, 8)})
