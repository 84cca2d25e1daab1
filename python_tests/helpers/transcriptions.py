"""A method's updates beside a plain transcription of it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator

import torch
from helpers.models import ConvNet, batches, make
from torch import Tensor, nn

from unlearn_ext import Unlearner
from unlearn_ext.methods import parse
from unlearn_ext.tasks import Classification

STEPS = 20


CLOSE = 1e-10


def sets() -> tuple[list, list]:
    """Of different lengths, with a last batch that is smaller."""
    forget, retain = (batches(n, 8, seed=n, dtype=torch.float64) for n in (3, 5))
    forget[-1] = (forget[-1][0][:3], forget[-1][1][:3])
    return forget, retain


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def distance(
    method: str, transcription: Callable[..., Iterator[None]], forget: list, retain: list, steps: int = STEPS, **more
) -> float:
    """The largest distance of any weight after any iteration. The transcription moves its network and yields after
    every iteration."""
    start = make(ConvNet).double()
    own, other = copy.deepcopy(start), copy.deepcopy(start)
    path: list[Tensor] = []
    unlearner = Unlearner(own, Classification(), parse(method, iterations=STEPS))
    unlearner.run(
        forget, retain, evaluate=lambda net, _: path.append(flat(net)), evaluate_every=1, allow_duplicates=True, **more
    )
    other.train()
    expected = [flat(other) for _ in transcription(other, forget, retain)]
    assert len(path) == len(expected) == steps
    assert (expected[-1] - flat(start)).abs().max() > 1e-3, "the weights must have moved for this to mean anything"
    return max((a - b).abs().max().item() for a, b in zip(path, expected, strict=True))


def rounds(data: list) -> Iterator:
    return itertools.cycle(data)
