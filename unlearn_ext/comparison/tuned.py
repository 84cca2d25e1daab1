"""Settings found by ``benchmarks/tune_methods.py``: an equal budget of trials for every method, seeds from 100 up."""

from __future__ import annotations

from typing import Any

__all__ = ["TUNED"]

# By scenario, then by method.
TUNED: dict[str, dict[str, dict[str, Any]]] = {"random": {}, "class": {}}
