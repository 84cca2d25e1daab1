"""Two networks to time whole iterations with: what forward and backward cost decides what a fast update is worth."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unlearn_ext.demo.network import ResidualBlock

__all__ = ["NETWORKS", "ResNet18", "SmallDiT"]


class ResNet18(nn.Module):
    """ResNet-18 with the 3 × 3 stem that CIFAR needs: 11.2 M weights."""

    batch_size = 32  # a quarter of the released 128, which takes minutes on two cores

    def __init__(self, width: int = 64, classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks, inputs = [], width
        for stage in range(4):
            outputs = width << stage
            blocks += [
                ResidualBlock(inputs, outputs, stride=2 if stage else 1),
                ResidualBlock(outputs, outputs, stride=1),
            ]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))

    @staticmethod
    def batch(size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator)

    def losses(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self(images), labels, reduction="none")


class SmallDiT(nn.Module):
    """A diffusion transformer (arXiv 2212.09748) on 4 × 16 × 16 latents, patches of 2: 18.9 M weights.

    As in the original layout, all blocks share the embedders.
    """

    batch_size = 1  # as released for DiT

    def __init__(self, width: int = 384, depth: int = 7, classes: int = 10):
        super().__init__()
        self.patches = nn.Conv2d(4, width, 2, stride=2)
        self.position = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.out = nn.Linear(width, 16)

    def forward(self, latents: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        x = self.patches(latents).flatten(2).transpose(1, 2) + self.position
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=time.device) / 128)
        angles = time[:, None] * frequencies
        condition = self.time(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.label(labels)
        for block in self.blocks:
            x = block(x, condition)
        x = self.out(x).view(-1, 8, 8, 4, 2, 2)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)

    @staticmethod
    def batch(size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        latents, noise = torch.randn(2, size, 4, 16, 16, generator=generator)
        time = torch.randint(1000, (size,), generator=generator)
        return latents, noise, time, torch.randint(10, (size,), generator=generator)

    def losses(self, latents: Tensor, noise: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        signal = torch.cos(time * (math.pi / 2000))[:, None, None, None]  # the cosine schedule's square root of ᾱ
        noisy = signal * latents + (1 - signal.square()).sqrt() * noise
        return (self(noisy, time, labels) - noise).square().mean(dim=(1, 2, 3))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int = 6):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(F.silu(condition))[:, None].chunk(6, dim=2)
        y = F.layer_norm(x, x.shape[2:]) * (1 + scale) + shift
        q, k, v = self.qkv(y).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.projection(y)
        y = F.layer_norm(x, x.shape[2:]) * (1 + scale2) + shift2
        return x + gate2 * self.feed(y)


NETWORKS = {"resnet18": ResNet18, "dit": SmallDiT}
