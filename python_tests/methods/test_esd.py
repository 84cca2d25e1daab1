"""ESD, and distances between denoisers: against transcriptions and hand numbers, and what it claims."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from helpers import denoisers, shared_digits
from helpers.denoisers import CLASSES, images, labels, normal, scheduler
from helpers.diffusion_oracle import Diffusion, Draws
from helpers.models import make
from torch import Tensor, nn

from unlearn_ext import InputError, Unlearner
from unlearn_ext.methods import ESD, parse
from unlearn_ext.tasks import ClassConditionalDiffusion, Classification, TextConditionalDiffusion

CPU = torch.device("cpu")
STEPS = 6
EPS = 1e-6  # of Adam, so that a gradient that is nothing but rounding moves nothing


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def trajectory(net: nn.Module, task: Any, data: list) -> list[Tensor]:
    path: list[Tensor] = []
    method = ESD(lr=1e-3, eps=EPS, negative_guidance=1.5, forget_alpha=2.0, iterations=STEPS)
    keep = {"evaluate": lambda model, _: path.append(flat(model)), "evaluate_every": 1}
    result = Unlearner(net, task, method).run(data, **keep)
    assert result.counts["forget_steps"] == STEPS and result.counts["retain_steps"] == 0
    return path


def transcribed(net: nn.Module, data: list, told: str, dropout: float, condition: str) -> list[Tensor]:
    """The same in float64: ``told`` holds the condition in a batch, ``condition`` is its argument's name."""
    forward, draws, original = Diffusion(scheduler().betas), Draws(0, 10), copy.deepcopy(net).eval()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, eps=EPS)
    net.train()
    path = []
    for batch in itertools.islice(itertools.cycle(data), STEPS):
        x, c = batch["pixel_values"], batch[told]
        t, noise = draws.timesteps(len(x)), draws.normal(x)
        if dropout:
            draws.dropped(len(x), dropout)
        noisy = forward.noisy(x, noise, t)
        null = torch.full_like(c, CLASSES) if c.dtype == torch.int64 else torch.zeros_like(c)
        with torch.no_grad():
            told_it, untold, other = (
                original(noisy, t, **{condition: given}).sample for given in (c, null, batch.get(f"replace_{told}", c))
            )
        error = net(noisy, t, **{condition: c}).sample - (other - 1.5 * (told_it - untold))
        optimizer.zero_grad()
        (2.0 * (error**2).flatten(1).mean(1).mean()).backward()
        optimizer.step()
        path.append(flat(net))
    return path


@pytest.mark.parametrize("replaced", [False, True])
def test_update_is_the_transcriptions_for_classes(replaced) -> None:
    start = denoisers.unet().double()
    data = [{"pixel_values": images(4, seed=i), "labels": torch.full((4,), 2)} for i in range(2)]
    for batch in data if replaced else ():
        batch["replace_labels"] = torch.full((4,), 1)
    path = trajectory(copy.deepcopy(start), ClassConditionalDiffusion(scheduler(), label_dropout=0.5), data)
    expected = transcribed(copy.deepcopy(start), data, "labels", 0.5, "class_labels")
    assert max((a - b).abs().max().item() for a, b in zip(path, expected, strict=True)) <= 1e-10
    assert (expected[-1] - flat(start)).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("replaced", [False, True])
def test_update_is_the_transcriptions_for_prompts(replaced) -> None:
    start = denoisers.text_unet().double()
    data = [{"pixel_values": images(3, seed=i, channels=2), "prompt_embeds": normal(3, 8, 8, seed=9)} for i in range(2)]
    for batch in data if replaced else ():
        batch["replace_prompt_embeds"] = normal(3, 8, 8, seed=10)
    task = TextConditionalDiffusion(scheduler(), prompt_dropout=0.0, guidance=1.0, null_embeds=torch.zeros(8, 8))
    path = trajectory(copy.deepcopy(start), task, data)
    expected = transcribed(copy.deepcopy(start), data, "prompt_embeds", 0.0, "encoder_hidden_states")
    assert max((a - b).abs().max().item() for a, b in zip(path, expected, strict=True)) <= 1e-10
    assert (expected[-1] - flat(start)).abs().max() > 1e-3


