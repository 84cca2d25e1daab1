"""A residual network small enough to train on two CPU cores in seconds."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SmallResNet(nn.Module):
    """A three-stage residual network with batch normalisation for 28 × 28 images (arXiv 1512.03385).

    A stride-2 stem, then one two-convolution block per stage; each stage but the first halves the resolution
    (14, 7, 4), then the mean over pixels and a linear layer. 164,122 weights with the default widths. The
    stem's stride costs no accuracy on digits and saves three quarters of the work.

    Args:
        num_classes: length of the logits.
        in_channels: 1 for grey images.
        widths: channels of the stages.
        seed: draws the initial weights from this seed and leaves the global generator alone; ``None`` draws
            them from the global generator as any module does.

    ``forward`` takes float images ``[N, in_channels, 28, 28]`` and returns logits ``[N, num_classes]``.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        widths: Sequence[int] = (16, 48, 96),
        seed: int | None = None,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.random.default_generator.manual_seed(seed)
            self.stem = nn.Sequential(
                nn.Conv2d(in_channels, widths[0], 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(widths[0]),
                nn.ReLU(),
            )
            inputs = (widths[0], *widths[:-1])
            self.stages = nn.Sequential(
                *(
                    ResidualBlock(i, o, stride=1 if n == 0 else 2)
                    for n, (i, o) in enumerate(zip(inputs, widths, strict=True))
                )
            )
            self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(images)).mean(dim=(2, 3)))


class ResidualBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)); shapes that differ take a 1 × 1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))
