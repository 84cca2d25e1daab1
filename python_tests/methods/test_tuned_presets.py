"""The presets that a search found: the settings of the results that stand in the README, to the last bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from unlearn_ext.methods.tuned import tuned_settings

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("scenario", "digest"),
    [
        ("random", "d6354ee1e639444d3cb0a294b9d0c257542dbd15f857eafbfbe13dbb9bde77ce"),
        ("class", "7d46863f56fcd0e7f4c24a7b40356781590b0ec34a3947b4c39946022c941526"),
    ],
)
def test_presets_are_the_winners_of_the_search(scenario, digest) -> None:
    settings = tuned_settings(scenario)
    assert hashlib.sha256(repr(settings).encode()).hexdigest() == digest
    methods = json.loads((RESULTS / f"tuning-{scenario}.json").read_text())["methods"]
    assert repr(settings) == repr({name: row["best"]["settings"] for name, row in methods.items()})
