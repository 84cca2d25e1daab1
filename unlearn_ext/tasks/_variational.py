"""The variational-bound term by which a diffusion model learns its variance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._noise import NoiseSchedule

__all__ = ["variational_bound"]


def variational_bound(
    schedule: NoiseSchedule, prediction: Tensor, values: Tensor, inputs: Tensor, noisy: Tensor, timesteps: Tensor
) -> Tensor:
    r"""One term of the bound for every element, in bits, shape of ``inputs``.

    :math:`KL(q(x_{t-1} | x_t, x) \,\|\, p(x_{t-1} | x_t))`, at t = 0 the negative log-likelihood of x rounded to 256
    levels of [-1, 1]. The model's mean is frozen: only the variance learns from it. Its logarithm lies between that
    of the true posterior, at ``values`` = -1, and that of beta, at 1.

    Source: improved DDPM (arXiv 2102.09672) and DiT's released code.
    """
    prediction = prediction.detach()

    def at(table: str) -> Tensor:
        return schedule.at(table, timesteps, inputs)

    def posterior_mean(sample: Tensor) -> Tensor:
        return at("posterior_sample") * sample + at("posterior_noisy") * noisy

    true_log_variance = at("posterior_log_variance")
    share = (values + 1) / 2
    log_variance = share * at("log_beta") + (1 - share) * true_log_variance
    mean = posterior_mean(schedule.sample(prediction, noisy, timesteps))

    distance = (posterior_mean(inputs) - mean) ** 2 * torch.exp(-log_variance)
    kl = 0.5 * (log_variance - true_log_variance - 1 + torch.exp(true_log_variance - log_variance) + distance)
    first = -_log_likelihood(inputs, mean, 0.5 * log_variance)
    at_zero = (timesteps == 0).reshape(-1, *[1] * (inputs.dim() - 1))
    return torch.where(at_zero, first, kl) / math.log(2)


def _log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Of the level of 2/255 around x under a Gaussian; the outermost levels reach to infinity."""
    centred, inverse = x - mean, torch.exp(-log_scale)
    upper, lower = _normal_cdf(inverse * (centred + 1 / 255)), _normal_cdf(inverse * (centred - 1 / 255))
    inside = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inside).clamp_min(1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The approximation that the released code uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
