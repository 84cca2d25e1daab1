"""Deterministic sampling: DDIM from given noise, so that two models can be compared picture by picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.modes import evaluating
from ..errors import InputError
from ..utils.arguments import check_count, check_finite

__all__ = [
    "DECODED_AT_ONCE",
    "SAMPLED_AT_ONCE",
    "check_steps",
    "decode",
    "draw_noise",
    "sample_classes",
    "sample_prompts",
]

SAMPLED_AT_ONCE = 64
DECODED_AT_ONCE = 8

# x_t, timesteps [n], which of the samples these are -> the model's prediction
_Predict = Callable[[Tensor, Tensor, slice], Tensor]
_Progress = Callable[[int, int], None]


def check_steps(name: str, steps: int, scheduler: Any) -> None:
    """Whether the scheduler's training has so many timesteps; ``name`` is the argument's."""
    check_count(name, steps)
    timesteps = scheduler.config.num_train_timesteps
    if steps > timesteps:
        raise InputError(f"{name}: expected at most {timesteps}, as in training, got {steps}")
    if int(_ddim(scheduler, steps).timesteps.max()) >= timesteps:  # by steps_offset
        raise InputError(
            f"{name}: {steps} steps, shifted by the scheduler, end past its {timesteps} timesteps: take fewer"
        )


def draw_noise(count: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal noise [count, *shape] on the CPU. Each sample has a generator of its own: sample i is the same
    whatever ``count`` is, and seeds share none up to a million samples."""
    generator, first = torch.Generator(), 1_000_003 * (seed + 1)
    return torch.stack(
        [
            torch.randn(
                shape, generator=generator.manual_seed((first + i) % (1 << 63)), dtype=torch.float32, device="cpu"
            )
            for i in range(count)
        ]
    )


@torch.no_grad()
def sample_classes(
    model: nn.Module,
    scheduler: Any,
    labels: Tensor,
    noise: Tensor,
    *,
    steps: int = 50,
    guidance: float | None = None,
    null_label: int | None = None,
    batch_size: int = SAMPLED_AT_ONCE,
    progress: _Progress = lambda done, total: None,
) -> Tensor:
    """Samples of a class-conditional model, by DDIM (arXiv 2010.02502) with eta = 0.

    With guidance s (arXiv 2207.12598) the prediction is e_u + s (e_c - e_u), where e_u is predicted for the null label.

    Args:
        model: diffusers' ``UNet2DModel`` or ``DiTTransformer2DModel``, or one called alike; of channels beyond the
            noise's, a learned variance, no use is made.
        scheduler: any diffusers scheduler; its configuration says betas and what is predicted.
        labels: integers [N].
        noise: [N, C, H, W], in the model's space.
        steps: denoising steps.
        guidance: s; None or 1 predict once, without the null label.
        null_label: what stands for no label.
        batch_size: samples at once; with guidance the model sees twice as many.

    Returns:
        float32 [N, C, H, W] on the CPU: pictures in [-1, 1], or latents.
    """
    guided = guidance is not None and guidance != 1.0
    if guided:
        check_finite("guidance", guidance)
        if null_label is None:
            raise InputError("guidance needs a null label: give null_label, or sample with guidance=None")
    if len(labels) != len(noise):
        raise InputError(f"labels: expected {len(noise)}, one for each sample of noise, got {len(labels)}")
    device = next(model.parameters()).device
    labels = labels.to(device).long()

    def predict(x: Tensor, t: Tensor, chosen: slice) -> Tensor:
        conditions = labels[chosen]
        if not guided:
            return model(x, timestep=t, class_labels=conditions).sample
        both = torch.cat([conditions, torch.full_like(conditions, null_label)])
        return _guide(model(x.repeat(2, 1, 1, 1), timestep=t.repeat(2), class_labels=both).sample, guidance)

    return _sample(model, predict, scheduler, noise, steps, batch_size, progress)


@torch.no_grad()
def sample_prompts(
    model: nn.Module,
    scheduler: Any,
    prompt_embeds: Tensor,
    noise: Tensor,
    *,
    steps: int = 50,
    guidance: float | None = None,
    null_embeds: Tensor | None = None,
    batch_size: int = SAMPLED_AT_ONCE,
    progress: _Progress = lambda done, total: None,
) -> Tensor:
    """The same for diffusers' ``UNet2DConditionModel``.

    Args:
        prompt_embeds: the text encoder's hidden states [N, tokens, width].
        null_embeds: those of the empty prompt, [tokens, width].
    """
    guided = guidance is not None and guidance != 1.0
    if guided:
        check_finite("guidance", guidance)
        if null_embeds is None:
            raise InputError("guidance needs the empty prompt: give null_embeds, or sample with guidance=None")
    if len(prompt_embeds) != len(noise):
        raise InputError(f"prompt_embeds: expected {len(noise)}, one for each sample, got {len(prompt_embeds)}")
    weight = next(model.parameters())
    prompt_embeds = prompt_embeds.to(weight)

    def predict(x: Tensor, t: Tensor, chosen: slice) -> Tensor:
        conditions = prompt_embeds[chosen]
        if not guided:
            return model(x, t, encoder_hidden_states=conditions).sample
        both = torch.cat([conditions, null_embeds.to(conditions).expand_as(conditions)])
        return _guide(model(x.repeat(2, 1, 1, 1), t.repeat(2), encoder_hidden_states=both).sample, guidance)

    return _sample(model, predict, scheduler, noise, steps, batch_size, progress)


@torch.no_grad()
def decode(vae: nn.Module, latents: Tensor, batch_size: int = DECODED_AT_ONCE) -> Tensor:
    """Pictures in [-1, 1], float32 on the CPU, of latents in the denoiser's space, which are the VAE's times its
    ``scaling_factor``."""
    weight, pictures = next(vae.parameters()), []
    scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
    with evaluating(vae):
        for part in latents.split(batch_size):
            pictures.append(vae.decode((part / scale + shift).to(weight)).sample.float().clamp(-1, 1).cpu())
    return torch.cat(pictures)


def _guide(predicted: Tensor, guidance: float) -> Tensor:
    conditional, unconditional = predicted.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def _ddim(scheduler: Any, steps: int) -> Any:
    from diffusers import DDIMScheduler

    # Clipped only where the scheduler says so: DDIM's own default would cut latents to [-1, 1].
    ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=bool(scheduler.config.get("clip_sample", False)))
    ddim.set_timesteps(steps)
    return ddim


def _sample(
    model: nn.Module,
    predict: _Predict,
    scheduler: Any,
    noise: Tensor,
    steps: int,
    batch_size: int,
    progress: _Progress,
) -> Tensor:
    check_steps("steps", steps, scheduler)
    check_count("batch_size", batch_size)
    weight = next(model.parameters())
    ddim = _ddim(scheduler, steps)
    parts = []
    with evaluating(model):
        for start in range(0, len(noise), batch_size):
            chosen = slice(start, start + batch_size)
            x = noise[chosen].to(weight.device, torch.float32)
            for t in ddim.timesteps:
                times = torch.full((len(x),), int(t), device=x.device)
                predicted = predict(x.to(weight.dtype), times, chosen)[:, : x.shape[1]].float()
                # Where the sample is clipped the noise must follow it, or the error grows under guidance.
                x = ddim.step(predicted, int(t), x, use_clipped_model_output=True).prev_sample
            parts.append(x.cpu())
            progress(min(start + batch_size, len(noise)), len(noise))
    return torch.cat(parts)
