"""A method of your own: ascent that ends at a ceiling, so that no sample's loss grows without bound.

python examples/own_method.py
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from unlearn_ext import InputError, Unlearner
from unlearn_ext.methods import ForgetLoss, Forgetting, Row
from unlearn_ext.tasks import Classification


@dataclass(kw_only=True)
class BoundedAscent(Forgetting):
    """Descent of −α mean min(l, ceiling) on the forget set and of the mean loss on the retain set.

    Settings that every method has (rule, lr, max_norm, update, mask, ...) are inherited.
    """

    name = "bounded_ascent"
    row = Row(  # a line of the table of methods
        saliency="every weight",
        forget_term="−α mean min(l, ceiling)",
        retain_term="mean loss",
        geometry="forget and retain steps in turn",
        source="examples/own_method.py",
    )
    ceiling: float = 3.0

    def __post_init__(self):
        super().__post_init__()
        if not self.ceiling > 0:
            raise InputError(f"ceiling: expected a number above 0, got {self.ceiling}")

    def forget_loss(self, losses, iteration):
        return ForgetLoss(-self.strength(iteration) * losses.clamp(max=self.ceiling).mean())


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


def batches(chosen):
    return list(zip(points[chosen].split(32), labels[chosen].split(32), strict=True))


method = BoundedAscent(rule="momentum", momentum=0.9, lr=0.02, iterations=40, ceiling=3.0)
result = Unlearner(model, Classification(), method).run(batches(labels == 0), batches(labels != 0))
right = model(points).argmax(1) == labels
print(f"class 0: {right[labels == 0].float().mean():.1%}, the others: {right[labels != 0].float().mean():.1%}")
print(result)
