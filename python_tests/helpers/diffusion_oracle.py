"""SFR-on's released loops for diffusion in float64, written with torch.optim; imports nothing from the package.

Draws are replayed from a generator in the documented order: latent samples, timesteps, noise, dropped conditions, each
in float32, once for every batch that is looked at.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence


@dataclass
class Diffusion:
    """The forward process with its true posterior, from betas."""

    betas: Tensor

    def __post_init__(self) -> None:
        self.betas = self.betas.double()
        self.left = torch.cumprod(1 - self.betas, 0)  # of the signal's variance
        self.steps = len(self.betas)

    def noisy(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return torch.stack(
            [self.left[k] ** 0.5 * x[i] + (1 - self.left[k]) ** 0.5 * noise[i] for i, k in enumerate(t.tolist())]
        )

    def posterior(self, x: Tensor, noisy: Tensor, k: int) -> tuple[Tensor, float]:
        """Mean and variance of x_{k-1} given x_k and x: a product of two Gaussians. One sample, k > 0."""
        before, beta = self.left[k - 1], self.betas[k]
        precision = 1 / (1 - before) + (1 - beta) / beta
        mean = (before**0.5 * x / (1 - before) + (1 - beta) ** 0.5 * noisy / beta) / precision
        return mean, float(1 / precision)

    def bound(self, x: Tensor, noisy: Tensor, epsilon: Tensor, values: Tensor, k: int) -> Tensor:
        """One sample's term of the variational bound, in bits for every dimension, for a frozen noise prediction."""
        guess = (noisy - (1 - self.left[k]) ** 0.5 * epsilon.detach()) / self.left[k] ** 0.5
        smallest = self.posterior(x, noisy, max(k, 1))[1]  # the first step has none, and takes the second's
        log_variance = smallest_to_beta(values, smallest, float(self.betas[k]))
        if k > 0:
            true, variance = self.posterior(x, noisy, k)
            mean, _ = self.posterior(guess, noisy, k)
            nats = kl_divergence(Normal(true, variance**0.5), Normal(mean, torch.exp(log_variance / 2)))
        else:
            nats = -log_likelihood(x, guess, torch.exp(log_variance / 2))
        return nats / math.log(2)


def smallest_to_beta(values: Tensor, smallest: float, beta: float) -> Tensor:
    """-1 is the smallest variance and 1 is beta, on a logarithmic scale."""
    return math.log(smallest) + (values + 1) / 2 * (math.log(beta) - math.log(smallest))


def log_likelihood(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Of 8-bit x in [-1, 1]: a Gaussian's mass between the borders of its level."""

    def below(border: Tensor) -> Tensor:
        z = (border - mean) / std
        return (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z * z * z))) / 2

    upper = torch.where(x > 0.999, torch.ones_like(x), below(x + 1 / 255))
    lower = torch.where(x < -0.999, torch.zeros_like(x), below(x - 1 / 255))
    return torch.log(torch.clamp(upper - lower, min=1e-12))


class Draws:
    """The task's generator, replayed."""

    def __init__(self, seed: int, steps: int):
        self.generator, self.steps = torch.Generator().manual_seed(seed), steps

    def normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).double()

    def timesteps(self, count: int) -> Tensor:
        return torch.randint(0, self.steps, (count,), generator=self.generator)

    def antithetic(self, count: int) -> Tensor:
        half = self.timesteps(count // 2 + 1)
        return torch.tensor((half.tolist() + [self.steps - 1 - k for k in half.tolist()])[:count])

    def dropped(self, count: int, probability: float) -> list[bool]:
        return (torch.rand(count, generator=self.generator) < probability).tolist()


Loss = Callable[[Any], Tensor]  # of a raw batch, per sample; draws


def sfron(
    model: nn.Module,
    forget: Sequence[Any],
    retain: Sequence[Any],
    losses: Loss,
    *,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    iterations: int,
    alpha: Callable[[int], float],
    fisher: Loss | None = None,
    replace: Loss | None = None,
    adaptive: tuple[float, float] | None = None,
    gamma: float = 1.0,
    fisher_max_norm: float | None = None,
    max_norm: float | None = None,
    retain_max_norm: float | None = None,
    shared: Iterable[Sequence[nn.Parameter]] = (),
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Weights after every iteration, and the mask. ``model`` is moved.

    ``shared``: groups of parameters that stand for one; the first of each has the others' gradients added and the
    others follow it, which is what one shared parameter does.
    """
    groups = [list(group) for group in shared]
    followers = {id(copy) for group in groups for copy in group[1:]}
    named = {name: p for name, p in model.named_parameters() if id(p) not in followers}
    parameters = list(named.values())

    def gradients(loss: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        loss.backward()
        for first, *copies in groups:
            for copy in copies:
                if copy.grad is not None:
                    first.grad = copy.grad if first.grad is None else first.grad + copy.grad

    def diagonal(batches: Sequence[Any]) -> dict[str, Tensor]:
        model.eval()
        total: dict[str, Tensor] = {}
        for batch in batches:
            gradients((fisher or losses)(batch).mean())
            if fisher_max_norm is not None:
                nn.utils.clip_grad_norm_(parameters, fisher_max_norm)
            for name, p in named.items():
                if p.grad is not None:
                    total[name] = total.get(name, torch.zeros_like(p)) + p.grad**2 / len(batches)
        return total

    f, r = diagonal(forget), diagonal(retain)
    mask = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in named.items()}
    mask.update({name: (f[name] + 1e-15) / (r[name] + 1e-15) >= gamma for name in f})

    stepper = optimizer(parameters)
    next_forget, next_retain = itertools.cycle(forget), itertools.cycle(retain)

    def step(limit: float | None) -> None:
        if limit is not None:
            nn.utils.clip_grad_norm_(parameters, limit)
        stepper.step()
        with torch.no_grad():
            for first, *copies in groups:
                for copy in copies:
                    copy.copy_(first)

    model.train()
    path = []
    for t in range(iterations):
        values = (replace or losses)(next(next_forget))
        if replace is not None:
            gradients(alpha(t) * values.mean())
        elif adaptive is None:
            gradients(-alpha(t) * values.mean())
        else:
            lambd, eps = adaptive
            c = 1 / (values.detach() ** lambd + eps)
            gradients(-alpha(t) * (c * values).sum() / c.sum())
        for name, p in named.items():
            if p.grad is not None:
                p.grad = torch.where(mask[name], p.grad, 0.0)
        step(max_norm)
        gradients(losses(next(next_retain)).mean())
        step(retain_max_norm)
        path.append(torch.cat([p.detach().reshape(-1) for p in parameters]))
    return path, mask
