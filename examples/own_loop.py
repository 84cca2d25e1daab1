"""A training loop of your own around UnlearnOptimizer: a measured mask, forget and retain steps, a schedule.

python examples/own_loop.py
"""

import itertools

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from unlearn_ext import FisherDiagonal, SaliencyMask, UnlearnOptimizer
from unlearn_ext.tasks import Classification

torch.manual_seed(0)
centres = torch.randn(4, 20)  # four classes of points
labels = torch.arange(512) % 4
points = centres[labels] + torch.randn(512, 20)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
trainer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(15):
    trainer.zero_grad()
    cross_entropy(model(points), labels).backward()
    trainer.step()


def accuracies():
    right = model(points).argmax(1) == labels
    return f"class 0: {right[labels == 0].float().mean():.1%}, the others: {right[labels != 0].float().mean():.1%}"


def batches(chosen):
    return list(zip(points[chosen].split(32), labels[chosen].split(32), strict=True))


print("before,", accuracies())
forget, retain = batches(labels == 0), batches(labels != 0)
task = Classification()
mask = SaliencyMask.from_fisher(
    FisherDiagonal(model, task).measure(forget), FisherDiagonal(model, task).measure(retain), gamma=1.0
)
print(f"forgetting may move {mask.density:.1%} of the weights")

optimizer = UnlearnOptimizer(
    model.named_parameters(), rule="momentum", momentum=0.9, lr=0.02, max_norm=1.0, mask=mask, protect=True
)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
pairs = zip(itertools.cycle(forget), itertools.cycle(retain), strict=False)
for (forget_points, forget_labels), (retain_points, retain_labels) in itertools.islice(pairs, 40):
    (-cross_entropy(model(forget_points), forget_labels)).backward()
    optimizer.forget_step()  # moves what the mask allows; every other weight keeps its bits
    optimizer.zero_grad()
    cross_entropy(model(retain_points), retain_labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
print("after,", accuracies())
