"""Settings that a search found for each method: the files ``presets/digits-<scenario>.json``.

``benchmarks/tune_methods.py`` finds and prints them: an equal budget of trials for every method, seeds from 100 up.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["tuned_settings"]


@cache
def tuned_settings(scenario: str) -> dict[str, dict[str, Any]]:
    """Settings by method, or by method and the settings that they belong to; ``scenario``: ``random`` or ``class``."""
    file = Path(__file__).parent / "presets" / f"digits-{scenario}.json"
    return json.loads(file.read_text(encoding="utf-8"))
