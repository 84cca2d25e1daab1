"""Data: digits that need no download, a user's images and latents, and the samples that a run draws from them."""

from .digits import Digits, DigitSplit, load_digits
from .images import ClassRow, ImageData, count_classes, open_data
from .labels import label_names, parse_classes, read_class_map
from .latents import Draw, LatentData, draw_indices, draw_readable, encode_latents, latents_size

__all__ = [
    "ClassRow",
    "DigitSplit",
    "Digits",
    "Draw",
    "ImageData",
    "LatentData",
    "count_classes",
    "draw_indices",
    "draw_readable",
    "encode_latents",
    "label_names",
    "latents_size",
    "load_digits",
    "open_data",
    "parse_classes",
    "read_class_map",
]
