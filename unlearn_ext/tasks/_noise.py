"""The forward process of a diffusion scheduler: noisy samples, what the model shall predict, timesteps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["NoiseSchedule"]

_PREDICTIONS = ("epsilon", "v_prediction", "sample")


class NoiseSchedule:
    r""":math:`x_t = \sqrt{\bar\alpha_t}\, x + \sqrt{1 - \bar\alpha_t}\, \epsilon`, t from 0 to T - 1.

    Args:
        scheduler: a diffusers scheduler with ``alphas_cumprod``; its configuration gives ``prediction_type`` and
            ``num_train_timesteps``.
    """

    def __init__(self, scheduler: Any):
        config = getattr(scheduler, "config", None)
        products = getattr(scheduler, "alphas_cumprod", None)
        if config is None or products is None:
            raise InputError(
                f"scheduler: {type(scheduler).__name__} has no alphas_cumprod: pass a diffusers scheduler such as "
                "DDPMScheduler"
            )
        self.prediction_type = getattr(config, "prediction_type", "epsilon")
        if self.prediction_type not in _PREDICTIONS:
            raise InputError(
                f"scheduler: expected prediction_type of {', '.join(_PREDICTIONS)}, got {self.prediction_type!r}"
            )
        self.learned_range = getattr(config, "variance_type", None) != "learned"
        self.betas, self.alphas_cumprod = _in_double(products, getattr(scheduler, "betas", None))
        self.alphas_cumprod_before = torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])
        self._moved: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @property
    def steps(self) -> int:
        """T."""
        return self.alphas_cumprod.numel()

    def draw(self, count: int, generator: torch.Generator, antithetic: bool = False) -> Tensor:
        """Uniform timesteps, int64 [count]; antithetic: the second half is T - 1 minus the first."""
        if not antithetic:
            return torch.randint(0, self.steps, (count,), generator=generator, dtype=torch.int64, device="cpu")
        half = torch.randint(0, self.steps, (count // 2 + 1,), generator=generator, dtype=torch.int64, device="cpu")
        return torch.cat([half, self.steps - 1 - half])[:count]

    def add(self, inputs: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t."""
        return self.at("signal", timesteps, inputs) * inputs + self.at("noise", timesteps, inputs) * noise

    def target(self, inputs: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model shall predict of (x, noise): noise, x, or v = √ᾱ noise - √(1 - ᾱ) x."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return inputs
        return self.at("signal", timesteps, inputs) * noise - self.at("noise", timesteps, inputs) * inputs

    def sample(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """x as a prediction at x_t implies it."""
        if self.prediction_type == "sample":
            return prediction
        signal, noise = self.at("signal", timesteps, noisy), self.at("noise", timesteps, noisy)
        if self.prediction_type == "epsilon":
            return (noisy - noise * prediction) / signal
        return signal * noisy - noise * prediction

    def at(self, table: str, timesteps: Tensor, like: Tensor) -> Tensor:
        """A coefficient at each sample's timestep, of shape [N, 1, ...] to go with ``like``."""
        key = table, like.device, like.dtype
        if key not in self._moved:
            with torch.inference_mode(False):  # it is kept, and a gradient may pass it later
                self._moved[key] = self._table(table).to(like.device, like.dtype)
        return self._moved[key][timesteps].reshape(-1, *[1] * (like.dim() - 1))

    def _table(self, name: str) -> Tensor:
        product, before, beta = self.alphas_cumprod, self.alphas_cumprod_before, self.betas
        if name == "signal":
            return product.sqrt()
        if name == "noise":
            return (1 - product).sqrt()
        # Of the true posterior q(x_{t-1} | x_t, x), Ho et al. 2020, equation 7.
        if name == "posterior_sample":
            return beta * before.sqrt() / (1 - product)
        if name == "posterior_noisy":
            return (1 - before) * (1 - beta).sqrt() / (1 - product)
        if name == "posterior_log_variance":  # 0 at t = 0: its logarithm is that of t = 1
            variance = beta * (1 - before) / (1 - product)
            return torch.cat([variance[1:2], variance[1:]]).log()
        if name == "log_beta":
            return beta.log()
        raise ValueError(name)


def _in_double(products: Any, betas: Any) -> tuple[Tensor, Tensor]:
    """Betas and their products in float64. diffusers' float32 products leave few digits of 1 - product at small t."""
    given = torch.as_tensor(products, dtype=torch.float64, device="cpu").detach()
    if betas is not None:
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu").detach()
        exact = torch.cumprod(1 - betas, 0)
        if exact.shape == given.shape and torch.allclose(exact, given, rtol=0, atol=1e-5):
            return betas, exact
    return 1 - given / torch.cat([given.new_ones(1), given[:-1]]), given
