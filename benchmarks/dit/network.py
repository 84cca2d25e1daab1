"""Diffusion transformers by shape (arXiv 2212.09748), with random weights, and made-up latents for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_ext.errors import InputError
from unlearn_ext.models.weights import tie_embeddings
from unlearn_ext.tasks import ClassConditionalDiffusion

__all__ = ["LAYOUTS", "NETWORKS", "Drawn", "Shape", "batches", "build", "task"]


@dataclass(frozen=True)
class Shape:
    """Depth in blocks, width of a token, attention heads; patches of 2."""

    depth: int
    width: int
    heads: int


NETWORKS = {
    "dit-s-2": Shape(12, 384, 6),
    "dit-b-2": Shape(12, 768, 12),
    "dit-l-2": Shape(24, 1024, 16),
    "dit-xl-2": Shape(28, 1152, 16),
}
LAYOUTS = {
    "diffusers": "every block has embedders of its own",
    "paper": "all blocks share one embedder, as in the paper",
}
CLASSES, SIZE, CHANNELS = 1000, 32, 4  # ImageNet at 256 × 256, as latents
_FORGOTTEN = 207  # the class to be forgotten; any would do
_SPREAD = 0.02  # of weights that would start at 0, through which no gradient would pass


def build(shape: Shape, layout: str, *, checkpointing: bool = False) -> nn.Module:
    """diffusers' DiTTransformer2DModel with learned variance, on the device that torch makes tensors on.

    Args:
        layout: one of :data:`LAYOUTS`.
        checkpointing: make activations anew in the backward pass.
    """
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError:
        raise InputError("diffusers is not installed: pip install 'unlearn_ext[diffusion]'") from None
    if shape.width % shape.heads:
        raise InputError(f"the width {shape.width} is no multiple of {shape.heads} heads: choose another width")
    model = DiTTransformer2DModel(
        num_attention_heads=shape.heads,
        attention_head_dim=shape.width // shape.heads,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=shape.depth,
        sample_size=SIZE,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )
    with torch.no_grad():
        for p in model.parameters():
            if not p.is_meta and not p.any():
                p.normal_(std=_SPREAD)
        first, *others = (block.norm1.emb for block in model.transformer_blocks)
        for embedder in others:  # copies, as in a published file
            embedder.load_state_dict(first.state_dict())
    if layout == "paper":
        tie_embeddings(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model


class Drawn(ClassConditionalDiffusion):
    """Takes batches that are prepared already, so that all ways have the same noise and timesteps."""

    def check(self, batch: Any) -> None:
        pass

    def prepare(self, batch: Any, device: torch.device) -> dict[str, Tensor]:
        return batch


def task(model: nn.Module) -> Drawn:
    """Of squared errors and variational bound, with the released settings."""
    from diffusers import DDPMScheduler

    from unlearn_ext.methods import DOMAINS

    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", variance_type="learned_range")
    drawn = Drawn(scheduler, **DOMAINS["dit-xl-2-256"]["task"])
    drawn.begin(model, None)
    return drawn


def batches(task: Drawn, count: int, size: int, forgotten: bool, device: torch.device) -> list[dict[str, Tensor]]:
    """Prepared batches of latents from a normal distribution, of one class to be forgotten or of the others."""
    generator = torch.Generator().manual_seed(1 + forgotten)
    latents = torch.randn(count * size, CHANNELS, SIZE, SIZE, generator=generator)
    others = torch.randint(CLASSES - 1, (count * size,), generator=generator)
    labels = torch.full_like(others, _FORGOTTEN) if forgotten else others + (others >= _FORGOTTEN)
    whole = ClassConditionalDiffusion.prepare(task, (latents, labels), device)
    return [{name: t[i : i + size] for name, t in whole.items()} for i in range(0, count * size, size)]
