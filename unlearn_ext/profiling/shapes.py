"""The parameter shapes of known networks, written as formulas: no network is built to measure its update."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import InputError
from ..utils.arguments import describe

__all__ = ["LAYOUTS", "SHAPES", "count", "cut", "named", "of_safetensors"]

Shape = tuple[int, ...]

_MOST_TENSORS = 1_000_000


def _linear(inputs: int, outputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


def _conv(inputs: int, outputs: int, kernel: int = 3) -> list[Shape]:
    return [(outputs, inputs, kernel, kernel), (outputs,)]


def _norm(channels: int) -> list[Shape]:
    return [(channels,), (channels,)]


# --- Transformers -------------------------------------------------------------------------------------------


def _dit(width: int, depth: int, patch: int) -> list[Shape]:
    """diffusers' DiTTransformer2DModel, in which every block owns a copy of the timestep and label embedders."""
    block = [
        *_linear(256, width),
        *_linear(width, width),
        (1001, width),  # labels, and the null label
        *_linear(width, 6 * width),
        *(4 * _linear(width, width)),  # query, key, value, output
        *_linear(width, 4 * width),
        *_linear(4 * width, width),
    ]
    return [
        *_conv(4, width, patch),
        *(depth * block),
        *_linear(width, 2 * width),
        *_linear(width, 8 * patch * patch),
    ]


# --- U-nets -------------------------------------------------------------------------------------------------


def _residual(inputs: int, outputs: int, embedding: int) -> list[Shape]:
    shortcut = _conv(inputs, outputs, 1) if inputs != outputs else []
    time = _linear(embedding, outputs)
    return [*_norm(inputs), *_conv(inputs, outputs), *time, *_norm(outputs), *_conv(outputs, outputs), *shortcut]


def _self_attention(channels: int) -> list[Shape]:
    return [*_norm(channels), *(4 * _linear(channels, channels))]


def _cross_attention(channels: int) -> list[Shape]:
    """Stable Diffusion 1's transformer block: attention to itself, to text of width 768, gated feed-forward."""
    attention = [*(3 * [(channels, channels)]), *_linear(channels, channels)]
    text = [(channels, channels), *(2 * [(channels, 768)]), *_linear(channels, channels)]
    feed = [*_linear(channels, 8 * channels), *_linear(4 * channels, channels)]
    projection = _conv(channels, channels, 1)
    return [*(4 * _norm(channels)), *(2 * projection), *attention, *text, *feed]


def _unet(
    channels: Sequence[int],
    attended: Sequence[bool],
    attention: Callable[[int], list[Shape]],
    samples: int,
    layers: int = 2,
) -> list[Shape]:
    """diffusers' U-nets: ``samples`` channels in and out, attention on some levels, every level but one resampled."""
    first, embedding = channels[0], 4 * channels[0]
    shapes = [*_conv(samples, first), *_linear(first, embedding), *_linear(embedding, embedding)]
    current, skips = first, [first]
    for level, width in enumerate(channels):
        for _ in range(layers):
            shapes += _residual(current, width, embedding)
            shapes += attention(width) if attended[level] else []
            current = width
            skips.append(width)
        if level < len(channels) - 1:
            shapes += _conv(width, width)
            skips.append(width)
    shapes += [*_residual(current, current, embedding), *attention(current), *_residual(current, current, embedding)]
    for level, width in reversed(list(enumerate(channels))):
        for _ in range(layers + 1):
            shapes += _residual(current + skips.pop(), width, embedding)
            shapes += attention(width) if attended[level] else []
            current = width
        shapes += _conv(width, width) if level else []
    return [*shapes, *_norm(first), *_conv(first, samples)]


# --- Classifiers --------------------------------------------------------------------------------------------


def _resnet18(classes: int = 10) -> list[Shape]:
    """ResNet-18 with the 3 × 3 stem that CIFAR needs; convolutions have no bias."""
    shapes: list[Shape] = [(64, 3, 3, 3), *_norm(64)]
    current = 64
    for width in (64, 128, 256, 512):
        for inputs in (current, width):
            shapes += [(width, inputs, 3, 3), *_norm(width), (width, width, 3, 3), *_norm(width)]
            shapes += [(width, inputs, 1, 1), *_norm(width)] if inputs != width else []
        current = width
    return [*shapes, *_linear(current, classes)]


# --- By name ------------------------------------------------------------------------------------------------

SHAPES: dict[str, Callable[[], list[Shape]]] = {
    "dit-xl-2": lambda: _dit(1152, 28, 2),
    "dit-b-4": lambda: _dit(768, 12, 4),
    "ddpm-cifar10": lambda: _unet((128, 256, 256, 256), (False, True, False, False), _self_attention, 3),
    "resnet18": _resnet18,
    "sd-unet": lambda: _unet((320, 640, 1280, 1280), (True, True, True, False), _cross_attention, 4),
}
# Which of the layouts in circulation is meant.
LAYOUTS = {
    "dit-xl-2": "diffusers' DiT-XL/2, embedders in every block",
    "dit-b-4": "DiT-B/4 in diffusers' layout, embedders in every block",
    "ddpm-cifar10": "google/ddpm-cifar10-32 of diffusers",
    "resnet18": "ResNet-18, CIFAR stem, 10 classes",
    "sd-unet": "U-net of Stable Diffusion 1.4",
}


def named(name: str) -> list[Shape]:
    """A known network's shapes, or ``300x1000``: 300 tensors of 1,000 weights; or those in a safetensors file."""
    if name in SHAPES:
        return SHAPES[name]()
    if equal := re.fullmatch(r"(\d+)x(\d+)", name):
        tensors, weights = (int(digits[:20]) for digits in equal.groups())  # more digits than memory has bytes
        if tensors > _MOST_TENSORS or weights >= 2**63:
            raise InputError(f"shapes {name[:40]}: expected at most {_MOST_TENSORS:,} tensors of 2^63 - 1 weights")
        if tensors and weights:
            return tensors * [(weights,)]
    if name.endswith(".safetensors"):
        return of_safetensors(Path(name))
    raise InputError(
        f"shapes {describe(name)} are not known: choose from {', '.join(SHAPES)}, tensors of one size as in 300x1000, "
        "or a .safetensors file"
    )


def of_safetensors(path: Path) -> list[Shape]:
    """The shapes of the floating tensors in a safetensors file, from its header alone."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > 100_000_000:  # the format's own limit
                raise ValueError("header too long")
            header = json.loads(file.read(length))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        shapes = [_shape(entry["shape"]) for entry in entries if entry["dtype"] in ("F64", "F32", "F16", "BF16")]
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror or error})") from None
    except (ValueError, struct.error, AttributeError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is no safetensors file: its header does not parse") from None
    if not count(shapes):
        raise InputError(f"{path} holds no floating tensors")
    return shapes


def _shape(sizes: object) -> Shape:
    if not isinstance(sizes, list) or not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
        raise ValueError("a shape is a list of counts")
    return tuple(sizes)


def count(shapes: Sequence[Shape]) -> int:
    return sum(map(math.prod, shapes))


def cut(shapes: Sequence[Shape], weights: int | None) -> list[Shape]:
    """The first tensors, whole, up to about so many weights; never none. Sizes of single tensors stay real."""
    if weights is None or count(shapes) <= weights:
        return list(shapes)
    kept: list[Shape] = []
    total = 0
    for shape in shapes:
        size = math.prod(shape)
        if kept and total + size - weights > weights - total:  # farther from the goal with it than without
            break
        kept.append(shape)
        total += size
        if total >= weights:
            break
    return kept
