"""Finds the strength of forgetting by its gradient: a held-out loss, followed back through unrolled unlearning steps.

python examples/hypergradient.py
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from unlearn_ext import ops

torch.manual_seed(0)
centres = 0.3 * torch.randn(4, 20)
labels = torch.arange(384) % 4
points = centres[labels] + torch.randn(384, 20)
model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 4))
parts = points.split(128), labels.split(128)
forget, retain, held_out = zip(*parts, strict=True)
trainer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(60):  # the model learns what it will forget, and never sees what is held out
    trainer.zero_grad()
    (cross_entropy(model(forget[0]), forget[1]) + cross_entropy(model(retain[0]), retain[1])).backward()
    trainer.step()

names, start = zip(*model.named_parameters(), strict=True)


def loss(weights, batch):
    outputs = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), batch[0])
    return cross_entropy(outputs, batch[1])


def unlearned(alpha, steps=3):
    """The weights after some steps, each of whose gradients depends on alpha through the steps before."""
    weights = start
    for _ in range(steps):
        forget_grads = torch.autograd.grad(-loss(weights, forget), weights, create_graph=True)
        retain_grads = torch.autograd.grad(loss(weights, retain), weights, create_graph=True)
        weights = ops.update(weights, lr=0.5, forget_weight=alpha, forget_grads=forget_grads, retain_grads=retain_grads)
    return weights


alpha = torch.tensor(0.01, requires_grad=True)
tuner = torch.optim.Adam([alpha], lr=0.3)
for step in range(30):
    weights = unlearned(alpha)
    gap = loss(weights, forget) - loss(weights, held_out)  # forgotten: no better known than samples never seen
    (alpha.grad,) = torch.autograd.grad(gap.square(), alpha)
    if step % 10 == 0 or step == 29:
        print(f"alpha {alpha.item():.3f}: the forget set's loss is {gap.item():+.3f} from that of unseen data")
    tuner.step()