@pytest.mark.slow
def test_the_prediction_for_the_forgotten_class_moves_to_its_target() -> None:
    """On digits that it was not run on, at other noise; those of other classes stay nearer to where they were."""
    digits = shared_digits.digits()
    pixels = digits.pixels(8)
    by_class = {k: pixels[digits.labels == k] for k in range(CLASSES)}
    net = denoisers.unet()
    task = ClassConditionalDiffusion(scheduler(), label_dropout=0.1)
    trained = torch.optim.Adam(net.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    every = torch.cat([by_class[k][:100] for k in by_class]), torch.arange(CLASSES).repeat_interleave(100)
    task.begin(net, every)
    for _ in range(150):  # so that the classes' predictions differ
        chosen = torch.randint(0, len(every[1]), (64,), generator=generator)
        loss = task.losses(net, task.prepare((every[0][chosen], every[1][chosen]), CPU)).mean()
        trained.zero_grad()
        loss.backward()
        trained.step()
    original = copy.deepcopy(net)
    forget = [(by_class[3][i : i + 25], torch.full((25,), 3)) for i in (0, 25, 50, 75)]
    Unlearner(net, task, ESD(lr=1e-3, iterations=80)).run(forget)

    def distances(model: nn.Module, k: int, guidance: float | None) -> float:
        probe = ClassConditionalDiffusion(scheduler(), label_dropout=0.0, null_label=CLASSES, seed=5)
        batch = by_class[k][200:300], torch.full((100,), k)
        probe.begin(model, batch)
        with torch.no_grad():
            return (
                probe.losses_and_distances(
                    model.eval(), original.eval(), probe.prepare(batch, CPU), negative_guidance=guidance
                )[1]
                .mean()
                .item()
            )

    before, after = distances(original, 3, 2.0), distances(net, 3, 2.0)
    moved = [distances(net, k, None) for k in range(CLASSES)]
    print(f"to the target {before:.4f} -> {after:.4f}; moved, by class {[round(m, 4) for m in moved]}")
    assert after < before / 2
    assert moved[3] > max(moved[:3])


def test_distances_between_denoisers_by_hand() -> None:
    class Denoiser(nn.Module):
        def __init__(self, b: float):
            super().__init__()
            self.b = nn.Parameter(torch.tensor(b, dtype=torch.float64))

        def forward(self, x, t, class_labels):
            return x + self.b * class_labels.reshape(-1, 1, 1, 1)

    model, teacher = Denoiser(0.5), Denoiser(0.2)
    task = ClassConditionalDiffusion(scheduler(), label_dropout=0.0, null_label=0, reduction="sum")
    task.begin(model, (images(3), labels(3)))
    batch = task.prepare({"pixel_values": images(3), "labels": torch.tensor([1, 2, 3])}, CPU)
    losses, distances = task.losses_and_distances(model, teacher, batch)
    assert torch.equal(losses, task.losses(model, batch))
    pixels = images(3)[0].numel()
    torch.testing.assert_close(distances, pixels * (0.3 * torch.tensor([1.0, 2.0, 3.0]).double()) ** 2)
    # x + 0.5 c to x + 0.2 c - 2 (0.2 c - 0.2 · 0)
    _, distances = task.losses_and_distances(model, teacher, batch, negative_guidance=2.0)
    torch.testing.assert_close(distances, pixels * (0.7 * torch.tensor([1.0, 2.0, 3.0]).double()) ** 2)


@pytest.mark.parametrize("name", ["scrub", "bad_teacher", "random_label", "salun", "finetune", "projected"])
def test_methods_of_classifiers_run_on_denoisers(name) -> None:
    net = denoisers.unet()
    before = copy.deepcopy(net)
    replaced = {"replace_labels": torch.full((4,), 1)} if name in ("random_label", "salun") else {}
    forget = [{"pixel_values": images(4, seed=i).float(), "labels": torch.full((4,), 2), **replaced} for i in range(2)]
    retain = [(images(4, seed=i).float(), labels(4) % 2) for i in (2, 3, 4)]
    changes = {"msteps": 1, "epochs": 2} if name == "scrub" else {"iterations": 4}
    result = Unlearner(net, ClassConditionalDiffusion(scheduler()), parse(name, **changes)).run(forget, retain)
    assert all(entry["lr"] > 0 for entry in result.history)
    assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True))


def test_what_it_cannot_do() -> None:
    with pytest.raises(InputError, match="esd does not run on classification, only on class-conditional diffusion and"):
        Unlearner(make(), Classification(), "esd")
    batch = (images(2).float(), torch.full((2,), 2))
    net = denoisers.unet()
    task = ClassConditionalDiffusion(scheduler(), label_dropout=0.0)
    with pytest.raises(InputError, match=r"the null label is not known yet: .* or give null_label"):
        Unlearner(net, task, "esd:iterations=2").run([batch])
    prompts = {"latents": normal(2, 2, 8, 8), "prompt_embeds": normal(2, 8, 8)}
    with pytest.raises(InputError, match="the empty prompt is not known: give the task a guidance or a prompt_dropout"):
        Unlearner(
            denoisers.text_unet(), TextConditionalDiffusion(scheduler(), prompt_dropout=0.0), "esd:iterations=2"
        ).run([prompts])
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), denoisers.unet().parameters(), strict=True))
    with pytest.raises(InputError, match="negative_guidance: expected a finite number from 0, got -1"):
        ESD(negative_guidance=-1)
