"""The pictures of ``unlearn-ext forget``, before and after: what is shown, how it is sampled, and the grid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from helpers.forgetting import TEXT_DIGITS, denoiser, moved, plan_of, result
from helpers.grids import GAP, SIDE, cells, far
from helpers.pipelines import NAMES

from unlearn_ext.jobs.pictures import Pictures
from unlearn_ext.models.sampling import draw_noise

Forgotten = Callable[..., Path]


@pytest.fixture(scope="module")
def home(few_prompts: Path) -> Path:
    return few_prompts


def sampled(folder: Path, model: str, labels: list[int], guidance: float) -> np.ndarray:
    """What diffusers' own pipeline makes of the folder, in two steps from the noise of seed 0."""
    import diffusers

    noise = draw_noise(len(labels), (4, 8, 8), seed=0)
    common = {"guidance_scale": guidance, "num_inference_steps": 2, "output_type": "np"}
    if model == "text":
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        prompts = [sorted(NAMES[digit] for digit in TEXT_DIGITS)[label] for label in labels]
        images = pipe(prompts, latents=noise, **common).images
    else:
        pipe = diffusers.DiTPipeline.from_pretrained(folder, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        drawn = iter(noise)  # the pipeline takes no noise
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *_, **__: torch.stack(list(drawn))
            )
            images = pipe(labels, **common).images
    return (images * 255).round().astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "guidance"), [("dit", 1.0), ("text", 1.0), ("text", 20.0), ("text", None)], ids=str)
def test_the_grid_shows_what_diffusers_samples_of_both_models(
    home: Path, forgotten: Forgotten, model: str, guidance: float | None
) -> None:
    """Before over after, the forgotten class first; DiTPipeline cannot guide a model of ten classes."""
    fast = ("--learning-rate", "0.01")  # or both rows would look alike
    out = forgotten(model, *fast, *(() if guidance is None else ("--guidance-scale", str(guidance))))
    guidance = 8.5 if guidance is None else guidance  # of sd-nudity
    assert result(out)["sampling"]["guidance"] == guidance
    labels = [1, 0, 2] if model == "text" else [3, 0, 1, 2, 4, 5, 6, 7, 8]
    grid = cells(out / "unlearning" / "before-after.png", 2, len(labels))
    expected = [sampled(folder, model, labels, guidance) for folder in (home / model, out)]
    assert far(grid[0], expected[0]) <= 1 and far(grid[1], expected[1]) <= 1
    assert far(expected[0], expected[1]) > 5
    assert model == "dit" or far(expected[0], sampled(home / model, model, labels, guidance + 5)) > 2


@pytest.mark.slow
def test_the_guidance_of_a_unet_reaches_its_pictures(home: Path, forgotten: Forgotten) -> None:
    """Of DDIM as arXiv 2010.02502 has it, with predictions as arXiv 2207.12598 combines them."""
    from diffusers import UNet2DModel

    model = UNet2DModel.from_pretrained(home / "ddpm" / "unet", local_files_only=True)
    labels = torch.tensor([3, 0, 1, 2, 4, 5, 6, 7, 8])
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 50), 0)  # DDPMScheduler's own betas
    rows = {}
    for given, guidance in ((None, 3.0), (1.0, 1.0), (9.0, 9.0)):  # 3 of ddpm-cifar10
        out = forgotten("ddpm", *(() if given is None else ("--guidance-scale", str(given))))
        assert result(out)["sampling"]["guidance"] == guidance
        x = draw_noise(len(labels), (1, 16, 16), seed=0)
        for t, following in ((25, kept[0]), (0, torch.tensor(1.0))):
            with torch.no_grad():
                noise = model(x, t, class_labels=labels).sample
                if guidance != 1.0:
                    without = model(x, t, class_labels=torch.full_like(labels, 10)).sample
                    noise = without + guidance * (noise - without)
            x0 = ((x - (1 - kept[t]).sqrt() * noise) / kept[t].sqrt()).clamp(-1, 1)
            noise = (x - kept[t].sqrt() * x0) / (1 - kept[t]).sqrt()
            x = following.sqrt() * x0 + (1 - following).sqrt() * noise
        expected = ((x.clamp(-1, 1) + 1) * 127.5).round().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
        rows[guidance] = cells(out / "unlearning" / "before-after.png", 2, len(labels))[0]
        assert far(rows[guidance], expected) <= 1
    assert far(rows[1.0], rows[3.0]) > 1 and far(rows[3.0], rows[9.0]) > 1
    weights = [denoiser(forgotten("ddpm", *given), "ddpm") for given in ((), ("--guidance-scale", "1.0"))]
    assert not moved(*weights)  # it is of the pictures, not of the training


@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid_holds_the_first_picture_of_each_class(tmp_path: Path, channels: int) -> None:
    from PIL import Image

    values = torch.rand(2, 6, channels, 16, 16, generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    values[:, :, :, 0, :3] = torch.tensor([-1.0, 0.0, 1.0])
    names = {2: "i", 5: "ii", 7: "iii"}
    pictures = Pictures(
        None, None, names, forgotten=[5], retained=[2, 7], each=2, steps=2, guidance=None, seed=0,
        taken={"before": values[0], "after": values[1]},
    )  # fmt: skip
    assert pictures.labels.tolist() == [5, 5, 2, 2, 7, 7]
    pictures.write_grid(tmp_path / "grid.png")
    shown = cells(tmp_path / "grid.png", 2, 3)
    assert shown[:, :, 0, :3, 0].tolist() == [[[0, 128, 255]] * 3] * 2
    expected = (values[:, ::2].numpy().clip(-1, 1) + 1) * 127.5
    expected = np.broadcast_to(np.moveaxis(expected, 2, -1), shown.shape)
    assert np.abs(shown - expected).max() <= 0.5 + 1e-4
    canvas = np.asarray(Image.open(tmp_path / "grid.png"))
    top, left = canvas.shape[0] - 2 * (SIDE + GAP), canvas.shape[1] - 3 * (SIDE + GAP)
    dark = canvas.min(2) < 128
    heads = [dark[:top, left + i * (SIDE + GAP) :][:, : SIDE + GAP].sum() for i in range(3)]
    assert heads[1] < heads[0] < heads[2]  # by the letters of their names
    assert all(dark[top + i * (SIDE + GAP) :, :left][: SIDE + GAP].any() for i in (0, 1))  # and the rows' names


def test_pictures_that_are_not_finite_are_not_judged() -> None:
    """A classifier is shown bytes, and those of a NaN are black."""
    values = torch.zeros(2, 4, 1, 16, 16)
    values[1, 3, 0, 0, 0] = torch.nan
    pictures = Pictures(
        None, None, {0: "a", 1: "b"}, forgotten=[0], retained=[1], each=2, steps=2, guidance=None, seed=0,
        judge=object(), taken={"before": values[0], "after": values[1]},
    )  # fmt: skip
    assert pictures.verdict() == "not verified: 1 of 4 pictures after hold inf or NaN"


@pytest.mark.parametrize(
    ("forgotten_classes", "shown"),
    [("3", [3, 0, 1, 2, 4, 5, 6, 7, 8]), ("7,3", [7, 3, 0, 1, 2, 4, 5, 6, 8, 9]), ("0,1,2,3", [*range(10)])],
)
def test_the_forgotten_are_shown_first_and_then_eight_of_the_others(
    home: Path, tmp_path: Path, forgotten_classes: str, shown: list[int]
) -> None:
    plan = plan_of(home, "ddpm", tmp_path / "out", forget_class=forgotten_classes)
    assert plan.pictures.labels.tolist() == shown
