"""What to minimise, where, and on which schedule: one small file for each method."""

from .base import Method, Row
from .domains import DOMAINS
from .registry import METHODS, available, find
from .sfron import SFRon
from .spec import parse

__all__ = ["DOMAINS", "METHODS", "Method", "Row", "SFRon", "available", "find", "parse"]
