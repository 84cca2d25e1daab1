"""Pictures side by side in one PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..errors import InputError
from ..utils.files import atomic_path
from ..utils.pixels import to_bytes

__all__ = ["write_grid"]


def write_grid(
    path: str | Path,
    rows: Mapping[str, Tensor],
    columns: Sequence[str] = (),
    *,
    scale: int | None = None,
    gap: int = 2,
) -> None:
    """Writes rows of pictures, each with its name before it, under the columns' names.

    Args:
        path: ends in ``.png``.
        rows: name -> pictures [N, C, H, W] in [-1, 1], C of 1 or 3; rows may differ in length.
        columns: names of the pictures' positions; several pictures may share one, which is then written once, over
            the first of them.
        scale: each pixel becomes scale × scale; by default so that a picture is at least 48 pixels wide.
        gap: pixels between pictures.
    """
    from PIL import Image, ImageDraw, ImageFont

    path = Path(path)
    if path.suffix != ".png":
        raise InputError(f"the grid of pictures: expected a name that ends in .png, got {path}")
    pictures = {name: _pixels(images) for name, images in rows.items()}
    height, width = next(iter(pictures.values())).shape[1:3]
    scale = scale or max(1, -(-48 // width))
    font = ImageFont.load_default(13)
    margin = 12 + max(int(font.getlength(name)) for name in pictures)
    top = 22 if columns else 0
    cell_width, cell_height = width * scale + gap, height * scale + gap
    longest = max(len(row) for row in pictures.values())
    canvas = Image.new("RGB", (margin + longest * cell_width, top + len(pictures) * cell_height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, column in enumerate(columns):
        if i == 0 or column != columns[i - 1]:
            draw.text((margin + i * cell_width + 2, 3), column, "black", font)
    for y, (name, row) in enumerate(pictures.items()):
        line = top + y * cell_height
        draw.text((5, line + cell_height / 2), name, "black", font, anchor="lm")
        for x, picture in enumerate(row):
            image = Image.fromarray(picture.numpy()).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            canvas.paste(image, (margin + x * cell_width, line))
    with atomic_path(path) as partial:
        canvas.save(partial, format="PNG", optimize=True)


def _pixels(images: Tensor) -> Tensor:
    """uint8 [N, H, W, 3]."""
    images = images.detach().float().cpu()
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise InputError(f"pictures: expected shape [N, 1 or 3, H, W], got {list(images.shape)}")
    pixels = to_bytes(images)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()
