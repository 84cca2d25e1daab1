"""What to minimise, where, and on which schedule: one small file for each method."""

from .base import Method
from .sfron import SFRon

__all__ = ["Method", "SFRon"]
