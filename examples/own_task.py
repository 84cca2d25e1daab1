"""A task of your own: regression on a table, where some rows must be forgotten.

python examples/own_task.py
"""

import torch
from torch import nn

from unlearn_ext import InputError, Unlearner
from unlearn_ext.methods import SFRon
from unlearn_ext.tasks import Task


class Regression(Task):
    """Squared error. Batches are ``(inputs [N, D], targets [N])``."""

    def check(self, batch):
        inputs, targets = batch
        if targets.shape != inputs.shape[:1]:
            raise InputError(f"targets: expected one for each of {len(inputs)} rows, got shape {list(targets.shape)}")

    def prepare(self, batch, device):
        """On the device, with everything random drawn: here nothing is."""
        self.check(batch)
        return tuple(part.to(device) for part in batch)

    def losses(self, model, batch):
        """One loss per sample, shape [N]."""
        inputs, targets = batch
        return (model(inputs)[:, 0] - targets).square()

    def inputs(self, batch):
        """The samples, by which rows that stand in both sets are found."""
        return batch[0]


torch.manual_seed(0)
rows = torch.randn(256, 8)
targets = rows[:, 0] * rows[:, 1] + rows[:, 2]
targets[:32] += 3.0  # rows of wrong targets, which the model has learned
model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
trainer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(200):
    trainer.zero_grad()
    (model(rows)[:, 0] - targets).square().mean().backward()
    trainer.step()


@torch.no_grad()
def errors():
    error = (model(rows)[:, 0] - targets).square()
    return f"{error[:32].mean():.3f} on what is to be forgotten, {error[32:].mean():.3f} on the rest"


print("squared error before:", errors())
forget = list(zip(rows[:32].split(16), targets[:32].split(16), strict=True))
retain = list(zip(rows[32:].split(32), targets[32:].split(32), strict=True))
method = SFRon(rule="momentum", momentum=0.9, lr=5e-3, iterations=100, forget_freq=5, adaptive_eps=1e-2, max_norm=1.0)
result = Unlearner(model, Regression(), method).run(forget, retain)
print("squared error after:", errors())
print(result)
