"""Diffusion tasks on small denoisers, as several test files take them."""

from __future__ import annotations

import torch
from helpers.denoisers import normal, scheduler
from torch import Tensor, nn

from unlearn_ext.tasks import ClassConditionalDiffusion, TextConditionalDiffusion

CPU = torch.device("cpu")


class Denoiser(nn.Module):
    """a x_t + b label + c t: whose losses can be computed by hand. It has no configuration."""

    def __init__(self, outputs: int = 1):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
        self.outputs = outputs
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x, t, class_labels):
        self.calls.append((x, t, class_labels))
        value = self.a * x + self.b * class_labels.reshape(-1, 1, 1, 1) + 0.01 * t.double().reshape(-1, 1, 1, 1)
        return torch.cat([value * (i + 1) for i in range(self.outputs)], 1)


def class_task(**arguments) -> ClassConditionalDiffusion:
    return ClassConditionalDiffusion(scheduler(arguments.pop("prediction_type", "epsilon")), **arguments)


def begun(model: nn.Module, batch, **arguments) -> tuple[ClassConditionalDiffusion, dict[str, Tensor]]:
    task = class_task(**arguments)
    task.begin(model, batch)
    return task, task.prepare(batch, CPU)


def text_task(**arguments) -> TextConditionalDiffusion:
    return TextConditionalDiffusion(scheduler(), **arguments)


def prompt_batch(count: int = 3, **more) -> dict:
    return {"latents": normal(count, 2, 8, 8), "prompt_embeds": normal(count, 8, 8, seed=1), **more}
