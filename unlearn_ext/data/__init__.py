"""Data that needs no download."""

from .digits import Digits, DigitSplit, load_digits

__all__ = ["DigitSplit", "Digits", "load_digits"]
