"""What to minimise, where, and on which schedule: one small file for each method."""

from .base import Method
from .domains import DOMAINS
from .sfron import SFRon

__all__ = ["DOMAINS", "Method", "SFRon"]
