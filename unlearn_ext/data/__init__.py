"""Data: digits that need no download, a user's images and latents, and the samples that a run draws from them."""

from .digits import Digits, DigitSplit, load_digits
from .drawing import Draw, draw_indices, until_readable
from .images import ClassRow, ImageData, count_classes, open_data
from .labels import label_names, parse_classes, read_class_map
from .latents import LatentData, encode_latents, latents_size

__all__ = [
    "ClassRow",
    "DigitSplit",
    "Digits",
    "Draw",
    "ImageData",
    "LatentData",
    "count_classes",
    "draw_indices",
    "encode_latents",
    "label_names",
    "latents_size",
    "load_digits",
    "open_data",
    "parse_classes",
    "read_class_map",
    "until_readable",
]
