"""Makes a CNN forget one class of real digits, and shows what it still knows.

python examples/classifier.py
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from unlearn_ext import Unlearner
from unlearn_ext.data import load_digits
from unlearn_ext.evaluation import accuracy, predict
from unlearn_ext.methods import SFRon
from unlearn_ext.tasks import Classification

FORGOTTEN = 3


def train(model, images, labels, epochs=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


def show(when, model, images, labels):
    logits, _ = predict(model, [(images, labels)])
    gone = labels == FORGOTTEN
    print(
        f"{when}: the digit {FORGOTTEN} {accuracy(logits[gone], labels[gone]):.1%}, "
        f"the others {accuracy(logits[~gone], labels[~gone]):.1%}"
    )


torch.manual_seed(0)
split = load_digits().split(train_size=2000, test_size=1000)
images, labels = split.train_images, split.train_labels
layers = [nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
layers += [nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 7 * 7, 10))
train(model, images, labels)
show("before", model, split.test_images, split.test_labels)

gone = labels == FORGOTTEN
forget = DataLoader(TensorDataset(images[gone], labels[gone]), batch_size=64, shuffle=True)
retain = DataLoader(TensorDataset(images[~gone], labels[~gone]), batch_size=64, shuffle=True)
method = SFRon(
    rule="momentum",
    momentum=0.9,
    lr=0.01,
    weight_decay=5e-4,
    lr_schedule="cosine",
    iterations=150,
    forget_freq=10,
    forget_alpha=1000.0,
    lambd=0.5,
    adaptive_eps=1e-2,
    max_norm=3.0,
)
result = Unlearner(model, Classification(), method).run(forget, retain)
show("after", model, split.test_images, split.test_labels)
print(result)
